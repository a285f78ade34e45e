"""`klein-mlx convert` where it cannot be done, or is stopped: no half folder, nothing lost, one line that says why."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from faults import TINY, accepted, difference, refused, snapshot, start
from folders import GOLDEN, copy_model, file_system, nothing_but, quantizable_model, weight_file

from klein_mlx.config import PARTS
from klein_mlx.errors import CheckpointError
from klein_mlx.formats.open import open_model

OWN = Path(__file__).parents[2] / "klein_mlx" / "tiny"
FILES = ("README.md", "klein.json", "tokenizer.json", *(f"{part}.safetensors" for part in PARTS))


def appeared(name: str) -> list[str]:
    return [f"+{name}", *(f"+{name}/{file}" for file in FILES)]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the command writes it."""
    folder = tmp_path_factory.mktemp("ours")
    accepted("convert", GOLDEN, "ours", folder=folder, words="ours", changes=appeared("ours"))
    return folder / "ours"


# ---- disks ----


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 19 MB: a little more than the check before the work asks for golden's 1.6."""
    with file_system(tmp_path / "disk", 19) as place:
        yield place


def test_a_disk_that_is_full_at_the_start(disk: Path) -> None:
    (disk / "other").write_bytes(bytes(17 << 20))
    refused("convert", GOLDEN, "ours", folder=disk, words=["MB are needed", "are free"])
    accepted("convert", GOLDEN, "ours", "--dry-run", folder=disk.parent, words="MB needed")


def test_a_disk_that_fills_up_in_the_middle(disk: Path) -> None:
    """Another program takes the room while the command, told to wait, has checked it and not yet written."""
    process = start("convert", copy_model(disk.parent / "model"), "ours", folder=disk)
    hidden = disk / ".ours.converting"
    deadline = time.monotonic() + 20
    while not hidden.exists() and process.poll() is None and time.monotonic() < deadline:
        pass
    process.send_signal(signal.SIGSTOP)
    handle = os.open(disk / "other", os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):  # until it is full
        while os.write(handle, bytes(1 << 12)):
            pass
    os.close(handle)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=30)
    if process.returncode:  # on a machine that is busy it may have been done already
        assert process.returncode == 2, err
        told = rb"error: \S*ours: the disk is full; [\d.]+ [kM]B are needed. Nothing was left behind\n"
        assert re.fullmatch(told, err)
        assert nothing_but(disk, "other")
    else:
        assert out == b"ours\n"


def test_a_disk_that_may_not_be_written(disk: Path, ours: Path) -> None:
    shutil.copytree(ours, disk / "old")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    refused("convert", GOLDEN, "new", folder=disk, words=["error: new: ", "is not writable"])
    refused("convert", GOLDEN, "old", "--force", folder=disk, words=["error: old: ", "is not writable"])
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


# ---- destinations ----


@pytest.mark.parametrize(
    ("destination", "words"),
    [
        ("absent/ours", "absent is not a folder; create it first"),
        ("file/ours", "file is not a folder; create it first"),
        ("taken", "taken: exists already; choose another name, or --force to replace it"),
        ("model", "is the source itself or inside it"),
        ("model/vae/ours", "is the source itself or inside it"),
        ("model/../link/ours", "is the source itself or inside it"),
        (".", "holds the source; choose another folder"),
        ("x" * 300, "cannot be created"),
        ("x" * 250, "cannot be written (File name too long)"),
        ("", "DESTINATION is ''; it must be a file or a folder"),
    ],
)
def test_where_nothing_can_be_written(tmp_path: Path, destination: str, words: str) -> None:
    copy_model(tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "diary.txt").write_text("mine")
    refused("convert", "model", destination, folder=tmp_path, words=words)
    if destination == "taken":
        refused("convert", "model", "taken", "--force", folder=tmp_path, words="so it is not replaced; remove it first")


@pytest.mark.parametrize("name", ["mein Füchslein 🦊", "-ours", "a'b\"c$(touch x)", " "])
def test_an_odd_name_is_as_good(tmp_path: Path, name: str) -> None:
    accepted("convert", "--quiet", "--", GOLDEN, name, folder=tmp_path, changes=appeared(name))


def test_a_name_that_differs_in_case_alone(tmp_path: Path) -> None:
    """On a disk that ignores case it is the source; on one that does not, another folder."""
    copy_model(tmp_path / "model")
    if (tmp_path / "MODEL").exists():
        refused("convert", "model", "MODEL", folder=tmp_path, words="is the source itself")
    else:
        accepted("convert", "model", "MODEL", folder=tmp_path, changes=appeared("MODEL"))


# ---- sources ----


