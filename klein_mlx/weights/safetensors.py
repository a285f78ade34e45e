"""Safetensors files on disk: checked headers, shards with an index, lazily mapped arrays; JSON files; files' digests.

MLX accepts files that safetensors refuses (overlaps, holes, negative shapes), so the safetensors library checks every
header first. Nothing here knows what a model is; nothing reads a weight before it is evaluated.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from klein_mlx.errors import CheckpointError, human_bytes, line_of
from klein_mlx.paths import PRECISIONS

FLOATS = ("BF16", "F16", "F32")
PACKED = ("U32",)
BYTES = ("U8",)
_MAX_JSON_BYTES = 64 << 20
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_TENSORS = 100_000  # in a file or an index; a klein model has under a thousand
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Deferred:
    """An array whose values have to be decoded outside of MLX's graph (GGUF): made anew whenever `load` is called."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    load: Callable[[], mx.array]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return self.dtype.size

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize


Weight = mx.array | Deferred


def load_now(weight: Weight) -> mx.array:
    """A weight as an array; still lazy, unless it had to be decoded."""
    return weight.load() if isinstance(weight, Deferred) else weight


# A floating number is NaN or infinite where all bits of its exponent are set; looking at them is fastest.
_EXPONENTS = {mx.bfloat16: (mx.uint16, 0x7F80), mx.float16: (mx.uint16, 0x7C00), mx.float32: (mx.uint32, 0x7F800000)}
ZEROS, SOUND, BROKEN = 0, 1, 3


def condition(array: mx.array) -> mx.array:
    """A lazy integer: ZEROS if all numbers are (or too small to be normal), BROKEN if one is NaN or infinite, else
    SOUND. Integers are sound, and so is an array without numbers.
    """
    if array.dtype not in _EXPONENTS or not array.size:
        return mx.array(SOUND)
    bits, exponent = _EXPONENTS[array.dtype]
    largest = (mx.contiguous(array).view(bits) & exponent).max()
    return (largest > 0).astype(mx.int32) + 2 * (largest == exponent).astype(mx.int32)


def is_finite(*arrays: mx.array) -> mx.array:
    """Whether no number in these is NaN or infinite, as a lazy bool; True for integers."""
    found = [mx.array(True)]
    for array in arrays:
        if array.dtype in _EXPONENTS and array.size:
            bits, exponent = _EXPONENTS[array.dtype]
            found.append((mx.contiguous(array).view(bits) & exponent).max() != exponent)
    return mx.stack(found).all()


@dataclass(frozen=True)
class Entry:
    """One tensor as a safetensors header describes it; `dtype` in its words ("BF16")."""

    dtype: str
    shape: tuple[int, ...]


def require_file(path: Path) -> int:
    """The size of a regular, readable file. Anything else (missing, a folder, a pipe) is a CheckpointError."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: is not a regular file")
        with path.open("rb"):
            return status.st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing{' (a broken link)' if path.is_symlink() else ''}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: Path) -> dict[str, Any]:
    """Parse a file that must hold one JSON object."""
    if require_file(path) > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: is over {_MAX_JSON_BYTES >> 20} MB; a JSON file of a checkpoint is small")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({line_of(error)})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(values).__name__}; it must hold an object")
    return values


Identity = tuple[int, int, int, int]  # device, inode, bytes, nanoseconds of the last change


def identity(path: Path) -> Identity:
    """What tells a file from one that takes its place. Raises CheckpointError if it cannot be looked at."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_header(path: Path) -> dict[str, Entry]:
    """A safetensors file's tensors; the same file is read once. The safetensors library checks the header: MLX would
    accept a damaged one."""
    require_file(path)
    return dict(_header(path, identity(path)))


