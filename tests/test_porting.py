"""What a script written for diffusers finds: its names answered, its callback called, its seeds drawn as there."""

import copy
import logging
import pickle
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.images.saving import read_metadata
from klein_mlx.model.sampler import torch_noise
from klein_mlx.pipeline import KleinPipeline

SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe() -> KleinPipeline:
    return KleinPipeline.from_pretrained("tiny", dtype="float32", keep="all")


def same(a: Any, b: Any) -> bool:
    return bool(mx.array_equal(a, b))


def test_a_generator_is_the_noise_of_torch(pipe: KleinPipeline) -> None:
    """An int, anything with an initial seed, rng="torch" and the noise itself as latents: one picture."""
    latents = torch_noise(7, (1, 64, 4, 4))
    wanted = pipe("a star", latents=latents, **SMALL).images
    stand_in = SimpleNamespace(initial_seed=lambda: 7, device=SimpleNamespace(type="cpu"))
    assert same(pipe("a star", generator=7, **SMALL).images, wanted)
    assert same(pipe("a star", generator=stand_in, **SMALL).images, wanted)
    assert same(pipe("a star", seed=7, rng="torch", **SMALL).images, wanted)
    assert not same(pipe("a star", seed=7, **SMALL).images, wanted)
    both = pipe("a star", generator=[8, 7], **SMALL)
    assert (both.seeds, same(both.images[1:], wanted)) == ([8, 7], True)
    several = pipe(["a circle", "a star"], generator=[8, 9, 5, 7], num_images_per_prompt=2, **SMALL)
    assert (several.seeds, same(several.images[3:], wanted)) == ([8, 9, 5, 7], True)
    assert same(several.images[1:2], pipe("a circle", generator=9, **SMALL).images)


def test_one_generator_draws_several_pictures_in_a_row(pipe: KleinPipeline) -> None:
    wanted = pipe("a star", latents=torch_noise(7, (2, 64, 4, 4)), num_images_per_prompt=2, **SMALL)
    several = pipe("a star", generator=7, num_images_per_prompt=2, **SMALL)
    assert same(several.images, wanted.images)
    assert several.recipes[0]["given"] == ["generator"]  # no seed says this noise


def test_the_first_values_of_torchs_generator() -> None:
    """torch.randn(16, generator=torch.Generator().manual_seed(0))[:4], of torch 2.13 on x86."""
    assert np.array(torch_noise(0, (16,)))[:4].tolist() == FIRST


FIRST = [-1.1258398294448853, -1.152360200881958, -0.2505785822868347, -0.4338788092136383]


def test_generators_that_are_refused(pipe: KleinPipeline) -> None:
    gpu = SimpleNamespace(initial_seed=lambda: 7, device=SimpleNamespace(type="cuda"))
    for arguments, words in (
        ({"generator": 7, "seed": 7}, "generator and seed both say which noise"),
        ({"generator": "7"}, "generator is '7'; it must be a torch.Generator, a whole number"),
        ({"generator": gpu}, "it must be of the CPU"),
        ({"generator": [1, 2, 3], "num_images_per_prompt": 2}, "generator has 3 entries for 2 pictures"),
        ({"generator": []}, "generator has 0 entries for 1 pictures"),
        ({"callback_on_step_end": 3}, "callback_on_step_end is 3; it must be a function"),
        ({"rng": "numpy"}, "rng is 'numpy'; it must be one of mlx, torch"),
    ):
        with pytest.raises(RequestError, match=words):
            pipe("a star", **arguments)


def test_the_callback_sees_and_changes_latents(pipe: KleinPipeline) -> None:
    told: list[tuple[int, float]] = []

    def see(own: KleinPipeline, step: int, t: float, kwargs: dict[str, Any]) -> dict[str, Any]:
        assert own is pipe
        assert kwargs["latents"].shape == (1, 16, 64)
        told.append((step, t))
        return kwargs

    def clear(own: KleinPipeline, step: int, t: float, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"latents": kwargs["latents"] * 0}

    plain = pipe("a star", seed=1, **SMALL).images
    assert same(pipe("a star", seed=1, callback_on_step_end=see, **SMALL).images, plain)
    assert [step for step, _ in told] == [0, 1]
    assert told[0][1] == 1000
    assert not same(pipe("a star", seed=1, callback_on_step_end=clear, **SMALL).images, plain)
    with pytest.raises(RequestError, match="callback_on_step_end returned 0; it must return a dict or None"):
        pipe("a star", seed=1, callback_on_step_end=lambda *_: 0, **SMALL)
    with pytest.raises(RequestError, match="returned 'prompt_embeds'; only latents can be replaced"):
        pipe("a star", seed=1, callback_on_step_end=lambda *_: {"prompt_embeds": 0}, **SMALL)


