"""MLX's own limits on memory while a run works, and the files that it will need read ahead of it.

Both leave nothing behind: the limits are put back whenever the caller has the word, the reading ends with the run.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import mlx.core as mx

CACHE_SHARE = 16  # MLX keeps freed buffers up to this part of the machine's memory, instead of without bound
_BLOCK = 8 << 20


@contextmanager
def memory_limits(peak: int, machine: int) -> Iterator[None]:
    """Inside, MLX's cache of freed buffers is bounded, and on Metal as much memory is wired as the run needs.

    peak: bytes of the run's fullest moment. machine: bytes that there are. A tighter limit of the caller's stays.
    """
    cached = mx.set_cache_limit(machine // CACHE_SHARE)
    mx.set_cache_limit(min(cached, machine // CACHE_SHARE))
    wired = mx.set_wired_limit(min(peak, machine)) if mx.metal.is_available() else None
    try:
        yield
    finally:
        mx.set_cache_limit(cached)
        if wired is not None:
            mx.set_wired_limit(wired)


class ReadAhead:
    """Inside of a `with`, reads files in a thread of its own, for the system to keep them in its cache.

    paths: one after the other; none: nothing is started. done: bytes read so far.
    """

    def __init__(self, paths: Sequence[Path]):
        self.done = 0
        self._paths, self._stopped = paths, threading.Event()
        self._thread = threading.Thread(target=self._read, name="klein_mlx reads ahead", daemon=True)

    def __enter__(self) -> Self:
        if self._paths:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self.wait()

    def wait(self) -> None:
        """Return once the thread has ended."""
        if self._paths:
            self._thread.join()

    def _read(self) -> None:
        block = bytearray(_BLOCK)
        for path in self._paths:
            try:
                with path.open("rb", buffering=0) as file:
                    while not self._stopped.is_set() and (count := file.readinto(block)):
                        self.done += count
            except OSError:  # whoever needs the file will tell
                pass
