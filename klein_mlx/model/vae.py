"""FLUX.2's VAE: pixels <-> latents, channels-last from end to end.

Encoder and decoder with one attention in the middle, 1x1 convolutions as linear layers, and the running statistics
with which the transformer's latents are normalized. It knows arrays, not pictures or files.

Convolutions follow their device. On Metal, MLX takes a wide 3 x 3 convolution by Winograd's transform, all of it in the
array's dtype: in bfloat16 that loses 6 % of each result (its kernels emulated; MLX's pull request 4242 measured as
much), 35 times what rounding would. Kernels that are stored turned round, and turned back while convolving, do not go
that way. A matmul over overlapping rows does the same without unfolding the picture, and is what reaches the M5's
neural accelerators.

Source: diffusers, models/autoencoders/autoencoder_kl_flux2.py (AutoencoderKLFlux2) and vae.py. Names are our own.
"""

from collections.abc import Callable
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from klein_mlx.config import VAEConfig
from klein_mlx.model.compile import Chain
from klein_mlx.model.layers import LOG2_E, SCORES, Device, Done, Linear, Placed, device_of

Edges = tuple[tuple[int, int], tuple[int, int]]  # zeros put above and below, left and right

WHOLE_PIXELS, WHOLE_PIXELS_CPU = 512 * 512, 128 * 128  # a picture up to this is done in one piece
STRIP_PIXELS, STRIP_PIXELS_CPU = 1 << 17, 1 << 15  # in a strip of a larger one
EPS = 1e-6  # of every GroupNorm; no config states it

# ---- layers ----


class Pace:
    """Evaluates pieces of work one after the other, never more than one ahead of what is done: the device is not left
    waiting for the next piece, and little is in memory at once."""

    def __init__(self) -> None:
        self._behind: mx.array | None = None

    def __call__(self, x: mx.array, awaited: mx.array | None = None) -> None:
        """Start computing x; wait until the piece before is done. awaited: what stands for this one later, else x."""
        mx.async_eval(x)
        if self._behind is not None:
            mx.eval(self._behind)
        self._behind = x if awaited is None else awaited


def settled(x: mx.array, rows: int | None, device: Device, done: Done | None = None) -> mx.array:
    """In strips, start computing x before going on, so that what led to it is freed. A CPU, where the next strip costs
    nothing to start, is waited for: else a busy one holds a picture more."""
    if rows:
        (mx.eval if device.widens else mx.async_eval)(x)
    if done:
        done(x)
    return x


class GroupNorm(Placed):
    """GroupNorm over channels-last pictures, always by the statistics of the whole picture.

    The statistics become one scale and one shift per channel, so that applying them, to all rows or to some, is a
    single elementwise kernel.
    """

    def __init__(self, groups: int, channels: int):
        nn.Module.__init__(self)
        self.device = device_of(mx.default_device().type == mx.DeviceType.gpu)
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
        squares, pace = [], Pace() if rows else None
        for top in range(0, x.shape[1], rows or x.shape[1]):
            part = x[:, top : top + rows] if rows else x
            squares.append(_row_sums(self.device.form(_squared_distance)(part, center)))
            if pace:
                pace(squares[-1])
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
        return self.device.form(scale_shift_silu if activate else _scale_shift)(x, *self.affine(x))


def _row_sums(x: mx.array) -> mx.array:
    """(B, H, W, C) -> (B, H, C) float32, summed along each row.

    As a matmul: it adds up in float32 whatever the dtype, where a reduction of bfloat16 would need a float32 copy of
    the picture. Only the sum of each row is rounded to x's dtype.
    """
    if x.dtype == mx.float32:  # nothing to copy, and some GPUs shorten float32 in matmuls
        return x.sum(axis=2)
    ones = mx.ones((1, x.shape[2]), dtype=x.dtype)
    return (ones @ x)[:, :, 0].astype(mx.float32)


@Chain
def _squared_distance(x: mx.array, mean: mx.array) -> mx.array:
    return mx.square(x - mean)


