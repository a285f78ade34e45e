"""Sketches: a picture's latents seen without the VAE, by a linear map from a latent's channels to its colour.

The map is fitted by least squares to one decoded picture or more; a sketch has a pixel for each of the VAE's latents,
an eighth of the picture's side for klein. The embedded checkpoint's map is in the package
(`examples/tiny/fit_sketch.py` made it), other maps are kept in a folder by the digest of their VAE.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
from PIL import Image

from klein_mlx.errors import CheckpointError
from klein_mlx.model.latents import unpatchify
from klein_mlx.weights.checkpoint import Source

if TYPE_CHECKING:
    import numpy as np

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


def keep_map(digest: str, colours: Map, folder: Path) -> None:
    """Write a map beside its place, then put it there; a folder that cannot be written to is no error."""
    beside = folder / f".{secrets.token_hex(8)}.part"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_text(json.dumps({"vae": digest, "colours": colours}))
            os.replace(beside, folder / f"{digest}.json")
        finally:
            beside.unlink(missing_ok=True)


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
        if self.folder and self.digest:
            keep_map(self.digest, self.colours, self.folder)
