"""The schedule and the Euler loop: pure functions of numbers and arrays.

The model comes in as `predict`; nothing here knows how a velocity is made. Noise is MLX's, or bit-equal to torch's
generator on a CPU, so that a seed of diffusers gives the picture of diffusers.

Source of torch's: aten/src/ATen/native/cpu/DistributionTemplates.h (normal_fill, normal_fill_AVX2) and avx_mathfun.h
(Cephes' logarithm, sine and cosine), as on x86 with AVX2. On a Mac torch itself takes the system's log, sin and cos:
its noise differs from this in the last bit of some values.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np


def noise(key: mx.array, h: int, w: int, channels: int) -> mx.array:
    """Standard normal latents (1, h, w, channels), float32, decided by `key` alone."""
    return mx.random.normal((1, h, w, channels), key=key)


def latents_to_tokens(latents: mx.array) -> mx.array:
    """Flatten the latent grid row by row.

    latents: (B, h, w, C), any dtype. Returns (B, h*w, C); token i is row i // w, column i % w.
    """
    return latents.flatten(1, 2)


def tokens_to_latents(tokens: mx.array, h: int, w: int) -> mx.array:
    """The inverse of `latents_to_tokens`: (B, h*w, C) -> (B, h, w, C)."""
    return mx.unflatten(tokens, 1, (h, w))


def text_ids(length: int) -> mx.array:
    """Position ids (t, h, w, l) of text tokens: (0, 0, 0, i). Returns (length, 4) int32."""
    ids = mx.zeros((length, 4), dtype=mx.int32)
    ids[:, 3] = mx.arange(length)
    return ids


def image_ids(h: int, w: int, t: int = 0) -> mx.array:
    """Position ids (t, y, x, 0) of a grid's tokens, row by row. Returns (h*w, 4) int32.

    The picture itself has t = 0; reference k (from 0) has t = 10 + 10k.
    """
    y = mx.repeat(mx.arange(h), w)
    x = mx.tile(mx.arange(w), h)
    return mx.stack([mx.full(h * w, t, mx.int32), y, x, mx.zeros(h * w, mx.int32)], axis=-1).astype(mx.int32)


def patchify(z: mx.array) -> mx.array:
    """Fold 2 x 2 neighbours into channels.

    z: (B, 2h, 2w, C), the VAE's latents. Returns (B, h, w, 4C), channel index c * 4 + dy * 2 + dx.
    """
    b, height, width, c = z.shape
    z = z.reshape(b, height // 2, 2, width // 2, 2, c)
    return z.transpose(0, 1, 3, 5, 2, 4).reshape(b, height // 2, width // 2, 4 * c)


def unpatchify(latents: mx.array) -> mx.array:
    """The inverse of `patchify`: (B, h, w, 4C) -> (B, 2h, 2w, C)."""
    b, h, w, c = latents.shape
    latents = latents.reshape(b, h, w, c // 4, 2, 2)
    return latents.transpose(0, 1, 4, 2, 5, 3).reshape(b, 2 * h, 2 * w, c // 4)


def from_channels_first(x: mx.array) -> mx.array:
    """(B, C, h, w), as diffusers keeps latents, to (B, h, w, C)."""
    return x.transpose(0, 2, 3, 1)


def to_channels_first(x: mx.array) -> mx.array:
    """(B, h, w, C) to (B, C, h, w), as diffusers keeps latents."""
    return x.transpose(0, 3, 1, 2)


FIRST_REFERENCE_T, REFERENCE_T_STEP = 10, 10


@dataclass(frozen=True)
class References:
    """The reference pictures as tokens. tokens: (1, N, C); ids: (N, 4)."""

    tokens: mx.array
    ids: mx.array


def join_references(latents: Sequence[mx.array]) -> References | None:
    """All references' tokens one after the other; reference k (from 0) stands at t = 10 + 10k."""
    if not latents:
        return None
    ids = [
        image_ids(grid.shape[1], grid.shape[2], FIRST_REFERENCE_T + REFERENCE_T_STEP * k)
        for k, grid in enumerate(latents)
    ]
    return References(
        mx.concatenate([latents_to_tokens(grid) for grid in latents], axis=1), mx.concatenate(ids, axis=0)
    )


