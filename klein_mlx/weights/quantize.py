"""Which weights are quantized, and how: MLX's own formats, by default on the linear layers inside the blocks.

Unless they are named, embedders, modulations, the time embedding, the final layer and token embeddings keep their
dtype: they are small, and the picture depends on them everywhere at once. Norms and the VAE always keep theirs. Knows
names and arrays; no files.

Codes may be better than the nearest ones: searched scales,
and rounding that knows its inputs, in MLX's own affine format (weight = scale * code + bias per group).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn

from klein_mlx.errors import CheckpointError
from klein_mlx.model.compile import fused
from klein_mlx.weights.safetensors import Deferred, Weight, is_finite

# What files may hold: whatever MLX runs.
_AFFINE_BITS, _GROUP_SIZES = (1, 2, 3, 4, 5, 6, 8), (32, 64, 128)
FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # MLX's other modes, each with one shape

# The last components of the quantized linear layers, per part, and the lists that they stand in.
_LISTS = {"transformer": ("double_blocks", "single_blocks"), "text_encoder": ("layers",)}
_LINEARS = {
    "transformer": {"to_q", "to_k", "to_v", "to_out", "mlp_in", "mlp_out", "linear_in", "linear_out"},
    "text_encoder": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
}
QUANTIZED_PARTS = tuple(_LISTS)


@dataclass(frozen=True)
class Quantization:
    """MLX's own words: `group_size` neighbours along the input axis share a scale and a bias.

    layers: the quantized layers by their paths, each with its own settings; None: the linear layers of the blocks,
    all alike. With layers, the other fields say what most of them have. searched: whether affine scales are searched
    for when weights are quantized, instead of taken from the ends of each group; nothing later depends on it.
    """

    bits: int
    group_size: int = 64
    mode: str = "affine"
    layers: "Mapping[str, Quantization] | None" = field(default=None, hash=False)
    searched: bool = field(default=False, compare=False)

    @classmethod
    def of_layers(cls, layers: "Mapping[str, Quantization]") -> Self:
        """Of a part whose layers are quantized one by one; there must be some."""
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
        if values["bits"] == 1:
            _require_one_bit()
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
        """How the layer at this path is quantized; None if it is not. A layer's weight may stand for the layer."""
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
    """The settings that a quantized layer must have, from the last axes of its weight and its scales.

    inputs: the layer's width before quantization. None if no settings of MLX's fit.
    """
    if groups <= 0 or inputs <= 0 or packed * 32 % inputs or inputs % groups:
        return None
    bits, group_size = packed * 32 // inputs, inputs // groups
    if has_biases:
        if bits not in _AFFINE_BITS or group_size not in _GROUP_SIZES:
            return None
        if bits == 1:
            _require_one_bit()
        return Quantization(bits, group_size)
    mode = next((mode for mode, shape in FLOAT_MODES.items() if shape == (bits, group_size)), None)
    return Quantization(bits, group_size, mode) if mode else None


def _require_one_bit() -> None:
    try:
        mx.quantize(mx.zeros((1, 32)), 32, 1)
    except ValueError:
        raise CheckpointError("1-bit weights need mlx 0.32.4 or newer: pip install -U mlx") from None


def is_quantized_path(part: str, name: str) -> bool:
    """Whether a module path (`layers.0.mlp.up_proj`), or the name of its weight, belongs to a quantized layer."""
    components = name.removesuffix(".weight").split(".")
    return components[0] in _LISTS.get(part, ()) and components[-1] in _LINEARS[part]


def check_shapes(part: str, shapes: Mapping[str, tuple[int, ...]], quantization: Quantization) -> None:
    """A CheckpointError if some quantized layer's input width is not a multiple of the group size, or if a layer that
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
        if own.searched and isinstance(array, mx.array):  # not lazy: what is tried would be far more than the weight
            array = Deferred(tuple(array.shape), array.dtype, lambda array=array: array)
        if isinstance(array, Deferred):
            result |= _deferred(path, array, own)
        else:
            result |= named(path, quantize_array(array, own))
    return result


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
    """Swap the module's eligible layers for quantized ones, ready for quantized weights."""

    def settings(path: str, layer: nn.Module) -> bool | dict[str, Any]:
        own = quantization.of(part, path)
        if own is None or not isinstance(layer, nn.Linear | nn.Embedding):
            return False
        return {"group_size": own.group_size, "bits": own.bits, "mode": own.mode}

    nn.quantize(module, quantization.group_size, quantization.bits, class_predicate=settings)


Arrays = tuple[mx.array, mx.array, mx.array]  # packed codes (uint32), scales, biases

_SHRINKS = 10  # ranges that are tried for each group, from _LEAST of its own upwards
_LEAST = 0.55
_REFITS = 2
_TINY = 1e-12


