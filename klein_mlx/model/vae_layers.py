"""The VAE's layers over channels-last pictures: GroupNorm, 3 x 3 convolutions, half and twice the size.

Convolutions follow their device. On Metal, MLX takes a wide 3 x 3 convolution by Winograd's transform, all of it in the
array's dtype: in bfloat16 that loses 6 % of each result (its kernels emulated; MLX's pull request 4242 measured as
much), 35 times what rounding would. Kernels that are stored turned round, and turned back while convolving, do not go
that way. A matmul over overlapping rows ("matmul") does the same without unfolding the picture, and is what reaches the
M5's neural accelerators. A CPU's own way is in `klein_mlx.model.cpu`.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from klein_mlx.model.compile import Chain
from klein_mlx.model.layers import Placed, device_of

# Called with what was computed so far, between parts: it may evaluate it, or raise to stop.
Done = Callable[[mx.array], None]


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


def settled(x: mx.array, rows: int | None, done: Done | None = None) -> mx.array:
    """In strips, start computing x before going on, so that what led to it is freed."""
    if rows:
        mx.async_eval(x)
    if done:
        done(x)
    return x


EPS = 1e-6  # of every GroupNorm; no config states it


class GroupNorm(Placed):
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
        squares, pace = [], Pace()
        for top in range(0, x.shape[1], rows or x.shape[1]):
            part = x[:, top : top + rows] if rows else x
            squares.append(_row_sums(self.device.run(_squared_distance, part, center)))
            if rows:
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
        return self.device.run(scale_shift_silu if activate else _scale_shift, x, *self.affine(x))


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


def convolve(
    x: mx.array, weight: mx.array, bias: mx.array, edges: tuple[tuple[int, int], tuple[int, int]], turned: bool = False
) -> mx.array:
    """MLX's convolution, stride 1. weight: (C', rows, columns, C). edges: how many rows of zeros are put above and
    below, and columns on the left and the right. turned: whether the kernel's rows and columns stand in reverse."""
    (above, below), (left, right) = edges
    return mx.conv_general(x, weight, padding=([above, left], [below, right]), flip=turned) + bias


def convolve_by_matmul(
    x: mx.array, weight: mx.array, bias: mx.array, edges: tuple[tuple[int, int], tuple[int, int]], turned: bool = False
) -> mx.array:
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
        return self._on(x, SAME)

    def _on(self, x: mx.array, edges: tuple[tuple[int, int], tuple[int, int]]) -> mx.array:
        return self.device.convolve(x, self.weight, self.bias, edges, self.turned)

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
        affine = norm.affine(x, rows) if norm else None

        def strip(top: int, bottom: int, part: mx.array, edges: tuple[int, int]) -> mx.array:
            if affine:
                part = self.device.run(scale_shift_silu, part, *affine)
            out = self._on(part, (edges, (1, 1)))
            return residual(slice(top, bottom)) + out if residual else out

        return in_strips(x, rows, strip)

    def enlarge(self, x: mx.array, rows: int | None = None) -> mx.array:
        """conv(x with each pixel four times), (B, 2H, 2W, C'). rows: of the result, how many at a time; None: all.

        Repeated pixels let the kernel's neighbors be added up first: each of the four places of a pixel's square has a
        2 x 2 kernel on the picture as it is, 4/9 of the work.
        """
        kernels = _quarters(self.weight[:, ::-1, ::-1] if self.turned else self.weight)

        def strip(top: int, bottom: int, part: mx.array, edges: tuple[int, int]) -> mx.array:
            above, below = edges  # rows of zeros; else there is a row of the picture
            lines = []
            for row, halves in enumerate(kernels):
                # Upper rows see a pixel and the one above it, lower rows the pixel and the one below.
                first, last = (0, part.shape[1] - (1 - below)) if row == 0 else (1 - above, part.shape[1])
                beyond = (above, 0) if row == 0 else (0, below)
                places = [
                    self.device.convolve(part[:, first:last], kernel, self.bias, (beyond, (1 - column, column)))
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
