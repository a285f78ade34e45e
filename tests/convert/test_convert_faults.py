"""A conversion is complete, or not there at all: kills, races, full disks, wrong destinations."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from folders import (
    GOLDEN,
    assert_equal,
    copy_model,
    file_system,
    loaded,
    nothing_but,
    quantizable_model,
    refusal,
    weight_file,
)

from klein_convert import checkpoint as folder_module
from klein_convert import writer
from klein_convert.checkpoint import convert_checkpoint
from klein_mlx.config import PARTS
from klein_mlx.errors import CheckpointError
from klein_mlx.formats.open import open_model

SLOW = """
import sys, time
from klein_convert.checkpoint import convert_checkpoint
def progress(done, total):
    if done > total * float(sys.argv[3]):
        print("there", flush=True)
        time.sleep(60)
convert_checkpoint(sys.argv[1], sys.argv[2], progress=progress)
"""


@pytest.mark.parametrize("share", ["0", "0.6", "0.99"])
def test_a_killed_conversion_leaves_nothing_that_loads(tmp_path: Path, share: str) -> None:
    target = tmp_path / "ours"
    with subprocess.Popen([sys.executable, "-c", SLOW, GOLDEN, target, share], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"there\n"
        process.kill()
    assert not os.path.lexists(target)
    (left,) = tmp_path.iterdir()
    with pytest.raises(CheckpointError):
        open_model(left)
    (left / "vae-00001-of-00009.safetensors").write_text("a shard of another run")
    convert_checkpoint(GOLDEN, target)
    assert nothing_but(tmp_path, "ours")
    assert nothing_but(target, "klein.json", "tokenizer.json", "README.md", *(f"{part}.safetensors" for part in PARTS))
    assert_equal(loaded(target, mx.bfloat16), loaded(GOLDEN, mx.bfloat16))


def test_the_hidden_folder_is_no_model_even_when_it_is_whole(tmp_path: Path) -> None:
    """A kill between the last file and the renaming leaves all files behind."""
    convert_checkpoint(GOLDEN, tmp_path / "ours").rename(tmp_path / ".ours.converting")
    with pytest.raises(CheckpointError, match="is left over from an interrupted conversion; convert again"):
        open_model(tmp_path / ".ours.converting")


class Stop(BaseException):
    """What a signal handler might raise."""


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Stop, RuntimeError])
def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, kind: type[BaseException]) -> None:
    def progress(done: int, total: int) -> None:
        if done > 0.8 * total:
            raise kind

    with pytest.raises(kind):
        convert_checkpoint(GOLDEN, tmp_path / "ours", progress=progress)
    assert nothing_but(tmp_path)


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert_checkpoint(GOLDEN, tmp_path / "ours", progress=lambda *numbers: seen.append(numbers))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_of_two_at_once_one_wins_and_one_says_so(tmp_path: Path) -> None:
    told = []

    def second(done: int, total: int) -> None:
        if not told:
            with pytest.raises(CheckpointError) as caught:
                convert_checkpoint(GOLDEN, tmp_path / "ours")
            told.append(str(caught.value))

    convert_checkpoint(GOLDEN, tmp_path / "ours", progress=second)
    assert told == [f"{tmp_path / 'ours'}: another conversion is writing it"]
    assert nothing_but(tmp_path, "ours")
    assert loaded(tmp_path / "ours", mx.bfloat16)


def test_a_destination_that_appears_in_the_meantime_is_not_touched(tmp_path: Path) -> None:
    def progress(done: int, total: int) -> None:
        (tmp_path / "ours").mkdir(exist_ok=True)

    with pytest.raises(CheckpointError, match="appeared in the meantime"):
        convert_checkpoint(GOLDEN, tmp_path / "ours", progress=progress)
    assert nothing_but(tmp_path, "ours")
    assert nothing_but(tmp_path / "ours")


def test_force_replaces_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    model, target = quantizable_model(tmp_path / "model"), tmp_path / "ours"
    convert_checkpoint(model, target)
    with pytest.raises(CheckpointError, match="exists already"):
        convert_checkpoint(model, target, quantize=4)
    assert not open_model(target).quantization
    convert_checkpoint(model, target, quantize=4, force=True)
    assert set(open_model(target).quantization) == {"transformer", "text_encoder"}
    assert nothing_but(tmp_path, "ours", "model")

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    (tmp_path / "file").write_text("x")
    for name in ("notes", "file"):
        with pytest.raises(CheckpointError, match="is not a klein_mlx checkpoint, so it is not replaced"):
            convert_checkpoint(model, tmp_path / name, force=True)
    assert (tmp_path / "notes" / "diary.txt").exists()


def test_a_failed_replacement_keeps_the_old_one(tmp_path: Path) -> None:
    target = convert_checkpoint(GOLDEN, tmp_path / "ours")

    def progress(done: int, total: int) -> None:
        if done > 0.9 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(GOLDEN, target, force=True, progress=progress)
    assert nothing_but(tmp_path, "ours")
    assert loaded(target, mx.bfloat16)


@pytest.mark.parametrize("force", [False, True])
def test_a_destination_in_or_around_the_source_is_refused(tmp_path: Path, force: bool) -> None:
    model = copy_model(tmp_path / "models" / "model")
    (tmp_path / "link").symlink_to(model)
    for target, message in (
        (model, "is the source itself or inside it"),
        (model / "ours", "is the source itself or inside it"),
        (model / "vae" / ".." / "ours", "is the source itself or inside it"),
        (tmp_path / "link" / "ours", "is the source itself or inside it"),
        (model.parent, "holds the source"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(model, target, force=force)
    assert nothing_but(tmp_path / "models", "model")


def test_where_nothing_can_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for parent in (tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(CheckpointError, match="is not a folder; create it first"):
            convert_checkpoint(GOLDEN, parent / "ours")
    with pytest.raises(CheckpointError, match=r"cannot be written \(File name too long\)"):
        convert_checkpoint(GOLDEN, tmp_path / ("x" * 250))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match="is not writable"):
        convert_checkpoint(GOLDEN, tmp_path / "ours")
    assert nothing_but(tmp_path, "file")


def test_a_name_with_spaces_and_signs_is_as_good(tmp_path: Path) -> None:
    target = convert_checkpoint(GOLDEN, tmp_path / "mein Füchslein 🦊")
    assert_equal(loaded(target, mx.bfloat16), loaded(GOLDEN, mx.bfloat16))


def test_too_little_space_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(CheckpointError, match=r"MB are needed, [\d.]+ [kM]B are free"):
        convert_checkpoint(GOLDEN, tmp_path / "ours", progress=lambda done, total: pytest.fail("has begun"))
    assert nothing_but(tmp_path)


def test_a_disk_that_fills_up_is_told_and_left_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "flush", full)
    with pytest.raises(CheckpointError, match=r"the disk is full; [\d.]+ [kM]B are needed. Nothing was left behind"):
        convert_checkpoint(GOLDEN, tmp_path / "ours")
    assert nothing_but(tmp_path)


def test_a_source_cut_short_meanwhile_is_told(tmp_path: Path) -> None:
    model = copy_model(tmp_path / "model")
    path = weight_file(model, "vae")

    def cut(done: int, total: int) -> None:
        os.truncate(path, 20_000)

    with pytest.raises(CheckpointError, match="cannot be read from the source"):
        convert_checkpoint(model, tmp_path / "ours", progress=cut)
    assert nothing_but(tmp_path, "model")


def test_files_are_flushed_before_the_folder_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def record(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            events.append(name)
            return function(*args)

        return call

    monkeypatch.setattr(os, "fsync", record("flush", os.fsync))
    monkeypatch.setattr(os, "rename", record("rename", os.rename))
    monkeypatch.delattr(writer.fcntl, "F_FULLFSYNC", raising=False)
    convert_checkpoint(GOLDEN, tmp_path / "ours")
    # Three parts, the tokenizer, klein.json, the card and the folder; then its name; then the parent.
    assert events == ["flush"] * 7 + ["rename", "flush"]


KILLS = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from klein_convert import checkpoint as folder, writer
from klein_convert.checkpoint import convert_checkpoint
from klein_mlx.formats.open import open_model
from klein_mlx.errors import CheckpointError
source, parent, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
target, moments = parent / "ours", random.Random(seed)

def run():  # MLX is first used behind the fork
    begin, child = time.monotonic(), os.fork()
    if not child:
        convert_checkpoint(source, target)
        os._exit(0)
    return begin, child

begin, child = run()
os.waitpid(child, 0)
taken = time.monotonic() - begin
assert target.exists()
whole = sorted((path.name, path.read_bytes()) for path in target.iterdir())
states = []
for _ in range(20):
    shutil.rmtree(target, ignore_errors=True)
    begin, child = run()
    time.sleep(moments.uniform(0, taken))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if target.exists():
        assert sorted((path.name, path.read_bytes()) for path in target.iterdir()) == whole
    for left in parent.iterdir():
        states.append(left.name)
        if left != target:
            try:
                open_model(left)
            except CheckpointError:
                continue
            raise AssertionError(f"{left} loads")
shutil.rmtree(target, ignore_errors=True)
convert_checkpoint(source, target)
assert os.listdir(parent) == ["ours"], os.listdir(parent)
print(taken, len(states), states.count("ours"))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it forks, which is not safe beside Metal")
def test_killed_at_twenty_random_moments_it_leaves_nothing_half_done(tmp_path: Path) -> None:
    """The final name is absent or complete, byte for byte; what is left beside it does not load, and is cleared."""
    command = [sys.executable, "-c", KILLS, str(GOLDEN), str(tmp_path), "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 18 MB, which is more than the check before the work asks for, and less than two runs need."""
    with file_system(tmp_path / "disk", 18) as disk:
        yield disk


