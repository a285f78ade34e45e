"""`klein-mlx doctor --model`: real weights on this machine against what is published of them.

Digests of the files, the architecture, pixels that others' programs made from known noise (`vectors.json`: facts only),
and what fewer bits cost on this machine.
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from klein_mlx.bench.checks import Check, Row, Setting
from klein_mlx.bench.predict import klein
from klein_mlx.config import PARTS
from klein_mlx.errors import CheckpointError
from klein_mlx.formats.describe import verify
from klein_mlx.formats.open import open_model
from klein_mlx.model.sampler import torch_noise
from klein_mlx.pipeline import KleinPipeline
from klein_mlx.weights.checkpoint import Checkpoint, Source
from klein_mlx.weights.safetensors import digest_file

VECTORS = Path(__file__).with_name("vectors.json")
SECTION = "model"
PROMPT = "A small cactus with a happy face in the Sahara desert."
BITS = (8, 4, "mixed-4")
LEAST_PSNR = {8: 30.0, 4: 12.0, "mixed-4": 12.0}  # dB; a picture that has nothing to do with the other one has about 8


def model_checks(model: str) -> list[Check]:
    """The checks of a model on disk. model: as `open_model` takes it. Raises CheckpointError."""
    source = open_model(model, local_files_only=True)
    return [Check(name, SECTION, partial(run, source)) for name, run in RUNS.items()]


def _files(source: Source, setting: Setting) -> Iterator[Row]:
    """Every file's digest: of a checkpoint of ours as it records them, of a download as the Hub named it."""
    remedy = "get the model again: klein-mlx models rm, then models pull"
    if isinstance(source, Checkpoint):
        try:
            yield Row("files", f"{len(verify(source))} files are what the checkpoint's record says", True)
        except CheckpointError as error:
            yield Row("files", str(error), False, "convert or download it again")
        return
    known = [(path, digest) for path in source.files() if (digest := _hub_digest(path))]
    changed = [path.name for path, digest in known if digest_file(path) != digest]
    if changed:
        yield Row("files", f"{len(changed)} of {len(known)} differ from the Hub's: {', '.join(changed)}", False, remedy)
    elif known:
        yield Row("files", f"{len(known)} files have the Hub's digests", True)
    else:
        yield Row("files", "not from the Hub's cache: there are no digests to compare with")


def _hub_digest(path: Path) -> str | None:
    """The Hub's cache names a large file's contents by their sha256, and links to them."""
    name = path.resolve().name
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else None


def _architecture(source: Source, setting: Setting) -> Iterator[Row]:
    """The configs against the published ones, field by field."""
    name = source.config.variant.name
    size = next((size for size in ("4b", "9b", "dev") if size in name), None)
    if size is None:
        yield Row("architecture", f"{name}: nothing is published of its configs")
        return
    ours, theirs = asdict(source.config), asdict(klein(size))
    odd = [
        f"{part}.{key} is {value}, not {theirs[part][key]}"
        for part in PARTS
        for key, value in ours[part].items()
        if value != theirs[part][key] and key not in _FREE
    ]
    remedy = "this is not the published model, or its config.json was changed"
    yield Row("architecture", "; ".join(odd) or f"{name}: as published", not odd, remedy)


_FREE = ("decoder_block_out_channels", "num_hidden_layers")  # a small decoder; an encoder cut behind its last tap


# ---- published vectors ----


def read_vectors(path: Path = VECTORS) -> list[dict[str, Any]]:
    """The table. Each row: variant, prompt, seed, noise_dtype (of torch's CPU generator), width, height, steps,
    length, dtype, corner (the last rows and columns of the last channel, 0..1), tolerance, source."""
    return json.loads(path.read_text())


def _vectors(source: Source, setting: Setting, path: Path = VECTORS) -> Iterator[Row]:
    """Pixels that another program made of the same weights, prompt and noise."""
    name = source.config.variant.name
    rows = [row for row in read_vectors(path) if row["variant"] == name]
    if not rows:
        yield Row("vectors", f"{name}: no pixels are published")
    for row in rows:
        corner, wanted = _corner(source, row), mx.array(row["corner"])
        off = mx.abs(corner - wanted).max().item()
        text = f"{row['source']}: pixels differ by {off:.4f}, at most {row['tolerance']}"
        remedy = "the kernels above, the files and the dtype; then report this"
        figures = {"error": off, "bound": row["tolerance"], "corner": corner.tolist()}
        yield Row("vectors", text, off <= row["tolerance"], remedy, figures)  # type: ignore[operator]


def _corner(source: Source, row: dict[str, Any]) -> mx.array:
    """The corner's pixels as this machine makes them. (rows, columns), 0..1."""
    import numpy as np

    pipe = KleinPipeline(source, dtype=row["dtype"])
    side, dtype = source.config.pixels_per_token, getattr(mx, row["noise_dtype"])
    shape = (1, source.config.transformer.in_channels, row["height"] // side, row["width"] // side)
    latents = np.array(torch_noise(row["seed"], shape, dtype).astype(mx.float32))
    image = pipe(
        row["prompt"],
        width=row["width"],
        height=row["height"],
        num_inference_steps=row["steps"],
        max_sequence_length=row["length"],
        latents=latents,
        output_type="np",
    ).images[0]
    rows, columns = len(row["corner"]), len(row["corner"][0])
    return mx.array(image[-rows:, -columns:, -1])


# ---- bits ----


def _bits(source: Source, setting: Setting) -> Iterator[Row]:
    """One picture of 512 x 512 in the compute dtype and with fewer bits: PSNR between them, seconds of each."""
    if source.quantization:
        yield Row("bits", "the model is quantized already: nothing to compare with")
        return
    side = min(512, source.config.default_size)
    exact, seconds = _picture(source, setting, None, side)
    name = str(setting.dtype).removeprefix("mlx.core.")
    yield Row("bits", f"{name}, {side} x {side}: {seconds:.1f} s", None, "", {"bits": name, "seconds": seconds})
    for bits in BITS:
        words = f"{bits}{' bits' if isinstance(bits, int) else ''}"
        try:
            image, seconds = _picture(source, setting, bits, side)
        except CheckpointError as error:  # layers of a width that cannot be quantized so
            yield Row("bits", f"{words}: {error}")
            continue
        decibels = psnr(image, exact)
        text = f"{words}: {decibels:.1f} dB to {name}, {seconds:.1f} s"
        figures = {"bits": bits, "psnr": round(decibels, 2), "seconds": round(seconds, 2)}
        remedy = "see the quantized checks above; take more bits"
        yield Row("bits", text, decibels >= LEAST_PSNR[bits], remedy, figures)


def _picture(source: Source, setting: Setting, bits: Any, side: int) -> tuple[mx.array, float]:
    """(pixels 0..1, seconds with loading)."""
    start = time.perf_counter()
    pipe = KleinPipeline(source, quantize=bits, dtype=setting.dtype, keep="nothing")
    image = pipe(PROMPT, width=side, height=side, seed=0, output_type="np").images[0]
    return mx.array(image), time.perf_counter() - start


def psnr(image: mx.array, other: mx.array) -> float:
    """In dB, of pixels in 0..1; infinite where they are equal."""
    square = mx.mean(mx.square(image - other)).item()
    return math.inf if square == 0 else -10 * math.log10(square)  # type: ignore[arg-type]


RUNS: dict[str, Callable[[Source, Setting], Iterator[Row]]] = {
    "files": _files,
    "architecture": _architecture,
    "vectors": _vectors,
    "bits": _bits,
}
