"""What others publish in diffusers' tree: MLX snapshots, quantised parts, several models in one repository."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from folders import (
    GOLDEN,
    assert_equal,
    copy_model,
    edit_json,
    quantizable_model,
    raw_safetensors,
    read_weights,
    refusal,
    weight_file,
)
from foreign import golden, to_bfl

from klein_convert.checkpoint import convert_checkpoint
from klein_mlx.config import PARTS
from klein_mlx.formats.describe import describe
from klein_mlx.formats.open import open_any, open_model
from klein_mlx.weights.checkpoint import load_part


def quantise(model: Path, part: str, bits: dict[str, int]) -> dict[str, mx.array]:
    """Store a part's layers as MLX does, each with the bits of the first word that its name holds. Returns the weights
    as they are dequantised again."""
    path = weight_file(model, part)
    weights, values = {}, {}
    for name, array in read_weights(path).items():
        own = next((n for word, n in bits.items() if word in name), None)
        values[name] = array
        weights[name] = array
        if own and array.ndim == 2 and array.shape[1] % 64 == 0:
            layer = name.removesuffix(".weight")
            parts = mx.quantize(array, 64, own)
            weights |= dict(zip((name, f"{layer}.scales", f"{layer}.biases"), parts, strict=True))
            values[name] = mx.dequantize(*parts, group_size=64, bits=own)
    mx.eval(weights, values)
    path.unlink()
    mx.save_safetensors(str(path), weights, {"format": "mlx"})
    return values


def test_a_bfloat16_snapshot_of_mlx_s_is_the_model(tmp_path: Path) -> None:
    """mlx-community's FLUX.2-klein-*-bf16: the tree as it was, its files written by MLX."""
    model = copy_model(tmp_path / "model")
    for part in PARTS:
        quantise(model, part, {})
    for part in PARTS:
        assert_equal(open_model(model).weights(part), open_model(GOLDEN).weights(part))  # type: ignore[arg-type]


BITS = {
    "transformer": {"attn.to_q": 8, "linear_out": 8, "single_transformer_blocks": 4, "transformer_blocks": 4},
    "text_encoder": {"embed_tokens": 8, "self_attn": 4, "mlp.up_proj": 5},
}


@pytest.mark.parametrize("parts", [("transformer",), ("transformer", "text_encoder")])
def test_a_quantised_part_of_mixed_bits_keeps_them(tmp_path: Path, parts: tuple[str, ...]) -> None:
    """AbstractFramework's, moonbox' (with its quant.json) and others: layers of several widths, some left whole."""
    model = quantizable_model(tmp_path / "model")
    plain = copy_tree(model, tmp_path / "plain")
    for part in parts:
        values = quantise(model, part, BITS[part])
        path = weight_file(plain, part)
        path.unlink()
        mx.save_safetensors(str(path), values)
        edit_json(model / part / "config.json", lambda told: told.update(quantization={"bits": 4, "group_size": 64}))
    (model / "quant.json").write_text(json.dumps({"format": "mlx", "files": {}}))
    source = open_model(model)
    assert set(source.quantization) == set(parts)
    assert {own.bits for own in (source.quantization["transformer"].layers or {}).values()} == {4, 8}
    assert source.quantization["transformer"].of("transformer", "img_in") is None
    target = open_model(convert_checkpoint(source, tmp_path / "ours", verify=True))
    for found in (source, target):
        for part in PARTS:
            weights, right = dict(found.weights(part)), open_model(plain).weights(part)
            stored = found.quantization.get(part)
            for name, array in right.items():
                own = stored.of(part, name) if stored and name.endswith(".weight") else None
                left = weights[name]
                if own:
                    layer = name.removesuffix(".weight")
                    packed = (left, weights[f"{layer}.scales"], weights[f"{layer}.biases"])
                    left = mx.dequantize(*packed, group_size=own.group_size, bits=own.bits)  # type: ignore[arg-type]
                assert mx.array_equal(left, array), name  # type: ignore[arg-type]
            assert load_part(part, found, mx.bfloat16)
    assert describe(source)["parts"]["transformer"]["bits"] in (4, 8)


def copy_tree(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_a_tree_with_a_float8_part(tmp_path: Path) -> None:
    """diffusers' names, each weight with its weight_scale."""
    model = copy_model(tmp_path / "model")
    path = weight_file(model, "transformer")
    weights = read_weights(path)
    right = dict(open_model(GOLDEN).weights("transformer"))
    header, data = {}, b""
    for name, array in weights.items():
        small = name.endswith("attn.to_q.weight")
        codes = mx.to_fp8(array.astype(mx.float32) * 64) if small else array.view(mx.uint16)
        entries = [(name, "F8_E4M3" if small else "BF16", codes)]
        entries += [(name.replace(".weight", ".weight_scale"), "F32", mx.array(1 / 64))] if small else []
        for each, dtype, values in entries:
            content = bytes(memoryview(values))  # type: ignore[arg-type]
            offsets = [len(data), len(data) + len(content)]
            header[each] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
            data += content
        if small:
            decoded = (mx.from_fp8(codes, dtype=mx.float32) / 64).astype(mx.bfloat16)
            right[f"double_blocks.{name.split('.')[1]}.img.to_q.weight"] = decoded
    path.write_bytes(raw_safetensors(header, data))
    assert_equal(dict(open_model(model).weights("transformer")), right)  # type: ignore[arg-type]


def test_several_models_in_one_folder_are_named(tmp_path: Path) -> None:
    """SceneWorks' q4/, q8/ and bf16/, the encoder whole in each: any of them is a model, their folder is none."""
    for name, bits in (("q4", 4), ("q8", 8), ("bf16", 0)):
        model = quantizable_model(tmp_path / "all" / name)
        if bits:
            quantise(model, "transformer", {"blocks": bits})
    assert "holds the models bf16, q4, q8; give one of these folders" in refusal(lambda: open_model(tmp_path / "all"))
    assert open_model(tmp_path / "all" / "q8").quantization["transformer"].bits == 8
    assert set(open_model(tmp_path / "all" / "q4").quantization) == {"transformer"}
    assert not open_model(tmp_path / "all" / "bf16").quantization


@pytest.mark.parametrize(
    ("dtype", "hint", "words"),
    [
        ("I8", None, "is stored as I8, which klein_mlx does not read: take the bf16"),
        ("I8", "int8_tensorwise", "is stored as int8_tensorwise, which klein_mlx does not read"),
        ("I8", "int8_convrot", "is stored as int8_convrot, which"),
        ("F8_E4M3", "mxfp8", "is stored as mxfp8, which"),
        ("U8", None, "is stored as U8, which"),
        ("F8_E5M2", None, "is stored as F8_E5M2, which"),
        ("F8_E8M0", None, "is stored as F8_E8M0, which"),
    ],
)
def test_an_encoding_that_is_not_read_is_named(tmp_path: Path, dtype: str, hint: str | None, words: str) -> None:
    header, data = {}, b""
    for name, array in to_bfl(golden("transformer")).items():
        small = name == "double_blocks.0.img_attn.qkv.weight"
        content = bytes(array.size * (1 if small else 2))
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype if small else "BF16", "shape": list(array.shape), "data_offsets": offsets}
        data += content
    told = {"layers": {"double_blocks.0.img_attn.qkv": {"format": hint}}}
    header["__metadata__"] = {"_quantization_metadata": json.dumps(told)} if hint else {}
    (tmp_path / "x.safetensors").write_bytes(raw_safetensors(header, data))
    assert words in refusal(lambda: open_any(tmp_path / "x.safetensors"))