def test_what_is_quantised_already(tmp_path: Path) -> None:
    quantizable_model(tmp_path / "model")
    accepted("convert", "model", "four", "-q", "4", folder=tmp_path, changes=appeared("four"))
    refused(
        "convert",
        "four",
        "eight",
        "-q",
        "8",
        folder=tmp_path,
        words="4-bit already; for 8 bits start from the original",
    )
    accepted("convert", "four", "again", folder=tmp_path, changes=appeared("again"))
    for name in FILES[3:]:
        assert (tmp_path / "four" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_what_does_not_divide_into_groups(tmp_path: Path) -> None:
    words = ["has 160 inputs", "need a multiple of 64", "ask for a smaller group size, or leave"]
    refused("convert", GOLDEN, "ours", "-q", "4", folder=tmp_path, words=words)


@pytest.mark.parametrize("value", ["7", "0", "-4", "4.5", "nan", "four", ""])
def test_bits_that_there_are_not(tmp_path: Path, value: str) -> None:
    refused("convert", GOLDEN, "ours", f"--quantize={value}", folder=tmp_path, words=["quantize", repr(value)])


def paused(process: subprocess.Popen[bytes], hidden: Path) -> bool:
    """Stop a conversion as soon as it has made its hidden folder; False if it was too quick."""
    deadline = time.monotonic() + 20
    while not hidden.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            return False
    process.send_signal(signal.SIGSTOP)
    return True


@pytest.mark.parametrize("how", ["cut short", "gone"])
def test_a_source_that_goes_away_meanwhile(tmp_path: Path, how: str) -> None:
    """A disk pulled out: told, or done before it was noticed, and never a folder of garbage."""
    model = tmp_path / "model"
    shutil.copytree(OWN, model, ignore=shutil.ignore_patterns("__*"))
    process = start("convert", "model", "ours", folder=tmp_path)
    paused(process, tmp_path / ".ours.converting")
    if how == "gone":
        model.rename(tmp_path / "away")
    else:
        for part in PARTS:
            os.truncate(model / f"{part}.safetensors", 20_000)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=30)
    assert process.returncode in (0, 2), err
    names = {path.name for path in tmp_path.iterdir()}
    if process.returncode:
        assert err.startswith(b"error: ")
        assert err.count(b"\n") == 1, err
        assert names == {"model" if how == "cut short" else "away"}
    else:
        assert {*FILES, "LICENSE"} == {path.name for path in (tmp_path / "ours").iterdir()}
        assert (tmp_path / "ours" / "vae.safetensors").read_bytes() == (OWN / "vae.safetensors").read_bytes()


# ---- signals and races ----


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path, ours: Path) -> None:
    """The real command, killed eight times from its start on: the name is absent or whole; the next run clears up."""
    whole = {name: (ours / name).read_bytes() for name in FILES}
    begin = time.monotonic()
    accepted("convert", GOLDEN, "first", folder=tmp_path, changes=appeared("first"))
    taken, moments = time.monotonic() - begin, random.Random(3)
    for _ in range(8):
        shutil.rmtree(tmp_path / "ours", ignore_errors=True)
        process = start("convert", GOLDEN, "ours", folder=tmp_path)
        time.sleep(moments.uniform(0.5, 1) * taken)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if (tmp_path / "ours").exists():
            assert {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == whole
        hidden = tmp_path / ".ours.converting"
        if hidden.exists():
            with pytest.raises(CheckpointError):
                open_model(hidden)
    shutil.rmtree(tmp_path / "ours", ignore_errors=True)
    process = start("convert", GOLDEN, "ours", folder=tmp_path)
    process.communicate(timeout=30)
    assert nothing_but(tmp_path, "first", "ours")


@pytest.mark.parametrize("times", [1, 2])
def test_interrupted_it_leaves_nothing(tmp_path: Path, times: int) -> None:
    """Ctrl-C, once and twice in a row."""
    model = tmp_path / "model"
    shutil.copytree(OWN, model, ignore=shutil.ignore_patterns("__*"))
    process = start("convert", "model", "ours", folder=tmp_path)
    if paused(process, tmp_path / ".ours.converting"):
        for _ in range(times):
            process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=30)
    if process.returncode == 0:
        assert (tmp_path / "ours" / "klein.json").exists()
        return
    assert process.returncode == 130, err
    assert err == b"interrupted\n"
    assert nothing_but(tmp_path, "model")


def test_two_at_once(tmp_path: Path) -> None:
    """One wins; the other says that it is being written, or that it is there already."""
    both = [start("convert", OWN, "ours", folder=tmp_path) for _ in range(2)]
    ends = [process.communicate(timeout=60) for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], ends
    (told,) = [err for _, err in ends if err]
    assert re.search(rb"another conversion is writing it|exists already|appeared in the meantime", told), told
    assert told.count(b"\n") == 1
    assert nothing_but(tmp_path, "ours")
    assert nothing_but(tmp_path / "ours", *FILES, "LICENSE")


def test_a_failure_leaves_the_old_one_unharmed(tmp_path: Path, ours: Path) -> None:
    model = copy_model(tmp_path / "model")
    os.truncate(weight_file(model, "vae"), 20_000)
    shutil.copytree(ours, tmp_path / "ours")
    refused("convert", "model", "ours", "--force", folder=tmp_path, words="bytes short: an incomplete download or copy")


def test_little_memory_is_enough(tmp_path: Path) -> None:
    """1.6 GB of addresses, of which threads, Python and MLX take most: one tensor at a time, and no more."""
    quantizable_model(tmp_path / "model")
    options = {"memory": 3 << 29, "changes": appeared("ours")}
    accepted("convert", "model", "ours", "-q", "4", folder=tmp_path, **options)  # type: ignore[arg-type]
    before = snapshot(tmp_path)
    out = ("-o", "x.png", *TINY[2:], "--model", "ours")
    accepted("generate", "a star", *out, folder=tmp_path, changes=["+x.png"])
    assert difference(before, snapshot(tmp_path)) == ("+x.png",)
    assert mx.load(str(tmp_path / "ours" / "vae.safetensors"))
