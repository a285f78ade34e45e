"""The one place that checks what a user asks: what passes, and the words of what does not."""

import inspect
import re
from dataclasses import fields, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from klein_mlx.config import ModelConfig, TextEncoderConfig, TransformerConfig, VAEConfig, default_taps
from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.options import Options
from klein_mlx.pipeline import KleinPipeline
from klein_mlx.request import check
from klein_mlx.weights.lora import checked_scale


def config(is_distilled: bool = True, **changes: Any) -> ModelConfig:
    """klein 4B's own dimensions."""
    values: dict[str, Any] = {
        "transformer": TransformerConfig(128, 5, 20, 128, 24, 7680, 3.0, (32, 32, 32, 32)),
        "text_encoder": TextEncoderConfig(151936, 2560, 9728, 36, 32, 8, 128),
        "vae": VAEConfig((128, 256, 512, 512), 2, 32),
        "is_distilled": is_distilled,
        "taps": default_taps(36),
    }
    return ModelConfig(**{**values, **changes})


def test_defaults_come_from_the_variant() -> None:
    request = check(config(), prompt="a fox", seed=7)
    assert (request.steps, request.guidance, request.max_sequence_length) == (4, 1.0, 512)
    assert request.pictures == [(0, 7)]
    base = check(config(is_distilled=False), prompt="a fox")
    assert (base.steps, base.guidance) == (50, 4.0)


def test_numbers_may_be_numpys() -> None:
    request = check(config(False), prompt="a", guidance_scale=np.float32(2.5), width=np.int32(64), seed=np.uint64(3))
    assert (request.guidance, type(request.guidance), request.width, request.seeds) == (2.5, float, 64, (3,))
    assert checked_scale(np.float16(0.5)) == 0.5
    for wrong in (np.float32("nan"), np.bool_(True), np.ones(2), 10**400, "2"):
        with pytest.raises(RequestError, match="guidance_scale is .* it must be a number from 1 to 100"):
            check(config(False), prompt="a", guidance_scale=wrong)
    with pytest.raises(RequestError, match="rng is .* it must be one of mlx, torch"):
        check(config(), prompt="a", rng=np.array(["mlx", "torch"]))


def test_variant_is_told_from_dimensions() -> None:
    assert config().variant.name == "4b"
    assert config(is_distilled=False).variant.name == "base-4b"
    assert config(variant_name="tiny").variant.name == "tiny"
    assert default_taps(36) == (9, 18, 27)


def test_every_prompt_with_every_seed() -> None:
    assert check(config(), prompt=["a", "b"], seed=[3, 9]).pictures == [(0, 3), (0, 9), (1, 3), (1, 9)]
    assert check(config(), prompt="a", seed=5, num_images_per_prompt=3).seeds == (5, 6, 7)


