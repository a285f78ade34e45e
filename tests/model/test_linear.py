"""Linear layers: every way of computing one gives the same numbers."""

from functools import reduce
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from klein_mlx.bench.cost import trace
from klein_mlx.model import layers
from klein_mlx.model.layers import (
    Cpu,
    Cut,
    Gpu,
    Layer,
    Linear,
    QuantizedLinear,
    cut,
    dequantize,
    gpu,
    here,
    join,
    place,
    separate,
    swiglu,
)

DEVICES = [Cpu(), Cpu(at_once=True), Gpu(), Gpu(dense_from=0), Gpu(rows=4)]


def layer(kind: str, dtype: mx.Dtype) -> Any:
    mx.random.seed(0)
    plain = Linear(128, 192, bias=kind == "bias")
    plain.set_dtype(dtype)
    if kind in ("plain", "bias"):
        return plain
    return QuantizedLinear.from_linear(plain, group_size=64, bits=int(kind))


def exact(module: nn.Module, x: mx.array) -> mx.array:
    """The layer in float32."""
    weight, bias = module["weight"], module.get("bias", mx.array(0.0))
    if isinstance(module, nn.QuantizedLinear):
        scales = (module[name].astype(mx.float32) for name in ("scales", "biases"))
        weight = mx.dequantize(weight, *scales, group_size=module.group_size, bits=module.bits)
    return x.astype(mx.float32) @ weight.astype(mx.float32).T + bias.astype(mx.float32)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["plain", "bias", "4", "8"])
def test_all_ways_agree(kind: str, device: Any, dtype: mx.Dtype) -> None:
    """With float32 arithmetic on the same weights: in float32 to 1e-5, in bfloat16 to two roundings of values up to 2.

    MLX's quantised matmul on a CPU adds up in bfloat16 itself: 128 terms, an error of several roundings.
    """
    module, x = layer(kind, dtype), mx.random.normal((2, 7, 128), key=mx.random.key(1)).astype(dtype)
    wanted = exact(module, x)
    packed = kind in "48" and device in (Gpu(), Gpu(rows=4))
    tolerance = 1e-5 if dtype == mx.float32 else 0.1 if packed else 2 * 2**-7
    place(module, device)
    out = module(x)
    first, second = module.split(x, 64)
    middle = module.part(x, slice(64, 100))
    joined, in_two = (reduce(mx.add, m.terms(x[..., :64], x[..., 64:])) for m in (module, cut(module, 64)))
    added = module.added(x, wanted.astype(dtype))
    assert mx.allclose(middle, wanted[..., 64:100], atol=tolerance)
    assert out.dtype == added.dtype == joined.dtype == in_two.dtype == dtype
    assert mx.allclose(out, wanted, atol=tolerance)
    assert mx.allclose(mx.concatenate([first, second], axis=-1), wanted, atol=tolerance)
    assert mx.allclose(joined, wanted, atol=tolerance)
    assert mx.allclose(in_two, wanted, atol=tolerance)
    assert mx.allclose(added, wanted + wanted, atol=2 * tolerance)


@pytest.mark.parametrize("kind", ["plain", "4", "8"])
def test_a_cut_layer_is_called_like_a_whole_one(kind: str) -> None:
    module, x = layer(kind, mx.float32), mx.random.normal((2, 7, 128), key=mx.random.key(1))
    in_two = cut(module, 64)
    assert isinstance(in_two, Cut)
    assert mx.allclose(in_two(x), module(x), atol=1e-5)  # type: ignore[operator]


def test_what_cannot_be_cut_is_left_whole() -> None:
    """A layer with a bias, or a packed one where a group of columns that share a scale would fall apart."""
    assert not isinstance(cut(layer("bias", mx.float32), 64), Cut)
    assert not isinstance(cut(layer("4", mx.float32), 32), Cut)


