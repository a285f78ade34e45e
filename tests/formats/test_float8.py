"""Float8 files: decoded as their scales say, refused without them; other encodings refused by name."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from folders import GOLDEN, raw_safetensors, refusal
from foreign import Weights, golden, opened, to_bfl

from klein_convert.checkpoint import convert_checkpoint
from klein_mlx.formats.describe import describe
from klein_mlx.formats.open import open_any, open_model

E4M3 = {byte: 0.0 for byte in range(256)}
for _byte in range(256):  # the format's definition: 4 bits of exponent with bias 7, 3 of mantissa
    _exponent, _mantissa = _byte >> 3 & 15, _byte & 7
    _value = (1 + _mantissa / 8) * 2.0 ** (_exponent - 7) if _exponent else _mantissa / 8 * 2.0**-6
    E4M3[_byte] = float("nan") if _byte & 127 == 127 else -_value if _byte > 127 else _value


class Writer:
    """A BFL file whose blocks are float8, written byte by byte: safetensors' header, then the tensors."""

    def __init__(self, rows: bool = False, spelling: str = "weight_scale", shape: tuple[int, ...] = ()):
        self.header: dict[str, object] = {}
        self.data = b""
        self.values: Weights = {}  # what a reader must find
        rng = np.random.default_rng(0)
        for name, array in to_bfl(golden("transformer")).items():
            if "blocks" not in name or "norm" in name:
                self.add(name, "BF16", array.shape, np.array(array.view(mx.uint16)).tobytes())
                self.values[name] = array
                continue
            codes = rng.integers(0, 127, array.shape, dtype=np.uint8) | rng.integers(0, 2, array.shape, np.uint8) << 7
            scale = rng.uniform(0.01, 0.1, array.shape[0] if rows else ()).astype(np.float32)
            value = np.vectorize(E4M3.get)(codes).astype(np.float32) * (scale[:, None] if rows else scale)
            self.values[name] = mx.array(value).astype(mx.bfloat16)
            layer = name.removesuffix(".weight")
            self.add(name, "F8_E4M3", array.shape, codes.tobytes())
            self.add(f"{layer}.{spelling}", "F32", scale.shape if rows else shape, scale.tobytes())
            self.add(f"{layer}.input_scale", "F32", (), np.float32(7).tobytes())

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
        start = len(self.data)
        self.data += data
        self.header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, len(self.data)]}

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> Path:
        header = self.header | ({"__metadata__": metadata} if metadata else {})
        path.write_bytes(raw_safetensors(header, self.data))
        return path

    def expected(self, folder: Path) -> Weights:
        plain = folder / "plain.safetensors"
        mx.save_safetensors(str(plain), self.values)
        return opened("transformer", plain)


LAYER = "double_blocks.0.img_attn.qkv"


@pytest.mark.parametrize("spelling", ["weight_scale", "scale_weight"])
@pytest.mark.parametrize(("rows", "shape"), [(False, ()), (False, (1,)), (True, ())])
def test_float8_is_the_code_times_its_scale(tmp_path: Path, rows: bool, shape: tuple[int, ...], spelling: str) -> None:
    writer = Writer(rows, spelling, shape)
    found = opened("transformer", writer.save(tmp_path / "x.safetensors"))
    right = writer.expected(tmp_path)
    assert found.keys() == right.keys()
    for name in found:  # float32 products, rounded once
        assert found[name].dtype == mx.bfloat16
        assert mx.array_equal(found[name], right[name]), name


def test_float8_without_any_scale_in_the_file_are_the_numbers_themselves(tmp_path: Path) -> None:
    """Norms too, as programs write it that cast a whole file."""
    writer = Writer()
    writer.header, writer.data, writer.values = {}, b"", {}
    rng = np.random.default_rng(1)
    for name, array in to_bfl(golden("transformer")).items():
        codes = rng.integers(1, 120, array.shape, dtype=np.uint8) | rng.integers(0, 2, array.shape, np.uint8) << 7
        writer.add(name, "F8_E4M3", array.shape, codes.tobytes())
        writer.values[name] = mx.array(np.vectorize(E4M3.get)(codes).astype(np.float32)).astype(mx.bfloat16)
    path = writer.save(tmp_path / "x.safetensors")
    found, right = opened("transformer", path), writer.expected(tmp_path)
    assert all(mx.array_equal(found[name], right[name]) for name in right)
    assert describe(open_any(path))["format"] == "BFL names, safetensors FP8"
    for metadata in ({"quantization": "fp8r"}, {"_quantization_metadata": hinted("float8_e4m3fn")}):
        told = refusal(lambda metadata=metadata: open_any(writer.save(tmp_path / "y.safetensors", metadata)))
        assert "is float8 without its scale" in told


