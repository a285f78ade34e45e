"""`doctor --model`: a vector that diffusers made of tiny, digests, configs, and what fewer bits cost."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from folders import GOLDEN

from klein_mlx.bench import published
from klein_mlx.bench.checks import Row, Setting
from klein_mlx.bench.predict import klein
from klein_mlx.cli.main import main
from klein_mlx.formats.open import open_model
from klein_mlx.paths import TINY_FOLDER

SETTING = Setting(mx.float32, 1.0, gpu=False)

# diffusers' Flux2KleinPipeline on tiny, exported to its layout, in float32; noise of torch's CPU generator.
VECTOR: dict[str, Any] = {
    "variant": "tiny",
    "prompt": "a red circle left of a blue square",
    "seed": 0,
    "noise_dtype": "float32",
    "width": 128,
    "height": 96,
    "steps": 4,
    "length": 48,
    "dtype": "float32",
    "corner": [[0.961335, 0.950232, 0.933021], [0.964662, 0.962749, 0.926412], [0.943563, 0.927033, 0.846026]],
    "tolerance": 1e-4,
    "source": "diffusers on tiny",
}


def vectors(folder: Path, **changes: Any) -> list[Row]:
    table = folder / "vectors.json"
    table.write_text(json.dumps([VECTOR | changes]))
    return [*published._vectors(open_model("tiny"), SETTING, table)]


def test_a_vector_of_diffusers_is_met(tmp_path: Path) -> None:
    """From torch's noise without torch: 1e-4 in float32 over four steps and the decoder."""
    (row,) = vectors(tmp_path)
    assert row.holds is True, row.text


@pytest.mark.parametrize("changes", [{"seed": 1}, {"prompt": "a green triangle"}])
def test_another_request_misses_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    (row,) = vectors(tmp_path, **changes)
    assert row.holds is False


def test_a_model_without_vectors_says_so() -> None:
    (row,) = published._vectors(open_model("tiny"), SETTING)
    assert row.holds is None


def test_the_table_is_whole() -> None:
    """Every row has what tiny's has, and a corner whose values are pixels."""
    for row in published.read_vectors():
        assert set(row) == set(VECTOR)
        assert all(0 <= value <= 1 for line in row["corner"] for value in line)
        assert row["width"] % 16 == row["height"] % 16 == 0


# ---- files ----


def test_a_checkpoint_is_what_its_record_says(tmp_path: Path) -> None:
    shutil.copytree(TINY_FOLDER, tmp_path / "tiny")
    source = open_model(tmp_path / "tiny")
    assert [row.holds for row in published._files(source, SETTING)] == [True]
    with (tmp_path / "tiny" / "vae.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    (row,) = published._files(source, SETTING)
    assert row.holds is False
    assert "vae.safetensors" in row.text


@pytest.fixture
def cached(tmp_path: Path) -> Any:
    """Files as the Hub's cache has them: links to contents that are named by their digest."""
    names = []
    for name in ("a.safetensors", "b.safetensors"):
        blob = tmp_path / hashlib.sha256(name.encode()).hexdigest()
        blob.write_bytes(name.encode())
        (tmp_path / name).symlink_to(blob)
        names.append(tmp_path / name)
    return SimpleNamespace(files=lambda: names)


def test_a_download_has_the_hubs_digests(cached: Any) -> None:
    assert [row.text for row in published._files(cached, SETTING)] == ["2 files have the Hub's digests"]
    cached.files()[1].resolve().write_bytes(b"b.safetensorz")
    (row,) = published._files(cached, SETTING)
    assert row.holds is False
    assert "1 of 2" in row.text
    assert "b.safetensors" in row.text


def test_files_without_digests_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    (row,) = published._files(SimpleNamespace(files=lambda: [tmp_path / "a.safetensors"]), SETTING)  # type: ignore[arg-type]
    assert row.holds is None


# ---- configs and bits ----


def test_configs_are_compared_field_by_field() -> None:
    config = klein("4b")
    (row,) = published._architecture(SimpleNamespace(config=config), SETTING)  # type: ignore[arg-type]
    assert row.holds is True
    odd = replace(config, transformer=replace(config.transformer, rope_theta=10000.0))
    (row,) = published._architecture(SimpleNamespace(config=odd), SETTING)  # type: ignore[arg-type]
    assert row.holds is False
    assert row.text == "transformer.rope_theta is 10000.0, not 2000.0"


@pytest.mark.slow
def test_bits_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own decibels, 8 bits over 4; a picture of something else fails."""
    found = [*published._bits(open_model("tiny"), SETTING)]
    decibels = [row.figures["psnr"] for row in found[1:]]
    assert len(found) == 4
    assert decibels[0] > decibels[1] > 10
    monkeypatch.setattr(published, "psnr", lambda image, other: 8.0)
    assert [row.holds for row in published._bits(open_model("tiny"), SETTING)][1:] == [False] * 3


def test_bits_that_a_model_cannot_have_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = published._picture
    monkeypatch.setattr(published, "_picture", lambda *args: picture(*args[:3], 64))
    _, *found = published._bits(open_model(GOLDEN), SETTING)
    assert [row.holds for row in found] == [None] * 3
    assert "has 160 inputs; 4-bit weights need a multiple of 64" in found[1].text


def test_the_command_takes_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", "tiny", "--only", "files", "--only", "architecture", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows] == ["files", "architecture"]
    assert main(["doctor", "--only", "vectors"]) == 2
    assert "--model" in capsys.readouterr().err
