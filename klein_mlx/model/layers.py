"""Linear layers that know their device, and how the two kinds of devices compute.

Every module here has a `device`, a `Gpu` or a `Cpu`: the default device's when the module is made, or whatever `place`
put there. It decides how a layer multiplies, so that blocks ask nothing.

MLX's quantized matmul is made for few tokens. Over thousands, dequantizing a layer's weight once and multiplying with
that is faster on most chips. A weight is dequantized inside of the graph, just before its matmul.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache, reduce
from itertools import pairwise
from operator import attrgetter
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn

from klein_mlx.model.compile import Chain, signature

ALL = slice(None)
SHRINK = 2.0**-6  # in float16 a branch may reach 4e6
LOG2_E = math.log2(math.e)
SCORES = 1 << 26  # of attention, in memory at once
Done = Callable[[mx.array], None]  # called between parts with what was computed: it may evaluate it, or raise to stop


@dataclass(frozen=True)
class Packed:
    """Output channels of a quantized weight. arrays: weight, scales, biases (None where the mode has none). kind: how
    they are packed, as mx.dequantize wants to know it."""

    arrays: tuple[Any, ...]
    kind: dict[str, Any]

    def after(self, x: mx.array) -> list[Any]:
        """The arrays, but not before x is there: else MLX may dequantize many layers before it needs them."""
        given = iter(mx.depends([a for a in self.arrays if a is not None], [x]))
        return [None if a is None else next(given) for a in self.arrays]


@dataclass(frozen=True)
class Gpu:
    """How a GPU computes. The choices are equal to rounding; which is faster depends on the chip.

    dense_from: how many tokens a quantized layer must have for its weight to be dequantized first; None: never.
    by_bits: the same for weights of some bits. rows: about how many rows one matmul has at most; None: all of them.
    conv: "direct" for MLX's convolutions, "matmul" for one matmul over overlapping rows. dtype: of the computation,
    where nobody asks for another.
    """

    dense_from: int | None = None
    by_bits: tuple[tuple[int, int | None], ...] = ()
    rows: int | None = None
    conv: str = "direct"
    dtype: mx.Dtype = mx.bfloat16
    compiles: bool = True  # blocks and chains

    widens = False  # matmuls of 16 bits go through float32

    def form(self, chain: Chain[...]) -> Callable[..., mx.array]:
        """How a chain is computed: as one kernel where it is compiled."""
        return chain if self.compiles else chain.plain

    def linear(self, x: mx.array, weight: mx.array, added: mx.array | None = None) -> mx.array:
        """A plain layer: x @ weight.T, on top of `added`, in x's dtype."""
        return self.matmul(x, weight, added)

    def matmul(self, x: mx.array, weight: mx.array, added: mx.array | None = None) -> mx.array:
        """The same of a weight that was made for this, or is small."""
        if self.rows is not None and x.size // x.shape[-1] >= 2 * self.rows:
            return self._by_rows(x, weight, added)
        return x @ weight.T if added is None else mx.addmm(added, x, weight.T)

    def _by_rows(self, x: mx.array, weight: mx.array, added: mx.array | None) -> mx.array:
        flat = x.reshape(-1, x.shape[-1])
        count = flat.shape[0] // self.rows  # type: ignore[operator]
        edges = [flat.shape[0] * part // count for part in range(count + 1)]
        pieces = [slice(*pair) for pair in pairwise(edges)]
        if added is None:
            out = [flat[piece] @ weight.T for piece in pieces]
        else:
            added = mx.broadcast_to(added, (*x.shape[:-1], weight.shape[0])).reshape(flat.shape[0], -1)
            out = [mx.addmm(added[piece], flat[piece], weight.T) for piece in pieces]
        return mx.concatenate(out).reshape(*x.shape[:-1], -1)

    def matmul_wide(self, x: mx.array, weight: mx.array) -> mx.array:
        """x @ weight.T in the dtype in which another matmul may add to it."""
        return self.matmul(x, weight)

    def weight(self, weight: mx.array, x: mx.array) -> mx.array:
        """A plain layer's weight, as x is to be multiplied with it."""
        return weight

    def dequantized(self, packed: "Packed", x: mx.array) -> mx.array | None:
        """A quantized layer's weight as x is to be multiplied with it, once x is there; None: multiply as it is."""
        if not self.is_dequantized(x.size // x.shape[-1], packed.kind["bits"]):
            return None
        return mx.stop_gradient(mx.dequantize(*packed.after(x), **packed.kind).astype(x.dtype))

    def settled(self, out: mx.array, made: bool) -> mx.array:
        """A layer's result. made: whether a weight had to be made for it."""
        return out

    def attention(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
        """MLX's attention with its usual scale. q: (B, heads, L, head_dim); k, v: (B, heads of their own, S, head_dim).

        mask: bool, True where a query sees a key, broadcast to (B, heads, L, S). Returns q's shape and dtype.
        """
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)

    def is_dequantized(self, tokens: int, bits: int | None = None) -> bool:
        """Whether quantized layers of so many tokens have a plain weight beside them while they are computed.

        bits: of the weights; None: whether any may have one.
        """
        own = dict(self.by_bits)
        known = [*own.values(), self.dense_from] if bits is None else [own.get(bits, self.dense_from)]
        return any(least is not None and tokens >= least for least in known)


@dataclass(frozen=True)
class Cpu:
    """How a CPU computes, as `Gpu` otherwise: in float32, and one dequantized weight at a time.

    Over thousands of tokens MLX's quantized matmul is many times slower on a CPU than dequantizing the layer's weight
    and multiplying; matmuls of bfloat16 and float16 are as slow, and go through float32. Nothing is compiled: that
    would call a C++ compiler.
    at_once: a layer whose weight has to be made, and each piece of a long attention, whose scores no kernel spares, is
    evaluated when it is called, so that only one is ever in memory; not for where arrays are traced (mx.compile,
    mx.grad, mx.export_function).
    """

    at_once: bool = False

    compiles = False
    widens = True
    conv = "rows"
    dtype = mx.float32

    form = staticmethod(attrgetter("cpu"))

    def linear(self, x: mx.array, weight: mx.array, added: mx.array | None = None) -> mx.array:
        if x.dtype == mx.float32:
            return x @ weight.T if added is None else mx.addmm(added, x, weight.T)
        return self.settled(self.matmul(x, self.weight(weight, x), added), made=True)

    def matmul(self, x: mx.array, weight: mx.array, added: mx.array | None = None) -> mx.array:
        if x.dtype == mx.float32:
            return x @ weight.T if added is None else mx.addmm(added, x, weight.T)
        out = self.matmul_wide(x, weight)
        return (out if added is None else added + out).astype(x.dtype)

    def matmul_wide(self, x: mx.array, weight: mx.array) -> mx.array:
        return x.astype(mx.float32) @ weight.astype(mx.float32).T

    def weight(self, weight: mx.array, x: mx.array) -> mx.array:
        if x.dtype == mx.float32:
            return weight
        # Not before x is there: else MLX may widen the weights of many layers before it needs them.
        return mx.depends([weight], [x])[0].astype(mx.float32)

    def dequantized(self, packed: Packed, x: mx.array) -> mx.array:
        arrays = packed.after(x)
        if x.dtype != mx.float32:  # in float32 too: rounded to bfloat16 the weight would lose what 8 bits hold
            floating = (mx.bfloat16, mx.float16)
            arrays = [a.astype(mx.float32) if a is not None and a.dtype in floating else a for a in arrays]
        return mx.stop_gradient(dequantize(arrays, packed.kind).astype(mx.float32))

    def settled(self, out: mx.array, made: bool) -> mx.array:
        if self.at_once and made:
            mx.eval(out)
        return out

    def attention(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
        wide, scale = [a.astype(mx.float32) for a in (q, k, v)], q.shape[-1] ** -0.5
        rows, length = max(1, SCORES // (q.shape[0] * q.shape[1] * k.shape[2])), q.shape[2]
        if not self.at_once or rows >= length:
            return mx.fast.scaled_dot_product_attention(*wide, scale=scale, mask=mask).astype(q.dtype)
        parts = []
        for top in range(0, length, rows):
            piece = slice(top, top + rows)
            own = mask if mask is None or mask.shape[-2] == 1 else mask[..., piece, :]
            out = mx.fast.scaled_dot_product_attention(wide[0][:, :, piece], *wide[1:], scale=scale, mask=own)
            parts.append(self.settled(out.astype(q.dtype), made=True))
        return mx.concatenate(parts, axis=2)

    def is_dequantized(self, tokens: int, bits: int | None = None) -> bool:
        return True


def dequantize(arrays: list[Any], kind: dict[str, Any]) -> mx.array:
    """mx.dequantize, by fewer passes over memory: to the bit the same, in well under half of the time."""
    weight, scales, biases = arrays
    bits, group_size = kind["bits"], kind["group_size"]
    if kind["mode"] != "affine" or bits not in (4, 8):
        return mx.dequantize(*arrays, **kind)
    numbers = weight.view(mx.uint8)
    if bits == 4:
        numbers = mx.stack([numbers & 15, numbers >> 4], axis=-1).flatten(-2)
    groups = mx.unflatten(numbers, -1, (-1, group_size)).astype(scales.dtype)
    return (groups * scales[..., None] + biases[..., None]).flatten(-2)


# The GPUs' kinds in Apple's words begin so. M1 and M2 multiply packed weights far slower than plain ones; later chips
# by 5 to 18 %, which pays once there are more tokens than dequantizing costs.
_GENERATIONS = {"applegpu_g13": 0, "applegpu_g14": 0, "applegpu_g15": 1024, "applegpu_g16": 1024, "applegpu_g17": 1024}


def gpu(architecture: str) -> Gpu:
    """What a kind of GPU does without having been measured. M5's matmuls are far ahead of its convolutions."""
    kind = architecture[: len("applegpu_g13")]
    return Gpu(_GENERATIONS.get(kind), conv="matmul" if kind == "applegpu_g17" else "direct")


Device = Any  # a Gpu or a Cpu, which have the same methods


def here(at_once: bool = False) -> Device:
    """How the default device computes, as far as its kind tells (see `gpu`). at_once: see `Cpu`."""
    return device_of(mx.default_device().type == mx.DeviceType.gpu, at_once)


@cache
def device_of(on_gpu: bool, at_once: bool = False) -> Device:
    """How this machine's GPU, or its CPU, computes; asked by every layer that is made."""
    if not on_gpu:
        return Cpu(at_once)
    return gpu(str(mx.device_info().get("architecture", "")))


class Placed(nn.Module):
    """A module that knows how its device computes."""

    def __init__(self) -> None:
        super().__init__()
        self.device: Device = device_of(mx.default_device().type == mx.DeviceType.gpu)

    @property
    def signature(self) -> Hashable:
        """What decides the module's code besides the shapes of its arrays."""
        return signature(self)


def place(module: nn.Module, device: Device) -> None:
    """Have a module, and those in it, compute as `device` does."""
    for one in module.modules():
        if "device" in vars(one):
            one.device = device  # type: ignore[assignment]


# ---- linear layers ----


class Layer(Placed):
    """A linear layer, or what stands in for one: what blocks ask of it.

    A kind of its own has `__call__`; the other methods may be replaced by ones that save work, or copies.
    """

    @property
    def has_bias(self) -> bool:
        return "bias" in self

    def __call__(self, x: mx.array) -> mx.array:
        return self.part(x, ALL)

    def part(self, x: mx.array, channels: slice) -> mx.array:
        """Some output channels of self(x)."""
        return self(x)[..., channels]

    def split(self, x: mx.array, at: int) -> tuple[mx.array, mx.array]:
        """self(x), split at output channel `at`; each result is whole in memory."""
        return self.part(x, slice(at)), self.part(x, slice(at, None))

    def terms(self, first: mx.array, second: mx.array) -> tuple[mx.array, ...]:
        """Arrays that add up to self([first, second])."""
        return (self(mx.concatenate([first, second], axis=-1)),)

    def added(self, x: mx.array, residual: mx.array) -> mx.array:
        """residual + self(x)."""
        return residual + self(x)


class Linear(Layer, nn.Linear):
    """x @ weight.T + bias. weight: (out, in); bias: (out,), or there is none."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        nn.Linear.__init__(self, inputs, outputs, bias)
        self.device = device_of(mx.default_device().type == mx.DeviceType.gpu)

    @classmethod
    def of(cls, weight: mx.array, bias: mx.array | None = None, device: Device = None) -> Self:
        """A layer of this weight. Nothing is drawn from the user's random numbers."""
        layer = _bare(cls, device)
        layer.weight = weight
        if bias is not None:
            layer.bias = bias
        return layer

    def __call__(self, x: mx.array) -> mx.array:
        return self.device.linear(x, self.weight, self.get("bias"))

    def part(self, x: mx.array, channels: slice) -> mx.array:
        bias = self.get("bias")  # rows of a weight are whole in memory: nothing is copied
        return self.device.linear(x, self.weight[channels], None if bias is None else bias[channels])

    def added(self, x: mx.array, residual: mx.array) -> mx.array:
        bias = self.get("bias")
        return self.device.linear(x, self.weight, residual if bias is None else residual + bias)

    def plain(self, x: mx.array) -> mx.array | None:
        """The weight as x is to be multiplied with it; None where it is multiplied as it is packed."""
        return self.device.weight(self.weight, x)

    def to_quantized(self, *args: Any, **kwargs: Any) -> "QuantizedLinear":
        """As nn.quantize asks for it."""
        return QuantizedLinear.from_linear(self, *args, **kwargs)  # type: ignore[return-value]


class QuantizedLinear(Layer, nn.QuantizedLinear):
    """A linear layer whose weight is packed in one of MLX's modes. Gradients reach x, never the weight."""

    def __init__(self, *args: Any, **kwargs: Any):
        nn.QuantizedLinear.__init__(self, *args, **kwargs)
        self.device = device_of(mx.default_device().type == mx.DeviceType.gpu)

    @classmethod
    def of(cls, arrays: dict[str, mx.array], group_size: int, bits: int, mode: str, device: Device = None) -> Self:
        """A layer of packed arrays: weight, scales, and biases where the mode has them."""
        layer = _bare(cls, device)
        layer.group_size, layer.bits, layer.mode = group_size, bits, mode
        for name, array in arrays.items():
            layer[name] = array
        return layer

    def part(self, x: mx.array, channels: slice) -> mx.array:
        packed, bias = self.packed(channels), self.get("bias")
        weight = self.device.dequantized(packed, x)
        bias = None if bias is None else bias[channels]
        if weight is not None:
            return self.device.settled(self.device.matmul(x, weight, bias), made=True)
        arrays: list[Any] = [None if a is None else mx.stop_gradient(a) for a in packed.arrays]
        out = mx.quantized_matmul(x, *arrays, transpose=True, **packed.kind)
        return out if bias is None else out + bias

    def plain(self, x: mx.array) -> mx.array | None:
        """The weight as x is to be multiplied with it; None where it is multiplied as it is packed."""
        return self.device.dequantized(self.packed(ALL), x)

    def packed(self, channels: slice) -> Packed:
        """Of some output channels."""
        arrays = (self.get(name) for name in ("weight", "scales", "biases"))
        if channels != ALL:
            arrays = (None if a is None else a[channels] for a in arrays)
        return Packed(tuple(arrays), self.kind)

    @property
    def kind(self) -> dict[str, Any]:
        """How its numbers are packed."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


class Cut(Layer):
    """A linear layer without a bias held as two, by its input channels: its inputs need not be joined in memory.

    Columns of a weight that is whole in memory could only be used by copying them in every call, or, on some devices,
    by a matmul several times slower.
    """

    def __init__(self, first: Linear | QuantizedLinear, second: Linear | QuantizedLinear, at: int):
        super().__init__()
        self.first, self.second, self.at, self.device = first, second, at, first.device

    def __call__(self, x: mx.array) -> mx.array:
        return reduce(mx.add, self.terms(x[..., : self.at], x[..., self.at :]))

    def terms(self, first: mx.array, second: mx.array) -> tuple[mx.array, ...]:
        """One where a matmul can add to another's, in the dtype in which it adds up."""
        one, two = self.first.plain(first), self.second.plain(second)
        if one is None or two is None:
            return self.first(first), self.second(second)
        out = self.device.matmul(second, two, self.device.matmul_wide(first, one)).astype(first.dtype)
        return (self.device.settled(out, made=one is not self.first.weight),)


def is_known(layer: Any) -> bool:
    """Whether it is one of the two kinds of layers themselves, not what stands in for one."""
    return type(layer) in (Linear, QuantizedLinear)


def cut(layer: Any, at: int) -> Any:
    """The layer as a `Cut` after input channel `at`, its weights copied lazily; itself if it cannot be cut there."""
    if not is_known(layer) or layer.has_bias:
        return layer
    if isinstance(layer, QuantizedLinear) and (at % layer.group_size or at * layer.bits % 32):
        return layer
    return Cut(_columns(layer, at, left=True), _columns(layer, at, left=False), at)


def _columns(layer: Linear | QuantizedLinear, at: int, left: bool) -> Any:
    """A layer of the input channels before or after `at`."""
    edges = {"weight": at}
    if isinstance(layer, QuantizedLinear):
        groups = at // layer.group_size
        edges = {"weight": at * layer.bits // 32, "scales": groups, "biases": groups}
    halves = {n: layer[n][:, :edge] if left else layer[n][:, edge:] for n, edge in edges.items() if n in layer}
    return alike(layer, {name: mx.contiguous(half) for name, half in halves.items()})


def empty(kind: type[nn.Module]) -> Any:
    """A module without weights; its own first ones would be drawn from the user's random numbers."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    return layer


def _bare(kind: type[Any], device: Device) -> Any:
    layer = empty(kind)
    layer.device = device or here()
    return layer


def alike(layer: Linear | QuantizedLinear, arrays: dict[str, mx.array]) -> Any:
    """A layer of the same kind, on the same device, of other arrays."""
    if isinstance(layer, QuantizedLinear):
        return QuantizedLinear.of(arrays, **layer.kind, device=layer.device)
    return Linear.of(arrays["weight"], device=layer.device)


def join(parent: nn.Module, first: str, second: str, joined: str) -> None:
    """Hold two layers of the same input as one, the output channels of `second` after those of `first`, lazily. They
    stay as they are if they are of two kinds, or not the layers themselves; joined already, nothing changes.

    first, second, joined: names of the parent's layers.
    """
    one: Any = parent.get(first)
    two: Any = parent.get(second)
    if not (is_known(one) and type(one) is type(two)) or one.has_bias or two.has_bias:
        return
    if isinstance(one, QuantizedLinear) and one.kind != two.kind:
        return
    names = [name for name in ("weight", "scales", "biases") if name in one]
    parent[joined] = alike(one, {name: mx.concatenate([one[name], two[name]]) for name in names})
    del parent[first], parent[second]


def separate(parent: nn.Module, first: str, second: str, joined: str) -> None:
    """Undo `join`: both layers again, as views of the joined arrays."""
    layer: Any = parent.get(joined)
    if layer is None:
        return
    half = layer.weight.shape[0] // 2
    for name, rows in ((first, slice(half)), (second, slice(half, None))):
        parent[name] = alike(layer, {n: layer[n][rows] for n in ("weight", "scales", "biases") if n in layer})
    del parent[joined]


def layer_at(module: nn.Module, path: str) -> Any:
    """The layer, or the list of layers, at a path such as double_blocks.0.img; the module itself at ""."""
    found: Any = module
    for name in path.split(".") if path else ():
        found = found[int(name)] if isinstance(found, list) else found[name]
    return found


def set_layer(module: nn.Module, path: str, layer: nn.Module | mx.array) -> None:
    above, _, name = path.rpartition(".")
    layer_at(module, above)[name] = layer


# ---- elementwise ----


def wide(dtype: mx.Dtype) -> mx.Dtype:
    """The dtype of the stream, and of what modulates it, beside layers that compute in `dtype`."""
    return mx.float32 if dtype == mx.float16 else dtype


@Chain
def swiglu(gate: mx.array, value: mx.array) -> mx.array:
    """silu(gate) * value."""
    return gate * mx.sigmoid(gate) * value


# MLX's sigmoid takes three times as long on a CPU as a power of two.
@swiglu.on_cpu
def _(gate: mx.array, value: mx.array) -> mx.array:
    wide_gate = gate.astype(mx.float32)
    return (wide_gate / (1 + mx.power(2.0, wide_gate * -LOG2_E)) * value).astype(gate.dtype)


@Chain
def gated_sum(x: mx.array, gate: mx.array, branch: mx.array) -> mx.array:
    """x + gate * branch."""
    return x + gate * branch


@Chain
def gated_sum_of_two(x: mx.array, gate: mx.array, first: mx.array, second: mx.array) -> mx.array:
    """x + gate * (first + second)."""
    return x + gate * (first + second)


@Chain
def small_swiglu(gate: mx.array, value: mx.array) -> mx.array:
    """silu(gate) * value * SHRINK, computed in float32."""
    wide_gate = gate.astype(mx.float32)
    return (wide_gate * mx.sigmoid(wide_gate) * (value.astype(mx.float32) * SHRINK)).astype(gate.dtype)


@small_swiglu.on_cpu
def _(gate: mx.array, value: mx.array) -> mx.array:
    wide_gate = gate.astype(mx.float32)
    silu = wide_gate / (1 + mx.power(2.0, wide_gate * -LOG2_E))
    return (silu * (value.astype(mx.float32) * SHRINK)).astype(gate.dtype)


@Chain
def grown_sum(x: mx.array, gate: mx.array, *branches: mx.array) -> mx.array:
    """x + gate * (the branches' sum) / SHRINK, in the dtype of x."""
    first, *others = (branch.astype(x.dtype) for branch in branches)
    return x + gate * (sum(others, first) * (1 / SHRINK))


def modulated(x: mx.array, shift: mx.array, scale: mx.array, eps: float, dtype: mx.Dtype) -> mx.array:
    """What a branch reads of the stream x: normalized, scaled (the 1 + is inside) and shifted, in the layers' dtype."""
    return mx.fast.layer_norm(x, scale, shift, eps).astype(dtype)


def add_branch(
    x: mx.array,
    gate: mx.array,
    layer: Layer,
    attention: mx.array | None = None,
    mlp_gate: mx.array | None = None,
    mlp_value: mx.array | None = None,
) -> mx.array:
    """x + gate * layer(what attention returned and the MLP's SwiGLU, joined in this order, or one of them)."""
    first, form, inputs = mlp_gate if attention is None else attention, layer.device.form, []
    # What is added to a branch would not be smaller, so one with a bias stays as large as it is.
    small = first.dtype == mx.float16 and not layer.has_bias  # type: ignore[union-attr]
    if attention is not None:
        inputs.append(attention * SHRINK if small else attention)
    if mlp_gate is not None and mlp_value is not None:
        inputs.append(form(small_swiglu if small else swiglu)(mlp_gate, mlp_value))
    terms = layer.terms(*inputs) if len(inputs) == 2 else (layer(*inputs),)
    chain = grown_sum if small else gated_sum if len(terms) == 1 else gated_sum_of_two
    return form(chain)(x, gate, *terms)
