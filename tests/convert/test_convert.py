"""Converting: exact, streamed, and complete or not there at all."""

import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from folders import (
    GOLDEN,
    assert_equal,
    copy_model,
    loaded,
    nothing_but,
    quantizable_model,
    read_weights,
    shard,
    weight_file,
)
from safetensors import safe_open

from klein_convert import writer
from klein_convert.__main__ import main
from klein_convert.checkpoint import convert_checkpoint
from klein_convert.writer import Counter
from klein_mlx.config import PARTS
from klein_mlx.errors import CheckpointError
from klein_mlx.formats.names import (
    CONV,
    HALVES,
    POINTWISE,
    SAME,
    TABLES,
    diffusers_name,
    is_left_out,
    their_shape,
    to_ours,
    to_theirs,
)
from klein_mlx.formats.open import open_model
from klein_mlx.weights.checkpoint import expected

PAGES = 8 * (1 << 14) if sys.platform == "darwin" else 0  # Metal's allocator gives an array whole pages

# ---- the tables ----


@pytest.mark.parametrize("part", PARTS)
def test_every_weight_that_diffusers_wrote_has_its_place(part: str) -> None:
    config = open_model(GOLDEN).config
    theirs = {diffusers_name(part, ours)[0] for ours in expected(part, config)}
    assert len(theirs) == len(expected(part, config))
    found = set(read_weights(weight_file(GOLDEN, part)))
    assert theirs <= found
    assert all(is_left_out(part, name, config) for name in found - theirs)
    assert not any(is_left_out(part, name, config) for name in theirs)


@pytest.mark.parametrize("part", PARTS)
def test_no_row_of_a_table_is_unused(part: str) -> None:
    """A row that renames nothing is a typing error (`shortcut` and all else occur in the golden model)."""
    paths = {
        re.sub(r"(?<=\.)\d+(?=\.)", "*", name.rpartition(".")[0] + ".")
        for name in expected(part, open_model(GOLDEN).config)
    }
    rules = {f"{rule.ours}." for rule in TABLES[part] if not rule.ours.startswith("guidance_in.")}  # dev's
    assert rules - paths == set()


@pytest.mark.parametrize(
    ("layout", "shape"), [(SAME, (4, 3)), (CONV, (4, 3, 2, 5)), (POINTWISE, (4, 3)), (HALVES, (4, 3))]
)
def test_a_layout_and_back(layout: str, shape: tuple[int, ...]) -> None:
    ours = mx.arange(math.prod(shape)).reshape(shape)
    theirs = to_theirs(layout, ours)
    assert theirs.shape == their_shape(layout, shape)
    assert mx.array_equal(to_ours(layout, theirs), ours).item()


def test_layouts_move_what_they_should() -> None:
    weights, theirs = open_model(GOLDEN).weights("transformer"), read_weights(weight_file(GOLDEN, "transformer"))
    scale, shift = mx.split(theirs["norm_out.linear.weight"], 2)
    assert mx.array_equal(weights["final_mod.weight"], mx.concatenate([shift, scale])).item()
    assert mx.array_equal(
        weights["double_blocks.0.txt.to_k.weight"], theirs["transformer_blocks.0.attn.add_k_proj.weight"]
    )
    weights, theirs = open_model(GOLDEN).weights("vae"), read_weights(weight_file(GOLDEN, "vae"))
    ours, conv = weights["encoder.conv_in.weight"], theirs["encoder.conv_in.weight"]
    assert ours[5, 1, 2, 0].item() == conv[5, 0, 1, 2].item()
    assert mx.array_equal(weights["latent_var"], theirs["bn.running_var"]).item()


# ---- exact ----


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_converting_then_loading_is_loading(tmp_path: Path, bits: int | None, dtype: mx.Dtype) -> None:
    model = quantizable_model(tmp_path / "model")
    path = convert_checkpoint(model, tmp_path / "ours", quantize=bits)
    assert_equal(loaded(path, dtype), loaded(model, dtype, bits))


