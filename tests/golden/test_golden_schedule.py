"""mu and the sigmas against diffusers' values; what the Euler loop adds up to."""

import mlx.core as mx
import numpy as np
import pytest
from golden import cases, port
from golden.files import load

from klein_mlx.model import sampler


def test_mu():
    """13 token counts from 1 to 16384, 7 numbers of steps; both sides of the bend at 4300 tokens."""
    golden = load("schedule")["mu"]
    assert golden.shape == (len(cases.MU_TOKENS), len(cases.MU_STEPS))
    np.testing.assert_allclose(port.schedule()["mu"], golden, rtol=1e-12, atol=0)


def test_mu_is_not_flux1s():
    """FLUX.1's straight line from 0.5 at 256 tokens to 1.15 at 4096 is far off."""
    linear = 0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256)
    assert abs(sampler.empirical_mu(1024, 4) - linear) > 1


@pytest.mark.parametrize(("tokens", "steps"), cases.SCHEDULES)
def test_sigmas(tokens: int, steps: int):
    """1e-6: diffusers keeps them in float32."""
    ours = sampler.make_sigmas(tokens, steps)
    assert len(ours) == steps + 1
    assert ours[-1] == 0
    np.testing.assert_allclose(ours, load("schedule")[f"sigmas.{tokens}.{steps}"], rtol=0, atol=1e-6)


def test_steps_add_up_to_minus_one():
    """With a constant velocity of 1 from latents of 0, the loop ends at -1."""
    sigmas = sampler.make_sigmas(4096, 4)
    end = list(sampler.euler_steps(lambda latents, _: mx.ones_like(latents), mx.zeros((1, 4)), sigmas))[-1]
    np.testing.assert_allclose(np.array(end), -1.0, atol=1e-6)


def test_each_step_is_rounded_once():
    """In bfloat16, latents + (sigma_next - sigma) * velocity is computed in float32 and rounded once, to bfloat16.
    A step rounded to bfloat16 before (its sum over a schedule is -0.998) changes a good part of the values."""
    latents, velocity = (mx.array(cases.normal((1, 4096), seed)).astype(mx.bfloat16) for seed in (1, 2))
    sigma, sigma_next = sampler.make_sigmas(4096, 4)[2:4]
    (end,) = sampler.euler_steps(lambda *_: velocity, latents, [sigma, sigma_next])
    assert end.dtype == mx.bfloat16
    wide = [np.array(x.astype(mx.float32)) for x in (latents, velocity)]
    once = wide[0] + np.float32(sigma_next - sigma) * wide[1]
    np.testing.assert_array_equal(port.to_numpy(end), port.to_numpy(mx.array(once).astype(mx.bfloat16)))
    early = wide[0] + port.to_numpy(mx.array(sigma_next - sigma).astype(mx.bfloat16)) * wide[1]
    assert np.mean(port.to_numpy(mx.array(early).astype(mx.bfloat16)) != port.to_numpy(end)) > 0.05
