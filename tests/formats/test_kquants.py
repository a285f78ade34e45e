"""The K-quants that tests/quality.py compares with: gguf-py reads them back, as close as such blocks can be."""

import kquants
import numpy as np
import pytest

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize(("kind", "most"), [("Q4_K", 0.073), ("Q5_K", 0.037), ("Q6_K", 0.0182)])
def test_gguf_py_reads_back_what_was_encoded(kind: str, most: float) -> None:
    """Gaussian weights: a grid of 16 levels over 32 of them is off by about 0.071 of their size, half of it per bit."""
    values = np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)
    data = kquants.encode(values, kind)
    assert data.shape == (8, 2 * kquants.SIZES[kind])
    restored = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert np.linalg.norm(restored - values) < most * np.linalg.norm(values)


@pytest.mark.parametrize("kind", list(kquants.SIZES))
def test_blocks_without_a_range(kind: str) -> None:
    values = np.stack([np.zeros(256), np.full(256, 0.5), np.full(256, -0.5)]).astype(np.float32)
    restored = gguf.quants.dequantize(kquants.encode(values, kind), gguf.GGMLQuantizationType[kind])
    assert np.isfinite(restored).all()
    assert np.array_equal(restored[0], values[0])
    assert np.abs(restored[2] - values[2]).max() < 0.02
