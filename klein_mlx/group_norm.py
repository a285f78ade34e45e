"""GroupNorm whose statistics are the whole picture's, whichever of its rows are being normed."""

import mlx.core as mx
import mlx.nn as nn

from klein_mlx.fusion import fused
from klein_mlx.linear import sigmoid
from klein_mlx.strips import settled

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
