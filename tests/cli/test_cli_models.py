"""Damaged models given to the real command: one line, exit code 2, no picture."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

TINY = Path(__file__).parents[2] / "klein_mlx" / "tiny"


def truncate(folder: Path) -> None:
    path = folder / "transformer.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def remove(folder: Path) -> None:
    (folder / "vae.safetensors").unlink()


def drop_a_key(folder: Path) -> None:
    path = folder / "text_encoder.safetensors"
    weights = mx.load(str(path))
    assert isinstance(weights, dict)
    mx.eval(weights)
    weights.pop("layers.0.mlp.up_proj.weight")
    mx.save_safetensors(str(path), weights)


def add_a_key(folder: Path) -> None:
    path = folder / "vae.safetensors"
    weights = mx.load(str(path))
    assert isinstance(weights, dict)
    mx.eval(weights)
    mx.save_safetensors(str(path), {**weights, "surplus.weight": mx.zeros((3,))})


def change_a_shape(folder: Path) -> None:
    path = folder / "klein.json"
    config = json.loads(path.read_text())
    config["vae"]["block_out_channels"][0] *= 2
    path.write_text(json.dumps(config))


def break_the_config(folder: Path) -> None:
    (folder / "klein.json").write_text('{"format_version": 1,')


def break_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def replace_by_a_web_page(folder: Path) -> None:
    (folder / "transformer.safetensors").write_text("<!DOCTYPE html><html>Not Found</html>")


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "transformer.safetensors"),
        (remove, "vae.safetensors"),
        (drop_a_key, "layers.0.mlp.up_proj.weight"),
        (add_a_key, "surplus.weight"),
        (change_a_shape, "vae"),
        (break_the_config, "klein.json"),
        (break_the_tokenizer, "tokenizer.json"),
        (replace_by_a_web_page, "transformer.safetensors"),
        (empty, "neither klein.json nor model_index.json"),
    ],
)
def test_a_damaged_model(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY, model, ignore=shutil.ignore_patterns("__*"))
    damage(model)
    command = [
        sys.executable,
        "-m",
        "klein_mlx",
        "generate",
        "--model",
        "model",
        "a star",
        "--quiet",
        "--steps",
        "1",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr
    assert os.listdir(tmp_path) == ["model"]
