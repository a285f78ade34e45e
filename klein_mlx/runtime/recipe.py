"""What a picture's recipe holds: everything that decides its pixels, in the words of the command's options.

A recipe is a dict of JSON values. Files are named by their names alone and known by their digests: no recipe holds a
folder, a user's name or the time. `klein_mlx.images.saving` puts it into a file, `klein-mlx again` reads it back.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
from PIL import Image

from klein_mlx.images.reading import as_picture
from klein_mlx.options import USER_OPTIONS
from klein_mlx.paths import TINY_FOLDER, version
from klein_mlx.request import EDITS, SIDES, Edit, Request
from klein_mlx.weights.checkpoint import Source
from klein_mlx.weights.lora import LoadedLora
from klein_mlx.weights.quantize import Quantization
from klein_mlx.weights.safetensors import Pinned, digest, digest_file, is_sampled

FORMAT = 1
# What `again` takes from a picture, which may be anyone's: the options that decide pixels, and no other.
PIXELS = frozenset(own.key for name, own in USER_OPTIONS.items() if own.flag and name != "num_images_per_prompt") | {
    *("quantize", "group_size", "transformer_bits", "text_encoder_bits", "quantize_layer", "dtype")
}
_OWN = {"prompt", "seed", "num_images_per_prompt"}  # each picture's own
_SCALAR = bool | int | float | str | None


@dataclass(frozen=True)
class Recorder:
    """Writes recipes of one opened model.

    quantize: as it was asked for, or None. quantized: the parts that are quantized while they are loaded. dtype: of the
    computation. pinned: the files as they were when the model was opened.
    """

    source: Source
    quantize: Any
    quantized: Mapping[str, Quantization]
    dtype: mx.Dtype
    pinned: Pinned

    def of_request(self, request: Request, schedule: Sequence[float]) -> dict[str, Any]:
        """All that a request's pictures share; pictures that are files are read and their digests taken.

        schedule: the noise levels that the steps go through. `loras` is left empty: see `of_picture`.
        """
        options = {own.key: getattr(request, name) for name, own in USER_OPTIONS.items() if name not in {*_OWN, *EDITS}}
        scalars = {key: value for key, value in options.items() if key and isinstance(value, _SCALAR)}
        return {
            "recipe": FORMAT,
            "klein_mlx": version(),
            "mlx": version("mlx"),
            "device": mx.default_device().type.name,
            **scalars,
            "sigmas": None if request.sigmas is None else list(request.sigmas),
            "schedule": [round(sigma, 6) for sigma in schedule],
            "image": [describe_picture(image) for image in request.images],
            **({} if request.edit is None else _edit(request.edit)),
            "quantize": str(self.quantize) if isinstance(self.quantize, int | str) else None,
            "dtype": str(self.dtype).removeprefix("mlx.core."),
            "loras": [],
            **({"given": given} if (given := _given(request)) else {}),
        }

    def of_picture(
        self, shared: dict[str, Any], prompt: str | None, seed: int | None, image: Any, loras: Iterable[LoadedLora]
    ) -> dict[str, Any]:
        """One picture's: what it shares with the others, its prompt, its seed, its size; with which LoRAs it was made,
        since they may have been loaded after the request was checked."""
        size = f"{image.width}x{image.height}" if isinstance(image, Image.Image) else None
        own = {"prompt": prompt, "seed": seed, "size": size, "model": self.model}
        return {**shared, "loras": [asdict(lora) for lora in loras], **own}

    @cached_property
    def model(self) -> dict[str, Any]:
        """The model: the id by which it is found again, or its folder's name; the fingerprint of its files."""
        source = self.source
        told = {"variant": source.config.variant.name, **_identity(source.path), "fingerprint": self.fingerprint}
        if opened_as := source.info.get("opened_as"):
            told["opened_as"] = opened_as
        if any(is_sampled(path) for path in source.files()):
            told["sampled"] = True
        stored = sorted({**source.quantization, **self.quantized}.items())
        quantized = {part: {"bits": q.bits, "group_size": q.group_size, "mode": q.mode} for part, q in stored}
        parts = {part: entry.get("name") for part, entry in source.info.get("source", {}).get("parts", {}).items()}
        return {**told, **({"quantization": quantized} if quantized else {}), **({"parts": parts} if parts else {})}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model's files; of those over a gigabyte, of samples (`sampled` in the recipe)."""
        found = digest(self.source.files())
        self.pinned.check()
        return found


def describe_picture(source: Any) -> dict[str, Any]:
    """A picture that a request was given: a file by its name, size and digest; one in memory by its pixels' digest."""
    if not isinstance(source, str | os.PathLike):
        source = as_picture(source)
    if isinstance(source, Image.Image):
        return {"pixels": hashlib.sha256(f"{source.mode} {source.size}".encode() + source.tobytes()).hexdigest()}
    path = Path(source)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest_file(path)}


def _edit(edit: Edit) -> dict[str, Any]:
    extend = None
    if edit.margins is not None:
        extend = ",".join(f"{side}={pixels}" for side, pixels in zip(SIDES, edit.margins, strict=True) if pixels)
    elif edit.extend_to is not None:
        extend = "{}x{}".format(*edit.extend_to)
    return {
        "init_image": describe_picture(edit.init_image),
        "strength": edit.strength,
        "mask": None if edit.mask_image is None else describe_picture(edit.mask_image),
        "mask_blur": edit.mask_blur if edit.mask_image is not None or extend else None,
        "invert_mask": edit.invert_mask,
        "mask_crop": edit.padding_mask_crop,
        "extend": extend,
        "init_reference": edit.init_reference,
    }


def _given(request: Request) -> list[str]:
    """The arrays that a caller gave instead of what a recipe can say."""
    names = ("latents", "prompt_embeds", "callback_on_step_end")
    given = [name for name in names if getattr(request, name) is not None]
    return [*given, "generator"] if request.one_stream else given


def _identity(path: Path) -> dict[str, Any]:
    """Of a model: tiny, a repository of the Hub at a revision, or the folder's or file's name."""
    if path.is_file():
        return {"name": path.name}
    path = Path(os.path.realpath(path))
    if path == TINY_FOLDER:
        return {"id": "tiny"}
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        owner, _, name = path.parent.parent.name.removeprefix("models--").partition("--")
        return {"id": f"{owner}/{name}", "revision": path.name}
    return {"name": path.name}
