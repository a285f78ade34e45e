"""What one check of `klein-mlx doctor` returns, and how errors are measured and bounded.

An error is relative to float32: the larger of the root mean square of the differences over that of the reference, and
of the largest difference over the largest reference value. So a kernel that is a little wrong everywhere shows, and one
that is wrong in a single tile.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx

# The largest relative error of rounding once: half of the last bit. Of float32 on a CPU, or a GPU that does not shorten
# it; the M5's matrix units take float32 as TF32 (10 bits) unless MLX_ENABLE_TF32=0.
ROUNDING = {mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11, mx.float32: 2.0**-23}
TF32 = 2.0**-10


@dataclass(frozen=True)
class Row:
    """One line of the report.

    name: as `--only` takes it. text: the finding. holds: None where there is nothing to fail. remedy: where it fails,
    what to do. figures: numbers for `--json`.
    """

    name: str
    text: str
    holds: bool | None = None
    remedy: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What the checks run on.

    dtype: the compute dtype under test. gigaflops: what this machine's CPU multiplies in float32, which decides how
    large a reference may be. gpu: whether the default device is one. generation: Apple's GPU generation (13 for M1, 17
    for M5), 0 where it is none.
    """

    dtype: mx.Dtype
    gigaflops: float
    gpu: bool
    generation: int = 0

    def rounding(self, dtype: mx.Dtype | None = None) -> float:
        """The bound on one rounding in a dtype, here."""
        dtype = dtype or self.dtype
        if dtype == mx.float32 and self.gpu and self.generation >= 17:
            return TF32
        return ROUNDING[dtype]

    def rows(self, full: int, flops: float, seconds: float = 0.5, least: int = 8) -> int:
        """How many of `full` rows the CPU computes in so many seconds. flops: of one row. A multiple of 8."""
        fit = int(self.gigaflops * 1e9 * seconds / flops)
        return full if fit >= full else max(least, fit // 8 * 8)


class Check(NamedTuple):
    """run: yields rows as they are found. seconds: about how long it takes, for the progress line."""

    name: str
    section: str
    run: Callable[[Setting], Iterable[Row]]


def error(ours: mx.array, truth: mx.array) -> float:
    """Relative to float32, as the module says; infinite if anything is NaN, or the shapes differ."""
    if ours.shape != truth.shape:
        return math.inf
    with mx.stream(mx.cpu):
        wide = truth.astype(mx.float32)
        off = mx.abs(ours.astype(mx.float32) - wide)
        square, size = mx.sqrt(mx.mean(mx.square(off))), mx.sqrt(mx.mean(mx.square(wide)))
        worst, largest = off.max(), mx.abs(wide).max()
        values = [float(v.item()) for v in (square, size, worst, largest)]  # type: ignore[arg-type]
    if not all(map(math.isfinite, values)):
        return math.inf
    square, size, worst, largest = values
    return max(square / max(size, 1e-30), worst / max(largest, 1e-30))


def compared(name: str, what: str, found: float, bound: float, remedy: str) -> Row:
    """A row on an error and its bound."""
    text = f"{what}: error {found:.1e}, at most {bound:.1e}"
    figures = {"error": found if math.isfinite(found) else None, "bound": bound}
    return Row(name, text, found <= bound, remedy, figures)
