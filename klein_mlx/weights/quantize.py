"""Which weights are quantised, and how: MLX's own formats, by default on the linear layers inside the blocks.

Unless they are named, embedders, modulations, the time embedding, the final layer and token embeddings keep their
dtype: they are small, and the picture depends on them everywhere at once. Norms and the VAE always keep theirs. Knows
names and arrays; no files.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn

from klein_mlx.errors import CheckpointError
from klein_mlx.weights.rounding import search
from klein_mlx.weights.safetensors import Deferred, Weight, is_finite

# What files may hold: whatever MLX runs.
_AFFINE_BITS, _GROUP_SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)
FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # MLX's other modes, each with one shape

# The last components of the quantised linear layers, per part, and the lists that they stand in.
_LISTS = {"transformer": ("double_blocks", "single_blocks"), "text_encoder": ("layers",)}
_LINEARS = {
    "transformer": {"to_q", "to_k", "to_v", "to_out", "mlp_in", "mlp_out", "linear_in", "linear_out"},
    "text_encoder": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
}
QUANTIZED_PARTS = tuple(_LISTS)


@dataclass(frozen=True)
class Quantization:
    """MLX's own words: `group_size` neighbours along the input axis share a scale and a bias.

    layers: the quantised layers by their paths, each with its own settings; None: the linear layers of the blocks,
    all alike. With layers, the other fields say what most of them have. searched: whether affine scales are searched
    for when weights are quantised, instead of taken from the ends of each group; nothing later depends on it.
    """

    bits: int
    group_size: int = 64
    mode: str = "affine"
    layers: "Mapping[str, Quantization] | None" = field(default=None, hash=False)
    searched: bool = field(default=False, compare=False)

    @classmethod
    def of_layers(cls, layers: "Mapping[str, Quantization]") -> Self:
        """Of a part whose layers are quantised one by one; there must be some."""
        own = {path: replace(q, layers=None) for path, q in layers.items()}
        (common, _), *_ = Counter(own.values()).most_common(1)
        return cls(common.bits, common.group_size, common.mode, own)

    @classmethod
    def from_dict(cls, values: Any, where: str = "klein.json") -> Self:
        """Read what `to_dict` wrote. Anything else that MLX could not run is a CheckpointError."""
        names = {"bits", "group_size", "mode"}
        if not isinstance(values, Mapping) or not names <= set(values) <= names | {"layers"}:
            raise CheckpointError(f"{where}: quantization is {values!r}; it must hold bits, group_size and mode")
        mode = values["mode"]
        if not isinstance(mode, str) or mode not in ("affine", *FLOAT_MODES):
            known = ", ".join(("affine", *FLOAT_MODES))
            raise CheckpointError(f"{where}: quantization mode is {mode!r}; klein_mlx reads {known}")
        bits, sizes = _AFFINE_BITS, _GROUP_SIZES
        if mode != "affine":
            bits, sizes = ((number,) for number in FLOAT_MODES[mode])
        for name, allowed in (("bits", bits), ("group_size", sizes)):
            if type(values[name]) is not int or values[name] not in allowed:
                known = ", ".join(str(a) for a in allowed)
                raise CheckpointError(f"{where}: quantization {name} is {values[name]!r}; klein_mlx reads {known}")
        layers = values.get("layers")
        if layers is not None:
            if not isinstance(layers, Mapping) or not layers:
                raise CheckpointError(f"{where}: the quantized layers are {layers!r}; they must be an object")
            if any(isinstance(own, Mapping) and "layers" in own for own in layers.values()):
                raise CheckpointError(f"{where}: a quantized layer has layers of its own")
            layers = {path: cls.from_dict(own, f"{where}: {path}") for path, own in layers.items()}
        return cls(values["bits"], values["group_size"], mode, layers)

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size, "mode": self.mode}
        if self.layers is not None:
            values["layers"] = {path: own.to_dict() for path, own in self.layers.items()}
        return values

    def told(self) -> str:
        """In words: what most layers have, and how many have something else."""
        words = f"{self.bits}-bit in groups of {self.group_size}"
        if self.mode != "affine":
            words = f"{self.mode} in groups of {self.group_size}"
        others = Counter(own.word() for own in (self.layers or {}).values())
        del others[self.word()]
        odd = [f"{n} layer{'s' * (n > 1)} {word}{'-bit' * word.isdigit()}" for word, n in sorted(others.items())]
        return f"{words} ({', '.join(odd)})" if odd else words

    def word(self) -> str:
        """As a user writes it: "4", "4-g32", "mxfp4"."""
        if self.mode != "affine":
            return self.mode
        return str(self.bits) if self.group_size == 64 else f"{self.bits}-g{self.group_size}"

    def of(self, part: str, path: str) -> "Quantization | None":
        """How the layer at this path is quantised; None if it is not. A layer's weight may stand for the layer."""
        path = path.removesuffix(".weight")
        if self.layers is not None:
            return self.layers.get(path)
        return self if is_quantized_path(part, path) else None

    def without(self, path: str) -> "Quantization | None":
        """The same for all layers but one; None if no other is left. Only of settings that name their layers."""
        layers = {name: own for name, own in (self.layers or {}).items() if name != path}
        return self.of_layers(layers) if layers else None

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which a weight is stored, as uint32."""
        return (*shape[:-1], shape[-1] * self.bits // 32)


def find_settings(inputs: int, packed: int, groups: int, has_biases: bool) -> Quantization | None:
    """The settings that a quantised layer must have, from the last axes of its weight and its scales.

    inputs: the layer's width before quantisation. None if no settings of MLX's fit.
    """
    if groups <= 0 or inputs <= 0 or packed * 32 % inputs or inputs % groups:
        return None
    bits, group_size = packed * 32 // inputs, inputs // groups
    if has_biases:
        return Quantization(bits, group_size) if bits in _AFFINE_BITS and group_size in _GROUP_SIZES else None
    mode = next((mode for mode, shape in FLOAT_MODES.items() if shape == (bits, group_size)), None)
    return Quantization(bits, group_size, mode) if mode else None


def is_quantized_path(part: str, name: str) -> bool:
    """Whether a module path (`layers.0.mlp.up_proj`), or the name of its weight, belongs to a quantised layer."""
    components = name.removesuffix(".weight").split(".")
    return components[0] in _LISTS.get(part, ()) and components[-1] in _LINEARS[part]


def check_shapes(part: str, shapes: Mapping[str, tuple[int, ...]], quantization: Quantization) -> None:
    """A CheckpointError if some quantised layer's input width is not a multiple of the group size, or if a layer that
    is named is not there."""
    for path in quantization.layers or ():
        if f"{path}.weight" not in shapes:
            raise CheckpointError(f"{part}: the quantized layers hold {path!r:.100}, which the {part} does not have")
    for name, shape in shapes.items():
        own = quantization.of(part, name) if name.endswith(".weight") else None
        if own and shape[-1] % own.group_size:
            raise CheckpointError(
                f"{part}: {name} has {shape[-1]} inputs; {own.bits}-bit weights need a multiple of "
                f"{own.group_size}: ask for a smaller group size, or leave the layer as it is"
            )


def named(path: str, arrays: Sequence[mx.array]) -> dict[str, mx.array]:
    """What `mx.quantize` made of the layer at this path, by name: its weight and scales, and biases where there are."""
    return {f"{path}.{kind}": array for kind, array in zip(("weight", "scales", "biases"), arrays, strict=False)}


def quantize_weights(part: str, weights: Mapping[str, Weight], quantization: Quantization) -> dict[str, Weight]:
    """Replace each eligible `x.weight` by `x.weight` (packed uint32), `x.scales` and `x.biases`, lazily.

    weights: names as in `klein_mlx.weights.checkpoint`; scales and biases take the weight's dtype.
    """
    check_shapes(part, {name: tuple(array.shape) for name, array in weights.items()}, quantization)
    result: dict[str, Weight] = {}
    for name, array in weights.items():
        own = quantization.of(part, name) if name.endswith(".weight") else None
        if own is None:
            result[name] = array
            continue
        path = name.removesuffix(".weight")
        if isinstance(array, Deferred):
            result |= _deferred(path, array, own)
            continue
        if own.searched:  # not lazy: what is tried for each group would be far more than the weight
            array = Deferred(tuple(array.shape), array.dtype, partial(_same, array))
            result |= _deferred(path, array, own)
            continue
        arrays = quantize_array(array, own)
        result |= named(path, arrays)
    return result


def _same(array: mx.array) -> mx.array:
    return array


def quantize_array(array: mx.array, own: Quantization) -> Sequence[mx.array]:
    """Codes, scales and, in the affine mode, biases."""
    if own.searched:
        return search(array, own.group_size, own.bits)
    return mx.quantize(array, own.group_size, own.bits, own.mode)


def _deferred(path: str, array: Deferred, own: Quantization) -> dict[str, Weight]:
    """As `mx.quantize` would, of an array that is not loaded yet; loaded once for what it becomes."""
    waiting: dict[int, mx.array] = {}

    def take(index: int) -> Callable[[], mx.array]:
        def load() -> mx.array:
            if index not in waiting:
                whole = array.load()
                if not is_finite(whole).item():
                    raise CheckpointError(f"{path}.weight: holds NaN or infinity: the source is damaged; get it again")
                waiting.update(enumerate(quantize_array(whole, own)))
            return waiting.pop(index)

        return load

    groups = (*array.shape[:-1], array.shape[-1] // own.group_size)
    kinds = [("weight", own.packed_shape(array.shape), mx.uint32)]
    if own.mode == "affine":
        kinds += [("scales", groups, array.dtype), ("biases", groups, array.dtype)]
    else:
        kinds += [("scales", groups, mx.uint8)]
    return {f"{path}.{kind}": Deferred(shape, dtype, take(i)) for i, (kind, shape, dtype) in enumerate(kinds)}


def prepare(module: nn.Module, part: str, quantization: Quantization) -> None:
    """Swap the module's eligible layers for quantised ones, ready for quantised weights."""

    def settings(path: str, layer: nn.Module) -> bool | dict[str, Any]:
        own = quantization.of(part, path)
        if own is None or not isinstance(layer, nn.Linear | nn.Embedding):
            return False
        return {"group_size": own.group_size, "bits": own.bits, "mode": own.mode}

    nn.quantize(module, quantization.group_size, quantization.bits, class_predicate=settings)
