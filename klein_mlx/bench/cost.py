"""Counts what a graph costs on a GPU, without one and without computing anything: kernels, FLOPs, bytes, copies.

The graph is traced at full size. Every mx.fast operation and every `Chain` is one kernel, as on Metal; on a CPU
they would fall apart into many, so while tracing they are replaced by markers that are put back as one operation each.
Strides are followed through views, so that arrays which Metal has to copy first (a reshape, a norm, a convolution of
what does not lie as it needs it) are counted, and so is what is alive at once. Trace in one thread at a time.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from klein_mlx.model.compile import Chain

ATTENTION = "scaled_dot_product_attention"
MATMULS = {"Matmul", "AddMM", "QuantizedMatmul"}
MATH = MATMULS | {"Convolution", ATTENTION}
VIEWS = {
    "AsStrided",
    "Broadcast",
    "Depends",
    "ExpandDims",
    "Flatten",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "StopGradient",
    "Transpose",
    "Unflatten",
    "View",
}
RESHAPES = {"Reshape", "Flatten", "Unflatten"}
NORMS = {"rms_norm", "layer_norm"}
FAST = ("rms_norm", "layer_norm", "rope", ATTENTION)
IN_PLACE = {"Add", "Subtract", "Multiply", "Divide", "Softmax", "Square", "SliceUpdate"}  # may reuse a dying input
FUSED_HEADS = (64, 80, 128)  # sizes of a head for which Metal has attention in one kernel
_FIRST_MARKER = 900_000_000

Strides = tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """One launch. name: MLX's primitive or function. flops: a multiply-add is two. moved: bytes read and written."""

    name: str
    flops: int
    moved: int


@dataclass
class Cost:
    """The launches of a graph in their order.

    copies: arrays that a kernel could not take as they lie, by the reason; each is a kernel "Copy" too. live: bytes of
    arrays alive at the fullest moment, without the graph's inputs and weights.
    """

    kernels: list[Kernel] = field(default_factory=list)
    copies: Counter[str] = field(default_factory=Counter)
    live: int = 0

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


# ---- the tape ----


@dataclass
class _Op:
    """One primitive, or one marked function. inputs, outputs: names of arrays. arguments: as MLX tells them."""

    name: str
    inputs: list[str]
    outputs: list[str]
    arguments: Sequence[Any] = ()
    is_chain: bool = False


@dataclass
class _Tape:
    """A graph's operations in their order. arrays: shape and dtype of each name. given: the graph's inputs."""

    ops: list[_Op]
    arrays: dict[str, tuple[tuple[int, ...], mx.Dtype]]
    given: set[str]
    results: list[str]


class _Markers:
    """Stand-ins for functions that are one kernel each; `put_back` finds them on the tape."""

    def __init__(self) -> None:
        self.names: list[tuple[str, bool]] = []

    def stand_in(self, name: str, original: Callable[..., mx.array], is_chain: bool) -> Callable[..., mx.array]:
        def call(*args: Any, **kwargs: Any) -> mx.array:
            inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, mx.array)]
            like = original(*args, **kwargs)  # for its shape and dtype; it stays out of the graph
            marker = mx.array(_FIRST_MARKER + len(self.names), mx.int32)
            self.names.append((name, is_chain))
            return mx.depends([mx.broadcast_to(mx.array(0, like.dtype), like.shape)], [marker, *inputs])[0]

        return call

    def put_back(self, op: _Op, constants: dict[str, int]) -> None:
        """Make a marker's `Depends` the operation that it stands for."""
        for place, name in enumerate(op.inputs):
            number = constants.get(name, 0) - _FIRST_MARKER
            if 0 <= number < len(self.names):
                op.name, op.is_chain = self.names[number]
                op.inputs = op.inputs[place + 1 :]
                return


