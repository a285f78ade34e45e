"""What reaches the terminal: nothing that it would obey, and an answer where nothing can be printed."""

import ast
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from faults import ROOT, accepted, command, environment, refused, run_fault
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from klein_mlx.cli.output import printable
from klein_mlx.errors import RequestError
from klein_mlx.images.saving import save_image
from klein_mlx.paths import TINY_FOLDER

EVIL = "a\x1b]0;owned\x07b\x9b31mc\u202ed\u2028e"
SHOWN = "a\\x1b]0;owned\\x07b\\x9b31mc\\u202ed\\u2028e"
OBEYED = "\x1b\x07\x9b\u202e\u2028"


def clean(text: str) -> bool:
    return not any(sign in text for sign in OBEYED)


def evil_model(folder: Path) -> Path:
    """tiny in a folder of such a name, whose klein.json and LICENSE say such things too."""
    path = folder / EVIL
    shutil.copytree(TINY_FOLDER, path, ignore=shutil.ignore_patterns("__*"))
    values = json.loads((path / "klein.json").read_text())
    values["source"] = {"name": f"{EVIL}\nline", "parts": {}}
    (path / "klein.json").write_text(json.dumps(values))
    return path


def test_printable() -> None:
    assert printable(EVIL) == SHOWN
    assert printable("a\nb\rc\td\x7f\udcff") == "a\\nb\\rc\td\\x7f\\udcff"
    assert printable("赤い 🦊👩‍👩‍👧 a\u202f\u00a0b") == "赤い 🦊👩‍👩‍👧 a\u202f\u00a0b"  # as names on a Mac have them
    assert str(RequestError(EVIL)) == SHOWN.replace("\\u2028", " ")


