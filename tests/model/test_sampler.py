"""The schedule and the Euler loop: properties that can be proved without a model."""

import math
from itertools import pairwise

import mlx.core as mx
import pytest

from klein_mlx.model.sampler import add_noise, empirical_mu, euler_steps, hold_outside, make_sigmas, with_cfg


def test_mu_at_the_two_fitted_points() -> None:
    """At 10 and 200 steps the interpolation must give back the two lines."""
    for tokens in (64, 1024, 4096, 4300):
        assert empirical_mu(tokens, 10) == pytest.approx(8.73809524e-05 * tokens + 1.89833333, abs=1e-9)
        assert empirical_mu(tokens, 200) == pytest.approx(0.00016927 * tokens + 0.45666666, abs=1e-9)


def test_mu_of_a_large_picture_ignores_the_steps() -> None:
    assert empirical_mu(4301, 4) == empirical_mu(4301, 50) == pytest.approx(0.00016927 * 4301 + 0.45666666)


@pytest.mark.parametrize(("tokens", "steps"), [(64, 4), (4096, 4), (4096, 50), (9000, 1)])
def test_sigmas_fall_from_one_to_zero(tokens: int, steps: int) -> None:
    sigmas = make_sigmas(tokens, steps)
    assert len(sigmas) == steps + 1
    assert sigmas[0] == pytest.approx(1.0, abs=1e-12)
    assert sigmas[-1] == 0.0
    assert all(a > b for a, b in pairwise(sigmas))


def test_the_published_schedule_of_64_tokens() -> None:
    assert make_sigmas(64, 4) == pytest.approx([1.0, 0.955, 0.875, 0.701, 0.0], abs=2e-3)


def test_given_sigmas_are_shifted_too() -> None:
    stretch = math.exp(empirical_mu(256, 2))
    assert make_sigmas(256, 2, [1.0, 0.5]) == pytest.approx([1.0, stretch / (stretch + 1.0), 0.0])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_straight_velocity_is_followed_to_its_end(dtype: mx.Dtype) -> None:
    """With velocity = noise - picture the last step lands on the picture."""
    picture, start = mx.random.normal((1, 4, 4, 8), key=mx.random.key(0)), mx.random.normal((1, 4, 4, 8))
    end = list(euler_steps(lambda x, s: start - picture, start.astype(dtype), make_sigmas(4096, 4)))[-1]
    assert end.dtype == dtype
    tolerance = 1e-5 if dtype == mx.float32 else 5 * 2**-7  # five roundings of values under 4, half an ulp each
    assert mx.abs(end.astype(mx.float32) - picture).max().item() < tolerance


def test_steps_sum_to_minus_one_for_a_bfloat16_velocity() -> None:
    """A constant velocity of 1 takes latents of 1 to 0; with dt rounded to bfloat16 the steps would sum to -0.998."""
    ones = mx.ones((1, 1, 1, 1))
    (*_, end) = euler_steps(lambda x, s: ones.astype(mx.bfloat16), ones, make_sigmas(4096, 4))
    assert abs(end.item()) < 1e-6


def test_each_step_is_rounded_once() -> None:
    """In bfloat16 the update is the float32 one, rounded: not a sum of rounded parts."""
    latents = mx.random.normal((64,), key=mx.random.key(3)).astype(mx.bfloat16)
    velocity = mx.random.normal((64,), key=mx.random.key(4)).astype(mx.bfloat16)
    (after,) = euler_steps(lambda x, s: velocity, latents, [0.9, 0.7003])
    exact = latents.astype(mx.float32) + (0.7003 - 0.9) * velocity.astype(mx.float32)
    assert mx.array_equal(after, exact.astype(mx.bfloat16))


def test_guidance_extrapolates() -> None:
    predict = with_cfg(lambda x, s: x + 1, lambda x, s: x, 4.0)
    assert predict(mx.array([2.0]), 0.5).item() == 6.0


@pytest.mark.parametrize("strength", [1.0, 0.8, 0.5, 0.123, 0.01])
def test_all_steps_are_run_at_any_strength(strength: float) -> None:
    sigmas = make_sigmas(4096, 4, strength=strength)
    assert len(sigmas) == 5
    assert sigmas[-1] == 0.0
    assert all(a > b for a, b in pairwise(sigmas))


def test_more_strength_starts_higher_without_jumps() -> None:
    for steps in (4, 50):
        starts = [make_sigmas(1024, steps, strength=i / 1000)[0] for i in range(1, 1001)]
        assert all(a < b for a, b in pairwise(starts))
        assert max(b - a for a, b in pairwise(starts)) < 0.02
        assert starts[-1] == 1.0


def test_a_part_of_a_run_is_the_end_of_the_whole() -> None:
    """3 steps from 0.6 are the last 3 of 5."""
    assert make_sigmas(1024, 3, strength=0.6) == pytest.approx(make_sigmas(1024, 5)[2:])


def test_what_is_not_painted_stays_on_its_way_and_ends_clean() -> None:
    clean, start = mx.random.normal((1, 2, 2, 3), key=mx.random.key(0)), mx.random.normal((1, 2, 2, 3))
    mask = mx.array([[1.0, 0.0], [0.5, 0.0]])[None, :, :, None]
    sigmas = [0.9, 0.4, 0.0]
    steps = list(
        euler_steps(lambda x, s: 0 * x, add_noise(clean, start, 0.9), sigmas, hold_outside(mask, clean, start))
    )
    assert mx.array_equal(steps[0][:, :, 1], add_noise(clean, start, 0.4)[:, :, 1])
    assert mx.array_equal(steps[1][:, :, 1], clean[:, :, 1])
    assert mx.array_equal(steps[1][:, 0, 0], add_noise(clean, start, 0.9)[:, 0, 0])


def test_edits_stay_in_the_compute_dtype() -> None:
    clean, start = (mx.random.normal((1, 2, 2, 4)).astype(mx.bfloat16) for _ in range(2))
    assert add_noise(clean, start, 0.3).dtype == mx.bfloat16
    held = hold_outside(mx.ones((1, 2, 2, 1)), clean, start)(start, 0.3)
    assert held.dtype == mx.bfloat16
    assert mx.array_equal(held, start)
