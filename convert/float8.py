"""Float8 weights with scales, as BFL and ComfyUI store them: decoded to bfloat16.

Source: the published layout: `x.weight` in F8_E4M3, `x.weight_scale` (or `x.scale_weight`) in float32, one for the
tensor or one per row; `x.input_scale` (or `x.scale_input`), which only a float8 matmul needs, is left out. Which
layers are quantised, and how, may also stand in the header (`_quantization_metadata`) or in `x.comfy_quant`.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx

from klein_mlx.convert.tensors import Tensors
from klein_mlx.errors import CheckpointError
from klein_mlx.weights import FLOATS, Entry, Weight, load_now

_FLOAT8 = "F8_E4M3"
_REFUSED = ("F8_E5M2", "F8_E8M0", "F4", "I8", "U8")
_SCALES = ("weight_scale", "scale_weight")
_ASIDE = (*_SCALES, "input_scale", "scale_input", "comfy_quant", "weight_scale_2", "pre_quant_scale")
_REMEDY = "take the bf16, the FP8 (e4m3) or a GGUF file of this model"


def decode_float8(tensors: Tensors) -> Tensors:
    """The same tensors with every float8 weight as bfloat16, and without the scales and hints beside them.

    Raises CheckpointError for a float8 weight without its scale, and for any other encoding, by its name.
    """
    entries = tensors.entries
    aside = {n for n in entries if n.rpartition(".")[2] in _ASIDE or n.startswith("scaled_fp8")}
    hints = _hints(tensors)
    scales: dict[str, str] = {}
    for name, entry in entries.items():
        layer = name.removesuffix(".weight")
        hint = hints.get(layer)
        if name in aside or name.endswith(".scales"):  # the latter are MLX's own
            continue
        if hint not in (None, "float8_e4m3fn") or entry.dtype in _REFUSED:
            what = f"{tensors.path}: {name} is stored as {hint or entry.dtype}"
            raise CheckpointError(f"{what}, which klein_mlx does not read: {_REMEDY}")
        if entry.dtype == _FLOAT8:
            scales[name] = _scale_of(tensors, name)
    if not aside and not scales:
        return tensors
    kept = {name: entry for name, entry in entries.items() if name not in aside}
    decoded = {name: Entry("BF16", entry.shape) if name in scales else entry for name, entry in kept.items()}

    def arrays() -> dict[str, Weight]:
        found = tensors.arrays()
        return {n: _decode(load_now(found[n]), load_now(found[scales[n]])) if n in scales else found[n] for n in kept}

    return replace(tensors, entries=decoded, arrays=arrays, kind=f"{tensors.kind} FP8" if scales else tensors.kind)


def _scale_of(tensors: Tensors, name: str) -> str:
    """The name of a float8 weight's scale, which must be there and fit."""
    layer = name.removesuffix(".weight")
    scale = next((f"{layer}.{kind}" for kind in _SCALES if f"{layer}.{kind}" in tensors.entries), None)
    if scale is None:
        raise CheckpointError(f"{tensors.path}: {name} is float8 without its scale ({layer}.weight_scale): {_REMEDY}")
    entry, rows = tensors.entries[scale], tensors.entries[name].shape[:1]
    if entry.shape not in ((), (1,), (1, 1), rows, (*rows, 1)) or entry.dtype not in FLOATS:
        raise CheckpointError(
            f"{tensors.path}: {scale} has shape {entry.shape} and dtype {entry.dtype}; "
            f"klein_mlx reads one float per tensor or per row: {_REMEDY}"
        )
    return scale


def _decode(bits: mx.array, scale: mx.array) -> mx.array:
    """bits: (rows, columns) uint8; scale: one number, or one per row."""
    scale = scale.astype(mx.float32)
    scale = scale.reshape(-1, *(1,) * (bits.ndim - 1)) if scale.size > 1 else scale.reshape(())
    return (mx.from_fp8(bits, dtype=mx.float32) * scale).astype(mx.bfloat16)


def _hints(tensors: Tensors) -> dict[str, str]:
    """Layer -> format, as the header or the tensors beside the weights say."""
    hints: dict[str, str] = {}
    stated = tensors.metadata.get("_quantization_metadata")
    if stated:
        layers = _object(tensors, stated, "_quantization_metadata").get("layers")
        for layer, told in layers.items() if isinstance(layers, Mapping) else ():
            hints[_without_prefix(tensors, layer)] = str(told.get("format")) if isinstance(told, Mapping) else str(told)
    beside = [name for name in tensors.entries if name.endswith(".comfy_quant")]
    arrays = tensors.arrays() if beside else {}
    for name in beside:
        if tensors.entries[name].dtype != "U8" or len(tensors.entries[name].shape) != 1:
            raise CheckpointError(f"{tensors.path}: {name} is not the text that it should be")
        told = _object(tensors, bytes(load_now(arrays[name]).tolist()), name)  # type: ignore[arg-type]
        hints[name.removesuffix(".comfy_quant")] = str(told.get("format"))
    return hints


def _without_prefix(tensors: Tensors, layer: str) -> str:
    """A layer's name as the tensors have it: the header may say it with the prefix that they have lost."""
    while layer and not any(f"{layer}.{kind}" in tensors.entries for kind in ("weight", *_SCALES)):
        _, dot, rest = layer.partition(".")
        if not dot:
            break
        layer = rest
    return layer


def _object(tensors: Tensors, text: str | bytes, name: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise CheckpointError(f"{tensors.path}: {name} is not a JSON object")
    return values