def test_one_place_prints() -> None:
    """Everything else in the command goes through it; a picture's bytes, and a child's lines, are no text."""
    allowed = {"output.py"}
    for path in sorted((ROOT / "klein_mlx" / "cli").glob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        prints = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        if path.name == "download.py":  # the child's messages to its parent
            assert len(prints) == 1
        elif path.name not in allowed:
            assert not prints, f"{path.name}:{prints[0].lineno}"


def test_models_from_anyone(tmp_path: Path) -> None:
    model = evil_model(tmp_path / "models")
    home = {"KLEIN_MLX_HOME": str(tmp_path)}
    for words in (
        ("info", model),
        ("info", model, "--json"),
        ("models",),
        ("models", "--json"),
        ("models", "path", EVIL),
    ):
        done = run_fault(*words, folder=tmp_path, changes=home)
        assert done.code == 0, done.stderr
        assert clean(done.stdout + done.stderr)
        assert SHOWN in done.stdout or json.dumps(EVIL)[1:-1] in done.stdout.replace("\u009b", "\\u009b")
    assert "line" in accepted("info", model, folder=tmp_path).stdout
    assert len(accepted("info", model, folder=tmp_path).stdout.splitlines()) == 9
    converted = run_fault("convert", model, f"{EVIL}-2", "--quiet", folder=tmp_path)
    assert converted.code == 0, converted.stderr
    assert clean(converted.stdout + converted.stderr)
    assert f"{SHOWN}-2" in converted.stdout


def test_loras_from_anyone(tmp_path: Path) -> None:
    arrays: Any = mx.load(str(ROOT / "examples" / "tiny" / "silhouettes.safetensors"))
    metadata = {"modelspec.title": EVIL, "modelspec.author": EVIL, "modelspec.license": f"{EVIL}\nFORGED"}
    mx.save_safetensors(str(tmp_path / f"{EVIL}.safetensors"), arrays, metadata)
    odd = {f"{EVIL}.lora_A.weight": mx.ones((4, 8)), f"{EVIL}.lora_B.weight": mx.ones((8, 4))}
    mx.save_safetensors(str(tmp_path / "keys.safetensors"), {**arrays, **odd})
    for name in (f"{EVIL}.safetensors", "keys.safetensors"):
        done = run_fault("lora", "info", name, folder=tmp_path)
        assert done.code == 0, done.stderr
        assert clean(done.stdout + done.stderr)
        assert not any(line.startswith("FORGED") for line in done.stdout.splitlines())
    tiny = ("generate", "a star", "--model", "tiny", "--steps", "1", "--lora")
    drawn = run_fault(*tiny, f"{EVIL}.safetensors", folder=tmp_path)
    assert drawn.code == 0, drawn.stderr
    assert clean(drawn.stderr)
    unknown = run_fault(*tiny, "keys.safetensors", folder=tmp_path)
    assert unknown.code == 2
    assert clean(unknown.stderr)


def test_prompts_and_wildcards_are_echoed_escaped(tmp_path: Path) -> None:
    (tmp_path / "wildcards").mkdir()
    (tmp_path / "wildcards" / "evil.txt").write_text("a\x1b]0;owned\x07b\n")
    (tmp_path / "p.txt").write_text("__evil__ star\n")
    tiny = ("--model", "tiny", "--steps", "1", "--size", "64x64", "-o", "x.png", "--force")
    for words in (
        ("__evil__ star",),
        ("--prompt-file", "p.txt", "--progress", "json"),
        ("--prompt-file", "p.txt", "--json"),
    ):
        done = run_fault("generate", *words, *tiny, folder=tmp_path)
        assert done.code == 0, done.stderr
        assert clean(done.stdout + done.stderr)
        assert "]0;owned" in done.stdout + done.stderr


def recipe_picture(path: Path, recipe: dict[str, object]) -> None:
    save_image(Image.new("RGB", (64, 64)), path, recipe={"recipe": 1, "prompt": "a star", "seed": 1, **recipe})


def test_recipes_from_anyone_are_shown_escaped(tmp_path: Path) -> None:
    recipe_picture(
        tmp_path / "x.png", {EVIL: 1, "prompt": f"{EVIL}\nsecond", "file": "/etc/passwd", "loras": [{"file": EVIL}]}
    )
    info = PngInfo()
    info.add_itxt("parameters", f"{EVIL}\nSteps: 20, A\x1bb: {EVIL}")
    Image.new("RGB", (8, 8)).save(tmp_path / "y.png", pnginfo=info)
    for name in ("x.png", "y.png"):
        for json_too in ((), ("--json",)):
            done = accepted("show", name, *json_too, folder=tmp_path)
            assert clean(done.stdout)
    shown = json.loads(accepted("show", "x.png", "--json", folder=tmp_path).stdout)
    assert (shown["file"], shown["prompt"]) == ("x.png", f"{EVIL}\nsecond")


def test_show_is_bounded(tmp_path: Path) -> None:
    many = {f"key {number}": number for number in range(300_000)}
    recipe_picture(tmp_path / "many.png", many)
    recipe_picture(tmp_path / "long.png", {"k" * 4_000_000: 1, "v": "v" * 3_000_000})
    deep = ("[" * 900 + "]" * 900).join(('{"recipe": 1, "x": ', "}"))
    info = PngInfo()
    info.add_itxt("klein_mlx", deep)
    Image.new("RGB", (8, 8)).save(tmp_path / "deep.png", pnginfo=info)
    for name in ("many.png", "long.png"):
        lines = accepted("show", name, folder=tmp_path).stdout.splitlines()
        assert len(lines) <= 101
        assert max(map(len, lines)) < 2100
    assert lines[-1] == "made by" + lines[-1][7:]
    assert run_fault("show", "deep.png", folder=tmp_path).code == 2
    os.mkfifo(tmp_path / "fifo.png")
    refused("show", "fifo.png", folder=tmp_path, words="fifo.png is not a regular file")
    refused("again", "fifo.png", folder=tmp_path, words="fifo.png is not a regular file")


@pytest.mark.parametrize(
    "recipe",
    [
        {"model": {"id": "tiny"}, "prompt_cache": "made", "output": "made.png", "grid": "made.png"},
        {"model": {"id": "tiny"}, "keep": "nothing", "config": "x.toml", "enhance": True, "vae": "/etc", "force": True},
        {"model": {"id": "tiny"}, "prompt_file": "x", "lora_folder": "made", "small_decoder": True, "show": True},
    ],
)
def test_a_recipe_decides_pixels_alone(tmp_path: Path, recipe: dict[str, object]) -> None:
    recipe_picture(tmp_path / "x.png", {"steps": 1, "width": 64, "height": 64, **recipe})
    done = run_fault("again", "x.png", "-o", "y.png", folder=tmp_path)
    assert done.code == 0, done.stderr
    assert done.changes == ("+y.png",)


@pytest.mark.parametrize("name", ["/etc", "..", "", "a/b", 7, None, "\x1b[31m"])
def test_a_recipe_names_no_folder_by_its_path(tmp_path: Path, name: object) -> None:
    evil_model(tmp_path / "a" / "b" / "..")
    recipe_picture(tmp_path / "x.png", {"model": {"name": name}})
    done = run_fault("again", "x.png", folder=tmp_path)
    assert (done.code, done.changes) == (2, ())
    assert "the picture was made with the model in a folder" in done.stderr
    assert clean(done.stderr)


LORA, MODELS = ("lora", "info", "s.safetensors"), ("models", "--quiet")
WORDS = (("info", "tiny"), MODELS, LORA, ("--help",), ("generate", "--help"), ("--version",), ("completion", "bash"))


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_stdout_closed_or_full(tmp_path: Path, words: tuple[str, ...]) -> None:
    """One line or none, and never Python's own complaint at its exit."""
    shutil.copy(ROOT / "examples" / "tiny" / "silhouettes.safetensors", tmp_path / "s.safetensors")
    line = shlex.join(command(*words))
    endings = {
        f"{line} > /dev/full": (2, "error: the result cannot be printed: No space left on device\n"),
        f"{line} >&-": (0, ""),
        f"{line} > out.txt 2> /dev/full": (0, ""),
        f"{line} > out.txt 2>&- <&-": (0, ""),
        f"{{ {line}; echo $? > code; }} | exec 0<&-": (0, ""),
    }
    buffered = {name: value for name, value in environment().items() if name != "PYTHONUNBUFFERED"}
    for shell, (code, told) in endings.items():
        if "/dev/full" in shell and not os.path.exists("/dev/full"):
            continue  # macOS has none
        done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, env=buffered, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (code, told), shell
    assert (tmp_path / "code").read_text() in ("141\n", "0\n")  # 0: what was printed had found room in the pipe
