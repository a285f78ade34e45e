"""Weights -> safetensors files, as a stream: one tensor is evaluated while the one before is written and dropped.

MLX's own writer needs all of a file's tensors in memory, and leaves a truncated file behind when the disk is full.
Files are hashed and bytes written in threads: the disk, sha256 and MLX's arithmetic do not wait for each other, errors
come where a thread is waited for, and a caller's progress function is only ever called in the caller's own thread.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import BinaryIO, Self

import mlx.core as mx

from klein_mlx.errors import CheckpointError, line_of
from klein_mlx.weights.safetensors import BROKEN, CHUNK, ZEROS, Weight, condition, digest_file, load_now

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


MAX_SHARD_BYTES = 4 * 10**9
_NAMES = {mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32", mx.uint32: "U32", mx.uint8: "U8", mx.int64: "I64"}

Warn = Callable[[str], None]  # told a line about what is odd, but no fault


def write_weights(
    folder: Path,
    stem: str,
    weights: dict[str, Weight],
    counter: Counter,
    originals: dict[str, mx.array] | None = None,
    warn: Warn = lambda line: None,
) -> dict[str, str]:
    """Write `stem.safetensors`, or numbered shards and `stem.safetensors.index.json` above MAX_SHARD_BYTES.

    weights: lazy arrays; EMPTIED as they are written, so that each is freed. All files are flushed to the disk.
    originals: of what is quantized, the original's `condition`, lazily; EMPTIED as well. What is written is looked
    through here. A CheckpointError names a weight that holds NaN or infinity; a matrix of zeros is warned of.
    counter: told of every byte of the weights, from the thread that writes them.
    Returns the files' names with their sha256.
    """
    originals = {} if originals is None else originals
    digests: dict[str, str] = {}
    shards = _split(weights, MAX_SHARD_BYTES)
    if len(shards) == 1:
        name = f"{stem}.safetensors"
        return {name: _write_file(folder / name, shards[0], weights, counter, originals, warn)}
    total = sum(array.nbytes for array in weights.values())
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        path = folder / f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, path.name)
        digests[path.name] = _write_file(path, names, weights, counter, originals, warn)
    index = folder / f"{stem}.safetensors.index.json"
    write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return {**digests, index.name: digest_file(index)}


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, flushed to the disk."""
    with path.open("wb") as file:
        file.write(content)
        flush(file)


def write_json(path: Path, values: dict) -> None:
    """Write a JSON object, flushed to the disk."""
    write_bytes(path, json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n")


def flush(file: BinaryIO) -> None:
    """Push a file's bytes to the disk itself, so that a later rename cannot outlive them."""
    file.flush()
    flush_descriptor(file.fileno())


def flush_descriptor(descriptor: int) -> None:
    """fsync; on macOS the disk's own cache too, where the file system can."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(descriptor, full)
            return
        except OSError:
            pass
    os.fsync(descriptor)


def _split(weights: dict[str, Weight], max_bytes: int) -> list[list[str]]:
    """Names in order, cut into runs of at most `max_bytes` (a single larger tensor is its own run)."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(weights):
        if shards[-1] and size + weights[name].nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += weights[name].nbytes
    return shards


def _write_file(
    path: Path,
    names: list[str],
    weights: dict[str, Weight],
    counter: Counter,
    originals: dict[str, mx.array],
    warn: Warn,
) -> str:
    """Header first, from shapes and dtypes that lazy arrays know; then each tensor's bytes. Returns the sha256."""
    # What is no multiple of 8 bytes comes last, wider dtypes first: so every tensor is aligned, without holes.
    names = sorted(
        names, key=lambda n: (weights[n].nbytes % 8 != 0, -weights[n].itemsize * (weights[n].nbytes % 8 != 0))
    )
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name in names:
        array = weights[name]
        start, end = end, end + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, Writing(file, counter) as writing:
        writing.put(len(text).to_bytes(8, "little") + text, counted=False)
        for name in names:
            array = _made(name, weights.pop(name), originals.pop(_weight_of(name), None), warn)
            if array is not None:
                writing.put(memoryview(array).cast("B"))  # type: ignore[arg-type]
            del array
            mx.clear_cache()
        digest = writing.finish()
        flush(file)
    return digest


def _weight_of(name: str) -> str:
    """The weight that scales or biases belong to."""
    return re.sub(r"\.(scales|biases)$", ".weight", name)


def _made(name: str, weight: Weight, original: mx.array | None, warn: Warn) -> mx.array | None:
    """A weight, evaluated, in a dtype that Python's buffers have; None if it has no numbers.

    original: the condition of what it was quantized from; that of the weight itself is looked at here.
    """
    if weight.size == 0:
        return None
    array = mx.contiguous(load_now(weight))
    found = [condition(array), *([] if original is None else [original])]
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    try:
        mx.eval(array, *found)
    except RuntimeError as error:
        raise CheckpointError(f"{name}: cannot be read from the source ({line_of(error)})") from None
    if any(each.item() == BROKEN for each in found):
        raise CheckpointError(f"{_weight_of(name)}: holds NaN or infinity: the source is damaged; get it again")
    if found[-1].item() == ZEROS and len(weight.shape) > 1 and not name.endswith((".scales", ".biases")):
        warn(f"{_weight_of(name)} is all zeros: is the source complete?")
    return array
