"""Weights -> safetensors files, as a stream: one tensor is evaluated while the one before is written and dropped.

MLX's own writer needs all of a file's tensors in memory, and leaves a truncated file behind when the disk is full.
"""

import fcntl
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx

from klein_convert.threads import Counter, Writing
from klein_mlx.errors import CheckpointError
from klein_mlx.weights.safetensors import BROKEN, ZEROS, Weight, condition, digest_file, load_now, one_line

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
    originals: of what is quantised, the original's `condition`, lazily; EMPTIED as well. What is written is looked
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


def write_json(path: Path, values: dict) -> None:
    """Write a JSON object, flushed to the disk."""
    with path.open("wb") as file:
        file.write(json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n")
        flush(file)


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

    original: the condition of what it was quantised from; that of the weight itself is looked at here.
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
        raise CheckpointError(f"{name}: cannot be read from the source ({one_line(error)})") from None
    if any(each.item() == BROKEN for each in found):
        raise CheckpointError(f"{_weight_of(name)}: holds NaN or infinity: the source is damaged; get it again")
    if found[-1].item() == ZEROS and len(weight.shape) > 1 and not name.endswith((".scales", ".biases")):
        warn(f"{_weight_of(name)} is all zeros: is the source whole?")
    return array