def test_a_sharded_source_converts_to_the_same(tmp_path: Path) -> None:
    model = copy_model(tmp_path / "model")
    for part in PARTS:
        shard(model, part, 3)
    path = convert_checkpoint(model, tmp_path / "ours")
    assert_equal(loaded(path, mx.bfloat16), loaded(GOLDEN, mx.bfloat16))


def test_large_parts_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 100_000)
    path = convert_checkpoint(GOLDEN, tmp_path / "ours")
    shards = sorted(p.name for p in path.glob("vae-*.safetensors"))
    assert shards[0] == f"vae-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 3
    assert all((path / name).stat().st_size < 120_000 for name in shards)
    index = json.loads((path / "vae.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert_equal(loaded(path, mx.bfloat16), loaded(GOLDEN, mx.bfloat16))


def test_other_dtypes_are_kept(tmp_path: Path) -> None:
    model = copy_model(tmp_path / "model")
    path = weight_file(model, "vae")
    weights = read_weights(path)
    path.unlink()
    mx.save_safetensors(
        str(path), {n: a.astype(mx.float32 if "encoder" in n else mx.float16) for n, a in weights.items()}
    )
    converted = open_model(convert_checkpoint(model, tmp_path / "ours")).weights("vae")
    assert_equal(converted, open_model(model).weights("vae"))
    assert {array.dtype for array in converted.values()} == {mx.float32, mx.float16}


def test_our_own_format_converts_too(tmp_path: Path) -> None:
    model = quantizable_model(tmp_path / "model")
    first = convert_checkpoint(model, tmp_path / "first")
    second = convert_checkpoint(first, tmp_path / "second", quantize=4)
    assert_equal(loaded(second, mx.bfloat16), loaded(model, mx.bfloat16, 4))
    third = convert_checkpoint(second, tmp_path / "third")
    assert_equal(loaded(third, mx.bfloat16), loaded(second, mx.bfloat16))
    assert open_model(third).info["source"]["source"]["source"]["name"] == "model"
    with pytest.raises(CheckpointError, match="is 4-bit already; for 8 bits start from the original"):
        convert_checkpoint(second, tmp_path / "fourth", quantize=8)
    with pytest.raises(CheckpointError, match="is quantized already"):
        convert_checkpoint(second, tmp_path / "fourth", quantize=4)


def test_what_is_written_is_sound_safetensors(tmp_path: Path) -> None:
    path = convert_checkpoint(quantizable_model(tmp_path / "model"), tmp_path / "ours", quantize=4)
    for part in PARTS:
        content = (path / f"{part}.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        assert length % 8 == 0
        for name, entry in header.items():
            if name != "__metadata__":
                assert entry["data_offsets"][0] % {"BF16": 2, "U32": 4}[entry["dtype"]] == 0
        with safe_open(path / f"{part}.safetensors", framework="np") as tensors:
            assert set(tensors.keys()) == set(header) - {"__metadata__"}


def test_every_tensor_is_aligned_whatever_its_size(tmp_path: Path) -> None:
    weights = {"a": mx.ones(3, mx.bfloat16), "b": mx.ones(2), "c": mx.ones((1, 5), mx.float16), "d": mx.array(1.0)}
    weights |= {"e": mx.ones(8, mx.uint32), "f": mx.ones((0, 4)), "g": mx.ones(1, mx.bfloat16)}
    writer.write_weights(tmp_path, "x", dict(weights), Counter())
    content = (tmp_path / "x.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    for name, array in weights.items():
        assert header[name]["data_offsets"][0] % array.itemsize == 0
    assert_equal(read_weights(tmp_path / "x.safetensors"), weights)


def test_klein_json_says_what_it_is_and_where_it_comes_from(tmp_path: Path) -> None:
    path = convert_checkpoint(GOLDEN, tmp_path / "ours")
    values = json.loads((path / "klein.json").read_text())
    assert (values["format_version"], values["variant"], values["is_distilled"]) == (1, "distilled", True)
    assert (values["taps"], values["max_sequence_length"], values["default_size"]) == ([1, 2, 3], 512, 1024)
    assert (values["quantization"], values["licence"]) == ({}, "not stated")
    assert values["made_by"].startswith("klein-mlx ")
    digests = values["source"]["sha256"]
    assert set(digests) == {
        "model_index.json",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
        *(f"{part}/config.json" for part in PARTS),
        *(str(weight_file(GOLDEN, part).relative_to(GOLDEN)) for part in PARTS),
    }
    for name, digest in digests.items():
        assert digest == hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest()
    assert str(GOLDEN.parent) not in json.dumps(values)
    assert open_model(path).config == open_model(GOLDEN).config
    assert (path / "tokenizer.json").read_bytes() == (GOLDEN / "tokenizer" / "tokenizer.json").read_bytes()


def test_the_embedded_checkpoint_is_marked(tmp_path: Path) -> None:
    path = convert_checkpoint(GOLDEN, tmp_path / "ours", variant="tiny")
    variant = open_model(path).config.variant
    assert (variant.name, variant.licence) == ("tiny", "Apache-2.0")
    again = open_model(convert_checkpoint(path, tmp_path / "again"))
    assert (again.config.variant.name, again.info["licence"]) == ("tiny", "Apache-2.0")
    with pytest.raises(CheckpointError, match="it must be one of tiny, 4b-1step, 4b"):
        convert_checkpoint(GOLDEN, tmp_path / "other", variant="9c")


def test_memory_holds_a_few_tensors_at_a_time(tmp_path: Path) -> None:
    """MLX's peak stays near the largest tensor (66 kB, and its copy) while 1.7 MB are converted."""
    source = open_model(GOLDEN)
    largest = max(array.nbytes for part in PARTS for array in source.weights(part).values())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    convert_checkpoint(source, tmp_path / "ours")
    assert mx.get_peak_memory() - before < 4 * largest + PAGES
    assert mx.get_active_memory() - before < 10_000


@pytest.mark.parametrize("bits", [4, 8])
def test_quantising_frees_each_original(tmp_path: Path, bits: int) -> None:
    """As above: an original, its copy and its quantised form, not a part's worth of originals."""
    model = quantizable_model(tmp_path / "model")
    source = open_model(model)
    largest = max(array.nbytes for part in PARTS for array in source.weights(part).values())
    whole = sum(array.nbytes for array in source.weights("transformer").values())
    assert whole > 8 * largest
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    convert_checkpoint(source, tmp_path / "ours", quantize=bits)
    assert mx.get_peak_memory() - before < 4 * largest + PAGES


# ---- the command ----


def test_the_command_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, target = quantizable_model(tmp_path / "model"), tmp_path / "ours"
    assert main([str(model), str(target), "--quantize", "4"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (f"{target}\n", "")  # no progress where stderr is no terminal
    assert_equal(loaded(target, mx.bfloat16), loaded(model, mx.bfloat16, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent/model/x", "y"], "absent/model/x: no such file or folder"),
        ([str(GOLDEN), "absent/x"], "is not a folder; create it first"),
        ([str(GOLDEN), "x", "--quantize", "7"], "quantize is '7'; it must be 3, 4, 5, 6, 8, mx"),
        ([str(GOLDEN), "x", "--quantize", "4"], "has 160 inputs"),
        ([str(GOLDEN), "x", "--variant", "9c"], "variant is '9c'; it must be one of tiny"),
        ([str(GOLDEN)], "klein-mlx convert needs DESTINATION"),
        ([str(GOLDEN), "x", "--forc"], "unrecognized arguments: --forc"),
    ],
)
def test_the_command_tells_what_is_wrong_in_one_line(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert nothing_but(tmp_path)


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "klein_convert", str(GOLDEN), str(tmp_path / "ours")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{tmp_path / 'ours'}\n", "")
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
