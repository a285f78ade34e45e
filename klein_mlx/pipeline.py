"""KleinPipeline: the memory plan, the stream of steps, the call.

One way for everything: `stream` runs a request and yields a Step after each denoising step and a Picture after each
picture; the call, the command line and whatever else is built sit on it. The encoder is freed once the prompt's
embeddings are evaluated, the transformer before the pictures are decoded, unless `keep` says otherwise.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import mlx.core as mx
from PIL import Image

from klein_mlx import images
from klein_mlx.checkpoint import Source
from klein_mlx.conditioning import References, encode_prompt, encode_reference, join_references
from klein_mlx.config import PARTS, ModelConfig
from klein_mlx.errors import RequestError
from klein_mlx.events import KleinOutput, Picture, Run, Step
from klein_mlx.latents import from_channels_first, noise, to_channels_first, unpatchify
from klein_mlx.parts import Parts, compute_dtype
from klein_mlx.quantize import parse
from klein_mlx.request import check, check_side
from klein_mlx.sampler import Predict, euler_steps, make_sigmas, with_cfg
from klein_mlx.tokenizer import Tokenizer
from klein_mlx.velocity import Tracked, velocity

if TYPE_CHECKING:
    import numpy as np

REMEMBERED = 32  # prompts, and references, whose encodings are kept


class KleinPipeline:
    """FLUX.2 [klein], ready to make and edit pictures.

    Weights are read when a part is first needed. Use from one thread at a time.
    """

    def __init__(
        self,
        source: Source,
        *,
        quantize: int | str | None = None,
        dtype: mx.Dtype | str | None = None,
        keep: str | None = None,
    ):
        """source: an opened model (klein_mlx.convert.open_model). The rest as in `from_pretrained`."""
        self.source = source
        self.config: ModelConfig = source.config
        self.dtype = compute_dtype(dtype)
        self.parts = Parts(source, self.dtype, parse(quantize), keep)
        self._prompts: dict[Any, mx.array] = {}
        self._references: dict[Any, mx.array] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        quantize: int | str | None = None,
        dtype: mx.Dtype | str | None = None,
        keep: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Open a model; its weights are read later, when they are needed.

        model: a hub id, a folder (ours, or in diffusers' layout), or "tiny", the embedded checkpoint.
        quantize: None, 4 or 8 bits, for weights that are not quantised yet.
        dtype: of the computation, an mlx dtype or its name; by default bfloat16 on a GPU, float32 on a CPU.
        keep: what stays in memory between calls: "all", "transformer" or "nothing"; by default as the machine allows.
        revision, token, local_files_only: as in huggingface_hub.
        Raises CheckpointError if there is no such model or its files are not whole.
        """
        from klein_mlx.convert import open_model

        source = open_model(model, revision=revision, token=token, local_files_only=local_files_only)
        return cls(source, quantize=quantize, dtype=dtype, keep=keep)

    def __call__(self, prompt: str | list[str] | None = None, **arguments: Any) -> KleinOutput:
        """Make pictures; the arguments are those of `stream`.

        Raises RequestError for what cannot be done, CheckpointError for weights that cannot be read.
        """
        run = self.stream(prompt, **arguments)
        pictures = [event for event in run if isinstance(event, Picture)]
        results = [picture.image for picture in pictures]
        kind = run.request.output_type
        if kind == "latent":
            results = mx.stack(results)
        elif kind == "np":
            import numpy as np

            results = np.stack(results)
        return KleinOutput(results, [picture.seed for picture in pictures], run.notes, run.seconds)

    def stream(
        self,
        prompt: str | list[str] | None = None,
        *,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        num_images_per_prompt: int = 1,
        seed: int | list[int] | None = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        sigmas: list[float] | None = None,
        output_type: str = "pil",
        max_sequence_length: int | None = None,
    ) -> Run:
        """Check the request and return its run, an iterator of Steps and Pictures; nothing is computed before it is
        iterated.

        prompt: a text, or several; each makes `num_images_per_prompt` pictures, of seeds seed, seed + 1, ...
        image: references for editing: a path, a PIL image, or a list of up to ten.
        height, width: pixels, multiples of 16; by default the first reference's, or 1024 (128 for tiny).
        num_inference_steps, guidance_scale: by default the variant's (4 and 1 for the distilled ones).
        negative_prompt: with a guidance_scale over 1, instead of the empty prompt.
        seed: 0 .. 2**64 - 1, or a list: one picture of each prompt per seed. Each picture depends on its seed alone.
        latents: the initial noise (pictures, C, h, w), as in diffusers, instead of the seeds'.
        prompt_embeds: (B, L, D) instead of prompts.
        sigmas: noise levels before the shift, instead of evenly spaced ones.
        output_type: "pil", "np" ((H, W, 3) in 0..1) or "latent" (denormalised, an mx.array).
        max_sequence_length: text positions, padding included (512; 40 or so for tiny).
        Raises RequestError.
        """
        request = check(
            self.config,
            prompt=prompt,
            negative_prompt=negative_prompt,
            image=image,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            latents=latents,
            prompt_embeds=prompt_embeds,
            sigmas=sigmas,
            output_type=output_type,
            max_sequence_length=max_sequence_length,
        )
        run = Run(request)
        references, height, width = self._open_references(run)
        run.start(self._events(run, references, height, width))
        return run

    def _events(self, run: Run, opened: list[Image.Image], height: int, width: int) -> Iterator[Step | Picture]:
        """The whole run; however it ends, only what is to be kept stays loaded."""
        try:
            yield from self._phases(run, opened, height, width)
        finally:
            self.parts.release(*PARTS)

    def _phases(self, run: Run, opened: list[Image.Image], height: int, width: int) -> Iterator[Step | Picture]:
        """Encode, denoise, decode."""
        request = run.request
        with run.timed("encode"):
            references = join_references([self._encode_reference(run, image) for image in opened])
        embeds, negative = self._encode_prompts(run)
        self.parts.release("text_encoder", "vae")
        side = self.config.pixels_per_token
        h, w = height // side, width // side
        sigmas = make_sigmas(h * w, request.steps, request.sigmas)
        start = None if request.latents is None else from_channels_first(_array(request.latents))
        waiting: list[tuple[int, mx.array]] = []
        for number, (prompt_index, seed) in enumerate(request.pictures):
            with run.timed("steps"):
                prompt_embeds = embeds[prompt_index]
                predict = self._predict(run, prompt_embeds, negative, references, (h, w))
                channels = self.config.transformer.in_channels
                latents = noise(mx.random.key(seed), h, w, channels) if start is None else start[number : number + 1]
            steps = Tracked(predict)
            latents = latents.astype(self.dtype)
            walk = euler_steps(steps, latents, sigmas)
            for index in range(1, len(sigmas)):
                with run.timed("steps"):
                    latents = next(walk)
                    mx.eval(latents)
                preview = self._preview(run, latents - sigmas[index] * steps.velocity)
                yield Step(number, index, len(sigmas) - 1, sigmas[index], latents, preview)
            waiting.append((number, latents))
            if self.parts.keep != "nothing":
                yield self._finish(run, *waiting.pop())
        del predict, steps, walk  # they hold the transformer
        self.parts.release("transformer")
        for number, latents in waiting:
            yield self._finish(run, number, latents)

    def _open_references(self, run: Run) -> tuple[list[Image.Image], int, int]:
        """The references as the model takes them, and the picture's height and width."""
        request, side = run.request, self.config.pixels_per_token
        prepared = []
        for source in request.images:
            image, notes = images.load_image(source)
            image, note = images.prepare_reference(image, side)
            run.notes += [*notes, *([note] if note else [])]
            prepared.append(image)
        first = prepared[0].size if prepared else (self.config.default_size, self.config.default_size)
        width, height = request.width or first[0], request.height or first[1]
        check_side("width", width, side)
        check_side("height", height, side)
        if request.latents is not None and tuple(request.latents.shape[2:]) != (height // side, width // side):
            raise RequestError(
                f"latents has shape {tuple(request.latents.shape)}; for {width} x {height} pixels its last two must be "
                f"{height // side}, {width // side}"
            )
        return prepared, height, width

    def _encode_reference(self, run: Run, image: Image.Image) -> mx.array:
        key = (image.size, hashlib.sha256(image.tobytes()).digest())
        if key not in self._references:
            latents = encode_reference(self.parts.get("vae", run.timed), image, self.dtype)
            _remember(self._references, key, latents)
        return self._references[key]

    def _encode_prompts(self, run: Run) -> tuple[list[mx.array], mx.array | None]:
        """Embeddings (1, L, D) of every prompt, evaluated, and the negative prompt's where guidance needs it."""
        request = run.request
        guided = request.guidance > 1
        if request.prompt_embeds is not None:
            given = _array(request.prompt_embeds).astype(self.dtype)
            embeds = [given[i : i + 1] for i in range(given.shape[0])]
        else:
            with run.timed("encode"):
                embeds = [self._encode_prompt(run, prompt) for prompt in request.prompts]
        with run.timed("encode"):
            negative = self._encode_prompt(run, request.negative_prompt) if guided else None
        return embeds, negative

    def _encode_prompt(self, run: Run, prompt: str) -> mx.array:
        length = run.request.max_sequence_length
        tokens = self.tokenizer([prompt], length)
        if tokens.cut[0]:
            text = prompt if len(prompt) <= 40 else prompt[:37] + "..."
            run.notes.append(f"prompt {text!r}: {tokens.cut[0]} tokens over {length} were cut")
        key = (prompt, length)
        if key not in self._prompts:
            _remember(self._prompts, key, encode_prompt(self.parts.get("text_encoder", run.timed), tokens, 0))
        return self._prompts[key]

    def _predict(
        self,
        run: Run,
        prompt_embeds: mx.array,
        negative: mx.array | None,
        references: References | None,
        grid: tuple[int, int],
    ) -> Predict:
        """The velocity as a function of latents and sigma, with guidance where asked for."""
        transformer = self.parts.get("transformer", run.timed)
        conditional = velocity(transformer, prompt_embeds, references, grid)
        if negative is None:
            return conditional
        unconditional = velocity(transformer, negative, references, grid)
        return with_cfg(conditional, unconditional, run.request.guidance)

    def _finish(self, run: Run, number: int, latents: mx.array) -> Picture:
        """Decode, as the request wants it."""
        prompt_index, seed = run.request.pictures[number]
        prompt = run.request.prompts[prompt_index] if run.request.prompts else None
        with run.timed("decode"):
            image = self._decode(run, latents, run.request.output_type)
        return Picture(number, len(run.request.pictures), prompt, seed, image)

    def _decode(self, run: Run, latents: mx.array, output_type: str) -> Any:
        vae = self.parts.get("vae", run.timed)
        z = unpatchify(vae.denormalize(latents))
        if output_type == "latent":
            z = to_channels_first(z)[0]
            mx.eval(z)
            return z
        pixels = vae.decode(z)[0]
        mx.eval(pixels)
        return images.to_image(pixels) if output_type == "pil" else _numpy(images.to_unit(pixels))

    def _preview(self, run: Run, clean: mx.array) -> Callable[[], Image.Image]:
        return lambda: self._decode(run, clean, "pil")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, read when first needed."""
        return Tokenizer(self.source.tokenizer_file)


def _remember(store: dict[Any, mx.array], key: Any, value: mx.array) -> None:
    """Keep the newest few, oldest out first."""
    store[key] = value
    while len(store) > REMEMBERED:
        del store[next(iter(store))]


def _array(values: Any) -> mx.array:
    return values if isinstance(values, mx.array) else mx.array(_numpy(values))


def _numpy(values: Any) -> "np.ndarray":
    import numpy as np

    return np.array(values)
