"""The one place that checks what a user asks: what passes, and the words of what does not."""

import re
from typing import Any

import mlx.core as mx
import pytest

from klein_mlx.config import ModelConfig, TextEncoderConfig, TransformerConfig, VAEConfig, default_taps
from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.request import check


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
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; it must be a number from 0 to 100"),
        ({"guidance_scale": -1}, "guidance_scale is -1; it must be a number from 0 to 100"),
        ({"guidance_scale": 4.0}, "guidance_scale is 4, but 4b is distilled: guidance is built into its weights"),
        ({"negative_prompt": "blur"}, "negative_prompt needs a guidance_scale over 1, and it is 1; a distilled model"),
        ({"seed": -1}, "seed is -1; it must be a whole number from 0 to 18446744073709551615"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be a whole number from 0"),
        ({"seed": []}, "seed is an empty list; it must have one seed or more"),
        ({"seed": [1, 2], "num_images_per_prompt": 2}, "num_images_per_prompt is 2, but 2 seeds are given"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0; it must be a whole number from 1 to 1000"),
        ({"prompt": 3}, "prompt is 3; it must be a string or a list of strings"),
        ({"prompt": []}, "prompt is []; it must be a string or a list of strings"),
        ({"prompt": "a\ud800"}, "prompt has a lone surrogate at character 1; it must be valid Unicode"),
        ({"prompt": "a" * 100_001}, "prompt has 100001 characters; it must have at most 100000"),
        ({"prompt": None}, "neither of prompt and prompt_embeds is given; give one of them"),
        ({"prompt_embeds": mx.zeros((1, 5, 7680))}, "both of prompt and prompt_embeds is given; give one of them"),
        ({"sigmas": [0.5, 0.7]}, "sigmas is [0.5, 0.7]; it must fall strictly, with every value in (0, 1]"),
        ({"sigmas": [float("nan")]}, "sigmas is [nan]; it must fall strictly"),
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


def test_what_the_limits_allow() -> None:
    check(config(), prompt="", width=64, height=8192, num_inference_steps=1000, seed=2**64 - 1)
    check(config(is_distilled=False), prompt="a", guidance_scale=4, negative_prompt="blur")
    request = check(config(), prompt_embeds=mx.zeros((2, 5, 7680)), seed=1)
    assert request.pictures == [(0, 1), (1, 1)]


def test_parts_that_do_not_fit_together() -> None:
    with pytest.raises(CheckpointError, match="transformer in_channels is 128, but the other parts need 64"):
        config(vae=VAEConfig((128, 256, 512, 512), 2, 16))
    with pytest.raises(CheckpointError, match="joint_attention_dim is 7680, but the other parts need 5120"):
        config(taps=(9, 18))
    with pytest.raises(CheckpointError, match="layer 36 is tapped"):
        config(taps=(9, 18, 36))


def test_a_config_that_is_not_one() -> None:
    with pytest.raises(CheckpointError, match="x.json: missing .*num_layers.*FLUX.2"):
        TransformerConfig.from_dict({"in_channels": 128}, "x.json")
    with pytest.raises(CheckpointError, match="num_layers is 'five'; it must be a int"):
        TransformerConfig.from_dict({"num_layers": "five"})
    good = config().transformer
    assert TransformerConfig.from_dict({**good.to_dict(), "auto_map": "evil.py"}) == good
