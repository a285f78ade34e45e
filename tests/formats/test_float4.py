"""NVFP4 files: written here as the published layout says, read back within the codec's error; else refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from folders import GOLDEN, raw_safetensors, refusal
from foreign import Weights, golden, opened, to_bfl
from test_float8 import E4M3

from klein_convert.checkpoint import convert_checkpoint
from klein_mlx.formats.describe import describe
from klein_mlx.formats.open import open_any, open_model

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_FINITE = np.array([E4M3[byte] for byte in range(127)])  # e4m3's numbers from 0 to 448, ascending
QKV = "double_blocks.0.img_attn.qkv"


def nearest(values: np.ndarray, grid: Any) -> np.ndarray:
    """The index of the grid's number that is next to each value; of two as near, the smaller."""
    return np.abs(values[..., None] - np.asarray(grid)).argmin(axis=-1)


def encode(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32, np.ndarray]:
    """Codes (rows, columns), e4m3 bytes (rows, groups), the overall scale, and the float32 that they stand for."""
    rows, columns = matrix.shape
    overall = np.float32(np.abs(matrix).max() / (448 * 6))
    blocks = matrix.reshape(rows, -1, 16)
    scales = nearest(np.abs(blocks).max(axis=-1) / 6 / overall, _FINITE)
    steps = _FINITE[scales][..., None] * overall
    codes = nearest(np.abs(blocks) / np.where(steps == 0, 1, steps), E2M1) + 8 * (blocks < 0)
    signed = np.array([*E2M1, *(-v for v in E2M1)], np.float32)
    value = signed[codes] * _FINITE[scales].astype(np.float32)[..., None] * overall
    return codes.reshape(rows, columns), scales.astype(np.uint8), overall, value.reshape(rows, columns)


def swizzle(scales: np.ndarray) -> np.ndarray:
    """Byte by byte, as NVIDIA's cuBLAS documents the order of 1 x 16 scales."""
    rows, groups = scales.shape
    high, wide = -(-rows // 128) * 128, -(-groups // 4) * 4
    flat = np.zeros(high * wide, np.uint8)
    for row in range(rows):
        for group in range(groups):
            tile = row // 128 * (wide // 4) + group // 4
            flat[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4] = scales[row, group]
    return flat.reshape(high, wide)


class Writer:
    """A file whose blocks are NVFP4 (or what `choose` says of a name), byte by byte."""

    def __init__(
        self,
        weights: Weights,
        choose: Callable[[str], str] = lambda name: "nvfp4",
        high_first: bool = True,
        order: Callable[[np.ndarray], np.ndarray] = swizzle,
    ):
        self.tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
        self.values: Weights = {}  # what a reader must find
        self.layers: dict[str, Any] = {}
        for name, array in weights.items():
            layer, kind = name.removesuffix(".weight"), choose(name)
            matrix = np.array(array.astype(mx.float32))
            if array.ndim != 2 or array.shape[1] % 16 or "embed" in name or kind == "bf16":
                self.add(name, "BF16", np.array(array.view(mx.uint16)))
                self.values[name] = array
            elif kind == "nvfp4":
                codes, scales, overall, value = encode(matrix)
                even, odd = codes[:, 0::2], codes[:, 1::2]
                packed = even << 4 | odd if high_first else odd << 4 | even
                self.add(name, "U8", packed.astype(np.uint8))
                self.add(f"{layer}.weight_scale", "F8_E4M3", order(scales))
                self.add(f"{layer}.weight_scale_2", "F32", overall)
                self.values[name] = mx.array(value).astype(mx.bfloat16)
                self.layers[layer] = {"format": "nvfp4"}
            else:
                scale = np.float32(np.abs(matrix).max() / 448)
                codes = nearest(np.abs(matrix) / scale, _FINITE).astype(np.uint8) | (matrix < 0).astype(np.uint8) << 7
                self.add(name, kind, codes)
                self.add(f"{layer}.weight_scale", "F32", scale)
                value = np.vectorize(E4M3.get)(codes).astype(np.float32) * scale
                self.values[name] = mx.array(value).astype(mx.bfloat16)
                self.layers[layer] = {"format": "float8_e4m3fn"}

    def add(self, name: str, dtype: str, array: Any) -> None:
        array = np.asarray(array)
        self.tensors[name] = (dtype, array.shape, array.tobytes())

    def hint(self) -> None:
        """As ComfyUI's files say it beside each weight."""
        for layer, told in self.layers.items():
            self.add(f"{layer}.comfy_quant", "U8", np.frombuffer(json.dumps(told).encode(), np.uint8))

    def metadata(self, prefix: str = "") -> dict[str, str]:
        """As they say it in the header."""
        layers = {prefix + layer: told for layer, told in self.layers.items()}
        return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}

    def save(self, path: Path, metadata: dict[str, str] | None = None, prefix: str = "") -> Path:
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        end = 0
        for name, (dtype, shape, data) in self.tensors.items():
            header[prefix + name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(data)]}
            end += len(data)
        path.write_bytes(raw_safetensors(header, b"".join(data for *_, data in self.tensors.values())))
        return path


