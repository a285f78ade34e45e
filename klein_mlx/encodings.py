"""What is encoded once and kept: the prompts' embeddings and the references' latents, the newest few of each."""

import hashlib
from pathlib import Path
from typing import Any

import mlx.core as mx
from PIL import Image

import klein_mlx
from klein_mlx.conditioning import encode_prompt, encode_reference
from klein_mlx.errors import CheckpointError
from klein_mlx.events import Run
from klein_mlx.given import to_array
from klein_mlx.parts import Parts
from klein_mlx.prompt_cache import PromptCache, digest_files
from klein_mlx.request import Request
from klein_mlx.tokenizer import Tokenizer

REMEMBERED = 8  # prompts, and references, whose encodings are kept


class Encodings:
    """Encodes what a request names, unless it is known already: then neither encoder nor VAE is loaded."""

    def __init__(self, parts: Parts, prompt_cache: Path | str | bool | None = None):
        """prompt_cache: a folder for prompts' embeddings, True for the usual place, or None: they are not written."""
        self.parts = parts
        self.cache = PromptCache(prompt_cache, self._identity()) if prompt_cache else None
        self.prompts: dict[tuple[str, int, bool], mx.array] = {}
        self.references: dict[Any, mx.array] = {}
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, read when first needed."""
        if self._tokenizer is None:
            source = self.parts.source
            self._tokenizer = Tokenizer(source.tokenizer_file, source.config.text_encoder.vocab_size)
        return self._tokenizer

    def knows(self, request: Request) -> bool:
        """Whether no prompt of the request has to be encoded."""
        if request.prompt_embeds is not None and request.guidance <= 1:
            return True
        prompts = [*request.prompts, *([request.negative_prompt] if request.guidance > 1 else [])]
        keys, cache = [self._key(request, prompt) for prompt in prompts], self._usable()
        return all(
            key in self.prompts or (cache is not None and not key[2] and cache.path(*key[:2]).exists()) for key in keys
        )

    def _key(self, request: Request, prompt: str) -> tuple[str, int, bool]:
        """A prompt, its length, and whether marks in it are text: any other prompt is the same either way."""
        literal = request.literal_prompt and bool(self.tokenizer.special_in(prompt))
        return prompt, request.max_sequence_length, literal

    def of_request(self, run: Run) -> tuple[list[mx.array], mx.array | None]:
        """Embeddings (1, L, D) of every prompt, evaluated, and the negative prompt's where guidance needs it."""
        request = run.request
        if request.prompt_embeds is not None:
            given = to_array("prompt_embeds", request.prompt_embeds).astype(self.parts.dtype_of("text_encoder"))
            embeds = [given[i : i + 1] for i in range(given.shape[0])]
        else:
            with run.timed("encode"):
                embeds = [self.of_prompt(run, prompt) for prompt in request.prompts]
        if request.guidance <= 1:
            return embeds, None
        with run.timed("encode"):
            return embeds, self.of_prompt(run, request.negative_prompt)

    def of_prompt(self, run: Run, prompt: str) -> mx.array:
        """The embeddings (1, L, D) of one prompt; what is cut, and what is no text, is told in the run's notes."""
        key = _, length, literal = self._key(run.request, prompt)
        marks = self.tokenizer.special_in(prompt)
        tokens = self.tokenizer([prompt], length, literal)
        text = prompt if len(prompt) <= 40 else prompt[:37] + "..."
        if tokens.cut[0]:
            run.notes.append(f"prompt {text!r}: {tokens.cut[0]} tokens over {length} were cut")
        if marks and not literal:
            marked = ", ".join(marks)
            run.notes.append(f"prompt {text!r}: {marked} is a mark of the model's own; --literal-prompt makes it text")
        if key not in self.prompts:
            embeds = None if literal else self._cached(run, prompt, length)  # files are known by prompt and length
            if embeds is None:
                encoder = self.parts.get("text_encoder", run)
                embeds = encode_prompt(encoder, tokens, 0, run.part_done)
                if not literal:
                    self._keep(run, prompt, length, embeds)
            _remember(self.prompts, key, embeds)
        return self.prompts[key]

    def _identity(self) -> dict[str, Any]:
        """All that decides a prompt's embeddings besides the prompt and its length."""
        parts, config = self.parts, self.parts.source.config
        quantization = parts.source.quantization.get("text_encoder") or parts.quantization.get("text_encoder")
        return {
            "version": klein_mlx.__version__,  # another may encode otherwise
            "files": digest_files(parts.source.files(["text_encoder"])),
            "taps": config.taps,
            "config": config.text_encoder.to_dict(),
            "quantization": quantization.to_dict() if quantization else None,
            "searched": sorted(
                path for path, own in (quantization and quantization.layers or {}).items() if own.searched
            ),
            "dtype": str(parts.dtype_of("text_encoder")),
            "device": str(mx.default_device().type),
        }

    def _usable(self) -> PromptCache | None:
        """The folder, unless a LoRA changes the encoder: its embeddings are another model's."""
        return None if self.parts.loras.changes("text_encoder") else self.cache

    def _cached(self, run: Run, prompt: str, length: int) -> mx.array | None:
        cache, config = self._usable(), self.parts.source.config
        if cache is None:
            return None
        try:
            shape = (1, length, len(config.taps) * config.text_encoder.hidden_size)
            return cache.read(prompt, length, shape, self.parts.dtype_of("text_encoder"))
        except CheckpointError as error:
            run.notes.append(f"the prompt is encoded anew: {error}")
            return None

    def _keep(self, run: Run, prompt: str, length: int, embeds: mx.array) -> None:
        if cache := self._usable():
            try:
                cache.write(prompt, length, embeds)
            except OSError as error:
                run.notes.append(f"the prompt's embeddings were not kept: {error.strerror or error}")

    def of_reference(self, run: Run, image: Image.Image) -> mx.array:
        """The normalised latents (1, h, w, C) of a prepared picture, known by its content."""
        key = (image.size, hashlib.sha256(image.tobytes()).digest())
        if key not in self.references:
            vae = self.parts.get("vae", run)
            latents = encode_reference(vae, image, self.parts.dtype_of("vae"), run.part_done).astype(self.parts.dtype)
            mx.eval(latents)  # kept for runs in other threads, which cannot compute this one's lazy arrays
            _remember(self.references, key, latents)
        return self.references[key]


def _remember(store: dict[Any, mx.array], key: Any, value: mx.array) -> None:
    """Keep the newest few, oldest out first."""
    store[key] = value
    while len(store) > REMEMBERED:
        del store[next(iter(store))]
