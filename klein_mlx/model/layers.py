"""Linear layers over many tokens, plain or quantised, by the fastest way that the device has.

Quantised weights: MLX's quantised matmul is made for few tokens. Over thousands, on a CPU, it is many times slower than
expanding the layer's weight and multiplying; bfloat16 and float16 matmuls are as slow there, and go through float32.
So are the GPUs of M1 and M2 with quantised weights. A weight is expanded inside the graph, just before its matmul; MLX
still works a few layers ahead, which `one_weight_at_a_time` keeps it from.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce
from typing import Any, TypeGuard

import mlx.core as mx
import mlx.nn as nn

from klein_mlx.model.compile import fused

POLICIES = ("auto", "direct", "expand")


_policy: ContextVar[str] = ContextVar("matmul_policy", default="auto")


_at_once: ContextVar[bool] = ContextVar("one_weight_at_a_time", default=False)


_SLOW_GPUS = ("applegpu_g13", "applegpu_g14")  # M1 and M2: expanding pays there


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


@contextmanager
def one_weight_at_a_time() -> Iterator[None]:
    """Inside, a layer whose weight has to be expanded is computed as soon as it is called, so that only one such weight
    is ever in memory. Not for where arrays are traced (mx.compile, mx.grad, mx.export_function)."""
    token = _at_once.set(True)
    try:
        yield
    finally:
        _at_once.reset(token)


def on_cpu() -> bool:
    return mx.default_device().type != mx.DeviceType.gpu


def expands() -> bool:
    """Whether quantised weights are expanded before they are multiplied with."""
    policy = _policy.get()
    return policy == "expand" or (policy == "auto" and (on_cpu() or _gpu().startswith(_SLOW_GPUS)))


def _gpu() -> str:
    """The GPU's kind in Apple's words, such as "applegpu_g13s"."""
    return str(mx.device_info().get("architecture", ""))


def _widens(x: mx.array) -> bool:
    """Whether a matmul of x goes through float32."""
    return x.dtype != mx.float32 and on_cpu() and expands()


def _after(x: mx.array, *arrays: mx.array) -> list[mx.array]:
    """The arrays, but not before x is there: else MLX may expand the weights of many layers before it needs them."""
    return mx.depends(list(arrays), [x])


def _is_known(layer: nn.Module) -> TypeGuard[nn.Linear | nn.QuantizedLinear]:
    """Whether it is one of the layers themselves: what is derived from them is called instead."""
    return type(layer) in (nn.Linear, nn.QuantizedLinear)


def _plain_weight(layer: nn.Linear | nn.QuantizedLinear, x: mx.array, rows: slice) -> mx.array | None:
    """The output channels `rows` of the layer's weight, as x is to be multiplied with them; None: packed as they are.
    Rows of a weight are whole in memory: nothing is copied."""
    if isinstance(layer, nn.Linear):
        weight = layer.weight[rows]
        return _after(x, weight)[0].astype(mx.float32) if _widens(x) else weight
    if not expands():
        return None
    arrays, kind = _packed(layer, rows)
    if _widens(x):  # the weight is expanded in float32 too: rounded to bfloat16 it would lose what 8 bits hold
        floating = (mx.bfloat16, mx.float16)
        arrays = [a.astype(mx.float32) if a is not None and a.dtype in floating else a for a in arrays]
    given = iter(_after(x, *(a for a in arrays if a is not None)))
    # Packed numbers are constants: they have no gradient, also where they wait for x.
    ready: list[Any] = [None if a is None else mx.stop_gradient(next(given)) for a in arrays]
    weight = _dequantized(ready, kind)
    return weight.astype(mx.float32) if _widens(x) else weight.astype(x.dtype)


def _dequantized(arrays: list[Any], kind: dict[str, Any]) -> mx.array:
    """mx.dequantize, on a CPU by fewer passes over memory: to the bit the same, in well under half of the time."""
    weight, scales, biases = arrays
    bits, group_size = kind["bits"], kind["group_size"]
    if not on_cpu() or kind["mode"] != "affine" or bits not in (4, 8):
        return mx.dequantize(*arrays, **kind)
    numbers = weight.view(mx.uint8)
    if bits == 4:
        numbers = mx.stack([numbers & 15, numbers >> 4], axis=-1).flatten(-2)
    groups = mx.unflatten(numbers, -1, (-1, group_size)).astype(scales.dtype)
    return (groups * scales[..., None] + biases[..., None]).flatten(-2)


def _now(out: mx.array, layer: nn.Module, x: mx.array) -> mx.array:
    """The result of a layer; computed already, if its weight was expanded and only one such weight may be there."""
    if _at_once.get() and (_widens(x) or isinstance(layer, nn.QuantizedLinear)):
        mx.eval(out)
    return out


def _packed(layer: nn.QuantizedLinear, rows: slice) -> tuple[list[Any], dict[str, Any]]:
    """A quantised layer's arrays (the last one None where its mode has no biases), and how they are packed."""
    arrays = [layer[name][rows] if name in layer else None for name in ("weight", "scales", "biases")]
    return arrays, {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}


