"""A request's pictures, opened: the references as the model takes them, the init image's canvas, the picture's size.

And sketches: latents seen without the VAE, by a linear map from a latent's channels to its color, fitted by least
squares to decoded pictures; a pixel for each of the VAE's latents. The embedded checkpoint's map is in the package
(`examples/tiny/fit_sketch.py` made it), other maps are kept in a folder by the digest of their VAE.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from PIL import Image

from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.images.masks import Canvas, make_canvas
from klein_mlx.images.reading import LARGE_REFERENCE_AREA, REFERENCE_AREA, load_image, prepare_reference
from klein_mlx.model.layers import Done
from klein_mlx.model.sampler import to_channels_first, unpatchify
from klein_mlx.model.vae import VAE
from klein_mlx.paths import keep_json
from klein_mlx.request import Request, check_area, check_side
from klein_mlx.weights.checkpoint import Source

if TYPE_CHECKING:
    import numpy as np


# ---- arrays and pictures ----


def to_array(what: str, values: Any) -> mx.array:
    """An MLX, numpy or torch array of finite real numbers as an mx.array; RequestError for any other."""
    try:
        if hasattr(values, "detach"):  # torch, whose bfloat16 numpy does not know
            values = values.detach().float().cpu().numpy()
        array = values if isinstance(values, mx.array) else mx.array(to_numpy(values))
    except (TypeError, ValueError, RuntimeError):
        array = mx.array(True)
    if not mx.issubdtype(array.dtype, mx.floating) or not mx.isfinite(array).all().item():
        raise RequestError(f"{what} holds something else than finite real numbers; it must be an array of floats")
    return array


def to_numpy(values: Any) -> "np.ndarray":
    import numpy as np

    return np.array(values)


def to_pixels(image: Image.Image) -> mx.array:
    """RGB image -> (1, H, W, 3) float32 in [-1, 1]."""
    import numpy as np

    return mx.array(np.asarray(image, dtype=np.float32))[None] / 127.5 - 1.0


def to_unit(pixels: mx.array) -> mx.array:
    """Pixels about [-1, 1] -> the same shape in float32, clipped to [0, 1]."""
    return mx.clip(pixels.astype(mx.float32) / 2 + 0.5, 0.0, 1.0)


def to_image(pixels: mx.array) -> Image.Image:
    """(H, W, 3) about [-1, 1] -> an 8-bit RGB image, rounded to nearest."""
    import numpy as np

    return Image.fromarray(np.array(mx.round(to_unit(pixels) * 255).astype(mx.uint8)))


# ---- opening and decoding ----


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

    output_type: "pil", "np" ((H, W, 3) float32 in 0..1) or "latent" (denormalized, (latent channels, H/8, W/8)).
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
        return to_image(pixels) if output_type == "pil" else to_numpy(to_unit(pixels))
    image = canvas.paste(to_image(pixels))
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


# ---- sketches of unfinished latents ----

Map = list[list[float]]  # (latent channels + 1, 3): a row of red, green, blue in -1..1 per channel, the constant last

PACKAGED = Path(__file__).parents[1] / "tiny" / "sketch.json"
_RIDGE = 1e-3  # of the samples' number: what a channel of variance 1 is held back by
_END = 1 << 16  # bytes at each end of a file that a digest reads


def draw(latents: mx.array, colours: Map) -> Image.Image:
    """latents: (1, h, w, C), free of noise. Returns an RGB image of 2w x 2h pixels."""
    import numpy as np

    values = _samples(latents) @ np.array(colours)
    pixels = np.clip(np.round((values + 1) * 127.5), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels.reshape(2 * latents.shape[1], 2 * latents.shape[2], 3))


def fit(pairs: Sequence[tuple[mx.array, Image.Image]]) -> Map:
    """The map that comes closest to these pictures. Each: latents (1, h, w, C), and the RGB image decoded from them."""
    import numpy as np

    inputs = np.concatenate([_samples(latents) for latents, _ in pairs])
    targets = []
    for latents, image in pairs:
        small = image.resize((2 * latents.shape[2], 2 * latents.shape[1]), Image.Resampling.BOX)
        targets.append(np.asarray(small, dtype=np.float64).reshape(-1, 3) / 127.5 - 1)
    held = _RIDGE * len(inputs) * np.eye(inputs.shape[1])
    held[-1, -1] = 0  # not the constant
    solved = np.linalg.solve(inputs.T @ inputs + held, inputs.T @ np.concatenate(targets))
    return [[round(float(value), 6) for value in row] for row in solved]


def _samples(latents: mx.array) -> "np.ndarray":
    """(1, h, w, 4C) -> (4hw, C + 1) float64, a row per latent of the VAE, with a 1 at the end."""
    import numpy as np

    z = np.array(unpatchify(latents.astype(mx.float32)), dtype=np.float64)
    flat = z.reshape(-1, z.shape[-1])
    return np.concatenate([flat, np.ones((len(flat), 1))], axis=1)


# ---- maps that are kept ----


def vae_digest(source: Source) -> str:
    """Which VAE a model has: a sha256 over its files' sizes and ends, which are read in a millisecond."""
    digest = hashlib.sha256()
    for path in sorted(set(source.files(["vae"])) - set(source.files([]))):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(size.to_bytes(8, "little") + file.read(_END))
            file.seek(max(0, size - _END))
            digest.update(file.read(_END))
    return digest.hexdigest()


def find_map(digest: str, folder: Path | None) -> Map | None:
    """The map of the VAE of this digest: the package's own, or from a folder of maps; None if there is none."""
    for path in (PACKAGED, *([folder / f"{digest}.json"] if folder else [])):
        try:
            stored = json.loads(path.read_text())
            if stored["vae"] == digest:
                return [[float(value) for value in row] for row in stored["colours"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # absent, or of another version: it will be fitted again
    return None


class Sketcher:
    """Draws sketches with one model's map, and learns the map from its first picture if none is known.

    folder: of maps, or None to keep none.
    """

    def __init__(self, source: Source, folder: Path | None):
        self.folder = folder
        try:
            self.digest: str | None = vae_digest(source)
        except (OSError, CheckpointError):
            self.digest = None
        self.colours = find_map(self.digest, folder) if self.digest else None

    def draw(self, latents: mx.array) -> Image.Image | None:
        """None while no map is known, or where it does not fit."""
        if self.colours is None or len(self.colours) != latents.shape[-1] // 4 + 1:
            return None
        return draw(latents, self.colours)

    def learn(self, latents: mx.array, image: Image.Image) -> None:
        """Fit the map, unless one is known."""
        if self.colours is not None:
            return
        self.colours = fit([(latents, image)])
        if self.folder and self.digest:  # one that cannot be written to is no error
            keep_json(self.folder / f"{self.digest}.json", {"vae": self.digest, "colours": self.colours})
