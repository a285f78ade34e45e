"""The pipeline on the embedded checkpoint: what a seed decides, what stays in memory, what a run yields."""

import threading
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from klein_mlx import KleinPipeline, RequestError
from klein_mlx.events import Picture, Step

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def pipe() -> KleinPipeline:
    return KleinPipeline.from_pretrained("tiny", keep="all")


def pixels(image: Any) -> np.ndarray:
    return np.asarray(image)


def test_a_picture(pipe: KleinPipeline) -> None:
    out = pipe(PROMPT, seed=7)
    (image,) = out.images
    assert image.size == (128, 128)
    assert image.mode == "RGB"
    assert out.seeds == [7]
    assert out.notes == []
    assert out.seconds["steps"] > 0


def test_a_seed_decides_the_picture_whatever_ran_before(pipe: KleinPipeline) -> None:
    first = pixels(pipe(PROMPT, seed=7).images[0])
    mx.random.seed(3)
    pipe("a green star", seed=1, width=96, height=160)
    assert np.array_equal(pixels(pipe(PROMPT, seed=7).images[0]), first)
    fresh = KleinPipeline.from_pretrained("tiny")
    assert np.array_equal(pixels(fresh(PROMPT, seed=7).images[0]), first)
    assert not np.array_equal(pixels(pipe(PROMPT, seed=8).images[0]), first)


def test_several_pictures_are_what_each_seed_gives_alone(pipe: KleinPipeline) -> None:
    alone = {seed: pixels(pipe(PROMPT, seed=seed).images[0]) for seed in (5, 6, 9)}
    several = pipe(PROMPT, seed=[9, 5])
    assert several.seeds == [9, 5]
    for seed, image in zip(several.seeds, several.images, strict=True):
        assert np.array_equal(pixels(image), alone[seed])
    counted = pipe([PROMPT, "a green star"], seed=5, num_images_per_prompt=2)
    assert counted.seeds == [5, 6, 5, 6]
    assert np.array_equal(pixels(counted.images[1]), alone[6])
    assert not np.array_equal(pixels(counted.images[2]), alone[5])


@pytest.mark.parametrize("keep", ["all", "transformer", "nothing"])
def test_what_is_kept_changes_no_picture(pipe: KleinPipeline, keep: str) -> None:
    """And only what is kept stays loaded."""
    other = KleinPipeline.from_pretrained("tiny", keep=keep)
    for seed in (7, 8):
        assert np.array_equal(pixels(other(PROMPT, seed=seed).images[0]), pixels(pipe(PROMPT, seed=seed).images[0]))
    left = {"all": {"text_encoder", "transformer", "vae"}, "transformer": {"transformer", "vae"}, "nothing": set()}
    assert set(other.parts.loaded) == left[keep]


def test_the_encoders_weights_are_gone_before_the_first_step() -> None:
    other = KleinPipeline.from_pretrained("tiny", keep="nothing")
    run = other.stream(PROMPT, seed=7)
    next(run)
    assert set(other.parts.loaded) == {"transformer"}
    run.close()


def test_nothing_stays_in_memory_when_nothing_is_kept() -> None:
    other = KleinPipeline.from_pretrained("tiny", keep="nothing")
    other(PROMPT, seed=7)
    mx.clear_cache()
    before = mx.get_active_memory()
    other(PROMPT, seed=8)
    mx.clear_cache()
    assert abs(mx.get_active_memory() - before) < 1e5


def test_the_stream(pipe: KleinPipeline) -> None:
    events = list(pipe.stream(PROMPT, seed=[7, 8], num_inference_steps=3))
    kinds = [type(event) for event in events]
    assert kinds == [Step, Step, Step, Picture] * 2
    steps = [event for event in events if isinstance(event, Step)]
    assert [(s.picture, s.index, s.of) for s in steps] == [(p, i, 3) for p in (0, 1) for i in (1, 2, 3)]
    assert steps[0].sigma > steps[1].sigma > steps[2].sigma == 0.0
    assert steps[0].latents.shape == (1, 8, 8, pipe.config.transformer.in_channels)
    last, picture = steps[-1], events[-1]
    assert isinstance(picture, Picture)
    assert np.array_equal(pixels(last.preview()), pixels(picture.image))
    assert steps[0].preview().size == (128, 128)


def test_a_preview_shows_the_picture_not_the_noise(pipe: KleinPipeline) -> None:
    """After two of four steps the latents are still mostly noise; what the model sees in them is near the end."""
    run = pipe.stream(PROMPT, seed=7)
    previews = [pixels(event.preview()).astype(float) for event in run if isinstance(event, Step)]
    assert np.abs(previews[1] - previews[3]).mean() < 40


