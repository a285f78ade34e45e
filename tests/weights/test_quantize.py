"""What is quantised, what is not, and how far a quantised weight is from the original."""

import gc
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from folders import GOLDEN, assert_equal, parameters, quantizable_model, refusal

from klein_convert.checkpoint import convert_checkpoint
from klein_convert.export import export_diffusers
from klein_mlx.config import PARTS
from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.formats.describe import describe, format_description
from klein_mlx.formats.open import open_model
from klein_mlx.model.layers import Cpu, Gpu, place
from klein_mlx.weights import quantize
from klein_mlx.weights.bits import from_options, parse, settle
from klein_mlx.weights.checkpoint import Source, build, expected, load_part
from klein_mlx.weights.quantize import Quantization, is_quantized_path, pack, quantize_weights, search
from klein_mlx.weights.safetensors import load_now


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_model(quantizable_model(tmp_path_factory.mktemp("quantize") / "model"))


def linears(module: nn.Module) -> set[str]:
    return {path for path, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.QuantizedLinear)}


@pytest.mark.parametrize(
    ("value", "settings"),
    [
        (4, Quantization(4)),
        (" 8 ", Quantization(8)),
        ("3", Quantization(3)),
        ("5-g32", Quantization(5, 32)),
        ("6-g128", Quantization(6, 128)),
        ("MXFP4", Quantization(4, 32, "mxfp4")),
        ("nvfp4", Quantization(4, 16, "nvfp4")),
        ("mxfp8", Quantization(8, 32, "mxfp8")),
    ],
)
def test_what_a_user_may_write(value: int | str, settings: Quantization) -> None:
    asked = parse(value)
    assert asked
    assert asked.parts == {"transformer": settings, "text_encoder": settings}
    assert parse(settings.word()) == asked


@pytest.mark.parametrize("value", [None, "none", {}, {"transformer": "none"}])
def test_what_asks_for_nothing(value: Any) -> None:
    assert parse(value) is None


