"""What is trained: low-rank factors beside frozen layers (LoRA, DoRA), or the transformer's own weights.

Trainable numbers live in one flat dictionary, path -> array, and stand in the modules only while a stage is called:
a module that captured them would make them constants.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from klein_mlx.errors import RequestError
from klein_mlx.model.branched import Branched
from klein_mlx.model.layers import layer_at, set_layer
from klein_mlx.model.transformer import Transformer
from klein_mlx.train.noise import key_of

BLOCKS = ("double_blocks", "single_blocks")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out", "linear_in", "linear_out")
Weights = dict[str, mx.array]


@dataclass
class Trainables:
    """weights: path -> array. adapters: the path of a layer -> the module that holds its factors, LoRA's and DoRA's.

    squares: of DoRA, path -> (out,) float32, the squared norms of the frozen layer's rows.
    """

    weights: Weights
    adapters: dict[str, Branched] = field(default_factory=dict)
    squares: Weights = field(default_factory=dict)

    @property
    def numbers(self) -> int:
        return sum(array.size for array in self.weights.values())

    def of_stage(self, stage: str) -> Weights:
        """What belongs to one stage: "double_blocks.0", ..., or "stem" or "tail"."""
        return {path: array for path, array in self.weights.items() if stage_of(path) == stage}


def stage_of(path: str) -> str:
    """The stage of a step that a weight belongs to."""
    first, _, rest = path.partition(".")
    if first in BLOCKS:
        return f"{first}.{rest.partition('.')[0]}"
    return "tail" if first == "final_out" else "stem"


def find_targets(layers: Iterable[str], targets: str) -> list[str]:
    """The paths, of those of all layers, that get an adapter. Raises RequestError for a pattern that matches none."""
    layers = list(layers)
    blocks = [path for path in layers if path.partition(".")[0] in BLOCKS]
    if targets == "all":
        found = blocks
    elif targets == "attention":
        found = [path for path in blocks if path.rpartition(".")[2] in _ATTENTION]
    else:
        found = [path for path in layers if fnmatchcase(path, targets)]
    if not found:
        raise RequestError(
            f"targets is {targets!r}, which matches no layer; give all, attention, or a pattern such as *.to_v"
        )
    return sorted(found)


def check_rank(rank: int, path: str, shape: Sequence[int]) -> None:
    """Raise a RequestError for a rank over a layer's width."""
    if rank > min(shape):
        raise RequestError(f"rank is {rank}; {path} is {shape[0]} x {shape[1]}, so at most {min(shape)}")


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.QuantizedLinear)


def add_adapters(transformer: Transformer, targets: str, rank: int, seed: int, dora: bool = False) -> Trainables:
    """Put a branch beside each target. down is drawn as PEFT draws it, up is zero: nothing changes at first.

    Raises RequestError for a rank over a layer's width. The transformer must not be arranged.
    """
    trainables = Trainables({})
    layers = [path for path, module in transformer.named_modules() if is_linear(module)]
    for path in find_targets(layers, targets):
        layer = layer_at(transformer, path)
        out, inputs = shape_of(layer)
        check_rank(rank, path, (out, inputs))
        branch = Branched(layer)
        bound = inputs**-0.5  # kaiming_uniform with a = sqrt(5)
        down = mx.random.uniform(-bound, bound, (rank, inputs), key=key_of("down", seed, path))
        trainables.weights |= {f"{path}.down": down, f"{path}.up": mx.zeros((out, rank))}
        if dora:
            squares = mx.square(dense(layer)).sum(axis=1)
            trainables.squares[path] = squares
            trainables.weights[f"{path}.magnitude"] = mx.sqrt(squares)
        mx.eval(trainables.weights, trainables.squares)
        trainables.adapters[path] = branch
        set_layer(transformer, path, branch)
    return trainables


def all_weights(transformer: Transformer) -> Trainables:
    """Of full training: every weight of the model."""
    return Trainables(dict(tree_flatten(transformer.parameters())))  # type: ignore[arg-type]


def put(transformer: Transformer, trainables: Trainables, weights: Mapping[str, mx.array], dtype: mx.Dtype) -> None:
    """Let the modules compute with these trainable arrays, of one stage or of all, in `dtype`."""
    if not trainables.adapters:
        for path, array in weights.items():
            set_layer(transformer, path, array)
        return
    for path in sorted({path.rpartition(".")[0] for path in weights}):
        branch = trainables.adapters[path]
        up, down = weights[f"{path}.up"], weights[f"{path}.down"]
        magnitude = weights.get(f"{path}.magnitude")
        if magnitude is not None:
            # As in PEFT, the norm is a constant of the gradient (DoRA's section 4.3).
            gain = magnitude / mx.stop_gradient(_norms(branch.base, up, down, trainables.squares[path]))
            up = up * gain[:, None]
            branch.rows = (gain - 1).astype(dtype)
        branch.up, branch.down = up.astype(dtype), down.astype(dtype)


def _norms(layer: nn.Module, up: mx.array, down: mx.array, squares: mx.array) -> mx.array:
    """Of the rows of weight + up @ down, without making the sum: (out,) float32."""
    up, down = mx.stop_gradient(up), mx.stop_gradient(down)
    mixed = (up * (dense(layer) @ down.T)).sum(axis=1)
    own = (up * (up @ (down @ down.T))).sum(axis=1)
    return mx.sqrt(mx.maximum(squares + 2 * mixed + own, 1e-30))


def dense(layer: nn.Module) -> mx.array:
    """A layer's weight as plain float32 numbers, a constant."""
    weight: Any = layer.weight
    if isinstance(layer, nn.QuantizedLinear):
        weight = mx.dequantize(weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, layer.mode)
    return mx.stop_gradient(weight.astype(mx.float32))


def shape_of(layer: Any) -> tuple[int, int]:
    """(out, in) of a linear layer, packed or not."""
    out, packed = layer.weight.shape
    return (out, packed * 32 // layer.bits) if isinstance(layer, nn.QuantizedLinear) else (out, packed)
