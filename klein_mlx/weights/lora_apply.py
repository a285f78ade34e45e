"""Changes put on a loaded module, and taken off again exactly.

On plain weights they are merged, in float32, and undone by reading the original again: nothing is ever subtracted.
Quantised layers keep their bits, and get a branch beside them; what is as large as a weight of its own is merged into
the layer's expanded weight instead, for as long as it is there.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from klein_mlx.errors import RequestError
from klein_mlx.model.layers import Cut, Linear, empty
from klein_mlx.model.lora_layers import Branched, KroneckerBranch
from klein_mlx.weights.lora import Full, Kronecker, LowRank, Scaled, Weigh, gain, merge, merged_bias
from klein_mlx.weights.rows import TokenRows
from klein_mlx.weights.safetensors import is_finite


def branch(base: nn.Module, weight: mx.array, changes: Scaled, weigh: Weigh, dtype: mx.Dtype) -> Branched | None:
    """A quantised layer with all changes beside it, computing in dtype; None where they are no smaller than a weight of
    its own: full differences, huge ranks. weight: the layer's own, expanded; weigh: that of others."""
    if not _is_smaller(changes, weight.shape):
        return None
    beside = Branched(base)
    rows, columns = _gains(weight, changes, weigh)
    ups, downs = [], []
    for scale, change in changes:
        by_rows = by_columns = None
        if change.magnitude is not None:
            factor = gain(weight, change, weigh)
            by_rows, by_columns = (None, factor) if factor.shape[0] == 1 else (factor, None)
        if isinstance(change.delta, LowRank):
            up = scale * change.delta.factor * change.delta.up.astype(mx.float32)
            down = change.delta.down.astype(mx.float32)
            ups.append(up if by_rows is None else up * by_rows)
            downs.append(down if by_columns is None else down * by_columns)
        elif isinstance(change.delta, Kronecker):
            beside.others.append(_kronecker(change.delta, scale, by_rows, by_columns, dtype))
    if ups:
        beside.up, beside.down = mx.concatenate(ups, axis=1).astype(dtype), mx.concatenate(downs).astype(dtype)
    beside.rows = None if rows is None else rows[:, 0].astype(dtype)
    beside.columns = None if columns is None else columns[0].astype(dtype)
    beside.bias = merged_bias(changes, dtype)
    return beside


def _is_smaller(changes: Scaled, shape: Sequence[int]) -> bool:
    """Whether a branch of these changes is smaller than the weight of this shape itself."""
    ranks = sum(change.delta.rank for _, change in changes if isinstance(change.delta, LowRank))
    pieces = [c.delta.rows for _, c in changes if isinstance(c.delta, Kronecker) and c.delta.rows]
    if any(isinstance(c.delta, Full) for _, c in changes) or any(len(rows) > 1 for rows in pieces):
        return False
    return 2 * ranks * sum(shape) <= math.prod(shape)


def branch_bytes(changes: Scaled, shape: Sequence[int], dtype: mx.Dtype) -> int:
    """What stands beside a quantised layer, in bytes: factors, or a weight of its own."""
    if not _is_smaller(changes, shape):
        return math.prod(shape) * dtype.size
    deltas = [change.delta for _, change in changes]
    low_rank = sum(d.up.size + d.down.size for d in deltas if isinstance(d, LowRank))
    return (low_rank + sum(d.left.size + d.right.size for d in deltas if isinstance(d, Kronecker))) * dtype.size


def merge_bytes(changes: Scaled, shape: Sequence[int], dtype: mx.Dtype, quantized: bool) -> int:
    """Bytes that changing one layer takes for as long as it lasts, beside the layer as it was and as it will be.

    In float32 copies of the weight: the difference; of a narrower weight also the original and the sum; one more where
    DoRA measures it. A branch of plain factors takes none. Measured, and to a tenth the same for every kind.
    """
    by_norm = any(change.magnitude is not None for _, change in changes)
    copies = (1.05 if dtype == mx.float32 else 2.55) + by_norm
    if quantized and by_norm:
        copies = 4.05
    elif quantized:
        copies = 0 if _is_smaller(changes, shape) else copies + 0.5
    return round(copies * 4 * math.prod(shape))


def _gains(weight: mx.array, changes: Scaled, weigh: Weigh) -> tuple[mx.array | None, mx.array | None]:
    """What DoRAs multiply the original layer's outputs and inputs by, over all of them, less one; None without any."""
    rows: mx.array | None = None
    columns: mx.array | None = None
    for scale, change in changes:
        if change.magnitude is None:
            continue
        extra = scale * (gain(weight, change, weigh) - 1)
        if extra.shape[0] == 1:
            columns = extra if columns is None else columns + extra
        else:
            rows = extra if rows is None else rows + extra
    return rows, columns


def _kronecker(
    delta: Kronecker, scale: float, rows: mx.array | None, columns: mx.array | None, dtype: mx.Dtype
) -> KroneckerBranch:
    """The branch of one product; only those rows of `left` are kept that its rows need."""
    left, height = scale * delta.factor * delta.left.astype(mx.float32), delta.right.shape[0]
    ((start, stop),) = delta.rows or ((0, left.shape[0] * height),)
    first, last = start // height, -(-stop // height)
    left, right = left[first:last].astype(dtype), delta.right.astype(dtype)
    taken = KroneckerBranch(left, right, start - first * height, stop - first * height)
    taken.rows = None if rows is None else rows[:, 0].astype(dtype)
    taken.columns = None if columns is None else columns[0].astype(dtype)
    return taken