def multiply(x: mx.array, weight: mx.array, added: mx.array | None = None) -> mx.array:
    """x @ weight.T, on top of `added`, in x's dtype: one kernel where the device multiplies that itself."""
    if not _widens(x):
        return x @ weight.T if added is None else mx.addmm(added, x, weight.T)
    out = x.astype(mx.float32) @ weight.astype(mx.float32).T
    return (out if added is None else added + out).astype(x.dtype)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x)), in x's dtype. On a CPU by a power of two, in float32: MLX has that in a third of the time."""
    if not (on_cpu() and expands()):
        return mx.sigmoid(x)
    return (1 / (1 + mx.power(2.0, x.astype(mx.float32) * -math.log2(math.e)))).astype(x.dtype)


def attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
    """MLX's attention with its usual scale. q: (B, heads, L, head_dim); k, v: (B, heads of their own, S, head_dim).

    mask: bool, True where a query sees a key, broadcast to (B, heads, L, S). Returns q's shape and dtype. Its two
    matmuls follow the policy too: on a CPU they go through float32.
    """
    given = [a.astype(mx.float32) for a in (q, k, v)] if _widens(q) else [q, k, v]
    return mx.fast.scaled_dot_product_attention(*given, scale=q.shape[-1] ** -0.5, mask=mask).astype(q.dtype)


def _rows(layer: nn.Linear | nn.QuantizedLinear, x: mx.array, rows: slice) -> mx.array:
    """The output channels `rows` of layer(x)."""
    weight = _plain_weight(layer, x, rows)
    if weight is not None:
        out = _now(multiply(x, weight), layer, x)
    else:
        arrays, kind = _packed(layer, rows)  # type: ignore[arg-type]
        out = mx.quantized_matmul(x, *arrays, transpose=True, **kind)
    return out + layer.bias[rows] if "bias" in layer else out


def linear(layer: nn.Module, x: mx.array) -> mx.array:
    """layer(x). layer: an nn.Linear, an nn.QuantizedLinear, or any module that is called like one."""
    if _is_known(layer):
        return _rows(layer, x, slice(None))
    return layer(x)  # type: ignore[operator]


def linear_split(layer: nn.Module, x: mx.array, at: int) -> tuple[mx.array, mx.array]:
    """layer(x), cut at output channel `at`, by two matmuls: each result is whole in memory, and nothing is copied.

    A module of another kind may have a method `split(x, at)` that does the same; else its result is cut.
    """
    if _is_known(layer):
        return _rows(layer, x, slice(at)), _rows(layer, x, slice(at, None))
    if hasattr(layer, "split"):
        return layer.split(x, at)  # type: ignore[operator]
    whole = layer(x)  # type: ignore[operator]
    return whole[..., :at], whole[..., at:]


def linear_part(layer: nn.Module, x: mx.array, start: int, stop: int | None) -> mx.array:
    """The output channels start..stop of layer(x), alone.

    A module of another kind may have a method `part(x, start, stop)` that does the same; else its result is cut.
    """
    if _is_known(layer):
        return _rows(layer, x, slice(start, stop))
    if hasattr(layer, "part"):
        return layer.part(x, start, stop)  # type: ignore[operator]
    return layer(x)[..., start:stop]  # type: ignore[operator]


class Cut(nn.Module):
    """A linear layer held as two, by its input channels: its inputs need not be joined in memory.

    Columns of a weight that is whole in memory could only be used by copying them in every call, or, on some devices,
    by a matmul several times slower.
    """

    def __init__(self, first: nn.Module, second: nn.Module, at: int):
        super().__init__()
        self.first, self.second, self.at = first, second, at

    def __call__(self, x: mx.array) -> mx.array:
        return reduce(mx.add, self.terms(x[..., : self.at], x[..., self.at :]))

    def terms(self, first: mx.array, second: mx.array) -> tuple[mx.array, ...]:
        """Arrays that add up to the layer's result on [first, second]: one where a matmul can add to another's."""
        one, two = (
            _plain_weight(layer, x, slice(None)) if _is_known(layer) and "bias" not in layer else None
            for layer, x in ((self.first, first), (self.second, second))
        )
        if one is None or two is None:
            return linear(self.first, first), linear(self.second, second)
        return (_now(_multiply_both(first, one, second, two), self.first, first),)


