"""Work beside the caller's: files hashed and bytes written in threads; errors come where it is waited for.

A conversion has three kinds of work that do not wait for each other: the disk, sha256, and MLX's arithmetic. What a
user passes (a progress function) is only ever called in the user's own thread.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import BinaryIO, Self

from klein_mlx.weights.safetensors import CHUNK, digest_file

_EVERY = 0.1  # seconds between two looks at how far a thread is


class Stopped(Exception):
    """Raised in a thread whose work nobody waits for any more."""


class Counter:
    """Bytes done of `total`, counted in any thread; `tell` shows them, in the thread that calls it."""

    def __init__(self, total: int = 0, show: Callable[[int, int], None] | None = None):
        self._total, self._show = total, show
        self._done = self._told = 0
        self._lock, self._stopped = Lock(), False

    def add(self, count: int) -> None:
        """Raises Stopped once `stop` was called."""
        if self._stopped:
            raise Stopped
        with self._lock:
            self._done += count

    def tell(self) -> None:
        done = self._done
        if self._show and done != self._told:
            self._told = done
            self._show(done, self._total)

    def stop(self) -> None:
        """Let every thread that counts here end at its next chunk."""
        self._stopped = True


class _Thread:
    """One thread; the block's end waits for it, and an exception stops it first."""

    def __init__(self, counter: Counter):
        self.counter = counter
        self._pool = ThreadPoolExecutor(1)
        self._waiting: Future | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self.counter.stop()
        self._pool.shutdown(wait=True)

    def wait(self) -> None:
        """Until what was begun is done; shows how far it is meanwhile. Raises what it raised."""
        begun, self._waiting = self._waiting, None
        while begun and not wait([begun], timeout=_EVERY).done:
            self.counter.tell()
        if begun:
            begun.result()


class Hashing(_Thread):
    """The sha256 of files, taken one after the other; `digests` waits for them. Reading them early also leaves them in
    the system's cache, where whoever needs their bytes next finds them."""

    def __init__(self, paths: Sequence[Path], counter: Counter):
        super().__init__(counter)
        self._found: dict[Path, str] = {}
        self._waiting = self._pool.submit(self._run, list(paths))

    def _run(self, paths: list[Path]) -> None:
        for path in paths:
            self._found[path] = digest_file(path, self.counter.add)

    def digests(self) -> dict[Path, str]:
        """Each file's sha256, in hexadecimal. Raises CheckpointError if one cannot be read."""
        self.wait()
        return self._found


class Writing(_Thread):
    """Bytes written to a file, one piece behind the caller: while one is hashed and written, the next can be made."""

    def __init__(self, file: BinaryIO, counter: Counter):
        super().__init__(counter)
        self._file, self._digest = file, hashlib.sha256()

    def put(self, data: memoryview | bytes, counted: bool = True) -> None:
        """Write these bytes once those before are written. counted: whether they belong to the counter's total."""
        self.wait()
        self._waiting = self._pool.submit(self._write, data, counted)
        self.counter.tell()

    def _write(self, data: memoryview | bytes, counted: bool) -> None:
        for start in range(0, len(data), CHUNK):
            chunk = data[start : start + CHUNK]
            self._digest.update(chunk)
            self._file.write(chunk)
            self.counter.add(len(chunk) if counted else 0)

    def finish(self) -> str:
        """Wait for the last bytes. Returns the sha256 of all."""
        self.wait()
        self.counter.tell()
        return self._digest.hexdigest()
