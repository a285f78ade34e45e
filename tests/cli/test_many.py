"""Many pictures in one command: prompt files, wildcards, names, the contact sheet, what programs get."""

import io
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from test_cli import TINY, klein, size_of

from klein_mlx import KleinPipeline
from klein_mlx.cli.prompts import read_jobs
from klein_mlx.cli.settings import complete
from klein_mlx.errors import RequestError
from klein_mlx.images.saving import read_metadata
from klein_mlx.runtime.run import Picture

FAST = ("--steps", "1", "--width", "64", "--height", "64")


def test_a_prompt_file(tmp_path: Path) -> None:
    lines = [
        "# shapes",
        "a star",
        "",
        '{"prompt": "a cross", "seed": 9, "size": "64x96", "output": "mine.webp"}',
        '{"prompt": "a ring", "stesp": 3}',
        '{"prompt": "a ring", "steps": "four"}',
        '{"prompt": "a ring", "width": 100}',
        '{"prompt": "a ring", "model": "tiny"}',
        '{"prompt": "a ring", "output": "../out.png"}',
        '{"prompt": "a ring", "image": "none.png"}',
        '{"prompt": ',
        '{"seed": 3}',
        "a {red|red} circle",
        '{"prompt": "a ring", "steps": 1, "num_inference_steps": 2}',
        '{"prompt": "a ring", "seed": 1, "seed": 2}',
    ]
    (tmp_path / "p.txt").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    done = klein(*TINY, *FAST, "--prompt-file", "p.txt", "--seed", "7", "--json", "--grid", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["files"] == ["a-star-7.png", "mine.webp", "a-red-circle-7.png", "grid.png"]
    assert report["seeds"] == [7, 9, 7]
    assert report["prompts"] == ["a star", "a cross", "a red circle"]
    assert size_of(tmp_path / "mine.webp") == (64, 96)
    told = {entry["where"]: entry["error"] for entry in report["failed"]}
    assert list(map(str, sorted(int(where.removeprefix("p.txt:")) for where in told))) == [
        *("5", "6", "7", "8", "9", "10", "11", "12", "14", "15", "16")
    ]
    for line, words in (
        (5, "stesp is unknown; did you mean steps?"),
        (6, "steps is 'four'; it must be a whole number"),
        (7, "--width is 100; it must be a multiple of 16: 96 or 112"),
        (8, "model applies to the whole run"),
        (9, "a line's output must stay below the current folder"),
        (10, "image none.png does not exist"),
        (11, "the line is not a JSON object"),
        (12, "the line has no prompt"),
        (14, "num_inference_steps is steps, which the line gives already"),
        (15, "the line gives 'seed' twice"),
        (16, "is not UTF-8"),
    ):
        assert words in told[f"p.txt:{line}"]
        assert f"error: p.txt:{line}: " in done.stderr
    assert done.stderr.splitlines()[-1].startswith("3 of 4 pictures in ")
    assert done.stderr.splitlines()[-1].endswith("; 11 failed")
    recipe = read_metadata(tmp_path / "a-red-circle-7.png").recipe
    assert recipe
    assert (recipe["prompt"], recipe["template"]) == ("a red circle", "a {red|red} circle")


def test_each_picture_is_as_it_would_be_alone(tmp_path: Path) -> None:
    """From stdin, with wildcards from a file: the prompt that the recipe holds, with its seed, gives the same file."""
    (tmp_path / "wildcards").mkdir()
    (tmp_path / "wildcards" / "shape.txt").write_text("star\ncross\nring\ncircle\n")
    command = [sys.executable, "-m", "klein_mlx", *TINY, *FAST, "--prompt-file", "-", "-n", "3", "--seed", "5"]
    command += ["-o", "{index}-{slug}-{seed}.png"]
    text = b"a {red|green|blue} __shape__\na square\n"
    done = subprocess.run(command, cwd=tmp_path, input=text, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    files = done.stdout.decode().split()
    assert len(files) == 6
    assert files[3:] == ["4-a-square-5.png", "5-a-square-6.png", "6-a-square-7.png"]
    recipe = read_metadata(tmp_path / files[1]).recipe
    assert recipe
    assert recipe["seed"] == 6
    alone = (recipe["prompt"], "--seed", "6", "-o", "alone.png", "--quiet", "--no-wildcards")
    assert klein(*TINY, *FAST, *alone, cwd=tmp_path).returncode == 0
    with Image.open(tmp_path / files[1]) as many, Image.open(tmp_path / "alone.png") as one:
        assert many.tobytes() == one.tobytes()
    again = klein("again", files[1], "-o", "again.png", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / files[1]).read_bytes()


@pytest.mark.parametrize("keep", ["nothing", "transformer", "all"])
def test_each_part_is_loaded_once(monkeypatch: pytest.MonkeyPatch, keep: str) -> None:
    """For runs of different sizes, prompts and steps together; the encoder has left before the first step."""
    from klein_mlx.runtime import parts

    loads: list[str] = []
    real = parts.load_part
    monkeypatch.setattr(parts, "load_part", lambda name, *rest, **more: loads.append(name) or real(name, *rest, **more))
    pipe = KleinPipeline.from_pretrained("tiny", keep=keep)
    asked: list[dict[str, Any]] = [
        {"prompt": "a star", "seed": [1, 2], "width": 64, "height": 64},
        {"prompt": "a cross", "seed": 3, "width": 96, "height": 64, "num_inference_steps": 2},
        {"prompt": ["a ring", "a circle"], "seed": 4, "width": 64, "height": 64},
    ]
    runs = [pipe.stream(**arguments) for arguments in asked]
    images = []
    for run, event in pipe.together(runs):
        if isinstance(event, Picture):
            images.append((runs.index(run), np.asarray(event.image)))
        else:
            assert keep == "all" or "text_encoder" not in pipe.parts.loaded
    assert sorted(loads) == ["text_encoder", "transformer", "vae"]
    assert [number for number, _ in images] == [0, 0, 1, 2, 2]
    alone = [image for arguments in asked for image in KleinPipeline.from_pretrained("tiny")(**arguments).images]
    for (_, together), one in zip(images, alone, strict=True):
        assert np.array_equal(together, np.asarray(one))


@pytest.mark.parametrize("several", [False, True])
def test_what_holds_while_runs_work(several: bool) -> None:
    """MLX's limits: for several runs as for one, and never while the caller works."""
    pipe = KleinPipeline.from_pretrained("tiny")
    run = pipe.stream("a star", seed=1, width=64, height=64, num_inference_steps=2)
    inside: list[int] = []
    run.on_phase = lambda phase: inside.append(holds())
    own = mx.set_cache_limit(1 << 60)
    try:
        for _ in pipe.together([run]) if several else run:
            assert holds() == 1 << 60
        assert holds() == 1 << 60
    finally:
        mx.set_cache_limit(own)
    assert len(inside) > 4
    assert all(limit < 1 << 60 for limit in inside)


def holds() -> int:
    """MLX's limit on freed buffers."""
    limit = mx.set_cache_limit(0)
    mx.set_cache_limit(limit)
    return limit


def test_no_runs_make_nothing() -> None:
    """As when a file's every line was refused."""
    assert list(KleinPipeline.from_pretrained("tiny").together([])) == []


def test_pictures_that_wait_are_decoded_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    from klein_mlx import pipeline

    monkeypatch.setattr(pipeline, "MAX_WAITING", 2)
    pipe = KleinPipeline.from_pretrained("tiny", keep="nothing")
    order = [
        "picture" if isinstance(event, Picture) else "step"
        for event in pipe.stream("a star", seed=[1, 2, 3], num_inference_steps=1, width=64, height=64)
    ]
    assert order == ["step", "step", "picture", "picture", "step", "picture"]
    assert not pipe.parts.loaded


def test_what_programs_get(tmp_path: Path) -> None:
    done = klein(*TINY, *FAST, "a star", "-n", "2", "--seed", "7", "--progress", "json", "-o", "x.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["x-7.png", "x-8.png"]
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert events[0]["event"] == "start"
    assert (events[0]["pictures"], events[0]["steps"]) == (2, 2)
    phases = [e["phase"] for e in events if e["event"] == "phase"]
    assert set(phases) == {"load", "encode", "steps", "decode"}
    assert all(phase != later for phase, later in pairwise(phases)), "one that goes on is told once"
    steps = [e for e in events if e["event"] == "step"]
    assert [(e["picture"], e["step"], e["of"], e["sigma"]) for e in steps] == [(1, 1, 1, 0), (2, 1, 1, 0)]
    pictures = [e for e in events if e["event"] == "picture"]
    assert [(e["file"], e["seed"], e["prompt"]) for e in pictures] == [
        ("x-7.png", 7, "a star"),
        ("x-8.png", 8, "a star"),
    ]
    assert events[-1]["event"] == "end"
    assert (events[-1]["pictures"], events[-1]["failed"]) == (2, 0)


def test_a_picture_on_stdout(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "klein_mlx", *TINY, *FAST, "a star", "--seed", "7", "-o", "-"]
    done = subprocess.run([*command, "--format", "webp"], cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    with Image.open(io.BytesIO(done.stdout)) as image:
        assert (image.format, image.size) == ("WEBP", (64, 64))
    words = " ".join((*TINY, *FAST))
    piped = f'"{sys.executable}" -m klein_mlx.cli.main {words} star -o - | true; exit ${{PIPESTATUS[0]}}'
    closed = subprocess.run(["bash", "-c", piped], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (closed.returncode, "Traceback" in closed.stderr) == (141, False), closed.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", ['[\n {"prompt": "a"}\n]', '# c\n[{"prompt": "a"}]', '[ { "prompt": "a" },'])
def test_an_array_is_no_prompts(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(RequestError, match=r"p.json:[12]: a JSON array is not read; write one object per line"):
        read_jobs(complete({"prompt_file": str(tmp_path / "p.json")}))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a star", "-o", "-", "-n", "2"), "-o - writes one picture to stdout, and 2 are requested"),
        (("a star", "-o", "-", "--json"), "-o - writes the picture to stdout, which --json needs too"),
        (("a star", "-o", "x.png", "--format", "jpg"), "--format is jpg, and output x.png has its own suffix"),
        (("a star", "-o", "{prompt}.png"), "has the field {prompt}; there are {slug}, {seed}"),
        (("a star", "--size", "wide"), "--size is 'wide'; it must be WIDTHxHEIGHT"),
        (("a star", "--size", "1:1", "--width", "64"), "--size and --width or --height are given"),
        (("a star", "--sigmas", "1,x"), "--sigmas is '1,x'; it must be numbers and commas"),
        (("a {b|c",), "the prompt's choice that opens at column 3"),
        (("__../../etc/passwd__",), "is not a valid name; it must be letters, digits, - and _"),
        (("a star", "--prompt-file", "p.txt"), "a prompt and --prompt-file are given"),
        (("--prompt-file", "none.txt"), "--prompt-file none.txt cannot be read: No such file"),
        (("--prompt-file", os.devnull), "is a device; it must be a file, or - for stdin"),
        (
            ("--prompt-file", "p.TOML"),
            "--prompt-file p.TOML is not read; it must have one prompt per line, or be JSONL",
        ),
        (("a star", "--preset", "fast"), "--preset fast is not in the config; there are none"),
        (("a star", "--grid", "x.gif"), "output x.gif ends in .gif"),
        (("a star", "-o", "x.png", "--grid", "x.png", "--force"), "--grid x.png is the name of a picture too"),
        (("a star", "--seed", "1", "--grid", "a-star-1.png"), "--grid a-star-1.png is the name of a picture too"),
        (("a star", "--group-size", "32"), "--group-size is 32, but nothing is quantized; add --quantize 4"),
        (("a star", "--lora-partial"), "--lora-partial is given, and no LoRA; add --lora FILE"),
        (("a star", "-o", "-", "--open"), "--open needs a file, and -o - writes none; give one of them"),
        (("a star", "--enhance"), "its text encoder lacks the layers that --enhance needs; name a language model"),
    ],
)
def test_what_is_refused(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = klein(*TINY, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_line_s_output_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a star"}\n{"prompt": "a cross", "output": "x.tiff"}\n')
    done = klein(*TINY, "--prompt-file", "p.jsonl", cwd=tmp_path)
    words = "error: p.jsonl:2: output x.tiff ends in .tiff; it must end in .png, .jpg, .jpeg, .webp\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", words)
    (tmp_path / "p.txt").write_text("a star\na cross\n")
    done = klein(*TINY, "--prompt-file", "p.txt", "-o", "none/{index}.png", cwd=tmp_path)
    assert done.stderr.startswith("error: output folder none does not exist")
