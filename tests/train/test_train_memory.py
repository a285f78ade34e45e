"""The estimate of a training run: near what MLX measures, and a plan where it does not fit."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from test_gradients import NARROW, measured

from klein_mlx.config import ModelConfig
from klein_mlx.errors import RequestError
from klein_mlx.paths import TINY_FOLDER
from klein_mlx.train.memory import block_bytes, check_training_fits, estimate_training
from klein_mlx.train.options import make_options
from klein_mlx.weights.checkpoint import open_checkpoint

OPTIONS = make_options({"data": "x", "output": "x.safetensors", "model": "tiny", "rank": 4, "resolution": 128})
TINY = open_checkpoint(TINY_FOLDER)


@pytest.mark.parametrize(
    ("config", "method", "grid", "length"),
    [
        (NARROW, "lora", (8, 6), 80),
        (TINY.config, "lora", (16, 16), 192),
        (TINY.config, "full", (16, 16), 192),
        (NARROW, "full", (4, 4), 48),
    ],
    ids=["narrow", "tiny", "tiny-full", "narrow-full"],
)
def test_the_arrays_of_a_step(config: ModelConfig, method: str, grid: tuple[int, int], length: int) -> None:
    """Within 15 % of the measured peak above the weights."""
    _, backward, _ = measured(config, grid, length, method)
    tokens = length + grid[0] * grid[1]
    assert block_bytes(config, replace(OPTIONS, method=method), mx.float32, tokens) == pytest.approx(backward, rel=0.15)


def test_phases_grow_with_what_is_asked() -> None:
    def peak(size: tuple[int, int] = (128, 128), **more: Any) -> int:
        options = replace(OPTIONS, **more)
        return estimate_training(TINY, options, mx.float32, {}, size).phases["training"]

    assert peak() < peak((512, 512))
    assert peak() < peak(batch=2)
    assert peak() < peak(rank=16) < peak(rank=16, ema=0.9)
    assert peak(targets="*.to_v") < peak()


def test_a_refusal_has_a_plan_that_fits() -> None:
    options, size = replace(OPTIONS, resolution=1024), (1024, 1024)
    own = estimate_training(TINY, options, mx.float32, {}, size)
    check_training_fits(TINY, options, own, mx.float32, size)
    with pytest.raises(RequestError, match="this needs .*; --bits 8 --resolution 768 needs|; --resolution 768 needs"):
        check_training_fits(TINY, options, replace(own, machine=own.peak - 1), mx.float32, size)
    with pytest.raises(RequestError, match="this needs .* of 0.000 GB of memory; nothing smaller is left"):
        check_training_fits(TINY, options, replace(own, machine=1), mx.float32, size)
