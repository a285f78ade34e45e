"""GGUF files: a header read by our own bounded walk, blocks decoded by gguf-py.

MLX's own GGUF reader is never used: it decodes Q4_K wrongly, drops types that it does not know, and can be made to
crash; gguf-py's header reader can be made to hang. Nothing of a file is believed here before it has been compared
with the file's length.

Source: the GGUF specification, version 3 (ggml, docs/gguf.md); block sizes from gguf-py, GGML_QUANT_SIZES.
"""

import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from klein_mlx.errors import CheckpointError, line_of
from klein_mlx.formats.scaled import Tensors
from klein_mlx.weights.checkpoint import ReadRows, read_bytes_of_rows
from klein_mlx.weights.safetensors import Deferred, Entry, Weight

_VERSIONS = (2, 3)
_MAX_COUNT = 1 << 16  # tensors, and keys
_MAX_ITEMS = 1 << 21  # strings in arrays, all together: a tokenizer has 300 000
_MAX_NAME = 1 << 16
_MAX_DIMS = 4
_MAX_AXIS = (1 << 31) - 1  # MLX's
_DECODED_AT_ONCE = 1 << 22  # weights; gguf-py needs some 20 bytes for each
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class Type(NamedTuple):
    """How GGUF stores numbers: in blocks of so many, of so many bytes."""

    name: str
    block: int
    size: int


TYPES = {
    0: Type("F32", 1, 4),
    1: Type("F16", 1, 2),
    2: Type("Q4_0", 32, 18),
    3: Type("Q4_1", 32, 20),
    6: Type("Q5_0", 32, 22),
    7: Type("Q5_1", 32, 24),
    8: Type("Q8_0", 32, 34),
    10: Type("Q2_K", 256, 84),
    11: Type("Q3_K", 256, 110),
    12: Type("Q4_K", 256, 144),
    13: Type("Q5_K", 256, 176),
    14: Type("Q6_K", 256, 210),
    16: Type("IQ2_XXS", 256, 66),
    17: Type("IQ2_XS", 256, 74),
    18: Type("IQ3_XXS", 256, 98),
    19: Type("IQ1_S", 256, 50),
    20: Type("IQ4_NL", 32, 18),
    21: Type("IQ3_S", 256, 110),
    22: Type("IQ2_S", 256, 82),
    23: Type("IQ4_XS", 256, 136),
    29: Type("IQ1_M", 256, 56),
    30: Type("BF16", 1, 2),
    34: Type("TQ1_0", 256, 54),
    35: Type("TQ2_0", 256, 66),
}
_PLAIN = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


