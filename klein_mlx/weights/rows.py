"""Some rows of a matrix in a file, without reading the rest: what a prompt needs of the table of token embeddings."""

import json
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from klein_mlx.errors import CheckpointError
from klein_mlx.weights.quantize import Quantization, quantize_array
from klein_mlx.weights.safetensors import Entry, WeightFiles, is_finite

# Indices, each within the matrix, -> those rows, (count, columns), evaluated.
ReadRows = Callable[[Sequence[int]], mx.array]

_STORED = {"BF16": ("uint16", mx.bfloat16), "F16": ("float16", mx.float16), "F32": ("float32", mx.float32)}
_STORED |= {"U32": ("uint32", mx.uint32), "U8": ("uint8", mx.uint8)}


class _File:
    """A file held open: one that is put in its place later, or deleted, changes nothing."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        weakref.finalize(self, os.close, self._handle)

    def read(self, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._handle, size, offset)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from None
        if len(data) != size:
            raise CheckpointError(f"{self.path}: cannot be read: it has been cut short")
        return data


def read_bytes_of_rows(path: Path, start: int, size: int) -> Callable[[Sequence[int]], bytes]:
    """A function of indices to those rows' bytes. start: where row 0 begins in the file; size: bytes of each row."""
    file = _File(path)
    return lambda indices: b"".join(file.read(start + index * size, size) for index in indices)


def safetensors_rows(path: Path, name: str, entry: Entry) -> ReadRows | None:
    """A reader of a matrix in a safetensors file whose header has been checked; None for dtypes that MLX has not."""
    import numpy as np

    if entry.dtype not in _STORED or len(entry.shape) != 2:
        return None
    kind, dtype = _STORED[entry.dtype]
    file = _File(path)
    length = int.from_bytes(file.read(0, 8), "little")
    begin = json.loads(file.read(8, length))[name]["data_offsets"][0]
    columns = entry.shape[1]
    take = read_bytes_of_rows(path, 8 + length + begin, columns * np.dtype(kind).itemsize)

    def read(indices: Sequence[int]) -> mx.array:
        rows = mx.array(np.frombuffer(take(indices), kind).reshape(len(indices), columns))
        return rows.view(dtype) if rows.dtype != dtype else rows

    return read


def file_rows(files: WeightFiles, name: str) -> ReadRows | None:
    """As `safetensors_rows`, of whichever of the files holds the matrix."""
    path = next((path for path, entries in files.shards.items() if name in entries), None)
    return None if path is None else safetensors_rows(path, name, files.shards[path][name])


class HasRows(Protocol):
    """The part of a `Source` that reads rows."""

    @property
    def quantization(self) -> Mapping[str, Quantization]: ...
    def rows(self, part: str, name: str) -> ReadRows | None: ...


class TokenRows:
    """In the place of an nn.Embedding or nn.QuantizedEmbedding: reads the rows of the tokens that it is given.

    readers: of the weight, and, where it is stored quantised, of scales and biases. quantization: of the table, stored
    so or to be quantised so, row by row as the whole would be. dtype: of what it returns.
    """

    def __init__(self, readers: Mapping[str, ReadRows], quantization: Quantization | None, dtype: mx.Dtype):
        self._readers, self._quantization, self._dtype = readers, quantization, dtype

    def __call__(self, input_ids: mx.array) -> mx.array:
        """(B, L) -> (B, L, hidden). Raises CheckpointError for rows that cannot be read or hold NaN or infinity."""
        import numpy as np

        indices, inverse = np.unique(np.array(input_ids), return_inverse=True)
        rows = {kind: read(indices.tolist()) for kind, read in self._readers.items()}
        if not all(is_finite(array).item() for array in rows.values()):
            raise CheckpointError("the text_encoder's embed_tokens holds NaN or infinity: get it again")
        own = self._quantization
        if own and "scales" not in rows:
            rows = dict(zip(("weight", "scales", "biases"), quantize_array(rows["weight"], own), strict=False))
        rows = {k: a.astype(self._dtype) if mx.issubdtype(a.dtype, mx.floating) else a for k, a in rows.items()}
        table = rows["weight"]
        if own:
            table = mx.dequantize(table, rows["scales"], rows.get("biases"), own.group_size, own.bits, own.mode)
        return table.astype(self._dtype)[mx.array(inverse.reshape(input_ids.shape))]


def token_rows(source: HasRows, quantize: Quantization | None, dtype: mx.Dtype) -> TokenRows | None:
    """What takes an encoder's embedding's place, so that its table is never loaded.

    quantize: how the table is to be quantised, if it is not stored so. None if the source's file has the table in a
    way that only the whole of it can be decoded.
    """
    stored = source.quantization.get("text_encoder")
    own = stored.of("text_encoder", "embed_tokens") if stored else None
    kinds = ["weight", *(["scales"] if own else []), *(["biases"] if own and own.mode == "affine" else [])]
    readers = {kind: source.rows("text_encoder", f"embed_tokens.{kind}") for kind in kinds}
    found = {kind: read for kind, read in readers.items() if read is not None}
    return TokenRows(found, own or (None if stored else quantize), dtype) if len(found) == len(readers) else None
