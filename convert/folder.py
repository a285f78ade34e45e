"""Any Source -> a folder in our own format, complete or not there at all.

The work is done in a hidden folder beside the destination, flushed, and renamed: a killed conversion leaves nothing
under the final name and nothing that loads. What it did leave is cleared away by the next one.
"""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from klein_mlx import __version__
from klein_mlx.checkpoint import CONFIG_FILE, FORMAT_VERSION, TOKENIZER_FILE, Source, open_checkpoint
from klein_mlx.config import PARTS, TINY
from klein_mlx.convert.detect import open_model
from klein_mlx.convert.writer import Advance, flush, flush_descriptor, write_json, write_weights
from klein_mlx.errors import CheckpointError
from klein_mlx.quantize import QUANTIZED_PARTS, Quantization, parse, quantize_weights
from klein_mlx.weights import read_json

Progress = Callable[[int, int], None]  # bytes done, bytes in all
_CHUNK = 4 << 20
_MARGIN = 16 << 20  # for headers, klein.json and the file system itself


def convert_checkpoint(
    source: Source | str | Path,
    destination: str | Path,
    *,
    quantize: Quantization | int | str | None = None,
    force: bool = False,
    variant: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a model in our own format; loading the result gives the same weights, bit for bit, as loading the source.

    quantize: 4 or 8 bits for the linear layers of the transformer's and the encoder's blocks; else dtypes are kept.
    force: replace a checkpoint of ours that is at the destination. variant: "tiny" marks the embedded checkpoint.
    progress: called with (bytes done, bytes in all), hashing the source and writing the result counted alike.
    At most one tensor and its quantised form are in memory at a time. Returns the destination.
    Raises CheckpointError, and leaves nothing behind, if anything is wrong.
    """
    if not hasattr(source, "weights"):
        source = open_model(source)  # type: ignore[arg-type]
    model: Source = source  # type: ignore[assignment]
    quantization = parse(quantize)
    if variant not in (None, TINY.name):
        raise CheckpointError(
            f"variant is {variant!r}; only {TINY.name!r} can be forced, others are told from their sizes"
        )
    if quantization and model.quantization:
        raise CheckpointError(f"{model.path}: is quantised already; start from the original")
    target = _checked_destination(Path(destination), model.path, force)
    parts = {part: _weights(model, part, quantization) for part in PARTS}
    read_json(model.tokenizer_file)
    sources = model.files()
    written = sum(array.nbytes for weights in parts.values() for array in weights.values())
    _require_space(target.parent, written + model.tokenizer_file.stat().st_size + _MARGIN)
    advance = _counter(progress, written + sum(path.stat().st_size for path in sources))
    try:
        with _workspace(target) as folder:
            digests = {os.path.relpath(p, model.path): _digest(p, advance) for p in sources}
            for part in PARTS:
                write_weights(folder, part, parts.pop(part), advance)
            _copy(model.tokenizer_file, folder / TOKENIZER_FILE)
            write_json(folder / CONFIG_FILE, _settings(model, quantization, variant, digests))
            _publish(folder, target, force)
    except OSError as error:
        raise CheckpointError(_write_failure(target, written, error)) from error
    return Path(destination)


def _weights(source: Source, part: str, quantization: Quantization | None) -> dict[str, mx.array]:
    weights = source.weights(part)
    return quantize_weights(part, weights, quantization) if quantization and part in QUANTIZED_PARTS else weights


def _settings(
    source: Source, quantization: Quantization | None, variant: str | None, digests: dict[str, str]
) -> dict[str, Any]:
    """What klein.json holds."""
    config = source.config
    forced = variant == TINY.name
    stored = dict.fromkeys(QUANTIZED_PARTS, quantization) if quantization else source.quantization
    return {
        "format_version": FORMAT_VERSION,
        "variant": variant or config.variant.name,
        "is_distilled": config.is_distilled,
        "taps": list(config.taps),
        "max_sequence_length": config.max_sequence_length,
        "default_size": config.default_size,
        "quantization": {part: q.to_dict() for part, q in stored.items() if q},
        "licence": TINY.licence if forced else source.info.get("licence", config.variant.licence),
        "made_by": f"klein-mlx {__version__}",
        "source": {**_origin(source), "sha256": digests},
        "transformer": config.transformer.to_dict(),
        "text_encoder": config.text_encoder.to_dict(),
        "vae": config.vae.to_dict(),
    }


def _origin(source: Source) -> dict[str, Any]:
    """Where a source comes from. A checkpoint of ours that is converted again keeps its own origin inside."""
    origin = source.info.get("source", {})
    if source.info.get("format") != "klein_mlx":
        return origin
    return {"name": source.path.resolve().name, "format": "klein_mlx", "source": origin}


# ---- the destination ----


def _checked_destination(destination: Path, source: Path, force: bool) -> Path:
    """The absolute destination, once nothing speaks against it."""
    target, origin = Path(os.path.expanduser(destination)).resolve(), source.resolve()
    if _is_within(target, origin):
        raise CheckpointError(f"{destination}: is the source itself or inside it; choose another folder")
    if _is_within(origin, target):
        raise CheckpointError(f"{destination}: holds the source; choose another folder")
    parent = target.parent
    if not parent.is_dir():
        raise CheckpointError(f"{destination}: {parent} is not a folder; create it first")
    if os.path.lexists(target):
        if not force:
            raise CheckpointError(f"{destination}: exists already; choose another name, or --force to replace it")
        if not target.is_dir() or (any(target.iterdir()) and not (target / CONFIG_FILE).exists()):
            raise CheckpointError(
                f"{destination}: is not a klein_mlx checkpoint, so it is not replaced; remove it first"
            )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{destination}: {parent} is not writable")
    return target


def _is_within(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or below it, on a file system that may ignore case."""
    return any(p.exists() and os.path.samefile(p, folder) for p in (path, *path.parents) if folder.exists())


def _require_space(parent: Path, needed: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(f"{parent}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


@contextmanager
def _workspace(target: Path) -> Iterator[Path]:
    """An empty folder beside the target, ours alone; afterwards gone, unless it was renamed."""
    folder = target.with_name(f".{target.name}.converting")
    busy = CheckpointError(f"{target}: another conversion is writing it")
    folder.mkdir(exist_ok=True)
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise busy from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:
            pass  # a file system without locks: the rename still lets only a complete folder appear
        if not _is_same(handle, folder):  # the other run has just renamed it
            raise busy
        for left in folder.iterdir():  # by a conversion that was killed
            left.unlink()
        try:
            yield folder
        finally:
            if _is_same(handle, folder):
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


def _is_same(handle: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), folder.stat())
    except FileNotFoundError:
        return False


def _publish(folder: Path, target: Path, force: bool) -> None:
    """Give the finished folder its name."""
    finished = open_checkpoint(folder)
    for part in PARTS:
        finished.weights(part)  # names, shapes and dtypes; nothing is read
    _flush_folder(folder)
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
    _flush_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        flush_descriptor(handle)
    finally:
        os.close(handle)


def _write_failure(target: Path, needed: int, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{target}: the disk is full; {needed / 1e9:.2f} GB are needed. Nothing was left behind"
    return f"{target}: cannot be written ({error.strerror or error})"


# ---- bytes ----


def _counter(progress: Progress | None, total: int) -> Advance:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    return advance


def _digest(path: Path, advance: Advance) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                advance(len(chunk))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _copy(source: Path, destination: Path) -> None:
    with source.open("rb") as reader, destination.open("wb") as writer:
        shutil.copyfileobj(reader, writer)
        flush(writer)