def uneven(weights: Weights, seed: int = 0) -> Weights:
    """The same with rows and groups of very different sizes, so that a scale in a wrong place shows."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, array in weights.items():
        if array.ndim == 2 and array.shape[1] % 16 == 0:
            rows = 2.0 ** rng.integers(-3, 4, (array.shape[0], 1))
            groups = 2.0 ** np.repeat(rng.integers(-3, 4, array.shape[1] // 16), 16)
            array = array * mx.array(rows * groups).astype(mx.bfloat16)  # powers of two: exact
        result[name] = array
    return result


@pytest.fixture(scope="module")
def transformer() -> Weights:
    return uneven(to_bfl(golden("transformer")))


def test_the_writer_s_numbers_are_the_formats() -> None:
    """Three groups by hand: the largest is 6 codes of its scale, the scale 448 codes of the whole tensor's largest."""
    matrix = np.zeros((1, 48))
    matrix[0, 0], matrix[0, 17], matrix[0, 18] = 448 * 6, -6, 0.5
    codes, scales, overall, value = encode(matrix)
    assert overall == 1
    assert scales.tolist() == [[126, 56, 0]]  # 448, 1 and 0
    assert (codes[0, 0], codes[0, 17], codes[0, 18]) == (7, 15, 1)
    assert np.array_equal(value, matrix)
    assert swizzle(np.arange(160 * 5).reshape(160, 5) % 251)[0, :4].tolist() == [0, 1, 2, 3]
    flat = swizzle(np.arange(160 * 5).reshape(160, 5) % 251).reshape(-1)
    assert flat[4] == 32 * 5 % 251  # row 32 follows row 0 within a tile
    assert flat[512] == 4  # the next four groups are the next tile
    assert flat[1024] == 128 * 5 % 251  # and the next 128 rows the tile after the row's last


@pytest.mark.parametrize("transport", ["header", "beside"])
def test_it_is_read_within_the_codec_s_error(tmp_path: Path, transformer: Weights, transport: str) -> None:
    """Bit for bit what the writer encoded; and each number within its code's distance of the original bfloat16."""
    writer = Writer(transformer)
    prefix = "model.diffusion_model." if transport == "header" else ""
    if transport == "beside":
        writer.hint()
    metadata = writer.metadata(prefix) if transport == "header" else None
    found = opened("transformer", writer.save(tmp_path / "x.safetensors", metadata, prefix))
    right, original = kept(tmp_path, writer.values), kept(tmp_path, transformer)
    assert len(writer.layers) > 20
    for name, array in found.items():
        assert array.dtype == mx.bfloat16
        assert mx.array_equal(array, right[name]), name
        if array.ndim == 2:
            assert error(array, original[name]) < 0.12, name


def kept(folder: Path, weights: Weights) -> Weights:
    plain = folder / "plain.safetensors"
    mx.save_safetensors(str(plain), weights)
    found = opened("transformer", plain)
    mx.eval(found)
    return found


def error(found: mx.array, right: mx.array) -> float:
    """Relative, in the Frobenius norm: some 0.095 for NVFP4, more than 0.5 for the same codes in a wrong order."""
    left, right = found.astype(mx.float32), right.astype(mx.float32)
    return float(((left - right).square().sum() / right.square().sum()).sqrt().item())


