"""The pipeline on the embedded checkpoint: what a seed decides, what stays in memory, what a run yields."""

import gc
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from klein_mlx import KleinPipeline, RequestError
from klein_mlx.runtime import encodings
from klein_mlx.runtime.run import Picture, Step
from klein_mlx.weights.checkpoint import part_bytes

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


def test_memory_by_phases() -> None:
    """With nothing kept, each phase holds its own part's weights and little else; in the end nothing is left.

    What is beside weights at this size: embeddings, rotary tables, latents, under 3 MB together.
    """
    other = KleinPipeline.from_pretrained("tiny", keep="nothing")
    sizes = {part: part_bytes(part, other.source, other.dtype) for part in ("text_encoder", "transformer", "vae")}
    gc.collect()
    mx.clear_cache()
    start = mx.get_active_memory()
    run = other.stream(PROMPT, seed=7)
    first = next(run)
    assert isinstance(first, Step)
    assert set(other.parts.loaded) == {"transformer"}
    assert abs(mx.get_active_memory() - start - sizes["transformer"]) < 3e6
    for event in run:
        if isinstance(event, Picture):
            assert mx.get_active_memory() - start < sizes["vae"] + 3e6
    del run, first, event
    gc.collect()
    assert mx.get_active_memory() - start < 1e6, "the embeddings of one prompt are all that is remembered"


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


def test_a_preview_works_after_its_run_was_closed() -> None:
    """And leaves nothing in memory that was not to be kept."""
    pipe = KleinPipeline.from_pretrained("tiny", keep="nothing")
    run = pipe.stream(PROMPT, seed=7)
    step = next(run)
    assert isinstance(step, Step)
    before = pixels(step.preview())
    run.close()
    assert np.array_equal(pixels(step.preview()), before)
    assert not pipe.parts.loaded


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
    embeds = pipe.encodings.prompts[(PROMPT, pipe.config.max_sequence_length, False)]
    assert np.array_equal(pixels(pipe(prompt_embeds=embeds, latents=start).images[0]), wanted)
    with pytest.raises(RequestError, match="for 128 x 128 pixels its last two must be 8, 8"):
        pipe(PROMPT, latents=start[:, :, :4])


def test_a_repeated_prompt_loads_no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    other = KleinPipeline.from_pretrained("tiny", keep="nothing")
    loads: list[str] = []
    load = other.parts._load
    monkeypatch.setattr(other.parts, "_load", lambda name: loads.append(name) or load(name))
    for seed in (7, 8):
        other(PROMPT, seed=seed, num_inference_steps=1)
    assert loads == ["text_encoder", "transformer", "vae", "transformer", "vae"]


def test_previews_can_be_drawn_in_another_thread() -> None:
    """As a window does while the steps run in a worker: lazy arrays belong to the thread that made them."""
    steps: list[Step] = []

    def work() -> None:
        pipe = KleinPipeline.from_pretrained("tiny", keep="all")
        steps.extend(e for e in pipe.stream(PROMPT, seed=1, num_inference_steps=2) if isinstance(e, Step))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert [step.preview().size for step in steps] == [(128, 128)] * 2
    assert all(step.sketch() is not None for step in steps)


def test_a_gpu_that_gives_up_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX raises it wherever it notices; the files are not to blame. Any other RuntimeError is a bug, and stays one."""
    words = "[METAL] Command buffer execution failed: Insufficient Memory"

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(words)

    fresh = KleinPipeline.from_pretrained("tiny", keep="nothing")
    with monkeypatch.context() as patch:
        patch.setattr("klein_mlx.runtime.parts.read_weights", fail)
        with pytest.raises(RequestError, match=r"the GPU failed .*Insufficient Memory.*--keep nothing"):
            fresh(PROMPT)
    monkeypatch.setattr("klein_mlx.pipeline.decode", fail)
    with pytest.raises(RequestError, match="the GPU failed"):
        fresh(PROMPT)
    words = "something else"
    with pytest.raises(RuntimeError, match="something else"):
        fresh(PROMPT)


def test_a_changed_prompt_keeps_the_references_latents(pipe: KleinPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a changed seed keeps both: nothing is encoded twice."""
    calls: list[str] = []
    for name in ("encode_prompt", "encode_reference"):
        real = getattr(encodings, name)

        def counted(*args: Any, real: Any = real, name: str = name) -> mx.array:
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(encodings, name, counted)
    asked: dict[str, Any] = {"image": Image.new("RGB", (80, 64), "teal"), "num_inference_steps": 1}
    found = []
    for prompt, seed in (("one prompt", 1), ("one prompt", 2), ("another prompt", 1)):
        pipe(prompt, seed=seed, **asked)
        found.append(sorted(calls))
        calls.clear()
    assert found == [["encode_prompt", "encode_reference"], [], ["encode_prompt"]]


