"""Latents and embeddings, computed once and kept in the run folder by content; then encoder and VAE leave memory.

An entry's name is the digest of all that decides it: the picture's bytes, its size, the VAE's files; or the caption,
the encoder's files, bits and dtype. A file that is there is whole: it was written beside, flushed and renamed.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import mlx.core as mx
from PIL import Image, ImageOps

from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.images.reading import load_image
from klein_mlx.model.sampler import References, join_references
from klein_mlx.pipeline import KleinPipeline
from klein_mlx.request import check
from klein_mlx.runtime.run import Run
from klein_mlx.train.dataset import Item, file_digest, fit_picture, fit_reference
from klein_mlx.train.options import TrainOptions
from klein_mlx.weights.safetensors import digest, read_header


class Store:
    """A folder of arrays, each in a file of its own."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.safetensors"

    def __contains__(self, key: str) -> bool:
        return self.path(key).exists()

    def read(self, key: str) -> mx.array:
        """The array, lazily. Raises RequestError for a damaged file, and where there is none."""
        path = self.path(key)
        if not path.exists():
            raise RequestError(f"{path} has gone while training; run again with --resume")
        try:
            read_header(path)
        except CheckpointError:
            raise RequestError(f"{path} is damaged; remove it, and go on with --resume") from None
        return mx.load(str(path))["array"]  # type: ignore[index]

    def write(self, key: str, array: mx.array) -> None:
        """Raises RequestError for what the disk refuses."""
        path = self.path(key)
        beside = path.with_name(f".{secrets.token_hex(8)}.safetensors")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            mx.save_safetensors(str(beside), {"array": array})
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
            beside.replace(path)
        except (OSError, RuntimeError) as error:
            raise RequestError(f"the cache cannot be written to {self.folder}: {_words(error)}") from None
        finally:
            with suppress(OSError):
                beside.unlink(missing_ok=True)


def _words(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


class Encoded:
    """What training reads of the samples; `fill` computes what is not there yet.

    encoded: how many (captions, pictures) `fill` computed.
    """

    def __init__(self, pipe: KleinPipeline, options: TrainOptions, folder: Path):
        self._pipe, self._options, self._store = pipe, options, Store(folder)
        self.encoded = (0, 0)
        source, dtype = pipe.source, str(pipe.dtype)
        self._vae = f"{digest(source.files(['vae']), local=True)}/{dtype}"
        text = {"bits": options.bits, "dtype": dtype, "length": pipe.config.max_sequence_length}
        text |= {"files": digest(source.files(["text_encoder"]), local=True), "taps": list(pipe.config.taps)}
        self._encoder = json.dumps(text, sort_keys=True)

    # ---- names ----

    def caption_key(self, caption: str) -> str:
        return f"caption/{self._encoder}/{caption}"

    def picture_key(self, item: Item, flipped: bool = False) -> str:
        return f"picture/{self._vae}/{item.digest}/{item.size}/{flipped}"

    def reference_key(self, index: int, item: Item, flipped: bool = False) -> str:
        aligned = item.reference_sizes[index] == item.size
        return (
            f"reference/{self._vae}/{item.reference_digests[index]}/{item.reference_sizes[index]}/{aligned}/{flipped}"
        )

    # ---- reading ----

    def embeds(self, captions: Iterable[str]) -> mx.array:
        """(B, L, D)."""
        return mx.concatenate([self._store.read(self.caption_key(caption)) for caption in captions])

    def latents(self, items: Sequence[Item], flips: Sequence[bool]) -> mx.array:
        """(B, h, w, C)."""
        keys = [self.picture_key(item, flip) for item, flip in zip(items, flips, strict=True)]
        return mx.concatenate([self._store.read(key) for key in keys])

    def references(self, items: Sequence[Item], flips: Sequence[bool]) -> References | None:
        """Tokens (B, N, C) and their ids."""
        joined = [
            join_references([self._store.read(self.reference_key(k, item, flip)) for k in range(len(item.references))])
            for item, flip in zip(items, flips, strict=True)
        ]
        if joined[0] is None:
            return None
        return References(mx.concatenate([one.tokens for one in joined if one]), joined[0].ids)

    # ---- writing ----

    def missing(self, items: Sequence[Item], captions: Sequence[str]) -> tuple[list[str], list[Item]]:
        """Captions and items that have to be encoded."""
        flips = (False, True) if self._options.flip else (False,)
        lacking = []
        for item in items:
            keys = [self.picture_key(item, flip) for flip in flips]
            keys += [self.reference_key(k, item, flip) for k in range(len(item.references)) for flip in flips]
            if any(key not in self._store for key in keys):
                lacking.append(item)
        return [c for c in dict.fromkeys(captions) if self.caption_key(c) not in self._store], lacking

    def fill(self, items: Sequence[Item], captions: Sequence[str], progress: Callable[[str], None]) -> list[str]:
        """Encode what is not kept yet, pictures first; then encoder and VAE are freed. progress: told a line now and
        then; what it raises ends the work. Returns notes: captions that were cut."""
        texts, lacking = self.missing(items, captions)
        run = Run(check(self._pipe.config, prompt="-"))
        try:
            for number, item in enumerate(lacking, 1):
                progress(f"encoding picture {number} of {len(lacking)}")
                self._encode_item(run, item)
            self._pipe.parts.release(run, "vae")
            for number, caption in enumerate(texts, 1):
                progress(f"encoding caption {number} of {len(texts)}")
                embeds = self._pipe.encodings.of_prompt(run, caption)
                self._store.write(self.caption_key(caption), embeds)
        finally:
            self._pipe.parts.release(run, "vae", "text_encoder")
            self._pipe.encodings.prompts.clear()
            self._pipe.encodings.references.clear()
        self.encoded = (len(texts), len(lacking))
        return run.notes

    def _encode_item(self, run: Run, item: Item) -> None:
        if file_digest(item.file) != item.digest:
            raise RequestError(f"picture {item.file} has changed since it was checked; run again")
        options, multiple = self._options, self._pipe.config.pixels_per_token
        image, _ = load_image(item.file, "picture")
        ready: list[tuple[Callable[[Item, bool], str], Image.Image]]
        ready = [(self.picture_key, fit_picture(image, item.size))]
        for index, path in enumerate(item.references):
            reference, _ = load_image(path, "reference")
            fitted = fit_reference(reference, image.size, item.size, options.resolution, multiple, path)
            ready.append((partial(self.reference_key, index), fitted))
        for key, picture in ready:
            for flip in (False, True) if options.flip else (False,):
                shown = ImageOps.mirror(picture) if flip else picture
                self._write_picture(run, key(item, flip), shown)

    def _write_picture(self, run: Run, key: str, image: Image.Image) -> None:
        if key not in self._store:
            self._store.write(key, self._pipe.encodings.of_reference(run, image))
