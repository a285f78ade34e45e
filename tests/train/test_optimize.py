"""Updates: torch's AdamW, rounding that loses nothing on average, clipping, the learning rate's course."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from klein_mlx.train.noise import key_of, to_float
from klein_mlx.train.optimize import Updater, clipped, norm_of, pieces_of, rate_at, stochastic
from klein_mlx.train.options import ROUNDINGS, TrainOptions, make_options

OPTIONS = make_options({"data": "x", "output": "x.safetensors", "warmup": 0})


def test_adamw_is_torchs() -> None:
    """20 updates against Loshchilov & Hutter's algorithm 2 in float64, with bias correction and decoupled decay."""
    rng = np.random.default_rng(0)
    right = rng.standard_normal((4, 3))
    weights = {"a.b": mx.array(right.astype(np.float32))}
    options = replace(OPTIONS, learning_rate=1e-2, weight_decay=1e-2)
    updater = Updater(options, weights)
    first, second = np.zeros((4, 3)), np.zeros((4, 3))
    for step in range(20):
        gradient = rng.standard_normal((4, 3))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        right = right * (1 - 1e-2 * 1e-2)
        scale = 1e-2 / (1 - 0.9 ** (step + 1))
        right = right - scale * first / (np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8)
        updater.update("all", {"a.b": mx.array(gradient.astype(np.float32))}, step)
    assert np.abs(np.array(weights["a.b"]) - right).max() < 1e-6


def test_rounding_by_chance_is_right_on_average() -> None:
    """10^5 roundings of a number between two of bfloat16: the mean's deviation is a 600th of their distance."""
    value, step = 1 + 1 / 512, 1 / 128
    rounded = np.array(stochastic(mx.full((100_000,), value), key_of("test")).astype(mx.float32))
    assert set(rounded.tolist()) == {1.0, 1 + step}
    assert abs(rounded.mean() - value) < step / 100


def moved(rounding: str, rate: float) -> tuple[float, float]:
    """After 500 updates of weights near 0.02, whose distances are 1.2e-4: the share of the wanted change; and how far
    weights, with what rounding took from them, are from it at most."""
    options = TrainOptions("x", "x", method="full", rounding=rounding, optimizer="lion", learning_rate=rate)
    options = replace(options, weight_decay=0.0, warmup=0).checked()
    start = mx.full((4000,), 0.02).astype(mx.bfloat16)
    weights = {"w": start}
    updater = Updater(options, weights)
    for step in range(500):
        updater.update("all", {"w": mx.ones((4000,), mx.bfloat16)}, step)
    change = start.astype(mx.float32) - weights["w"].astype(mx.float32)
    exact = change - updater.state().get("lost/w", mx.array(0.0))
    return to_float(change.mean()) / (500 * rate), to_float(mx.abs(exact - 500 * rate).max())


@pytest.mark.parametrize("rate", [2e-6, 1e-7])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_small_updates_of_bfloat16(rounding: str, rate: float) -> None:
    """By Kahan every single weight is right as well: to an 8th of the distance, 500 roundings to a 256th of it by
    chance."""
    share, error = moved(rounding, rate)
    assert share == 0 if rounding == "nearest" else share == pytest.approx(1, abs=0.1)
    assert (error < 2**-13 / 8) == (rounding == "kahan")


@pytest.mark.parametrize(("shape", "pieces"), [((310, 700), 3), ((40, 30), 1), ((30,), 1)])
def test_adafactor(shape: tuple[int, ...], pieces: int) -> None:
    """3 updates against Shazeer & Stern's algorithms 4 and 5 in float64, without relative steps; their third is clipped
    to an RMS of 1. A matrix in pieces of its rows, one in one piece, a vector."""
    options = replace(OPTIONS, optimizer="adafactor", learning_rate=1e-2)
    weights, right = {"w": mx.zeros(shape)}, np.zeros(shape)
    updater = Updater(options, weights)
    rows, columns, squares = np.zeros(shape[:1]), np.zeros(shape[-1:]), np.zeros(shape)
    for step in range(3):
        gradient = np.random.default_rng(step).standard_normal(shape) * np.arange(shape[-1]) * 10**step
        new = (step + 1) ** -0.8
        square = np.square(gradient) + 1e-30
        squares = (1 - new) * squares + new * square
        if len(shape) == 2:
            rows = (1 - new) * rows + new * square.mean(axis=1)
            columns = (1 - new) * columns + new * square.mean(axis=0)
            squares = np.outer(rows, columns) / rows.mean()
        change = gradient / np.sqrt(squares)
        right -= 1e-2 * change / max(1.0, np.sqrt(np.square(change).mean()))
        updater.update("all", {"w": mx.array(gradient.astype(np.float32))}, step)
    assert np.abs(np.array(weights["w"]) - right).max() < 1e-6
    assert len(pieces_of(weights["w"])) == pieces


def test_clipping() -> None:
    gradients = {"a": mx.array([3.0]), "b": mx.array([4.0])}
    norm = norm_of(gradients)
    assert norm.item() == 5
    assert norm_of(clipped(gradients, norm, 1.0)).item() == pytest.approx(1, abs=1e-5)
    assert clipped(gradients, norm, 6.0)["a"].item() == 3


def test_the_course_of_the_learning_rate() -> None:
    options = replace(OPTIONS, learning_rate=1.0, warmup=10, steps=110)
    assert [rate_at(options, step) for step in (0, 9, 10, 109)] == [0.1, 1, 1, 1]
    cosine = replace(options, schedule="cosine")
    assert rate_at(cosine, 60) == pytest.approx(0.5)
    assert rate_at(cosine, 110) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion", "muon"])
def test_a_state_that_is_restored_goes_on(optimizer: str) -> None:
    options = replace(OPTIONS, optimizer=optimizer, learning_rate=1e-2)
    gradients = [{"a.b": mx.random.normal((4, 3), key=mx.random.key(k))} for k in range(4)]
    whole, part = {"a.b": mx.ones((4, 3))}, {"a.b": mx.ones((4, 3))}
    one, two = Updater(options, whole), Updater(options, part)
    for step in range(4):
        one.update("all", dict(gradients[step]), step)
        two.update("all", dict(gradients[step]), step)
        if step == 1:
            state = two.state()
            two = Updater(options, part)
            two.restore(state)
    assert mx.array_equal(whole["a.b"], part["a.b"])
