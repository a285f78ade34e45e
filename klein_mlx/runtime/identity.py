"""Which files a model is: pinned while it is open, and digested for recipes and for what is kept on disk."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from klein_mlx.errors import CheckpointError

WHOLE = 1_000_000_000  # bytes: a larger file is known by samples, for reading it would take seconds
SAMPLES, SAMPLE = 4096, 4096  # of a large file: how many, and the bytes of each

Identity = tuple[int, int, int, int]  # device, inode, bytes, nanoseconds of the last change


@dataclass(frozen=True)
class Pinned:
    """A model's files as they were when it was opened: a part that is read later must come from the same."""

    files: Mapping[Path, Identity]

    @classmethod
    def of(cls, paths: Iterable[Path]) -> "Pinned":
        """Raises CheckpointError for a file that is missing."""
        return cls({path: identity(path) for path in paths})

    def check(self) -> None:
        """Raise CheckpointError if a file has been changed or replaced. To be called behind whatever was read."""
        for path, known in self.files.items():
            if identity(path) != known:
                raise CheckpointError(f"{path}: has changed since the model was opened; open the model again")


def identity(path: Path) -> Identity:
    """What tells a file from one that takes its place. Raises CheckpointError if it cannot be looked at."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def is_sampled(path: Path) -> bool:
    """Whether `digest` knows a file by samples only."""
    return identity(path)[2] > WHOLE


def digest(paths: Sequence[Path], local: bool = False) -> str:
    """SHA-256 of files: of all bytes of those up to WHOLE; of the size and samples all over of larger ones.

    local: for this machine alone; a large file's identity counts too, so that no change between its samples is missed.
    """
    told = hashlib.sha256()
    for path in paths:
        size = identity(path)[2]
        told.update(f"{path.name} {size}\n".encode())
        try:
            with path.open("rb") as file:
                if size <= WHOLE:
                    told.update(hashlib.file_digest(file, "sha256").digest())
                    continue
                for number in range(SAMPLES):
                    told.update(os.pread(file.fileno(), SAMPLE, (size - SAMPLE) * number // (SAMPLES - 1)))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        if local:
            told.update(repr(identity(path)).encode())
    return told.hexdigest()
