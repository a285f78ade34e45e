"""Noise levels follow their densities; keys are pure functions."""

import math

import mlx.core as mx
import numpy as np
import pytest

from klein_mlx.train.noise import LEAST, draw_sigmas, key_of, weight_of
from klein_mlx.train.options import SIGMAS

COUNT = 100_000


def normal_cdf(x: np.ndarray) -> np.ndarray:
    return np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])


def cdf(kind: str, x: np.ndarray, tokens: int) -> np.ndarray:
    """P(sigma <= x)."""
    if kind == "content":
        return np.cbrt(x)
    if kind == "style":
        return 1 - np.cbrt(1 - x)
    if kind == "logit-normal":
        return normal_cdf(np.log(x / (1 - x)))
    if kind == "shifted":
        mu = 0.5 + 0.65 * (tokens - 256) / 3840
        return normal_cdf(np.log(x / (1 - x)) - mu)
    return (x - LEAST) / (1 - LEAST)


@pytest.mark.parametrize("tokens", [256, 4096])
@pytest.mark.parametrize("kind", SIGMAS)
def test_draws_follow_the_density(kind: str, tokens: int) -> None:
    """Kolmogorov-Smirnov: 10^5 draws are within 0.005 of their own distribution with a chance of 99 %."""
    drawn = np.sort(np.array(draw_sigmas(kind, key_of("test", kind, tokens), tokens, COUNT)))
    assert LEAST <= drawn[0] <= drawn[-1] <= 1
    inside = drawn[(drawn > 0.0011) & (drawn < 0.9999)][::50]
    ranks = np.searchsorted(drawn, inside) / COUNT
    assert np.abs(ranks - cdf(kind, inside, tokens)).max() < 0.01


def test_the_shift_at_4096_tokens() -> None:
    """The median is e^1.15 / (1 + e^1.15)."""
    drawn = np.array(draw_sigmas("shifted", key_of("median"), 4096, COUNT))
    assert np.median(drawn) == pytest.approx(math.exp(1.15) / (1 + math.exp(1.15)), abs=0.004)


def test_weights_have_mean_1() -> None:
    levels = np.linspace(0, 1, 10_001)
    weights = [weight_of("weighted", float(level)) for level in levels]
    assert np.trapezoid(weights, levels) == pytest.approx(1, abs=1e-3)
    assert weight_of("weighted", 0.9) > 1.4
    assert {weight_of(kind, 0.3) for kind in SIGMAS if kind != "weighted"} == {1.0}


def test_keys_are_pure() -> None:
    assert mx.array_equal(key_of("noise", 1, 2), key_of("noise", 1, 2))
    assert not mx.array_equal(key_of("noise", 1, 2), key_of("noise", 12))
