"""The VAE against diffusers' tensors: latents, their statistics, pixels."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from golden import port
from golden.files import MODEL, load

from klein_mlx.model import sampler as grids


@pytest.fixture(scope="module")
def model() -> Iterator[port.Port]:
    with mx.stream(mx.cpu):  # the tolerances are the CPU's
        yield port.Port(MODEL)


@pytest.fixture(scope="module")
def ours(model: port.Port) -> port.Tensors:
    golden = load("vae")
    return port.vae(model, golden["pixels"], golden["latents"])


@pytest.mark.parametrize("name", ["z", "normalised", "denormalised", "decoded"])
def test_tensors(ours: port.Tensors, name: str):
    """1e-4 of the largest value, in float32: GroupNorm divides by the deviation of 40 to 15360 pixels."""
    assert port.error(ours[name], load("vae")[name]) <= 1e-4


def test_pixels(ours: port.Tensors):
    """8-bit pixels may differ by one where the float lies next to a half."""
    difference = ours["decoded_8bit"].astype(int) - load("vae")["decoded_8bit"]
    assert np.abs(difference).max() <= 1
    assert np.mean(difference != 0) < 1e-3


def test_normalising_is_undone(model: port.Port):
    """denormalize and normalize are inverse on the golden latents."""
    z = mx.array(load("vae")["denormalised"].transpose(0, 2, 3, 1))
    back = np.array(model.part("vae").normalize(grids.patchify(z))).transpose(0, 3, 1, 2)
    assert port.error(back, load("vae")["latents"]) <= 1e-5
