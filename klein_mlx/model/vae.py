"""FLUX.2's VAE: pixels <-> latents, channels-last from end to end.

Encoder and decoder with one attention in the middle, 1x1 convolutions as linear layers, and the running statistics
with which the transformer's latents are normalized. It knows arrays, not pictures or files.

Source: diffusers, models/autoencoders/autoencoder_kl_flux2.py (AutoencoderKLFlux2) and vae.py. Names are our own.
"""

from collections.abc import Callable
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from klein_mlx.config import VAEConfig
from klein_mlx.model.layers import Device, Linear, Placed
from klein_mlx.model.vae_layers import Conv, Done, Downsample, GroupNorm, Pace, settled

WHOLE_PIXELS, WHOLE_PIXELS_CPU = 512 * 512, 128 * 128  # a picture up to this is done in one piece
STRIP_PIXELS, STRIP_PIXELS_CPU = 1 << 17, 1 << 15  # in a strip of a larger one
SCORES = 1 << 26  # attention scores alive at once: queries are taken in rows of so many


# One layer, of the picture and the rows per strip. The halves call them one by one: a block that held its input while
# its layers run would keep a whole picture more in memory.
Layer = Callable[[mx.array, int | None], mx.array]


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, twice, around a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, channels_in)
        self.conv1 = Conv(channels_in, channels_out)
        self.norm2 = GroupNorm(groups, channels_out)
        self.conv2 = Conv(channels_out, channels_out)
        if channels_in != channels_out:
            self.shortcut = Linear(channels_in, channels_out, bias=True)

    def __call__(self, x: mx.array, rows: int | None = None) -> mx.array:
        def residual(part: slice) -> mx.array:
            return self.shortcut(x[:, part]) if "shortcut" in self else x[:, part]

        if rows:
            return self.conv2.strips(self.conv1.strips(x, rows, self.norm1), rows, self.norm2, residual=residual)
        h = self.conv1(self.norm1(x, activate=True))
        return residual(slice(None)) + self.conv2(self.norm2(h, activate=True))


def _resnets(channels_in: int, channels_out: int, layers: int, groups: int) -> list[ResnetBlock]:
    """The resnets of one level; the first one changes the number of channels."""
    return [ResnetBlock(channels_in if i == 0 else channels_out, channels_out, groups) for i in range(layers)]


