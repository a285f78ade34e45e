"""FLUX.2 [dev] against diffusers' Flux2Pipeline, on random weights of two sizes, in float32 on the CPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from golden import cases, oracle, port
from PIL import Image

from klein_mlx.model.sampler import latents_to_tokens
from klein_mlx.runtime.run import Step
from klein_mlx.weights.checkpoint import read_tokenizer

pytestmark = pytest.mark.parity

EMBEDS, BLOCKS, VELOCITY, LATENTS = 1e-4, 1e-4, 1e-4, 5e-4
GUIDANCE, SIGMA = 2.5, 0.7314
LENGTH = 128  # of which the system message takes most
PROMPTS = (
    *cases.PROMPTS,
    "",
    " ",
    "\n",
    "a  red\t fox \n\n in THE Snow",
    "iPhone 15 Pro, 4096x2160, 3.14159, 007",
    "don't, we'll, IT'S, O'Neill's",
    "一只红色的狐狸在雪地里，日本語のテキスト、한국어",
    "🦊🦊 👩\u200d👩\u200d👧 é e\u0301 ﬁ Ω Ⅷ ½",
    "Привет, мир! Ünïcödé ŞIŞ ǅ",
    "مرحبا بالعالم שלום नमस्ते ไทย",
    "a/b//c http://x.y/z?q=1&r=2#t",
    "{prompt} {{ braces }} {% raw %}",
    "[INST] inside [/INST] and </s> or <s>",
    "[IMG]a picture[IMG] of [IMG_BREAK] it",
    "<pad><unk>[SYSTEM_PROMPT]x[/SYSTEM_PROMPT]",
    "word " * 600,
    "狐" * 700,
    *(f"{'very ' * n}long, number {n * 37}" for n in range(0, 60, 2)),
)


@pytest.fixture(scope="module")
def reference() -> Any:
    return oracle.import_reference()


class Both:
    """One model, both implementations."""

    def __init__(self, name: str, folder: Path):
        import torch
        from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

        self.name, self.folder, self.port = name, folder, port.Port(folder)
        self.pipe = Flux2Pipeline.from_pretrained(str(folder), dtype=torch.float32)
        self.pipe.set_progress_bar_config(disable=True)
        self.taps = self.port.config.taps
        self.pipe.text_encoder.register_forward_pre_hook(self._keep, with_kwargs=True)
        self.seen: dict[str, Any] = {}

    def _keep(self, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.seen = kwargs

    def embeds(self, prompts: tuple[str, ...], length: int) -> np.ndarray:
        return self.pipe.encode_prompt(
            list(prompts), max_sequence_length=length, text_encoder_out_layers=self.taps
        )[0].detach().numpy()  # fmt: skip


@pytest.fixture(scope="module", params=["tiny", "medium"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, reference: Any) -> Iterator[Both]:
    import random_models

    folder = tmp_path_factory.mktemp(request.param)
    regex = random_models.TEKKEN_REGEX if request.param == "tiny" else random_models.CONVERTED_REGEX
    random_models.make_dev(folder, getattr(random_models, request.param.upper()), regex=regex)
    with mx.stream(mx.cpu):
        yield Both(request.param, folder)


def test_token_ids(both: Both) -> None:
    """Padding side, cut and template, as the pipeline asks its processor for them."""
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input

    assert len(PROMPTS) >= 50
    encoder = both.port.config.text_encoder
    ours = read_tokenizer(both.port.source.tokenizer_file, encoder.vocab_size, encoder.model_type)
    for length in (LENGTH, 512):
        wanted = both.pipe.tokenizer.apply_chat_template(
            format_input(list(PROMPTS)),
            add_generation_prompt=False,
            tokenize=True,
            return_dict=True,
            return_tensors="np",
            padding="max_length",
            truncation=True,
            max_length=length,
        )
        tokens = ours(list(PROMPTS), length)
        np.testing.assert_array_equal(np.array(tokens.input_ids), wanted["input_ids"])
        np.testing.assert_array_equal(np.array(tokens.attention_mask), wanted["attention_mask"])
        assert max(tokens.cut) > 0


def test_embeddings(both: Both) -> None:
    for prompts, length in ((PROMPTS[:5], LENGTH), ((PROMPTS[0], "狐" * 700), 512)):
        wanted = both.embeds(prompts, length)
        encoder = both.port.config.text_encoder
        tokenizer = read_tokenizer(both.port.source.tokenizer_file, encoder.vocab_size, encoder.model_type)
        tokens = tokenizer(list(prompts), length)
        np.testing.assert_array_equal(np.array(tokens.input_ids), both.seen["input_ids"].numpy())
        ours = both.port.part("text_encoder")(tokens.input_ids, tokens.attention_mask)
        assert _report(both, f"embeddings of {length}", port.to_numpy(ours), wanted) <= EMBEDS


@pytest.mark.parametrize("grids", [(), cases.REFERENCE_GRIDS], ids=["plain", "references"])
def test_every_block(both: Both, reference: Any, grids: tuple[tuple[int, int], ...]) -> None:
    import torch

    channels = both.pipe.transformer.config.in_channels
    noise = torch.from_numpy(cases.normal((1, channels, *cases.GRID), seed=11))
    tokens, ids = both.pipe._pack_latents(noise), both.pipe._prepare_latent_ids(noise)
    if grids:
        refs = [torch.from_numpy(cases.normal((1, channels, *g), seed=12 + i)) for i, g in enumerate(grids)]
        tokens = torch.cat([tokens, *(both.pipe._pack_latents(r) for r in refs)], dim=1)
        ids = torch.cat([ids, both.pipe._prepare_image_ids(refs)], dim=1)
    embeds = torch.from_numpy(both.embeds(PROMPTS[:1], LENGTH))
    with torch.no_grad():
        wanted = reference._run_transformer(both.pipe, "x", tokens, ids, embeds, SIGMA, guidance=GUIDANCE)
    wanted = {key.removeprefix("x."): value for key, value in wanted.items()}
    num_img = cases.GRID[0] * cases.GRID[1]
    ours = port.transformer(both.port, wanted, num_img, GUIDANCE)
    wanted["velocity"] = wanted["velocity"][:, :num_img]
    for key, value in ours.items():
        assert _report(both, key, value, wanted[key]) <= (VELOCITY if key == "velocity" else BLOCKS)
    other = port.transformer(both.port, wanted, num_img, 4.0)["velocity"]
    assert port.error(other, wanted["velocity"]) > 10 * VELOCITY  # guidance matters


@pytest.mark.parametrize("count", [0, 1, 2])
def test_latents_after_four_steps(both: Both, count: int) -> None:
    import torch

    height, width = 64, 96
    pictures = [Image.fromarray(cases.picture(64, 64 + 16 * i, 5 + i)) for i in range(count)]
    noise = cases.normal((1, both.pipe.transformer.config.in_channels, height // 16, width // 16), seed=3)
    kept: list[Any] = []

    def keep(_pipe: Any, _step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        kept.append(kwargs["latents"])
        return kwargs

    theirs: Any = both.pipe(
        image=pictures or None,
        prompt=PROMPTS[0],
        height=height,
        width=width,
        num_inference_steps=4,
        guidance_scale=GUIDANCE,
        latents=torch.from_numpy(noise),
        max_sequence_length=LENGTH,
        text_encoder_out_layers=both.taps,
        callback_on_step_end=keep,
    )
    events = list(
        both.port.pipeline.stream(
            PROMPTS[0],
            image=pictures or None,
            height=height,
            width=width,
            num_inference_steps=4,
            guidance_scale=GUIDANCE,
            latents=noise,
            max_sequence_length=LENGTH,
        )
    )
    ours = port.to_numpy(latents_to_tokens([e for e in events if isinstance(e, Step)][-1].latents))
    assert _report(both, f"latents, {count} references", ours, kept[-1].numpy()) <= LATENTS
    picture: Any = events[-1]
    difference = np.asarray(picture.image).astype(int) - np.asarray(theirs.images[0])
    assert np.abs(difference).max() <= 1


def _report(both: Both, what: str, ours: np.ndarray, wanted: np.ndarray) -> float:
    """The error, printed too (pytest -rP shows it)."""
    error = port.error(ours, wanted)
    print(f"{both.name} {what}: {error:.1e}")
    return error
