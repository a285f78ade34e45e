"""The real command in a subprocess: what it prints where, its exit codes, and that nothing is left half-done."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import zygote
from faults import UNWRITABLE, start
from PIL import Image

PROMPT = "a red circle left of a blue square"
TINY = ("generate", "--model", "tiny")


def klein(*arguments: str | Path, cwd: Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONWARNINGS": "error", "HF_HUB_OFFLINE": "1"}
    done = zygote.run(arguments, cwd=cwd, env=environment, timeout=timeout)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        return image.size


def test_a_picture(tmp_path: Path) -> None:
    done = klein(*TINY, PROMPT, "-o", "out.png", "--seed", "7", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "out.png\n")
    assert re.fullmatch(r"seed 7\n1 picture in .* s \(.*\); peak memory .*\n", done.stderr)
    assert size_of(tmp_path / "out.png") == (128, 128)
    assert os.listdir(tmp_path) == ["out.png"]
    assert stat.S_IMODE((tmp_path / "out.png").stat().st_mode) & 0o077 == 0o066 & ~_umask()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def test_same_seed_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        assert klein(*TINY, PROMPT, "-o", name, "--seed", "7", cwd=tmp_path).returncode == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_names_from_prompt_and_seed_never_overwrite(tmp_path: Path) -> None:
    first = klein(*TINY, "A star, 日本!", "--seed", "3", "--steps", "1", "--quiet", cwd=tmp_path)
    second = klein(*TINY, "A star, 日本!", "--seed", "3", "--seed", "3", "--steps", "1", "--quiet", cwd=tmp_path)
    assert first.stdout.split() == ["a-star-日本-3.png"]
    assert second.stdout.split() == ["a-star-日本-3-2.png", "a-star-日本-3-3.png"]
    assert first.stderr == second.stderr == ""
    assert len(os.listdir(tmp_path)) == 3


def test_a_random_seed_is_told(tmp_path: Path) -> None:
    done = klein(*TINY, "a star", "-o", "x.png", "--steps", "1", cwd=tmp_path)
    assert re.match(r"seed \d+\n1 picture in ", done.stderr)


def test_several_pictures_and_json(tmp_path: Path) -> None:
    done = klein(*TINY, PROMPT, "-o", "x.webp", "-n", "2", "--seed", "7", "--json", "--width", "96", cwd=tmp_path)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["files"] == ["x-7.webp", "x-8.webp"]
    assert report["seeds"] == [7, 8]
    assert report["model"] == "tiny"
    assert set(report["seconds"]) == {"load", "encode", "steps", "decode"}
    assert report["peak_memory"] > 1e6
    assert size_of(tmp_path / "x-8.webp") == (96, 128)


def test_editing_a_reference(tmp_path: Path) -> None:
    Image.new("RGB", (130, 128), "red").save(tmp_path / "in.png")
    done = klein(*TINY, "make it blue", "-i", "in.png", "-o", "out.jpg", "--seed", "7", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a reference of 130 x 128 is used as 128 x 128" in done.stderr
    assert size_of(tmp_path / "out.jpg") == (128, 128)


def test_a_mask_and_an_extension(tmp_path: Path) -> None:
    image = Image.effect_noise((96, 80), 90).convert("RGB")
    image.save(tmp_path / "in.png")
    mask = Image.new("L", image.size, 255)
    mask.paste(0, (0, 0, 96, 40))
    mask.save(tmp_path / "mask.png")
    edit = ("--init-image", "in.png", "--steps", "1", "--seed", "7", "--quiet")
    masked = klein(*TINY, PROMPT, *edit, "--mask", "mask.png", "--mask-blur", "2", "-o", "masked.png", cwd=tmp_path)
    assert (masked.returncode, masked.stderr) == (0, "")
    with Image.open(tmp_path / "masked.png") as out:
        assert out.crop((0, 0, 96, 40)).tobytes() == image.crop((0, 0, 96, 40)).tobytes()
        assert out.tobytes() != image.tobytes()
    wide = klein(*TINY, PROMPT, *edit, "--extend", "left=32", "-o", "wide.png", cwd=tmp_path)
    assert (wide.returncode, wide.stderr) == (0, "")
    lossy = klein(*TINY, PROMPT, *edit[:-1], "--extend", "left=32", "-o", "wide.jpg", cwd=tmp_path)
    assert lossy.stderr.startswith(".jpg changes every pixel a little; .png keeps those that are not painted exactly")
    with Image.open(tmp_path / "wide.png") as out:
        assert out.crop((32, 0, 128, 80)).tobytes() == image.tobytes()
    turned = klein(*TINY, PROMPT, *edit, "--mask", "in.png", "--invert-mask", "--mask-crop", "x", cwd=tmp_path)
    assert turned.stderr.startswith("error: --mask-crop is 'x'; it must be a whole number")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--width", "100"), "--width is 100; it must be a multiple of 16: 96 or 112"),
        (("--width", "nan"), "--width is 'nan'; it must be a whole number"),
        (("--steps", "0"), "--steps is 0; it must be a whole number from 1 to 1000"),
        (("--guidance", "nan"), "--guidance is nan; it must be a number from 1 to 100"),
        (("--seed", "-1"), "--seed is -1; it must be a whole number from 0"),
        (("--model", "nope"), "'nope'"),
        (("--model", "./nope"), "nope"),
        (("--model", "."), "neither klein.json nor model_index.json"),
        (("--model", "someone/something", "--offline"), "someone/something"),
        (("--transformer", "none.gguf"), "none.gguf"),
        (("--text-encoder", "locked"), "locked"),
        (("--image", "none.png"), "image none.png does not exist"),
        (("-o", "none/x.png"), "output folder none does not exist; make it first"),
        (("-o", "x.gif"), "must end in .png, .jpg, .jpeg, .webp"),
        (("-o", "locked/x.png"), "output folder locked is not writable"),
        (("--quantize", "7"), "--quantize is '7'; it must be 3, 4, 5, 6, 8, mxfp4"),
        (("--transformer-bits", "x"), "--transformer-bits is 'x'; it must be 3,"),
        (("--quantize-layer", "no.*=4"), "--quantize-layer 'no.*' matches no layer"),
        (("--dtype", "float8"), "--dtype is 'float8'"),
        (("--mask", "m.png"), "--mask needs an --init-image: the picture to start from"),
        (("--strength", "0.5"), "--strength needs an --init-image: the picture to start from"),
        (("--init-image", "none.png"), "--init-image none.png does not exist"),
        (("--init-image", "x.png", "--extend", "up=3"), "--extend is 'up=3'; it must be pixels to add"),
        (("--init-image", "x.png", "--strength", "0"), "--strength is 0.0; it must be a number over 0 and at most 1"),
        (("--reuse-references",), "--reuse-references needs a reference image, and none is given"),
        (("--large-reference",), "--large-reference needs a single reference, and 0 are given"),
        (("--batch-guidance",), "--batch-guidance needs a --guidance over 1, and it is 1"),
        (("--small-decoder", "--vae", "x"), "--small-decoder and --vae both name a VAE; give one of them"),
        (("--small-decoder", "--offline"), "black-forest-labs/FLUX.2-small-decoder"),
        (("--vae", "./none"), "none"),
        (("--wdith", "128"), "unrecognized arguments: --wdith"),
        (("--wid", "128"), "unrecognized arguments: --wid"),
    ],
)
def test_what_is_refused(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    """One line, exit code 2, nothing left behind."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if "locked/x.png" in arguments and os.access(locked, os.W_OK):
        arguments, words = ("-o", f"{UNWRITABLE}/x.png"), f"{UNWRITABLE} is not writable"  # root may write elsewhere
    done = klein(*TINY, "a star", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr
    assert os.listdir(tmp_path) == ["locked"]


def test_nothing_asked_for(tmp_path: Path) -> None:
    for arguments in ((), ("generate",), ("info",), ("convert", "x"), ("paint",)):
        done = klein(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_an_existing_file_is_kept_unless_told(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("precious")
    done = klein(*TINY, "a star", "-o", "x.png", "--steps", "1", cwd=tmp_path)
    assert done.returncode == 2
    assert "x.png exists" in done.stderr
    assert (tmp_path / "x.png").read_text() == "precious"
    assert klein(*TINY, "a star", "-o", "x.png", "--steps", "1", "--force", cwd=tmp_path).returncode == 0
    assert size_of(tmp_path / "x.png") == (128, 128)


def test_ctrl_c_leaves_whole_pictures_only(tmp_path: Path) -> None:
    """Interrupted after the first of many pictures: exit code 130, and every file there can be opened."""
    with start(*TINY, "a star", "-n", "500", "--seed", "1", "--keep", "all", folder=tmp_path) as process:
        assert process.stdout
        assert process.stdout.readline() == b"a-star-1.png\n"
        process.send_signal(signal.SIGINT)
        process.wait(30)
        assert process.stderr
        error = process.stderr.read().decode()
    assert process.returncode == 130
    assert error.splitlines()[-1] == "interrupted"
    assert re.match(r"\d+ of 500 pictures in ", error.splitlines()[-2])
    assert "Traceback" not in error
    assert all(size_of(path) == (128, 128) for path in tmp_path.iterdir())


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    """`klein-mlx generate | head -0` ends without a traceback."""
    command = f'"{sys.executable}" -m klein_mlx.cli.main generate --model tiny "a star" --steps 1 -o x.png | true'
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr


def test_info(tmp_path: Path) -> None:
    done = klein("info", "tiny", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("tiny", "transformer", "text_encoder", "vae", "Apache-2.0", "bfloat16"):
        assert word in done.stdout
    report = json.loads(klein("info", "tiny", "--json", cwd=tmp_path).stdout)
    assert report["variant"] == "tiny"
    assert report["bytes"] < 10e6


def test_convert_then_generate_gives_the_same_picture(tmp_path: Path) -> None:
    done = klein("convert", "tiny", "copy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for model in ("tiny", "copy"):
        klein("generate", "--model", model, PROMPT, "--seed", "7", "--no-metadata", "-o", f"{model}.png", cwd=tmp_path)
    assert (tmp_path / "tiny.png").read_bytes() == (tmp_path / "copy.png").read_bytes()
