"""NVFP4 weights as BFL and ComfyUI store them: two 4-bit floats a byte, a scale for every 16, and one for the tensor.

Source: comfy-kitchen, comfy_kitchen/tensor/nvfp4.py and backends/eager/quantization.py (how weights are written), and
ComfyUI, comfy/quant_ops.py ("nvfp4"; group size 16):
- `x.weight`, U8, (rows, columns / 2): e2m1 codes, the even column in the HIGH four bits;
- `x.weight_scale`, F8_E4M3 (or its bytes as U8), padded with zeros to (multiple of 128 rows, multiple of 4 groups), in
  cuBLAS' blocked order: tiles of 128 x 4, row-major; within a tile the byte of row r, group g is at
  (r % 32) * 16 + (r // 32) * 4 + g;
- `x.weight_scale_2`, F32, one number: value = code * weight_scale * weight_scale_2;
- `x.pre_quant_scale`, (columns,), only where weights were smoothed: what the layer's input is multiplied by.

NVIDIA's ModelOpt writes the same names with the even column in the LOW bits and scales row by row: nothing but the
hints beside tells the two apart, so a file without them is read only where it has BFL's own names.
"""

import mlx.core as mx

from klein_mlx.convert.tensors import REMEDY, Scaled, Tensors
from klein_mlx.errors import CheckpointError
from klein_mlx.weights import FLOATS

GROUP = 16
_TILE_ROWS, _TILE_GROUPS = 128, 4
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7; the highest bit is the sign


def find_float4(tensors: Tensors, name: str) -> Scaled:
    """What decodes an NVFP4 weight. Raises CheckpointError if a scale is missing, or one does not fit."""
    layer, entry = name.removesuffix(".weight"), tensors.entries[name]
    if entry.dtype != "U8" or len(entry.shape) != 2 or entry.shape[1] * 2 % GROUP:
        raise CheckpointError(
            f"{tensors.path}: {name} has shape {entry.shape} and dtype {entry.dtype}; NVFP4 has a matrix of U8, "
            f"{GROUP // 2} bytes for each {GROUP} columns: {REMEDY}"
        )
    rows, columns = entry.shape[0], entry.shape[1] * 2
    groups = columns // GROUP
    padded = (_round_up(rows, _TILE_ROWS), _round_up(groups, _TILE_GROUPS))
    wanted = {  # in the order of _decode's arguments
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
    return Scaled("NVFP4", (rows, columns), tuple(sides), _decode)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _decode(packed: mx.array, blocked: mx.array, overall: mx.array, smoothing: mx.array | None = None) -> mx.array:
    """packed: (rows, columns / 2) uint8; blocked: (padded rows, padded groups) uint8, e4m3; overall: one number;
    smoothing: (columns,). Returns (rows, columns) bfloat16; products are float32, rounded once.
    """
    rows, columns = packed.shape[0], packed.shape[1] * 2
    codes = mx.stack([packed >> 4, packed & 15], axis=-1).reshape(rows, columns)
    values = mx.array([*_VALUES, *(-value for value in _VALUES)], mx.float32)[codes]
    scales = mx.from_fp8(_in_rows(blocked)[:rows, : columns // GROUP], dtype=mx.float32)
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
