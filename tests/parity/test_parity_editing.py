"""Editing and guidance against diffusers, on the small committed model with random weights, in float32 on the CPU."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from folders import GOLDEN
from golden import cases, oracle, port
from PIL import Image, ImageDraw

from klein_mlx import KleinPipeline
from klein_mlx.formats.open import open_model
from klein_mlx.images.masks import crop_region, token_mask
from klein_mlx.model.sampler import latents_to_tokens
from klein_mlx.request import check
from klein_mlx.runtime.pictures import open_pictures
from klein_mlx.runtime.run import Run, Step

pytestmark = pytest.mark.parity

LATENTS = 5e-4
PROMPT = "a red fox in the snow"


@pytest.fixture(scope="module")
def reference() -> Any:
    return oracle.import_reference()


@pytest.fixture(scope="module")
def theirs(reference: Any) -> Any:
    return reference.load(GOLDEN)


@pytest.fixture(scope="module")
def ours() -> Iterator[port.Port]:
    with mx.stream(mx.cpu):
        yield port.Port(GOLDEN)


def picture(width: int, height: int, seed: int = 5) -> Image.Image:
    return Image.fromarray(cases.picture(height, width, seed))


def oval(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return mask


def all_latents(pipe: Any, **arguments: Any) -> np.ndarray:
    """Our latents after the last step, (1, tokens, channels)."""
    steps = [event for event in pipe.stream(PROMPT, max_sequence_length=cases.SHORT, **arguments)]
    last = [step for step in steps if isinstance(step, Step)][-1]
    return port.to_numpy(latents_to_tokens(last.latents))


def inpainted(
    reference: Any, pipe: Any, steps: int, strength: float, guidance: float = 1.0, **arguments: Any
) -> tuple[np.ndarray, np.ndarray]:
    """diffusers' noise and its latents after the last step."""
    import torch
    from diffusers.pipelines.flux2.pipeline_flux2_klein_inpaint import Flux2KleinInpaintPipeline

    painter = Flux2KleinInpaintPipeline(**pipe.components, is_distilled=guidance == 1.0)
    painter.set_progress_bar_config(disable=True)
    kept: list[Any] = []
    drawn: list[Any] = []
    scale_noise = painter.scheduler.scale_noise

    def keep_noise(sample: Any, timestep: Any, noise: Any) -> Any:
        drawn.append(noise)
        return scale_noise(sample, timestep, noise)

    def keep_latents(_pipe: Any, _step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        kept.append(kwargs["latents"])
        return kwargs

    painter.scheduler.scale_noise = keep_noise
    try:
        painter(
            prompt=PROMPT,
            num_inference_steps=steps,
            strength=strength,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(3),
            max_sequence_length=cases.SHORT,
            text_encoder_out_layers=reference.taps(pipe),
            callback_on_step_end=keep_latents,
            **arguments,
        )
    finally:
        del painter.scheduler.scale_noise
    return drawn[0].numpy(), kept[-1].numpy()


def generated(reference: Any, pipe: Any, noise: np.ndarray, **arguments: Any) -> np.ndarray:
    """diffusers' latents after the last step."""
    import torch

    kept: list[Any] = []

    def keep(_pipe: Any, _step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        kept.append(kwargs["latents"])
        return kwargs

    pipe(
        prompt=PROMPT,
        latents=torch.from_numpy(noise),
        max_sequence_length=cases.SHORT,
        text_encoder_out_layers=reference.taps(pipe),
        callback_on_step_end=keep,
        **arguments,
    )
    return kept[-1].numpy()


@pytest.mark.parametrize("sizes", [((1300, 900),), ((70, 200), (165, 101))])
def test_references(reference: Any, theirs: Any, ours: port.Port, sizes: tuple[tuple[int, int], ...]):
    """One larger than the cap, and two that are not square."""
    images = [picture(*size, seed=sum(size)) for size in sizes]
    noise = cases.normal((1, theirs.transformer.config.in_channels, 4, 6), seed=41)
    asked: dict[str, Any] = {"image": images, "height": 64, "width": 96, "num_inference_steps": 4}
    wanted = generated(reference, theirs, noise, guidance_scale=1.0, **asked)
    error = port.error(all_latents(ours.pipeline, latents=noise, **asked), wanted)
    print(f"references {sizes}: {error:.1e}")
    assert error <= LATENTS


@pytest.mark.parametrize(
    ("steps", "negative", "batched", "with_reference"),
    [(4, "", True, False), (4, "", False, True), (8, "a blurry photograph", True, True), (8, "", None, False)],
)
def test_guidance(
    reference: Any, theirs: Any, ours: port.Port, steps: int, negative: str, batched: bool | None, with_reference: bool
):
    """The undistilled model: both branches together and apart, the empty prompt and another as the negative one."""
    noise = cases.normal((1, theirs.transformer.config.in_channels, 4, 6), seed=40)
    asked: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": steps, "guidance_scale": 4.0}
    asked["image"] = picture(67, 99, seed=8) if with_reference else None
    embeds, _ = theirs.encode_prompt(
        negative, max_sequence_length=cases.SHORT, text_encoder_out_layers=reference.taps(theirs)
    )
    pipe = ours.pipeline
    config = pipe.config
    theirs.register_to_config(is_distilled=False)
    pipe.config = replace(config, is_distilled=False)
    try:
        wanted = generated(reference, theirs, noise, negative_prompt_embeds=embeds, **asked)
        got = all_latents(pipe, latents=noise, negative_prompt=negative, batch_guidance=batched, **asked)
    finally:
        theirs.register_to_config(is_distilled=True)
        pipe.config = config
    error = port.error(got, wanted)
    print(f"guidance, {steps} steps, batched {batched}: {error:.1e}")
    assert error <= LATENTS


# diffusers drops the first steps; we walk as many as were asked for: 3 from 0.6 are the last 3 of its 5.
@pytest.mark.parametrize(("strength", "their_steps", "our_steps"), [(1.0, 4, 4), (0.6, 5, 3)])
@pytest.mark.parametrize(
    ("size", "box", "padding", "with_reference"),
    [
        ((160, 96), (40, 20, 110, 80), None, False),
        ((165, 100), (40, 20, 110, 80), None, True),
        ((165, 100), (70, 30, 110, 60), 12, False),
        ((100, 165), (0, 120, 60, 164), 0, True),
    ],
)
def test_inpainting(
    reference: Any,
    theirs: Any,
    ours: port.Port,
    strength: float,
    their_steps: int,
    our_steps: int,
    size: tuple[int, int],
    box: tuple[int, int, int, int],
    padding: int | None,
    with_reference: bool,
):
    init, mask = picture(*size), oval(size, box)
    other = picture(67, 99, seed=8) if with_reference else None
    noise, wanted = inpainted(
        reference,
        theirs,
        their_steps,
        strength,
        image=init,
        mask_image=mask,
        image_reference=other,
        padding_mask_crop=padding,
    )
    got = all_latents(
        ours.pipeline,
        image=other,
        init_image=init,
        mask_image=mask,
        padding_mask_crop=padding,
        strength=strength,
        num_inference_steps=our_steps,
        latents=noise,
    )
    error = port.error(got, wanted)
    print(f"inpainting {size} padding {padding} strength {strength}: {error:.1e}")
    assert error <= LATENTS


def test_guided_inpainting(reference: Any, theirs: Any, ours: port.Port):
    init, mask = picture(96, 64), oval((96, 64), (20, 10, 80, 60))
    noise, wanted = inpainted(reference, theirs, 5, 0.6, guidance=4.0, image=init, mask_image=mask)
    pipe = ours.pipeline
    config = pipe.config
    pipe.config = replace(config, is_distilled=False)
    asked: dict[str, Any] = {"strength": 0.6, "num_inference_steps": 3, "guidance_scale": 4.0, "latents": noise}
    try:
        got = all_latents(pipe, init_image=init, mask_image=mask, **asked)
    finally:
        pipe.config = config
    error = port.error(got, wanted)
    print(f"guided inpainting: {error:.1e}")
    assert error <= LATENTS


def test_mask_geometry(theirs: Any):
    """The crop around 300 random masks, and the tokens of grey ones, equal diffusers'."""
    import torch
    from diffusers.pipelines.flux2.pipeline_flux2_klein_inpaint import Flux2KleinInpaintPipeline

    painter = Flux2KleinInpaintPipeline(**theirs.components)
    rng = np.random.default_rng(1)
    for _ in range(300):
        width, height = (int(n) for n in rng.integers(64, 200, 2))
        left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
        box = (left, top, int(rng.integers(left, width)), int(rng.integers(top, height)))
        mask = Image.new("L", (width, height), 0)
        ImageDraw.Draw(mask).rectangle(box, fill=int(rng.integers(1, 256)))
        working, padding = (width // 16 * 16, height // 16 * 16), int(rng.integers(0, 60))
        assert crop_region(mask, working, padding) == painter.mask_processor.get_crop_region(
            mask, *working, pad=padding
        )
    for seed in range(5):
        grey = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (96, 160)).astype(np.uint8), mode="L")
        prepared = painter.mask_processor.preprocess(grey, height=96, width=160)
        tokens = painter.prepare_mask_latents(prepared, 1, 1, 96, 160, torch.float32, "cpu")
        np.testing.assert_array_equal(token_mask(grey, 16).reshape(-1), tokens[0, :, 0].numpy())


@pytest.mark.parametrize("size", [(1300, 900), (160, 96), (165, 100)])
def test_init_pixels(theirs: Any, size: tuple[int, int]):
    """The picture that is encoded, before and after its scaling: within 1 of 255 of diffusers'."""
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    processor = Flux2ImageProcessor(vae_scale_factor=16)
    image: Image.Image = picture(*size)
    theirs_image: Any = image
    if size[0] * size[1] > 1024 * 1024:
        scale = math.sqrt(1024 * 1024 / (size[0] * size[1]))
        theirs_image = processor.resize(image, int(size[1] * scale), int(size[0] * scale))
    width, height = (side // 16 * 16 for side in theirs_image.size)
    wanted = processor.preprocess(theirs_image, height, width)[0].permute(1, 2, 0).numpy()
    request = check(open_model(GOLDEN).config, prompt="", init_image=image)
    canvas = open_pictures(request, 16, 1024).canvas
    assert canvas is not None
    np.testing.assert_allclose(np.asarray(canvas.image) / 127.5 - 1, wanted, rtol=0, atol=1 / 127.5)


def test_large_reference_pixels():
    """With the option, BFL's own cap of 2024 * 2024 pixels for a single reference; the rule is otherwise the same."""
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    image = picture(2600, 1800)
    request = check(open_model(GOLDEN).config, prompt="", image=image, large_reference=True)
    (ours,) = open_pictures(request, 16, 1024).references
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    theirs_image: Any = processor._resize_if_exceeds_area(image, 2024 * 2024)
    width, height = (side // 16 * 16 for side in theirs_image.size)
    wanted = processor.preprocess(theirs_image, height, width, resize_mode="crop")[0].permute(1, 2, 0).numpy()
    assert ours.size == (width, height)
    np.testing.assert_allclose(np.asarray(ours) / 127.5 - 1, wanted, rtol=0, atol=1 / 127.5)


@pytest.mark.parametrize("steps", [1, 4])
def test_kept_references(reference: Any, theirs: Any, ours: port.Port, steps: int):
    """9b-kv's rule: references that see only each other, at sigma 0, their keys and values kept."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein_kv import Flux2KleinKVPipeline

    cached = Flux2KleinKVPipeline(**reference.load(GOLDEN).components)
    cached.set_progress_bar_config(disable=True)
    noise = cases.normal((1, theirs.transformer.config.in_channels, 4, 6), seed=42)
    images = [picture(70, 100, seed=8), picture(96, 64, seed=9)]
    asked: dict[str, Any] = {"image": images, "height": 64, "width": 96, "num_inference_steps": steps}
    wanted = generated(reference, cached, noise, **asked)
    pipe = ours.pipeline
    config = pipe.config
    pipe.config = replace(config, caches_references=True)
    try:
        got = all_latents(pipe, latents=noise, **asked)
    finally:
        pipe.config = config
    plain = all_latents(pipe, latents=noise, **asked)
    error = port.error(got, wanted)
    print(f"kept references, {steps} steps: {error:.1e}; the ordinary rule: {port.error(plain, wanted):.1e}")
    assert error <= LATENTS
    assert port.error(plain, wanted) > 10 * LATENTS


def test_small_decoder(reference: Any, ours: port.Port, tmp_path: Path):
    """A VAE whose decoder has fewer channels than its encoder, as FLUX.2-small-decoder, in place of the model's own."""
    import random_models
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2

    vae: Any = AutoencoderKLFlux2(
        block_out_channels=(16, 16, 32, 32),
        decoder_block_out_channels=(8, 12, 16, 24),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
    )
    random_models._fill(vae, np.random.default_rng(0), random_models.VAE_GAINS)
    vae.save_pretrained(str(tmp_path))
    pipe = KleinPipeline.from_pretrained(GOLDEN, vae=tmp_path, dtype="float32")
    assert pipe.config.vae.decoder_block_out_channels == (8, 12, 16, 24)
    z = cases.normal((1, 8, 12, 20), seed=2)
    with torch.no_grad():
        wanted = vae.decode(torch.from_numpy(z)).sample.numpy()
        pixels = cases.picture(96, 160, seed=3).astype(np.float32) / 127.5 - 1
        encoded = vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None]).latent_dist.mode().numpy()
    module = pipe.parts.get("vae", Run(check(pipe.config, prompt="")))
    decoded = port.to_numpy(module.decode(mx.array(z.transpose(0, 2, 3, 1)))).transpose(0, 3, 1, 2)
    back = port.to_numpy(module.encode(mx.array(pixels)[None])).transpose(0, 3, 1, 2)
    print(f"small decoder: decode {port.error(decoded, wanted):.1e}, encode {port.error(back, encoded):.1e}")
    assert port.error(decoded, wanted) <= 1e-4
    assert port.error(back, encoded) <= 1e-4
