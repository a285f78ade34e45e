"""Linear layers over many tokens, plain or quantised, by the fastest way that the device has.

Quantised weights: MLX's quantised matmul is made for few tokens. Over thousands, on a CPU, it is many times slower than
expanding the layer's weight and multiplying; bfloat16 and float16 matmuls are as slow there, and go through float32.
The weight is expanded inside the graph, just before its matmul, so one layer's at a time is alive.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx.nn as nn

POLICIES = ("auto", "direct", "expand")
_policy: ContextVar[str] = ContextVar("matmul_policy", default="auto")


@contextmanager
def matmul_policy(policy: str) -> Iterator[None]:
    """Override the choice inside a `with`: "direct" always uses MLX's own matmul for the weight's type, "expand" always
    expands it to a plain weight (float32 on a CPU). The results agree to rounding."""
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}; it must be one of {', '.join(POLICIES)}")
    token = _policy.set(policy)
    try:
        yield
    finally:
        _policy.reset(token)


def on_cpu() -> bool:
    return mx.default_device().type != mx.DeviceType.gpu


def expands() -> bool:
    policy = _policy.get()
    return policy == "expand" or (policy == "auto" and on_cpu())


def _widens(x: mx.array) -> bool:
    """Whether a matmul of x goes through float32."""
    return x.dtype != mx.float32 and on_cpu() and expands()


def _multiply(x: mx.array, weight: mx.array) -> mx.array:
    """x @ weight.T, in x's dtype."""
    if not _widens(x):
        return x @ weight.T
    return (x.astype(mx.float32) @ _after(x, weight)[0].astype(mx.float32).T).astype(x.dtype)


def _after(x: mx.array, *arrays: mx.array) -> list[mx.array]:
    """The arrays, but not before x is there: else MLX may expand the weights of many layers before it needs them."""
    return mx.depends(list(arrays), [x])


def _rows(layer: nn.Linear | nn.QuantizedLinear, x: mx.array, rows: slice) -> mx.array:
    """The output channels `rows` of layer(x). Rows of a weight are whole in memory: nothing is copied."""
    if isinstance(layer, nn.Linear):
        out = _multiply(x, layer.weight[rows])
    else:
        arrays: list[Any] = [layer[name][rows] if name in layer else None for name in ("weight", "scales", "biases")]
        kind: dict[str, Any] = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        if expands():
            if _widens(x):  # the weight is expanded in float32 too: rounded to bfloat16 it would lose what 8 bits hold
                arrays[1:] = [a.astype(mx.float32) if a is not None else None for a in arrays[1:]]
            given = iter(_after(x, *(a for a in arrays if a is not None)))
            arrays = [None if a is None else next(given) for a in arrays]
            out = _multiply(x, mx.dequantize(*arrays, **kind))
        else:
            out = mx.quantized_matmul(x, *arrays, transpose=True, **kind)
    return out + layer.bias[rows] if "bias" in layer else out


def linear(layer: nn.Module, x: mx.array) -> mx.array:
    """layer(x). layer: an nn.Linear, an nn.QuantizedLinear, or any module that is called like one."""
    if type(layer) in (nn.Linear, nn.QuantizedLinear):
        return _rows(layer, x, slice(None))  # type: ignore[arg-type]
    return layer(x)  # type: ignore[operator]


def linear_split(layer: nn.Module, x: mx.array, at: int) -> tuple[mx.array, mx.array]:
    """layer(x), cut at output channel `at`, by two matmuls: each result is whole in memory, and nothing is copied."""
    if type(layer) in (nn.Linear, nn.QuantizedLinear):
        return _rows(layer, x, slice(at)), _rows(layer, x, slice(at, None))  # type: ignore[arg-type]
    whole = layer(x)  # type: ignore[operator]
    return whole[..., :at], whole[..., at:]


def linear_joined(layer: nn.Module, first: mx.array, second: mx.array) -> mx.array:
    """layer([first, second]), without joining the two in memory where the weight can be cut instead."""
    if type(layer) is nn.Linear and "bias" not in layer and not _widens(first):
        at = first.shape[-1]
        return mx.addmm(first @ layer.weight[:, :at].T, second, layer.weight[:, at:].T)
    return linear(layer, mx.concatenate([first, second], axis=-1))


def linear_added(layer: nn.Module, x: mx.array, residual: mx.array) -> mx.array:
    """residual + layer(x), as one kernel where the layer is plain."""
    if type(layer) is nn.Linear and "bias" not in layer and not _widens(x):
        return mx.addmm(residual, x, layer.weight.T)
    return residual + linear(layer, x)
