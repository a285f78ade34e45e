"""The run folder: options, lock, log, and checkpoints that are whole or not there.

    RUN/options.toml   RUN/log.jsonl   RUN/cache/   RUN/previews/
    RUN/checkpoints/step-00000250/   state.json, state.safetensors, and the LoRA or transformer of that step

A checkpoint's folder is written under another name, flushed and renamed.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from klein_mlx.errors import RequestError
from klein_mlx.train.adapters import Weights
from klein_mlx.train.export import flush
from klein_mlx.train.options import FREE, TrainOptions, make_options, stored_values, table
from klein_mlx.weights.safetensors import read_header, read_json

OPTIONS, LOG, STOP, LOCK = "options.toml", "log.jsonl", "stop", "lock"
STATE, ARRAYS, LORA = "state.json", "state.safetensors", "lora.safetensors"
_NAME = re.compile(r"step-(\d{8})")


class RunFolder:
    """A run's folder, held by this process until `close`.

    writes: False for the other processes of a distributed run: they read, and neither lock nor write.
    """

    def __init__(self, folder: Path, writes: bool = True):
        self.folder, self.writes = folder, writes
        self._lock: Any = None

    def open(self, options: TrainOptions, resume: bool) -> None:
        """Make the folder, or check that it is that of these options. Raises RequestError."""
        known = self.folder / OPTIONS
        if not resume and self.writes and self.checkpoints:  # without any it failed at its beginning
            raise RequestError(
                f"{self.folder} holds a run; continue it with --resume {self.folder}, or name another --run"
            )
        if resume:
            check_same(options, make_options(stored_values(self.folder)), self.folder)
        if not self.writes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (self.folder / STOP).unlink(missing_ok=True)
            write_text(known, options.to_toml())
        except BlockingIOError:
            self.close()
            raise RequestError(f"{self.folder} is in use by another training; name another --run") from None
        except OSError as error:
            self.close()
            raise RequestError(f"run folder {self.folder} cannot be written: {error.strerror}") from None

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def asks_to_stop(self) -> bool:
        """Whether a file called stop was put there."""
        return (self.folder / STOP).exists()

    # ---- the log ----

    def log(self, entry: Mapping[str, Any]) -> None:
        if self.writes:
            with _refusals(self.folder / LOG), (self.folder / LOG).open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def cut_log(self, step: int) -> None:
        """Leave out what came after a step that is gone back to."""
        path = self.folder / LOG
        if self.writes and path.exists():
            lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
            write_text(path, "".join(line + "\n" for line in lines))

    # ---- checkpoints ----

    @property
    def checkpoints(self) -> list[Path]:
        """By their steps."""
        place = self.folder / "checkpoints"
        found = [path for path in place.glob("step-*") if _NAME.fullmatch(path.name)] if place.is_dir() else []
        return sorted(found)

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:08}"

    def save(self, step: int, state: Mapping[str, Any], arrays: Weights, write: Any) -> Path:
        """Write a checkpoint. write(folder): puts the LoRA, or the transformer, into it."""
        path = self.checkpoint(step)
        beside = _unfinished(path)
        with _refusals(path):
            try:
                beside.mkdir(parents=True)
                write(beside)
                mx.save_safetensors(str(beside / ARRAYS), arrays)
                (beside / STATE).write_text(json.dumps(state))
                for file in beside.iterdir():
                    flush(file)
                if path.exists():
                    path.rename(_unfinished(path))
                beside.rename(path)
                flush(path.parent)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        return path

    def thin_out(self, keep: int, best: int | None) -> None:
        """Remove all but the newest few, and the best: under another name, as a kill would leave a part of one."""
        for path in self.checkpoints[:-keep]:
            if path != (None if best is None else self.checkpoint(best)):
                with suppress(OSError):
                    path.rename(_unfinished(path))
        for path in (self.folder / "checkpoints").glob(".*.part"):  # these, and those of a process that was killed
            shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> tuple[dict[str, Any], Weights, Path] | None:
        """The newest checkpoint's state and arrays; None if there is none yet."""
        if not self.checkpoints:
            return None
        path = self.checkpoints[-1]
        read_header(path / ARRAYS)
        return read_json(path / STATE), mx.load(str(path / ARRAYS)), path  # type: ignore[return-value]


def _unfinished(path: Path) -> Path:
    """A hidden name beside, for what is not whole."""
    return path.with_name(f".{secrets.token_hex(8)}.part")


class _refusals:
    """Inside, what the disk refuses is a RequestError that names the file."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError) or (isinstance(error, RuntimeError) and "safetensors" in str(error).lower()):
            words = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise RequestError(f"{self._path} cannot be written: {words}") from None


def write_text(path: Path, text: str) -> None:
    """Beside, flushed, renamed."""
    beside = _unfinished(path)
    try:
        beside.write_text(text)
        flush(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def check_same(options: TrainOptions, stored: TrainOptions, folder: Path) -> None:
    """RequestError for an option that differs and would make another training."""
    for name in table():
        now, then = getattr(options, name), getattr(stored, name)
        if name not in (*FREE, "run") and now != then:
            raise RequestError(f"{name} is {now!r:.80}, but {folder} was trained with {then!r:.80}; leave it as it was")