class Applied:
    """A module and what LoRAs have made of it.

    original: the weight of a path as it was loaded, read anew. dtype: that of the computation. The module may be in the
    layout of its checkpoint, or arranged (Transformer.arrange): what is changed is separated before and arranged after.
    """

    def __init__(self, module: nn.Module, original: Weigh, dtype: mx.Dtype):
        self.module, self.original, self.dtype = module, original, dtype
        self.touched: set[str] = set()
        self._known: set[str] = set()  # what the last update found touched: only these are read again
        self.replaced: dict[str, nn.Module] = {}  # quantised layers for which another module stands in

    def update(self, wanted: Mapping[str, Scaled]) -> None:
        """Make the module what it was loaded as, with just these changes, evaluated."""
        self._known = self.touched
        paths = self.touched | set(wanted)
        self.touched = paths  # if this is broken off, the next update mends all of it
        for _, own in groupby(sorted(paths, key=_split), key=lambda path: _split(path)[0]):
            group = list(own)
            parent, _ = _parent(self.module, group[0])
            with _separated(parent):
                for path in group:
                    self._change(parent, path, wanted.get(path, ()))
        self.touched = set(wanted)

    def _change(self, parent: Any, path: str, changes: Scaled) -> None:
        """Make one of the parent's layers what it was loaded as, with these changes, evaluated."""
        name = _split(path)[1]
        layer = self._changed(path, self.replaced.pop(path, getattr(parent, name)), changes)
        setattr(parent, name, layer)
        arrays = {} if isinstance(layer, TokenRows) else dict(tree_flatten(layer.parameters()))
        mx.eval(arrays)
        if changes and not all(is_finite(array).item() for array in arrays.values()):
            raise RequestError(
                f"{path}: with these LoRAs it holds numbers beyond what {_name(self.dtype)} can; use a smaller"
                " scale, or dtype bfloat16"
            )

    def _changed(self, path: str, layer: nn.Module, changes: Scaled) -> nn.Module:
        """layer: as it was loaded, or of the right kind. Returns what is to stand in its place."""
        if isinstance(layer, TokenRows) and changes:
            self.replaced[path] = layer
        if isinstance(layer, TokenRows) and not changes:
            return layer
        if not _is_quantized(layer):
            untouched = path not in self._known and not isinstance(layer, Cut | TokenRows)
            present: Any = layer.weight if untouched else self.original(path)
            return self._plain(path, layer, present, changes)
        if not changes:
            return layer
        self.replaced[path] = layer
        weight = expanded(layer)
        if not isinstance(layer, nn.QuantizedEmbedding):
            beside = branch(layer, weight, changes, self._weigh, self.dtype)
            if beside is not None:
                return beside
        return self._plain(path, layer, weight, changes)

    def _plain(self, path: str, layer: nn.Module, weight: mx.array, changes: Scaled) -> nn.Module:
        """A layer like this one, unquantised, with the changes merged into this weight."""
        weight = merge(weight, changes, self._weigh).astype(self.dtype)
        if isinstance(layer, nn.QuantizedEmbedding | TokenRows):
            layer = empty(nn.Embedding)
        elif isinstance(layer, nn.Linear | nn.QuantizedLinear | Cut):
            # None of klein's layers has a bias of its own.
            return Linear.of(weight, merged_bias(changes, self.dtype), getattr(layer, "device", None))
        layer.weight = weight
        return layer

    def _weigh(self, path: str) -> mx.array:
        parent, name = _parent(self.module, path)
        layer = self.replaced.get(path) or getattr(parent, name, None)
        return expanded(layer) if layer is not None and _is_quantized(layer) else self.original(path)


def _is_quantized(layer: nn.Module) -> bool:
    if isinstance(layer, Cut):
        return _is_quantized(layer.first)
    return isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding)


def expanded(layer: nn.Module) -> mx.array:
    """A quantised layer's weight in float32, exactly as its bits say."""
    if isinstance(layer, Cut):
        return mx.concatenate([expanded(layer.first), expanded(layer.second)], axis=1)
    assert isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding)
    scales = layer.scales.astype(mx.float32) if layer.mode == "affine" else layer.scales
    biases = layer["biases"].astype(mx.float32) if "biases" in layer else None
    kind = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return mx.dequantize(layer.weight, scales, biases, **kind).astype(mx.float32)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


@contextmanager
def _separated(parent: Any) -> Iterator[None]:
    """Inside, an arranged module has the layers of its checkpoint; behind it, it is arranged again, and evaluated, so
    that of one module's joined weights only there is a second copy."""
    if not hasattr(parent, "separate"):
        yield
        return
    parent.separate()
    try:
        yield
    finally:
        parent.arrange()
    mx.eval(parent.parameters())


def _split(path: str) -> tuple[str, str]:
    """The path of a layer's parent in the module, and the layer's name there."""
    above, _, name = path.rpartition(".")
    return above, name


def _parent(module: nn.Module, path: str) -> tuple[Any, str]:
    *above, name = path.split(".")
    parent: Any = module
    for step in above:
        parent = parent[int(step)] if isinstance(parent, list) else parent[step]
    return parent, name
