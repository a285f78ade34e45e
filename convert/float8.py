"""Float8 (e4m3) weights with scales, as BFL and ComfyUI store them.

Source: ComfyUI, QUANTIZATION.md and comfy/quant_ops.py: `x.weight` in F8_E4M3 (or as bytes, U8, where a hint says so),
`x.weight_scale` (or `x.scale_weight`) in float32, one for the tensor or one per row.
"""

import mlx.core as mx

from klein_mlx.convert.tensors import REMEDY, Scaled, Tensors
from klein_mlx.errors import CheckpointError
from klein_mlx.weights import FLOATS

SCALES = ("weight_scale", "scale_weight")


def find_float8(tensors: Tensors, name: str) -> Scaled:
    """What decodes a float8 weight. Raises CheckpointError if its scale is missing or does not fit."""
    layer = name.removesuffix(".weight")
    scale = next((f"{layer}.{kind}" for kind in SCALES if f"{layer}.{kind}" in tensors.entries), None)
    if scale is None:
        raise CheckpointError(f"{tensors.path}: {name} is float8 without its scale ({layer}.weight_scale): {REMEDY}")
    for kind in ("weight_scale_2", "pre_quant_scale"):
        if f"{layer}.{kind}" in tensors.entries:
            raise CheckpointError(f"{tensors.path}: {name} is float8 with a {kind}, which it should not have: {REMEDY}")
    entry, shape = tensors.entries[scale], tensors.entries[name].shape
    rows = shape[:1]
    if entry.shape not in ((), (1,), (1, 1), rows, (*rows, 1)) or entry.dtype not in FLOATS:
        raise CheckpointError(
            f"{tensors.path}: {scale} has shape {entry.shape} and dtype {entry.dtype}; "
            f"klein_mlx reads one float per tensor or per row: {REMEDY}"
        )
    return Scaled("FP8", shape, (scale,), _decode)


def _decode(bits: mx.array, scale: mx.array) -> mx.array:
    """bits: (rows, columns) uint8; scale: one number, or one per row. Returns bfloat16."""
    scale = scale.astype(mx.float32)
    scale = scale.reshape(-1, *(1,) * (bits.ndim - 1)) if scale.size > 1 else scale.reshape(())
    return (mx.from_fp8(bits, dtype=mx.float32) * scale).astype(mx.bfloat16)