def test_references_and_the_size_they_set(pipe: KleinPipeline) -> None:
    reference = Image.new("RGB", (165, 100), "red")
    out = pipe("change the background to blue", image=reference, seed=7)
    assert out.images[0].size == (160, 96)
    assert out.notes == ["a reference of 165 x 100 is used as 160 x 96"]
    other = pipe("change the background to blue", image=[reference, reference], seed=7, width=128, height=128)
    assert other.images[0].size == (128, 128)
    none = pipe("change the background to blue", seed=7, width=160, height=96)
    assert not np.array_equal(pixels(none.images[0]), pixels(out.images[0]))


def test_a_reference_is_encoded_once(tmp_path: Path) -> None:
    """Kept between calls by its content, whatever its name and wherever it stands; another size is another."""
    other = KleinPipeline.from_pretrained("tiny", keep="all")
    image = noise_picture(96, 64)
    for name in ("a.png", "b.png"):
        image.save(tmp_path / name)

    def call(*references: Any) -> None:
        other(PROMPT, image=list(references), width=64, height=64, num_inference_steps=1, seed=7)

    call(image)
    (first,) = other.encodings.references.values()
    call(tmp_path / "a.png", tmp_path / "b.png", image.copy())
    assert list(other.encodings.references.values()) == [first]
    call(image.crop((0, 0, 64, 64)))
    assert len(other.encodings.references) == 2


def test_a_large_reference(pipe: KleinPipeline) -> None:
    """Up to 1 megapixel, or with the option, for one alone, up to 4; the size follows."""
    for large, size in ((False, (1168, 880)), (True, (1600, 1216))):
        run = pipe.stream(PROMPT, image=Image.new("RGB", (1600, 1220)), large_reference=large)
        assert run.notes == [f"a reference of 1600 x 1220 is used as {size[0]} x {size[1]}"]


def test_what_was_cut_is_told(pipe: KleinPipeline) -> None:
    out = pipe("circle " * 200, seed=1)
    (note,) = out.notes
    assert "tokens over" in note
    assert "were cut" in note


def test_what_other_programs_read_out_of_a_prompt_is_told(pipe: KleinPipeline) -> None:
    small = {"seed": 1, "width": 64, "height": 64, "num_inference_steps": 1}
    lora, weight = pipe("<lora:style:0.8> a (red:1.3) fox", **small).notes
    assert lora.endswith("<lora:style:0.8> is plain text here; a LoRA is given as --lora FILE:SCALE")
    assert weight.endswith("(red:1.3) is plain text here; words have no weights")
    assert pipe("a clock (at 10:30), a <circle>", **small).notes == []


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
        ({"quantize": 7}, "quantize is 7; it must be 3, 4, 5, 6, 8"),
    ],
)
def test_options_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        KleinPipeline.from_pretrained("tiny", **arguments)


def test_guidance_in_one_pass_or_one_after_the_other() -> None:
    """The same numbers to rounding; and both differ from no guidance, and by the negative prompt."""
    base = KleinPipeline.from_pretrained("tiny", keep="all")
    base.config = replace(base.config, is_distilled=False, variant_name=None)

    def latents(**arguments: Any) -> np.ndarray:
        asked: dict[str, Any] = {"width": 64, "height": 64, "seed": 7, "num_inference_steps": 2, **arguments}
        return np.array(base(PROMPT, output_type="latent", image=noise_picture(64, 64), **asked).images)

    together = latents(guidance_scale=3.0, batch_guidance=True)
    apart = latents(guidance_scale=3.0, batch_guidance=False)
    assert np.abs(together - apart).max() <= 1e-4 * np.abs(apart).max()  # float32, a few hundred operations
    assert np.array_equal(latents(guidance_scale=3.0), together)
    assert np.abs(latents(guidance_scale=1.0) - apart).max() > 1e-2
    assert np.abs(latents(guidance_scale=3.0, negative_prompt="a green star") - apart).max() > 1e-2


def noise_picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(2).integers(0, 256, (height, width, 3)).astype(np.uint8))