def search(weight: mx.array, group_size: int, bits: int, importance: mx.array | None = None) -> Arrays:
    """Quantize with the scales and biases that keep each group's squared error small.

    weight: (rows, columns), any float dtype; scales and biases take it. importance: (columns,), how much an error in
    each column counts (mean squares of its inputs); None: all alike.
    Ranges between 0.55 and 1 of each group's own are tried, and the best one's scale and bias are fitted to its codes
    by least squares. Works through the rows in pieces, so memory stays at a few times 64 MB.
    """
    dtype, (rows, columns) = weight.dtype, weight.shape
    weights = mx.ones((columns,)) if importance is None else importance.astype(mx.float32)
    weights = mx.maximum(weights / mx.maximum(weights.mean(), _TINY), 1e-6).reshape(-1, group_size)
    step = max(1, (1 << 24) // columns)
    pieces = []
    for start in range(0, rows, step):
        groups = weight[start : start + step].astype(mx.float32).reshape(-1, columns // group_size, group_size)
        scales, biases = fit_groups(groups, weights, bits, dtype)
        codes = to_codes(groups, scales, biases, bits)
        piece = (pack(codes.flatten(1), bits), scales.astype(dtype), biases.astype(dtype))
        mx.eval(piece)
        pieces.append(piece)
    if len(pieces) == 1:
        return pieces[0]
    packed, scales, biases = (mx.concatenate(list(arrays)) for arrays in zip(*pieces, strict=True))
    return packed, scales, biases


def fit_groups(groups: mx.array, weights: mx.array, bits: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Scale and bias of every group, rounded to `dtype`, as float32.

    groups: (..., group_size) float32. weights: broadcastable to it, over 0. Returns two arrays (...).
    """
    scale, bias, error = _whole_range(groups, weights, bits)
    for index in range(_SHRINKS):
        shrink = _LEAST + (1 - _LEAST) * (index + 1) / _SHRINKS
        scale, bias, error = _try_range(groups, weights, mx.array(shrink), scale, bias, error, bits=bits)
    for _ in range(_REFITS):
        scale, bias, error = _refit(groups, weights, scale, bias, error, bits=bits)
    scale = scale.astype(dtype).astype(mx.float32)
    # With the scale rounded, another bias is best.
    codes = to_codes(groups, scale, bias, bits)
    bias = (weights * (groups - scale[..., None] * codes)).sum(-1) / weights.sum(-1)
    return scale, bias.astype(dtype).astype(mx.float32)


def to_codes(groups: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    """The nearest codes, as float32. groups: (..., group_size); scales and biases (...)."""
    return _codes(groups, scales[..., None], biases[..., None], bits)


@fused
def _codes(x: mx.array, scale: mx.array, bias: mx.array, bits: int) -> mx.array:
    safe = mx.where(mx.abs(scale) < _TINY, 1.0, scale)
    return mx.clip(mx.round((x - bias) / safe), 0, 2**bits - 1)


def _whole_range(groups: mx.array, weights: mx.array, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    low, high = groups.min(-1), groups.max(-1)
    scale = (high - low) / (2**bits - 1)
    return scale, low, _error(groups, weights, scale, low, bits)


def _error(groups: mx.array, weights: mx.array, scale: mx.array, bias: mx.array, bits: int) -> mx.array:
    return _squares(groups, weights, scale[..., None], bias[..., None], bits).sum(-1)


@fused
def _squares(groups: mx.array, weights: mx.array, scale: mx.array, bias: mx.array, bits: int) -> mx.array:
    return weights * (groups - (scale * _codes(groups, scale, bias, bits) + bias)) ** 2


def _fitted(groups: mx.array, weights: mx.array, codes: mx.array) -> tuple[mx.array, mx.array]:
    """Least squares: the scale and bias with which these codes come closest."""
    total = weights.sum(-1) if weights.shape == groups.shape else mx.broadcast_to(weights, groups.shape).sum(-1)
    mean_code, mean = (weights * codes).sum(-1) / total, (weights * groups).sum(-1) / total
    centred = codes - mean_code[..., None]
    spread = (weights * centred * centred).sum(-1)
    scale = (weights * centred * groups).sum(-1) / mx.maximum(spread, _TINY)
    return scale, mean - scale * mean_code


def _better(
    groups: mx.array, weights: mx.array, codes: mx.array, scale: mx.array, bias: mx.array, error: mx.array, bits: int
) -> tuple[mx.array, mx.array, mx.array]:
    new_scale, new_bias = _fitted(groups, weights, codes)
    new_error = _error(groups, weights, new_scale, new_bias, bits)
    better = new_error < error
    return (
        mx.where(better, new_scale, scale),
        mx.where(better, new_bias, bias),
        mx.where(better, new_error, error),
    )


def _try_range(
    groups: mx.array,
    weights: mx.array,
    shrink: mx.array,
    scale: mx.array,
    bias: mx.array,
    error: mx.array,
    *,
    bits: int,
) -> tuple[mx.array, mx.array, mx.array]:
    low, high = groups.min(-1), groups.max(-1)
    middle, half = (low + high) / 2, shrink * (high - low) / 2
    codes = _codes(groups, (2 * half / (2**bits - 1))[..., None], (middle - half)[..., None], bits)
    return _better(groups, weights, codes, scale, bias, error, bits)


def _refit(
    groups: mx.array, weights: mx.array, scale: mx.array, bias: mx.array, error: mx.array, *, bits: int
) -> tuple[mx.array, mx.array, mx.array]:
    codes = _codes(groups, scale[..., None], bias[..., None], bits)
    return _better(groups, weights, codes, scale, bias, error, bits)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes (rows, columns), whole numbers in 0 .. 2^bits - 1, as MLX packs them: (rows, columns * bits / 32) uint32.

    The codes of a row are one stream of bits, lowest first; 32 of them fill `bits` words.
    """
    codes = codes.astype(mx.uint32).reshape(*codes.shape[:-1], -1, 32)
    words = [mx.zeros(codes.shape[:-1], mx.uint32) for _ in range(bits)]
    for index in range(32):
        word, offset = divmod(index * bits, 32)
        words[word] = words[word] | (codes[..., index] << offset)
        if offset + bits > 32:
            words[word + 1] = words[word + 1] | (codes[..., index] >> (32 - offset))
    return mx.stack(words, axis=-1).flatten(-2)
