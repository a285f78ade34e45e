"""FLUX.2's VAE: pixels <-> latents, channels-last from end to end.

Encoder and decoder with one attention in the middle, 1x1 convolutions as linear layers, and the running statistics
with which the transformer's latents are normalised. It knows arrays, not pictures or files.

Source: diffusers, models/autoencoders/autoencoder_kl_flux2.py (AutoencoderKLFlux2) and vae.py. Names are our own.
"""

import mlx.core as mx
import mlx.nn as nn

from klein_mlx.config import VAEConfig
from klein_mlx.fusion import fused

EPS = 1e-6  # of every GroupNorm; no config states it
SCORES = 1 << 26  # attention scores alive at once: queries are taken in rows of so many


class GroupNorm(nn.Module):
    """GroupNorm over channels-last pictures, optionally followed by SiLU.

    Statistics are float32, of the whole picture; they become one scale and one shift per channel, so that applying
    them is a single elementwise kernel in any dtype.
    """

    def __init__(self, groups: int, channels: int):
        super().__init__()
        self.groups = groups
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))

    def affine(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x: (B, H, W, C). Returns (scale, shift), each (B, 1, 1, C) float32, such that x * scale + shift is normed."""
        b, height, width, c = x.shape
        grouped = x.reshape(b, height, width, self.groups, c // self.groups).astype(mx.float32)
        mean = grouped.mean(axis=(2, 4), keepdims=True).mean(axis=1, keepdims=True)  # rows first: sums stay short
        var = mx.square(grouped - mean).mean(axis=(2, 4), keepdims=True).mean(axis=1, keepdims=True)
        scale = mx.rsqrt(var + EPS) * self.weight.astype(mx.float32).reshape(self.groups, -1)
        shift = self.bias.astype(mx.float32).reshape(self.groups, -1) - mean * scale
        return scale.reshape(b, 1, 1, c), shift.reshape(b, 1, 1, c)

    def __call__(self, x: mx.array, activate: bool = False) -> mx.array:
        return (_scale_shift_silu if activate else _scale_shift)(x, *self.affine(x))


@fused
def _scale_shift(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    return (x.astype(mx.float32) * scale + shift).astype(x.dtype)


@fused
def _scale_shift_silu(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    out = x.astype(mx.float32) * scale + shift
    return (out * mx.sigmoid(out)).astype(x.dtype)


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, twice, around a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = GroupNorm(groups, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.shortcut = nn.Linear(channels_in, channels_out)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.conv1(self.norm1(x, activate=True))
        h = self.conv2(self.norm2(h, activate=True))
        return (self.shortcut(x) if "shortcut" in self else x) + h


def _resnets(channels_in: int, channels_out: int, layers: int, groups: int) -> list[ResnetBlock]:
    """The resnets of one level; the first one changes the number of channels."""
    return [ResnetBlock(channels_in if i == 0 else channels_out, channels_out, groups) for i in range(layers)]


class Attention(nn.Module):
    """Single-head attention over all positions of the grid."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.norm(x).flatten(1, 2)[:, None]  # (B, one head, H * W, C)
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        rows = max(1, SCORES // k.shape[2])
        out = [
            mx.fast.scaled_dot_product_attention(q[:, :, i : i + rows], k, v, scale=q.shape[-1] ** -0.5)
            for i in range(0, q.shape[2], rows)
        ]
        return x + self.to_out(mx.concatenate(out, axis=2)).reshape(x.shape)


class Middle(nn.Module):
    """The deepest level: a resnet, the attention (if the config has it), a resnet."""

    def __init__(self, channels: int, config: VAEConfig):
        super().__init__()
        groups = config.norm_num_groups
        self.resnets = [ResnetBlock(channels, channels, groups) for _ in range(2)]
        if config.mid_block_add_attention:
            self.attention = Attention(channels, groups)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.resnets[0](x)
        if "attention" in self:
            x = self.attention(x)
        return self.resnets[1](x)


class DownBlock(nn.Module):
    """Resnets, then half the size (except at the last level)."""

    def __init__(self, channels_in: int, channels_out: int, layers: int, groups: int, downsample: bool):
        super().__init__()
        self.resnets = _resnets(channels_in, channels_out, layers, groups)
        if downsample:
            self.downsample = nn.Conv2d(channels_out, channels_out, 3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        for resnet in self.resnets:
            x = resnet(x)
        if "downsample" in self:  # padded on the right and the bottom only
            x = self.downsample(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))
        return x


class UpBlock(nn.Module):
    """Resnets, then twice the size by repeating pixels and a conv (except at the last level)."""

    def __init__(self, channels_in: int, channels_out: int, layers: int, groups: int, upsample: bool):
        super().__init__()
        self.resnets = _resnets(channels_in, channels_out, layers, groups)
        if upsample:
            self.upsample = nn.Conv2d(channels_out, channels_out, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        for resnet in self.resnets:
            x = resnet(x)
        if "upsample" in self:
            b, h, w, c = x.shape
            x = mx.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
            x = self.upsample(x)
        return x


class Encoder(nn.Module):
    """Pixels (B, H, W, 3) -> moments (B, H/8, W/8, 2 * latent channels)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        pairs = list(zip((channels[0], *channels), channels, strict=False))
        last = len(pairs) - 1
        self.down = [DownBlock(i, o, config.layers_per_block, groups, n < last) for n, (i, o) in enumerate(pairs)]
        self.mid = Middle(channels[-1], config)
        self.norm_out = GroupNorm(groups, channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_in(x)
        for block in self.down:
            x = block(x)
        return self.conv_out(self.norm_out(self.mid(x), activate=True))


class Decoder(nn.Module):
    """Latents (B, h, w, latent channels) -> pixels (B, 8h, 8w, 3)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels = tuple(reversed(config.decoder_block_out_channels or config.block_out_channels))
        groups = config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid = Middle(channels[0], config)
        pairs = list(zip((channels[0], *channels), channels, strict=False))
        last = len(pairs) - 1
        self.up = [UpBlock(i, o, config.layers_per_block + 1, groups, n < last) for n, (i, o) in enumerate(pairs)]
        self.norm_out = GroupNorm(groups, channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def __call__(self, z: mx.array) -> mx.array:
        x = self.mid(self.conv_in(z))
        for block in self.up:
            x = block(x)
        return self.conv_out(self.norm_out(x, activate=True))


class VAE(nn.Module):
    """AutoencoderKLFlux2. Works in the dtype of its weights; the latent statistics are float32."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.use_quant_conv:
            self.quant_conv = nn.Linear(2 * config.latent_channels, 2 * config.latent_channels)
        if config.use_post_quant_conv:
            self.post_quant_conv = nn.Linear(config.latent_channels, config.latent_channels)
        self.latent_mean = mx.zeros((4 * config.latent_channels,))
        self.latent_var = mx.ones((4 * config.latent_channels,))

    def encode(self, pixels: mx.array) -> mx.array:
        """The mean of the posterior: nothing is sampled.

        pixels: (B, H, W, 3) in [-1, 1], H and W multiples of 16. Returns z (B, H/8, W/8, latent channels).
        """
        moments = self.encoder(pixels)
        if "quant_conv" in self:
            moments = self.quant_conv(moments)
        return moments[..., : self.config.latent_channels]

    def decode(self, z: mx.array) -> mx.array:
        """z: (B, h, w, latent channels), denormalised. Returns pixels (B, 8h, 8w, 3), about [-1, 1], not clipped."""
        if "post_quant_conv" in self:
            z = self.post_quant_conv(z)
        return self.decoder(z)

    def normalize(self, latents: mx.array) -> mx.array:
        """Patchified latents (B, h, w, 4C) -> what the transformer was trained on: zero mean, unit variance."""
        mean, std = self._statistics(latents.dtype)
        return (latents - mean) / std

    def denormalize(self, latents: mx.array) -> mx.array:
        """The inverse of `normalize`."""
        mean, std = self._statistics(latents.dtype)
        return latents * std + mean

    def _statistics(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        # The BatchNorm's own eps, 1e-4, not the GroupNorms'.
        std = mx.sqrt(self.latent_var.astype(mx.float32) + self.config.batch_norm_eps)
        return self.latent_mean.astype(dtype), std.astype(dtype)
