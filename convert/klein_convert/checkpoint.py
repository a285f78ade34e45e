"""Any Source -> a folder in our own format, complete or not there at all, with a record of what went in and out."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from klein_convert.destination import checked_destination, publish, require_space, workspace, write_card, write_failure
from klein_convert.writer import Counter, Hashing, Warn, write_bytes, write_json, write_weights
from klein_mlx.config import ONE_STEP, PARTS, TIME_SHIFTS, TINY, VARIANTS, ModelConfig
from klein_mlx.errors import CheckpointError, human_bytes
from klein_mlx.formats.open import open_model, with_variant
from klein_mlx.paths import version
from klein_mlx.weights.bits import Quantize, parse, settle
from klein_mlx.weights.checkpoint import (
    CONFIG_FILE,
    FORMAT_VERSION,
    TOKENIZER_FILE,
    Checkpoint,
    Source,
    expected,
    open_checkpoint,
)
from klein_mlx.weights.quantize import Quantization, quantize_weights
from klein_mlx.weights.safetensors import Weight, condition, load_now, read_json

Progress = Callable[[int, int], None]  # bytes done, bytes in all
_MARGIN = 16 << 20  # for headers, klein.json and the file system itself


@dataclass(frozen=True)
class Plan:
    """What a conversion would do, in bytes: what it reads, what it writes per part, what is free where it writes."""

    source: str
    destination: str
    read: int
    written: dict[str, int]
    free: int
    quantization: dict[str, Quantization]

    def lines(self) -> list[str]:
        """For a person."""
        total = sum(self.written.values())
        told = [
            f"read     {self.source}: {human_bytes(self.read)}",
            f"write    {self.destination}: {human_bytes(total)}",
        ]
        for part, size in self.written.items():
            stored = self.quantization.get(part)
            bits = stored.told() if stored else "not quantized"
            told.append(f"  {part:<12} {human_bytes(size):>10}  {bits}")
        return [*told, f"free     {human_bytes(self.free)}, {human_bytes(total + _MARGIN)} needed"]


def plan_conversion(source: Source, destination: str | Path, *, quantize: Quantize = None, force: bool = False) -> Plan:
    """As `convert_checkpoint`, with every check that it makes before its work; nothing is written."""
    target, parts, quantization, _ = _prepare(source, destination, quantize, force)
    sizes = {part: sum(array.nbytes for array in weights.values()) for part, (weights, _) in parts.items()}
    free = shutil.disk_usage(target.parent).free
    read = sum(path.stat().st_size for path in source.files())
    return Plan(str(source.path), str(destination), read, sizes, free, {**source.quantization, **quantization})


def check_variant(variant: str | None) -> None:
    """CheckpointError for a name that is no variant's."""
    names = (TINY.name, ONE_STEP.name, *(row.name for row in VARIANTS))
    if variant not in (None, *names):
        raise CheckpointError(f"variant is {variant!r:.60}; it must be one of {', '.join(names)}")


def convert_checkpoint(
    source: Source | str | Path,
    destination: str | Path,
    *,
    quantize: Quantize = None,
    force: bool = False,
    variant: str | None = None,
    verify: bool = False,
    progress: Progress | None = None,
    warn: Warn = lambda line: None,
) -> Path:
    """Write a model in our own format; loading the result gives the same weights, bit for bit, as loading the source.

    quantize: bits for the linear layers of the transformer's and the encoder's blocks, or a mapping, a preset, ... (see
    klein_mlx.weights.bits); else dtypes are kept.
    force: replace a checkpoint of ours that is at the destination. variant: "tiny" marks the embedded checkpoint;
    another is what the model is, where its files do not tell.
    verify: read what was written again, and compare it with the source's weights, before it gets its name.
    progress: called with (bytes done, bytes in all), hashing the source and writing the result counted alike.
    warn: called with a line about what is odd, but no fault: a matrix of zeros.
    At most two tensors and their quantized forms are in memory at a time. Returns the destination.
    Raises CheckpointError, and leaves nothing behind, if anything is wrong; NaN or infinity in a weight is.
    """
    if not hasattr(source, "weights"):
        source = open_model(source)  # type: ignore[arg-type]
    model: Source = source  # type: ignore[assignment]
    check_variant(variant)
    if variant not in (None, TINY.name):
        model = with_variant(model, variant)
    target, parts, quantization, written = _prepare(model, destination, quantize, force)
    sources = model.files()
    counter = Counter(written + sum(path.stat().st_size for path in sources), progress)
    try:
        with workspace(target) as folder, Hashing(sources, counter) as hashing:
            stored: dict[str, str] = {}
            for part in PARTS:
                weights, originals = parts.pop(part)
                stored |= write_weights(folder, part, weights, counter, originals, warn)
            digests = {_told_name(path, model.path): digest for path, digest in hashing.digests().items()}
            counter.tell()
            write_bytes(folder / TOKENIZER_FILE, tokenizer := model.tokenizer_file.read_bytes())
            stored[TOKENIZER_FILE] = hashlib.sha256(tokenizer).hexdigest()
            settings = {**_settings(model, quantization, variant, digests), "sha256": stored}
            write_json(folder / CONFIG_FILE, settings)
            write_card(folder, settings, model)
            _check(open_checkpoint(folder), model, quantization, verify)
            publish(folder, target, force)
    except OSError as error:
        raise CheckpointError(write_failure(target, written, error)) from error
    return Path(destination)


