"""The layouts that `klein_mlx.convert.keys` names: what a shape or an array of ours is in diffusers, and back."""

import mlx.core as mx

from klein_mlx.convert.keys import CONV, HALVES, POINTWISE


def their_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in diffusers of a weight that has `shape` here."""
    if layout == CONV:
        out, height, width, inputs = shape
        return out, inputs, height, width
    return (*shape, 1, 1) if layout == POINTWISE else shape


def to_ours(layout: str, array: mx.array) -> mx.array:
    """diffusers' array as ours, lazily."""
    if layout == CONV:
        return mx.contiguous(array.transpose(0, 2, 3, 1))  # else every convolution copies it
    if layout == POINTWISE:
        return array.reshape(array.shape[:2])
    return _swap_halves(array) if layout == HALVES else array


def to_theirs(layout: str, array: mx.array) -> mx.array:
    """Our array as diffusers', lazily; the inverse of `to_ours`."""
    if layout == CONV:
        return mx.contiguous(array.transpose(0, 3, 1, 2))
    if layout == POINTWISE:
        return array[..., None, None]
    return _swap_halves(array) if layout == HALVES else array


def _swap_halves(array: mx.array) -> mx.array:
    first, second = mx.split(array, 2, axis=0)
    return mx.concatenate([second, first], axis=0)