def test_a_random_seed_differs() -> None:
    assert check(config(), prompt="a").seeds != check(config(), prompt="a").seeds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 1000}, "width is 1000; it must be a multiple of 16: 992 or 1008"),
        ({"width": 0}, "width is 0; it must be a whole number from 64 to 8192"),
        ({"height": -16}, "height is -16; it must be a whole number from 64 to 8192"),
        ({"height": 512.0}, "height is 512.0; it must be a whole number from 64 to 8192"),
        ({"width": 8192, "height": 8192}, "8192 x 8192 are 67108864 pixels; at most 16777216 are possible"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; it must be a whole number from 1 to 1000"),
        ({"num_inference_steps": True}, "num_inference_steps is True; it must be a whole number from 1 to 1000"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; it must be a number from 1 to 100"),
        ({"guidance_scale": -1}, "guidance_scale is -1; it must be a number from 1 to 100"),
        ({"negative_prompt": "blur"}, "negative_prompt needs a guidance_scale over 1, and it is 1; a distilled model"),
        ({"batch_guidance": True}, "batch_guidance needs a guidance_scale over 1, and it is 1"),
        ({"seed": -1}, "from 0 to 18446744073709551615; leave it out for a random one"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be a whole number from 0"),
        ({"seed": []}, "seed is an empty list; it must have one seed or more"),
        ({"seed": [1, 2], "num_images_per_prompt": 2}, "num_images_per_prompt is 2, but 2 seeds are given"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0; it must be a whole number from 1 to 1000"),
        ({"prompt": 3}, "prompt is 3; it must be a string or a list of strings"),
        ({"prompt": []}, "prompt is []; it must be a string or a list of strings"),
        ({"prompt": "a\ud800"}, "prompt has a lone surrogate at character 1; it must be valid Unicode"),
        ({"prompt": "a" * 100_001}, "prompt has 100001 characters; it must have at most 100000"),
        ({"prompt": None}, "neither prompt nor prompt_embeds is given; give one of them"),
        ({"prompt_embeds": mx.zeros((1, 5, 7680))}, "both prompt and prompt_embeds are given; give one of them"),
        ({"sigmas": [0.5, 0.7]}, "sigmas is [0.5, 0.7]; it must be strictly decreasing, with every value in (0, 1]"),
        ({"sigmas": [float("nan")]}, "sigmas is [nan]; it must be strictly decreasing"),
        ({"sigmas": [1.0, 0.5], "num_inference_steps": 4}, "num_inference_steps is 4, but sigmas has 2"),
        ({"output_type": "jpeg"}, "output_type is 'jpeg'; it must be one of pil, np, latent"),
        ({"image": ["x"] * 11}, "11 reference images are given; it must be 1 to 10"),
        ({"max_sequence_length": 0}, "max_sequence_length is 0; it must be a whole number from 1 to 4096"),
        ({"latents": mx.zeros((1, 64, 8, 8))}, "latents has shape (1, 64, 8, 8); it must be an array of shape (1, 128"),
        (
            {"latents": mx.zeros((1, 128, 8, 8)), "width": 256, "height": 128},
            "latents has shape (1, 128, 8, 8); it must be an array of shape (1, 128, 8, 16)",
        ),
    ],
)
def test_what_is_refused_and_how(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        check(config(), **{"prompt": "a fox", **arguments})
    assert "\n" not in str(caught.value)


INIT = {"init_image": "in.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 0.5}, "strength needs an init_image: the picture to start from"),
        ({"mask_image": "m.png"}, "mask_image needs an init_image: the picture to start from"),
        ({"extend": "left=16"}, "extend needs an init_image: the picture to start from"),
        ({"init_reference": False}, "init_reference needs an init_image: the picture to start from"),
        ({**INIT, "invert_mask": True}, "invert_mask needs a mask_image"),
        (
            {**INIT, "padding_mask_crop": 8},
            "padding_mask_crop needs a mask_image: it crops the picture around the mask",
        ),
        ({**INIT, "mask_blur": 8}, "mask_blur needs a mask_image or extend: without them nothing has an edge"),
        ({**INIT, "strength": 0}, "strength is 0; it must be a number over 0 and at most 1"),
        ({**INIT, "strength": 1.01}, "strength is 1.01; it must be a number over 0 and at most 1"),
        ({**INIT, "strength": float("nan")}, "strength is nan; it must be a number over 0 and at most 1"),
        ({**INIT, "strength": "half"}, "strength is 'half'; it must be a number over 0 and at most 1"),
        ({**INIT, "strength": 0.5, "sigmas": [0.5]}, "strength and sigmas both say where to start; give one of them"),
        ({**INIT, "mask_image": "m.png", "mask_blur": -1}, "mask_blur is -1; it must be a whole number from 0 to 256"),
        ({**INIT, "mask_image": "m.png", "invert_mask": 1}, "invert_mask is 1; it must be True or False"),
        ({**INIT, "mask_image": "m.png", "padding_mask_crop": 0.5}, "padding_mask_crop is 0.5; it must be a whole"),
        ({**INIT, "mask_image": "m.png", "padding_mask_crop": 8, "extend": "top=16"}, "does not go with extend"),
        ({**INIT, "extend": "left"}, "extend is 'left'; it must be pixels to add, such as left=256,right=256"),
        ({**INIT, "extend": "up=16"}, "extend is 'up=16'; it must be pixels to add"),
        ({**INIT, "extend": "left=16,left=32"}, "extend is 'left=16,left=32'; it must be pixels to add"),
        ({**INIT, "extend": "left=-16"}, "extend is 'left=-16'; it must be pixels to add"),
        ({**INIT, "extend": "left=0"}, "extend is 'left=0'; it must be pixels to add"),
        ({**INIT, "extend": {"left": 9999}}, "extend's left is 9999; it must be a whole number from 0 to 8192"),
        ({**INIT, "extend": 64}, "extend is 64; it must be pixels to add"),
        ({**INIT, "extend": "top=16", "image": ["x"] * 10}, "11 reference images are given, the init image counted"),
        ({"large_reference": True}, "large_reference needs a single reference, and 0 are given"),
        (
            {"large_reference": True, "init_image": "x", "mask_image": "y"},
            "large_reference is for an image: the init image is a reference as it is painted",
        ),
        ({"large_reference": True, "image": ["x", "y"]}, "large_reference needs a single reference, and 2 are given"),
    ],
)
def test_edits_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        check(config(), **{"prompt": "a fox", **arguments})
    assert "\n" not in str(caught.value)


def test_defaults_of_an_edit() -> None:
    assert check(config(), prompt="a").edit is None
    plain = check(config(), prompt="a", init_image="in.png").edit
    masked = check(config(), prompt="a", init_image="in.png", mask_image="m.png").edit
    assert plain is not None
    assert masked is not None
    assert (plain.strength, plain.init_reference) == (0.6, False)
    assert (masked.strength, masked.init_reference, masked.mask_blur) == (1.0, True, 4)
    wide = check(config(), prompt="a", init_image="in.png", extend=" left = 16 , top=32").edit
    assert wide is not None
    assert wide.margins == (16, 32, 0, 0)
    sized = check(config(), prompt="a", init_image="in.png", extend="640 x 480").edit
    assert sized is not None
    assert sized.extend_to == (640, 480)


def test_the_arguments_of_every_call_are_the_options() -> None:
    """One list: signatures, help and checks come from the fields of `Options`."""
    names = {one.name for one in fields(Options)}
    for call in (KleinPipeline.__call__, KleinPipeline.stream, check):
        parameters = inspect.signature(call).parameters
        assert set(parameters) - {"self", "config"} == names
        assert all(f"\n{name}: " in (call.__doc__ or "") for name in names)
        assert all(one.default == parameters[one.name].default for one in fields(Options))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("widht", "did you mean 'width'?"),
        ("steps", "use num_inference_steps"),
        ("guidance", "use guidance_scale"),
        ("size", "use width=1024, height=768"),
        ("return_dict", "leave it out: the result always has .images"),
    ],
)
def test_unknown_arguments_name_the_call_and_what_to_use(name: str, words: str) -> None:
    with pytest.raises(TypeError, match=re.escape(f"check() has no argument {name!r}; {words}")):
        check(config(), "a", **{name: 1})


