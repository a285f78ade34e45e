"""The residual stream and the branches beside it: what a branch reads of it, and how its result is added.

Branches compute in the layers' dtype. The stream reaches 1e5, which float16 (up to 65504) cannot hold, so beside
float16 layers it is float32. What such layers add up to inside a branch may be too large as well: what goes into the
last layer of a branch is made smaller by a power of two, and what comes out of it larger again, in float32. Nothing is
lost by that but bits of numbers that are a million times smaller than their neighbours.
"""

import mlx.core as mx
import mlx.nn as nn

from klein_mlx.fusion import fused
from klein_mlx.linear import linear, linear_terms, sigmoid

SHRINK = 2.0**-6  # in float16 a branch may reach 4e6


def wide(dtype: mx.Dtype) -> mx.Dtype:
    """The dtype of the stream, and of what modulates it, beside layers that compute in `dtype`."""
    return mx.float32 if dtype == mx.float16 else dtype


def modulated(x: mx.array, shift: mx.array, scale: mx.array, eps: float, dtype: mx.Dtype) -> mx.array:
    """What a branch reads of the stream x: normalised, scaled (the 1 + is inside) and shifted, in the layers' dtype."""
    return mx.fast.layer_norm(x, scale, shift, eps).astype(dtype)


def add_branch(
    x: mx.array,
    gate: mx.array,
    layer: nn.Module,
    attention: mx.array | None = None,
    mlp_gate: mx.array | None = None,
    mlp_value: mx.array | None = None,
) -> mx.array:
    """x + gate * layer(what attention returned and the MLP's SwiGLU, joined in this order, or one of them)."""
    inputs = []
    of_layers = attention if attention is not None else mlp_gate
    # What is added to a result would not be smaller with it.
    is_narrow = of_layers is not None and of_layers.dtype == mx.float16 and "bias" not in layer
    if attention is not None:
        inputs.append(attention * SHRINK if is_narrow else attention)
    if mlp_gate is not None and mlp_value is not None:
        inputs.append((_small_swiglu if is_narrow else swiglu)(mlp_gate, mlp_value))
    terms = linear_terms(layer, *inputs) if len(inputs) == 2 else (linear(layer, *inputs),)
    if is_narrow:
        return _grown_sum(x, gate, *terms)
    return _gated_sum(x, gate, *terms) if len(terms) == 1 else _gated_sum_of_two(x, gate, *terms)


@fused
def swiglu(gate: mx.array, value: mx.array) -> mx.array:
    """silu(gate) * value."""
    return gate * sigmoid(gate) * value


@fused
def _gated_sum(x: mx.array, gate: mx.array, branch: mx.array) -> mx.array:
    """x + gate * branch."""
    return x + gate * branch


@fused
def _gated_sum_of_two(x: mx.array, gate: mx.array, first: mx.array, second: mx.array) -> mx.array:
    """x + gate * (first + second)."""
    return x + gate * (first + second)


@fused
def _small_swiglu(gate: mx.array, value: mx.array) -> mx.array:
    """silu(gate) * value * SHRINK, computed in float32."""
    wide_gate = gate.astype(mx.float32)
    return (wide_gate * sigmoid(wide_gate) * (value.astype(mx.float32) * SHRINK)).astype(gate.dtype)


@fused
def _grown_sum(x: mx.array, gate: mx.array, *branches: mx.array) -> mx.array:
    """x + gate * (the branches' sum) / SHRINK, in the dtype of x."""
    first, *others = (branch.astype(x.dtype) for branch in branches)
    return x + gate * (sum(others, first) * (1 / SHRINK))