@Chain
def _scale_shift(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    return (x.astype(mx.float32) * scale + shift).astype(x.dtype)


@Chain
def scale_shift_silu(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    out = x.astype(mx.float32) * scale + shift
    return (out * mx.sigmoid(out)).astype(x.dtype)


@scale_shift_silu.on_cpu
def _(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    out = x.astype(mx.float32) * scale + shift
    return (out / (1 + mx.power(2.0, out * -LOG2_E))).astype(x.dtype)


def convolve(x: mx.array, weight: mx.array, bias: mx.array, edges: Edges, turned: bool = False) -> mx.array:
    """MLX's convolution, stride 1. weight: (C', rows, columns, C). edges: how many rows of zeros are put above and
    below, and columns on the left and the right. turned: whether the kernel's rows and columns stand in reverse."""
    (above, below), (left, right) = edges
    return mx.conv_general(x, weight, padding=([above, left], [below, right]), flip=turned) + bias


def convolve_by_matmul(x: mx.array, weight: mx.array, bias: mx.array, edges: Edges, turned: bool = False) -> mx.array:
    """As `convolve`, by one matmul.

    Copies of the picture that are shifted by a row each are put side by side, so that what a kernel covers lies in one
    run of memory; runs of neighboring pixels overlap. A matmul takes rows at any distance: nothing is unfolded.
    """
    if turned:
        weight = weight[:, ::-1, ::-1]
    _, high, broad, channels = weight.shape
    x = mx.pad(x, [(0, 0), *edges, (0, 0)])
    b, height, width = x.shape[0], x.shape[1] - high + 1, x.shape[2] - broad + 1
    stacked = mx.concatenate([x[:, row : row + height] for row in range(high)], axis=-1)
    step, line = high * channels, x.shape[2] * high * channels
    runs = mx.as_strided(stacked, (b, height, width, broad * step), (height * line, line, step, 1))
    kernel = mx.concatenate([weight[:, row, column] for column in range(broad) for row in range(high)], axis=1)
    return mx.addmm(bias, runs, kernel.T[None, None])  # of four axes, or the runs would be flattened, that is unfolded


def convolve_by_rows(x: mx.array, weight: mx.array, bias: mx.array, edges: Edges, turned: bool = False) -> mx.array:
    """As `convolve`, by a matmul for each place of the kernel on rows that lie there already, added up in float32.

    MLX unfolds the picture nine-fold on a CPU: this is up to 1.6 times as fast, in a fifth of the memory.
    """
    if turned:
        weight = weight[:, ::-1, ::-1]
    (outputs, high, broad, channels), dtype = weight.shape, x.dtype
    left, right = edges[1]
    x, weight = mx.pad(x.astype(mx.float32), [(0, 0), edges[0], (0, 0), (0, 0)]), weight.astype(mx.float32)
    b, height, size = x.shape[0], x.shape[1] - high + 1, x.shape[2]
    width = size + left + right - broad + 1
    out = mx.broadcast_to(bias.astype(mx.float32), (b * height * width, outputs))
    for column in range(broad):
        # Of the columns that this place sees, those beyond the picture are zeros.
        start, stop = column - left, column - left + width
        shifted = x[:, :, max(start, 0) : min(stop, size)]
        shifted = mx.pad(shifted, [(0, 0), (0, 0), (max(-start, 0), max(stop - size, 0)), (0, 0)])
        for row in range(high):
            out = mx.addmm(out, shifted[:, row : row + height].reshape(-1, channels), weight[:, row, column].T)
    return out.reshape(b, height, width, outputs).astype(dtype)


CONVOLUTIONS = {"direct": convolve, "matmul": convolve_by_matmul, "rows": convolve_by_rows}  # by `Gpu.conv`
SAME = ((1, 1), (1, 1))  # edges of a 3 x 3 convolution that keeps the size
FEW = 16  # input channels below which a matmul has too little to do


class Conv(nn.Conv2d):
    """A 3 x 3 convolution that can be taken in strips of rows, with what comes before it done strip by strip."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(channels_in, channels_out, 3, padding=1)
        self.turned = False
        self.device = device_of(mx.default_device().type == mx.DeviceType.gpu)

    def arrange(self) -> None:
        """Store kernels of 16 bits turned round, lazily."""
        if not self.turned and self.weight.dtype != mx.float32:
            self.weight, self.turned = mx.contiguous(self.weight[:, ::-1, ::-1]), True

    def __call__(self, x: mx.array) -> mx.array:
        return self.way(x)(x, self.weight, self.bias, SAME, self.turned)

    def way(self, x: mx.array) -> Callable[..., mx.array]:
        """How its device convolves pictures of so many channels."""
        return CONVOLUTIONS[self.device.conv if x.shape[-1] >= FEW else "direct"]

    def strips(
        self,
        x: mx.array,
        rows: int,
        norm: GroupNorm | None = None,
        residual: Callable[[slice], mx.array] | None = None,
    ) -> mx.array:
        """conv(silu(norm(x))), or conv(x), `rows` rows at a time.

        x: (B, H, W, C). residual: of a slice of rows, what is added to them. Returns (B, H, W, C'). The norm's
        statistics are the whole picture's, so the result is that of one piece; only a strip or two of what is between
        are alive at a time.
        """
        affine, way = norm.affine(x, rows) if norm else None, self.way(x)

        def strip(top: int, bottom: int, part: mx.array, edges: tuple[int, int]) -> mx.array:
            if affine:
                part = self.device.form(scale_shift_silu)(part, *affine)
            out = way(part, self.weight, self.bias, (edges, (1, 1)), self.turned)
            return residual(slice(top, bottom)) + out if residual else out

        return in_strips(x, rows, strip)

    def enlarge(self, x: mx.array, rows: int | None = None) -> mx.array:
        """conv(x with each pixel four times), (B, 2H, 2W, C'). rows: of the result, how many at a time; None: all.

        Repeated pixels let the kernel's neighbors be added up first: each of the four places of a pixel's square has a
        2 x 2 kernel on the picture as it is, 4/9 of the work.
        """
        kernels, way = _quarters(self.weight[:, ::-1, ::-1] if self.turned else self.weight), self.way(x)

        def strip(top: int, bottom: int, part: mx.array, edges: tuple[int, int]) -> mx.array:
            above, below = edges  # rows of zeros; else there is a row of the picture
            lines = []
            for row, halves in enumerate(kernels):
                # Upper rows see a pixel and the one above it, lower rows the pixel and the one below.
                first, last = (0, part.shape[1] - (1 - below)) if row == 0 else (1 - above, part.shape[1])
                beyond = (above, 0) if row == 0 else (0, below)
                places = [
                    way(part[:, first:last], kernel, self.bias, (beyond, (1 - column, column)))
                    for column, kernel in enumerate(halves)
                ]
                lines.append(mx.concatenate(places, axis=-1))
            b, h, w, c = lines[0].shape
            return mx.concatenate(lines, axis=2).reshape(b, 2 * h, 2 * w, c // 2)

        if rows is None:
            return strip(0, 2 * x.shape[1], x, (1, 1))
        return in_strips(x, max(1, rows // 2), strip, factor=2)


def _quarters(weight: mx.array) -> list[list[mx.array]]:
    """Kernels of a doubled picture's even and odd rows, and columns, on the picture as it is: (C', 2, 2, C) each."""

    def sums(axis: int, kernel: mx.array) -> list[mx.array]:
        first, second, third = mx.split(kernel, 3, axis=axis)
        pairs = [first, second + third], [first + second, third]
        return [mx.concatenate(pair, axis=axis) for pair in pairs]

    exact = weight.astype(mx.float32)
    return [[part.astype(weight.dtype) for part in sums(2, half)] for half in sums(1, exact)]


def in_strips(
    x: mx.array, rows: int, strip: Callable[[int, int, mx.array, tuple[int, int]], mx.array], factor: int = 1
) -> mx.array:
    """A picture's result, made of `rows` rows of x at a time.

    strip: of the strip's rows top..bottom, those rows of x with the one above and the one below as far as there are,
    and how many are missing (above, below), what to put there. factor: how many rows it has for one of x.
    """
    height, out, pace = x.shape[1], None, Pace()
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        edges = int(top == 0), int(bottom == height)
        part = strip(top, bottom, x[:, top - 1 + edges[0] : bottom + 1 - edges[1]], edges)
        if top == 0 and bottom == height:
            return part
        if out is None:
            out = mx.zeros((part.shape[0], factor * height, *part.shape[2:]), dtype=part.dtype)
        out[:, factor * top : factor * bottom] = part
        pace(out, part)  # not held itself, or it would be copied for the next strip
    assert out is not None
    return out


class Downsample(nn.Conv2d):
    """Half the size: a 3 x 3 convolution of every second pixel, padded on the right and the bottom only."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def __call__(self, x: mx.array, rows: int | None = None) -> mx.array:
        """rows: of the result, how many at a time, or None for all."""
        x_height, step = x.shape[1], rows or x.shape[1]
        strips, pace = [], Pace()
        for top in range(0, x_height // 2, step):
            part = x[:, 2 * top : 2 * (top + step) + 1]
            below = int(2 * (top + step) >= x_height)
            part = mx.pad(part, [(0, 0), (0, below), (0, 1), (0, 0)])
            strips.append(super().__call__(part))
            if rows:
                pace(strips[-1])
        return strips[0] if len(strips) == 1 else mx.concatenate(strips, axis=1)


# ---- blocks ----

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


class Encoder(Placed):
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
                x = settled(layer(x, rows), rows, self.device, done)
        return self.conv_out(self.norm_out(x, activate=True))


class Decoder(Placed):
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
                x = settled(layer(x, rows), rows, self.device, done)
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
        if self.encoder.conv_in.weight.dtype == mx.float32:
            return
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
