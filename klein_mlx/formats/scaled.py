"""The tensors of a foreign file or folder, whatever their encoding: entries to check, arrays to use, plain weights to
whoever comes after. Weights that another program quantized, decoded to bfloat16 layer by layer; what cannot be read
is refused by name.

Source: ComfyUI, QUANTIZATION.md: which layers are quantized, and how, stands in the header (`_quantization_metadata`)
or in a tensor of JSON beside each weight (`x.comfy_quant`); older files only have the scales. diffusers' script for
these files states `quantization` in the header, and has NVFP4 in ModelOpt's order: shapes do not tell the two apart.
`x.input_scale` (or `x.scale_input`), which only a matmul in the small type needs, is left out.
"""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from klein_mlx.errors import CheckpointError
from klein_mlx.weights.checkpoint import ReadRows
from klein_mlx.weights.safetensors import FLOATS, Entry, Weight, load_now

REMEDY = "take the bf16, the FP8 (e4m3), the NVFP4 of BFL's or ComfyUI's, or a GGUF file of this model"


@dataclass(frozen=True)
class Scaled:
    """A weight that has to be decoded with the tensors beside it, which are named in the order that `decode` takes.

    shape: of the decoded weight, which is bfloat16.
    """

    kind: str
    shape: tuple[int, ...]
    beside: tuple[str, ...]
    decode: Callable[..., mx.array]

    def array(self, name: str, found: Mapping[str, Weight]) -> mx.array:
        """The weight, lazily."""
        return self.decode(*(load_now(found[each]) for each in (name, *self.beside)))


