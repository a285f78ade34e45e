"""Pictures into files: checked before any work, written beside and put into place, never half of one."""

import fcntl
import io
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from klein_mlx.errors import RequestError
from klein_mlx.images.metadata import save_options

MAX_NAME = 255  # bytes of a file's name, on every common disk
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_TEMPORARY = re.compile(r"\.klein-[0-9a-f]{16}\.part")
_QUALITY = {"JPEG": {"quality": 95}, "WEBP": {"quality": 95}}


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse, before any work, a path to which `save_image` could not write."""
    folder = path.parent
    if "\0" in str(path):
        raise RequestError(f"output {str(path)!r} has a zero byte in its name; no disk allows that")
    if (length := len(os.fsencode(path.name))) > MAX_NAME:
        raise RequestError(f"output {path.name[:30]}... has a name of {length} bytes; it must have at most {MAX_NAME}")
    if path.suffix.lower() not in FORMATS:
        raise RequestError(f"output {path} ends in {path.suffix or 'nothing'}; it must end in {', '.join(FORMATS)}")
    if not os.path.isdir(folder):
        raise RequestError(f"output folder {folder} does not exist; make it first")
    if os.path.isdir(path):
        raise RequestError(f"output {path} is a folder; name a file")
    if not overwrite and os.path.lexists(path):
        raise RequestError(f"output {path} exists; choose another name, or overwrite it with --force")
    probe = _beside(path)
    try:  # trying is the only sure test: for root, read-only disks and network folders
        probe.open("xb").close()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise RequestError(f"output folder {folder} is not writable ({error.strerror}); choose another") from None


def encode_image(
    image: Image.Image, suffix: str, recipe: dict[str, Any] | None = None, quality: int | None = None
) -> bytes:
    """A picture's file as bytes: suffix as in FORMATS; recipe, JSON values, goes inside. quality: 0..100, of JPEG and
    WebP (95)."""
    file = io.BytesIO()
    kind = FORMATS[suffix]
    options = _QUALITY.get(kind, {})
    if options and quality is not None:
        options = {"quality": quality}
    image.save(file, format=kind, **options, **save_options(image, kind, recipe or {}))
    return file.getvalue()


def save_image(
    image: Image.Image, path: str | Path, overwrite: bool = False, recipe: dict[str, Any] | None = None
) -> None:
    """Write beside, flush, then put into place: the path holds a whole picture or what it held before.

    path: ending in .png, .jpg, .jpeg or .webp. recipe: JSON values to put inside, as a Picture has them, or None.
    Raises RequestError if it exists and `overwrite` is false, or if the disk refuses.
    """
    path = Path(path)
    check_output(path, overwrite)
    beside = _beside(path)
    try:
        with _held(beside) as file:
            # Not straight into the file: Pillow takes a write that a full disk cut short for a whole one.
            file.write(encode_image(image, path.suffix.lower(), recipe))
            file.flush()
            os.fsync(file.fileno())
            _put(beside, path, overwrite)
    except FileExistsError:
        raise RequestError(f"output {path} exists; choose another name, or overwrite it with --force") from None
    except OSError as error:
        raise RequestError(f"output {path} cannot be written: {error.strerror or error}") from None
    finally:
        beside.unlink(missing_ok=True)


def save_image_free(image: Image.Image, path: Path, recipe: dict[str, Any] | None = None) -> Path:
    """As save_image, under this name or, if another program has taken it meanwhile, the next free one; returns it."""
    number, free = 2, path
    while True:
        try:
            save_image(image, free, recipe=recipe)
            return free
        except RequestError:
            if not os.path.lexists(free):
                raise
        free, number = path.with_name(f"{path.stem}-{number}{path.suffix}"), number + 1


def _beside(path: Path) -> Path:
    """A new hidden name in the same folder, so that the final rename stays on one disk."""
    return path.parent / f".klein-{secrets.token_hex(8)}.part"


def _held(beside: Path) -> BinaryIO:
    """A new file, locked for as long as it is open, so that no other run takes it for a killed one's."""
    while True:
        file = beside.open("xb")
        with suppress(OSError):  # a disk without locks: nothing is ever removed there
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # removed between opening and locking it


def remove_stale(folder: Path) -> None:
    """Remove what killed runs left half-written in a folder: temporary files that nobody holds."""
    try:
        names = [name for name in os.listdir(folder) if _TEMPORARY.fullmatch(name)]
    except OSError:
        return
    for name in names:
        with suppress(OSError):
            handle = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(folder / name)
            finally:
                os.close(handle)


def _put(beside: Path, path: Path, overwrite: bool) -> None:
    if overwrite:
        os.replace(beside, path)
        return
    try:
        os.link(beside, path)  # unlike a rename, never replaces a file that appeared meanwhile
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links (exFAT, SMB)
        if os.path.lexists(path):
            raise FileExistsError(path) from None
        os.rename(beside, path)
