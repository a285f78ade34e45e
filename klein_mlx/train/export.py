"""What was trained as files that other programs read: LoRA files in two layouts, and a checkpoint of a full training.

alpha is folded into the factors, so that every program applies them at strength 1. Source: the facts of which reader
wants what were measured with diffusers 0.42 and PEFT 0.21.
"""

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from klein_mlx.config import PARTS, TINY, ModelConfig
from klein_mlx.errors import RequestError
from klein_mlx.formats.names import BFL, DIFFUSERS, HALVES, SAME, THIRDS, their_name
from klein_mlx.paths import version
from klein_mlx.train.adapters import Trainables, Weights, dense
from klein_mlx.weights.checkpoint import CONFIG_FILE, FORMAT_VERSION, TOKENIZER_FILE, Source
from klein_mlx.weights.safetensors import load_now

_SHARD = 1 << 30  # bytes, which MLX has in memory until a file is written


@dataclass(frozen=True)
class Origin:
    """What a file says of how it was made."""

    title: str
    base: str
    licence: str
    trigger: str | None
    steps: int
    pictures: int

    def metadata(self) -> dict[str, str]:
        told = {
            "format": "pt",
            "modelspec.title": self.title,
            "modelspec.license": self.licence,
            "modelspec.description": f"{self.steps} updates on {self.pictures} pictures",
            "ss_base_model_version": self.base,
            "software": f"klein-mlx {version()}",
            "steps": str(self.steps),
            "pictures": str(self.pictures),
        }
        return told | ({"modelspec.trigger_phrase": self.trigger} if self.trigger else {})


def origin_of(config: ModelConfig, title: str, trigger: str | None, steps: int, pictures: int) -> Origin:
    """base: the variant's hub id, or its name; licence: that of the base, which the result inherits."""
    variant = config.variant
    return Origin(title, variant.hub_id or variant.name, variant.licence, trigger, steps, pictures)


def lora_tensors(
    trainables: Trainables, weights: Mapping[str, mx.array], layout: str
) -> tuple[Weights, dict[str, str]]:
    """A LoRA's tensors in bfloat16 and the metadata that belong to the layout: "diffusers" or "comfy"."""
    factors = {
        path: (weights[f"{path}.up"], weights[f"{path}.down"], weights.get(f"{path}.magnitude"))
        for path in sorted(trainables.adapters)
    }
    return _diffusers(factors) if layout == "diffusers" else _comfy(factors, trainables)


_Factors = dict[str, tuple[mx.array, mx.array, mx.array | None]]


def _diffusers(factors: _Factors) -> tuple[Weights, dict[str, str]]:
    tensors: Weights = {}
    names, rank, dora = [], 0, False
    for path, (up, down, magnitude) in factors.items():
        theirs, layout = their_name("transformer", DIFFUSERS, f"{path}.weight")
        name = theirs.removesuffix(".weight")
        if layout == HALVES:
            up, magnitude = _swapped(up), None if magnitude is None else _swapped(magnitude)
        tensors[f"transformer.{name}.lora_A.weight"] = down
        tensors[f"transformer.{name}.lora_B.weight"] = up
        if magnitude is not None:
            tensors[f"transformer.{name}.lora_magnitude_vector"] = magnitude
            dora = True
        names.append(name)
        rank = down.shape[0]
    if dora:  # diffusers takes a DoRA's settings from its keys, and fails where they are stated too
        return _narrow(tensors), {}
    told = {"r": rank, "lora_alpha": rank, "target_modules": names}
    adapter = {f"transformer.{key}": value for key, value in told.items()}
    return _narrow(tensors), {"lora_adapter_metadata": json.dumps(adapter, sort_keys=True)}


def _comfy(factors: _Factors, trainables: Trainables) -> tuple[Weights, dict[str, str]]:
    """BFL's names: q, k and v of a stream are one matrix, so their factors stand block by block in one of rank 3 r."""
    tensors: Weights = {}
    fused: dict[str, dict[int, str]] = {}
    for path, (up, down, magnitude) in factors.items():
        theirs, layout = their_name("transformer", BFL, f"{path}.weight")
        name = f"diffusion_model.{theirs.removesuffix('.weight')}"
        if layout in THIRDS:
            fused.setdefault(name, {})[THIRDS.index(layout)] = path
        elif layout == HALVES:
            _put(tensors, name, _swapped(up), down, None if magnitude is None else _swapped(magnitude))
        else:
            assert layout == SAME, layout
            _put(tensors, name, up, down, magnitude)
    for name, thirds in fused.items():
        ups, downs, magnitudes = [], [], []
        some = next(iter(thirds.values()))
        out, rank = factors[some][0].shape
        inputs = factors[some][1].shape[1]
        for third in range(3):
            zeros = mx.zeros((out, rank)), mx.zeros((rank, inputs)), None
            up, down, magnitude = factors[thirds[third]] if third in thirds else zeros
            ups.append(mx.concatenate([up if k == third else mx.zeros((out, rank)) for k in range(3)], axis=1))
            downs.append(down)
            magnitudes.append(magnitude)
        if any(one is None for one in magnitudes) and not all(one is None for one in magnitudes):
            raise RequestError("format comfy holds q, k and v in one matrix, so DoRA needs all three as targets")
        whole = None if magnitudes[0] is None else mx.concatenate([m for m in magnitudes if m is not None])
        _put(tensors, name, mx.concatenate(ups), mx.concatenate(downs), whole)
    return _narrow(tensors), {}


