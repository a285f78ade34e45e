"""Every example runs on tiny and leaves the pictures that it says."""

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
MADE = {
    "text_to_picture": {"picture.png": (128, 128)},
    "one_reference": {"edited.png": (128, 128)},
    "two_references": {"combined.png": (128, 128)},
    "mask": {"repainted.png": (128, 128)},
    "outpaint": {"wider.png": (128, 128)},
    "train_lora": {"drawn.png": (128, 128)},
    "many_seeds": {f"star-{seed}.png": (128, 128) for seed in (1, 2, 3, 4)},
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(MADE)


@pytest.mark.parametrize("name", MADE)
def test_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    made = {}
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            made[path.name] = image.size
    assert made == MADE[name]
    if name == "mask":
        assert capsys.readouterr().out == "outside the mask every pixel is as it was: True\n"
