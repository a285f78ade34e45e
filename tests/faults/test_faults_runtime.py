"""Signals, kills, full disks, odd environments, and use as a library: classes O and R, with the real command."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faults import MEMORY, ROOT, TINY, UNWRITABLE, accepted, command, environment, refused, run_fault, start
from PIL import Image

MANY = ("generate", "a star", "--model", "tiny", "-n", "500", "--seed", "1", "--keep", "all")
KILLS = int(os.environ.get("KLEIN_KILLS", "12"))  # 200 takes some minutes


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_leave_whole_pictures_only(tmp_path: Path, number: int, code: int) -> None:
    with start(*MANY, folder=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"a-star-1.png\n"
        process.send_signal(number)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == code
    assert stderr.splitlines()[-1] == b"interrupted"
    assert b"Traceback" not in stderr
    check_whole(tmp_path)
    assert not list(tmp_path.glob(".*"))


def check_whole(folder: Path) -> int:
    """Every file under a final name is a whole picture; returns how many there are."""
    names = [name for name in os.listdir(folder) if not name.startswith(".")]
    for name in names:
        with Image.open(folder / name) as image:
            image.load()
            assert image.size == (128, 128)
    return len(names)


@pytest.mark.slow
def test_killed_at_random_moments_every_picture_is_whole(tmp_path: Path) -> None:
    """From the first import to the third picture; nothing is swept up between the kills."""
    moments, endings = random.Random(0), set()
    for _ in range(KILLS):
        with start(*MANY[:4], "-n", "3", "--steps", "2", "--quiet", folder=tmp_path) as process:
            try:
                process.wait(moments.uniform(0.05, 1.2))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            endings.add(process.returncode)
        check_whole(tmp_path)
    assert -signal.SIGKILL in endings


def test_a_full_disk_keeps_the_old_picture(tmp_path: Path) -> None:
    """The disk takes 1 kB of a file and no more."""
    Image.effect_noise((300, 300), 90).save(tmp_path / "out.jpg")
    old = (tmp_path / "out.jpg").read_bytes()
    arguments = command("generate", "a star", "--model", "tiny", "--seed", "0", "-o", "out.jpg", "--force")
    limited = f"ulimit -f 1; exec {shlex.join(arguments)}"
    done = subprocess.run(["bash", "-c", limited], cwd=tmp_path, env=environment(), capture_output=True, timeout=20)
    assert done.returncode == 2, done
    assert done.stderr.splitlines()[-1].startswith(b"error: output out.jpg cannot be written: ")
    assert b"Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["out.jpg"]
    assert (tmp_path / "out.jpg").read_bytes() == old


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_results_that_cannot_be_printed(tmp_path: Path) -> None:
    arguments = command("generate", "a star", *TINY, "-o", "out.png")
    with open("/dev/full", "w") as full:
        done = subprocess.run(arguments, cwd=tmp_path, env=environment(), stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: the result cannot be printed: No space left")
    assert b"Traceback" not in done.stderr
    with Image.open(tmp_path / "out.png") as image:
        image.load()


def test_two_at_once_choose_two_names(tmp_path: Path) -> None:
    running = [start("generate", "a star", *TINY, folder=tmp_path) for _ in range(3)]
    names = [process.communicate(timeout=30)[0].decode().strip() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(set(names)) == 3
    assert sorted(os.listdir(tmp_path)) == sorted(names)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("old.png", "output old.png exists; choose another name, or overwrite it with --force"),
        ("dangling.png", "output dangling.png exists"),
        ("none", "output none is not a folder, and has no suffix; it must end in .png, .jpg"),
        ("x.xyz", "output x.xyz ends in .xyz; it must end in .png, .jpg"),
        (f"{UNWRITABLE}/x.png", f"output folder {UNWRITABLE} is not writable"),
        ("none/x.png", "output folder none does not exist; make it first"),
        ("old.png/x.png", "output folder old.png does not exist; make it first"),
        ("狐" * 300 + ".png", "File name too long"),  # whether a disk counts bytes or characters
        (".png", "output .png is not a folder, and has no suffix"),
    ],
)
def test_outputs_that_are_refused(tmp_path: Path, output: str, words: str) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "old.png").write_bytes(b"old")
    (tmp_path / "dangling.png").symlink_to("nowhere")
    refused("generate", "a star", *TINY, f"--output={output}", folder=tmp_path, words=words)


def test_a_name_of_emoji_only(tmp_path: Path) -> None:
    accepted("generate", "🦊🦊🦊", *TINY, folder=tmp_path, changes=["+picture-0.png"])


ENVIRONMENTS: dict[str, dict[str, str | None]] = {
    "no home": {"HOME": None, "XDG_CONFIG_HOME": None, "XDG_CACHE_HOME": None},
    "a home that is no folder": {"HOME": "/dev/null"},
    "a home that cannot be written": {"HOME": UNWRITABLE, "HF_HOME": f"{UNWRITABLE}/hf"},
    "the C locale": {"LC_ALL": "C", "LANG": None},
    "a dumb terminal": {"TERM": "dumb", "COLUMNS": "1"},
    "no colour": {"NO_COLOR": "1", "COLUMNS": "20"},
    "no path": {"PATH": ""},
    "the past": {"SOURCE_DATE_EPOCH": "-1", "TZ": "nowhere"},
}


@pytest.mark.parametrize("changes", ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
def test_environments(tmp_path: Path, changes: dict[str, str | None]) -> None:
    """A picture is made, its line is printed, and no escape code reaches what is no terminal."""
    arguments = ("generate", "a star 日本", "-o", "星.png", *TINY[:-1])
    outcome = run_fault(*arguments, folder=tmp_path, changes=changes)
    assert outcome.code == 0, outcome
    assert (outcome.stderr.splitlines()[0], outcome.changes) == ("seed 0", ("+星.png",))
    assert len(outcome.stderr.splitlines()) == 2
    assert "\x1b" not in outcome.stdout
    assert len(outcome.stdout.splitlines()) == 1


def test_no_mlx_here(tmp_path: Path) -> None:
    """As on an Intel Mac, under Rosetta, or on a macOS that is too old."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('dlopen(libmlx.dylib)', name='mlx.core')")
    outcome = run_fault("info", "tiny", folder=tmp_path, changes={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert outcome.code == 2
    assert outcome.stderr.startswith("error: MLX cannot be loaded here (dlopen(libmlx.dylib)); klein-mlx needs a Mac")
    assert len(outcome.stderr.splitlines()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="macOS limits no address space")
def test_memory_that_is_not_there(tmp_path: Path) -> None:
    """Half of what Python, MLX and the picture need: whatever ends it, no file is left under a final name."""
    arguments = ("generate", "a star", "--model", "tiny", "--width", "1536", "--height", "1536", "--steps", "1")
    outcome = run_fault(*arguments, folder=tmp_path, memory=MEMORY // 2, seconds=60)
    assert outcome.code != 0
    assert [change for change in outcome.changes if not change.startswith("+.")] == []


LIBRARY = """
import json, os, resource, signal, sys, threading
def state():
    import random
    handlers = [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)]
    limits = [resource.getrlimit(n) for n in (resource.RLIMIT_AS, resource.RLIMIT_NOFILE, resource.RLIMIT_CORE)]
    return [threading.active_count(), dict(os.environ), handlers, limits, random.getstate(), os.getcwd(), os.umask(18),
            sys.getrecursionlimit(), list(sys.path)]
os.umask(18)
before = state()
import klein_mlx
from klein_mlx import KleinPipeline, KleinError, RequestError, CheckpointError
after_import = state()
import mlx.core as mx
mx.random.seed(5)
expected = mx.random.normal((4,)).tolist()
def make(size=64):
    return KleinPipeline.from_pretrained("tiny")("a red star", seed=3, width=size, height=size).images[0].tobytes()
first = make()
pictures = [first, make()]
errors = []
def work():
    try:
        pictures.append(make())
    except BaseException as error:
        errors.append(repr(error))
threads = [threading.Thread(target=work) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
mx.random.seed(5)
try:
    KleinPipeline.from_pretrained("tiny")("a star", width=17)
    refused = None
except RequestError as error:
    refused = str(error)
print(json.dumps({
    "import": before == after_import, "use": before == state(), "errors": errors,
    "same": len(set(pictures)) == 1 and len(pictures) == 4, "refused": refused,
    "random": mx.random.normal((4,)).tolist() == expected,
}))
"""


def test_as_a_library(tmp_path: Path) -> None:
    """No side effects at import or after use, usable from threads, the same bytes each time, errors of our own."""
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told.pop("refused").startswith("width is 17")
    assert told == {"import": True, "use": True, "errors": [], "same": True, "random": True}
    assert os.listdir(tmp_path) == []