def test_closing_a_run_frees_it() -> None:
    other = KleinPipeline.from_pretrained("tiny")
    run = other.stream(PROMPT, seed=7)
    next(run)
    run.close()
    assert list(run) == []
    assert len(other(PROMPT, seed=7).images) == 1


def test_output_types(pipe: KleinPipeline) -> None:
    image = pixels(pipe(PROMPT, seed=7).images[0])
    array = pipe(PROMPT, seed=[7, 8], output_type="np").images
    assert array.shape == (2, 128, 128, 3)
    assert array.dtype == np.float32
    assert np.abs(array[0] * 255 - image).max() <= 0.5 + 1e-3
    latent = pipe(PROMPT, seed=[7, 8], output_type="latent").images
    assert isinstance(latent, mx.array)
    assert latent.shape == (2, pipe.config.vae.latent_channels, 16, 16)


def test_initial_latents_and_embeddings_can_be_given(pipe: KleinPipeline) -> None:
    """Noise in diffusers' order, and the embeddings of an earlier call, give that call's picture."""
    wanted = pixels(pipe(PROMPT, seed=7).images[0])
    channels = pipe.config.transformer.in_channels
    start = mx.random.normal((1, 8, 8, channels), key=mx.random.key(7)).transpose(0, 3, 1, 2)
    for given in (start, np.array(start)):
        assert np.array_equal(pixels(pipe(PROMPT, latents=given).images[0]), wanted)
    embeds = pipe._prompts[(PROMPT, pipe.config.max_sequence_length)]
    assert np.array_equal(pixels(pipe(prompt_embeds=embeds, latents=start).images[0]), wanted)
    with pytest.raises(RequestError, match="for 128 x 128 pixels its last two must be 8, 8"):
        pipe(PROMPT, latents=start[:, :, :4])


def test_a_repeated_prompt_is_not_encoded_again() -> None:
    other = KleinPipeline.from_pretrained("tiny", keep="nothing")
    other(PROMPT, seed=7)
    again = other(PROMPT, seed=8)
    assert again.seconds["encode"] < 0.005


def test_references_and_the_size_they_set(pipe: KleinPipeline) -> None:
    reference = Image.new("RGB", (165, 100), "red")
    out = pipe("change the background to blue", image=reference, seed=7)
    assert out.images[0].size == (160, 96)
    assert out.notes == ["a reference of 165 x 100 is used as 160 x 96"]
    other = pipe("change the background to blue", image=[reference, reference], seed=7, width=128, height=128)
    assert other.images[0].size == (128, 128)
    none = pipe("change the background to blue", seed=7, width=160, height=96)
    assert not np.array_equal(pixels(none.images[0]), pixels(out.images[0]))


def test_what_was_cut_is_told(pipe: KleinPipeline) -> None:
    out = pipe("circle " * 200, seed=1)
    (note,) = out.notes
    assert "tokens over" in note
    assert "were cut" in note


def test_quantized_while_loading(pipe: KleinPipeline) -> None:
    exact = pixels(pipe(PROMPT, seed=7).images[0]).astype(float)
    eight = pixels(KleinPipeline.from_pretrained("tiny", quantize=8)(PROMPT, seed=7).images[0]).astype(float)
    assert 0 < np.abs(eight - exact).mean() < 10


def test_bfloat16_stays_close(pipe: KleinPipeline) -> None:
    half = KleinPipeline.from_pretrained("tiny", dtype="bfloat16")
    run = half.stream(PROMPT, seed=7)
    assert all(e.latents.dtype == mx.bfloat16 for e in run if isinstance(e, Step))
    exact, rounded = (pixels(p(PROMPT, seed=7).images[0]).astype(float) for p in (pipe, half))
    assert np.abs(rounded - exact).mean() < 10


def test_usable_from_a_thread() -> None:
    made: list[np.ndarray] = []

    def work() -> None:
        made.append(pixels(KleinPipeline.from_pretrained("tiny")(PROMPT, seed=7).images[0]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert np.array_equal(made[0], pixels(KleinPipeline.from_pretrained("tiny")(PROMPT, seed=7).images[0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float8"}, "dtype is 'float8'; it must be one of bfloat16, float16, float32"),
        ({"keep": "most"}, "keep is 'most'; it must be one of all, transformer, nothing"),
        ({"quantize": 5}, "quantize is 5; it must be 4, 8 or none"),
    ],
)
def test_options_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        KleinPipeline.from_pretrained("tiny", **arguments)
