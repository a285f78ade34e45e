"""Work in threads: every byte once, errors where it is waited for, nothing of it after an exception."""

import errno
import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest

from klein_convert.writer import CHUNK, Counter, Hashing, Writing
from klein_mlx.errors import CheckpointError


def test_what_is_written_and_hashed_is_what_was_given(tmp_path: Path) -> None:
    pieces = [bytes([number]) * size for number, size in enumerate((1, 0, 2 * CHUNK + 3, 77))]
    seen: list[tuple[int, int]] = []
    counter = Counter(sum(map(len, pieces)), lambda done, total: seen.append((done, total)))
    path = tmp_path / "x"
    with path.open("wb") as file, Writing(file, counter) as writing:
        writing.put(b"head", counted=False)
        for piece in pieces:
            writing.put(memoryview(piece))
        digest = writing.finish()
    assert path.read_bytes() == b"head" + b"".join(pieces)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert seen[-1] == (sum(map(len, pieces)),) * 2
    with Hashing([path], Counter()) as hashing:
        assert hashing.digests() == {path: digest}


def test_the_user_s_function_is_called_in_the_user_s_thread(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(3 * CHUNK))
    threads = set()
    counter = Counter(3 * CHUNK, lambda done, total: threads.add(threading.current_thread()))
    with Hashing([tmp_path / "x"], counter) as hashing:
        hashing.digests()
        counter.tell()
    assert threads == {threading.current_thread()}


class Full:
    """A file on a disk that is full."""

    def write(self, data: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_error_comes_where_it_is_waited_for(tmp_path: Path) -> None:
    with Writing(Full(), Counter()) as writing:  # type: ignore[arg-type]
        writing.put(b"1")
        with pytest.raises(OSError, match="No space"):
            writing.put(b"2")
    with pytest.raises(CheckpointError, match="cannot be read"), Hashing([tmp_path / "absent"], Counter()) as hashing:
        hashing.digests()


def test_an_exception_stops_the_threads_soon(tmp_path: Path) -> None:
    """At the next chunk: Ctrl-C does not wait for gigabytes."""
    path = tmp_path / "x"
    with path.open("wb") as file:
        file.truncate(400 * CHUNK)  # without room on the disk
    counter = Counter()
    with pytest.raises(KeyboardInterrupt), Hashing([path], counter):
        raise KeyboardInterrupt
    assert counter._done < 400 * CHUNK