def test_an_error_names_flags_on_the_command_line() -> None:
    with pytest.raises(RequestError) as caught:
        check(config(), "{seed}", negative_prompt="{width}")
    names = {"negative_prompt": "--negative", "guidance_scale": "--guidance", "seed": "--seed"}
    assert caught.value.told(names).startswith("--negative needs a --guidance over 1")
    assert RequestError("seed", "{width}", "it is not {seed}").told({"seed": "--seed", "width": "--width"}) == (
        "--seed is '{width}'; it is not --seed"
    )


def test_what_the_limits_allow() -> None:
    check(config(), prompt="", width=64, height=8192, num_inference_steps=1000, seed=2**64 - 1)
    check(config(is_distilled=False), prompt="a", guidance_scale=4, negative_prompt="blur")
    request = check(config(), prompt_embeds=mx.zeros((2, 5, 7680)), seed=1)
    assert request.pictures == [(0, 1), (1, 1)]


def test_what_is_not_followed_is_noted() -> None:
    """An array in another option's place says so; where the negative prompt is text, its options count."""
    own = config()
    noise, embeds = mx.zeros((1, own.transformer.in_channels, 4, 4)), mx.zeros((1, 5, 7680))
    assert check(own, "a", latents=noise, seed=1).notes == ("seed is ignored: latents are the noise",)
    assert check(own, "a", latents=noise, generator=1, rng="mlx").notes == (
        "generator is ignored: latents are the noise",
        "rng is ignored: latents are the noise",
    )
    told = {"max_sequence_length": 5, "literal_prompt": True}
    assert check(own, prompt_embeds=embeds, **told).notes == tuple(
        f"{name} is ignored: prompt_embeds are the text" for name in told
    )
    assert check(config(is_distilled=False), prompt_embeds=embeds, **told).notes == ()
    assert check(own, "a", latents=noise).notes == check(own, prompt_embeds=embeds).notes == ()


