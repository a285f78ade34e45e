"""`info`: what a model is, true to its files and told without reading a weight."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from folders import GOLDEN, parameters, quantizable_model
from foreign import comfy_files

from klein_convert.checkpoint import convert_checkpoint
from klein_mlx.cli.main import main
from klein_mlx.config import PARTS
from klein_mlx.formats.describe import describe, format_description
from klein_mlx.formats.open import open_any, open_model
from klein_mlx.weights.checkpoint import load_part
from klein_mlx.weights.safetensors import open_weights


def test_a_diffusers_folder_is_described() -> None:
    told = describe(open_model(GOLDEN))
    assert (told["variant"], told["steps"], told["guidance"]) == ("distilled", 4, 1.0)
    assert (told["format"], told["source"], told["licence"]) == ("diffusers", "model", "not stated")
    for part in PARTS:
        module = load_part(part, open_model(GOLDEN), mx.bfloat16)
        sizes = [array.size for array in parameters(module).values()]
        assert told["parts"][part]["parameters"] == sum(sizes)
        assert told["parts"][part]["bytes"] == 2 * sum(sizes)
        assert (told["parts"][part]["dtype"], told["parts"][part]["bits"]) == ("bfloat16", None)
    assert told["parameters"] == sum(part["parameters"] for part in told["parts"].values())
    assert json.loads(json.dumps(told)) == told


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_checkpoint_has_the_same_parameters_in_fewer_bytes(tmp_path: Path, bits: int) -> None:
    model = quantizable_model(tmp_path / "model")
    path = convert_checkpoint(model, tmp_path / "ours", quantize=bits)
    whole, told = describe(open_model(model)), describe(open_model(path))
    assert told["source"] == "model"
    assert told["made_by"].startswith("klein-mlx ")
    for part in PARTS:
        before, after = whole["parts"][part], told["parts"][part]
        assert after["parameters"] == before["parameters"]
        assert after["bits"] == (None if part == "vae" else bits)
        assert (after["bytes"] < before["bytes"]) == (part != "vae")
        (file,) = open_weights(path, part).shards
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert after["bytes"] == file.stat().st_size - header
    assert f"{bits}-bit in groups of 64, the rest bfloat16" in format_description(told)


def test_nothing_is_evaluated() -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    describe(open_model(GOLDEN))
    assert mx.get_peak_memory() - before < 10_000  # the weights are 1.7 MB


def test_the_command_prints_lines_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(GOLDEN)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FLUX.2 [klein], variant distilled: 4 steps, guidance 1"
    assert [line.split()[0] for line in lines[-4:]] == [*PARTS, "total"]
    assert main(["info", str(GOLDEN), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == describe(open_model(GOLDEN))


def test_a_published_model_that_is_not_on_disk(capsys: pytest.CaptureFixture[str]) -> None:
    """Its memory is estimated from its dimensions; nothing is downloaded."""
    assert main(["info", "klein-4B", "--size", "1024x1024", "-q", "4", "--dtype", "bfloat16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FLUX.2 [klein], variant 4b (distilled): 4 steps, guidance 1"
    assert "klein-mlx models pull 4b" in lines[1]
    assert lines[3].startswith("  memory   1024 x 1024 in bfloat16, keep ")
    assert main(["info", "klein-4B", "--train"]) == 0
    assert capsys.readouterr().out.startswith("klein-4B: LoRA of rank 16, 512 x 512\n")
    assert main(["info", "4b-1step", "--json"]) == 0
    told = {"variant": "4b-1step", "family": "FLUX.2 [klein]", "path": None, "licence": "Apache-2.0"}
    assert json.loads(capsys.readouterr().out) == {**told, "is_distilled": True, "steps": 1, "guidance": 1}


def test_a_folder_with_a_published_models_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("4b").symlink_to(GOLDEN)
    assert main(["info", "4b"]) == 0
    assert capsys.readouterr().out.startswith("FLUX.2 [klein], variant distilled")
    assert main(["info", "4b", "--train", "--method", "full", "--size", "64"]) == 0
    assert capsys.readouterr().out.startswith("4b: all weights, 64 x 64\nmemory, estimated")


def test_the_command_tells_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path / "absent")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {tmp_path / 'absent'}: no such file or folder; use 'tiny', a folder, ")
    assert err.count("\n") == 1


def test_a_file_is_told_whatever_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, path in comfy_files(tmp_path).items():
        told = describe(open_any(path))
        assert (told["part"], told["dtype"]) == (part, "BF16")
        assert told["parameters"] >= describe(open_model(GOLDEN))["parts"][part]["parameters"]
        assert told["bytes"] == path.stat().st_size
        assert main(["info", str(path)]) == 0
        assert capsys.readouterr().out.startswith(f"{part} alone\n")
        assert main(["info", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(told))
