"""Our own checkpoint format, and strict loading.

A checkpoint is a folder: klein.json, tokenizer.json, and one safetensors file per part (or shards with an index), whose
weight names are the modules' attribute names. Foreign layouts are `klein_mlx.formats`' business; they reach this file
as a `Source`, the same way as our own. Some rows of a matrix are read without the rest: what a prompt needs of the
table of token embeddings.
"""

import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from klein_mlx.config import (
    MAX_SHIFT,
    NAMED,
    PARTS,
    TIME_SHIFTS,
    ModelConfig,
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
)
from klein_mlx.errors import CheckpointError, line_of
from klein_mlx.model.text_encoder import MistralEncoder, TextEncoder
from klein_mlx.model.tokenizer import LAYOUTS, Tokenizer
from klein_mlx.model.transformer import Transformer
from klein_mlx.model.vae import VAE
from klein_mlx.weights.quantize import (
    QUANTIZED_PARTS,
    Quantization,
    check_shapes,
    prepare,
    quantize_array,
    quantize_weights,
)
from klein_mlx.weights.safetensors import (
    BYTES,
    PACKED,
    Entry,
    Weight,
    WeightFiles,
    is_finite,
    open_weights,
    read_json,
    require_file,
)

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


class TokenRows:
    """In the place of an nn.Embedding or nn.QuantizedEmbedding: reads the rows of the tokens that it is given.

    readers: of the weight, and, where it is stored quantized, of scales and biases. quantization: of the table, stored
    so or to be quantized so, row by row as the whole would be. dtype: of what it returns.
    """

    def __init__(self, readers: Mapping[str, ReadRows], quantization: Quantization | None, dtype: mx.Dtype):
        self._readers, self._quantization, self._dtype = readers, quantization, dtype

    def __call__(self, input_ids: mx.array) -> mx.array:
        """(B, L) -> (B, L, hidden). Raises CheckpointError for rows that cannot be read or hold NaN or infinity."""
        import numpy as np

        indices, inverse = np.unique(np.array(input_ids), return_inverse=True)
        rows = {kind: read(indices.tolist()) for kind, read in self._readers.items()}
        if not is_finite(*rows.values()).item():
            raise CheckpointError("the text_encoder's embed_tokens holds NaN or infinity: get it again")
        own = self._quantization
        if own and "scales" not in rows:
            rows = dict(zip(("weight", "scales", "biases"), quantize_array(rows["weight"], own), strict=False))
        rows = {k: a.astype(self._dtype) if mx.issubdtype(a.dtype, mx.floating) else a for k, a in rows.items()}
        table = rows["weight"]
        if own:
            table = mx.dequantize(table, rows["scales"], rows.get("biases"), own.group_size, own.bits, own.mode)
        return table.astype(self._dtype)[mx.array(inverse.reshape(input_ids.shape))]


def token_rows(source: "Source", quantize: Quantization | None, dtype: mx.Dtype) -> TokenRows | None:
    """What takes an encoder's embedding's place, so that its table is never loaded.

    quantize: how the table is to be quantized, if it is not stored so. None if the source's file has the table in a
    way that only the whole of it can be decoded.
    """
    stored = source.quantization.get("text_encoder")
    own = stored.of("text_encoder", "embed_tokens") if stored else None
    kinds = ["weight", *(["scales"] if own else []), *(["biases"] if own and own.mode == "affine" else [])]
    readers = {kind: source.rows("text_encoder", f"embed_tokens.{kind}") for kind in kinds}
    found = {kind: read for kind, read in readers.items() if read is not None}
    return TokenRows(found, own or (None if stored else quantize), dtype) if len(found) == len(readers) else None


FORMAT_VERSION = 1
CONFIG_FILE = "klein.json"
TOKENIZER_FILE = "tokenizer.json"
ENCODER_CLASSES = {"qwen3": TextEncoder, "mistral": MistralEncoder}
CONFIG_CLASSES = {"transformer": TransformerConfig, "text_encoder": TextEncoderConfig, "vae": VAEConfig}

_ALWAYS_FLOAT32 = {"latent_mean", "latent_var"}
_MAX_LAYERS = 1024
_GROUP_BYTES, _LEAST_BYTES, _GROUP_ARRAYS, _GROUPS = 256 << 20, 4 << 20, 64, 16