@dataclass(frozen=True)
class Block:
    """One tensor of a file. shape: as it is stored, outermost axis first; start, size: its bytes."""

    type: Type
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass
class _Walk:
    """A position in a file's header; every step is checked against the end."""

    data: mmap.mmap
    at: int = 4
    items: int = 0
    values: dict[str, Any] = field(default_factory=dict)

    def take(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        if self.at + size > len(self.data):
            raise ValueError("its header runs past the end of the file")
        value = struct.unpack_from(f"<{code}", self.data, self.at)[0]
        self.at += size
        return value

    def skip(self, size: int) -> int:
        """Move on by `size` bytes; returns where they begin."""
        if size > len(self.data) - self.at:
            raise ValueError("its header runs past the end of the file")
        self.at += size
        return self.at - size

    def text(self, limit: int | None = None) -> str:
        length = self.take("Q")
        if limit is not None and length > limit:
            raise ValueError(f"a name claims {length} bytes")
        start = self.skip(length)
        return self.data[start : start + min(length, _MAX_NAME)].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A key's value; of arrays only short ones of numbers are kept."""
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"a key has the unknown type {kind}")
        inner, count = self.take("I"), self.take("Q")
        if inner in _SCALARS:
            size = struct.calcsize(f"<{_SCALARS[inner]}")
            if count > len(self.data) // size:
                raise ValueError(f"an array claims {count} numbers")
            start = self.skip(count * size)
            return list(struct.unpack_from(f"<{count}{_SCALARS[inner]}", self.data, start)) if count <= 8 else None
        self.items += count
        if inner != _STRING or self.items > _MAX_ITEMS:
            raise ValueError(f"an array claims {count} items of type {inner}")
        for _ in range(count):
            self.skip(self.take("Q"))
        return None


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Block]]:
    """A file's keys and tensors. Raises CheckpointError for whatever its header claims and its length denies."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Walk(data))
    except (ValueError, struct.error, OSError) as error:
        raise CheckpointError(f"{path}: is a damaged GGUF file: {line_of(error)}") from None


def _read(walk: _Walk) -> tuple[dict[str, Any], dict[str, Block]]:
    version = walk.take("I")
    if version not in _VERSIONS:
        raise ValueError(f"its version is {version}; klein_mlx reads {' and '.join(map(str, _VERSIONS))}")
    tensors, keys = walk.take("Q"), walk.take("Q")
    if max(tensors, keys) > _MAX_COUNT:
        raise ValueError(f"it claims {tensors} tensors and {keys} keys")
    for _ in range(keys):
        name = walk.text(_MAX_NAME)
        if name in walk.values:
            raise ValueError(f"the key {name[:80]} appears twice")
        walk.values[name] = walk.value(walk.take("I"))
    claims = [_claim(walk) for _ in range(tensors)]
    alignment = walk.values.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment!r}")
    begin = -(-walk.at // alignment) * alignment
    blocks: dict[str, Block] = {}
    for name, kind, shape, offset, size in claims:
        if name in blocks:
            raise ValueError(f"the tensor {name[:80]} appears twice")
        if offset % alignment or begin + offset + size > len(walk.data):
            raise ValueError(f"{name[:80]} lies outside of the file: an incomplete download or copy")
        blocks[name] = Block(kind, shape, begin + offset, size)
    ordered = sorted(blocks.items(), key=lambda item: item[1].start)
    for (name, block), (_, following) in pairwise(ordered):
        if block.start + block.size > following.start:
            raise ValueError(f"{name[:80]} overlaps its neighbour")
    return walk.values, blocks


def _claim(walk: _Walk) -> tuple[str, Type, tuple[int, ...], int, int]:
    """What the header says of the next tensor: name, type, shape, offset, bytes."""
    name, dims = walk.text(_MAX_NAME), walk.take("I")
    if dims > _MAX_DIMS:
        raise ValueError(f"{name[:80]} has {dims} axes")
    shape = tuple(walk.take("Q") for _ in range(dims))[::-1]
    if max(shape, default=0) > _MAX_AXIS:
        raise ValueError(f"{name[:80]} has the shape {shape}")
    number, offset = walk.take("I"), walk.take("Q")
    if number not in TYPES:
        known = ", ".join(kind.name for kind in TYPES.values())
        raise ValueError(f"{name[:80]} has the type {number}, which klein_mlx does not read (it reads {known})")
    kind = TYPES[number]
    if (*shape, 1)[dims - 1] % kind.block:  # a single number is a row of one
        raise ValueError(f"{name[:80]} has rows of {(*shape, 1)[dims - 1]}, in blocks of {kind.block}")
    return name, kind, shape, offset, math.prod(shape) // kind.block * kind.size


_PIECE = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\.gguf)", re.DOTALL)  # as llama-gguf-split names the pieces of a model
_MAX_PIECES = 1000


def pieces_of(name: str) -> list[str]:
    """The names of all pieces of a model that one of them belongs to, in order; of any other file its own."""
    found = _PIECE.fullmatch(name)
    if found is None or not 0 < int(found[3]) <= _MAX_PIECES:
        return [name]
    return [f"{found[1]}{number:05}-of-{found[3]}{found[4]}" for number in range(1, int(found[3]) + 1)]


def _read_pieces(path: Path) -> tuple[dict[str, Any], dict[str, tuple[Path, Block]]]:
    """The keys of a file, and its tensors; of a model in pieces the first one's keys, and the tensors of all.

    Raises CheckpointError, with what to do, for a piece without the others.
    """
    values, blocks = read_gguf(path)
    count = values.get("split.count", 1)
    if type(count) is not int or count < 2:
        return values, {name: (path, block) for name, block in blocks.items()}
    paths = [path.with_name(name) for name in pieces_of(path.name)]
    if len(paths) != count:
        raise CheckpointError(
            f"{path}: is one of {count} pieces of a model; give it the name that it came with (it ends in "
            f"-00001-of-{count:05}.gguf), with the others beside it"
        )
    if lacking := [piece.name for piece in paths if not piece.exists()]:
        raise CheckpointError(
            f"{path}: is one of {count} pieces of a model, and {lacking[0]} is not beside it; get all of them"
        )
    found: dict[str, tuple[Path, Block]] = {}
    for number, piece in enumerate(paths):
        own, blocks = read_gguf(piece)
        if (own.get("split.no"), own.get("split.count")) != (number, count) or found.keys() & blocks.keys():
            raise CheckpointError(f"{piece}: is not piece {number + 1} of {count} of this model; get them all again")
        found |= {name: (piece, block) for name, block in blocks.items()}
        values = own if number == 0 else values
    if (total := values.get("split.tensors.count", len(found))) != len(found):
        raise CheckpointError(f"{path}: its pieces hold {len(found)} tensors, not {total}; get them all again")
    return values, found


def open_gguf(path: Path) -> Tensors:
    """A GGUF file's tensors; blocks become bfloat16 when they are asked for, one tensor at a time. Of a model in pieces
    any of them may be named.
    """
    values, placed = _read_pieces(path)
    blocks = {name: block for name, (_, block) in placed.items()}
    shapes = {name: _shape(path, name, block, values) for name, block in blocks.items()}
    entries = {n: Entry(b.type.name if b.type.name in _PLAIN else "BF16", shapes[n]) for n, b in blocks.items()}
    counts = Counter(block.type.name for block in blocks.values())
    told = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    metadata = {key: str(value) for key, value in values.items() if key in ("general.architecture", "general.name")}

    def arrays() -> dict[str, Weight]:
        if any(block.type.name not in _PLAIN for block in blocks.values()):
            _library(path)
        return {name: _deferred(*placed[name], shapes[name]) for name in placed}

    def rows(name: str) -> ReadRows | None:
        block = blocks.get(name)
        return _rows(*placed[name]) if block and len(block.shape) == 2 and block.shape == shapes[name] else None

    files = tuple(dict.fromkeys(piece for piece, _ in placed.values())) or (path,)
    return Tensors(path, f"GGUF: {told}", files, entries, arrays, metadata, rows)


def _rows(path: Path, block: Block) -> ReadRows:
    """Each row is a whole number of blocks."""
    columns = block.shape[1]
    take = read_bytes_of_rows(path, block.start, columns // block.type.block * block.type.size)
    dtype = _PLAIN.get(block.type.name, mx.bfloat16)

    def read(indices: Sequence[int]) -> mx.array:
        import numpy as np

        return _decode(path, block, np.frombuffer(take(indices), np.uint8), dtype).reshape(len(indices), columns)

    return read


def _shape(path: Path, name: str, block: Block, values: dict[str, Any]) -> tuple[int, ...]:
    """A tensor's shape, or the one that it had before a converter folded it."""
    original = values.get(f"comfy.gguf.orig_shape.{name}")
    if original is None:
        return block.shape
    if not isinstance(original, list) or math.prod(original) != math.prod(block.shape) or min(original, default=0) < 0:
        raise CheckpointError(f"{path}: {name} has {block.shape} numbers, and cannot have had the shape {original}")
    return tuple(original)


