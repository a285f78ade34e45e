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

from klein_mlx.group_norm import GroupNorm, scale_shift_silu
from klein_mlx.linear import expands, on_cpu
from klein_mlx.strips import settled

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
