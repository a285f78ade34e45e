"""A file system that fails: each command ends with one line and nothing half-written, or there is a bug.

`python tests/tools/broken_disk.py --count 2000` runs the command in this process, on files of tiny, and lets one call
of the file system fail, or all from one on, chosen by a seed: opening, looking, listing, writing, renaming, syncing. It
prints how the commands ended and the faults; the exit code is 1 if there was one. `--first 123 --count 1` makes one of
them again.
"""

import argparse
import builtins
import contextlib
import errno
import io
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from klein_mlx.cli.main import main as klein_mlx
from klein_mlx.images.saving import read_metadata

SMALL = ("-m", "tiny", "--steps", "1", "--size", "64x64", "--seed", "1", "--quiet")
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("generate", "a star", *SMALL, "-o", "new.png"),
    ("generate", "a {red|__color__} star", *SMALL, "-n", "2", "-o", "{slug}-{seed}.png", "--grid"),
    ("generate", "a star", *SMALL, "-i", "old.png", "--init-image", "old.png", "--strength", "0.5", "-o", "new.png"),
    ("generate", "a star", *SMALL, "-o", "old.png", "--force"),
    ("generate", "--prompt-file", "prompts.txt", *SMALL, "--prompt-cache", "cached", "--config", "config.toml"),
    ("again", "old.png", "--quiet", "-o", "new.png"),
    ("show", "old.png", "prompts.txt"),
    ("info", "tiny"),
    ("info", "model", "--verify"),
    ("info", "old.png"),
    ("info", "model/transformer.safetensors"),
    ("lora", "info", "old.png"),
    ("models",),
    ("models", "path", "tiny"),
    ("convert", "model", "ours", "--quantize", "4", "--quiet"),
    ("convert", "model", "theirs", "--to", "diffusers", "--quiet"),
    ("convert", "model", "ours", "--dry-run"),
    ("completion", "bash"),
)
ERRORS = ("ENOSPC EACCES EIO ENOENT EROFS EISDIR ENOTDIR ENAMETOOLONG ELOOP EMFILE EINVAL ESTALE EPERM EDQUOT").split()
CALLS = (
    *("open", "stat", "lstat", "listdir", "scandir", "mkdir", "makedirs", "replace", "rename", "unlink", "remove"),
    *(
        "rmdir",
        "fsync",
        "link",
        "readlink",
        "access",
        "write",
        "fstat",
        "utime",
        "chmod",
        "pread",
        "statvfs",
        "truncate",
    ),
)
INSTALLED = (sys.prefix, sys.base_prefix, "/usr", "/proc", "/sys")  # and the terminal (0, 1, 2) are sound


class Disk:
    """Counts the calls of this process to the file system; the one of this number fails. fails: None: none does.
    forever: so do all behind it, as on a disk that is unplugged."""

    def __init__(self, fails: int | None = None, code: int = errno.EIO, forever: bool = False):
        self.calls, self.fails, self.code, self.forever, self.failed = 0, fails, code, forever, ""

    def call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The function's result, unless it is to fail."""
        number, self.calls = self.calls, self.calls + 1
        if self.fails is not None and (number == self.fails or (self.forever and number > self.fails)):
            self.failed = self.failed or f"{name}{args!r:.200}"
            path = os.fspath(args[0]) if args and isinstance(args[0], str | bytes | os.PathLike) else None
            raise OSError(self.code, os.strerror(self.code), path)
        return function(*args, **kwargs)

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if args and (args[0] in (0, 1, 2) or str(args[0]).startswith(INSTALLED)):
                return function(*args, **kwargs)
            result = self.call(name, function, *args, **kwargs)
            return _File(self, result) if name == "open" and isinstance(result, io.BufferedWriter) else result

        return counted

    @contextlib.contextmanager
    def works(self) -> Iterator[None]:
        """Inside, os and open are these."""
        before = [(os, name, getattr(os, name)) for name in CALLS]
        before += [(builtins, "open", builtins.open), (io, "open", io.open)]
        for module, name, call in before:
            setattr(module, name, self._counted(name, call))
        try:
            yield
        finally:
            for module, name, call in before:
                setattr(module, name, call)


