"""A folder that is complete or not there at all: where it may be, the hidden folder that it is made in, its renaming.

The work is done beside the destination, flushed, and renamed: a killed run leaves nothing under the final name and
nothing that loads. What it did leave is cleared away by the next one.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from klein_convert.writer import flush_descriptor
from klein_mlx.errors import CheckpointError
from klein_mlx.weights.checkpoint import CONFIG_FILE, UNFINISHED

OURS = ".klein-mlx"  # in a hidden folder: that it is ours, and may be cleared


def checked_destination(destination: Path, source: Path, force: bool, mark: str) -> Path:
    """The absolute destination, once nothing speaks against it. mark: the file that says what may be replaced."""
    try:
        os.fspath(destination).encode("utf-8")
        target, origin = Path(os.path.expanduser(destination)).resolve(), source.resolve()
        inside = _is_within(target, origin)
    except (OSError, ValueError) as error:  # too long, a zero byte, not UTF-8
        raise CheckpointError(f"{destination!s:.60}: no such folder can be made ({error!s:.80})") from None
    if inside:
        raise CheckpointError(f"{destination}: is the source itself or inside it; choose another folder")
    if _is_within(origin, target):
        raise CheckpointError(f"{destination}: holds the source; choose another folder")
    parent = target.parent
    if not parent.is_dir():
        raise CheckpointError(f"{destination}: {parent} is not a folder; create it first")
    if os.path.lexists(target):
        if not force:
            raise CheckpointError(f"{destination}: exists already; choose another name, or --force to replace it")
        if not target.is_dir() or (any(target.iterdir()) and not (target / mark).exists()):
            what = "a klein_mlx checkpoint" if mark == CONFIG_FILE else f"a folder with a {mark}"
            raise CheckpointError(f"{destination}: is not {what}, so it is not replaced; remove it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{destination}: {parent} is not writable")
    return target


def _is_within(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or below it, on a file system that may ignore case."""
    return any(p.exists() and os.path.samefile(p, folder) for p in (path, *path.parents) if folder.exists())


def require_space(parent: Path, needed: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(f"{parent}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


@contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """An empty folder beside the target, ours alone; afterwards gone, unless it was renamed."""
    folder = target.with_name(f".{target.name}{UNFINISHED}")
    handle, others = None, False
    try:
        folder.mkdir(exist_ok=True)
        try:
            handle = _lock(folder, target)
        except CheckpointError:
            others = True
            raise
        if any(folder.iterdir()) and not (folder / OURS).exists():
            raise _foreign(folder)
        (folder / OURS).touch()
        for left in folder.iterdir():  # by a conversion that was killed
            if left.name == OURS:
                continue
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield folder
    finally:
        if handle is not None and _is_same(handle, folder) and (folder / OURS).exists():
            shutil.rmtree(folder, ignore_errors=True)
        elif not others:  # interrupted before anything was in it; a folder with files stays
            with suppress(OSError):
                folder.rmdir()
        if handle is not None:
            os.close(handle)


def _lock(folder: Path, target: Path) -> int:
    """A handle of the folder, locked for this process. Raises CheckpointError if another has it, or if it is a link."""
    busy = CheckpointError(f"{target}: another conversion is writing it")
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise busy from None
    except OSError:  # a link, which may lead anywhere
        raise _foreign(folder) from None
    try:
        with suppress(OSError):  # of a file system without locks: still only a complete folder appears, by its renaming
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise busy from None
        if not _is_same(handle, folder):  # the other run has just renamed it
            raise busy
    except BaseException:
        os.close(handle)
        raise
    return handle


def _foreign(folder: Path) -> CheckpointError:
    return CheckpointError(f"{folder}: is in the way, and no conversion of ours made it; remove it first")


def _is_same(handle: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), folder.stat())
    except FileNotFoundError:
        return False


def publish(folder: Path, target: Path, force: bool) -> None:
    """Give the finished folder its name."""
    flush_folder(folder)
    replaced = target.with_name(f".{target.name}.replaced")
    if not os.path.lexists(target):
        os.rename(folder, target)
    elif not force:
        raise CheckpointError(f"{target}: has appeared in the meantime; nothing was written")
    else:
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(target, replaced)
        try:
            os.rename(folder, target)
        except OSError:
            os.rename(replaced, target)
            raise
    (target / OURS).unlink(missing_ok=True)
    flush_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        flush_descriptor(handle)
    finally:
        os.close(handle)


def write_failure(target: Path, needed: int, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{target}: the disk is full; {needed / 1e9:.2f} GB are needed. Nothing was left behind"
    return f"{target}: cannot be written ({error.strerror or error})"
