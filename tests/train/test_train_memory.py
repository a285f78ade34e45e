"""The estimate of a training run: near what MLX measures, and a plan where it does not fit."""

import json
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from test_gradients import NARROW, peaks

from klein_mlx.cli.main import main
from klein_mlx.config import ModelConfig
from klein_mlx.errors import RequestError
from klein_mlx.paths import TINY_FOLDER
from klein_mlx.train.memory import block_bytes, check_training_fits, estimate_training, mac_for
from klein_mlx.train.options import make_options
from klein_mlx.weights.checkpoint import open_checkpoint

OPTIONS = make_options({"data": "x", "output": "x.safetensors", "model": "tiny", "rank": 4, "resolution": 128})
TINY = open_checkpoint(TINY_FOLDER)


@pytest.mark.parametrize(
    ("config", "method", "grid", "length"),
    [
        (NARROW, "lora", (8, 6), 208),
        (TINY.config, "lora", (16, 16), 192),
        (NARROW, "full", (4, 4), 48),
    ],
    ids=["narrow", "tiny", "narrow-full"],
)
def test_the_arrays_of_a_step(config: ModelConfig, method: str, grid: tuple[int, int], length: int) -> None:
    """Within 15 % of the measured peak above the weights."""
    measured = next(peaks(config, grid, length, method))
    tokens = length + grid[0] * grid[1]
    told = block_bytes(config, replace(OPTIONS, method=method), mx.float32, tokens)
    assert told == pytest.approx(measured, rel=0.15)


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


def test_info_tells_what_fits_which_mac(capsys: pytest.CaptureFixture[str]) -> None:
    """The model need not be there."""
    assert main(["info", "base-4b", "--train", "--rank", "16", "--size", "512", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["training"]
    assert [row["bits"] for row in rows] == [None, "8", "4"]
    assert 8e9 < rows[0]["peak"] < 10e9
    assert 4.5e9 < rows[1]["peak"] < 6e9
    assert rows[2]["mac"] == 8
    assert main(["info", "base-4b", "--train", "--method", "full", "--size", "1024x768", "--references", "1"]) == 0
    assert "all weights, 1024 x 768, 1 reference" in capsys.readouterr().out
    for words, error in (("--rank 0", "rank is 0"), ("--size 500", "must be a multiple of 16"), ("--size x", "--size")):
        assert main(["info", "base-4b", "--train", *words.split()]) == 2
        assert error in capsys.readouterr().err


@pytest.mark.parametrize(("needed", "mac"), [(5 * 10**9, 8), (6 * 10**9, 16), (36 << 30, 48), (1 << 50, None)])
def test_macs(needed: int, mac: int | None) -> None:
    """Two thirds of 36 GB or less are the GPU's, three quarters of more."""
    assert mac_for(needed) == mac
