"""What is quantised, what is not, and how far a quantised weight is from the original."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from folders import GOLDEN, parameters, quantizable_model

from klein_mlx.checkpoint import Source, build, expected, load_part
from klein_mlx.config import PARTS
from klein_mlx.convert import open_model
from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.quantize import Quantization, is_quantized_path, parse, quantize_weights
from klein_mlx.weights import load_now


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_model(quantizable_model(tmp_path_factory.mktemp("quantize") / "model"))


def linears(module: nn.Module) -> set[str]:
    return {path for path, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.QuantizedLinear)}


@pytest.mark.parametrize(("value", "bits"), [(4, 4), (8, 8), ("4", 4), (" 8 ", 8), (None, None), ("none", None)])
def test_what_a_user_may_write(value: int | str | None, bits: int | None) -> None:
    assert parse(value) == (Quantization(bits) if bits else None)


@pytest.mark.parametrize("value", [0, 3, 16, "4bit", "", True, 4.0])
def test_what_a_user_may_not_write(value: object) -> None:
    with pytest.raises(RequestError, match="must be 4, 8 or none"):
        parse(value)  # type: ignore[arg-type]


def test_a_dict_and_back() -> None:
    for quantization in (Quantization(4), Quantization(8, 32)):
        assert Quantization.from_dict(quantization.to_dict()) == quantization


def test_every_linear_layer_of_the_blocks_is_quantised_and_nothing_else(source: Source) -> None:
    for part, blocks in (("transformer", ("double_blocks.", "single_blocks.")), ("text_encoder", ("layers.",))):
        module = build(part, source.config)
        inside = {path for path in linears(module) if path.startswith(blocks)}
        assert inside
        assert {path for path in linears(module) if is_quantized_path(part, path)} == inside
        others = set(parameters(module)) - {f"{path}.weight" for path in inside}
        assert not [name for name in others if is_quantized_path(part, name)]
    vae = set(parameters(build("vae", source.config)))
    assert not [name for name in vae if is_quantized_path("vae", name)]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_loaded_part_is_quantised_where_it_should_be(source: Source, bits: int) -> None:
    for part in PARTS:
        module = load_part(part, source, mx.float32, Quantization(bits))
        quantised = {path for path, layer in module.named_modules() if isinstance(layer, nn.QuantizedLinear)}
        assert quantised == {path for path in linears(module) if is_quantized_path(part, path)}
        assert bool(quantised) == (part != "vae")
        assert all(layer.bits == bits for _, layer in module.named_modules() if isinstance(layer, nn.QuantizedLinear))
        shapes = {name: array.shape for name, array in parameters(module).items()}
        assert shapes == expected(part, source.config, Quantization(bits) if quantised else None)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_weight_is_within_half_a_step_of_the_original(source: Source, bits: int) -> None:
    """A group's step is its range / (2^bits - 1).

    MLX moves the grid so that 0 is on it, which may cost another half step at the ends; and scale and bias are
    rounded to bfloat16 (2^-8 relative), whose error counts in whole ranges.
    """
    weights = source.weights("transformer")
    quantised = quantize_weights("transformer", weights, Quantization(bits))
    name = "double_blocks.0.img.mlp_in"
    original = load_now(weights[f"{name}.weight"]).astype(mx.float32)
    packed, scales, biases = (load_now(quantised[f"{name}.{kind}"]) for kind in ("weight", "scales", "biases"))
    assert (packed.dtype, scales.dtype, biases.dtype) == (mx.uint32, mx.bfloat16, mx.bfloat16)
    restored = mx.dequantize(packed, scales.astype(mx.float32), biases.astype(mx.float32), 64, bits)
    grouped = original.reshape(-1, 64)
    span = grouped.max(axis=1, keepdims=True) - grouped.min(axis=1, keepdims=True)
    bound = span * (1 / (2**bits - 1) + 2**-7)
    assert mx.all(mx.abs(restored.reshape(-1, 64) - grouped) <= bound).item()
    assert not mx.array_equal(restored, original).item()
    assert quantised["img_in.weight"] is weights["img_in.weight"]


def test_a_width_that_no_group_divides_is_refused() -> None:
    source = open_model(GOLDEN)
    with pytest.raises(CheckpointError, match="layers.0.mlp.down_proj.weight has 160 inputs; 4-bit weights need"):
        load_part("text_encoder", source, mx.float32, Quantization(4))


def test_quantised_layers_compute_what_the_dequantised_weight_would(source: Source, tmp_path: Path) -> None:
    module = load_part("text_encoder", source, mx.float32, Quantization(8))
    layer: Any = module.layers[0].mlp.up_proj  # type: ignore[index]
    x = mx.random.normal((5, layer.scales.shape[-1] * 64), key=mx.random.key(0))
    full = mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits)
    # float32 sums of 64 products of order 1, in another order.
    assert mx.allclose(layer(x), x @ full.T, rtol=1e-4, atol=1e-4).item()