def all_ids(text_length: int, h: int, w: int, references: References | None) -> mx.array:
    """Position ids of [text, image, references], (S, 4)."""
    parts = [text_ids(text_length), image_ids(h, w)]
    if references is not None:
        parts.append(references.ids)
    return mx.concatenate(parts, axis=0)


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


F = np.float32
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_PI_4 = (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)  # -pi / 4 in three parts


def torch_noise(seed: int, shape: tuple[int, ...], dtype: mx.Dtype = mx.float32) -> mx.array:
    """What torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) returns.

    seed: 0 .. 2**64 - 1; torch's generator uses its lower 32 bits. shape: 16 values or more,
    in bfloat16 a multiple of 16. dtype: float32 or bfloat16.
    """
    count = math.prod(shape)
    twister = np.random.MT19937()
    twister._legacy_seeding(seed & 0xFFFFFFFF)  # type: ignore[attr-defined]
    values = _uniform(twister.random_raw(count))
    whole = count // 16 * 16
    normal = _normal(values[:whole])
    if whole < count:  # torch draws the last 16 values anew
        normal = np.concatenate([normal[: count - 16], _normal(_uniform(twister.random_raw(16)))])
    return mx.array(normal).reshape(shape).astype(dtype)


def _uniform(raw: np.ndarray) -> np.ndarray:
    """[0, 1) in steps of 2**-24."""
    return (raw & 0xFFFFFF).astype(F) * F(2**-24)


def _pairs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(u1 in (0, 1], u2) of Box and Muller: 8 and 8 of every 16 values."""
    blocks = values.reshape(-1, 2, 8)
    return F(1) - blocks[:, 0], blocks[:, 1]


def _normal(values: np.ndarray) -> np.ndarray:
    u1, u2 = _pairs(values)
    radius = np.sqrt(F(-2) * _log(u1))
    sine, cosine = _sincos(F(2 * math.pi) * u2)
    return np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)


def _fma(a: np.ndarray, b: "np.ndarray | F", c: "np.ndarray | F") -> np.ndarray:
    """a * b + c, rounded once: the product of two float32 is exact in float64."""
    return (a.astype(np.float64) * np.asarray(b, np.float64) + c).astype(F)


def _polynomial(x: np.ndarray, terms: tuple[float, ...]) -> np.ndarray:
    y = np.full_like(x, F(terms[0]))
    for term in terms[1:]:
        y = _fma(y, x, F(term))
    return y


def _log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of (0, 1]."""
    bits = np.ascontiguousarray(x).view(np.int32)
    e = (bits >> 23) - 0x7F + 1
    x = ((bits & 0x007FFFFF) | 0x3F000000).view(F)
    small = x < F(0.707106781186547524)
    e = (e - small).astype(F)
    x = np.where(small, (x - F(1)) + x, x - F(1))
    z = x * x
    y = _fma(_polynomial(x, _LOG) * x, z, e * F(-2.12194440e-4))
    y = _fma(z, F(-0.5), y)
    return _fma(e, F(0.693359375), x + y)


def _sincos(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sine and cosine of [0, 2 pi)."""
    octant = ((x * F(1.27323954473516)).astype(np.int32) + 1) & ~1
    y = octant.astype(F)
    for part in _PI_4:
        x = _fma(y, F(part), x)
    z = x * x
    cosine = _fma(_polynomial(z, _COS) * z, z, z * F(-0.5)) + F(1)
    sine = _fma(_polynomial(z, _SIN) * z, x, x)
    swap = (octant & 2) != 0
    sine, cosine = np.where(swap, cosine, sine), np.where(swap, sine, cosine)
    sine = np.where((octant & 4) != 0, -sine, sine)
    return sine, np.where(((octant - 2) & 4) == 0, -cosine, cosine)
