"""Which weights are quantised, and how: MLX's affine format on the linear layers inside the blocks.

Embedders, modulations, the time embedding, the final layer, norms, token embeddings and the whole VAE keep their
dtype: they are small, and the picture depends on them everywhere at once. Knows names and arrays; no files.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn

from klein_mlx.errors import CheckpointError, RequestError

BITS = (4, 8)

# The last components of the quantised linear layers, per part, and the lists that they stand in.
_LISTS = {"transformer": ("double_blocks", "single_blocks"), "text_encoder": ("layers",)}
_LINEARS = {
    "transformer": {"to_q", "to_k", "to_v", "to_out", "mlp_in", "mlp_out", "linear_in", "linear_out"},
    "text_encoder": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
}
QUANTIZED_PARTS = tuple(_LISTS)


@dataclass(frozen=True)
class Quantization:
    """MLX's own words: `group_size` neighbours along the input axis share a scale and a bias."""

    bits: int
    group_size: int = 64
    mode: str = "affine"

    @classmethod
    def from_dict(cls, values: Any, where: str = "klein.json") -> Self:
        """Read what `to_dict` wrote. Anything else that MLX could not run is a CheckpointError."""
        if not isinstance(values, Mapping) or set(values) != {"bits", "group_size", "mode"}:
            raise CheckpointError(f"{where}: quantization is {values!r}; it must hold bits, group_size and mode")
        for name, allowed in (("bits", BITS), ("group_size", (32, 64, 128)), ("mode", ("affine",))):
            if type(values[name]) is not type(allowed[0]) or values[name] not in allowed:
                known = ", ".join(str(a) for a in allowed)
                raise CheckpointError(f"{where}: quantization {name} is {values[name]!r}; klein_mlx reads {known}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse(value: "Quantization | int | str | None") -> Quantization | None:
    """What a user writes (None, "none", 4, 8, "4", "8") as a Quantization, or None to leave the weights as they are."""
    if value is None or isinstance(value, Quantization):
        return value
    text = str(value).strip().lower()
    if text == "none":
        return None
    if isinstance(value, bool) or text not in {str(b) for b in BITS}:
        raise RequestError(f"quantize is {value!r}; it must be 4, 8 or none")
    return Quantization(int(text))


def is_quantized_path(part: str, name: str) -> bool:
    """Whether a module path (`layers.0.mlp.up_proj`), or the name of its weight, belongs to a quantised layer."""
    components = name.removesuffix(".weight").split(".")
    return components[0] in _LISTS.get(part, ()) and components[-1] in _LINEARS[part]


def check_shapes(part: str, shapes: Mapping[str, tuple[int, ...]], quantization: Quantization) -> None:
    """A CheckpointError if some quantised layer's input width is not a multiple of the group size."""
    for name, shape in shapes.items():
        if is_quantized_path(part, name) and shape[-1] % quantization.group_size:
            raise CheckpointError(
                f"{part}: {name} has {shape[-1]} inputs; {quantization.bits}-bit weights need a multiple of "
                f"{quantization.group_size}: use this model unquantised"
            )


def quantize_weights(part: str, weights: Mapping[str, mx.array], quantization: Quantization) -> dict[str, mx.array]:
    """Replace each eligible `x.weight` by `x.weight` (packed uint32), `x.scales` and `x.biases`, lazily.

    weights: names as in `klein_mlx.checkpoint`; scales and biases take the weight's dtype.
    """
    check_shapes(part, {name: array.shape for name, array in weights.items()}, quantization)
    result: dict[str, mx.array] = {}
    for name, array in weights.items():
        if not is_quantized_path(part, name):
            result[name] = array
            continue
        path = name.removesuffix(".weight")
        packed, scales, biases = mx.quantize(array, quantization.group_size, quantization.bits, quantization.mode)
        result |= {f"{path}.weight": packed, f"{path}.scales": scales, f"{path}.biases": biases}
    return result


def prepare(module: nn.Module, part: str, quantization: Quantization) -> None:
    """Swap the module's eligible `nn.Linear` layers for `nn.QuantizedLinear`, ready for quantised weights."""
    nn.quantize(
        module,
        quantization.group_size,
        quantization.bits,
        mode=quantization.mode,
        class_predicate=lambda path, layer: isinstance(layer, nn.Linear) and is_quantized_path(part, path),
    )