def strip_rows(device: Device, height: int, width: int) -> int | None:
    """Rows per strip that keep a large picture's memory low; None for a picture that is small in one piece.

    height, width: in pixels. On a CPU strips cost no time, so nearly every picture is taken in them.
    """
    if device.widens:
        return max(8, min(height // 8, STRIP_PIXELS_CPU // width)) if height * width > WHOLE_PIXELS_CPU else None
    return max(16, STRIP_PIXELS // width) if height * width > WHOLE_PIXELS else None


class Attention(Placed):
    """Single-head attention over all positions of the grid."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels)
        self.to_q = Linear(channels, channels, bias=True)
        self.to_k = Linear(channels, channels, bias=True)
        self.to_v = Linear(channels, channels, bias=True)
        self.to_out = Linear(channels, channels, bias=True)

    def __call__(self, x: mx.array, strips: int | None = None) -> mx.array:
        """strips: not None to evaluate as it goes."""
        h = self.norm(x).flatten(1, 2)[:, None]  # (B, one head, H * W, C)
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        rows = max(1, SCORES // k.shape[2])
        out, pace = [], Pace()
        for i in range(0, q.shape[2], rows):
            out.append(self.device.attention(q[:, :, i : i + rows], k, v))
            if strips:
                pace(out[-1])
        return x + self.to_out(mx.concatenate(out, axis=2)).reshape(x.shape)


class Middle(nn.Module):
    """The deepest level: a resnet, the attention (if the config has it), a resnet."""

    def __init__(self, channels: int, config: VAEConfig):
        super().__init__()
        groups = config.norm_num_groups
        self.resnets = [ResnetBlock(channels, channels, groups) for _ in range(2)]
        if config.mid_block_add_attention:
            self.attention = Attention(channels, groups)

    def layers(self) -> list[Layer]:
        first, second = self.resnets
        return [first, *([self.attention] if "attention" in self else []), second]


class DownBlock(nn.Module):
    """Resnets, then half the size (except at the last level)."""

    def __init__(self, channels_in: int, channels_out: int, layers: int, groups: int, downsample: bool):
        super().__init__()
        self.resnets = _resnets(channels_in, channels_out, layers, groups)
        if downsample:
            self.downsample = Downsample(channels_out)

    def layers(self) -> list[Layer]:
        return [*self.resnets, *([self.downsample] if "downsample" in self else [])]


class UpBlock(nn.Module):
    """Resnets, then twice the size by repeating pixels and a conv (except at the last level)."""

    def __init__(self, channels_in: int, channels_out: int, layers: int, groups: int, upsample: bool):
        super().__init__()
        self.resnets = _resnets(channels_in, channels_out, layers, groups)
        if upsample:
            self.upsample = Conv(channels_out, channels_out)

    def layers(self) -> list[Layer]:
        return [*self.resnets, *([self.upsample.enlarge] if "upsample" in self else [])]


class Encoder(nn.Module):
    """Pixels (B, H, W, 3) -> moments (B, H/8, W/8, 2 * latent channels)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv(config.in_channels, channels[0])
        pairs = list(pairwise((channels[0], *channels)))
        last = len(pairs) - 1
        self.down = [DownBlock(i, o, config.layers_per_block, groups, n < last) for n, (i, o) in enumerate(pairs)]
        self.mid = Middle(channels[-1], config)
        self.norm_out = GroupNorm(groups, channels[-1])
        self.conv_out = Conv(channels[-1], 2 * config.latent_channels)

    def __call__(self, x: mx.array, rows: int | None = None, done: Done | None = None) -> mx.array:
        x = self.conv_in.strips(x, rows) if rows else self.conv_in(x)
        for block in (*self.down, self.mid):
            for layer in block.layers():
                x = settled(layer(x, rows), rows, done)
        return self.conv_out(self.norm_out(x, activate=True))


class Decoder(nn.Module):
    """Latents (B, h, w, latent channels) -> pixels (B, 8h, 8w, 3)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels = tuple(reversed(config.decoder_block_out_channels or config.block_out_channels))
        groups = config.norm_num_groups
        self.conv_in = Conv(config.latent_channels, channels[0])
        self.mid = Middle(channels[0], config)
        pairs = list(pairwise((channels[0], *channels)))
        last = len(pairs) - 1
        self.up = [UpBlock(i, o, config.layers_per_block + 1, groups, n < last) for n, (i, o) in enumerate(pairs)]
        self.norm_out = GroupNorm(groups, channels[-1])
        self.conv_out = Conv(channels[-1], config.out_channels)

    def __call__(self, z: mx.array, rows: int | None = None, done: Done | None = None) -> mx.array:
        x = self.conv_in(z)
        for block in (self.mid, *self.up):
            for layer in block.layers():
                x = settled(layer(x, rows), rows, done)
        if rows:
            return self.conv_out.strips(x, rows, self.norm_out)
        return self.conv_out(self.norm_out(x, activate=True))


class VAE(Placed):
    """AutoencoderKLFlux2. Works in the dtype of its weights; the latent statistics are float32."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.use_quant_conv:
            self.quant_conv = Linear(2 * config.latent_channels, 2 * config.latent_channels, bias=True)
        if config.use_post_quant_conv:
            self.post_quant_conv = Linear(config.latent_channels, config.latent_channels, bias=True)
        self.latent_mean = mx.zeros((4 * config.latent_channels,))
        self.latent_var = mx.ones((4 * config.latent_channels,))

    def arrange(self) -> None:
        """Bring the weights into the layout in which convolutions are exact in their dtype, lazily."""
        for module in self.modules():
            if isinstance(module, Conv):
                module.arrange()

    def encode(self, pixels: mx.array, rows: int | None = None, done: Done | None = None) -> mx.array:
        """The mean of the posterior: nothing is sampled.

        pixels: (B, H, W, 3) in [-1, 1], H and W multiples of 16. rows: take the convolutions in strips of so many
        rows, evaluating as it goes: less memory, the same result. done: called after each layer.
        Returns z (B, H/8, W/8, latent channels).
        """
        moments = self.encoder(pixels, rows, done)
        if "quant_conv" in self:
            moments = self.quant_conv(moments)
        return moments[..., : self.config.latent_channels]

    def decode(self, z: mx.array, rows: int | None = None, done: Done | None = None) -> mx.array:
        """z: (B, h, w, latent channels), denormalized. rows, done: as in `encode`.

        Returns pixels (B, 8h, 8w, 3), about [-1, 1], not clipped.
        """
        if "post_quant_conv" in self:
            z = self.post_quant_conv(z)
        return self.decoder(z, rows, done)

    def strip_rows(self, height: int, width: int) -> int | None:
        """The `rows` that suit a picture of this size, in pixels, on the module's device."""
        return strip_rows(self.device, height, width)

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
