"""Saving pictures: whole files or none, and what is refused before any work."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_images import gradient

from klein_mlx.errors import RequestError
from klein_mlx.images import reading as images
from klein_mlx.images import saving


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_saving(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    saving.save_image(gradient(), path)
    loaded = np.asarray(images.load_image(path)[0]).astype(int)
    assert np.abs(loaded - np.asarray(gradient()).astype(int)).mean() < 4
    assert os.listdir(tmp_path) == [path.name]
    with pytest.raises(RequestError, match="exists"):
        saving.save_image(Image.new("RGB", (8, 8)), path)
    saving.save_image(Image.new("RGB", (8, 8)), path, overwrite=True)
    assert images.load_image(path)[0].size == (8, 8)
    assert os.listdir(tmp_path) == [path.name]


def test_a_failed_save_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    saving.save_image(gradient(), path)
    before = path.read_bytes()

    def full(self: Image.Image, file: io.BufferedWriter, **_: object) -> None:
        file.write(b"half a pic")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(RequestError, match="cannot be written: No space left on device"):
        saving.save_image(gradient(), path, overwrite=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.png"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.gif", "ends in .gif; it must end in .png, .jpg, .jpeg, .webp"),
        ("x", "is not a folder, and has no suffix; it must end in"),
        ("none/x.png", "does not exist; make it first"),
        ("folder.png", "is a folder; name a file"),
    ],
)
def test_outputs_that_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(RequestError, match=message):
        saving.check_output(tmp_path / name, overwrite=False)