@lru_cache(64)
def _header(path: Path, known: Identity) -> dict[str, Entry]:
    from safetensors import SafetensorError, safe_open

    _check_count(path, known[2])
    try:
        with safe_open(path, framework="mlx") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: Entry(str(s.get_dtype()), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        reason = _shortfall(path) or _usual_mistake(path) or f"is damaged: {line_of(error)}"
    except MemoryError:  # a limit on the process, rather than the machine's memory: the file is only mapped
        reason = f"cannot be mapped: it has {human_bytes(path.stat().st_size)}, more than this process may address"
    raise CheckpointError(f"{path}: {reason}") from None


def _check_count(path: Path, size: int) -> None:
    """CheckpointError for a header of too many tensors, before it is parsed."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        count = file.read(length).count(b'"data_offsets"') if length <= min(size, _MAX_HEADER_BYTES) else 0
    if count > MAX_TENSORS:
        raise CheckpointError(f"{path}: claims {count} tensors; klein_mlx reads {MAX_TENSORS} at most")


def read_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file whose header `read_header` has checked."""
    from safetensors import safe_open

    with safe_open(path, framework="mlx") as tensors:
        return dict(tensors.metadata() or {})


def _shortfall(path: Path) -> str | None:
    """How many bytes a file lacks that was cut short behind its header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size, _MAX_HEADER_BYTES):
            return None
        try:
            header = json.loads(file.read(length))
            end = max(t["data_offsets"][1] for name, t in header.items() if name != "__metadata__")
            lacking = 8 + length + end - size
        except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
            return None
    return f"is {lacking} bytes short: an incomplete download or copy; get it again" if lacking > 0 else None


def _usual_mistake(path: Path) -> str | None:
    """What a refused file is, told from its first bytes. (Sound files may begin so too: their length comes first.)"""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
    if size < 8:
        return f"has {size} bytes; it is not a safetensors file"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights: run `git lfs pull` where it was cloned"
    if start.lstrip()[:1] == b"<":
        return "is a web page saved under this name, not the weights: download it again"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "is a PyTorch pickle, which can run code when opened; klein_mlx reads safetensors only"
    if start.startswith(b"SQLite format 3"):
        return (
            "is an SQLite file (Draw Things keeps its models so), which klein_mlx does not read: take the safetensors"
        )
    if start.startswith(b"GGUF"):
        return "is a GGUF file, not safetensors"
    length = int.from_bytes(start[:8], "little")
    if length > min(size, _MAX_HEADER_BYTES):
        if start.lstrip()[:1] == b"{":
            return "is a JSON file, not weights: give the folder that it is in"
        if length >> 40:  # text, or another kind of file
            return "is not a safetensors file"
        return f"is not a safetensors file, or is cut short: its header claims {length} bytes, the file has {size}"
    return None


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of one part: what their headers hold. `where` names them in messages."""

    where: Path
    shards: dict[Path, dict[str, Entry]]

    def check(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, tuple[str, ...]] | None = None,
        left_out: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Raise a CheckpointError unless the files hold exactly these tensors, and perhaps some to be left out.

        shapes: what each tensor must be; dtypes: those allowed, in safetensors' words, where it is not a float.
        """
        found = {name for entries in self.shards.values() for name in entries}
        missing = sorted(set(shapes) - found)
        unknown = sorted(name for name in found - set(shapes) if not left_out(name))
        if missing or unknown:
            told = [
                f"{len(names)} {word} ({_shown(names[0])}{' ...' if len(names) > 1 else ''})"
                for names, word in ((missing, "missing"), (unknown, "unknown"))
                if names
            ]
            raise CheckpointError(f"{self.where}: {', '.join(told)}")
        for path, entries in self.shards.items():
            for name, entry in entries.items():
                if name not in shapes:
                    continue
                if entry.shape != tuple(shapes[name]):
                    right = tuple(shapes[name])
                    raise CheckpointError(f"{path}: {_shown(name)} has shape {entry.shape}; it must be {right}")
                allowed = (dtypes or {}).get(name, FLOATS)
                if entry.dtype not in allowed:
                    right = " or ".join(allowed)
                    raise CheckpointError(f"{path}: {_shown(name)} has dtype {entry.dtype}; it must be {right}")

    def arrays(self) -> dict[str, mx.array]:
        """Every tensor, mapped: MLX reads one from its file when it is first evaluated."""
        arrays: dict[str, mx.array] = {}
        for path in self.shards:
            try:
                loaded = mx.load(str(path), format="safetensors")
            except (RuntimeError, OSError) as error:
                raise CheckpointError(f"{path}: cannot be read ({line_of(error)})") from None
            arrays |= loaded  # type: ignore[arg-type]
        return arrays


def open_weights(folder: Path, stem: str) -> WeightFiles:
    """Read the headers of `stem.safetensors` in a folder, or of the shards that `stem.safetensors.index.json` names;
    where neither is there, of a file or an index that states its precision.
    """
    single, index = _file_and_index(folder, stem)
    if os.path.lexists(single) and os.path.lexists(index):
        weight_map = read_json(index).get("weight_map")
        if isinstance(weight_map, dict) and set(map(str, weight_map.values())) == {single.name}:  # mlx-lm's way
            return WeightFiles(index, _read_shards(index))
        raise CheckpointError(f"{folder}: holds both {single.name} and {index.name}; remove the one that is stale")
    if os.path.lexists(single):
        return WeightFiles(single, {single: read_header(single)})
    if os.path.lexists(index):
        return WeightFiles(index, _read_shards(index))
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in _PICKLES and not p.name.startswith("._"))
    if pickles:
        raise CheckpointError(
            f"{folder}: holds {pickles[0]} but no {single.name}; pickles can run code when opened and are not read: "
            "get the safetensors files"
        )
    raise CheckpointError(f"{single}: is missing, and so is {index.name}")


def _file_and_index(folder: Path, stem: str) -> tuple[Path, Path]:
    """The two names under which a part's weights may stand, as diffusers and transformers write them."""
    plain = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if any(map(os.path.lexists, plain)):
        return plain
    pairs = []
    for kind in PRECISIONS:
        older = folder / f"{stem}.{kind}.safetensors.index.json"
        index = older if os.path.lexists(older) else folder / f"{stem}.safetensors.index.{kind}.json"
        pairs.append((folder / f"{stem}.{kind}.safetensors", index))
    present = [pair for pair in pairs if any(map(os.path.lexists, pair))]
    if len(present) > 1:
        names = " and ".join(next(path.name for path in pair if os.path.lexists(path)) for pair in present)
        raise CheckpointError(f"{folder}: holds {names}; keep the one that you want")
    return present[0] if present else plain


def _read_shards(index: Path) -> dict[Path, dict[str, Entry]]:
    """The headers of an index's shards, which must hold just what the index says."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointError(f"{index}: names {len(weight_map)} tensors; klein_mlx reads {MAX_TENSORS} at most")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors") or "\0" in name:
            raise CheckpointError(
                f"{index}: names the shard {name!r}; it must be a .safetensors file in its own folder"
            )
    promised: dict[str, set[str]] = {name: set() for name in sorted(set(weight_map.values()))}
    for tensor, name in weight_map.items():
        promised[name].add(tensor)
    shards = {index.parent / name: {} for name in promised}
    for path in shards:
        require_file(path)
    for path in shards:
        shards[path] = read_header(path)
        if odd := sorted(promised[path.name] ^ set(shards[path])):
            where = "is not in it" if odd[0] in promised[path.name] else "is in it"
            raise CheckpointError(f"{path}: {_shown(odd[0])} {where}, unlike {index.name} says: get both again")
    return shards


def _shown(name: str) -> str:
    """A tensor's name, fit for one line."""
    return (name if name.isprintable() else ascii(name))[:100]


CHUNK = 16 << 20  # bytes hashed or written at a time


def digest_file(path: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """A file's sha256, in hexadecimal. Raises CheckpointError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                advance(len(chunk))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


# ---- files that stay what they were ----

WHOLE = 1_000_000_000  # bytes: a larger file is known by samples, for reading it would take seconds
SAMPLES, SAMPLE = 4096, 4096  # of a large file: how many, and the bytes of each


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
