"""Codes of a quantised weight, better than the nearest ones: searched scales, and rounding that knows its inputs.

All of it ends in MLX's own affine format (weight = scale * code + bias, a scale and a bias per group), so that nothing
that computes with the result knows of it. Knows arrays; no names, no files.
"""

import mlx.core as mx

from klein_mlx.model.compile import fused

Arrays = tuple[mx.array, mx.array, mx.array]  # packed codes (uint32), scales, biases

_SHRINKS = 10  # ranges that are tried for each group, from _LEAST of its own upwards
_LEAST = 0.55
_REFITS = 2
_TINY = 1e-12


def search(weight: mx.array, group_size: int, bits: int, importance: mx.array | None = None) -> Arrays:
    """Quantise with the scales and biases that keep each group's squared error small.

    weight: (rows, columns), any float dtype; scales and biases take it. importance: (columns,), how much an error in
    each column counts (mean squares of its inputs); None: all alike.
    Ranges between 0.55 and 1 of each group's own are tried, and the best one's scale and bias are fitted to its codes
    by least squares. Works through the rows in pieces, so memory stays at a few times 64 MB.
    """
    dtype, (rows, columns) = weight.dtype, weight.shape
    weights = mx.ones((columns,)) if importance is None else importance.astype(mx.float32)
    weights = mx.maximum(weights / mx.maximum(weights.mean(), _TINY), 1e-6).reshape(-1, group_size)
    step = max(1, (1 << 24) // columns)
    pieces = []
    for start in range(0, rows, step):
        groups = weight[start : start + step].astype(mx.float32).reshape(-1, columns // group_size, group_size)
        scales, biases = fit_groups(groups, weights, bits, dtype)
        codes = to_codes(groups, scales, biases, bits)
        piece = (pack(codes.flatten(1), bits), scales.astype(dtype), biases.astype(dtype))
        mx.eval(piece)
        pieces.append(piece)
    if len(pieces) == 1:
        return pieces[0]
    packed, scales, biases = (mx.concatenate(list(arrays)) for arrays in zip(*pieces, strict=True))
    return packed, scales, biases


def fit_groups(groups: mx.array, weights: mx.array, bits: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Scale and bias of every group, rounded to `dtype`, as float32.

    groups: (..., group_size) float32. weights: broadcastable to it, over 0. Returns two arrays (...).
    """
    scale, bias, error = _whole_range(groups, weights, bits)
    for index in range(_SHRINKS):
        shrink = _LEAST + (1 - _LEAST) * (index + 1) / _SHRINKS
        scale, bias, error = _try_range(groups, weights, mx.array(shrink), scale, bias, error, bits=bits)
    for _ in range(_REFITS):
        scale, bias, error = _refit(groups, weights, scale, bias, error, bits=bits)
    scale = scale.astype(dtype).astype(mx.float32)
    # With the scale rounded, another bias is best.
    codes = to_codes(groups, scale, bias, bits)
    bias = (weights * (groups - scale[..., None] * codes)).sum(-1) / weights.sum(-1)
    return scale, bias.astype(dtype).astype(mx.float32)


def to_codes(groups: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    """The nearest codes, as float32. groups: (..., group_size); scales and biases (...)."""
    return _codes(groups, scales[..., None], biases[..., None], bits)


@fused
def _codes(x: mx.array, scale: mx.array, bias: mx.array, bits: int) -> mx.array:
    safe = mx.where(mx.abs(scale) < _TINY, 1.0, scale)
    return mx.clip(mx.round((x - bias) / safe), 0, 2**bits - 1)


def _whole_range(groups: mx.array, weights: mx.array, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    low, high = groups.min(-1), groups.max(-1)
    scale = (high - low) / (2**bits - 1)
    return scale, low, _error(groups, weights, scale, low, bits)


def _error(groups: mx.array, weights: mx.array, scale: mx.array, bias: mx.array, bits: int) -> mx.array:
    return _squares(groups, weights, scale[..., None], bias[..., None], bits).sum(-1)


@fused
def _squares(groups: mx.array, weights: mx.array, scale: mx.array, bias: mx.array, bits: int) -> mx.array:
    return weights * (groups - (scale * _codes(groups, scale, bias, bits) + bias)) ** 2


def _fitted(groups: mx.array, weights: mx.array, codes: mx.array) -> tuple[mx.array, mx.array]:
    """Least squares: the scale and bias with which these codes come closest."""
    total = weights.sum(-1) if weights.shape == groups.shape else mx.broadcast_to(weights, groups.shape).sum(-1)
    mean_code, mean = (weights * codes).sum(-1) / total, (weights * groups).sum(-1) / total
    centred = codes - mean_code[..., None]
    spread = (weights * centred * centred).sum(-1)
    scale = (weights * centred * groups).sum(-1) / mx.maximum(spread, _TINY)
    return scale, mean - scale * mean_code


def _better(
    groups: mx.array, weights: mx.array, codes: mx.array, scale: mx.array, bias: mx.array, error: mx.array, bits: int
) -> tuple[mx.array, mx.array, mx.array]:
    new_scale, new_bias = _fitted(groups, weights, codes)
    new_error = _error(groups, weights, new_scale, new_bias, bits)
    better = new_error < error
    return (
        mx.where(better, new_scale, scale),
        mx.where(better, new_bias, bias),
        mx.where(better, new_error, error),
    )


def _try_range(
    groups: mx.array,
    weights: mx.array,
    shrink: mx.array,
    scale: mx.array,
    bias: mx.array,
    error: mx.array,
    *,
    bits: int,
) -> tuple[mx.array, mx.array, mx.array]:
    low, high = groups.min(-1), groups.max(-1)
    middle, half = (low + high) / 2, shrink * (high - low) / 2
    codes = _codes(groups, (2 * half / (2**bits - 1))[..., None], (middle - half)[..., None], bits)
    return _better(groups, weights, codes, scale, bias, error, bits)


def _refit(
    groups: mx.array, weights: mx.array, scale: mx.array, bias: mx.array, error: mx.array, *, bits: int
) -> tuple[mx.array, mx.array, mx.array]:
    codes = _codes(groups, scale[..., None], bias[..., None], bits)
    return _better(groups, weights, codes, scale, bias, error, bits)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes (rows, columns), whole numbers in 0 .. 2^bits - 1, as MLX packs them: (rows, columns * bits / 32) uint32.

    The codes of a row are one stream of bits, lowest first; 32 of them fill `bits` words.
    """
    codes = codes.astype(mx.uint32).reshape(*codes.shape[:-1], -1, 32)
    words = [mx.zeros(codes.shape[:-1], mx.uint32) for _ in range(bits)]
    for index in range(32):
        word, offset = divmod(index * bits, 32)
        words[word] = words[word] | (codes[..., index] << offset)
        if offset + bits > 32:
            words[word + 1] = words[word + 1] | (codes[..., index] >> (32 - offset))
    return mx.stack(words, axis=-1).flatten(-2)