def hinted(kind: str) -> str:
    return json.dumps({"layers": {LAYER: {"format": kind}}})


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_scales_of_blocks(tmp_path: Path, dtype: mx.Dtype) -> None:
    """As Qwen's own FP8 files have them: `weight_scale_inv`, a factor for 128 x 128 numbers, ragged at the ends."""
    writer = Writer()
    writer.header, writer.data, writer.values = {}, b"", {}
    rng = np.random.default_rng(2)
    for name, array in golden("text_encoder").items():
        if "proj" not in name:
            writer.add(name, "BF16", array.shape, np.array(array.view(mx.uint16)).tobytes())
            writer.values[name] = array
            continue
        codes = rng.integers(0, 127, array.shape, dtype=np.uint8)
        blocks = tuple(-(-side // 128) for side in array.shape)
        scale = mx.array(rng.uniform(0.01, 0.1, blocks).astype(np.float32)).astype(dtype)
        exact = np.array(scale.astype(mx.float32))
        value = np.vectorize(E4M3.get)(codes).astype(np.float32)
        for row in range(array.shape[0]):
            for column in range(array.shape[1]):
                value[row, column] *= exact[row // 128, column // 128]
        writer.values[name] = mx.array(value).astype(mx.bfloat16)
        writer.add(name, "F8_E4M3", array.shape, codes.tobytes())
        stored = np.array(scale.view(mx.uint16) if dtype == mx.bfloat16 else scale).tobytes()
        kind = "BF16" if dtype == mx.bfloat16 else "F32"
        writer.add(f"{name.removesuffix('.weight')}.weight_scale_inv", kind, blocks, stored)
    found = opened("text_encoder", writer.save(tmp_path / "x.safetensors"))
    mx.save_safetensors(str(tmp_path / "plain.safetensors"), writer.values)
    right = opened("text_encoder", tmp_path / "plain.safetensors")
    assert all(mx.array_equal(found[name], right[name]) for name in right)
    layer = "model.layers.0.mlp.up_proj"
    writer.header[f"{layer}.weight_scale_inv"]["shape"] = [1, 2]  # type: ignore[index]
    told = refusal(lambda: open_any(writer.save(tmp_path / "y.safetensors")))
    assert f"{layer}.weight_scale_inv has shape (1, 2)" in told or "is damaged" in told


def test_hints_may_stand_in_the_header_or_beside(tmp_path: Path) -> None:
    writer = Writer()
    right = writer.expected(tmp_path)
    told = json.dumps(
        {"format_version": "1.0", "layers": {f"model.diffusion_model.{LAYER}": {"format": "float8_e4m3fn"}}}
    )
    first = opened("transformer", writer.save(tmp_path / "a.safetensors", {"_quantization_metadata": told}))
    text = json.dumps({"format": "float8_e4m3fn"}).encode()
    writer.add(f"{LAYER}.comfy_quant", "U8", (len(text),), text)
    writer.add("scaled_fp8", "F8_E4M3", (0,), b"")
    second = opened("transformer", writer.save(tmp_path / "b.safetensors"))
    for found in (first, second):
        assert all(mx.array_equal(found[name], right[name]) for name in right)


@pytest.mark.parametrize("marker", [False, True])
def test_a_missing_scale_is_refused(tmp_path: Path, marker: bool) -> None:
    writer = Writer()
    header = {n: e for n, e in writer.header.items() if not n.endswith("weight_scale") or marker and LAYER not in n}
    spare = b""
    start = 0
    for name, entry in header.items():  # packed again, without holes
        begin, end = entry["data_offsets"]  # type: ignore[index]
        spare += writer.data[begin:end]
        header[name] = {**entry, "data_offsets": [start, start + end - begin]}  # type: ignore[dict-item]
        start += end - begin
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_safetensors(header, spare))
    told = refusal(lambda: opened("transformer", path))
    assert "is float8 without its scale" in told
    assert "take the bf16" in told


def test_other_encodings_are_refused_by_name(tmp_path: Path) -> None:
    for kind in ("int8_tensorwise", "mxfp8", "convrot_w4a4", "float8_e5m2"):
        writer = Writer()
        told = json.dumps({"layers": {LAYER: {"format": kind}}})
        path = writer.save(tmp_path / f"{kind}.safetensors", {"_quantization_metadata": told})
        assert f"{LAYER}.weight is stored as {kind}, which klein_mlx does not read" in refusal(
            lambda p=path: open_any(p)
        )
    writer = Writer()
    writer.header[f"{LAYER}.weight"]["dtype"] = "F8_E5M2"  # type: ignore[index]
    path = writer.save(tmp_path / "e5m2.safetensors")
    assert "is stored as F8_E5M2, which klein_mlx does not read" in refusal(lambda: open_any(path))
    writer.header[f"{LAYER}.weight"]["dtype"] = "U8"  # type: ignore[index]
    path = writer.save(tmp_path / "u8.safetensors")
    assert "is stored as U8" in refusal(lambda: open_any(path))


def test_broken_hints_and_scales_are_told(tmp_path: Path) -> None:
    path = Writer().save(tmp_path / "a.safetensors", {"_quantization_metadata": "["})
    assert "_quantization_metadata is not a JSON object" in refusal(lambda: open_any(path))
    writer = Writer()
    writer.add(f"{LAYER}.comfy_quant", "U8", (3,), b"\xff{}")
    path = writer.save(tmp_path / "b.safetensors")
    assert "comfy_quant is not a JSON object" in refusal(lambda: open_any(path))
    writer = Writer(rows=True)
    writer.header[f"{LAYER}.weight_scale"]["shape"] = [2, 96]  # type: ignore[index]
    path = writer.save(tmp_path / "c.safetensors")
    assert "has shape (2, 96) and dtype F32; klein_mlx reads one float per tensor or per row" in refusal(
        lambda: open_any(path)
    )


def test_a_float8_file_is_described_and_converted(tmp_path: Path) -> None:
    path = Writer().save(tmp_path / "x.safetensors")
    assert describe(open_any(path))["format"] == "BFL names, safetensors FP8"
    target = convert_checkpoint(open_model(GOLDEN, parts={"transformer": path}), tmp_path / "ours")
    found, right = open_model(target).weights("transformer"), opened("transformer", path)
    assert all(mx.array_equal(found[name], right[name]) for name in right)  # type: ignore[arg-type]