def _put(tensors: Weights, name: str, up: mx.array, down: mx.array, magnitude: mx.array | None) -> None:
    tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down, up
    if magnitude is not None:
        tensors[f"{name}.dora_scale"] = magnitude[:, None]


def _swapped(array: mx.array) -> mx.array:
    first, second = mx.split(array, 2, axis=0)
    return mx.concatenate([second, first], axis=0)


def _narrow(tensors: Weights) -> Weights:
    return {name: array.astype(mx.bfloat16) for name, array in tensors.items()}


# ---- files ----


def save_tensors(path: Path, tensors: Weights, metadata: Mapping[str, str]) -> None:
    """Written beside, flushed, renamed. Raises RequestError for what the disk refuses."""
    beside = path.with_name(f".{secrets.token_hex(8)}.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(beside), tensors, dict(metadata))
        flush(beside)
        beside.replace(path)
    except (OSError, RuntimeError) as error:
        words = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RequestError(f"{path} cannot be written: {words}") from None
    finally:
        beside.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the disk hold a file, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lora_files(output: Path, layout: str) -> dict[str, Path]:
    """Layout -> file of a LoRA called `output`."""
    if layout == "both":
        return {"diffusers": output, "comfy": output.with_name(f"{output.stem}.comfy.safetensors")}
    return {layout: output}


def save_lora(
    output: Path, trainables: Trainables, weights: Mapping[str, mx.array], layout: str, origin: Origin
) -> list[Path]:
    """Write a LoRA in one layout or both; returns the files."""
    files = lora_files(output, layout)
    for one, path in files.items():
        tensors, more = lora_tensors(trainables, weights, one)
        save_tensors(path, tensors, {**origin.metadata(), **more})
    return list(files.values())


def save_checkpoint(folder: Path, source: Source, weights: Mapping[str, mx.array], origin: Origin) -> Path:
    """Write a model in the product's own format: the trained transformer, all else as in the source."""
    beside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    config = source.config
    settings = {
        "format_version": FORMAT_VERSION,
        "variant": config.variant.name if config.variant is TINY else None,
        "is_distilled": config.is_distilled,
        "taps": list(config.taps),
        "max_sequence_length": config.max_sequence_length,
        "default_size": config.default_size,
        "caches_references": config.caches_references,
        "quantization": {p: q.to_dict() for p, q in source.quantization.items() if p != "transformer"},
        **{part: getattr(config, part).to_dict() for part in PARTS},
        "licence": origin.licence,
        "made_by": f"klein-mlx {version()} train: {origin.steps} updates on {origin.pictures} pictures",
        "source": {"name": origin.base},
    }
    try:
        beside.mkdir(parents=True)
        for part in PARTS:
            _save_part(beside, part, source, dict(weights) if part == "transformer" else None)
        shutil.copyfile(source.tokenizer_file, beside / TOKENIZER_FILE)
        (beside / CONFIG_FILE).write_text(json.dumps({k: v for k, v in settings.items() if v is not None}, indent=2))
        for path in beside.iterdir():
            flush(path)
        beside.rename(folder)
    except (OSError, RuntimeError) as error:
        words = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RequestError(f"{folder} cannot be written: {words}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _save_part(folder: Path, part: str, source: Source, weights: Weights | None) -> None:
    """One file, or shards of at most 1 GiB with an index. weights: instead of the source's; left empty."""
    arrays = dict(source.weights(part)) if weights is None else weights
    shards: list[list[str]] = [[]]
    size = 0
    for name, array in arrays.items():
        if shards[-1] and size + array.nbytes > _SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += array.nbytes
    weight_map = {}
    for number, names in enumerate(shards, 1):
        end = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"{part}{end}.safetensors"
        mx.save_safetensors(str(folder / file), {name: load_now(arrays.pop(name)) for name in names}, {"format": "mlx"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        (folder / f"{part}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def merged(trainables: Trainables, path: str, weights: Mapping[str, mx.array]) -> mx.array:
    """What a layer with its adapter is as one matrix, float32."""
    base = dense(trainables.adapters[path].base)
    whole = base + weights[f"{path}.up"] @ weights[f"{path}.down"]
    magnitude = weights.get(f"{path}.magnitude")
    if magnitude is None:
        return whole
    return whole * (magnitude / mx.linalg.norm(whole, axis=1))[:, None]
