"""Headers of published files, with sparse data behind them: each opens as what it is, or is refused for its reason."""

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from folders import refusal

from klein_mlx.config import KLEIN_TAPS, ModelConfig
from klein_mlx.errors import CheckpointError
from klein_mlx.formats.describe import describe
from klein_mlx.formats.open import open_any
from klein_mlx.formats.part import KLEIN

HEADERS: dict[str, Any] = json.loads(gzip.decompress((Path(__file__).parent / "real" / "headers.json.gz").read_bytes()))
_SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I64": 8}
_4B, _9B = 3_875_544_576, 9_078_581_248
OPEN = {
    "flux-2-klein-4b": ("transformer", "BFL names, safetensors", _4B),
    "flux-2-klein-4b-fp8": ("transformer", "BFL names, safetensors FP8", _4B),
    "flux-2-klein-4b-fp8-nohint": ("transformer", "BFL names, safetensors FP8", _4B),
    "flux-2-klein-4b-nvfp4": ("transformer", "BFL names, safetensors NVFP4", _4B),
    "flux-2-klein-base-4b-fp8": ("transformer", "BFL names, safetensors FP8", _4B),
    "fp8r": ("transformer", "BFL names, safetensors FP8", _4B),
    "flux-2-klein-9b": ("transformer", "BFL names, safetensors", _9B),
    "flux-2-klein-9b-fp8": ("transformer", "BFL names, safetensors FP8", _9B),
    "flux-2-klein-9b-nvfp4": ("transformer", "BFL names, safetensors NVFP4", _9B),
    "qwen_3_4b": ("text_encoder", "diffusers names, safetensors", 4_022_468_096),
    "ae": ("vae", "LDM names, safetensors", 84_046_371),
    "flux2-vae": ("vae", "diffusers names, safetensors", 84_046_371),
    "full_encoder_small_decoder": ("vae", "LDM names, safetensors", 62_373_347),
}
REFUSED = {
    "nv": "is NVFP4 in an order that nothing in the file states",
    "sdnq": "is quantized as SDNQ does it",
    "sdnq8": "is quantized as SDNQ does it",
}


def sparse(folder: Path, name: str, **metadata: str) -> Path:
    """The file, as long as it says, without a byte of data on the disk."""
    stored = HEADERS[name]
    header: dict[str, Any] = {"__metadata__": {**stored.get("metadata", {}), **metadata}}
    end = 0
    for tensor, (dtype, shape) in stored["tensors"].items():
        start, end = end, end + _SIZES[dtype] * math.prod(shape)
        header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path = folder / f"{name}.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def test_every_header_is_expected() -> None:
    assert set(HEADERS) == set(OPEN) | set(REFUSED)


@pytest.mark.parametrize("name", OPEN)
def test_it_opens(tmp_path: Path, name: str) -> None:
    told = describe(open_any(sparse(tmp_path, name)))
    assert (told["part"], told["format"], told["parameters"]) == OPEN[name]
    size = {"transformer": {_4B: ["4b", "base-4b"], _9B: ["9b", "base-9b", "9b-kv"]}.get(told["parameters"])}
    assert told["variants"] == (size["transformer"] if told["part"] == "transformer" else [])


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_for_its_reason(tmp_path: Path, name: str) -> None:
    assert REFUSED[name] in refusal(lambda: open_any(sparse(tmp_path, name)))


def test_modelopt_s_order_opens_once_its_metadata_states_it(tmp_path: Path) -> None:
    told = describe(open_any(sparse(tmp_path, "nv", quantization="nvfp4")))
    assert (told["format"], told["parameters"]) == ("BFL names, safetensors NVFP4", _4B)


def test_the_small_decoder_without_its_encoder_is_told_the_full_one(tmp_path: Path, monkeypatch: Any) -> None:
    whole = HEADERS["full_encoder_small_decoder"]["tensors"]
    decoder = {name: entry for name, entry in whole.items() if not name.startswith("encoder.")}
    monkeypatch.setitem(HEADERS, "decoder", {"tensors": decoder})
    assert "take full_encoder_small_decoder.safetensors" in refusal(lambda: open_any(sparse(tmp_path, "decoder")))


def test_a_transformer_with_the_other_size_s_encoder(tmp_path: Path) -> None:
    """Both ways, by the encoders' names."""
    whole = KLEIN["transformer"], KLEIN["text_encoder"], KLEIN["vae"]
    with pytest.raises(CheckpointError, match="the text encoder is Qwen3-8B; 4b and base-4b needs? Qwen3-4B"):
        ModelConfig(whole[0], replace(whole[1], hidden_size=4096), whole[2], True, KLEIN_TAPS)
    nine = replace(whole[0], num_attention_heads=32, joint_attention_dim=12288, num_layers=8, num_single_layers=24)
    with pytest.raises(CheckpointError, match="the text encoder is Qwen3-4B; 9b and base-9b and 9b-kv needs? Qwen3-8B"):
        ModelConfig(nine, whole[1], whole[2], True, KLEIN_TAPS)
