"""Noise of seeds as torch's CPU generator draws it, in the shapes and dtypes of diffusers' latents: bit for bit."""

import mlx.core as mx
import numpy as np
import pytest

from klein_mlx.model.sampler import torch_noise

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 5])
@pytest.mark.parametrize("shape", [(1, 128, 64, 64), (2, 128, 3, 5), (1, 64, 4, 4)])
def test_noise(seed: int, shape: tuple[int, ...]) -> None:
    for ours, theirs in ((mx.float32, torch.float32), (mx.bfloat16, torch.bfloat16)):
        wanted = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=theirs)
        assert np.array_equal(np.array(torch_noise(seed, shape, ours).astype(mx.float32)), wanted.float().numpy())


@pytest.mark.parametrize("count", [16, 17, 31])
def test_a_rest_is_drawn_anew(count: int) -> None:
    wanted = torch.randn(count, generator=torch.Generator().manual_seed(3))
    assert np.array_equal(np.array(torch_noise(3, (count,))), wanted.numpy())