@contextmanager
def _recording(markers: _Markers, chains: bool) -> Iterator[None]:
    """Mark mx.fast's operations, dequantizing, and chains, wherever they are called from."""

    def call(self: Chain[...], *args: Any, **kwargs: Any) -> mx.array:
        plain = self.plain
        return (markers.stand_in(plain.__name__, plain, True) if chains else plain)(*args, **kwargs)

    functions = [(mx.fast, name) for name in FAST] + [(mx, "dequantize")]
    originals, real = [(where, name, getattr(where, name)) for where, name in functions], Chain.__call__
    try:
        for where, name, original in originals:
            setattr(where, name, markers.stand_in(name, original, False))
        Chain.__call__ = call  # type: ignore[method-assign]
        yield
    finally:
        Chain.__call__ = real
        for where, name, original in originals:
            setattr(where, name, original)


def trace(module: nn.Module, function: Callable[..., mx.array], *inputs: mx.array, chains: bool = True) -> Cost:
    """The cost of function(*inputs), whose weights are the module's. Neither weights nor inputs are evaluated.

    chains: each fused chain is one kernel; else as many as it has operations, as where nothing is compiled.
    """
    weights = tree_flatten(module.parameters())
    names = [name for name, _ in weights]

    def call(*arrays: mx.array) -> mx.array:
        module.update(tree_unflatten(list(zip(names, arrays[: len(names)], strict=True))))
        return function(*arrays[len(names) :])

    entries: list[dict[str, Any]] = []
    markers = _Markers()
    try:
        with _recording(markers, chains):
            mx.export_function(entries.append, call, *(array for _, array in weights), *inputs)
    finally:
        module.update(tree_unflatten(weights))
    return _Counter(_tape(entries, markers)).cost


def _tape(entries: list[dict[str, Any]], markers: _Markers) -> _Tape:
    arrays: dict[str, tuple[tuple[int, ...], mx.Dtype]] = {}
    constants: dict[str, int] = {}
    ops: list[_Op] = []
    ends: dict[str, list[str]] = {"inputs": [], "outputs": []}
    for entry in entries:
        if entry["type"] == "constants":
            for name, array in entry["constants"]:
                arrays[name] = tuple(array.shape), array.dtype
                if array.size == 1 and array.dtype == mx.int32:
                    constants[name] = int(array.item())
            continue
        for end in ("inputs", "outputs"):
            arrays.update({name: (tuple(shape), dtype) for name, shape, dtype in entry.get(end, ())})
        if entry["type"] == "primitive":
            inputs, outputs = ([name for name, *_ in entry[end]] for end in ("inputs", "outputs"))
            ops.append(_Op(entry["name"], inputs, outputs, entry["arguments"]))
        elif entry["type"] in ends:
            ends[entry["type"]] = [name for name, *_ in entry[entry["type"]]]
    for op in ops:
        if op.name == "Depends":
            markers.put_back(op, constants)
    needed, kept = set(ends["outputs"]), []  # without what the markers only took a shape from
    for op in reversed(ops):
        if needed.intersection(op.outputs):
            kept.append(op)
            needed.update(op.inputs)
    return _Tape(kept[::-1], arrays, {*ends["inputs"], *constants}, ends["outputs"])


# ---- kernels, copies, and what is alive ----