@pytest.mark.parametrize("value", [0, 2, 7, 16, "4bit", "", True, 4.0, "4-32", "4-g", "mxfp6"])
def test_what_a_user_may_not_write(value: Any) -> None:
    with pytest.raises(RequestError, match=r"must be 3, 4, 5, 6, 8, mxfp4, mxfp8, nvfp4, mixed-4 or none"):
        parse(value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: parse("4-g48"), "the group size must be one of 32, 64, 128"),
        (lambda: parse(4, group_size=16), "group_size is 16; it must be one of 32, 64, 128"),
        (lambda: parse("mxfp4", group_size=64), "group_size is 64; mxfp4 has groups of 32"),
        (lambda: parse({"vae": 4}), "names the vae, which is never quantized"),
        (lambda: parse({"transformer": "mixed-4"}), "quantize transformer is 'mixed-4'; it must be 3,"),
        (lambda: from_options("4", layers=["double_blocks"]), "must be PATTERN=BITS"),
        (lambda: from_options("4", transformer_bits="9"), "transformer_bits is '9'; it must be 3,"),
        (lambda: from_options("4", layers=["x.*=7"]), r"quantize_layer x.\* is '7'; it must be 3,"),
    ],
)
def test_a_wrong_word_is_told(call: Callable[[], object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        call()


def test_options_are_the_mapping_s_words(source: Source) -> None:
    by_options = from_options(
        "4", 32, text_encoder_bits="8", layers=["double_blocks.*.to_v=6", "mod_*=8", "*.img.*=none"]
    )
    by_mapping = parse(
        {"transformer": 4, "text_encoder": 8, "double_blocks.*.to_v": 6, "mod_*": 8, "*.img.*": "none"}, group_size=32
    )
    assert by_options == by_mapping
    found = settle(by_mapping, source)
    assert found["transformer"].of("transformer", "double_blocks.0.txt.to_v") == Quantization(6, 32)
    assert found["transformer"].of("transformer", "double_blocks.0.img.to_v") is None  # the later pattern wins
    assert found["transformer"].of("transformer", "mod_img") == Quantization(8, 32)
    assert found["transformer"].of("transformer", "single_blocks.0.linear_in") == Quantization(4, 32)
    assert found["text_encoder"].of("text_encoder", "layers.0.mlp.up_proj") == Quantization(8, 32)
    assert found["transformer"].told().startswith("4-bit in groups of 32 (")


def test_a_pattern_that_matches_nothing_is_told(source: Source) -> None:
    with pytest.raises(RequestError, match=r"quantize_layer 'blocks\.\*' matches no layer"):
        settle(parse({"transformer": 4, "blocks.*": 8}), source)


MODES = ["3", "4", "5", "6", "8", "4-g32", "mxfp4", "nvfp4", "mxfp8"]


@pytest.mark.parametrize("word", MODES)
def test_every_mode_is_written_and_loads_again_as_it_was_asked_for(source: Source, tmp_path: Path, word: str) -> None:
    """And what it computes, by either way of multiplying, is what the dequantised weight would."""
    asked: Any = {"transformer": word, "mod_img": word}
    folder = convert_checkpoint(source, tmp_path / "out", quantize=asked, verify=True)
    finished = open_model(folder)
    stored = finished.quantization["transformer"]
    assert "text_encoder" not in finished.quantization
    assert stored.layers
    assert {own.word() for own in stored.layers.values()} == {word}
    settled = settle(parse(asked), source)
    direct = parameters(load_part("transformer", source, mx.float32, settled["transformer"]))
    assert_equal(direct, parameters(load_part("transformer", finished, mx.float32)))
    module: Any = load_part("transformer", finished, mx.float32)
    whole: Any = load_part("transformer", open_model(export_diffusers(finished, tmp_path / "back")), mx.float32)
    x = mx.random.normal((5, module.mod_img.weight.shape[0] // 6), key=mx.random.key(0))
    for path, layer in module.named_modules():
        if not isinstance(layer, nn.QuantizedLinear) or path not in ("mod_img", "double_blocks.0.img.mlp_in"):
            continue
        plain = whole.mod_img if path == "mod_img" else whole.double_blocks[0].img.mlp_in
        place(layer, Gpu())
        direct_out = layer(x)
        place(layer, Cpu())
        expanded = layer(x)
        right = x @ plain.weight.T
        # float32 sums of 64 products of order 1, in another order; the export rounds to bfloat16 (2^-9).
        assert mx.allclose(direct_out, expanded, rtol=1e-4, atol=1e-4).item()
        assert (mx.linalg.norm(right - expanded) / mx.linalg.norm(right)).item() < 2**-8
    module.arrange()
    assert not isinstance(module.single_blocks[0].linear_out, nn.QuantizedLinear)  # it was cut for its two inputs
    mx.eval(module.parameters())
    assert stored.told() in format_description(describe(finished))


def test_stored_layers_keep_their_bits(source: Source, tmp_path: Path) -> None:
    stored = open_model(convert_checkpoint(source, tmp_path / "out", quantize={"transformer": 4}))
    assert set(settle(parse(4), stored)) == {"text_encoder"}
    with pytest.raises(CheckpointError, match="the transformer is 4-bit already; for 8 bits start from the original"):
        settle(parse(8), stored)
    for asked, words in ((parse("mixed-4"), "mixed-4"), (parse(4, 32), "groups of 32")):
        with pytest.raises(CheckpointError, match=f"the transformer is 4-bit already; for {words} start from"):
            settle(asked, stored)
    tiny = open_model("tiny")
    mixed = replace(tiny, quantization=settle(parse("mixed-4"), tiny))  # type: ignore[type-var]
    assert settle(parse("mixed-4"), mixed) == settle(parse(4), mixed) == {}
    with pytest.raises(CheckpointError, match="double_blocks.0.txt.to_v is quantized already"):
        settle(parse({"double_blocks.*.to_v": 8}), stored)


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
def test_searched_scales_are_closer(bits: int) -> None:
    weight = mx.random.normal((64, 256), key=mx.random.key(1)).astype(mx.bfloat16)

    def error(packed: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        restored = mx.dequantize(packed, scales.astype(mx.float32), biases.astype(mx.float32), 64, bits)
        return ((restored - weight.astype(mx.float32)) ** 2).reshape(-1, 64).sum(-1)

    plain, searched = error(*mx.quantize(weight, 64, bits)), error(*search(weight, 64, bits))
    # A lone group may lose: how scale and bias are rounded to bfloat16 is luck, the more so the finer the steps.
    assert mx.mean(searched <= 1.001 * plain).item() > 0.85
    # Gaussian weights: 8 % less error, so 15 % less of its square, at 4 bits; more below, and at 8 by the rounding.
    assert searched.sum().item() < 0.87 * plain.sum().item()


@pytest.mark.skipif(not shutil.which("g++"), reason="MLX compiles for a CPU by a C++ compiler")
def test_the_search_is_the_same_in_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = mx.random.normal((8, 128), key=mx.random.key(1))
    plain = search(weight, 64, 4)
    monkeypatch.setattr("klein_mlx.model.compile.mx.default_device", lambda: mx.Device(mx.gpu))
    fused = search(weight, 64, 4)
    for one, two in zip(plain[1:], fused[1:], strict=True):
        assert mx.allclose(one, two, rtol=1e-3, atol=1e-4).item()  # a kernel may multiply and add at once


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_packed_as_mlx_does(bits: int) -> None:
    codes = mx.random.randint(0, 2**bits, (3, 64), key=mx.random.key(bits))
    restored = mx.dequantize(pack(codes, bits), mx.ones((3, 1)), mx.zeros((3, 1)), 64, bits)
    assert mx.array_equal(restored, codes.astype(mx.float32)).item()


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


def test_one_original_at_a_time_is_in_memory_while_scales_are_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a 9B model would need its 18 GB beside what becomes of them."""
    source = open_model("tiny")
    settled = settle(parse("mixed-4"), source)["transformer"]
    sizes = {name: weight.nbytes for name, weight in source.weights("transformer").items()}
    held: list[int] = []

    def searching(array: mx.array, group_size: int, bits: int) -> Any:
        held.append(mx.get_active_memory() - before)
        return mx.quantize(array, group_size, bits)

    monkeypatch.setattr(quantize, "search", searching)
    gc.collect()
    before = mx.get_active_memory()
    module = load_part("transformer", source, mx.bfloat16, settled)
    own = sum(array.nbytes for array in parameters(module).values())
    assert len(held) == len(settled.layers or ())
    assert max(held) < own + 2 * max(sizes.values()) < 0.9 * sum(sizes.values())


def test_one_bit_where_mlx_has_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx 0.32.3 runs 2 bits and more; nothing else of a model tells that it will fail."""
    stored = {"bits": 1, "group_size": 128, "mode": "affine"}
    with monkeypatch.context() as newer:
        newer.setattr(quantize.mx, "quantize", lambda *args: None)
        settings = quantize.find_settings(256, 8, 2, True)
        assert settings == Quantization.from_dict(stored) == Quantization(1, 128)

    def refuse(*args: Any, **options: Any) -> None:
        raise ValueError("The requested number of bits 1 is not supported.")

    monkeypatch.setattr(quantize.mx, "quantize", refuse)
    for read in (lambda: quantize.find_settings(256, 8, 2, True), lambda: Quantization.from_dict(stored)):
        assert refusal(read) == "1-bit weights need mlx 0.32.4 or newer: pip install -U mlx"