class Source(Protocol):
    """A model's files, in whatever layout, seen as ours. Opening one reads headers and configs, never weights."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def quantization(self) -> Mapping[str, Quantization]:
        """Per part; a part that is not quantized is absent."""
        ...

    @property
    def tokenizer_file(self) -> Path: ...
    @property
    def info(self) -> Mapping[str, Any]:
        """What the files are and where they come from: `format`, `source`, `licence`, `made_by`."""
        ...

    def weights(self, part: str) -> Mapping[str, Weight]:
        """The part's weights under our names, lazily mapped, their names, shapes and dtypes checked."""
        ...

    def files(self, parts: Sequence[str] = PARTS) -> list[Path]:
        """Every file that the model is read from; of the weights, only those of these parts."""
        ...

    def rows(self, part: str, name: str) -> ReadRows | None:
        """A reader of some rows of one of the part's matrices; None where it can only be read whole."""
        ...


@dataclass(frozen=True)
class Derived:
    """What a `Source` made of another has of it: its files and its place. config and the rest: its own."""

    base: Source
    config: ModelConfig
    quantization: Mapping[str, Quantization]
    info: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def tokenizer_file(self) -> Path:
        return self.base.tokenizer_file

    def files(self, parts: Sequence[str] = PARTS) -> list[Path]:
        return self.base.files(parts)


# ---- our format ----


