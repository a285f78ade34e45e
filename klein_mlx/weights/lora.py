"""LoRAs as arrays: what one changes in a module, and how that is merged into a weight.

A LoRA of any kind reaches this file as a table: our module paths, and for each a few `Change`s. Knows nothing of files
(`klein_mlx.formats.lora` reads those).

On plain weights changes are merged, in float32, and undone by reading the original again: nothing is ever subtracted.
Quantized layers keep their bits, and get a branch beside them; what is as large as a weight of its own is merged into
the layer's expanded weight instead, for as long as it is there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real

import mlx.core as mx
import mlx.nn as nn

from klein_mlx.errors import RequestError
from klein_mlx.model.branched import Branched, KroneckerBranch

Rows = tuple[tuple[int, int], ...]  # the rows that a piece takes of the whole, as (start, stop), in its own order
MAX_SCALE = 100.0


def take_rows(array: mx.array, rows: Rows) -> mx.array:
    """Those rows, one below the other."""
    return mx.concatenate([array[start:stop] for start, stop in rows])


@dataclass(frozen=True)
class LowRank:
    """factor * up @ down. up: (out, rank); down: (rank, in)."""

    up: mx.array
    down: mx.array
    factor: float = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def dense(self) -> mx.array:
        """The difference itself, (out, in) float32."""
        return (self.factor * self.up.astype(mx.float32)) @ self.down.astype(mx.float32)

    def cut(self, rows: Rows) -> "LowRank":
        """Only these output channels."""
        return replace(self, up=take_rows(self.up, rows))


@dataclass(frozen=True)
class Kronecker:
    """factor * kron(left, right), of which `rows` (None: all) are taken. left: (a, b); right: (c, d)."""

    left: mx.array
    right: mx.array
    factor: float = 1.0
    rows: Rows | None = None

    def dense(self) -> mx.array:
        """As `LowRank.dense`."""
        left, right = self.factor * self.left.astype(mx.float32), self.right.astype(mx.float32)
        whole = mx.kron(left, right)
        return whole if self.rows is None else take_rows(whole, self.rows)

    def cut(self, rows: Rows) -> "Kronecker":
        """As `LowRank.cut`; the factors themselves cannot be cut."""
        return replace(self, rows=rows)


@dataclass(frozen=True)
class Full:
    """A difference of a weight's own shape."""

    difference: mx.array

    def dense(self) -> mx.array:
        """As `LowRank.dense`."""
        return self.difference.astype(mx.float32)

    def cut(self, rows: Rows) -> "Full":
        """As `LowRank.cut`."""
        return Full(take_rows(self.difference, rows))


Delta = LowRank | Kronecker | Full


@dataclass(frozen=True)
class Change:
    """What a LoRA does to one module.

    delta: added to the weight, or None. bias: (out,), added to the output, or None.
    magnitude: DoRA's, the norms that the weight gets once delta is added: (out, 1) of rows, or (1, in) of columns.
    together: the modules (path, delta) whose rows, one below the other, make the columns that (1, in) measures, where
    the LoRA was made for one matrix that is several here; empty: this module alone.
    """

    delta: Delta | None = None
    bias: mx.array | None = None
    magnitude: mx.array | None = None
    together: tuple[tuple[str, Delta], ...] = ()

    @property
    def arrays(self) -> list[mx.array]:
        """Every array that it holds."""
        values = [self.bias, self.magnitude, *(vars(self.delta).values() if self.delta else ())]
        return [value for value in values if isinstance(value, mx.array)]


Weigh = Callable[[str], mx.array]  # a module's original weight, by its path
Scaled = Sequence[tuple[float, Change]]


def gain(base: mx.array, change: Change, weigh: Weigh) -> mx.array:
    """What DoRA multiplies base + delta by, float32, (out, 1) or (1, in).

    Source: "DoRA: Weight-Decomposed Low-Rank Adaptation" (Liu et al. 2024), equation 5, with the norm of each row as in
    PEFT, or of each column as in LyCORIS.
    """
    assert change.magnitude is not None
    magnitude = change.magnitude.astype(mx.float32)
    if magnitude.shape[0] == 1 and change.together:
        squares = [mx.square(weigh(path).astype(mx.float32) + d.dense()).sum(axis=0) for path, d in change.together]
        norms = mx.sqrt(mx.stack(squares).sum(axis=0))[None]
    else:
        changed = base.astype(mx.float32)
        if change.delta is not None:
            changed = changed + change.delta.dense()
        norms = mx.linalg.norm(changed, axis=0 if magnitude.shape[0] == 1 else 1, keepdims=True)
    return magnitude / mx.maximum(norms, 1e-30)


def merge(weight: mx.array, changes: Scaled, weigh: Weigh) -> mx.array:
    """weight with all changes, each made to the original: computed in float32, rounded once to the weight's dtype."""
    base = weight.astype(mx.float32)
    total = base
    for scale, change in changes:
        if change.magnitude is not None:
            changed = base if change.delta is None else base + change.delta.dense()
            total = total + scale * (changed * gain(base, change, weigh) - base)
        elif change.delta is not None:
            total = total + scale * change.delta.dense()
    return total.astype(weight.dtype)


def merged_bias(changes: Scaled, dtype: mx.Dtype) -> mx.array | None:
    """The sum of the changes' biases, or None if none has one."""
    biases = [scale * change.bias.astype(mx.float32) for scale, change in changes if change.bias is not None]
    return mx.stack(biases).sum(axis=0).astype(dtype) if biases else None


# ---- several of them ----


@dataclass(frozen=True)
class Lora:
    """A LoRA, read and checked against one model.

    file: its file's name. layout: whose, in words. changes: part -> module path -> what is done to it. modules: how
    many of its own modules that is. unused: keys that belong to nothing (only with `partial`). needless: modules of
    layers that no picture depends on. contradiction: what is to be told of metadata that states another model.
    """

    file: str
    sha256: str
    layout: str
    changes: Mapping[str, Mapping[str, tuple[Change, ...]]]
    modules: int
    unused: tuple[str, ...] = ()
    needless: int = 0
    contradiction: str | None = None

    @property
    def nbytes(self) -> int:
        """Of all arrays, each counted once: q, k and v of a fused layer share some."""
        held = {
            id(array): array.nbytes
            for own in self.changes.values()
            for many in own.values()
            for change in many
            for array in change.arrays
        }
        return sum(held.values())

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for part, changes in self.changes.items() if changes)


@dataclass(frozen=True)
class LoadedLora:
    """A LoRA in use, for reports and recipes: its name here, its file's name and digest, its scale."""

    name: str
    file: str
    sha256: str
    scale: float


def checked_scale(scale: float) -> float:
    """A scale, -100..100; RequestError for anything else."""
    number = isinstance(scale, Real) and not isinstance(scale, bool)
    if not number or not -MAX_SCALE <= scale <= MAX_SCALE:
        raise RequestError(f"scale is {scale!r:.60}; it must be a number from -{MAX_SCALE:g} to {MAX_SCALE:g}")
    return float(scale)


def branch(base: nn.Module, weight: mx.array, changes: Scaled, weigh: Weigh, dtype: mx.Dtype) -> Branched | None:
    """A quantized layer with all changes beside it, computing in dtype; None where they are no smaller than a weight of
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
    """What stands beside a quantized layer, in bytes: factors, or a weight of its own."""
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