def _prepare(
    model: Source, destination: str | Path, quantize: Quantize, force: bool
) -> tuple[Path, dict[str, tuple[dict[str, Weight], dict[str, mx.array]]], dict[str, Quantization], int]:
    """Every check that needs no work: the target, what would be written (see `_weights`), which parts are quantized
    here and how, and the bytes."""
    asked = parse(quantize)
    quantization = settle(asked, model)
    if asked and not quantization:
        raise CheckpointError(f"{model.path}: is quantized already; start from the original")
    target = checked_destination(Path(destination), model.path, force, CONFIG_FILE)
    parts = {part: _weights(model, part, quantization.get(part)) for part in PARTS}
    read_json(model.tokenizer_file)
    written = sum(array.nbytes for weights, _ in parts.values() for array in weights.values())
    require_space(target.parent, written + model.tokenizer_file.stat().st_size + _MARGIN)
    return target, parts, quantization, written


def _check(finished: Checkpoint, model: Source, quantization: dict[str, Quantization], verify: bool) -> None:
    """That what was written opens; and, to verify, that it holds the source's weights, bit for bit."""
    for part in PARTS:
        found = finished.weights(part)  # names, shapes and dtypes; nothing is read
        if not verify:
            continue
        right, _ = _weights(model, part, quantization.get(part))
        for name in list(found):
            left, weight = found.pop(name), load_now(right.pop(name))
            same = mx.array_equal(left, weight, equal_nan=True).item() and left.dtype == weight.dtype
            if not same:
                raise CheckpointError(f"{part}: {name} was not written as it was read: check the disk")
            mx.clear_cache()


def _weights(
    source: Source, part: str, quantization: Quantization | None
) -> tuple[dict[str, Weight], dict[str, mx.array]]:
    """What is to be written, lazily; and of what is quantized here, the original's condition.

    Both hang on the same arrays, and nothing else does: evaluated together, an original is read once and then freed.
    """
    weights = source.weights(part)
    if quantization is None:
        return dict(weights), {}
    quantized = [name for name in weights if name.endswith(".weight") and quantization.of(part, name)]
    arrays = {name: weight for name in quantized if isinstance(weight := weights[name], mx.array)}
    return quantize_weights(part, weights, quantization), {name: condition(a) for name, a in arrays.items()}


def _told_name(path: Path, folder: Path) -> str:
    """A source file's name for the record: inside its folder, or alone."""
    return str(path.relative_to(folder)) if path != folder and path.is_relative_to(folder) else path.name


def _settings(
    source: Source, quantization: dict[str, Quantization], variant: str | None, digests: dict[str, str]
) -> dict[str, Any]:
    """What klein.json holds."""
    config = source.config
    forced = variant == TINY.name
    stored = {**source.quantization, **quantization}
    return {
        "format_version": FORMAT_VERSION,
        "variant": variant or config.variant.name,
        "is_distilled": config.is_distilled,
        **({"caches_references": True} if config.caches_references else {}),
        **({"time_shift": config.time_shift} if config.time_shift != TIME_SHIFTS[0] else {}),
        "taps": list(config.taps),
        "max_sequence_length": config.max_sequence_length,
        "default_size": config.default_size,
        "quantization": {part: _by_layer(part, config, q).to_dict() for part, q in stored.items()},
        "licence": TINY.licence if forced else source.info.get("licence", config.variant.licence),
        "made_by": f"klein-mlx {version()}",
        **({"calibration": source.info["calibration"]} if "calibration" in source.info else {}),
        "source": {**_origin(source), "sha256": digests},
        "transformer": config.transformer.to_dict(),
        "text_encoder": config.text_encoder.to_dict(),
        "vae": config.vae.to_dict(),
    }


def _by_layer(part: str, config: ModelConfig, quantization: Quantization) -> Quantization:
    """The same, with every layer named: the record does not depend on which layers a later version would choose."""
    paths = [name.removesuffix(".weight") for name in expected(part, config) if name.endswith(".weight")]
    found = {path: quantization.of(part, path) for path in paths}
    return Quantization.of_layers({path: own for path, own in found.items() if own})


def _origin(source: Source) -> dict[str, Any]:
    """Where a source comes from. A checkpoint of ours that is converted again keeps its own origin inside."""
    origin = source.info.get("source", {})
    if source.info.get("format") != "klein_mlx":
        return origin
    return {"name": source.path.resolve().name, "format": "klein_mlx", "source": origin}