def test_guidance_in_one_pass_or_two() -> None:
    base = config(is_distilled=False)
    assert check(base, prompt="a").batch_guidance is None
    assert check(base, prompt="a", batch_guidance=False).batch_guidance is False
    embeds = mx.zeros((1, 5, 7680))
    assert check(base, prompt_embeds=embeds).batch_guidance is False  # the negative prompt has 512 positions
    assert check(base, prompt_embeds=embeds, max_sequence_length=5, batch_guidance=True).batch_guidance is True
    with pytest.raises(RequestError, match="prompt_embeds has 5 positions, max_sequence_length is 512"):
        check(base, prompt_embeds=embeds, batch_guidance=True)


def test_parts_that_do_not_fit_together() -> None:
    with pytest.raises(CheckpointError, match="transformer in_channels is 128, but the other parts need 64"):
        config(vae=VAEConfig((128, 256, 512, 512), 2, 16))
    with pytest.raises(CheckpointError, match="joint_attention_dim is 7680, but the other parts need 5120"):
        config(taps=(9, 18))
    with pytest.raises(CheckpointError, match="layer 37 is tapped"):
        config(taps=(9, 18, 37))


def test_a_config_that_is_not_one() -> None:
    with pytest.raises(CheckpointError, match="x.json: missing .*num_layers.*FLUX.2"):
        TransformerConfig.from_dict({"in_channels": 128}, "x.json")
    with pytest.raises(CheckpointError, match="num_layers is 'five'; it must be of type int, not negative"):
        TransformerConfig.from_dict({"num_layers": "five"})
    good = config().transformer
    assert TransformerConfig.from_dict({**good.to_dict(), "auto_map": "evil.py"}) == good


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (
            "transformer",
            {"axes_dims_rope": (31, 33, 32, 32)},
            "axes_dims_rope is (31, 33, 32, 32); it must be four even",
        ),
        (
            "transformer",
            {"axes_dims_rope": (64, 32, 32)},
            "axes_dims_rope is (64, 32, 32); it must be four even numbers",
        ),
        ("transformer", {"rope_theta": 0.0}, "rope_theta is 0; it must be over 0"),
        ("vae", {"norm_num_groups": 0}, "norm_num_groups is 0; it must divide the VAE's channels"),
        ("vae", {"decoder_block_out_channels": (16, 16, 48, 50)}, "norm_num_groups is 32; it must divide"),
    ],
)
def test_dimensions_that_no_model_has(part: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        config(**{part: replace(getattr(config(), part), **changes)})