def _library(path: Path) -> Callable[[Any, Any], Any]:
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise CheckpointError(f"{path}: to read GGUF files, install gguf: pip install gguf") from None
    return lambda data, name: dequantize(data, GGMLQuantizationType[name])


def _deferred(path: Path, block: Block, shape: tuple[int, ...]) -> Deferred:
    dtype = _PLAIN.get(block.type.name, mx.bfloat16)
    return Deferred(shape, dtype, lambda: _load(path, block, dtype).reshape(shape))


def _load(path: Path, block: Block, dtype: mx.Dtype) -> mx.array:
    """A tensor's numbers in one row, decoded in float32 and a piece at a time."""
    import numpy as np

    if not block.size:
        return mx.zeros((0,), dtype)
    try:
        data = np.memmap(path, np.uint8, "r", block.start, (block.size,))
    except (OSError, ValueError) as error:  # it has been cut short meanwhile
        raise CheckpointError(f"{path}: cannot be read ({line_of(error)})") from None
    return _decode(path, block, data, dtype)


def _decode(path: Path, block: Block, data: Any, dtype: mx.Dtype) -> mx.array:
    """Some of a tensor's bytes, whole blocks, as numbers in one row."""
    import numpy as np

    if block.type.name in _PLAIN:
        kinds = {mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: np.uint16}
        return mx.array(np.frombuffer(data, kinds[dtype])).view(dtype)
    decode = _library(path)
    step = _DECODED_AT_ONCE // block.type.block * block.type.size
    pieces = []
    for start in range(0, len(data), step):
        with np.errstate(all="ignore"):  # a scale may be NaN or infinite: told where weights are looked through
            piece = mx.array(decode(data[start : start + step], block.type.name).reshape(-1)).astype(dtype)
        mx.eval(piece)
        pieces.append(piece)
    return mx.concatenate(pieces) if len(pieces) > 1 else pieces[0]
