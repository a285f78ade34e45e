"""GGUF: every type as gguf-py decodes it, both parts as the folder has them, crafted headers refused at once."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from folders import GOLDEN, assert_equal, loaded, refusal
from foreign import Weights, golden, opened, to_bfl, to_llama_cpp

from klein_convert.checkpoint import convert_checkpoint
from klein_mlx.errors import CheckpointError
from klein_mlx.formats import gguf as reader
from klein_mlx.formats.describe import describe
from klein_mlx.formats.open import open_any, open_model

gguf = pytest.importorskip("gguf")
QUANTISED = [kind for kind in reader.TYPES.values() if kind.name not in ("F32", "F16", "BF16")]


def number_of(name: str) -> Any:
    return gguf.GGMLQuantizationType[name]


def random_blocks(kind: reader.Type, count: int, seed: int = 0) -> np.ndarray:
    """Blocks of random codes whose scales, wherever they lie, are finite and small."""
    rng = np.random.default_rng(seed)
    while True:  # gguf-py says what a block means; only finite ones are used
        data = rng.integers(0, 256, (4 * count, kind.size), dtype=np.uint8)
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(data, number_of(kind.name))
            data = data[np.isfinite(values).all(axis=-1) & (np.abs(values).max(axis=-1) < 100)]
        if len(data) >= count:
            return data[:count]


def save_gguf(path: Path, weights: Weights, kind: str | None = None, arch: str = "flux", **keys: list[int]) -> Path:
    """Written by gguf-py: matrices of the blocks as `kind`, all else as it is (bfloat16) or as float32."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("a model")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    for key, value in keys.items():
        writer.add_array(key, value)
    for name, array in weights.items():
        values = np.array(array.astype(mx.float32))
        if kind and array.ndim == 2 and array.shape[1] % gguf.GGML_QUANT_SIZES[number_of(kind)][0] == 0:
            data = gguf.quants.quantize(values, number_of(kind))
            writer.add_tensor(name, data, raw_dtype=number_of(kind))
        elif array.ndim == 1:
            writer.add_tensor(name, values)
        else:
            data = np.array(array.view(mx.uint16)).view(np.uint8)
            writer.add_tensor(name, data, raw_shape=data.shape, raw_dtype=number_of("BF16"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_block_sizes_are_gguf_py_s() -> None:
    for number, kind in reader.TYPES.items():
        assert gguf.GGMLQuantizationType(number).name == kind.name
        assert gguf.GGML_QUANT_SIZES[number_of(kind.name)] == (kind.block, kind.size)


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_every_type_is_decoded_as_gguf_py_does(tmp_path: Path, kind: reader.Type, monkeypatch: Any) -> None:
    monkeypatch.setattr(reader, "_DECODED_AT_ONCE", 4 * kind.block)  # several pieces
    data = random_blocks(kind, 3 * 5).reshape(3, -1)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "flux")
    writer.add_tensor("a", np.ones(7, np.float32))
    writer.add_tensor("b", data, raw_dtype=number_of(kind.name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = reader.open_gguf(tmp_path / "x.gguf")
    found = tensors.arrays()["b"]
    right = gguf.quants.dequantize(data, number_of(kind.name))
    assert found.shape == right.shape == (3, 5 * kind.block)
    assert tensors.entries["b"].shape == found.shape
    assert mx.array_equal(found.load(), mx.array(right).astype(mx.bfloat16))  # type: ignore[union-attr]


def test_q4_k_by_its_published_formula(tmp_path: Path) -> None:
    """d * scale * code - dmin * min, six bits for each of eight scales and mins: as no other reader is asked."""
    kind = reader.TYPES[12]
    (block,) = random_blocks(kind, 1, seed=3)
    d, dmin = (float(x) for x in block[:4].view(np.float16))
    packed, codes = block[4:16].astype(int), block[16:]
    values = []
    for sub in range(8):
        if sub < 4:
            scale, low = packed[sub] & 63, packed[sub + 4] & 63
        else:
            scale = packed[sub + 4] & 15 | packed[sub - 4] >> 6 << 4
            low = packed[sub + 4] >> 4 | packed[sub] >> 6 << 4
        nibbles = codes[sub // 2 * 32 : sub // 2 * 32 + 32] >> (4 if sub % 2 else 0) & 15
        values.append(d * scale * nibbles.astype(float) - dmin * low)
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_tensor("b", block[None], raw_dtype=number_of("Q4_K"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = np.array(reader.open_gguf(path).arrays()["b"].load().astype(mx.float32))  # type: ignore[union-attr]
    assert np.allclose(found.reshape(-1), np.concatenate(values), rtol=2**-8, atol=1e-6)  # one rounding to bfloat16


def test_plain_types_keep_their_range(tmp_path: Path) -> None:
    values = mx.array([[1e5, 1e-8, -3.0]]).astype(mx.bfloat16)
    path = save_gguf(tmp_path / "x.gguf", {"a": values})
    assert mx.array_equal(reader.open_gguf(path).arrays()["a"].load(), values)  # type: ignore[union-attr]


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_an_unquantised_gguf_is_the_folder_s_part_bit_for_bit(tmp_path: Path, part: str) -> None:
    weights = to_bfl(golden(part)) if part == "transformer" else to_llama_cpp(golden(part))
    path = save_gguf(tmp_path / "x.bin", weights, arch="flux" if part == "transformer" else "qwen3")
    right = open_model(GOLDEN).weights(part)
    found = {name: array.astype(mx.bfloat16) for name, array in opened(part, path).items()}
    assert_equal(found, right)  # type: ignore[arg-type]
    assert describe(open_any(path))["part"] == part


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_a_quantised_gguf_is_off_by_the_codec_s_own_error(tmp_path: Path, part: str, kind: str) -> None:
    weights = to_bfl(golden(part)) if part == "transformer" else to_llama_cpp(golden(part))
    path = save_gguf(tmp_path / "x.gguf", weights, kind)
    restored = {}
    for name, array in weights.items():
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            data = gguf.quants.quantize(np.array(array.astype(mx.float32)), number_of(kind))
            array = mx.array(gguf.quants.dequantize(data, number_of(kind))).astype(mx.bfloat16)
        restored[name] = array
    right = save_gguf(tmp_path / "right.gguf", restored)
    assert_equal(opened(part, path), opened(part, right))


def test_a_folded_tensor_gets_its_shape_back(tmp_path: Path) -> None:
    weights = to_bfl(golden("transformer"))
    name = "time_in.in_layer.weight"
    shape = list(weights[name].shape)
    folded = weights | {name: weights[name].reshape(-1, 32)}
    path = save_gguf(tmp_path / "x.gguf", folded, **{f"comfy.gguf.orig_shape.{name}": shape})
    found = {n: a.astype(mx.bfloat16) for n, a in opened("transformer", path).items()}
    assert_equal(found, open_model(GOLDEN).weights("transformer"))  # type: ignore[arg-type]
    path = save_gguf(tmp_path / "y.gguf", folded, **{f"comfy.gguf.orig_shape.{name}": [7, 7]})
    assert "cannot have had the shape [7, 7]" in refusal(lambda: open_any(path))


@pytest.mark.parametrize("bits", [None, 8])
def test_converting_is_loading(tmp_path: Path, bits: int | None) -> None:
    path = save_gguf(tmp_path / "x.gguf", to_bfl(golden("transformer")), "Q8_0")
    source = open_model(GOLDEN, parts={"transformer": path})
    if bits:  # the golden encoder's width suits no group
        from klein_mlx.weights.checkpoint import load_part
        from klein_mlx.weights.quantize import Quantization, quantize_weights

        deferred = quantize_weights("transformer", source.weights("transformer"), Quantization(bits))
        plain = quantize_weights("transformer", opened("transformer", path), Quantization(bits))  # type: ignore[arg-type]
        assert_equal({n: a if isinstance(a, mx.array) else a.load() for n, a in deferred.items()}, plain)  # type: ignore[arg-type]
        assert load_part("transformer", source, mx.bfloat16, Quantization(bits))
        return
    target = convert_checkpoint(source, tmp_path / "ours")
    from klein_mlx.config import PARTS
    from klein_mlx.weights.checkpoint import load_part

    for part in PARTS:
        assert loaded(target, mx.bfloat16)
        assert load_part(part, source, mx.bfloat16)
    found = open_model(target).weights("transformer")
    assert_equal(dict(found), opened("transformer", path))  # type: ignore[arg-type]


def test_without_the_library_one_line_says_what_to_install(tmp_path: Path, monkeypatch: Any) -> None:
    import sys

    path = save_gguf(tmp_path / "x.gguf", to_bfl(golden("transformer")), "Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    assert describe(open_any(path))["part"] == "transformer"  # a header needs no library
    assert "install gguf: pip install gguf" in refusal(lambda: opened("transformer", path))


# ---- crafted headers ----


def text(value: str, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str = "a", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def crafted(version: int = 3, tensors: Any = None, keys: Any = (), count: Any = None) -> bytes:
    tensors = [tensor()] if tensors is None else tensors
    counts = count or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(64)


CRAFTED: dict[str, tuple[Callable[[], bytes], str]] = {
    "version 1": (lambda: crafted(version=1), "its version is 1"),
    "version 99": (lambda: crafted(version=99), "its version is 99"),
    "other byte order": (lambda: b"GGUF" + struct.pack(">IQQ", 3, 1, 0) + bytes(99), "its version is"),
    "2^60 tensors": (lambda: crafted(count=(1 << 60, 0)), "it claims 1152921504606846976 tensors"),
    "2^60 keys": (lambda: crafted(count=(1, 1 << 60)), "and 1152921504606846976 keys"),
    "60 000 tensors": (lambda: crafted(count=(60_000, 0)), "is a damaged GGUF file"),
    "a key of 2^62 bytes": (lambda: crafted(keys=[text("k", 1 << 62)]), "claims 4611686018427387904 bytes"),
    "a string past the end": (lambda: crafted(keys=[key("k", 8, text("v", 1 << 40))]), "past the end"),
    "an array of 2^61 numbers": (
        lambda: crafted(keys=[key("k", 9, struct.pack("<IQ", 4, 1 << 61))]),
        "an array claims 2305843009213693952 numbers",
    ),
    "an array of 2^61 strings": (
        lambda: crafted(keys=[key("k", 9, struct.pack("<IQ", 8, 1 << 61))]),
        "an array claims 2305843009213693952 items",
    ),
    "an array of arrays": (lambda: crafted(keys=[key("k", 9, struct.pack("<IQ", 9, 1))]), "items of type 9"),
    "an unknown kind of key": (lambda: crafted(keys=[key("k", 77, b"")]), "the unknown type 77"),
    "a key twice": (lambda: crafted(keys=[key("k", 0, b"1")] * 2), "the key k appears twice"),
    "2^31 axes": (lambda: crafted(tensors=[text("a") + struct.pack("<I", 1 << 31)]), "a has 2147483648 axes"),
    "2^64 numbers": (
        lambda: crafted(tensors=[tensor(shape=(1 << 31, 1 << 33))]),
        "a has the shape (8589934592, 2147483648)",
    ),
    "2^60 numbers": (lambda: crafted(tensors=[tensor(shape=(1 << 30, 1 << 30))]), "lies outside of the file"),
    "an empty row of 2^55": (
        lambda: crafted(tensors=[tensor(shape=(1 << 55, 0))]),
        "a has the shape (0, 36028797018963968)",
    ),
    "an offset past the end": (lambda: crafted(tensors=[tensor(offset=1 << 40)]), "lies outside of the file"),
    "an odd offset": (lambda: crafted(tensors=[tensor(offset=1)]), "lies outside of the file"),
    "overlap": (lambda: crafted(tensors=[tensor(shape=(12,)), tensor("b", offset=32)]), "a overlaps its neighbour"),
    "a tensor twice": (lambda: crafted(tensors=[tensor(), tensor()]), "the tensor a appears twice"),
    "alignment 0": (lambda: crafted(keys=[key("general.alignment", 4, bytes(4))]), "its alignment is 0"),
    "alignment 3": (lambda: crafted(keys=[key("general.alignment", 4, b"\3\0\0\0")]), "its alignment is 3"),
    "a type unknown": (lambda: crafted(tensors=[tensor(kind=39)]), "a has the type 39, which klein_mlx does not read"),
    "half a block": (lambda: crafted(tensors=[tensor(shape=(8,), kind=12)]), "rows of 8, in blocks of 256"),
    "a block in a single number": (lambda: crafted(tensors=[tensor(shape=(), kind=8)]), "rows of 1, in blocks of 32"),
    "cut short": (lambda: crafted()[:-40], "an incomplete download or copy"),
    "only a magic": (lambda: b"GGUF", "past the end"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_header_is_refused_at_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.gguf"
    content, message = CRAFTED[name]
    path.write_bytes(content())
    told = refusal(lambda: open_any(path))
    assert message in told


def test_a_header_with_wrong_bytes_is_refused_or_read(tmp_path: Path) -> None:
    """500 headers with up to three random bytes: a CheckpointError or a model, never anything else."""
    whole = save_gguf(tmp_path / "x.gguf", to_bfl(golden("transformer")), "Q8_0").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "y.gguf"
    refused = 0
    for _ in range(500):
        content = bytearray(whole)
        for at in rng.integers(4, 2500, rng.integers(1, 4)):
            content[at] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
        path.write_bytes(content)
        try:
            reader.open_gguf(path)
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_the_crafted_file_without_a_fault_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(crafted(keys=[key("k", 9, struct.pack("<IQ", 8, 2) + text("a") + text("b"))]))
    values, blocks = reader.read_gguf(path)
    assert values == {"k": None}
    assert blocks["a"].shape == (8,)


def split_gguf(folder: Path, weights: Weights, count: int, arch: str) -> list[Path]:
    """As llama-gguf-split leaves a model: numbered pieces, the keys in the first."""
    paths = [folder / f"x-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, arch if number == 0 else "")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(weights))
        for name in sorted(weights)[number::count]:
            writer.add_tensor(name, np.array(weights[name].astype(mx.float32)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_the_pieces_of_a_split_model_are_joined(tmp_path: Path, part: str) -> None:
    weights = to_bfl(golden(part)) if part == "transformer" else to_llama_cpp(golden(part))
    paths = split_gguf(tmp_path, weights, 3, "flux")
    right = {name: array.astype(mx.float32) for name, array in open_model(GOLDEN).weights(part).items()}  # type: ignore[union-attr]
    for path in paths[::2]:
        assert_equal(opened(part, path), right)
    source = open_model(GOLDEN, parts={part: paths[1]})
    assert [path for path in source.files() if path.suffix == ".gguf"] == paths
    table = source.rows("text_encoder", "embed_tokens.weight")
    assert table
    assert mx.array_equal(table([5]), opened("text_encoder", GOLDEN / "text_encoder")["embed_tokens.weight"][5:6])


def test_a_piece_without_the_others_is_told(tmp_path: Path) -> None:
    paths = split_gguf(tmp_path, to_bfl(golden("transformer")), 3, "flux")
    kept = paths[1].read_bytes()
    paths[1].unlink()
    told = f"{paths[0]}: is one of 3 pieces of a model, and {paths[1].name} is not beside it; get all of them"
    assert refusal(lambda: open_any(paths[0])) == told
    paths[1].write_bytes(paths[2].read_bytes())
    assert "is not piece 2 of 3 of this model" in refusal(lambda: open_any(paths[0]))
    paths[1].write_bytes(kept)
    other = paths[0].rename(tmp_path / "other.gguf")
    assert "is one of 3 pieces of a model; give it the name that it came with" in refusal(lambda: open_any(other))


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
@pytest.mark.parametrize("gone", [True, False])
def test_a_file_that_goes_or_changes_before_drawing_is_told(tmp_path: Path, part: str, gone: bool) -> None:
    from klein_mlx import KleinPipeline

    weights = to_bfl(golden(part)) if part == "transformer" else to_llama_cpp(golden(part))
    path = save_gguf(tmp_path / "x.gguf", weights)
    pipe = KleinPipeline(open_model(GOLDEN, parts={part: path}), dtype="float32")
    other = save_gguf(tmp_path / "y.gguf", {name: array * 2 for name, array in weights.items()})
    path.unlink() if gone else other.replace(path)
    told = refusal(lambda: pipe("a red fox", num_inference_steps=1, width=64, height=64, seed=1))
    assert told.startswith(f"{path}: ")
    assert ("missing" in told or "No such file" in told) if gone else "has changed" in told
