"""A request's pictures, opened: the references as the model takes them, the init image's canvas, the picture's size."""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from PIL import Image

from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.images import reading as images
from klein_mlx.images.masks import Canvas, make_canvas
from klein_mlx.images.reading import LARGE_REFERENCE_AREA, REFERENCE_AREA, load_image, prepare_reference
from klein_mlx.model.latents import to_channels_first, unpatchify
from klein_mlx.model.vae import VAE
from klein_mlx.model.vae_layers import Done
from klein_mlx.request import Request, check_area, check_side
from klein_mlx.runtime.encodings import to_numpy


@dataclass(frozen=True)
class Opened:
    """references: RGB, sides multiples of a token, in the order of their positions. canvas: of the init image, or None.
    height, width: at which is painted, in pixels. notes: what was scaled or cropped, a line each.
    """

    references: list[Image.Image]
    canvas: Canvas | None
    height: int
    width: int
    notes: list[str]


def open_pictures(request: Request, multiple: int, default_size: int) -> Opened:
    """Read every picture of a request, and decide the size.

    multiple: pixels per token (16). default_size: of a side when no picture and no size are given.
    Raises RequestError for a file that is no picture, or that does not suit.
    """
    notes: list[str] = []
    sources, references = list(request.images), []
    canvas = None
    if request.edit is not None:
        picture, canvas = _open_canvas(request, multiple, notes)
        if request.edit.init_reference and request.edit.extends:
            sources.insert(0, picture)  # itself, not its border of repeated pixels
        elif request.edit.init_reference:
            references.append(canvas.image)
    area = LARGE_REFERENCE_AREA if request.large_reference else REFERENCE_AREA
    for source in sources:
        image, told = load_image(source)
        image, note = prepare_reference(image, multiple, area)
        references.append(image)
        notes += [*told, *([note] if note else [])]
    if canvas is not None:
        first = canvas.image.size
    else:
        first = references[0].size if references else (default_size, default_size)
    width, height = request.width or first[0], request.height or first[1]
    check_side("width", width, multiple)
    check_side("height", height, multiple)
    check_area(width, height)
    if request.latents is not None and tuple(request.latents.shape[2:]) != (height // multiple, width // multiple):
        raise RequestError(
            f"latents has shape {tuple(request.latents.shape)}; for {width} x {height} pixels its last two must be "
            f"{height // multiple}, {width // multiple}"
        )
    return Opened(references, canvas, height, width, notes)


def _open_canvas(request: Request, multiple: int, notes: list[str]) -> tuple[Image.Image, Canvas]:
    """The init image as it is in its file, and its canvas."""
    edit = request.edit
    assert edit is not None
    picture, told = load_image(edit.init_image, "init_image")
    notes += told
    mask = None
    if edit.mask_image is not None:
        mask, told = load_image(edit.mask_image, "mask_image")
        notes += told
    canvas, told = make_canvas(edit, picture, mask, (request.width, request.height), multiple)
    notes += told
    return picture, canvas


def decode(
    vae: VAE, latents: mx.array, output_type: str, canvas: Canvas | None = None, done: Done | None = None
) -> Any:
    """One picture of its latents (1, h, w, C).

    output_type: "pil", "np" ((H, W, 3) float32 in 0..1) or "latent" (denormalised, (latent channels, H/8, W/8)).
    canvas: of an edit; what it keeps of the init image is pasted back. done: called after each layer.
    Raises CheckpointError if latents or pixels are not finite, or if all pixels have one value.
    """
    if not mx.isfinite(latents).all().item():
        raise CheckpointError("the picture came out as NaN or infinity: the model's weights are damaged")
    z = unpatchify(vae.denormalize(latents))
    if output_type == "latent":
        z = to_channels_first(z)[0]
        mx.eval(z)
        return z
    side = vae.config.scale_factor
    pixels = vae.decode(z, vae.strip_rows(side * z.shape[1], side * z.shape[2]), done)[0]
    mx.eval(pixels)
    _check_pixels(pixels)
    if canvas is None or canvas.opacity is None:
        return images.to_image(pixels) if output_type == "pil" else to_numpy(images.to_unit(pixels))
    image = canvas.paste(images.to_image(pixels))
    return image if output_type == "pil" else to_numpy(image).astype("float32") / 255


def _check_pixels(pixels: mx.array) -> None:
    lowest, highest = pixels.min(), pixels.max()
    mx.eval(lowest, highest)
    if not math.isfinite(lowest.item()) or not math.isfinite(highest.item()):  # type: ignore[arg-type]
        raise CheckpointError("the picture was decoded to NaN or infinity: the VAE's weights are damaged")
    if lowest.item() == highest.item():
        raise CheckpointError(
            f"all of the picture's numbers are {lowest.item():g}: the VAE's weights are damaged, or not this model's"
        )