@pytest.mark.parametrize(
    "wrong",
    [{"high_first": False}, {"order": lambda scales: np.pad(scales, padding(scales))}],
    ids=["low bits first", "scales row by row"],
)
def test_another_order_would_be_seen(tmp_path: Path, transformer: Weights, wrong: dict[str, Any]) -> None:
    """What the tests above hold is not held by a file in ModelOpt's order: neither by its bits nor by its scales."""
    writer = Writer(transformer, **wrong)
    found = opened("transformer", writer.save(tmp_path / "x.safetensors", writer.metadata()))
    original = kept(tmp_path, transformer)
    assert max(error(found[name], original[name]) for name in found if found[name].ndim == 2) > 0.5


def padding(scales: np.ndarray) -> list[tuple[int, int]]:
    return [(0, -scales.shape[0] % 128), (0, -scales.shape[1] % 4)]


def test_several_tiles_in_both_directions() -> None:
    """Larger than any golden layer: 300 rows and 9 groups are 3 x 3 tiles, the last ones padded."""
    from klein_mlx.formats.scaled import _decode_float4

    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(300, 144)) * 2.0 ** rng.integers(-4, 5, (300, 1))
    codes, scales, overall, value = encode(matrix)
    packed = mx.array((codes[:, 0::2] << 4 | codes[:, 1::2]).astype(np.uint8))
    found = _decode_float4(False, packed, mx.array(swizzle(scales)), mx.array(overall))
    assert mx.array_equal(found, mx.array(value).astype(mx.bfloat16))
    packed = mx.array((codes[:, 1::2] << 4 | codes[:, 0::2]).astype(np.uint8))
    found = _decode_float4(True, packed, mx.array(scales), mx.array(overall))
    assert mx.array_equal(found, mx.array(value).astype(mx.bfloat16))


def test_modelopt_s_order_is_read_where_the_header_states_it(tmp_path: Path, transformer: Weights) -> None:
    """Low bits first, scales row by row, as diffusers' script for klein's files writes them; two orders are refused."""
    writer = Writer(transformer, high_first=False, order=lambda scales: scales)
    metadata = {"format": "pt", "quantization": "nvfp4"}
    found = opened("transformer", writer.save(tmp_path / "x.safetensors", metadata))
    right = kept(tmp_path, writer.values)
    assert all(mx.array_equal(found[name], right[name]) for name in right)
    both = writer.save(tmp_path / "y.safetensors", {**metadata, **writer.metadata()})
    assert "states two orders of NVFP4" in refusal(lambda: open_any(both))


def test_layers_of_three_kinds_in_one_file(tmp_path: Path, transformer: Weights) -> None:
    """bfloat16, float8 (also as plain bytes) and NVFP4, each read as it says."""
    kinds = {"txt_mlp": "F8_E4M3", "img_mlp": "U8", "single_blocks.0": "bf16"}
    writer = Writer(transformer, lambda name: next((kind for part, kind in kinds.items() if part in name), "nvfp4"))
    path = writer.save(tmp_path / "x.safetensors", writer.metadata())
    found, right = opened("transformer", path), kept(tmp_path, writer.values)
    assert all(mx.array_equal(found[name], right[name]) for name in right)
    assert describe(open_any(path))["format"] == "BFL names, safetensors NVFP4 and FP8"


def test_the_text_encoder_of_comfyui_goes_the_same_way(tmp_path: Path) -> None:
    """Hugging Face's names, hints beside, and inputs that were smoothed in one layer."""
    weights = uneven(golden("text_encoder"))
    writer = Writer(weights)
    writer.hint()
    smoothed = "model.layers.0.mlp.down_proj"
    columns = weights[f"{smoothed}.weight"].shape[1]
    smoothing = np.linspace(0.5, 2, columns, dtype=np.float32)
    writer.add(f"{smoothed}.pre_quant_scale", "F32", smoothing)
    value = encode(np.array(weights[f"{smoothed}.weight"].astype(mx.float32)))[3]
    writer.values[f"{smoothed}.weight"] = mx.array(value * smoothing).astype(mx.bfloat16)
    found = opened("text_encoder", writer.save(tmp_path / "x.safetensors"))
    mx.save_safetensors(str(tmp_path / "plain.safetensors"), writer.values)
    right = opened("text_encoder", tmp_path / "plain.safetensors")
    assert all(mx.array_equal(found[name], right[name]) for name in right)
    assert found.keys() == right.keys()


