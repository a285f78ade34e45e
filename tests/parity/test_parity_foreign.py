"""The foreign names that the tests write are those that diffusers' own conversion reads. Needs torch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

import mlx.core as mx  # noqa: E402
from diffusers.loaders import single_file_utils  # noqa: E402
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2  # noqa: E402
from folders import GOLDEN  # noqa: E402
from foreign import Weights, golden, save, to_bfl, to_ldm  # noqa: E402
from golden import cases, oracle, port  # noqa: E402

from klein_mlx import KleinPipeline, Step  # noqa: E402
from klein_mlx.formats.open import open_model  # noqa: E402
from klein_mlx.formats.part import KLEIN  # noqa: E402
from klein_mlx.model.sampler import latents_to_tokens  # noqa: E402


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


@pytest.mark.parametrize("length", [None, 48, 512])
def test_one_step_of_the_one_step_file(length: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformer in the layout of 4b-1step's file (BFL's names behind `model.`): its latents after one Euler step
    from pure noise are diffusers', at its own text length (None: 232), at 48 and at 512."""
    monkeypatch.setitem(KLEIN, "vae", replace(KLEIN["vae"], norm_num_groups=4))
    theirs = oracle.import_reference()
    pipe = theirs.load(GOLDEN)
    file = save(tmp_path / "model.safetensors", to_bfl(golden("transformer"), "model."))
    noise = cases.normal((1, pipe.transformer.config.in_channels, 4, 6), seed=3)
    kept: list[Any] = []
    with mx.stream(mx.cpu), torch.no_grad():
        ours = KleinPipeline(open_model(GOLDEN, parts={"transformer": file}), dtype="float32")
        assert ours.config.variant.name == "4b-1step"
        chosen = {} if length is None else {"max_sequence_length": length}
        run = ours.stream("a red fox", latents=noise, width=96, height=64, **chosen)
        found = [latents_to_tokens(event.latents) for event in run if isinstance(event, Step)]
        pipe(
            prompt="a red fox",
            latents=torch.from_numpy(noise),
            width=96,
            height=64,
            num_inference_steps=1,
            max_sequence_length=length or 232,
            text_encoder_out_layers=theirs.taps(pipe),
            callback_on_step_end=lambda _pipe, _step, _time, values: kept.append(values["latents"]) or values,
        )
    assert (len(found), len(kept), run.plan.recipe["schedule"]) == (1, 1, [1.0, 0.0])
    assert port.error(port.to_numpy(found[0]), kept[0].numpy()) <= 5e-4
