"""What is encoded once and kept: the prompts' embeddings and the references' latents, the newest few of each."""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from PIL import Image

from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.model.layers import Done
from klein_mlx.model.sampler import patchify
from klein_mlx.model.text_encoder import TextEncoder
from klein_mlx.model.tokenizer import Tokenizer, Tokens
from klein_mlx.model.vae import VAE
from klein_mlx.paths import cache_folder, version
from klein_mlx.request import Request
from klein_mlx.runtime.parts import Parts
from klein_mlx.runtime.pictures import to_array, to_pixels
from klein_mlx.runtime.run import Run
from klein_mlx.weights.checkpoint import read_tokenizer
from klein_mlx.weights.safetensors import digest, is_finite, read_header, read_metadata


def encode_prompt(encoder: TextEncoder, tokens: Tokens, index: int, done: Done | None = None) -> mx.array:
    """Embeddings (1, L, joint dim) of one of the tokenized prompts, evaluated. done: called after each layer."""
    row = slice(index, index + 1)
    embeds = encoder(tokens.input_ids[row], tokens.attention_mask[row], done)
    mx.eval(embeds)  # a lazy output would keep the encoder's weights alive
    if not is_finite(embeds).item():
        raise CheckpointError("the prompt was encoded to NaN or infinity: the text encoder's weights are damaged")
    return embeds


def encode_reference(vae: VAE, image: Image.Image, dtype: mx.Dtype, done: Done | None = None) -> mx.array:
    """Normalized latents (1, h, w, C) of a prepared reference, evaluated. done: called after each layer."""
    z = vae.encode(to_pixels(image).astype(dtype), vae.strip_rows(image.height, image.width), done)
    latents = vae.normalize(patchify(z))
    mx.eval(latents)
    if not is_finite(latents).item():
        raise CheckpointError("a picture was encoded to NaN or infinity: the VAE's weights are damaged")
    return latents


MAX_BYTES = 1 << 30  # of all entries; the ones that were used longest ago go first
_SUFFIX = ".prompt.safetensors"

# What other programs read out of a prompt -> what to do here.
_WEB_UI = (
    (re.compile(r"<lora:[^<>]{1,80}>"), "a LoRA is given as --lora FILE:SCALE"),
    (re.compile(r"\([^():]{1,80}:\d\.\d{1,3}\)"), "words have no weights"),
)


class PromptCache:
    """A folder of embeddings.

    folder: made when the first entry is written; True: this program's place for what can be made again. encoder: all
    that decides the embeddings besides the prompt, as plain values.
    Raises RequestError if the folder cannot be one.
    """

    def __init__(self, folder: "Path | str | bool", encoder: Mapping[str, Any]):
        place = cache_folder() if folder is True else Path(os.path.expanduser(str(folder)))
        if place is None:
            raise RequestError("prompt_cache", rule="has no folder: there is no home; name one")
        self.folder = place / "prompts" if folder is True else place
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise RequestError("prompt_cache", rule=f"is {str(self.folder)!r}, which is not a folder; name one")
        self._encoder = json.dumps(encoder, sort_keys=True)

    def path(self, prompt: str, length: int) -> Path:
        """Where a prompt's embeddings of so many text positions are, or would be."""
        key = hashlib.sha256(json.dumps([self._encoder, prompt, length]).encode("utf-8", "surrogatepass"))
        return self.folder / f"{key.hexdigest()}{_SUFFIX}"

    def read(self, prompt: str, length: int, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array | None:
        """The embeddings, evaluated; None if they are not there. Raises CheckpointError for a damaged entry."""
        path = self.path(prompt, length)
        if not os.path.exists(path):
            return None
        entry = read_header(path).get("embeds")
        if entry is None or entry.shape != shape:
            raise CheckpointError(f"{path}: does not hold embeddings of shape {shape}")
        try:
            embeds = mx.load(str(path))["embeds"]  # type: ignore[index]
            mx.eval(embeds)
        except RuntimeError:
            raise CheckpointError(f"{path}: cannot be read") from None
        told = read_metadata(path)
        if told.get("key") != path.name.removesuffix(_SUFFIX):
            raise CheckpointError(f"{path}: is another prompt's entry")
        sound = embeds.dtype == dtype and is_finite(embeds).item() and _digest(embeds) == told.get("sha256")
        if not sound:
            raise CheckpointError(f"{path}: is damaged")
        os.utime(path)  # it was used
        return embeds

    def write(self, prompt: str, length: int, embeds: mx.array) -> None:
        """Keep them: written beside, flushed, put into place; then the oldest go. Raises OSError."""
        path = self.path(prompt, length)
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{secrets.token_hex(8)}.safetensors")
        try:
            told = {"sha256": _digest(embeds), "key": path.name.removesuffix(_SUFFIX)}
            mx.save_safetensors(str(beside), {"embeds": embeds}, told)
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
            beside.replace(path)
        except RuntimeError as error:  # MLX's, of a full disk
            raise OSError(str(error)) from None
        finally:
            beside.unlink(missing_ok=True)
        self._shrink(path)

    def _shrink(self, newest: Path) -> None:
        """Remove what was used longest ago, until the folder is within its bound."""
        entries = sorted(
            ((p.stat().st_mtime_ns, p.stat().st_size, p) for p in self.folder.glob(f"*{_SUFFIX}") if p != newest),
            reverse=True,
        )
        total = newest.stat().st_size
        for _, size, path in entries:
            total += size
            if total > MAX_BYTES:
                path.unlink(missing_ok=True)


def _digest(embeds: mx.array) -> str:
    import numpy as np

    return hashlib.sha256(np.array(embeds.reshape(-1).view(mx.uint8)).tobytes()).hexdigest()


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
            encoder = source.config.text_encoder
            tokenizer = read_tokenizer(source.tokenizer_file, encoder.vocab_size, encoder.model_type)
            self.parts.pinned.check()
            self._tokenizer = tokenizer
        return self._tokenizer

    def knows(self, request: Request) -> bool:
        """Whether no prompt of the request has to be encoded."""
        if request.prompt_embeds is not None and request.passes == 1:
            return True
        prompts = [*request.prompts, *([request.negative_prompt] if request.passes == 2 else [])]
        keys, cache = [self._key(request, prompt) for prompt in prompts], self._usable()
        return all(
            key in self.prompts or (cache is not None and not key[2] and os.path.exists(cache.path(*key[:2])))
            for key in keys
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
        if request.passes == 1:
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
        for pattern, instead in _WEB_UI:
            if found := pattern.search(prompt):
                run.notes.append(f"prompt {text!r}: {found[0]} is plain text here; {instead}")
        if key not in self.prompts:
            embeds = None if literal else self._cached(run, prompt, length)  # files are known by prompt and length
            if embeds is None:
                encoder = self.parts.get("text_encoder", run)
                embeds = encode_prompt(encoder, tokens, 0, run.part_done)
                self.parts.pinned.check()  # the tokens' rows come from the file, whatever is loaded
                if not literal:
                    self._keep(run, prompt, length, embeds)
            _remember(self.prompts, key, embeds)
        return self.prompts[key]

    def _identity(self) -> dict[str, Any]:
        """All that decides a prompt's embeddings besides the prompt and its length."""
        parts, config = self.parts, self.parts.source.config
        quantization = parts.source.quantization.get("text_encoder") or parts.quantization.get("text_encoder")
        return {
            "version": version(),  # another may encode otherwise
            "files": digest(parts.source.files(["text_encoder"]), local=True),
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
        """The normalized latents (1, h, w, C) of a prepared picture, known by its content."""
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