def test_an_init_image_and_its_strength(pipe: KleinPipeline) -> None:
    """All steps are run; with little strength the picture stays close to the one it starts from."""
    image = Image.new("RGB", (96, 64), "red")
    anew = pixels(pipe(PROMPT, width=96, height=64, seed=7).images[0]).astype(float)
    distances = []
    for strength in (0.02, 0.5, 1.0):
        run = pipe.stream(PROMPT, init_image=image, strength=strength, seed=7, num_inference_steps=2)
        events = list(run)
        assert [type(event) for event in events] == [Step, Step, Picture]
        out = pixels(events[-1].image).astype(float)  # type: ignore[union-attr]
        assert out.shape == (64, 96, 3)
        distances.append(np.abs(out - pixels(image)).mean())
    assert distances[0] < 0.5 * min(distances[1:])
    full = pixels(pipe(PROMPT, init_image=image, strength=1.0, seed=7).images[0]).astype(float)
    assert np.array_equal(full, anew)


def test_inpainting_keeps_what_is_outside(pipe: KleinPipeline) -> None:
    image, mask = noise_picture(100, 70), np.zeros((70, 100), np.uint8)
    mask[20:60, 30:80] = 255
    for arguments in ({}, {"padding_mask_crop": 6}, {"output_type": "np"}, {"width": 64, "height": 64}):
        out = pipe(
            PROMPT, init_image=image, mask_image=Image.fromarray(mask), seed=7, num_inference_steps=1, **arguments
        )
        painted = pixels(out.images[0])
        painted = painted if painted.dtype == np.uint8 else np.rint(painted * 255).astype(np.uint8)
        assert np.array_equal(painted[mask == 0], pixels(image)[mask == 0])
        assert np.abs(painted[30:50, 40:70].astype(int) - pixels(image)[30:50, 40:70]).mean() > 5


def test_inpainting_sees_the_references_it_is_given(pipe: KleinPipeline) -> None:
    image, mask = noise_picture(96, 64), Image.new("L", (96, 64), 255)

    def painted(**arguments: Any) -> np.ndarray:
        return pixels(
            pipe(PROMPT, init_image=image, mask_image=mask, seed=7, num_inference_steps=1, **arguments).images[0]
        )

    alone = painted(init_reference=False)
    assert not np.array_equal(alone, painted())
    assert np.array_equal(painted(init_reference=True), painted())  # as in diffusers' inpainting pipeline
    assert not np.array_equal(painted(), painted(image=Image.new("RGB", (64, 64), "blue")))
    shown = pixels(pipe(PROMPT, image=image, seed=7, num_inference_steps=1).images[0])
    assert np.array_equal(painted(mask_blur=0), shown)  # an all white mask: a picture from a reference


def test_outpainting(pipe: KleinPipeline) -> None:
    image = noise_picture(80, 64)
    run = pipe.stream("a red circle", init_image=image, extend="left=32,bottom=16", seed=7, num_inference_steps=2)
    events = list(run)
    picture = events[-1]
    assert isinstance(picture, Picture)
    assert picture.image.size == (112, 80)
    assert np.array_equal(pixels(picture.image)[:64, 32:], pixels(image))
    step = events[-2]
    assert isinstance(step, Step)
    assert np.array_equal(pixels(step.preview()), pixels(picture.image))


def test_an_edit_in_bfloat16_stays_there() -> None:
    half = KleinPipeline.from_pretrained("tiny", dtype="bfloat16")
    mask = Image.new("L", (64, 64), 255)
    run = half.stream(PROMPT, init_image=noise_picture(64, 64), mask_image=mask, strength=0.5, num_inference_steps=1)
    assert all(e.latents.dtype == mx.bfloat16 for e in run if isinstance(e, Step))


def test_mistakes_with_files_are_told_before_any_work(pipe: KleinPipeline) -> None:
    image = Image.new("RGB", (96, 64))
    with pytest.raises(RequestError, match="init_image none.png does not exist"):
        pipe.stream(PROMPT, init_image="none.png")
    with pytest.raises(RequestError, match="mask_image none.png does not exist"):
        pipe.stream(PROMPT, init_image=image, mask_image="none.png")
    with pytest.raises(RequestError, match="mask_image is 64 x 96, but the init image is 96 x 64"):
        pipe.stream(PROMPT, init_image=image, mask_image=Image.new("L", (64, 96), 255))


def test_a_distilled_model_ignores_guidance_with_a_note() -> None:
    """As diffusers does: its weights have the guidance built in."""
    pipe = KleinPipeline.from_pretrained("tiny", keep="all")
    size = {"seed": 1, "width": 64, "height": 64, "num_inference_steps": 1, "output_type": "np"}
    plain, asked = pipe("a star", **size), pipe("a star", guidance_scale=4.0, **size)
    assert np.array_equal(plain.images, asked.images)
    assert asked.notes == ["guidance 4 is ignored: tiny is distilled, guidance is built into its weights"]
    assert asked.recipes[0]["guidance"] == 1.0
    assert not plain.notes
