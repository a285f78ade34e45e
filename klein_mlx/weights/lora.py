"""LoRAs as arrays: what one changes in a module, how that is merged into a weight, and several of them at once.

A LoRA of any kind reaches this file as a table: our module paths, and for each a few `Change`s. Knows nothing of files
(`klein_mlx.formats.lora` reads those) and nothing of modules (`klein_mlx.weights.lora_apply` changes those).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx

from klein_mlx.errors import RequestError

Rows = tuple[tuple[int, int], ...]  # the rows that a piece takes of the whole, as (start, stop), in its own order
MAX_SCALE = 100.0


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
        return replace(self, up=mx.concatenate([self.up[start:stop] for start, stop in rows]))


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
        return whole if self.rows is None else mx.concatenate([whole[start:stop] for start, stop in self.rows])

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
        return Full(mx.concatenate([self.difference[start:stop] for start, stop in rows]))


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


@dataclass
class LoraStack:
    """The LoRAs in use, by name, in the order in which they were loaded. The order does not matter for the result."""

    loras: dict[str, tuple[Lora, float]] = field(default_factory=dict)

    def add(self, lora: Lora, scale: float, name: str) -> LoadedLora:
        """Raises RequestError for a scale that is none, or a name that is taken."""
        if name in self.loras:
            raise RequestError(f"name is {name!r}, and a LoRA of that name is loaded; unload it or give another name")
        self.loras[name] = (lora, checked_scale(scale))
        return self.loaded[-1]

    def get(self, name: str) -> Lora:
        """Raises RequestError if none of that name is loaded; so do the others."""
        return self._entry(name)[0]

    def remove(self, name: str) -> Lora:
        lora, _ = self._entry(name)
        del self.loras[name]
        return lora

    def set_scale(self, name: str, scale: float) -> Lora:
        lora, _ = self._entry(name)
        self.loras[name] = (lora, checked_scale(scale))
        return lora

    @property
    def loaded(self) -> list[LoadedLora]:
        return [LoadedLora(name, lora.file, lora.sha256, scale) for name, (lora, scale) in self.loras.items()]

    @property
    def nbytes(self) -> int:
        return sum(lora.nbytes for lora, _ in self.loras.values())

    def changes(self, part: str) -> dict[str, list[tuple[float, Change]]]:
        """Module path -> all changes with their scales; a LoRA of scale 0 changes nothing."""
        found: dict[str, list[tuple[float, Change]]] = {}
        for lora, scale in self.loras.values():
            for path, changes in lora.changes.get(part, {}).items() if scale else ():
                found.setdefault(path, []).extend((scale, change) for change in changes)
        return found

    def _entry(self, name: str) -> tuple[Lora, float]:
        if name not in self.loras:
            known = f"loaded: {', '.join(self.loras)}" if self.loras else "none is loaded"
            raise RequestError(f"name is {name!r}; no LoRA of that name is loaded ({known})")
        return self.loras[name]


def checked_scale(scale: float) -> float:
    """A scale, -100..100; RequestError for anything else."""
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not number or not -MAX_SCALE <= scale <= MAX_SCALE:
        raise RequestError(f"scale is {scale!r:.60}; it must be a number from -{MAX_SCALE:g} to {MAX_SCALE:g}")
    return float(scale)