class Pair(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second


@pytest.mark.parametrize("kind", ["plain", "4", "8"])
def test_joined_layers_are_one_matmul_and_come_back_as_they_were(kind: str) -> None:
    one, two = layer(kind, mx.float32), layer(kind, mx.float32)
    two["weight"] = two["weight"][::-1]
    x, pair = mx.random.normal((7, 128), key=mx.random.key(1)), Pair(one, two)
    before = dict(tree_flatten(pair.parameters()))
    wanted = mx.concatenate([one(x), two(x)], axis=-1)
    for _ in range(2):  # joined already: nothing changes
        join(pair, "first", "second", "both")
        assert set(pair.children()) == {"both"}
    assert mx.allclose(pair["both"](x), wanted, atol=1e-5)
    for _ in range(2):
        separate(pair, "first", "second", "both")
        after = dict(tree_flatten(pair.parameters()))
        assert after.keys() == before.keys()
        assert all(mx.array_equal(after[name], before[name]) for name in before)  # type: ignore[arg-type]


@pytest.mark.parametrize("kinds", [("plain", "4"), ("4", "8"), ("plain", "bias")])
def test_layers_of_two_kinds_are_not_joined(kinds: tuple[str, str]) -> None:
    pair = Pair(*(layer(kind, mx.float32) for kind in kinds))
    join(pair, "first", "second", "both")
    assert set(pair.children()) == {"first", "second"}


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_of_another_kind_is_called(device: Any) -> None:
    """A layer with something beside it (a LoRA branch) decides for itself."""

    class Doubled(Layer):
        def __init__(self, base: Linear):
            super().__init__()
            self.base = base

        def __call__(self, x: mx.array) -> mx.array:
            return 2 * self.base(x)

    module, x = Doubled(Linear(128, 192)), mx.random.normal((3, 128))
    place(module, device)
    wanted = 2 * (x @ module.base.weight.T)
    assert mx.allclose(module.split(x, 64)[1], wanted[:, 64:], atol=1e-5)
    assert cut(module, 64) is module
    assert mx.allclose(*module.terms(x[:, :64], x[:, 64:]), wanted, atol=1e-5)
    assert mx.allclose(module.added(x, x[:, :1]), wanted + x[:, :1], atol=1e-5)


@pytest.mark.parametrize("device", [Cpu(), Gpu(dense_from=0), Gpu()])
@pytest.mark.parametrize(
    "mode", [("affine", 64, 4), ("affine", 32, 8), ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]
)
def test_gradients_pass_through_packed_weights(mode: tuple[str, int, int], device: Any) -> None:
    """As through the weight that they stand for: what is trained beside a quantized layer needs no more."""
    kind, group_size, bits = mode
    module = Linear(128, 192).to_quantized(group_size, bits, mode=kind)
    place(module, device)
    x = mx.random.normal((5, 128), key=mx.random.key(0))
    weight = mx.dequantize(module.weight, module.scales, module.get("biases"), group_size, bits, kind)
    direction = mx.random.normal((5, 192), key=mx.random.key(1))
    found = mx.grad(lambda x: (module(x) * direction).sum())(x)
    assert mx.allclose(found, direction @ weight, atol=1e-4)
    halves = mx.grad(lambda x: (mx.concatenate([*module.split(x, 64)], axis=-1) * direction).sum())(x)
    assert mx.allclose(halves, direction @ weight, atol=1e-4)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_a_cpu_has_its_own_swiglu(dtype: mx.Dtype) -> None:
    """To a few of the dtype's roundings, and at the ends of its range without NaN."""
    largest = mx.finfo(dtype).max
    x = mx.concatenate([mx.linspace(-30, 30, 1001), mx.array([-largest, largest])]).astype(dtype)
    found = Cpu().form(swiglu)(x, mx.ones_like(x))
    assert found.dtype == dtype
    eps = {mx.float32: 2**-23, mx.bfloat16: 2**-8, mx.float16: 2**-11}[dtype]
    exact = x.astype(mx.float32) * mx.sigmoid(x.astype(mx.float32))
    assert mx.allclose(found.astype(mx.float32), exact, rtol=40 * eps, atol=2**-20)
    assert found[-2:].tolist() == [0, largest]


@pytest.mark.parametrize("device", [Cpu(), Gpu()])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_attention_by_every_device(device: Any, dtype: mx.Dtype) -> None:
    """With a mask and shared keys, against the formula in float32; narrow types within two of their roundings."""
    rng = [mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate([(1, 4, 6, 16), (1, 2, 6, 16)])]
    q, k = (a.astype(dtype) for a in rng)
    mask = mx.tri(6, dtype=mx.bool_)
    wide_q, wide_k = q.astype(mx.float32), mx.repeat(k.astype(mx.float32), 2, axis=1)
    scores = mx.where(mask, wide_q @ wide_k.swapaxes(-1, -2) / 4, -mx.inf)
    wanted = mx.softmax(scores, axis=-1) @ wide_k
    out = device.attention(q, k, k, mask)
    assert out.dtype == dtype
    assert mx.allclose(out, wanted, atol=1e-5 if dtype == mx.float32 else 2**-5)


def test_a_cpu_takes_long_attention_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 7 queries two at a time, equal to all at once, with a mask of rows and with one for all of them."""
    q, k, v = (mx.random.normal((1, 3, 7, 8), key=mx.random.key(i)) for i in range(3))
    masks = [None, mx.tri(7, dtype=mx.bool_)[None, None], (mx.arange(7) < 5)[None, None, None]]
    whole = [Cpu(at_once=True).attention(q, k, v, mask) for mask in masks]
    monkeypatch.setattr(layers, "SCORES", 2 * 3 * 7)
    seen: list[int] = []
    attend = mx.fast.scaled_dot_product_attention

    def noting(q: mx.array, *rest: mx.array, **more: Any) -> mx.array:
        seen.append(q.shape[2])
        return attend(q, *rest, **more)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", noting)
    pieces = [Cpu(at_once=True).attention(q, k, v, mask) for mask in masks]
    assert all(mx.allclose(one, two, rtol=0, atol=1e-6) for one, two in zip(whole, pieces, strict=True))
    assert seen == [2, 2, 2, 1] * 3


def test_half_precision_attention_is_not_slow_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its matmuls would be: it is asked for in float32."""
    asked, real = [], mx.fast.scaled_dot_product_attention

    def counted(q: mx.array, *rest: mx.array, **named: Any) -> mx.array:
        asked.append(q.dtype)
        return real(q, *rest, **named)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", counted)
    q = mx.zeros((1, 2, 6, 16), mx.bfloat16)
    for device in (Cpu(), Gpu()):
        mx.eval(device.attention(q, q, q))
    assert asked == [mx.float32, mx.bfloat16]


@pytest.mark.parametrize(("kind", "dtype"), [("4", mx.float32), ("8", mx.bfloat16), ("plain", mx.float16)])
def test_one_expanded_weight_at_a_time(kind: str, dtype: mx.Dtype) -> None:
    """Of ten layers in a row: an expanded weight is 4 MB, and a second one would show."""
    size, layers, x = 1024, [], mx.ones((1, 16, 1024), dtype)
    for _ in range(10):
        plain = Linear(size, size)
        plain.set_dtype(dtype)
        whole = plain if kind == "plain" else QuantizedLinear.from_linear(plain, group_size=64, bits=int(kind))
        layers.append(whole if len(layers) % 2 else cut(whole, 512))
    for module in layers:
        place(module, Cpu(at_once=True))
    mx.eval(x, [module.parameters() for module in layers])
    del plain, whole
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for module in layers:
        x = module(x)
    mx.eval(x)
    # One weight, and while MLX unpacks it on a CPU its integers beside it; the copies of its scales and biases, x.
    assert mx.get_peak_memory() - before < (1.5 if kind == "plain" else 2.3) * 4 * size * size


@pytest.mark.parametrize(
    ("architecture", "tokens", "conv"),
    [
        ("applegpu_g13s", 0, "direct"),
        ("applegpu_g14p", 0, "direct"),
        ("applegpu_g15s", 1024, "direct"),
        ("applegpu_g16g", 1024, "direct"),
        ("applegpu_g17s", 1024, "matmul"),
        ("", None, "direct"),
    ],
)
def test_what_a_gpu_does_unmeasured(architecture: str, tokens: int | None, conv: str) -> None:
    """M1 and M2 always dequantize, later chips where there are many tokens; others take MLX's own way."""
    assert gpu(architecture) == Gpu(tokens, conv=conv)


def test_the_default_device_decides_when_a_layer_is_made() -> None:
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    assert isinstance(Linear(8, 8).device, Gpu if on_gpu else Cpu)
    assert here(at_once=True) == (here() if on_gpu else Cpu(at_once=True))


def test_a_quantized_layer_is_dequantized_for_many_tokens() -> None:
    """Few go directly; many are multiplied by the weight itself, of which no more than one is there at a time."""
    module = layer("4", mx.float32)
    place(module, Gpu(dense_from=6))
    for tokens, name in ((5, "QuantizedMatmul"), (6, "Matmul")):
        cost = trace(module, lambda x: module(module(x)[:, :128]), mx.zeros((tokens, 128)))
        assert cost.counts[name] == 2
        assert cost.live < 1.5 * 4 * 128 * 192


@pytest.mark.parametrize("tokens", [7, 8, 9, 23])
def test_long_matmuls_in_pieces_of_rows(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of about as many rows as asked for, and the same numbers."""
    module, x = layer("bias", mx.float32), mx.random.normal((tokens, 128))
    wanted = module(x)
    place(module, Gpu(rows=4))
    assert mx.allclose(module(x), wanted, atol=1e-5)
    assert trace(module, module, x).counts["AddMM"] == (1 if tokens < 8 else tokens // 4)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_weights_are_expanded_as_mlx_would(bits: int, group_size: int, dtype: mx.Dtype) -> None:
    weight = mx.random.normal((48, 256), key=mx.random.key(bits)).astype(dtype)
    arrays, kind = mx.quantize(weight, group_size, bits), {"group_size": group_size, "bits": bits, "mode": "affine"}
    wanted = mx.dequantize(*arrays, group_size, bits).astype(mx.float32)
    ours = dequantize(list(arrays), kind).astype(mx.float32)
    # MLX rounds once where ours may twice.
    assert mx.abs(ours - wanted).max() <= (0.0 if dtype == mx.float32 else 2**-7) * mx.abs(wanted).max()