def test_it_is_described_and_converted(tmp_path: Path, transformer: Weights) -> None:
    writer = Writer(transformer)
    path = writer.save(tmp_path / "x.safetensors", writer.metadata())
    told = describe(open_any(path))
    assert told["format"] == "BFL names, safetensors NVFP4"
    assert told["parameters"] == sum(array.size for array in transformer.values())
    target = convert_checkpoint(open_model(GOLDEN, parts={"transformer": path}), tmp_path / "ours", verify=True)
    found, right = open_model(target).weights("transformer"), opened("transformer", path)
    assert all(mx.array_equal(found[name], right[name]) for name in right)


# ---- refused ----


def without(name: str) -> Callable[[Writer], Any]:
    return lambda writer: writer.tensors.pop(name)


def changed(name: str, dtype: str, array: Any) -> Callable[[Writer], Any]:
    return lambda writer: writer.add(name, dtype, array)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without(f"{QKV}.weight_scale"), f"is NVFP4 without its scale ({QKV}.weight_scale): take the bf16"),
        (without(f"{QKV}.weight_scale_2"), f"is NVFP4 without its scale ({QKV}.weight_scale_2): take"),
        (changed(f"{QKV}.weight_scale", "F8_E4M3", np.zeros((384, 4), np.uint8)), "has shape (384, 4)"),
        (changed(f"{QKV}.weight_scale", "F8_E4M3", np.zeros((192, 4), np.uint8)), "it must be (256, 4) and F8_E4M3"),
        (changed(f"{QKV}.weight_scale", "F32", np.zeros((256, 4), np.float32)), "and dtype F32"),
        (changed(f"{QKV}.weight_scale_2", "F32", np.zeros(192, np.float32)), "it must be () or (1,) and BF16"),
        (changed(f"{QKV}.pre_quant_scale", "F32", np.zeros(7, np.float32)), "pre_quant_scale has shape (7,)"),
        (changed(f"{QKV}.weight", "BF16", np.zeros((192, 64), np.uint16)), "NVFP4 has a matrix of U8"),
        (changed(f"{QKV}.weight", "U8", np.zeros((192, 28), np.uint8)), "8 bytes for each 16 columns"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, transformer: Weights, damage: Callable[[Writer], Any], words: str
) -> None:
    writer = Writer(transformer)
    metadata = writer.metadata()
    damage(writer)
    path = writer.save(tmp_path / "x.safetensors", metadata)
    assert words in refusal(lambda: open_any(path))


@pytest.mark.parametrize("bfl", [False, True])
@pytest.mark.parametrize("metadata", [None, {"quantization": "nvfp4_x"}])
def test_an_order_that_nothing_states_is_refused(tmp_path: Path, bfl: bool, metadata: dict[str, str] | None) -> None:
    """Whoever's names it has: by its shapes it may be in ComfyUI's order or in ModelOpt's."""
    weights = golden("transformer")
    path = Writer(to_bfl(weights) if bfl else weights).save(tmp_path / "x.safetensors", metadata)
    assert "is NVFP4 in an order that nothing in the file states" in refusal(lambda: open_any(path))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{QKV}.weight_packed", "quantized as compressed-tensors does it"),
        (f"{QKV}.weight.absmax", "quantized as bitsandbytes does it"),
        (f"{QKV}.weight.quant_state.bitsandbytes__nf4", "quantized as bitsandbytes does it"),
        ("transformer_blocks.0.attn.to_q.wscales", "quantized as SVDQuant (nunchaku) does it"),
        ("model.layers.0.self_attn.q_proj.qweight", "quantized as GPTQ or AWQ does it"),
    ],
)
def test_other_encodings_are_refused_by_their_names(
    tmp_path: Path, transformer: Weights, name: str, words: str
) -> None:
    writer = Writer(transformer)
    writer.add(name, "U8", np.zeros(4, np.uint8))
    path = writer.save(tmp_path / "x.safetensors", writer.metadata())
    assert words in refusal(lambda: open_any(path))