@dataclass(frozen=True)
class Tensors:
    """Named tensors: what each is (`entries`), and all of them, lazily (`arrays`).

    kind: the files' format. metadata: what the file says of itself, as text. rows: a reader of some rows of a matrix,
    or None.
    """

    path: Path
    kind: str
    files: tuple[Path, ...]
    entries: Mapping[str, Entry]
    arrays: Callable[[], Mapping[str, Weight]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    rows: Callable[[str], ReadRows | None] = lambda name: None

    def renamed(self, names: Mapping[str, str]) -> "Tensors":
        """Only the tensors that are values of `names`, under its keys."""
        entries = {new: self.entries[old] for new, old in names.items()}

        def arrays() -> dict[str, Weight]:
            found = self.arrays()
            return {new: found[old] for new, old in names.items()}

        return replace(self, entries=entries, arrays=arrays, rows=lambda name: self.rows(names.get(name, name)))


SCALES = ("weight_scale", "scale_weight")
BLOCK_SCALE = "weight_scale_inv"  # of DeepSeek's and Qwen's files: a factor as well, for blocks of a matrix
_BLOCK = 128


def find_float8(tensors: Tensors, name: str) -> Scaled:
    """What decodes a float8 weight. Raises CheckpointError if its scale is missing or does not fit."""
    layer = name.removesuffix(".weight")
    kinds = [f"{layer}.{kind}" for kind in (*SCALES, BLOCK_SCALE) if f"{layer}.{kind}" in tensors.entries]
    if len(kinds) > 1:
        raise CheckpointError(f"{tensors.path}: {name} has two scales, {' and '.join(kinds)}: {REMEDY}")
    if not kinds:
        raise CheckpointError(f"{tensors.path}: {name} is float8 without its scale ({layer}.weight_scale): {REMEDY}")
    for kind in ("weight_scale_2", "pre_quant_scale"):
        if f"{layer}.{kind}" in tensors.entries:
            raise CheckpointError(f"{tensors.path}: {name} is float8 with a {kind}, which it should not have: {REMEDY}")
    (scale,) = kinds
    entry, shape = tensors.entries[scale], tensors.entries[name].shape
    rows, right = shape[:1], "klein_mlx reads one float per tensor or per row"
    shapes: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1), rows, (*rows, 1))
    if scale.endswith(BLOCK_SCALE):
        blocks = tuple(-(-side // _BLOCK) for side in shape)
        shapes = (blocks,) if len(shape) == 2 else ()
        right = f"for a weight of {shape} it must be floats of shape {blocks}, one for {_BLOCK} x {_BLOCK} numbers"
    if entry.shape not in shapes or entry.dtype not in FLOATS:
        told = f"{scale} has shape {entry.shape} and dtype {entry.dtype}"
        raise CheckpointError(f"{tensors.path}: {told}; {right}: {REMEDY}")
    return Scaled("FP8", shape, (scale,), _decode_float8)


def _decode_float8(bits: mx.array, scale: mx.array | None = None) -> mx.array:
    """bits: (rows, columns) uint8; scale: one number, one per row, or one per block. Returns bfloat16."""
    values = mx.from_fp8(bits, dtype=mx.float32)
    if scale is None:
        return values.astype(mx.bfloat16)
    scale = scale.astype(mx.float32)
    if scale.shape == (1, 1) or scale.ndim < 2 or scale.shape[1] == 1 and scale.shape[0] == bits.shape[0]:
        scale = scale.reshape(-1, *(1,) * (bits.ndim - 1)) if scale.size > 1 else scale.reshape(())
    else:
        scale = mx.repeat(mx.repeat(scale, _BLOCK, 0), _BLOCK, 1)[: bits.shape[0], : bits.shape[1]]
    return (values * scale).astype(mx.bfloat16)


GROUP = 16
_TILE_ROWS, _TILE_GROUPS = 128, 4
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7; the highest bit is the sign


def find_float4(tensors: Tensors, name: str, by_rows: bool = False) -> Scaled:
    """What decodes an NVFP4 weight. Raises CheckpointError if a scale is missing, or one does not fit.

    by_rows: in ModelOpt's order (the low four bits first, the scales row by row), not in ComfyUI's.
    """
    layer, entry = name.removesuffix(".weight"), tensors.entries[name]
    if entry.dtype != "U8" or len(entry.shape) != 2 or entry.shape[1] * 2 % GROUP:
        raise CheckpointError(
            f"{tensors.path}: {name} has shape {entry.shape} and dtype {entry.dtype}; NVFP4 has a matrix of U8, "
            f"{GROUP // 2} bytes for each {GROUP} columns: {REMEDY}"
        )
    rows, columns = entry.shape[0], entry.shape[1] * 2
    groups = columns // GROUP
    padded = (rows, groups) if by_rows else (_round_up(rows, _TILE_ROWS), _round_up(groups, _TILE_GROUPS))
    wanted = {  # in the order of _decode_float4's arguments
        "weight_scale": ((padded,), ("F8_E4M3", "U8")),
        "weight_scale_2": (((), (1,)), FLOATS),
        "pre_quant_scale": (((columns,),), FLOATS),
    }
    sides = []
    for kind, (shapes, dtypes) in wanted.items():
        side = tensors.entries.get(f"{layer}.{kind}")
        if side is None and kind == "pre_quant_scale":
            continue
        if side is None:
            raise CheckpointError(f"{tensors.path}: {name} is NVFP4 without its scale ({layer}.{kind}): {REMEDY}")
        if side.shape not in shapes or side.dtype not in dtypes:
            right = f"{' or '.join(map(str, shapes))} and {' or '.join(dtypes)}"
            raise CheckpointError(
                f"{tensors.path}: {layer}.{kind} has shape {side.shape} and dtype {side.dtype}; for {columns} columns "
                f"and {rows} rows it must be {right}: {REMEDY}"
            )
        sides.append(f"{layer}.{kind}")
    return Scaled("NVFP4", (rows, columns), tuple(sides), partial(_decode_float4, by_rows))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _decode_float4(
    by_rows: bool, packed: mx.array, stored: mx.array, overall: mx.array, smoothing: mx.array | None = None
) -> mx.array:
    """packed: (rows, columns / 2) uint8; stored: (padded rows, padded groups) uint8, e4m3; overall: one number;
    smoothing: (columns,). Returns (rows, columns) bfloat16; products are float32, rounded once.
    """
    rows, columns = packed.shape[0], packed.shape[1] * 2
    pair = [packed & 15, packed >> 4] if by_rows else [packed >> 4, packed & 15]
    codes = mx.stack(pair, axis=-1).reshape(rows, columns)
    values = mx.array([*_VALUES, *(-value for value in _VALUES)], mx.float32)[codes]
    scales = mx.from_fp8(stored if by_rows else _in_rows(stored)[:rows, : columns // GROUP], dtype=mx.float32)
    values = values.reshape(rows, -1, GROUP) * scales[..., None] * overall.astype(mx.float32).reshape(())
    values = values.reshape(rows, columns)
    if smoothing is not None:
        values = values * smoothing.astype(mx.float32)
    return values.astype(mx.bfloat16)


def _in_rows(blocked: mx.array) -> mx.array:
    """Scales in cuBLAS' blocked order, row by row. Both (multiple of 128, multiple of 4)."""
    rows, groups = blocked.shape
    tiles = blocked.reshape(rows // _TILE_ROWS, groups // _TILE_GROUPS, 32, _TILE_ROWS // 32, _TILE_GROUPS)
    return tiles.transpose(0, 3, 2, 1, 4).reshape(rows, groups)


_FLOAT8, _FLOAT4 = "float8_e4m3fn", "nvfp4"
_SMALL = ("F8_", "F6_", "F4", "I8", "U8")  # how the dtypes begin that only codes have
_ASIDE = (*SCALES, BLOCK_SCALE, "input_scale", "scale_input", "comfy_quant", "weight_scale_2", "pre_quant_scale")


# Encodings whose tensors have names of their own. The first match counts.
_NAMED = (
    (r"\.(weight_packed|weight_global_scale)$", "compressed-tensors"),
    (r"\.(absmax|quant_map|nested_absmax)$|bitsandbytes__", "bitsandbytes"),
    (r"\.(wscales|smooth_factor|proj_up)$", "SVDQuant (nunchaku)"),
    (r"\.(qweight|qzeros)$", "GPTQ or AWQ"),
    (r"\.(svd_up|svd_down|zero_point)$|(?<!_norm)\.scale$", "SDNQ"),
)


def decode(tensors: Tensors) -> Tensors:
    """The same tensors with every scaled weight as bfloat16, and without the scales and hints beside them.

    Raises CheckpointError for a weight without its scale, and for any encoding that is not read, by its name.
    """
    _refuse_named(tensors)
    entries = tensors.entries
    aside = {n for n in entries if n.rpartition(".")[2] in _ASIDE or n.startswith("scaled_fp8")}
    hints = _hints(tensors)
    stated = tensors.metadata.get("quantization")
    if stated == _FLOAT4 and hints:
        raise CheckpointError(
            f"{tensors.path}: its metadata states two orders of NVFP4, ModelOpt's (quantization) and ComfyUI's: "
            + REMEDY
        )
    plain = not (stated or hints or aside)
    scaled: dict[str, Scaled] = {}
    for name, entry in entries.items():
        if name in aside or name.endswith(".scales"):  # the latter are MLX's own
            continue
        hint = hints.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        found = _find(tensors, name, hint, plain)
        if found is not None:
            scaled[name] = found
        elif entry.dtype.startswith(_SMALL):
            _refuse(tensors, name, entry.dtype)
    if not aside and not scaled:
        return tensors
    kept = {name: entry for name, entry in entries.items() if name not in aside}
    decoded = {name: Entry("BF16", scaled[name].shape) if name in scaled else entry for name, entry in kept.items()}

    def arrays() -> dict[str, Weight]:
        found = tensors.arrays()
        return {name: scaled[name].array(name, found) if name in scaled else found[name] for name in kept}

    kinds = [kind for kind in ("NVFP4", "FP8") if any(each.kind == kind for each in scaled.values())]
    told = " ".join([tensors.kind, *([" and ".join(kinds)] if kinds else [])])

    def rows(name: str) -> ReadRows | None:
        return None if name in scaled else tensors.rows(name)

    return replace(tensors, entries=decoded, arrays=arrays, rows=rows, kind=told)


def _find(tensors: Tensors, name: str, hint: str | None, plain: bool) -> Scaled | None:
    """What decodes a weight; None for one that is stored as it is.

    plain: nothing in the file speaks of scales, so that float8 are the numbers themselves.
    """
    entry, layer = tensors.entries[name], name.removesuffix(".weight")
    if hint not in (None, _FLOAT8, _FLOAT4):
        _refuse(tensors, name, hint)
    if hint == _FLOAT4:
        return find_float4(tensors, name)
    if plain and entry.dtype == "F8_E4M3":
        return Scaled("FP8", entry.shape, (), _decode_float8)
    if entry.dtype == "F8_E4M3" or entry.dtype == "U8" and hint == _FLOAT8:
        return find_float8(tensors, name)
    if entry.dtype == "U8" and f"{layer}.weight_scale_2" in tensors.entries:
        if tensors.metadata.get("quantization") == _FLOAT4:
            return find_float4(tensors, name, by_rows=True)
        raise CheckpointError(
            f"{tensors.path}: {name} is NVFP4 in an order that nothing in the file states (ComfyUI's and ModelOpt's "
            f"differ), so klein_mlx does not read it: {REMEDY}"
        )
    return None


def _refuse(tensors: Tensors, name: str, what: str) -> None:
    raise CheckpointError(f"{tensors.path}: {name} is stored as {what:.60}, which klein_mlx does not read: {REMEDY}")


def _refuse_named(tensors: Tensors) -> None:
    for pattern, what in _NAMED:
        name = next((name for name in tensors.entries if re.search(pattern, name)), None)
        if name is not None:
            raise CheckpointError(
                f"{tensors.path}: is quantized as {what} does it (it holds {name:.100}), which klein_mlx does not "
                f"read: {REMEDY}"
            )


def _hints(tensors: Tensors) -> dict[str, str]:
    """Layer -> format, as the header or the tensors beside the weights say."""
    hints: dict[str, str] = {}
    stated = tensors.metadata.get("_quantization_metadata")
    if stated:
        layers = _object(tensors, stated, "_quantization_metadata").get("layers")
        for layer, told in layers.items() if isinstance(layers, Mapping) else ():
            hints[_without_prefix(tensors, layer)] = _format(told)
    beside = [name for name in tensors.entries if name.endswith(".comfy_quant")]
    arrays = tensors.arrays() if beside else {}
    for name in beside:
        if tensors.entries[name].dtype != "U8" or len(tensors.entries[name].shape) != 1:
            raise CheckpointError(f"{tensors.path}: {name} is not the text that it should be")
        told = _object(tensors, bytes(load_now(arrays[name]).tolist()), name)  # type: ignore[arg-type]
        hints[name.removesuffix(".comfy_quant")] = _format(told)
    return hints


def _format(told: Any) -> str:
    """A hint's format, fit for one line."""
    text = str(told.get("format") if isinstance(told, Mapping) else told)
    return text if text.isprintable() else ascii(text)


def _without_prefix(tensors: Tensors, layer: str) -> str:
    """A layer's name as the tensors have it: the header may say it with the prefix that they have lost."""
    while layer and not any(f"{layer}.{kind}" in tensors.entries for kind in ("weight", *SCALES)):
        _, dot, rest = layer.partition(".")
        if not dot:
            break
        layer = rest
    return layer


def _object(tensors: Tensors, text: str | bytes, name: str) -> dict[str, Any]:
    values = None
    with suppress(ValueError, RecursionError):
        values = json.loads(text)
    if not isinstance(values, dict):
        raise CheckpointError(f"{tensors.path}: {name} is not a JSON object")
    return values