class _Counter:
    """Walks a tape once. Arrays that share memory have the name of the one that owns it in `owner`."""

    def __init__(self, tape: _Tape):
        self.tape, self.cost = tape, Cost()
        self.strides: dict[str, Strides] = {name: rows(shape) for name, (shape, _) in tape.arrays.items()}
        self.owner: dict[str, str] = {}
        self._last: dict[str, int] = {}
        views = {op.outputs[0]: op.inputs[0] for op in tape.ops if op.name in VIEWS and op.inputs}
        for index, op in enumerate(tape.ops):
            for name in op.inputs:
                self._last[name] = index
                while name in views:  # a view keeps its array alive
                    name = views[name]
                    self._last[name] = index
        for name in tape.results:
            self._last[name] = len(tape.ops)
        self._alive: dict[str, int] = {}
        for index, op in enumerate(tape.ops):
            self._take(index, op)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.tape.arrays[name][0]

    def _bytes(self, name: str) -> int:
        """Of a whole array."""
        shape, dtype = self.tape.arrays[name]
        return math.prod(shape) * dtype.size

    def _touched(self, names: Iterable[str]) -> int:
        """Bytes that a kernel reads of these: repeated rows only once."""
        total = 0
        for name in dict.fromkeys(names):
            shape, dtype = self.tape.arrays[name]
            pairs = zip(shape, self.strides[name], strict=True)
            total += math.prod(size for size, stride in pairs if stride or size == 1) * dtype.size
        return total

    def _take(self, index: int, op: _Op) -> None:
        if op.name in VIEWS and self._is_view(op):
            for name in op.outputs:
                self.owner[name] = self.owner.get(op.inputs[0], op.inputs[0])
        else:
            if op.name not in VIEWS:
                self.cost.kernels += self._kernels(op)
            self._allocate(index, op)
        self.cost.live = max(self.cost.live, sum(self._alive.values()))
        for name in {self.owner.get(name, name) for name in op.inputs}:
            if self._until(name) <= index:
                self._alive.pop(name, None)

    def _until(self, owner: str) -> int:
        """The last operation that reads the array, or a view of it."""
        return self._last.get(owner, -1)

    def _allocate(self, index: int, op: _Op) -> None:
        reusable = op.is_chain or op.name in IN_PLACE or op.name in NORMS
        for name in op.outputs:
            size = self._bytes(name)
            if reusable:
                for source in {self.owner.get(other, other) for other in op.inputs}:
                    if self._alive.get(source) == size and self._until(source) <= index:
                        del self._alive[source]
                        break
            self._alive[name] = size

    def _copy(self, name: str, reason: str) -> None:
        self.cost.copies[reason] += 1
        self.cost.kernels.append(Kernel("Copy", 0, self._touched([name]) + self._bytes(name)))

    def _is_view(self, op: _Op) -> bool:
        """Follow a view's strides; False where a reshape has to copy."""
        source, output = op.inputs[0], op.outputs[0]
        shape, strides, arguments = self._shape(source), self.strides[source], op.arguments
        if op.name in RESHAPES:
            found = reshaped(shape, strides, self._shape(output))
            if found is None:
                self._copy(source, "reshape")
                return False
            self.strides[output] = found
        elif op.name == "Transpose":
            self.strides[output] = tuple(strides[axis] for axis in arguments[0])
        elif op.name == "ExpandDims":
            longer = list(strides)
            for axis in sorted(arguments[0]):
                longer.insert(axis, 1)
            self.strides[output] = tuple(longer)
        elif op.name == "Squeeze":
            gone = {axis % len(shape) for axis in arguments[0]}
            self.strides[output] = tuple(stride for axis, stride in enumerate(strides) if axis not in gone)
        elif op.name == "Broadcast":
            new = self._shape(output)
            more = len(new) - len(shape)
            old = [(0, 0)] * more + [*zip(shape, strides, strict=True)]
            pairs = zip(new, old, strict=True)
            self.strides[output] = tuple(stride if size == own else 0 for size, (own, stride) in pairs)
        elif op.name == "Slice":
            self.strides[output] = tuple(a * b for a, b in zip(strides, arguments[2], strict=True))
        elif op.name == "AsStrided":
            self.strides[output] = tuple(arguments[1])
        else:
            for name in op.outputs:
                if len(self._shape(name)) == len(strides):
                    self.strides[name] = strides
        return True

    def _kernels(self, op: _Op) -> list[Kernel]:
        """What one operation launches; copies that it needs first are added on the way."""
        shape, written = self._shape(op.outputs[0]), sum(self._bytes(name) for name in op.outputs)
        moved = self._touched(op.inputs) + written
        if op.name in MATMULS:
            for name in op.inputs[: 1 if op.name == "QuantizedMatmul" else 2]:
                if not is_matrix(self._shape(name), self.strides[name]):
                    self._copy(name, "matmul")
            return [Kernel(op.name, 2 * math.prod(shape) * self._shape(op.inputs[0])[-1], moved)]
        if op.name == "Convolution":
            for name in op.inputs[:2]:
                if not is_row_major(self._shape(name), self.strides[name]):
                    self._copy(name, "convolution")
            return [Kernel(op.name, 2 * math.prod(shape) * math.prod(self._shape(op.inputs[1])[1:]), moved)]
        if op.name == ATTENTION:
            return self._attention(op, moved)
        if op.name in NORMS:
            own, strides = self._shape(op.inputs[0]), self.strides[op.inputs[0]]
            rows_meet = len(own) < 2 or own[-2] == 1 or strides[-2] in (0, own[-1])
            if is_dense(own, strides) and strides[-1] == 1 and rows_meet:
                self.strides[op.outputs[0]] = strides
            else:
                self._copy(op.inputs[0], "norm")
        elif op.name == "Concatenate":  # a copy per input
            return [Kernel(op.name, 0, self._touched([name]) + self._bytes(name)) for name in op.inputs]
        elif op.name not in ("rope", "SliceUpdate"):
            self._follow(op, shape)
        return [Kernel(op.name, 0, moved)]

    def _follow(self, op: _Op, shape: tuple[int, ...]) -> None:
        """An elementwise kernel writes in the order in which it reads, where all that it reads has one."""
        full = [self.strides[name] for name in op.inputs if self._shape(name) == shape]
        if full and len(full) == len(op.inputs) and is_dense(shape, full[0]) and len(set(full)) == 1:
            self.strides.update(dict.fromkeys(op.outputs, full[0]))

    def _attention(self, op: _Op, moved: int) -> list[Kernel]:
        queries, keys = self._shape(op.inputs[0]), self._shape(op.inputs[1])
        for name in op.inputs[:3]:
            if self.strides[name][-1] != 1:
                self._copy(name, "attention")
        batch, heads, length, size = self._shape(op.outputs[0])
        scores = math.prod(queries[:-1]) * keys[2]
        flops = 4 * scores * queries[-1]
        if queries[-1] in FUSED_HEADS:
            self.strides[op.outputs[0]] = (length * heads * size, size, heads * size, 1)  # token by token
            return [Kernel(op.name, flops, moved)]
        # Two matmuls and a softmax between them, each of which writes or reads all scores.
        nbytes = scores * self.tape.arrays[op.outputs[0]][1].size
        math_kernels = [Kernel("Matmul", flops // 2, moved // 2 + nbytes)] * 2
        return [math_kernels[0], Kernel("Softmax", 0, 2 * nbytes), math_kernels[1]]


# ---- strides ----


def rows(shape: Sequence[int]) -> Strides:
    """Of an array whose last axis runs first, without gaps."""
    found, step = [], 1
    for size in reversed(shape):
        found.append(step)
        step *= size
    return tuple(reversed(found))


def is_row_major(shape: Sequence[int], strides: Strides) -> bool:
    return all(size == 1 or own == wanted for size, own, wanted in zip(shape, strides, rows(shape), strict=True))


def is_dense(shape: Sequence[int], strides: Strides) -> bool:
    """Whether the elements fill one block of memory, the axes in any order."""
    step = 1
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides, strict=True) if size > 1):
        if stride != step:
            return False
        step *= size
    return True


def is_matrix(shape: Sequence[int], strides: Strides) -> bool:
    """Whether a matmul takes it as it lies: rows, or columns, whose elements lie side by side, at any distance."""
    if len(shape) < 2 or 1 in shape[-2:]:
        return True
    return (strides[-1] == 1 and strides[-2] != 0) or (strides[-2] == 1 and strides[-1] >= shape[-2])


def reshaped(shape: Sequence[int], strides: Strides, new: Sequence[int]) -> Strides | None:
    """The strides of a reshape that shares the memory; None if it cannot."""
    if is_row_major(shape, strides):
        return rows(new)
    # Axes that continue each other become one; the new axes must divide what is left.
    merged: list[list[int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == stride * size:
            merged[-1] = [merged[-1][0] * size, stride]
        else:
            merged.append([size, stride])
    found: list[int] = []
    place = 0
    for size in new:
        if size == 1:
            found.append(found[-1] if found else 1)
        elif place < len(merged) and merged[place][0] % size == 0:
            merged[place][0] //= size
            found.append(merged[place][0] * merged[place][1])
            place += merged[place][0] == 1
        else:
            return None
    return tuple(found)
