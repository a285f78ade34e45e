"""KleinPipeline: the memory plan, the stream of steps, the call.

One way for everything: `stream` runs a request and yields a Step after each denoising step and a Picture after each
picture; the call, the command line and whatever else is built sit on it. The encoder is freed once the prompt's
embeddings are evaluated, the transformer before the pictures are decoded, unless `keep` says otherwise.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import mlx.core as mx
from PIL import Image

from klein_mlx.config import PARTS, ModelConfig
from klein_mlx.errors import DoesNotFit, RequestError, human_bytes, of_device, short
from klein_mlx.images.masks import Canvas
from klein_mlx.model.compile import CompiledBlocks
from klein_mlx.model.sampler import (
    After,
    Predict,
    References,
    add_noise,
    euler_steps,
    from_channels_first,
    hold_outside,
    join_references,
    make_sigmas,
    noise,
    torch_noise,
)
from klein_mlx.model.tokenizer import Tokenizer
from klein_mlx.model.transformer import in_parts
from klein_mlx.model.velocity import Peers, Reuse, Tables, Tracked, guided_velocity, velocity
from klein_mlx.options import Options, takes, with_hints
from klein_mlx.porting import COMPONENTS, REPLACED, Answering, answer
from klein_mlx.request import Request, check_options
from klein_mlx.runtime.encodings import Encodings
from klein_mlx.runtime.memory import ReadAhead, Work, check_fits, compute_dtype, machine_memory, memory_limits
from klein_mlx.runtime.parts import Parts
from klein_mlx.runtime.pictures import Opened, Sketcher, decode, open_pictures, to_array
from klein_mlx.runtime.recipe import Recorder
from klein_mlx.runtime.run import KleinOutput, Picture, Run, Step
from klein_mlx.weights.bits import Quantize, parse, settle
from klein_mlx.weights.checkpoint import Source
from klein_mlx.weights.lora import LoadedLora, checked_scale

MAX_WAITING = 8  # pictures that wait for the decoder where the transformer has to leave for it


class Plan(NamedTuple):
    """What a request comes to, before anything is loaded.

    grid: rows and columns of the picture's tokens. sigmas: the noise levels that the steps go through, 0 included.
    recipe: what the pictures' recipes share.
    """

    opened: Opened
    grid: tuple[int, int]
    sigmas: list[float]
    work: Work
    recipe: dict[str, Any]


class Conditions(NamedTuple):
    """What a run's pictures attend to, and the latents of the picture that they start from, or None.

    embeds: (1, L, D) of every prompt; negative: of the negative prompt, or None; init: (1, h, w, C).
    """

    embeds: list[mx.array]
    negative: mx.array | None
    references: References | None
    init: mx.array | None


class KleinPipeline(metaclass=Answering):
    """FLUX.2 [klein], ready to make and edit pictures.

    Weights are read when a part is first needed. Use from one thread at a time; of a run, `cancel` and `close` may be
    called from any.
    """

    def __repr__(self) -> str:
        bits = {own.bits for own in {**self.source.quantization, **self.parts.quantization}.values()}
        weights = f"{'/'.join(map(str, sorted(bits)))}-bit" if bits else "unquantized"
        dtype, keep = str(self.dtype).removeprefix("mlx.core."), self.parts.keep
        return f"KleinPipeline({self.config.variant.name}, {weights}, {dtype}, keep={keep!r}, loras={len(self.loras)})"

    if not TYPE_CHECKING:  # or checkers would take any attribute for one of the pipeline's

        def __getattr__(self, name: str) -> Any:
            """diffusers' methods: nothing is done where nothing is needed; else what to use instead."""
            return answer(self, name)

        def __setattr__(self, name: str, value: Any) -> None:
            if name in COMPONENTS:
                raise AttributeError(f"pipe.{name} cannot be set; {REPLACED.format(name)}")
            if name in ("scheduler", "_interrupt"):
                answer(self, name)
            super().__setattr__(name, value)

    def __init__(
        self,
        source: Source,
        *,
        quantize: Quantize = None,
        dtype: mx.Dtype | str | None = None,
        keep: str | None = None,
        prompt_cache: str | Path | bool | None = None,
    ):
        """source: an opened model (klein_mlx.formats.open.open_model). The rest as in `from_pretrained`."""
        if isinstance(source, str | Path):
            raise TypeError(f"KleinPipeline takes an opened model; use KleinPipeline.from_pretrained({str(source)!r})")
        self.source = source
        self.config: ModelConfig = source.config
        self.dtype = compute_dtype(dtype)
        self.parts = Parts(source, self.dtype, {} if quantize is None else settle(parse(quantize), source), keep)
        self.sketcher: Sketcher | None = None
        self.encodings = Encodings(self.parts, prompt_cache)
        self.recorder = Recorder(source, quantize, self.parts.quantization, self.dtype, self.parts.pinned)
        self._blocks = CompiledBlocks()
        self.peers = Peers()  # processes that share each picture with this one, and do all that it does
        self.parts.forget = self.encodings.prompts.clear

    @classmethod
    @with_hints
    def from_pretrained(
        cls,
        model: str | Path,
        quantize: Quantize = None,
        dtype: mx.Dtype | str | None = None,
        keep: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        vae: str | Path | None = None,
        transformer: str | Path | None = None,
        text_encoder: str | Path | None = None,
        prompt_cache: str | Path | bool | None = None,
        variant: str | None = None,
    ) -> Self:
        """Open a model; its weights are read later, when they are needed.

        model: a hub id, a folder (ours, or in diffusers' layout), or "tiny", the embedded checkpoint.
        quantize: bits for weights that are not quantized yet: None, 3, 4, 5, 6, 8, a word ("4-g32", "mxfp4",
            "mixed-4"), or a mapping of parts and patterns of layers to those; see klein_mlx.weights.bits.
        dtype: of the computation, an mlx dtype or its name; by default bfloat16 on a GPU, float32 on a CPU.
            float16 is for chips without bfloat16 of their own (M1, M2): the transformer's layers compute in it beside
            a float32 residual stream, encoder and VAE in bfloat16.
        keep: what stays in memory between calls: "all", "transformer" or "nothing"; by default as the machine allows.
        revision, token, local_files_only: as in huggingface_hub.
        transformer, text_encoder, vae: a file (BFL's, ComfyUI's, FP8, GGUF), a folder or a hub id (a file of it:
            owner/name/file.gguf) that takes the place of the model's own; the VAE of
            "black-forest-labs/FLUX.2-small-decoder" decodes faster.
        variant: which variant of these sizes it is ("4b", "base-4b", ...), where files do not tell, or tell it wrongly.
        prompt_cache: a folder in which prompts' embeddings are kept, so that a prompt that comes again loads no
            encoder, in later processes too; True: the usual place. By default only the newest few are kept, in memory.
        Raises CheckpointError if there is no such model or its files are not whole.
        """
        from klein_mlx.formats.open import open_model

        parts = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
        source = open_model(
            model, revision=revision, token=token, local_files_only=local_files_only, parts=parts, variant=variant
        )
        return cls(source, quantize=quantize, dtype=dtype, keep=keep, prompt_cache=prompt_cache)

    @with_hints
    def load_lora(
        self,
        path: str | Path,
        scale: float = 1.0,
        name: str | None = None,
        *,
        partial: bool = False,
        folder: str | Path | None = None,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> LoadedLora:
        """Apply a LoRA at strength `scale`, besides those that are loaded. The order does not matter.

        path: a file, a folder with one, a name in the LoRA folder, or a Hub id (owner/name, owner/name/file).
        scale: -100..100; 0 is exactly no LoRA. name: for `unload_lora`; the file's by default.
        partial: skip keys that match nothing in this model, instead of refusing the file.
        folder: where names are looked up; by default $KLEIN_MLX_LORAS, or ~/.config/klein-mlx/loras.
        revision, token, local_files_only: as in huggingface_hub.
        Returns what was loaded. Raises CheckpointError for a file that is not whole, that was made for another model,
        or of which a key would not be used; RequestError for a bad scale, a taken name, or while a run is working.
        """
        from klein_mlx.formats.lora import read_lora
        from klein_mlx.formats.lora_metadata import find_lora

        checked_scale(scale)
        file = find_lora(path, folder=folder, revision=revision, token=token, local_files_only=local_files_only)
        return self.parts.load_lora(read_lora(file, self.config, partial), scale, name)

    def unload_lora(self, name: str | None = None) -> None:
        """Take a LoRA off again, or all: the weights are, bit for bit, what they were. Raises RequestError."""
        self.parts.unload_lora(name)

    def set_lora_scale(self, name: str, scale: float) -> None:
        """Change a loaded LoRA's scale. Raises RequestError."""
        self.parts.set_lora_scale(name, scale)

    @property
    def loras(self) -> list[LoadedLora]:
        """The LoRAs in use: name, file, sha256 and scale of each."""
        return self.parts.loras.loaded

    @takes(Options)
    def __call__(self, options: Options) -> KleinOutput:
        """Make pictures.

        Raises RequestError for what cannot be done, CheckpointError for weights that cannot be read.
        """
        run = self.start(check_options(self.config, options))
        pictures = [event for event in run if isinstance(event, Picture)]
        results = [picture.image for picture in pictures]
        kind = run.request.output_type
        if kind == "latent":
            results = mx.stack(results)
        elif kind == "np":
            import numpy as np

            results = np.stack(results)
        seeds, recipes = [picture.seed for picture in pictures], [picture.recipe for picture in pictures]
        return KleinOutput(results, seeds, run.notes, run.seconds, recipes)

    @takes(Options)
    def stream(self, options: Options) -> Run:
        """Check the request and return its run, an iterator of Steps and Pictures; nothing is computed before it is
        iterated.

        Raises RequestError.
        """
        return self.start(check_options(self.config, options))

    def start(self, request: Request) -> Run:
        """`stream` of a request that was checked for this model's config."""
        side = self.config.pixels_per_token
        opened = open_pictures(request, side, self.config.default_size)
        notes = [*self.source.info.get("notes", ()), *request.notes, *opened.notes]
        if request.reuse_references and not self.config.caches_references:
            notes.append("the references are computed in the first step only: an approximation")
        h, w = opened.height // side, opened.width // side
        strength = 1.0 if request.edit is None else request.edit.strength or 1.0
        sigmas = make_sigmas(h * w, request.steps, request.sigmas, strength, self.config.time_shift)
        recipe = self.recorder.of_request(request, sigmas)
        least = min(h * w, request.max_sequence_length)
        if self.peers.size > least:
            raise RequestError(f"{self.peers.size} processes cannot share {least} tokens; start fewer")
        work = self._work(request, opened)
        known = self.parts.make_room(work)
        check_fits(self.source, work, self.dtype, self.parts.quantization, known, self.parts.device)
        run = Run(request, notes, Plan(opened, (h, w), sigmas, work, recipe), known.phases)
        events = (event for _, event in self.together([run]))
        run.start(_with_bar(run, events) if request.progress else events)
        return run

    def sent(self, run: Run) -> int:
        """Bytes of keys and values that a step sends from the first process to each of those that share the picture."""
        (h, w), work = run.plan.grid, run.plan.work
        tokens = work.length + h * w + work.tokens
        return run.request.passes * self.peers.sent(tokens, self.config.transformer, self.dtype.size)

    def _work(self, request: Request, opened: Opened) -> Work:
        """What of the request decides its memory."""
        side = self.config.pixels_per_token
        pictures = [*opened.references, *([opened.canvas.image] if opened.canvas else [])]
        tokens = sum(image.width // side * (image.height // side) for image in opened.references)
        work = Work(
            height=opened.height,
            width=opened.width,
            references=tuple((image.height, image.width) for image in pictures),
            tokens=tokens,
            length=request.max_sequence_length,
            encodes=not self.encodings.knows(request),
            memories=request.passes * (request.reuse_references or self.config.caches_references),
        )
        batched = request.passes == 2 and request.batch_guidance
        if request.passes == 2 and request.batch_guidance is None and self.peers.size == 1:  # else all must agree
            batched = self.parts.fits_twice(work)
        return replace(work, rows=2) if batched else work

    def together(self, runs: Sequence[Run]) -> Iterator[tuple[Run, Step | Picture]]:
        """Several runs of `stream`, not iterated yet, as one: each event with its run, in the runs' order.

        All are encoded before the first is denoised, so each part is loaded once, and the encoder is freed before the
        steps. However it ends, only what is to be kept stays loaded.
        """
        peak, machine = max((size for run in runs for size in run.expected.values()), default=0), machine_memory()
        events = self._together(runs)
        try:
            while True:
                try:
                    with memory_limits(peak, machine):
                        event = next(events, None)
                except RuntimeError as error:
                    if self.peers.size > 1:
                        from klein_mlx.runtime.distributed import lost

                        raise of_device(error) or lost(error) from None
                    raise of_device(error) or error from None
                if event is None:
                    return
                yield event
        finally:
            events.close()

    def _together(self, runs: Sequence[Run]) -> Generator[tuple[Run, Step | Picture], None, None]:
        """`together`, without what holds only while it works."""
        self.parts.working.update(runs)
        try:
            if runs:
                yield from self._phases(runs)
        finally:
            self._release(runs, *PARTS)
            for run in runs:
                self.parts.working.discard(run)

    def _release(self, runs: Sequence[Run], *parts: str) -> None:
        for run in runs:
            self.parts.release(run, *parts)

    def _phases(self, runs: Sequence[Run]) -> Iterator[tuple[Run, Step | Picture]]:
        new = [run for run in runs if not self.encodings.knows(run.request)]
        with ReadAhead(self.parts.files_ahead(new[0].expected.get("encode", 0)) if new else []):
            encoded = [self._encode(run) for run in runs]
            self._release(runs, "text_encoder", "vae")
            self.parts.get("transformer", runs[0])
        waiting: list[tuple[Run, int, mx.array]] = []
        for run, conditions in zip(runs, encoded, strict=True):
            tables = self._tables(run, conditions.references)
            for number in range(len(run.request.pictures)):
                latents = mx.array(0.0)
                for step in self._denoise(run, number, conditions, tables):
                    latents = step.latents
                    yield run, step
                del step  # it holds the transformer
                waiting.append((run, number, latents))
                if self.parts.keep != "nothing" or len(waiting) == MAX_WAITING:
                    yield from self._finish_all(runs, waiting)
        yield from self._finish_all(runs, waiting)

    def _encode(self, run: Run) -> Conditions:
        """What a run's pictures attend to and start from, evaluated."""
        opened: Opened = run.plan.opened
        with run.timed("encode"):
            references = join_references([self.encodings.of_reference(run, image) for image in opened.references])
            init = None if opened.canvas is None else self.encodings.of_reference(run, opened.canvas.image)
        self.parts.release(run, "vae")
        embeds, negative = self.encodings.of_request(run)
        return Conditions(embeds, negative, references, init)

    def _finish_all(
        self, runs: Sequence[Run], waiting: list[tuple[Run, int, mx.array]]
    ) -> Iterator[tuple[Run, Step | Picture]]:
        """Decode what waits, the transformer freed before and the VAE after, where they are not kept."""
        if waiting:
            self._release(runs, "transformer")
        while waiting:
            run, number, latents = waiting.pop(0)
            yield run, self._finish(run, number, latents)
            if not waiting:
                self._release(runs, "vae")

    def _denoise(self, run: Run, number: int, conditions: Conditions, tables: Tables) -> Iterator[Step]:
        """One picture's steps, from its noise, or from the init image's latents with noise added."""
        request, (opened, (h, w), sigmas, *_) = run.request, run.plan
        with run.timed("steps"):
            predict = self._predict(run, request.pictures[number][0], conditions, tables)
        if request.latents is not None:
            latents = from_channels_first(to_array("latents", request.latents))[number : number + 1]
        else:
            latents = self._noise(request, number, h, w)
        latents, after = _start(latents.astype(self.dtype), conditions.init, opened.canvas, sigmas[0])
        steps = Tracked(predict)
        walk = euler_steps(steps, latents, sigmas, after)
        changed: mx.array | None = None
        for index in range(1, len(sigmas)):
            with run.timed("steps"):
                latents = walk.send(changed)
                mx.eval(latents)
            changed = self._call_back(request, index - 1, sigmas[index - 1], latents)
            latents = latents if changed is None else changed
            clean = latents - sigmas[index] * steps.velocity
            mx.eval(clean)  # a preview may be drawn in another thread, where this one's lazy arrays cannot be computed
            preview, sketch = self._preview(run, clean, opened.canvas), partial(self.sketch, clean)
            yield Step(number, index, len(sigmas) - 1, sigmas[index], latents, preview, sketch)

    def _noise(self, request: Request, number: int, h: int, w: int) -> mx.array:
        """(1, h, w, C) of a picture's seed, in float32, or in the dtype in which diffusers would draw it."""
        channels, seed = self.config.transformer.in_channels, request.pictures[number][1]
        if request.rng != "torch":
            return noise(mx.random.key(seed), h, w, channels)
        count = len(request.pictures) if request.one_stream else 1
        drawn = torch_noise(seed, (count, channels, h, w), self.dtype)
        return from_channels_first(drawn[number : number + 1] if request.one_stream else drawn)

    def _call_back(self, request: Request, step: int, sigma: float, latents: mx.array) -> mx.array | None:
        """Tell `callback_on_step_end` of a step; returns latents (1, h, w, C) in place of these, or None."""
        if request.callback_on_step_end is None:
            return None
        tokens = latents.reshape(1, -1, latents.shape[-1])
        told = request.callback_on_step_end(self, step, sigma * 1000, {"latents": tokens})
        told = {} if told is None else told
        if not isinstance(told, Mapping):
            raise RequestError("callback_on_step_end", rule=f"returned {short(told)}; it must return a dict or None")
        if other := next((name for name in told if name != "latents"), None):
            raise RequestError("callback_on_step_end", rule=f"returned {short(other)}; only latents can be replaced")
        changed = told.get("latents", tokens)
        return None if changed is tokens else to_array("latents", changed).reshape(latents.shape).astype(latents.dtype)

    def _tables(self, run: Run, references: References | None) -> Tables:
        """What all steps of all of the run's pictures share."""
        transformer = self.parts.get("transformer", run)
        with run.timed("steps"):
            still = self.config.caches_references and references is not None
            plan, guidance = run.plan, run.request.guidance
            return Tables(transformer, references, plan.grid, plan.sigmas[:-1], self.dtype, still, guidance)

    def _predict(self, run: Run, prompt: int, conditions: Conditions, tables: Tables) -> Predict:
        """The velocity as a function of latents and sigma, with guidance where asked for."""
        transformer, request = self.parts.get("transformer", run), run.request
        call = in_parts(self._blocks, run.part_done)
        reuse: Reuse | None = "first step" if request.reuse_references else None
        if self.config.caches_references:
            reuse = "alone"
        prompt_embeds, negative = conditions.embeds[prompt], conditions.negative
        if negative is None:
            return velocity(transformer, prompt_embeds, tables, reuse, call, self.peers)
        guidance = request.guidance, run.plan.work.rows == 2
        return guided_velocity(transformer, prompt_embeds, negative, tables, *guidance, reuse, call, self.peers)

    def _finish(self, run: Run, number: int, latents: mx.array) -> Picture:
        canvas, (prompt_index, seed) = run.plan.opened.canvas, run.request.pictures[number]
        if run.request.latents is not None:
            seed = None  # no seed made this noise
        prompt = run.request.prompts[prompt_index] if run.request.prompts else None
        with run.timed("decode"):
            latents = latents.astype(self.parts.dtype_of("vae"))
            image = decode(self.parts.get("vae", run), latents, run.request.output_type, canvas, run.part_done)
        if self.sketcher and canvas is None and run.request.output_type == "pil":
            self.sketcher.learn(latents, image)
        recipe = self.recorder.of_picture(run.plan.recipe, prompt, seed, image, self.loras)
        return Picture(number, len(run.request.pictures), prompt, seed, image, recipe)

    def _preview(self, run: Run, clean: mx.array, canvas: Canvas | None) -> Callable[[], Image.Image]:
        def preview() -> Image.Image:
            self._check_preview(run)
            latents, own = clean.astype(self.parts.dtype_of("vae")), Run(run.request)  # the run may be closed by then
            try:
                return decode(self.parts.get("vae", own), latents, "pil", canvas)
            finally:
                self.parts.release(own, "vae")

        return preview

    def _check_preview(self, run: Run) -> None:
        """DoesNotFit where decoding does not fit beside what is in memory now."""
        needed, machine = self.parts.preview_peak(run.plan.work), machine_memory()
        if needed > machine:
            raise DoesNotFit(
                f"a preview beside the transformer needs {human_bytes(needed)} of memory, and {human_bytes(machine)}"
                " can be used; step.sketch() draws one without the VAE"
            )

    def sketch(self, latents: mx.array) -> Image.Image | None:
        """What latents (1, h, w, C) without noise look like, roughly; see klein_mlx.runtime.pictures. `sketcher` draws
        it, by default one that keeps nothing on disk: it knows tiny's colours, and others' once it has seen a picture.
        """
        self.sketcher = self.sketcher or Sketcher(self.source, None)
        return self.sketcher.draw(latents)

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, read when first needed."""
        return self.encodings.tokenizer


def _with_bar(run: Run, events: Iterator[Step | Picture]) -> Iterator[Step | Picture]:
    """The events, with a progress bar for a notebook or a terminal while they come."""
    from tqdm.auto import tqdm

    with tqdm(total=run.request.steps * len(run.request.pictures), desc="load") as bar:
        run.on_phase = bar.set_description
        for event in events:
            if isinstance(event, Step):
                bar.update()
            yield event


def _start(
    latents: mx.array, init: mx.array | None, canvas: Canvas | None, sigma: float
) -> tuple[mx.array, After | None]:
    """Where the steps start, and what holds the unpainted part: latents is the noise, init (1, h, w, C) or None."""
    if init is None or canvas is None:
        return latents, None
    after = None
    if canvas.tokens is not None:
        after = hold_outside(mx.array(canvas.tokens)[None, :, :, None], init, latents)
    return add_noise(init, latents, sigma), after