def _multiply_both(first: mx.array, one: mx.array, second: mx.array, two: mx.array) -> mx.array:
    """first @ one.T + second @ two.T, rounded to their dtype once."""
    if not _widens(first):
        return mx.addmm(first @ one.T, second, two.T)
    wide = first.astype(mx.float32) @ one.T
    return mx.addmm(wide, second.astype(mx.float32), two.T).astype(first.dtype)


def cut(layer: nn.Module, at: int) -> nn.Module:
    """The layer as a `Cut` after input channel `at`, its weights copied lazily; itself if it cannot be cut there."""
    if not _is_known(layer) or "bias" in layer:
        return layer
    if isinstance(layer, nn.QuantizedLinear) and (at % layer.group_size or at * layer.bits % 32):
        return layer
    return Cut(_columns(layer, at, left=True), _columns(layer, at, left=False), at)


def _columns(layer: nn.Linear | nn.QuantizedLinear, at: int, left: bool) -> nn.Module:
    """A layer of the input channels before or after `at`."""
    edges = {"weight": at}
    if isinstance(layer, nn.QuantizedLinear):
        groups = at // layer.group_size
        edges = {"weight": at * layer.bits // 32, "scales": groups, "biases": groups}
    halves = {n: layer[n][:, :edge] if left else layer[n][:, edge:] for n, edge in edges.items() if n in layer}
    return _alike(layer, {name: mx.contiguous(half) for name, half in halves.items()})


def empty(kind: type[nn.Module]) -> Any:
    """A module without weights; its own first ones would be drawn from the user's random numbers."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    return layer


def _alike(layer: nn.Linear | nn.QuantizedLinear, arrays: dict[str, mx.array]) -> nn.Module:
    """A layer of the same kind with other arrays."""
    other = empty(type(layer))
    for name, value in (*arrays.items(), *_settings(layer).items()):
        setattr(other, name, value)
    return other


def _settings(layer: nn.Linear | nn.QuantizedLinear) -> dict[str, Any]:
    """How a layer's numbers are packed; nothing for a plain one."""
    names = ("group_size", "bits", "mode") if isinstance(layer, nn.QuantizedLinear) else ()
    return {name: getattr(layer, name) for name in names}


def join(parent: nn.Module, first: str, second: str, joined: str) -> None:
    """Hold two layers of the same input as one, the output channels of `second` after those of `first`, lazily. They
    stay as they are if they are of two kinds, or not the layers themselves; joined already, nothing changes.

    first, second, joined: names of the parent's layers.
    """
    one, two = parent.get(first), parent.get(second)
    if one is None or two is None or not (_is_known(one) and type(one) is type(two)):
        return
    if "bias" in one or "bias" in two or _settings(one) != _settings(two):
        return
    names = [name for name in ("weight", "scales", "biases") if name in one]
    parent[joined] = _alike(one, {name: mx.concatenate([one[name], two[name]]) for name in names})
    del parent[first], parent[second]


def separate(parent: nn.Module, first: str, second: str, joined: str) -> None:
    """Undo `join`: both layers again, as views of the joined arrays."""
    layer = parent.get(joined)
    if layer is None:
        return
    half = layer.weight.shape[0] // 2
    for name, rows in ((first, slice(half)), (second, slice(half, None))):
        parent[name] = _alike(layer, {n: layer[n][rows] for n in ("weight", "scales", "biases") if n in layer})
    del parent[joined]


def linear_terms(layer: nn.Module, first: mx.array, second: mx.array) -> tuple[mx.array, ...]:
    """Arrays that add up to layer([first, second]), without joining the two in memory where the layer is cut.

    A module of another kind than `Cut` may have a method `terms(first, second)` that does the same.
    """
    if hasattr(layer, "terms"):
        return layer.terms(first, second)  # type: ignore[operator]
    return (linear(layer, mx.concatenate([first, second], axis=-1)),)


def linear_added(layer: nn.Module, x: mx.array, residual: mx.array) -> mx.array:
    """residual + layer(x), as one kernel where the layer is plain."""
    if type(layer) is nn.Linear and "bias" not in layer and not _widens(x):
        return mx.addmm(residual, x, layer.weight.T)
    return residual + linear(layer, x)


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
