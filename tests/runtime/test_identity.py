"""A model whose files change while it is open, and fingerprints that tell models apart."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from klein_mlx import KleinPipeline
from klein_mlx.errors import CheckpointError
from klein_mlx.images.saving import remove_stale, save_image
from klein_mlx.paths import TINY_FOLDER
from klein_mlx.runtime.encodings import PromptCache
from klein_mlx.weights import safetensors

ARGUMENTS = {"seed": 1, "num_inference_steps": 1, "width": 64, "height": 64}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY_FOLDER, tmp_path / "model", ignore=shutil.ignore_patterns("__*")))


def in_place(path: Path) -> None:
    content = path.read_bytes()
    with path.open("rb+") as file:
        file.write(content)
    os.utime(path, ns=(0, 1))


def by_rename(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy2(path, other)
    other.replace(path)


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [in_place, by_rename, gone])
@pytest.mark.parametrize("name", ["transformer", "text_encoder", "vae"])
def test_a_part_that_changed_is_not_loaded(model: Path, name: str, change: Callable[[Path], None]) -> None:
    """Whichever part it is, and though the new file may be as good: it is another model's, as far as is known."""
    pipe = KleinPipeline.from_pretrained(model, keep="nothing")
    change(model / f"{name}.safetensors")
    with pytest.raises(
        CheckpointError,
        match=rf"{name}.safetensors: (has changed|cannot be read|is missing)",
    ):
        pipe("a star", **ARGUMENTS)


def test_a_part_that_changes_between_pictures(model: Path) -> None:
    pipe = KleinPipeline.from_pretrained(model, keep="all")
    pipe("a star", **ARGUMENTS)
    by_rename(model / "text_encoder.safetensors")
    with pytest.raises(CheckpointError, match="has changed since the model was opened; open the model again"):
        pipe("a circle", **ARGUMENTS)


def test_the_original_behind_a_lora_is_the_one_that_was_opened(model: Path) -> None:
    lora = Path(__file__).parents[2] / "examples" / "tiny" / "silhouettes.safetensors"
    pipe = KleinPipeline.from_pretrained(model, keep="all")
    pipe.load_lora(lora)
    pipe("a star", **ARGUMENTS)
    by_rename(model / "transformer.safetensors")
    with pytest.raises(CheckpointError, match="transformer.safetensors: has changed since the model was opened"):
        pipe.unload_lora()


def test_the_fingerprint_is_of_what_was_opened(model: Path) -> None:
    pipe = KleinPipeline.from_pretrained(model)
    by_rename(model / "vae.safetensors")
    with pytest.raises(CheckpointError, match="has changed since"):
        _ = pipe.recorder.fingerprint


def test_every_byte_of_a_small_file_counts_and_samples_of_a_large_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(100_000))
    first = safetensors.digest([path])
    with path.open("rb+") as file:
        file.seek(70_001)
        file.write(b"\1")
    assert safetensors.digest([path]) != first
    monkeypatch.setattr(safetensors, "WHOLE", 1000)
    monkeypatch.setattr(safetensors, "SAMPLES", 3)
    monkeypatch.setattr(safetensors, "SAMPLE", 10)
    assert safetensors.is_sampled(path)
    portable, local = safetensors.digest([path]), safetensors.digest([path], local=True)
    in_place(path)
    assert safetensors.digest([path]) == portable
    assert safetensors.digest([path], local=True) != local
    with path.open("rb+") as file:
        file.seek(99_999)
        file.write(b"\1")
    assert safetensors.digest([path]) != portable


def test_an_entry_of_another_prompt_is_not_taken(tmp_path: Path) -> None:
    import mlx.core as mx

    cache = PromptCache(tmp_path, {"encoder": 1})
    one, other = mx.zeros((1, 4, 8)), mx.ones((1, 4, 8))
    cache.write("one", 4, one)
    cache.write("other", 4, other)
    shutil.copy(cache.path("other", 4), cache.path("one", 4))
    with pytest.raises(CheckpointError, match="is another prompt's entry"):
        cache.read("one", 4, (1, 4, 8), mx.float32)
    found = cache.read("other", 4, (1, 4, 8), mx.float32)
    assert found is not None
    assert mx.array_equal(found, other)


def test_what_a_killed_run_left_is_removed_unless_somebody_holds_it(tmp_path: Path) -> None:
    import fcntl

    left, held = (tmp_path / f".klein-{sign * 16}.part" for sign in "ab")
    others = [tmp_path / ".klein-x.part", tmp_path / "klein-aaaaaaaaaaaaaaaa.part"]
    for path in (left, held, *others):
        path.write_bytes(b"x")
    (tmp_path / f".klein-{'c' * 16}.part").symlink_to(others[0])
    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_stale(tmp_path)
    assert not left.exists()
    assert held.exists()
    assert all(path.exists() for path in others)
    from PIL import Image

    save_image(Image.new("RGB", (8, 8)), tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()