class _File:
    """A file that is written to, whose writes count too."""

    def __init__(self, disk: Disk, file: io.BufferedWriter):
        self._disk, self._file = disk, file

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._file, name)
        if name not in ("write", "flush", "truncate"):
            return value
        return lambda *args: self._disk.call(f"file.{name}", value, *args)

    def close(self) -> None:
        """What cannot be written is said here; the file is closed all the same."""
        self._file.close()
        self._disk.call("file.close", lambda: None)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def prepare(folder: Path) -> None:
    """The files that the commands take."""
    import klein_mlx as package

    shutil.copytree(Path(package.__file__).parent / "tiny", folder / "model")
    (folder / "prompts.txt").write_text('a star\n{"prompt": "a {red|blue} circle", "seed": 3}\n')
    (folder / "wildcards").mkdir()
    (folder / "wildcards" / "color.txt").write_text("blue\ngreen\n")
    (folder / "config.toml").write_text('[folders]\nloras = "loras"\n[presets.x]\nsteps = 1\n')
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        assert klein_mlx(["generate", "a star", *SMALL, "-o", "old.png"]) == 0


def run(words: Sequence[str], folder: Path, disk: Disk) -> tuple[int | None, str]:
    """(exit code, what was printed on stderr); None where something left the command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with disk.works():
                code: int | None = klein_mlx(list(words))
        except BaseException:
            traceback.print_exc()
            code = None
    return code, err.getvalue()


def wrong(words: Sequence[str], folder: Path, old: bytes, code: int | None, told: str) -> str:
    """What is wrong with how a command ended; "" for nothing."""
    if code is None or "Traceback" in told or "Exception ignored" in told:
        return f"a traceback: {told.strip().splitlines()[-1]}"
    if code not in (0, 2):
        return f"exit code {code}"
    if code == 2 and not any(line.startswith("error: ") and line.isprintable() for line in told.splitlines()):
        return f"no line: {told!r}"
    for picture in folder.glob("*.png"):
        if picture.name == "old.png" and picture.read_bytes() == old:
            continue
        try:
            read_metadata(picture)
        except Exception as error:
            return f"{picture.name} is not whole: {error}"
    for model in ("ours", "theirs"):
        if (folder / model).exists() and code == 2:
            return f"{model} is there, and the command says {told!r}"
    return ""


def work(first: int, count: int) -> tuple[Counter[Any], list[tuple[int, str]]]:
    """Let `count` commands fail. Returns how they ended, and the bugs: seed and what happened."""
    ends: Counter[Any] = Counter()
    bugs: list[tuple[int, str]] = []
    calls: dict[int, int] = {}
    before = {name: os.environ.get(name) for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "HF_HOME")}
    with tempfile.TemporaryDirectory() as place:
        for name in before:
            os.environ[name] = str(Path(place, name.lower()))
        prepare(sound := Path(place, "sound"))
        old = (sound / "old.png").read_bytes()
        try:
            for seed in range(first, first + count):
                rng = random.Random(seed)
                number = rng.randrange(len(COMMANDS))
                folder = Path(place, "work")
                if number not in calls:
                    disk, words = Disk(), COMMANDS[number]
                    shutil.copytree(sound, folder)
                    assert run(words, folder, disk)[0] in (0, 2), words
                    shutil.rmtree(folder)
                    calls[number] = max(disk.calls, 1)  # a module that is loaded already is not read again
                name = rng.choice(ERRORS)
                disk = Disk(rng.randrange(calls[number]), getattr(errno, name), rng.random() < 0.3)
                shutil.copytree(sound, folder)
                code, told = run(COMMANDS[number], folder, disk)
                what = wrong(COMMANDS[number], folder, old, code, told)
                ends[code] += 1
                if what:
                    bugs.append((seed, f"{' '.join(COMMANDS[number])}: {name} at {disk.failed}: {what}"))
                shutil.rmtree(folder)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
    return ends, bugs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    ends, bugs = work(args.first, args.count)
    print(", ".join(f"{count} ended with {code}" for code, count in sorted(ends.items(), key=str)))
    for seed, what in bugs:
        print(f"seed {seed}: {what}")
    return int(bool(bugs))


if __name__ == "__main__":
    sys.exit(main())
