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


class _Held:
    """MLX's limits while anybody holds them: they are the process's, whatever thread asks, so this is its state too.

    The first who comes in notes the caller's limits, the last who leaves puts them back; in between they serve all.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.peaks: list[int] = []  # of each who is inside
        self.cached = 0
        self.wired: int | None = None

    def enter(self, peak: int, machine: int) -> None:
        with self.lock:
            if not self.peaks:
                self.cached = mx.set_cache_limit(machine // CACHE_SHARE)
                mx.set_cache_limit(min(self.cached, machine // CACHE_SHARE))
            if mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu:
                before = mx.set_wired_limit(min(sum(self.peaks) + peak, machine))
                self.wired = self.wired if self.peaks else before
            self.peaks.append(peak)

    def leave(self, peak: int) -> None:
        with self.lock:
            self.peaks.remove(peak)
            if self.peaks:
                return
            mx.set_cache_limit(self.cached)
            if self.wired is not None:
                mx.set_wired_limit(self.wired)
            self.wired = None


_HELD = _Held()


@contextmanager
def memory_limits(peak: int, machine: int) -> Iterator[None]:
    """Inside, MLX's cache of freed buffers is bounded, and on Metal as much memory is wired as the run needs.

    peak: bytes of the run's fullest moment. machine: bytes that there are. A tighter limit of the caller's stays.
    Several threads may be inside at once: as much is wired as all of them need, and the last one out puts all back.
    """
    _HELD.enter(peak, machine)
    try:
        yield
    finally:
        _HELD.leave(peak)


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
