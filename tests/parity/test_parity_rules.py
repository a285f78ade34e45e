"""Small rules against diffusers' own functions: mu, the sigmas, the sizes and pixels of references, 8-bit rounding."""

import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from golden import cases, oracle
from PIL import Image

from klein_mlx.errors import RequestError
from klein_mlx.images import reading as images
from klein_mlx.model import sampler
from klein_mlx.model import sampler as grids
from klein_mlx.runtime import pictures

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def reference() -> Any:
    return oracle.import_reference()


@pytest.fixture(scope="module")
def processor(reference: Any) -> Any:
    """diffusers' image processor with klein's 16 pixels per token."""
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    return Flux2ImageProcessor(vae_scale_factor=16)


def test_mu(reference: Any):
    """Every 7th token count up to 20000 and 1 to 100 steps."""
    for tokens in [*range(1, 20000, 7), 4299, 4300, 4301]:
        for steps in (1, 2, 3, 4, 5, 8, 28, 50, 100):
            assert sampler.empirical_mu(tokens, steps) == pytest.approx(reference.compute_empirical_mu(tokens, steps))


def test_custom_sigmas(reference: Any):
    """Given sigmas are shifted too, by the mu of their number."""
    import torch
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    given = [1.0, 0.8, 0.35, 0.2, 0.1]
    scheduler.set_timesteps(sigmas=given, mu=reference.compute_empirical_mu(1024, len(given)))
    wanted = torch.as_tensor(scheduler.sigmas).numpy()
    np.testing.assert_allclose(sampler.make_sigmas(1024, 5, given), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dynamic_shifting": True, "shift": 3.0},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"shift": 3.0},
        {"shift": 1.0},
        {},
    ],
)
def test_the_schedule_of_a_scheduler_s_config(settings: dict[str, Any], reference: Any, tmp_path: Path):
    """As diffusers itself writes the config and computes the levels, with klein's way of asking for them."""
    import torch
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    from klein_mlx.formats.diffusers import read_time_shift

    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    scheduler.save_pretrained(str(tmp_path))
    shift = read_time_shift(tmp_path / "scheduler_config.json")
    for tokens, steps in ((256, 4), (4096, 4), (1024, 50)):
        levels = np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(sigmas=levels, mu=reference.compute_empirical_mu(tokens, steps))
        wanted = torch.as_tensor(scheduler.sigmas).numpy()
        np.testing.assert_allclose(sampler.make_sigmas(tokens, steps, time_shift=shift), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"shift_terminal": 0.02},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"invert_sigmas": True},
        {"stochastic_sampling": True},
        {"num_train_timesteps": 500},
    ],
)
def test_what_would_change_diffusers_levels_or_steps_is_refused(settings: dict[str, Any], tmp_path: Path):
    """What a scheduler of these settings writes; with klein's settings the same call passes."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    from klein_mlx.errors import CheckpointError
    from klein_mlx.formats.diffusers import read_time_shift

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **settings)
    scheduler.save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match=next(iter(settings))):
        read_time_shift(tmp_path / "scheduler_config.json")


def test_reference_pictures(processor: Any):
    """Sizes and pixels of prepared references: small, odd, larger than 1024 x 1024 (1025 x 1024: 1024 x 1008)."""
    sizes = [(64, 64), (65, 79), (101, 70), (1025, 1024), (1024, 1024), (2000, 300), (700, 1600), (1365, 1025)]
    for width, height in sizes:
        image = Image.fromarray(cases.picture(height, width, seed=width))
        theirs = image
        if width * height > 1024 * 1024:
            theirs = processor._resize_to_target_area(image, 1024 * 1024)
        w, h = (side // 16 * 16 for side in theirs.size)
        wanted = processor.preprocess(theirs, height=h, width=w, resize_mode="crop")[0].permute(1, 2, 0).numpy()
        ours, _ = images.prepare_reference(image, 16)
        assert ours.size == (w, h), (width, height)
        np.testing.assert_allclose(np.array(pictures.to_pixels(ours))[0], wanted, rtol=0, atol=1e-6)
    assert images.prepare_reference(Image.new("RGB", (1025, 1024)), 16)[0].size == (1024, 1008)


def test_random_reference_sizes(processor: Any):
    """300 sizes at random, by arithmetic alone."""
    rng = random.Random(3)
    for _ in range(300):
        width, height = rng.randint(64, 500), rng.randint(64, 500)
        if rng.random() < 0.1:
            width, height = width + 900, height + 900
        if max(width, height) > 8 * min(width, height):
            continue
        image = Image.new("L", (width, height)).convert("RGB")
        theirs = processor._resize_if_exceeds_area(image).size
        assert images.prepare_reference(image, 16)[0].size == tuple(side // 16 * 16 for side in theirs)


def test_refused_references(processor: Any):
    """What diffusers refuses, the port refuses, and nothing else: sides under 64, aspects over 8."""
    for size in [(63, 64), (64, 63), (64, 512), (64, 513), (520, 64), (512, 64), (64, 64), (800, 100), (801, 100)]:
        image = Image.new("RGB", size)
        assert _accepts(processor.check_image_input, image) == _accepts(images.prepare_reference, image, 16), size


def _accepts(check: Any, *args: Any) -> bool:
    try:
        check(*args)
    except (ValueError, RequestError):
        return False
    return True


def test_eight_bits(processor: Any):
    """Floats to 8 bits: clipped, and rounded to nearest."""
    import torch

    pixels = cases.normal((64, 64, 3), seed=9)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    wanted = np.asarray(processor.postprocess(tensor, output_type="pil")[0])
    np.testing.assert_array_equal(np.asarray(pictures.to_image(mx.array(pixels))), wanted)


@pytest.mark.parametrize("size", [(2, 4), (6, 10)])
def test_patches(reference: Any, size: tuple[int, int]):
    """Patchify and its inverse, channel-major."""
    import torch

    z = cases.normal((2, 8, *size), seed=4)
    theirs = reference.Flux2KleinPipeline._patchify_latents(torch.from_numpy(z)).numpy()
    ours = grids.patchify(mx.array(z.transpose(0, 2, 3, 1)))
    np.testing.assert_array_equal(np.array(ours).transpose(0, 3, 1, 2), theirs)
    np.testing.assert_array_equal(np.array(grids.unpatchify(ours)).transpose(0, 3, 1, 2), z)
