"""3 x 3 convolutions over channels-last pictures, by the fastest way that the device has.

On a CPU, MLX unfolds the picture nine-fold in memory and multiplies once. Nine matmuls, one for each place of the
kernel, on rows that lie there already, are up to 1.6 times as fast and need a fifth of the memory; and bfloat16 goes
through float32, where it is added up too.

On Metal, MLX takes a wide 3 x 3 convolution by Winograd's transform, all of it in the array's dtype: in bfloat16 that
loses 6 % of each result (its kernels emulated; MLX's pull request 4242 measured as much), 35 times what rounding would.
Kernels that are stored turned round, and turned back while convolving, do not go that way.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from klein_mlx.model.compile import fused
from klein_mlx.model.layers import expands, on_cpu, sigmoid

# Called with what was computed so far, between parts: it may evaluate it, or raise to stop.
Done = Callable[[mx.array], None]


def settled(x: mx.array, rows: int | None, done: Done | None = None) -> mx.array:
    """In strips, evaluate before going on, so that what led to x is freed."""
    if rows:
        mx.eval(x)
    if done:
        done(x)
    return x


EPS = 1e-6  # of every GroupNorm; no config states it


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
        squares = [settled(_row_sums(_squared_distance(part, center)), rows) for part in parts]
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
        return (scale_shift_silu if activate else _scale_shift)(x, *self.affine(x))


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
def scale_shift_silu(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    out = x.astype(mx.float32) * scale + shift
    return (out * sigmoid(out)).astype(x.dtype)


_FEW = 16  # input channels below which a matmul per place has too little to do


def convolve(x: mx.array, weight: mx.array, bias: mx.array, turned: bool = False) -> mx.array:
    """Stride 1. x: (B, H + 2, W, C), with the row above and the row below; the columns beyond it are zeros.

    weight: (C', 3, 3, C). turned: whether its rows and columns stand in reverse. Returns (B, H, W, C'), in x's dtype.
    """
    if not _by_matmuls() or x.shape[-1] < _FEW:
        return mx.conv_general(x, weight, padding=(0, 1), flip=turned) + bias
    if turned:
        weight = weight[:, ::-1, ::-1]
    b, rows, width, channels = x.shape
    wide, weight = x.astype(mx.float32), weight.astype(mx.float32)
    none = (0, 0)
    out = mx.broadcast_to(bias.astype(mx.float32), (b * (rows - 2) * width, weight.shape[0]))
    for column, place in ((0, slice(None, -1)), (1, slice(None)), (2, slice(1, None))):
        shifted = mx.pad(wide[:, :, place], [none, none, (int(column == 0), int(column == 2)), none])
        for row in range(3):
            part = shifted[:, row : row + rows - 2].reshape(-1, channels)
            out = mx.addmm(out, part, weight[:, row, column].T)
    return out.reshape(b, rows - 2, width, -1).astype(x.dtype)


def _by_matmuls() -> bool:
    return on_cpu() and expands()


class Conv(nn.Conv2d):
    """A 3 x 3 convolution that can be taken in strips of rows, with what comes before it done strip by strip."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(channels_in, channels_out, 3, padding=1)
        self.turned = False

    def arrange(self) -> None:
        """Store kernels of 16 bits turned round, lazily."""
        if not self.turned and self.weight.dtype != mx.float32:
            self.weight, self.turned = mx.contiguous(self.weight[:, ::-1, ::-1]), True

    def __call__(self, x: mx.array) -> mx.array:
        if not _by_matmuls():
            return mx.conv_general(x, self.weight, padding=1, flip=self.turned) + self.bias
        return convolve(mx.pad(x, [(0, 0), (1, 1), (0, 0), (0, 0)]), self.weight, self.bias, self.turned)

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
            part = scale_shift_silu(part, *affine)
        if factor == 2:
            part = upsample_rows(part)
            start = first - first // 2 * 2
            part = part[:, start : start + last - first]
        above, below = int(top == 0), int(bottom == height)
        part = mx.pad(part, [(0, 0), (above, below), (0, 0), (0, 0)]) if above or below else part
        return convolve(part, self.weight, self.bias, self.turned)


def upsample_rows(x: mx.array) -> mx.array:
    """Twice the size, by repeating pixels. (B, H, W, C) -> (B, 2H, 2W, C)."""
    b, h, w, c = x.shape
    return mx.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


class Downsample(nn.Conv2d):
    """Half the size: a 3 x 3 convolution of every second pixel, padded on the right and the bottom only."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def __call__(self, x: mx.array, rows: int | None = None) -> mx.array:
        """rows: of the result, how many at a time, or None for all."""
        x_height, step = x.shape[1], rows or x.shape[1]
        strips = []
        for top in range(0, x_height // 2, step):
            part = x[:, 2 * top : 2 * (top + step) + 1]
            below = int(2 * (top + step) >= x_height)
            part = mx.pad(part, [(0, 0), (0, below), (0, 1), (0, 0)])
            strips.append(settled(super().__call__(part), rows))
        return strips[0] if len(strips) == 1 else mx.concatenate(strips, axis=1)
