"""The layouts that the tables name: what a shape or an array of ours is in a foreign file, and back."""

import mlx.core as mx

from klein_mlx.formats.names import CONV, HALVES, MLX_POINTWISE, POINTWISE, SAME, THIRDS

BY_ROWS = (SAME, HALVES, *THIRDS)  # they move whole rows, so quantised weights move as well


def their_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a foreign file of a weight that has `shape` here."""
    if layout == CONV:
        out, height, width, inputs = shape
        return out, inputs, height, width
    if layout == MLX_POINTWISE:
        return shape[0], 1, 1, shape[1]
    if layout in THIRDS:
        return 3 * shape[0], *shape[1:]
    return (*shape, 1, 1) if layout == POINTWISE else shape


def to_ours(layout: str, array: mx.array) -> mx.array:
    """A foreign array as ours, lazily."""
    if layout == CONV:
        return mx.contiguous(array.transpose(0, 2, 3, 1))  # else every convolution copies it
    if layout == POINTWISE:
        return array.reshape(array.shape[:2])
    if layout == MLX_POINTWISE:
        return array.reshape(array.shape[0], array.shape[3])
    if layout in THIRDS:
        return mx.split(array, 3, axis=0)[THIRDS.index(layout)]
    return _swap_halves(array) if layout == HALVES else array


def to_theirs(layout: str, array: mx.array) -> mx.array:
    """Our array as diffusers', lazily; the inverse of `to_ours` for diffusers' layouts."""
    if layout == CONV:
        return mx.contiguous(array.transpose(0, 3, 1, 2))
    if layout == POINTWISE:
        return array[..., None, None]
    return _swap_halves(array) if layout == HALVES else array


def _swap_halves(array: mx.array) -> mx.array:
    first, second = mx.split(array, 2, axis=0)
    return mx.concatenate([second, first], axis=0)
