"""FLUX.2's VAE: pixels <-> latents, channels-last from end to end.

Encoder and decoder with one attention in the middle, 1x1 convolutions as linear layers, and the running statistics
with which the transformer's latents are normalised. It knows arrays, not pictures or files.

Source: diffusers, models/autoencoders/autoencoder_kl_flux2.py (AutoencoderKLFlux2) and vae.py. Names are our own.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from klein_mlx.config import VAEConfig
from klein_mlx.fusion import fused

EPS = 1e-6  # of every GroupNorm; no config states it
WHOLE_PIXELS, STRIP_PIXELS = 768 * 768, 1 << 17  # a picture up to this is done in one piece; pixels in a strip of one
SCORES = 1 << 26  # attention scores alive at once: queries are taken in rows of so many


class GroupNorm(nn.Module):
    """GroupNorm over channels-last pictures, always by the statistics of the whole picture.

    The statistics become one scale and one shift per channel, so that applying them, to all rows or to some, is a
    single elementwise kernel.
    """

    def __init__(self, groups: int, channels: int):
        super().__init__()
        self.groups = groups
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))

    def affine(self, x: mx.array, rows: int | None = None) -> tuple[mx.array, mx.array]:
        """x: (B, H, W, C). rows: how many to look at at a time, evaluating as it goes, or None for all.

        Returns (scale, shift), each (B, 1, 1, C) float32, such that x * scale + shift is normed.
        """
        b, c = x.shape[0], x.shape[-1]
        mean = self._group_mean(_row_sums(x), x)
        # In x's own dtype: a mean that is rounded moves the variance by a square of its error.
        center = mean.reshape(b, 1, 1, c).astype(x.dtype)
        parts = [x[:, i : i + rows] for i in range(0, x.shape[1], rows)] if rows else [x]
        squares = [_settled(_row_sums(_squared_distance(part, center)), rows) for part in parts]
        var = self._group_mean(mx.concatenate(squares, axis=1), x)
        scale = mx.rsqrt(var + EPS) * self.weight.astype(mx.float32).reshape(self.groups, -1)
        shift = self.bias.astype(mx.float32).reshape(self.groups, -1) - mean * scale
        return scale.reshape(b, 1, 1, c), shift.reshape(b, 1, 1, c)

    def _group_mean(self, sums: mx.array, x: mx.array) -> mx.array:
        """Row sums (B, H, C) -> each channel's group mean (B, groups, C / groups)."""
        b, height, width, c = x.shape
        per_channel = (sums.mean(axis=1) / width).reshape(b, self.groups, c // self.groups)
        return per_channel.mean(axis=-1, keepdims=True) + mx.zeros((self.groups, c // self.groups))

    def __call__(self, x: mx.array, activate: bool = False) -> mx.array:
        return (_scale_shift_silu if activate else _scale_shift)(x, *self.affine(x))


def _row_sums(x: mx.array) -> mx.array:
    """(B, H, W, C) -> (B, H, C) float32, summed along each row.

    As a matmul: it adds up in float32 whatever the dtype, where a reduction of bfloat16 would need a float32 copy of
    the picture. Only the sum of each row is rounded to x's dtype.
    """
    if x.dtype == mx.float32:  # nothing to copy, and some GPUs shorten float32 in matmuls
        return x.sum(axis=2)
    ones = mx.ones((1, x.shape[2]), dtype=x.dtype)
    return (ones @ x)[:, :, 0].astype(mx.float32)


@fused
def _squared_distance(x: mx.array, mean: mx.array) -> mx.array:
    return mx.square(x - mean)


@fused
def _scale_shift(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    return (x.astype(mx.float32) * scale + shift).astype(x.dtype)


@fused
def _scale_shift_silu(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    out = x.astype(mx.float32) * scale + shift
    return (out * mx.sigmoid(out)).astype(x.dtype)


class Conv(nn.Conv2d):
    """A 3 x 3 convolution that can be taken in strips of rows, with what comes before it done strip by strip."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(channels_in, channels_out, 3, padding=1)

    def strips(
        self,
        x: mx.array,
        rows: int,
        norm: GroupNorm | None = None,
        upsample: bool = False,
        residual: Callable[[slice], mx.array] | None = None,
    ) -> mx.array:
        """conv(silu(norm(x))), or conv(x), or conv(upsample(x)), `rows` rows of the result at a time.

        x: (B, H, W, C). residual: of a slice of rows, what is added to them. Returns (B, H, W, C'), twice as large if
        `upsample`. The norm's statistics are the whole picture's, so the result is that of one piece; only one strip of
        what is between is alive at a time.
        """
        factor = 2 if upsample else 1
        height = x.shape[1] * factor
        affine = norm.affine(x, rows) if norm else None
        out = None
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            strip = self._strip(x, top, bottom, factor, affine)
            if residual:
                strip = residual(slice(top, bottom)) + strip
            if top == 0 and bottom == height:
                return strip
            if out is None:
                out = mx.zeros((strip.shape[0], height, *strip.shape[2:]), dtype=strip.dtype)
            out[:, top:bottom] = strip
            mx.eval(out)
        assert out is not None
        return out

    def _strip(
        self, x: mx.array, top: int, bottom: int, factor: int, affine: tuple[mx.array, mx.array] | None
    ) -> mx.array:
        """Rows top..bottom of the result: one row more of the input on either side, or zeros beyond the picture."""
        height = x.shape[1] * factor
        first, last = max(top - 1, 0), min(bottom + 1, height)
        part = x[:, first // factor : -(-last // factor)]
        if affine:
            part = _scale_shift_silu(part, *affine)
        if factor == 2:
            part = upsample_rows(part)
            start = first - first // 2 * 2
            part = part[:, start : start + last - first]
        above, below = int(top == 0), int(bottom == height)
        part = mx.pad(part, [(0, 0), (above, below), (0, 0), (0, 0)]) if above or below else part
        return mx.conv2d(part, self.weight, padding=(0, 1)) + self.bias


def upsample_rows(x: mx.array) -> mx.array:
    """Twice the size, by repeating pixels. (B, H, W, C) -> (B, 2H, 2W, C)."""
    b, h, w, c = x.shape
    return mx.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, twice, around a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, channels_in)
        self.conv1 = Conv(channels_in, channels_out)
        self.norm2 = GroupNorm(groups, channels_out)
        self.conv2 = Conv(channels_out, channels_out)
        if channels_in != channels_out:
            self.shortcut = nn.Linear(channels_in, channels_out)

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


def strip_rows(height: int, width: int) -> int | None:
    """Rows per strip that keep a large picture's memory low; None for a picture that is small in one piece.

    height, width: in pixels.
    """
    return max(16, STRIP_PIXELS // width) if height * width > WHOLE_PIXELS else None


def _settled(x: mx.array, rows: int | None) -> mx.array:
    """In strips, evaluate before going on, so that what led to x is freed."""
    if rows:
        mx.eval(x)
    return x


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

    def __call__(self, x: mx.array, rows: int | None = None) -> mx.array:
        for resnet in self.resnets:
            x = _settled(resnet(x, rows), rows)
        if "downsample" in self:  # padded on the right and the bottom only
            x = _settled(self.downsample(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)])), rows)
        return x


class UpBlock(nn.Module):
    """Resnets, then twice the size by repeating pixels and a conv (except at the last level)."""

    def __init__(self, channels_in: int, channels_out: int, layers: int, groups: int, upsample: bool):
        super().__init__()
        self.resnets = _resnets(channels_in, channels_out, layers, groups)
        if upsample:
            self.upsample = Conv(channels_out, channels_out)

    def __call__(self, x: mx.array, rows: int | None = None) -> mx.array:
        for resnet in self.resnets:
            x = _settled(resnet(x, rows), rows)
        if "upsample" in self:
            x = self.upsample.strips(x, rows, upsample=True) if rows else self.upsample(upsample_rows(x))
        return x


class Encoder(nn.Module):
    """Pixels (B, H, W, 3) -> moments (B, H/8, W/8, 2 * latent channels)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv(config.in_channels, channels[0])
        pairs = list(zip((channels[0], *channels), channels, strict=False))
        last = len(pairs) - 1
        self.down = [DownBlock(i, o, config.layers_per_block, groups, n < last) for n, (i, o) in enumerate(pairs)]
        self.mid = Middle(channels[-1], config)
        self.norm_out = GroupNorm(groups, channels[-1])
        self.conv_out = Conv(channels[-1], 2 * config.latent_channels)

    def __call__(self, x: mx.array, rows: int | None = None) -> mx.array:
        x = self.conv_in(x)
        for block in self.down:
            x = block(x, rows)
        return self.conv_out(self.norm_out(self.mid(x), activate=True))


class Decoder(nn.Module):
    """Latents (B, h, w, latent channels) -> pixels (B, 8h, 8w, 3)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels = tuple(reversed(config.decoder_block_out_channels or config.block_out_channels))
        groups = config.norm_num_groups
        self.conv_in = Conv(config.latent_channels, channels[0])
        self.mid = Middle(channels[0], config)
        pairs = list(zip((channels[0], *channels), channels, strict=False))
        last = len(pairs) - 1
        self.up = [UpBlock(i, o, config.layers_per_block + 1, groups, n < last) for n, (i, o) in enumerate(pairs)]
        self.norm_out = GroupNorm(groups, channels[-1])
        self.conv_out = Conv(channels[-1], config.out_channels)

    def __call__(self, z: mx.array, rows: int | None = None) -> mx.array:
        x = self.mid(self.conv_in(z))
        for block in self.up:
            x = block(x, rows)
        if rows:
            return self.conv_out.strips(x, rows, self.norm_out)
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

    def encode(self, pixels: mx.array, rows: int | None = None) -> mx.array:
        """The mean of the posterior: nothing is sampled.

        pixels: (B, H, W, 3) in [-1, 1], H and W multiples of 16. rows: take the convolutions in strips of so many
        rows, evaluating as it goes: less memory, the same result. Returns z (B, H/8, W/8, latent channels).
        """
        moments = self.encoder(pixels, rows)
        if "quant_conv" in self:
            moments = self.quant_conv(moments)
        return moments[..., : self.config.latent_channels]

    def decode(self, z: mx.array, rows: int | None = None) -> mx.array:
        """z: (B, h, w, latent channels), denormalised. rows: as in `encode`.

        Returns pixels (B, 8h, 8w, 3), about [-1, 1], not clipped.
        """
        if "post_quant_conv" in self:
            z = self.post_quant_conv(z)
        return self.decoder(z, rows)

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
