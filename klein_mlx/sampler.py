"""The schedule and the Euler loop: pure functions of numbers and arrays.

The model comes in as `predict`; nothing here knows how a velocity is made.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import mlx.core as mx

Predict = Callable[[mx.array, float], mx.array]  # (latents, sigma) -> velocity, same shape


def empirical_mu(image_tokens: int, steps: int) -> float:
    """How far the schedule is shifted towards high noise.

    image_tokens: tokens of the picture (references do not count). steps: denoising steps.
    Two straight lines fitted by BFL, at 10 and at 200 steps, interpolated in the number of steps; above 4300 tokens
    the 200-step line alone. Source: diffusers, pipelines/flux2: compute_empirical_mu.
    """
    mu_200 = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return mu_200
    mu_10 = 8.73809524e-05 * image_tokens + 1.89833333
    slope = (mu_200 - mu_10) / 190.0
    return slope * steps + mu_200 - 200.0 * slope


def make_sigmas(image_tokens: int, steps: int, sigmas: Sequence[float] | None = None) -> list[float]:
    """The noise levels of a run: `steps` falling values in (0, 1], then 0.

    sigmas: unshifted levels to use instead of linspace(1, 1/steps, steps); they are shifted too, as in diffusers.
    Source: diffusers, FlowMatchEulerDiscreteScheduler.set_timesteps with exponential time shift.
    """
    if sigmas is None:
        sigmas = [1.0 - i * (1.0 - 1.0 / steps) / max(steps - 1, 1) for i in range(steps)]
    stretch = math.exp(empirical_mu(image_tokens, len(sigmas)))
    return [stretch / (stretch + (1.0 / sigma - 1.0)) for sigma in sigmas] + [0.0]


def euler_steps(predict: Predict, latents: mx.array, sigmas: Sequence[float]) -> Iterator[mx.array]:
    """Follow the velocity from noise to picture, yielding the latents after each step.

    latents: any shape, at noise level sigmas[0]; every step is computed in float32 and rounded once, to their dtype.
    """
    dtype = latents.dtype
    for sigma, sigma_next in pairwise(sigmas):
        velocity = predict(latents, sigma)
        step = (sigma_next - sigma) * velocity.astype(mx.float32)
        latents = (latents.astype(mx.float32) + step).astype(dtype)
        yield latents


def with_cfg(conditional: Predict, unconditional: Predict, guidance: float) -> Predict:
    """Classifier-free guidance: unconditional + guidance * (conditional - unconditional)."""

    def predict(latents: mx.array, sigma: float) -> mx.array:
        base = unconditional(latents, sigma)
        return base + guidance * (conditional(latents, sigma) - base)

    return predict
