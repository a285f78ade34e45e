"""Which device a test runs on, where there are two.

Tests with a tolerance, a count of bytes or an equality to the bit that were found on a CPU run there, on a Mac too:
their path stands here. Those that monkeypatch the device still decide for themselves. Others, of the command and of
pictures, run on the default device. Kernels of a GPU are `klein-mlx doctor`'s affair: it compares each with this CPU,
with bounds for the dtype.

With `--compiled` those others, and those of COMPILED, compute by a GPU's ways wherever they run: blocks and chains are
compiled, pictures taken in a GPU's strips, memory estimated as a GPU's. On a CPU that needs a C++ compiler. Commands in
a process of their own compute as always.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from klein_mlx.model import layers, vae

HERE = Path(__file__).parent
ON_CPU = (
    "bench",  # doctor's checks with a CPU's bounds; on a GPU the command itself is run
    "convert",  # peaks of memory while converting; bytes that searching for scales must give again
    "formats",  # dequantized to the bit as other programs on a CPU do
    "golden",  # diffusers' tensors, to rounding in float32
    "model",  # float32 to 1e-5, which TF32 (M5) would break; the CPU's own ways
    "parity",
    "runtime",  # measured bytes against the CPU's estimates; GPU formulas are pinned by counts
    "train",  # gradients to rounding
    "weights",
    "test_lora_tiny.py",  # equal to the bit
    "test_pipeline.py",  # batches and single pictures equal to the bit; bytes that are held
    "test_variants.py",
)


AS_ALWAYS = ("server", "test_layers.py")  # compared with the server's process; counts of calls, which compiling adds to
COMPILED = ("golden", "test_lora_tiny.py", "test_pipeline.py", "test_variants.py")
DEVICE_OF = layers.device_of


class Emulated(layers.Gpu):
    """A GPU's ways on a CPU, which multiplies float32 up to 30 times as fast as 16 bits: those go through it."""

    def matmul(self, x: mx.array, weight: mx.array, added: mx.array | None = None) -> mx.array:
        wide = [None if a is None else a.astype(mx.float32) for a in (x, weight, added)]
        return super().matmul(*wide).astype(x.dtype)  # type: ignore[arg-type]

    def attention(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
        return super().attention(*(a.astype(mx.float32) for a in (q, k, v)), mask=mask).astype(q.dtype)


def convolve(x: mx.array, weight: mx.array, *rest: Any) -> mx.array:
    return vae.convolve(x.astype(mx.float32), weight.astype(mx.float32), *rest).astype(x.dtype)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compiled", action="store_true", help="compute by a GPU's ways, on a CPU too")


def room(path: Path) -> str:
    return path.relative_to(HERE).parts[0]


def on_cpu(path: Path) -> bool:
    """Whether a test module's tests run on the CPU."""
    return room(path) in ON_CPU


@pytest.fixture(autouse=True, scope="module")
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """For a whole module: its own fixtures open pipelines, whose dtype is the device's."""
    own = room(request.path)
    other = own in COMPILED or not (on_cpu(request.path) or own in AS_ALWAYS)
    emulated = request.config.getoption("--compiled") and other
    with mx.stream(mx.cpu) if on_cpu(request.path) else nullcontext(), pytest.MonkeyPatch.context() as patch:
        if emulated:
            ways = Emulated(dense_from=0, dtype=mx.float32)
            for module in (layers, vae):
                patch.setattr(module, "device_of", lambda *_: ways)
            patch.setitem(vae.CONVOLUTIONS, "direct", convolve)
        yield


@pytest.fixture(autouse=True)
def _asked_anew() -> None:
    """A test may claim another device."""
    DEVICE_OF.cache_clear()