def test_a_real_disk_that_fills_up_leaves_nothing(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small_disk / "other").write_bytes(bytes(17 << 20))
    with pytest.raises(CheckpointError, match=r"MB are needed, [\d.]+ [kM]B are free"):
        convert_checkpoint(GOLDEN, small_disk / "ours")
    monkeypatch.setattr(folder_module, "require_space", lambda parent, needed: None)  # as if it filled up later
    with pytest.raises(CheckpointError, match=r"the disk is full; [\d.]+ [kM]B are needed. Nothing was left behind"):
        convert_checkpoint(GOLDEN, small_disk / "ours")
    assert nothing_but(small_disk, "other")
    (small_disk / "other").unlink()
    monkeypatch.undo()
    assert loaded(convert_checkpoint(GOLDEN, small_disk / "ours"), mx.bfloat16)


def test_a_hidden_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    """Its name is easily guessed, in a shared folder by anyone: neither a link nor a stranger's folder is cleared."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "notes.txt").write_text("keep")
    hidden = tmp_path / ".out.converting"
    hidden.symlink_to(precious)
    assert "is in the way" in refusal(lambda: convert_checkpoint(open_model(GOLDEN), tmp_path / "out"))
    hidden.unlink()
    precious.rename(hidden)
    assert "is in the way" in refusal(lambda: convert_checkpoint(open_model(GOLDEN), tmp_path / "out"))
    assert (hidden / "notes.txt").read_text() == "keep"
    assert not (tmp_path / "out").exists()


def test_a_name_that_no_disk_allows(tmp_path: Path) -> None:
    for name in ("x" * 300, "zero\0byte", "no-utf8-\udcff"):
        assert "cannot be created" in refusal(lambda n=name: convert_checkpoint(open_model(GOLDEN), tmp_path / n))
