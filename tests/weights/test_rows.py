"""The rows of a prompt's tokens, read from the file: those of the whole table, without the whole table."""

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from folders import (
    GOLDEN,
    copy_model,
    edit_weights,
    loaded,
    parameters,
    quantizable_model,
    read_weights,
    refusal,
    weight_file,
)
from foreign import golden, save, to_llama_cpp
from test_float4 import Writer as Float8
from test_gguf import save_gguf
from test_mflux import quantise

from klein_convert.checkpoint import convert_checkpoint
from klein_convert.export import export_diffusers
from klein_mlx import KleinPipeline
from klein_mlx.formats.open import mix, open_model
from klein_mlx.weights.bits import Asked, parse, settle
from klein_mlx.weights.checkpoint import Source, TokenRows, load_part, token_rows
from klein_mlx.weights.quantize import Quantization

IDS = mx.array([[5, 0, 7, 7, 511], [1, 2, 3, 5, 5]])


def tokens(source: Source, dtype: mx.Dtype = mx.float32) -> TokenRows:
    rows = token_rows(source, None, dtype)
    assert isinstance(rows, TokenRows)
    return rows


@pytest.mark.parametrize("kind", ["diffusers", "ours", "GGUF", "Q8_0", "quantised"])
def test_rows_are_those_of_the_whole_table(tmp_path: Path, kind: str) -> None:
    """Bit for bit, whatever the file holds."""
    model = quantizable_model(tmp_path / "model")
    source: Source = open_model(model)
    if kind == "ours":
        source = open_model(convert_checkpoint(model, tmp_path / "ours", quantize=4))
    elif kind in ("GGUF", "Q8_0"):
        names = to_llama_cpp(golden("text_encoder"))
        path = save_gguf(tmp_path / "a.gguf", names, None if kind == "GGUF" else "Q8_0", arch="qwen3")
        source = mix(open_model(copy_model(tmp_path / "base")), {"text_encoder": path})
    elif kind == "quantised":
        edit_weights(model, "text_encoder", lambda weights: weights.update(_quantised(weights)))
        source = mix(open_model(GOLDEN), {"text_encoder": weight_file(model, "text_encoder")})
    for dtype in (mx.float32, mx.bfloat16):
        whole = load_part("text_encoder", source, dtype).embed_tokens
        assert mx.array_equal(tokens(source, dtype)(IDS), whole(IDS))  # type: ignore[operator]


def _quantised(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    name = "model.embed_tokens.weight"
    return quantise({name: weights.pop(name)}, 8)


def test_the_table_stays_on_disk(tmp_path: Path) -> None:
    """A table of 64 MB, of which a few kilobytes are read."""
    model = copy_model(tmp_path / "model")
    rows = 1 << 18

    def grow(weights: dict[str, mx.array]) -> None:
        weights["model.embed_tokens.weight"] = mx.zeros((rows, 64)) + mx.arange(rows)[:, None] % 7
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].astype(mx.bfloat16)

    edit_weights(model, "text_encoder", grow)
    path = model / "text_encoder" / "config.json"
    path.write_text(path.read_text().replace('"vocab_size": 512', f'"vocab_size": {rows}'))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    out = tokens(open_model(model))(mx.array([[3, rows - 1]]))
    mx.eval(out)
    assert out[0, :, 0].tolist() == [3.0, (rows - 1) % 7]
    assert mx.get_peak_memory() - before < 1e6


def test_the_pipeline_reads_rows() -> None:
    pipe = KleinPipeline.from_pretrained("tiny", keep="all")
    pipe("a red circle", num_inference_steps=1)
    assert isinstance(pipe.parts.loaded["text_encoder"].module.embed_tokens, TokenRows)


def test_a_file_that_is_replaced_changes_nothing(tmp_path: Path) -> None:
    model = copy_model(tmp_path / "model")
    rows = tokens(open_model(model))
    wanted = np.array(rows(IDS))
    path = weight_file(model, "text_encoder")
    other = path.with_name("other")
    other.write_bytes(b"\0" * path.stat().st_size)
    other.rename(path)
    assert np.array_equal(np.array(rows(IDS)), wanted)


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    model = copy_model(tmp_path / "model")
    rows = tokens(open_model(model))
    path = weight_file(model, "text_encoder")
    os.truncate(path, 1000)
    assert "it has been cut short" in refusal(lambda: rows(IDS))


def test_damaged_rows_are_told(tmp_path: Path) -> None:
    """But only those that are used."""
    model = copy_model(tmp_path / "model")

    def damage(weights: dict[str, mx.array]) -> None:
        weights["model.embed_tokens.weight"][7, 3] = float("nan")

    edit_weights(model, "text_encoder", damage)
    rows = tokens(open_model(model))
    assert "embed_tokens holds NaN" in refusal(lambda: rows(IDS))
    assert rows(mx.array([[1, 2]])).shape == (1, 2, 64)
    assert loaded(model, mx.float32)


SEARCHED = Asked({"text_encoder": Quantization(4)}, (("embed_tokens", Quantization(6)),), searched=True)


@pytest.mark.parametrize("kind", ["diffusers", "ours", "GGUF", "Q8_0", "BFL's Qwen", "FP8"])
@pytest.mark.parametrize("quantize", [SEARCHED, {"embed_tokens": "8"}, {"embed_tokens": "mxfp4", "text_encoder": 4}])
def test_a_table_quantized_while_loading_gives_the_rows_of_the_whole_one(
    tmp_path: Path, kind: str, quantize: Any
) -> None:
    """Every kind of source: rows are read and quantized, where the file allows it, as the whole table would be."""
    model = quantizable_model(tmp_path / "model")
    source: Source = open_model(model)
    theirs = read_weights(weight_file(model, "text_encoder"))
    if kind == "ours":
        source = open_model(convert_checkpoint(model, tmp_path / "ours"))
    elif kind in ("GGUF", "Q8_0"):
        path = save_gguf(tmp_path / "a.gguf", to_llama_cpp(theirs), None if kind == "GGUF" else "Q8_0", arch="qwen3")
        source = mix(source, {"text_encoder": path})
    elif kind == "BFL's Qwen":
        source = mix(source, {"text_encoder": save(tmp_path / "qwen.safetensors", theirs)})
    elif kind == "FP8":
        path = Float8(theirs, lambda name: "F8_E4M3").save(tmp_path / "x.safetensors")
        source = mix(source, {"text_encoder": path})
    pipe = KleinPipeline(source, quantize=quantize, dtype="float32", keep="all")
    pipe("a fox", num_inference_steps=1, max_sequence_length=24, width=64, height=64, seed=1)
    table = pipe.parts.loaded["text_encoder"].module.embed_tokens
    assert isinstance(table, TokenRows)
    whole = load_part("text_encoder", source, mx.float32, settle(parse(quantize), source)["text_encoder"])
    assert mx.array_equal(table(IDS), whole.embed_tokens(IDS))  # type: ignore[operator]
    assert pipe.parts.weights["text_encoder"] == sum(
        array.nbytes for name, array in parameters(whole).items() if not name.startswith("embed_tokens")
    )


def test_the_hub_s_layout_with_the_preset(tmp_path: Path) -> None:
    """As `--model FOLDER -q mixed-4` has it."""
    pipe = KleinPipeline(open_model(export_diffusers(open_model("tiny"), tmp_path / "tinyd")), quantize="mixed-4")
    assert len(pipe("a red circle", num_inference_steps=1, seed=1).images) == 1
