"""The schedule and the Euler loop: pure functions of numbers and arrays.

The model comes in as `predict`; nothing here knows how a velocity is made.
"""

import math
from collections.abc import Callable, Generator, Sequence
from itertools import pairwise

import mlx.core as mx

Predict = Callable[[mx.array, float], mx.array]  # (latents, sigma) -> velocity, same shape
After = Callable[[mx.array, float], mx.array]  # (latents, the sigma they have reached) -> latents, same shape and dtype

MU_STEPS = 200  # the longest run that mu was fitted to


def empirical_mu(image_tokens: int, steps: float) -> float:
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


def make_sigmas(
    image_tokens: int,
    steps: int,
    sigmas: Sequence[float] | None = None,
    strength: float = 1.0,
    time_shift: str | float = "exponential",
) -> list[float]:
    """The noise levels of a run: `steps` falling values in (0, 1], then 0.

    sigmas: unshifted levels to use instead of linspace(1, 1/steps, steps); they are shifted too, as in diffusers.
    strength: (0, 1], the unshifted level to start from. The run is the end of one of steps / strength steps, with that
    run's mu, so all `steps` are walked at any strength, and where steps / strength is whole the levels are diffusers'.
    time_shift: levels are shifted by exp(mu) ("exponential", klein's), by mu ("linear"), or by this number.
    Source: diffusers, FlowMatchEulerDiscreteScheduler.set_timesteps.
    """
    if sigmas is None:
        sigmas = [strength * (1.0 - i / steps) for i in range(steps)]
        mu = empirical_mu(image_tokens, min(steps / strength, max(steps, MU_STEPS)))
    else:
        mu = empirical_mu(image_tokens, len(sigmas))
    stretch = {"exponential": math.exp(mu), "linear": mu}[time_shift] if isinstance(time_shift, str) else time_shift
    return [stretch / (stretch + (1.0 / sigma - 1.0)) for sigma in sigmas] + [0.0]


def euler_steps(
    predict: Predict, latents: mx.array, sigmas: Sequence[float], after: After | None = None
) -> Generator[mx.array, mx.array | None, None]:
    """Follow the velocity from noise to picture, yielding the latents after each step.

    latents: any shape, at noise level sigmas[0]; every step is computed in float32 and rounded once, to their dtype.
    after: what is done to the latents at the end of each step, if anything. Latents that are sent to the generator take
    the place of those that it yielded.
    """
    dtype = latents.dtype
    for sigma, sigma_next in pairwise(sigmas):
        velocity = predict(latents, sigma)
        step = (sigma_next - sigma) * velocity.astype(mx.float32)
        latents = (latents.astype(mx.float32) + step).astype(dtype)
        if after is not None:
            latents = after(latents, sigma_next)
        changed = yield latents
        latents = latents if changed is None else changed


def add_noise(clean: mx.array, noise: mx.array, sigma: float) -> mx.array:
    """`clean` at noise level sigma (0..1): (1 - sigma) * clean + sigma * noise, in float32, rounded to clean's dtype.

    Source: diffusers, FlowMatchEulerDiscreteScheduler.scale_noise.
    """
    return ((1.0 - sigma) * clean.astype(mx.float32) + sigma * noise.astype(mx.float32)).astype(clean.dtype)


def hold_outside(mask: mx.array, clean: mx.array, noise: mx.array) -> After:
    """Keep what is not painted on the straight way from `noise` to `clean`.

    mask: (1, h, w, 1) float32 in 0..1, 1 where the latents are painted. clean, noise: (1, h, w, C).
    Source: diffusers, Flux2KleinInpaintPipeline.__call__, step 7.
    """

    def after(latents: mx.array, sigma: float) -> mx.array:
        kept = add_noise(clean, noise, sigma).astype(mx.float32)
        return (mask * latents.astype(mx.float32) + (1.0 - mask) * kept).astype(latents.dtype)

    return after


def guide(conditional: mx.array, unconditional: mx.array, guidance: float) -> mx.array:
    """Classifier-free guidance: unconditional + guidance * (conditional - unconditional)."""
    return unconditional + guidance * (conditional - unconditional)


def with_cfg(conditional: Predict, unconditional: Predict, guidance: float) -> Predict:
    """Guidance over two branches, one after the other."""

    def predict(latents: mx.array, sigma: float) -> mx.array:
        base = unconditional(latents, sigma)
        mx.eval(base)  # so that the two passes are never in memory together
        return guide(conditional(latents, sigma), base, guidance)

    return predict
