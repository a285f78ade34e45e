"""Counts what a graph would cost on a GPU, without one and without computing anything.

The graph is traced at full size. Every mx.fast operation and every `fused` chain is one kernel, as on Metal; here, on a
CPU, they would fall apart into many, so while tracing they are replaced by stand-ins that record themselves. What is
left on MLX's own tape is a matmul, a view (free) or some other kernel. No strides are simulated: copies that Metal
would have to make of arrays that are not contiguous are not counted.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_unflatten

MATMULS = {"Matmul", "AddMM", "QuantizedMatmul"}
VIEWS = {
    "Transpose",
    "Reshape",
    "Flatten",
    "Unflatten",
    "Slice",
    "Split",
    "Squeeze",
    "ExpandDims",
    "Broadcast",
    "Depends",
}
FAST = ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention")


@dataclass
class Cost:
    """kernels: how many of each. flops: of matmuls and attention. traffic: bytes read and written by all the others."""

    kernels: Counter[str] = field(default_factory=Counter)
    flops: int = 0
    traffic: int = 0

    @property
    def total(self) -> int:
        return sum(self.kernels.values())

    def record(self, name: str, inputs: list[mx.array], output: mx.array) -> None:
        self.kernels[name] += 1
        if name == "scaled_dot_product_attention":
            queries, keys = inputs[0].shape, inputs[1].shape
            self.flops += 4 * math.prod(queries) * keys[2]
        else:
            self.traffic += output.nbytes + sum(array.nbytes for array in inputs)


def _stand_in(cost: Cost, name: str, original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def call(*args: Any, **kwargs: Any) -> mx.array:
        inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, mx.array)]
        like = original(*args, **kwargs)  # for its shape and dtype; it stays out of the graph
        output = mx.broadcast_to(mx.array(0, like.dtype), like.shape)
        cost.record(name, inputs, output)
        return mx.depends([output], inputs)[0]

    return call


def trace(
    monkeypatch: pytest.MonkeyPatch,
    chains: dict[ModuleType, tuple[str, ...]],
    module: nn.Module,
    function: Callable[..., mx.array],
    *inputs: mx.array,
) -> Cost:
    """The cost of function(*inputs), whose weights are the module's. chains: each module's `fused` functions."""
    cost = Cost()
    weights = tree_flatten(module.parameters())
    names = [name for name, _ in weights]

    def call(*arrays: mx.array) -> mx.array:
        module.update(tree_unflatten(list(zip(names, arrays[: len(names)], strict=True))))
        return function(*arrays[len(names) :])

    tape: list[dict[str, Any]] = []
    with monkeypatch.context() as patch:
        for name in FAST:
            patch.setattr(mx.fast, name, _stand_in(cost, name, getattr(mx.fast, name)))
        for where, functions in chains.items():
            for name in functions:
                patch.setattr(where, name, _stand_in(cost, name, getattr(where, name)))
        mx.export_function(tape.append, call, *(array for _, array in weights), *inputs)
    for entry in tape:
        if entry["type"] == "primitive" and entry["name"] not in VIEWS:
            _count(cost, entry)
    return cost


def _count(cost: Cost, entry: dict[str, Any]) -> None:
    """Add one primitive of the tape."""
    name, outputs = entry["name"], entry["outputs"]
    cost.kernels[name] += len(entry["inputs"]) if name == "Concatenate" else 1  # a copy per input
    if name in MATMULS:
        _, shape, _ = entry["inputs"][0]
        cost.flops += 2 * math.prod(outputs[0][1]) * shape[-1]
    else:
        cost.traffic += sum(math.prod(shape) * dtype.size for _, shape, dtype in (*entry["inputs"], *outputs))
