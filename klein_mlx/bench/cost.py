"""Counts what a graph costs on a GPU, without one and without computing anything: kernels, FLOPs, bytes.

The graph is traced at full size. Every mx.fast operation and every `fused` chain is one kernel, as on Metal; on a CPU
they would fall apart into many, so while tracing they are replaced by stand-ins that record themselves. What is left on
MLX's own tape is a matmul, a convolution, a view (free) or some other kernel. No strides are simulated: copies that
Metal would have to make of arrays that are not contiguous are not counted. Trace in one thread at a time.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from klein_mlx.model.compile import is_fused

ATTENTION = "scaled_dot_product_attention"
MATMULS = {"Matmul", "AddMM", "QuantizedMatmul"}
MATH = MATMULS | {"Convolution", ATTENTION}
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
FAST = ("rms_norm", "layer_norm", "rope", ATTENTION)
FUSED_HEADS = (64, 80, 128)  # sizes of a head for which Metal has attention in one kernel


@dataclass(frozen=True)
class Kernel:
    """One launch. name: MLX's primitive or function. flops: a multiply-add is two. moved: bytes read and written."""

    name: str
    flops: int
    moved: int


@dataclass
class Cost:
    """The launches of a graph, the operations that record themselves before the others."""

    kernels: list[Kernel] = field(default_factory=list)

    @property
    def total(self) -> int:
        """How many kernels are launched."""
        return len(self.kernels)

    @property
    def flops(self) -> int:
        """Of matmuls, convolutions and attention; all else is negligible."""
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def traffic(self) -> int:
        """Bytes moved by what is neither matmul, convolution nor attention."""
        return sum(kernel.moved for kernel in self.kernels if kernel.name not in MATH)

    @property
    def counts(self) -> Counter[str]:
        """How many kernels of each name."""
        return Counter(kernel.name for kernel in self.kernels)

    def record(self, name: str, inputs: list[mx.array], output: mx.array) -> None:
        """Add a function that is one kernel, by its arguments and its result."""
        moved = output.nbytes + sum(array.nbytes for array in inputs)
        if name == ATTENTION:
            queries, keys = inputs[0].shape, inputs[1].shape
            scores = math.prod(queries[:-1]) * keys[2]
            flops = 4 * scores * queries[-1]
            if queries[-1] in FUSED_HEADS:
                self.kernels.append(Kernel(name, flops, moved))
            else:  # two matmuls and a softmax between them, each of which writes or reads all scores
                nbytes = scores * output.dtype.size
                self.kernels += [Kernel("Matmul", flops // 2, moved // 2 + nbytes)] * 2
                self.kernels.append(Kernel("Softmax", 0, 2 * nbytes))
        else:
            self.kernels.append(Kernel(name, 0, moved))


def _stand_in(cost: Cost, name: str, original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def call(*args: Any, **kwargs: Any) -> mx.array:
        inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, mx.array)]
        like = original(*args, **kwargs)  # for its shape and dtype; it stays out of the graph
        output = mx.broadcast_to(mx.array(0, like.dtype), like.shape)
        cost.record(name, inputs, output)
        return mx.depends([output], inputs)[0]

    return call


@contextmanager
def _recording(cost: Cost, chains: bool) -> Iterator[None]:
    """Let mx.fast's operations and this package's fused chains record themselves, wherever they are called from."""
    replaced: list[tuple[ModuleType, str, Any]] = [(mx.fast, name, getattr(mx.fast, name)) for name in FAST]
    for where, module in list(sys.modules.items()):
        if where.startswith("klein_mlx."):
            replaced += [(module, name, value) for name, value in vars(module).items() if chains and is_fused(value)]
    try:
        for module, name, original in replaced:
            setattr(module, name, _stand_in(cost, name, original))
        yield
    finally:
        for module, name, original in replaced:
            setattr(module, name, original)


def trace(module: nn.Module, function: Callable[..., mx.array], *inputs: mx.array, chains: bool = True) -> Cost:
    """The cost of function(*inputs), whose weights are the module's. Neither weights nor inputs are evaluated.

    chains: each fused chain is one kernel; else as many as it has operations, as where nothing is compiled.
    """
    cost = Cost()
    weights = tree_flatten(module.parameters())
    names = [name for name, _ in weights]

    def call(*arrays: mx.array) -> mx.array:
        module.update(tree_unflatten(list(zip(names, arrays[: len(names)], strict=True))))
        return function(*arrays[len(names) :])

    tape: list[dict[str, Any]] = []
    try:
        with _recording(cost, chains):
            mx.export_function(tape.append, call, *(array for _, array in weights), *inputs)
    finally:
        module.update(tree_unflatten(weights))
    for entry in tape:
        if entry["type"] == "primitive" and entry["name"] not in VIEWS:
            cost.kernels += _kernels(entry)
    return cost


def _kernels(entry: dict[str, Any]) -> list[Kernel]:
    """What one primitive of the tape launches."""
    name, outputs = entry["name"], entry["outputs"]
    moved = sum(math.prod(shape) * dtype.size for _, shape, dtype in (*entry["inputs"], *outputs))
    flops = 0
    if name in MATMULS:
        flops = 2 * math.prod(outputs[0][1]) * entry["inputs"][0][1][-1]
    elif name == "Convolution":
        flops = 2 * math.prod(outputs[0][1]) * math.prod(entry["inputs"][1][1][1:])
    elif name == "Concatenate":  # a copy per input
        return [Kernel(name, 0, 2 * math.prod(shape) * dtype.size) for _, shape, dtype in entry["inputs"]]
    return [Kernel(name, flops, moved)]
