"""How a CPU computes what layers are made of: in float32, and one dequantized weight at a time.

Over thousands of tokens MLX's quantized matmul is many times slower on a CPU than dequantizing the layer's weight and
multiplying; matmuls of bfloat16 and float16 are as slow, and go through float32. A 3 x 3 convolution, which MLX unfolds
nine-fold in memory, is nine matmuls on rows that lie there already: up to 1.6 times as fast, in a fifth of the memory.
Nothing is compiled: that would call a C++ compiler.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from klein_mlx.model.compile import Chain
from klein_mlx.model.layers import SHRINK, Packed, small_swiglu, swiglu
from klein_mlx.model.vae_layers import FEW, convolve, scale_shift_silu


@dataclass(frozen=True)
class Cpu:
    """As `klein_mlx.model.layers.Gpu`, for a CPU.

    at_once: a layer whose weight has to be made is evaluated when it is called, so that only one such weight is ever in
    memory; not for where arrays are traced (mx.compile, mx.grad, mx.export_function).
    """

    at_once: bool = False

    compiles = False
    widens = True
    conv = "rows"
    dtype = mx.float32

    def run(self, chain: Chain[...], *args: Any) -> mx.array:
        return _OWN.get(chain, chain.plain)(*args)

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
        wide = [a.astype(mx.float32) for a in (q, k, v)]
        return mx.fast.scaled_dot_product_attention(*wide, scale=q.shape[-1] ** -0.5, mask=mask).astype(q.dtype)

    def convolve(self, x: mx.array, weight: mx.array, bias: mx.array, edges: Any, turned: bool = False) -> mx.array:
        if x.shape[-1] < FEW:
            return convolve(x, weight, bias, edges, turned)
        return _convolve_by_rows(x, weight[:, ::-1, ::-1] if turned else weight, bias, edges)

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


def _convolve_by_rows(x: mx.array, weight: mx.array, bias: mx.array, edges: Any) -> mx.array:
    """A matmul for each place of the kernel, added up in float32. See `klein_mlx.model.vae_layers.convolve`."""
    (outputs, high, broad, channels), dtype = weight.shape, x.dtype
    left, right = edges[1]
    x, weight = mx.pad(x.astype(mx.float32), [(0, 0), edges[0], (0, 0), (0, 0)]), weight.astype(mx.float32)
    b, height, size = x.shape[0], x.shape[1] - high + 1, x.shape[2]
    width = size + left + right - broad + 1
    out = mx.broadcast_to(bias.astype(mx.float32), (b * height * width, outputs))
    for column in range(broad):
        # Of the columns that this place sees, those beyond the picture are zeros.
        start, stop = column - left, column - left + width
        shifted = x[:, :, max(start, 0) : min(stop, size)]
        shifted = mx.pad(shifted, [(0, 0), (0, 0), (max(-start, 0), max(stop - size, 0)), (0, 0)])
        for row in range(high):
            out = mx.addmm(out, shifted[:, row : row + height].reshape(-1, channels), weight[:, row, column].T)
    return out.reshape(b, height, width, outputs).astype(dtype)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x)), in x's dtype, by a power of two in float32: MLX has that in a third of the time."""
    return (1 / (1 + mx.power(2.0, x.astype(mx.float32) * -math.log2(math.e)))).astype(x.dtype)


def _swiglu(gate: mx.array, value: mx.array) -> mx.array:
    return gate * sigmoid(gate) * value


def _swiglu_shrunk(gate: mx.array, value: mx.array) -> mx.array:
    wide_gate = gate.astype(mx.float32)
    return (wide_gate * sigmoid(wide_gate) * (value.astype(mx.float32) * SHRINK)).astype(gate.dtype)


def _scale_shift_silu(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    out = x.astype(mx.float32) * scale + shift
    return (out * sigmoid(out)).astype(x.dtype)


_OWN: dict[Chain[...], Callable[..., mx.array]] = {
    swiglu: _swiglu,
    small_swiglu: _swiglu_shrunk,
    scale_shift_silu: _scale_shift_silu,
}