def test_names_of_diffusers_are_answered(pipe: KleinPipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "klein_mlx"):
        assert getattr(pipe, "to")("mps") is pipe  # noqa: B009
        assert getattr(pipe, "enable_model_cpu_offload")() is pipe  # noqa: B009
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "pipe.to() does nothing",
        "pipe.enable_model_cpu_offload() does nothing",
    ]
    vae = getattr(pipe, "vae")  # noqa: B009
    for own in (vae, copy.copy(vae), pickle.loads(pickle.dumps(vae))):
        assert own.enable_tiling() is own
    with pytest.raises(AttributeError, match=r"pipe.vae.decoder cannot be set; components are .*\(model, vae=...\)"):
        vae.decoder = 1
    with pytest.raises(AttributeError, match=r"no attribute 'disable_adapters'; use pipe.set_lora_scale\(name, 0\)"):
        vae.disable_adapters()
    for name, words in (
        ("load_lora_weights", "use load_lora"),
        ("set_adapters", "use set_lora_scale"),
        ("disable_lora", "use set_lora_scale"),
        ("disable_adapters", "use pipe.set_lora_scale"),
    ):
        with pytest.raises(AttributeError, match=words):
            getattr(pipe, name)
    with pytest.raises(AttributeError, match="did you mean 'load_lora'"):
        getattr(pipe, "load_loras")  # noqa: B009
    for arguments, words in (({"torch_dtype": "x"}, 'use dtype="bfloat16"'), ({"device_map": 1}, "leave it out")):
        with pytest.raises(TypeError, match=f"from_pretrained.. has no argument .*{words}"):
            KleinPipeline.from_pretrained("tiny", **arguments)
    for call, name, words in (
        (pipe, "bits", "use quantize=4 in KleinPipeline.from_pretrained"),
        (pipe, "dtype", "it belongs in KleinPipeline.from_pretrained"),
        (pipe, "lora_scale", "use scale in pipe.load_lora"),
        (pipe.load_lora, "lora_scale", "use scale$"),
        (KleinPipeline.from_pretrained, "steps", r"use num_inference_steps in the call, pipe\(...\)"),
    ):
        with pytest.raises(TypeError, match=f"has no argument '{name}'; {words}"):
            call("tiny", **{name: 1})
    for model in (None, 3, ""):
        with pytest.raises(CheckpointError, match="model is .*; it must name a model, a file or a folder"):
            KleinPipeline.from_pretrained(model)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="use from_pretrained"):
        getattr(KleinPipeline, "from_single_file")  # noqa: B009
    with pytest.raises(AttributeError, match="use pipe.stream"):
        setattr(pipe, "_interrupt", True)  # noqa: B010
    with pytest.raises(AttributeError, match="vae cannot be set"):
        setattr(pipe, "vae", 1)  # noqa: B010
    with pytest.raises(TypeError, match="use KleinPipeline.from_pretrained\\('tiny'\\)"):
        KleinPipeline("tiny")  # type: ignore[arg-type]
    assert repr(pipe) == "KleinPipeline(tiny, unquantized, float32, keep='all', loras=0)"


def test_arrays_in_and_a_recipe_out(pipe: KleinPipeline, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A numpy array is the picture of the same pixels; what is saved keeps the recipe; a notebook gets a PNG."""
    array = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    small = {**SMALL, "output_type": "pil", "seed": 1}
    output = pipe("a star", image=array, progress=True, **small)
    assert "2/2" in capsys.readouterr().err
    assert output.images[0].tobytes() == pipe("a star", image=Image.fromarray(array), **small).images[0].tobytes()
    floats = pipe("a star", image=array.astype(np.float32) / 255, **small)
    assert floats.images[0].tobytes() == output.images[0].tobytes()
    output.save(tmp_path / "x.png")
    assert read_metadata(tmp_path / "x.png").recipe == output.recipes[0]
    assert output[0] is output.images
    assert set(output._repr_mimebundle_()) == {"text/plain", "image/png"}
    with pytest.raises(RequestError, match=r"image is an array of shape \(3, 64, 64\)"):
        pipe("a star", image=array.transpose(2, 0, 1), **small)
