"""Noise levels: how they are drawn, how the loss is weighted, and random keys that are pure functions of a step.

A run keeps no random state: every draw's key is made of the seed, what it is for, and the sample's number.
"""

import hashlib
import math
from itertools import pairwise

import mlx.core as mx

LEAST = 0.001  # the smallest noise level that is drawn
HELD_OUT_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
# The weight of a noise level where levels are uniform, with mean 1: little is learned from nearly clean pictures.
_WEIGHTS = (
    *((0.0, 0.46), (0.02, 0.48), (0.1, 0.72), (0.3, 0.73), (0.4, 0.80), (0.5, 0.93), (0.6, 1.08)),
    *((0.7, 1.26), (0.8, 1.44), (0.9, 1.51), (0.95, 1.37), (1.0, 0.91)),
)


def to_float(array: mx.array) -> float:
    """The number in an array of one."""
    return float(array.item())  # type: ignore[arg-type]


def key_of(*parts: int | str) -> mx.array:
    """A random key that is decided by these words and numbers alone."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return mx.random.key(int.from_bytes(digest[:8], "little"))


def draw_sigmas(kind: str, key: mx.array, tokens: int, count: int = 1) -> mx.array:
    """Noise levels, (count,) float32 in [0.001, 1]. tokens: of the picture, for "shifted"."""
    if kind in ("logit-normal", "shifted"):
        sigma = mx.sigmoid(mx.random.normal((count,), key=key))
        if kind == "shifted":
            factor = math.exp(shift_of(tokens))
            sigma = factor * sigma / (1 + (factor - 1) * sigma)
    else:
        sigma = mx.random.uniform(shape=(count,), key=key)
        if kind == "content":
            sigma = sigma**3
        elif kind == "style":
            sigma = 1 - sigma**3
        else:
            sigma = LEAST + (1 - LEAST) * sigma
    return mx.clip(sigma, LEAST, 1.0)


def shift_of(tokens: int) -> float:
    """mu of "shifted": linear, 0.5 at 256 tokens and 1.15 at 4096."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


def weight_of(kind: str, sigma: float) -> float:
    """What the loss at a noise level is multiplied by: 1, unless "weighted"."""
    if kind != "weighted":
        return 1.0
    return _interpolated(sigma) / _MEAN


def _interpolated(sigma: float) -> float:
    for (left, low), (right, high) in pairwise(_WEIGHTS):
        if sigma <= right:
            return low + (high - low) * (sigma - left) / (right - left)
    return _WEIGHTS[-1][1]


_MEAN = sum((b - a) * (u + v) / 2 for (a, u), (b, v) in pairwise(_WEIGHTS))
