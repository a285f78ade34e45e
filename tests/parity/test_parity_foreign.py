"""The foreign names that the tests write are those that diffusers' own conversion reads. Needs torch."""

from typing import Any

import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

import mlx.core as mx  # noqa: E402
from diffusers.loaders import single_file_utils  # noqa: E402
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2  # noqa: E402
from folders import GOLDEN  # noqa: E402
from foreign import Weights, golden, to_bfl, to_ldm  # noqa: E402


def to_torch(weights: Weights) -> dict[str, Any]:
    return {n: torch.tensor(a.astype(mx.float32).tolist()).to(torch.bfloat16) for n, a in weights.items()}  # type: ignore[union-attr]


def assert_same(found: dict[str, Any], right: dict[str, Any]) -> None:
    assert found.keys() == right.keys()
    for name in found:
        assert torch.equal(found[name], right[name]), name


def test_diffusers_reads_the_transformer_as_its_own() -> None:
    found = single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(to_torch(to_bfl(golden("transformer"))))
    assert_same(found, to_torch(golden("transformer")))


def test_diffusers_reads_the_vae_as_its_own() -> None:
    config = AutoencoderKLFlux2.load_config(str(GOLDEN / "vae"))
    theirs = {n: a for n, a in golden("vae").items() if not n.startswith("bn.")}
    ldm = {n.replace("encoder.quant", "quant").replace("decoder.post", "post"): a for n, a in to_ldm(theirs).items()}
    found = single_file_utils.convert_ldm_vae_checkpoint(to_torch(ldm), config)
    assert_same(found, to_torch(theirs))