@dataclass(frozen=True)
class Checkpoint:
    """A folder in our own format: the Source whose names need no translation."""

    path: Path
    config: ModelConfig
    quantization: dict[str, Quantization] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    _opened: dict[str, WeightFiles] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def tokenizer_file(self) -> Path:
        return self.path / TOKENIZER_FILE

    def weights(self, part: str) -> dict[str, mx.array]:
        quantization, files = self.quantization.get(part), self._open(part)
        shapes = expected(part, self.config, quantization)
        files.check(shapes, packed_dtypes(part, shapes, quantization))
        return files.arrays()

    def rows(self, part: str, name: str) -> ReadRows | None:
        return file_rows(self._open(part), name)

    def files(self, parts: Sequence[str] = PARTS) -> list[Path]:
        weights = (path for part in parts for path in self._open(part).shards)
        return [self.path / CONFIG_FILE, self.tokenizer_file, *weights]

    def _open(self, part: str) -> WeightFiles:
        """The part's files, their headers read once."""
        if part not in self._opened:
            self._opened[part] = open_weights(self.path, part)
        return self._opened[part]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder in our format: read klein.json, and make sure that the tokenizer is there."""
    where = folder / CONFIG_FILE
    values = read_json(where)
    version = values.get("format_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{where}: format_version is {version!r}; is this a klein_mlx checkpoint?")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format {version} is newer than this klein_mlx reads ({FORMAT_VERSION}): update it"
        )
    parts = {
        part: kind.from_dict(_table(values, part, where), f"{where}: {part}") for part, kind in CONFIG_CLASSES.items()
    }
    config = model_config(
        parts, values, where=where, variant_name=next((name for name in NAMED if values.get("variant") == name), None)
    )
    quantization = {}
    for part, settings in _table(values, "quantization", where).items():
        quantization[part] = Quantization.from_dict(settings, str(where))
        if part not in (PARTS if quantization[part].layers else QUANTIZED_PARTS):
            raise CheckpointError(f"{where}: quantization of {part!r}; only {' and '.join(QUANTIZED_PARTS)} can be")
    require_file(folder / TOKENIZER_FILE)
    told = {name: values[name] for name in ("source", "licence", "made_by") if name in values}
    for name, value in told.items():
        known = isinstance(value, Mapping) if name == "source" else isinstance(value, str) and value.isprintable()
        if not known:
            kind = "an object" if name == "source" else "one line of text"
            raise CheckpointError(f"{where}: {name} is {value!r:.60}; it must be {kind}")
    return Checkpoint(folder, config, quantization, {"format": "klein_mlx", **told})


def model_config(
    parts: Mapping[str, Any],
    values: Mapping[str, Any],
    *,
    where: Path,
    variant_name: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """The three configs with what belongs to none of them, read from a parsed JSON object and checked."""
    merged = {**(defaults or {}), **values}
    taps, distilled = merged.get("taps"), merged.get("is_distilled")
    if not isinstance(taps, list | tuple) or not all(type(t) is int for t in taps):
        raise CheckpointError(f"{where}: the tapped layers are {taps!r}; they must be a list of integers")
    if not isinstance(distilled, bool):
        raise CheckpointError(f"{where}: is_distilled is {distilled!r}; it must be true or false")
    caches = merged.get("caches_references", False)
    if not isinstance(caches, bool):
        raise CheckpointError(f"{where}: caches_references is {caches!r}; it must be true or false")
    shift = merged.get("time_shift", TIME_SHIFTS[0])
    if shift not in TIME_SHIFTS and (type(shift) not in (int, float) or not 0 < shift < MAX_SHIFT):
        raise CheckpointError(
            f"{where}: time_shift is {shift!r:.60}; it must be {' or '.join(TIME_SHIFTS)}, or a number"
        )
    numbers: dict[str, Any] = {"caches_references": caches, "time_shift": shift}
    for name, limit in (("max_sequence_length", 1 << 16), ("default_size", 1 << 14)):
        numbers[name] = merged.get(name)
        if type(numbers[name]) is not int or not 0 < numbers[name] <= limit:
            raise CheckpointError(
                f"{where}: {name} is {numbers[name]!r}; it must be a positive integer, at most {limit}"
            )
    try:
        return ModelConfig(**parts, is_distilled=distilled, taps=tuple(taps), variant_name=variant_name, **numbers)
    except CheckpointError as error:
        raise CheckpointError(f"{where.parent}: {error}") from None


def _table(values: Mapping[str, Any], name: str, where: Path) -> dict[str, Any]:
    table = values.get(name)
    if not isinstance(table, dict):
        raise CheckpointError(f"{where}: {name} is {'missing' if table is None else 'not an object'}")
    return table


# ---- modules ----


@contextmanager
def kept_random_state() -> Iterator[None]:
    """mlx.nn draws a module's first weights from the user's generator: it is set back to where it was."""
    high, low = mx.random.state[0].tolist()  # type: ignore[index]
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)


def build(part: str, config: ModelConfig) -> nn.Module:
    """A part's module with weights that are not to be used: its structure, before loading."""
    t, e = config.transformer, config.text_encoder
    deepest = max(t.num_layers, t.num_single_layers, e.num_hidden_layers, config.vae.layers_per_block)
    if deepest > _MAX_LAYERS:
        raise CheckpointError(f"{part}: a config asks for {deepest} layers; klein_mlx builds {_MAX_LAYERS} at most")
    try:
        with kept_random_state():
            if part == "transformer":
                return Transformer(t)
            if part == "text_encoder":
                return ENCODER_CLASSES[e.model_type](e, config.taps)
            return VAE(config.vae)
    except (ValueError, OverflowError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{part}: no model has these dimensions ({line_of(error)})") from None


def expected(part: str, config: ModelConfig, quantization: Quantization | None = None) -> dict[str, tuple[int, ...]]:
    """Every weight's name and shape, as the module of this part has them."""
    return {name: shape for name, (shape, _) in _described(part, config, quantization).items()}


@lru_cache(maxsize=32)  # a module is built to know its shapes once, however often its files are opened
def _described(
    part: str, config: ModelConfig, quantization: Quantization | None
) -> Mapping[str, tuple[tuple[int, ...], mx.Dtype]]:
    arrays = tree_flatten(_structure(part, config, quantization).parameters())
    return {name: (array.shape, array.dtype) for name, array in arrays}  # type: ignore[union-attr]


def packed_dtypes(part: str, names: Iterable[str], quantization: Quantization | None) -> dict[str, tuple[str, ...]]:
    """Which of these weights are stored as integers, and as which: what quantization makes of a weight."""
    dtypes = {}
    for name in names if quantization else ():
        path, _, kind = name.rpartition(".")
        own = quantization.of(part, path) if quantization and kind in ("weight", "scales") else None
        if own and (kind == "weight" or own.mode != "affine"):
            dtypes[name] = PACKED if kind == "weight" else BYTES
    return dtypes


def _structure(part: str, config: ModelConfig, quantization: Quantization | None) -> nn.Module:
    module = build(part, config)
    if quantization:
        check_shapes(part, expected(part, config), quantization)
        prepare(module, part, quantization)
    return module


def part_bytes(part: str, source: Source, dtype: mx.Dtype, quantize: Quantization | None = None) -> int:
    """Bytes that `load_part` would hold in memory once it is evaluated."""
    quantization = source.quantization.get(part) or (quantize if part in QUANTIZED_PARTS else None)
    arrays = _described(part, source.config, quantization).values()
    return sum(prod(shape) * (dtype if mx.issubdtype(own, mx.floating) else own).size for shape, own in arrays)


def load_part(part: str, source: Source, dtype: mx.Dtype, quantize: Quantization | None = None) -> nn.Module:
    """Build one part and give it its weights: all of them, of the right shapes, or a CheckpointError.

    dtype: that of every floating weight, except the VAE's latent statistics, which stay float32.
    quantize: quantize here, unless the source is quantized so already. The VAE is never quantized.
    Weights are read from disk when they are first used; only what has to be decoded, or whose scales are searched for,
    is made here, one weight at a time.
    """
    stored = source.quantization.get(part)
    quantize = quantize if part in QUANTIZED_PARTS else None
    if stored and quantize and (stored.bits, stored.mode) != (quantize.bits, quantize.mode):
        raise CheckpointError(
            f"{source.path}: the {part} is {stored.bits}-bit already; for {quantize.bits} bits start from the original"
        )
    found = dict(source.weights(part))
    if quantize and not stored:
        found = quantize_weights(part, found, quantize)
    weights = {}
    for name in list(found):
        weight = found.pop(name)  # what was read for it is not needed by the others
        array = weight if isinstance(weight, mx.array) else weight.load()
        if mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(mx.float32 if name in _ALWAYS_FLOAT32 else dtype)
        if array is not weight and not isinstance(weight, mx.array):
            mx.eval(array)  # so that what it was decoded from is freed
        weights[name] = array
    module = _structure(part, source.config, stored or quantize)
    module.load_weights(list(weights.items()), strict=True)
    module.eval()
    return module


def read_weights(module: nn.Module) -> str | None:
    """Evaluate all of a module's weights, in groups: while one is checked, the next is read.

    Beside the weights, only what two groups are made of is ever in memory. Returns the name of an array that holds NaN
    or infinity, if there is one.
    """
    arrays: list[tuple[str, mx.array]] = tree_flatten(module.parameters())  # type: ignore[assignment]
    groups = [(group, is_finite(*(array for _, array in group))) for group in _groups(arrays)]
    for index, (group, sound) in enumerate(groups):
        for ahead, promise in groups[index : index + 2]:
            mx.async_eval([array for _, array in ahead], promise)
        if not sound.item():
            return next(name for name, array in group if not is_finite(array).item())
    return None


def _groups(arrays: Sequence[tuple[str, mx.array]]) -> list[Sequence[tuple[str, mx.array]]]:
    """Neighbours of together not much over a sixteenth of all bytes, or 4 MB, nor over 256 MB or 64 arrays."""
    limit = min(_GROUP_BYTES, max(_LEAST_BYTES, sum(array.nbytes for _, array in arrays) // _GROUPS))
    groups, start, size = [], 0, 0
    for index, (_, array) in enumerate(arrays):
        if index > start and (size + array.nbytes > limit or index - start == _GROUP_ARRAYS):
            groups.append(arrays[start:index])
            start, size = index, 0
        size += array.nbytes
    return [*groups, arrays[start:]] if arrays else []


UNFINISHED = ".converting"  # the hidden folder's ending


def read_tokenizer(path: str | Path, vocab_size: int, model_type: str = "qwen3") -> Tokenizer:
    """A tokenizer.json, for a text encoder of this kind whose embedding has `vocab_size` rows.

    Raises CheckpointError if it cannot be read or is another model's.
    """
    return Tokenizer(read_json(Path(path)), vocab_size, str(path), LAYOUTS[model_type])
