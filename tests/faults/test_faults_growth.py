"""Requests that grow: braces, equal names, endless files, numbers too large."""

import json
import sys
from pathlib import Path

import pytest
from faults import TINY, refused, run_fault
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from klein_mlx.cli.batch import Named, plan_names
from klein_mlx.cli.prompts import expand
from klein_mlx.images.saving import save_image

HUGE = "9" * 400


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("{" * 20_000 + "|", "has no closing brace"),
        ("{a|" * 20_000, "has no closing brace"),
        ("{a|" * 20_000 + "}" * 20_000, "end (over 20 levels)"),
    ],
)
def test_braces(tmp_path: Path, prompt: str, words: str) -> None:
    done = run_fault("generate", prompt, *TINY, "-o", "x.png", folder=tmp_path)
    assert done.code in (0, 2)
    assert words in done.stderr or done.code == 0


def test_balanced_braces_are_text() -> None:
    text = "{" * 20_000 + "}" * 20_000
    assert expand(f"{text} x", 1, []) == f"{text} x"
    assert expand("{a|{b|c}|{d}} {1|1} {x}", 3, []) in {f"{w} 1 {{x}}" for w in ("a", "b", "c", "{d}")}


def test_thousands_of_equal_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each name is looked for once: the number of questions to the disk grows with that of pictures."""
    import os

    asked, real = [], os.path.lexists
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "lexists", lambda path: asked.append(path) or real(path))
    (tmp_path / "star-1.png").touch()
    names = plan_names([Named(None, "star", 1, "tiny", 4)] * 500, ".png", False)
    assert [name.path.name for name in names[:2]] == ["star-1-2.png", "star-1-3.png"]
    assert len({name.path for name in names}) == 500
    assert len(asked) < 5 * 500


def test_endless_prompt_files(tmp_path: Path) -> None:
    refused("generate", "--prompt-file", "/dev/zero", *TINY, folder=tmp_path, words="/dev/zero is a device")
    refused("generate", "--prompt-file", "a\0b"[:1] + "/x", *TINY, folder=tmp_path, words="cannot be read")


def test_a_closed_stdin_has_no_prompt(tmp_path: Path) -> None:
    refused("generate", "--prompt-file", "-", *TINY, folder=tmp_path, words="--prompt-file - has no prompt")


@pytest.mark.parametrize("name", ["strength", "guidance", "seed", "steps"])
def test_numbers_beyond_a_float(tmp_path: Path, name: str) -> None:
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "a star", "{name}": {HUGE}}}\n')
    done = run_fault("generate", "--prompt-file", "p.jsonl", *TINY[:2], folder=tmp_path)
    assert (done.code, done.changes) == (2, ())
    assert "Traceback" not in done.stderr
    assert "p.jsonl:1: " in done.stderr
    (tmp_path / "c.toml").write_text(f"{name} = {HUGE}\n")
    for digits in (HUGE, "9" * 5000):
        (tmp_path / "c.toml").write_text(f"{name} = {digits}\n")
        told = run_fault("generate", "a star", "--config", "c.toml", *TINY[:2], "-o", "x.png", folder=tmp_path)
        assert (told.code, told.changes, len(told.errors)) == (2, (), 1), told
    recipe = {"recipe": 1, "prompt": "a star", "seed": 1, "steps": 1, "model": {"id": "tiny"}, name: int(HUGE)}
    info = PngInfo()
    info.add_itxt("klein_mlx", json.dumps(recipe))
    Image.new("RGB", (64, 64)).save(tmp_path / "r.png", pnginfo=info)
    again = run_fault("again", "r.png", "-o", "x.png", folder=tmp_path)
    assert (again.code, again.changes, len(again.errors)) == (2, (), 1), again


@pytest.mark.parametrize("sign", ["狐", "🦊", "&", "a"])
def test_a_recipe_too_long_for_jpeg(tmp_path: Path, sign: str) -> None:
    """What does not fit is left out of the JPEG, and the next picture of it too."""
    recipe = {"recipe": 1, "prompt": sign * 90_000, "seed": 1, "model": {"id": "tiny"}}
    save_image(Image.new("RGB", (64, 64)), tmp_path / "x.png", recipe={**recipe, "steps": 1, "width": 64, "height": 64})
    done = run_fault("again", "x.png", "-o", "y.jpg", folder=tmp_path)
    assert done.code == 0, done.stderr
    assert "the recipe is too long for .jpg" in done.stderr
    assert done.changes == ("+y.jpg",)


@pytest.mark.skipif(sys.platform != "linux", reason="macOS limits no address space")
def test_a_small_address_space(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """OpenBLAS would ask for its buffer for ever. What computes nothing still runs."""
    import resource

    from klein_mlx.cli.main import main

    monkeypatch.setattr(resource, "getrlimit", lambda _: (400_000_000, resource.RLIM_INFINITY))
    for words in ("generate x --model tiny", "convert tiny out", "info tiny", "doctor", "again x.png"):
        assert main(words.split()) == 2, words
        assert "this process may address 400.0 MB (ulimit -v), but the libraries alone" in capsys.readouterr().err
    assert main(["completion", "bash"]) == 0
