"""Weights that another program quantised, decoded to bfloat16 layer by layer; what cannot be read is refused by name.

Source: ComfyUI, QUANTIZATION.md: which layers are quantised, and how, stands in the header (`_quantization_metadata`)
or in a tensor of JSON beside each weight (`x.comfy_quant`); older files only have the scales. `x.input_scale` (or
`x.scale_input`), which only a matmul in the small type needs, is left out.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from klein_mlx.convert.float4 import find_float4
from klein_mlx.convert.float8 import SCALES, find_float8
from klein_mlx.convert.tensors import REMEDY, Scaled, Tensors
from klein_mlx.errors import CheckpointError
from klein_mlx.rows import ReadRows
from klein_mlx.weights import Entry, Weight, load_now

_FLOAT8, _FLOAT4 = "float8_e4m3fn", "nvfp4"
_SMALL = ("F8_", "F6_", "F4", "I8", "U8")  # how the dtypes begin that only codes have
_ASIDE = (*SCALES, "input_scale", "scale_input", "comfy_quant", "weight_scale_2", "pre_quant_scale")
_BFL = "double_blocks.0.img_attn.qkv.weight"
# Encodings whose tensors have names of their own. The first match counts.
_NAMED = (
    (r"\.(weight_packed|weight_global_scale)$", "compressed-tensors"),
    (r"\.(absmax|quant_map|nested_absmax)$|bitsandbytes__", "bitsandbytes"),
    (r"\.(wscales|smooth_factor|proj_up)$", "SVDQuant (nunchaku)"),
    (r"\.(qweight|qzeros)$", "GPTQ or AWQ"),
    (r"\.(svd_up|svd_down|zero_point)$", "SDNQ"),
)


def decode(tensors: Tensors) -> Tensors:
    """The same tensors with every scaled weight as bfloat16, and without the scales and hints beside them.

    Raises CheckpointError for a weight without its scale, and for any encoding that is not read, by its name.
    """
    _refuse_named(tensors)
    entries = tensors.entries
    aside = {n for n in entries if n.rpartition(".")[2] in _ASIDE or n.startswith("scaled_fp8")}
    hints = _hints(tensors)
    scaled: dict[str, Scaled] = {}
    for name, entry in entries.items():
        if name in aside or name.endswith(".scales"):  # the latter are MLX's own
            continue
        hint = hints.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        found = _find(tensors, name, hint)
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


def _find(tensors: Tensors, name: str, hint: str | None) -> Scaled | None:
    """What decodes a weight; None for one that is stored as it is."""
    dtype, layer = tensors.entries[name].dtype, name.removesuffix(".weight")
    if hint not in (None, _FLOAT8, _FLOAT4):
        _refuse(tensors, name, hint)
    if hint == _FLOAT4:
        return find_float4(tensors, name)
    if dtype == "F8_E4M3" or dtype == "U8" and hint == _FLOAT8:
        return find_float8(tensors, name)
    if dtype == "U8" and f"{layer}.weight_scale_2" in tensors.entries:
        if _BFL in tensors.entries:
            return find_float4(tensors, name)
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
                f"{tensors.path}: is quantised as {what} does it (it holds {name:.100}), which klein_mlx does not "
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
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise CheckpointError(f"{tensors.path}: {name} is not a JSON object")
    return values
