"""Faults given to the real command, in a process with limits: what it printed, how it ended, what it left behind.

`run_fault` runs `klein-mlx` and looks at the folder before and after; `refused` and `accepted` also judge. The faults
themselves are made by the tests, as small files; nothing of them is stored. To add a class of faults:

    @pytest.mark.parametrize(("name", "words"), [("a.svg", "is an SVG"), ...])
    def test_pictures(tmp_path: Path, name: str, words: str) -> None:
        (tmp_path / name).write_text("<svg/>")
        refused("generate", "a star", "-i", name, "-o", "out.png", *TINY, folder=tmp_path, words=words)
"""

import os
import signal
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import zygote

ROOT = Path(__file__).parents[2]
SECONDS = 20.0  # a command that refuses takes 0.3 s; two cores may be busy with eight of them
MEMORY = 2 << 30  # bytes of address space; the embedded checkpoint paints with less than 1 GB
UNWRITABLE = "/proc" if Path("/proc").is_dir() else "/System"  # to root too
TINY = ("--model", "tiny", "--steps", "1", "--width", "64", "--height", "64", "--seed", "0", "--quiet")  # of `generate`


@dataclass(frozen=True)
class Outcome:
    """A command's end. code: its exit code, negative for a signal's number. seconds: of the wall.

    changes: paths within the folder that appeared ("+x"), went ("-x") or have other bytes ("!x"), sorted.
    """

    code: int
    stdout: str
    stderr: str
    seconds: float
    changes: tuple[str, ...]

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


def command(*arguments: object) -> list[str]:
    """The command as a process: the tree's own, whatever is installed."""
    return [
        sys.executable,
        "-m",
        "klein_mlx",
        *(os.fspath(a) if isinstance(a, Path) else str(a) for a in arguments),
    ]


def environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process' environment without tokens, offline, with the tree first; `changes` on top, None to take away."""
    told = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "convert")]),
        "HF_HUB_OFFLINE": "1",
        **(changes or {}),
    }
    gone = {"HF_TOKEN", "PYTHONWARNINGS", "PYTHONDEVMODE"} - set(changes or {})
    return {name: value for name, value in told.items() if value is not None and name not in gone}


def start(
    *arguments: object,
    folder: Path,
    memory: int = MEMORY,
    changes: Mapping[str, str | None] | None = None,
    **pipes: int,
) -> subprocess.Popen[bytes]:
    """The command, running in a session of its own with `folder` as its working directory; the caller ends it.

    memory: bytes of address space. changes: to the environment. pipes: stdin, stdout, stderr, as Popen has them;
    each a pipe by default.
    """
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")} | pipes
    limited = [*zygote.limit(memory), *command(*arguments)]
    # Under nohup SIGHUP is ignored, in a shell's background SIGINT, and a child would inherit that.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        return subprocess.Popen(limited, cwd=folder, env=environment(changes), start_new_session=True, **pipes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_fault(
    *arguments: object,
    folder: Path,
    seconds: float = SECONDS,
    memory: int = MEMORY,
    stdin: bytes = b"",
    changes: Mapping[str, str | None] | None = None,
) -> Outcome:
    """Run the command in `folder` to its end. A command that takes over `seconds` is killed, and fails the test.

    memory: bytes of address space that it may have, where the system limits it (Linux). changes: to the environment.
    """
    before, begin = snapshot(folder), time.perf_counter()

    try:
        done = zygote.run(arguments, cwd=folder, env=environment(changes), stdin=stdin, timeout=seconds, memory=memory)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(
            f"{arguments} hangs after {seconds:g} s; it said {(error.stderr or b'')[-500:]!r}"
        ) from None
    taken = time.perf_counter() - begin
    texts = (done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))
    return Outcome(done.returncode, *texts, taken, difference(before, snapshot(folder)))


def refused(*arguments: object, folder: Path, words: str | Sequence[str], **options: object) -> Outcome:
    """Run a command that must be refused: exit code 2, nothing on stdout, on stderr one printable line that begins
    with `error: ` and holds these words, no traceback; no file written, removed or changed. options: of `run_fault`.
    """
    outcome = run_fault(*arguments, folder=folder, **options)  # type: ignore[arg-type]
    assert outcome.code == 2, outcome
    assert outcome.stdout == "", outcome
    assert len(outcome.errors) == len(outcome.stderr.splitlines()) == 1, outcome.stderr
    (line,) = outcome.errors
    assert line.isprintable(), line
    assert len(line) < 1000, line
    for word in (words,) if isinstance(words, str) else words:
        assert word in line, (word, line)
    assert outcome.changes == (), outcome.changes
    return outcome


def accepted(
    *arguments: object, folder: Path, words: str | Sequence[str] = (), changes: Sequence[str] = (), **options: object
) -> Outcome:
    """Run a command that must succeed: exit code 0, these words on stdout or stderr, these changes and no others."""
    outcome = run_fault(*arguments, folder=folder, **options)  # type: ignore[arg-type]
    assert outcome.code == 0, outcome
    assert "Traceback" not in outcome.stderr, outcome.stderr
    for word in (words,) if isinstance(words, str) else words:
        assert word in outcome.stdout + outcome.stderr, (word, outcome)
    assert outcome.changes == tuple(sorted(changes)), outcome.changes
    return outcome


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """Every path below a folder with what is there; links are not followed, pipes and devices not opened."""
    found: dict[str, tuple[object, ...]] = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            status = path.lstat()
            kind = stat.S_IFMT(status.st_mode)
            told: object = os.readlink(path) if stat.S_ISLNK(status.st_mode) else status.st_mode
            if stat.S_ISREG(status.st_mode) and status.st_mode & 0o400:
                told = zlib.crc32(path.read_bytes())
            found[str(path.relative_to(folder))] = (kind, told)
    return found


def difference(before: Mapping[str, object], after: Mapping[str, object]) -> tuple[str, ...]:
    """How two snapshots differ, as `Outcome.changes` has it."""
    gone, new = before.keys() - after.keys(), after.keys() - before.keys()
    changed = {name for name in before.keys() & after.keys() if before[name] != after[name]}
    return tuple(sorted([*(f"-{n}" for n in gone), *(f"+{n}" for n in new), *(f"!{n}" for n in changed)]))
