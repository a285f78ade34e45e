"""Which device a test runs on, where there are two.

Tests with a tolerance, a count of bytes or an equality to the bit that were found on a CPU run there, on a Mac too:
their path stands here. Those that monkeypatch the device still decide for themselves. Others, of the command and of
pictures, run on the default device. Kernels of a GPU are `klein-mlx doctor`'s affair: it compares each with this CPU,
with bounds for the dtype.
"""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from klein_mlx.model import layers

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


def on_cpu(path: Path) -> bool:
    """Whether a test module's tests run on the CPU."""
    return path.relative_to(HERE).parts[0] in ON_CPU


@pytest.fixture(autouse=True, scope="module")
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """For a whole module: its own fixtures open pipelines, whose dtype is the device's."""
    if not on_cpu(request.path):
        yield
        return
    with mx.stream(mx.cpu):
        yield


@pytest.fixture(autouse=True)
def _asked_anew() -> None:
    """A test may claim another device."""
    layers.device_of.cache_clear()
