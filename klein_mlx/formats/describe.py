"""What a model is, told from its configs and headers: nothing is evaluated, so it costs milliseconds at any size."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from klein_mlx.config import PARTS
from klein_mlx.errors import CheckpointError, human_bytes
from klein_mlx.formats.lora import LoraFile, open_lora, tell_encoder
from klein_mlx.formats.lora_factors import stated_alpha
from klein_mlx.formats.lora_metadata import told
from klein_mlx.formats.part import PartFile
from klein_mlx.weights.checkpoint import CONFIG_FILE, Checkpoint, Source
from klein_mlx.weights.quantize import Quantization
from klein_mlx.weights.safetensors import FLOATS, Weight, digest_file, read_json


def describe(source: Source | PartFile) -> dict[str, Any]:
    """A model as plain JSON values: variant, defaults, origin, licence; and per part parameters, bytes, dtype, bits.

    parameters: as before quantization. dtype: of the floating weights. stored: whose names, in which kind of file, of
    parts that are files of their own. bits: of most quantized layers, else None; quantization: in words. Only what is
    loaded counts: the encoder's layers above the last tap do not. Of a part alone: what it is, in whose names, its
    sizes, and the variants that it fits.
    """
    if isinstance(source, PartFile):
        return _describe_part(source)
    config, variant = source.config, source.config.variant
    parts = {part: _part(source.weights(part), source.quantization.get(part)) for part in PARTS}
    for part, file in getattr(source, "parts", {}).items():
        parts[part]["stored"] = file.format
    return {
        "variant": variant.name,
        "family": variant.family,
        "path": str(source.path),
        "format": source.info.get("format"),
        "source": source.info.get("source", {}).get("name"),
        "licence": source.info.get("licence", variant.licence),
        "made_by": source.info.get("made_by"),
        "is_distilled": config.is_distilled,
        "steps": variant.steps,
        "guidance": variant.guidance,
        "default_size": config.default_size,
        "max_sequence_length": config.max_sequence_length,
        "taps": list(config.taps),
        "notes": list(source.info.get("notes", ())),
        "parts": parts,
        "parameters": sum(part["parameters"] for part in parts.values()),
        "bytes": sum(part["bytes"] for part in parts.values()),
    }


def _describe_part(file: PartFile) -> dict[str, Any]:
    floats = [name for name, entry in file.tensors.entries.items() if entry.dtype in FLOATS]
    layers = file.settings()
    sizes = {name: math.prod(entry.shape) for name, entry in file.tensors.entries.items()}
    parameters = sum(sizes[name] for name in floats if name.rpartition(".")[0] not in layers)
    rows = {path: file.tensors.entries[f"{path}.weight"].shape[0] for path in layers}
    parameters += sum(rows[path] * width for path, (width, _) in layers.items())
    known = {path: settings for path, (_, settings) in layers.items() if settings}
    sources = {path.name: path.stat().st_size for path in file.tensors.files}
    config = file.config.to_dict()
    return {
        "path": str(file.path),
        "part": file.part,
        "format": file.format,
        "fits": file.fits,
        "variants": file.variants,
        "parameters": parameters,
        "bytes": sum(sources.values()),
        "dtype": " and ".join(sorted({file.tensors.entries[name].dtype for name in floats})),
        "quantized_layers": len(layers),
        "quantization": Quantization.of_layers(known).told() if known else None,
        "config": config,
        "metadata": {key: value[:200] for key, value in file.tensors.metadata.items() if key != "format"},
    }


def _format_part(d: dict[str, Any]) -> str:
    option = d["part"].replace("_", "-")
    fits = f", of {d['fits']}" if d["variants"] else ""
    lines = [
        f"{d['part']} alone{fits}",
        f"  path     {d['path']} ({d['format']})",
        f"  holds    {_count(d['parameters'])} parameters, {_bytes(d['bytes'])}, {d['dtype']}"
        + (f", {d['quantized_layers']} layers quantized by MLX: {d['quantization']}" if d["quantized_layers"] else ""),
        f"  use      --{option} {d['path']}, with a whole model for the rest",
    ]
    told = [f"  {key[:40]:<8} {value[:100]}" for key, value in d["metadata"].items() if value.isprintable()]
    return "\n".join([*lines, *told[:8]])


def _part(weights: Mapping[str, Weight], quantization: Quantization | None) -> dict[str, Any]:
    parameters = 0
    for name, array in weights.items():
        path, _, kind = name.rpartition(".")
        if f"{path}.scales" not in weights:
            parameters += array.size
        elif quantization and kind == "weight" and (own := (quantization.layers or {}).get(path, quantization)):
            parameters += array.size * 32 // own.bits
    dtypes = {str(a.dtype).removeprefix("mlx.core.") for a in weights.values() if mx.issubdtype(a.dtype, mx.floating)}
    return {
        "parameters": parameters,
        "bytes": sum(array.nbytes for array in weights.values()),
        "dtype": " and ".join(sorted(dtypes)),
        "bits": quantization.bits if quantization else None,
        "group_size": quantization.group_size if quantization else None,
        "quantization": quantization.told() if quantization else None,
    }


def heading(family: str, name: str, is_distilled: bool, steps: int, guidance: float) -> str:
    """The first line of a model's description."""
    kind = "" if name == "distilled" else f" ({'distilled' if is_distilled else 'not distilled'})"
    return f"{family}, variant {name}{kind}: {steps} steps, guidance {guidance:g}"


def memory_line(m: Mapping[str, Any]) -> str:
    """The estimate of a picture, as one line of `format_description`."""
    phases = ", ".join(f"{phase} {human_bytes(count)}" for phase, count in m["phases"].items())
    outlook = "fits" if m["fits"] else "does not fit"
    return (
        f"  memory   {m['width']} x {m['height']} in {m['dtype']}, keep {m['keep']}: {phases}; "
        f"{outlook} in {human_bytes(m['machine'])}"
    )


def format_description(description: dict[str, Any]) -> str:
    """What `describe` returned, as lines for a person."""
    d = description
    if "part" in d:
        return _format_part(d)
    lines = [
        heading(d["family"], d["variant"], d["is_distilled"], d["steps"], d["guidance"]),
        f"  folder   {d['path']} ({d['format']} format)",
        f"  source   {d['source'] or 'not stated'}",
        f"  license  {d['licence']}",
        f"  default  {d['default_size']} x {d['default_size']} pixels, {d['max_sequence_length']} text positions, "
        f"encoder layers {', '.join(str(tap) for tap in d['taps'])}",
    ]
    for name, part in (*d["parts"].items(), ("total", {**d, "dtype": "", "bits": None})):
        weights = part["dtype"]
        if part["bits"]:
            weights = f"{part['quantization']}, the rest {weights}"
        if "stored" in part:
            weights += f" ({part['stored']})"
        size = f"{_count(part['parameters']):>9} parameters {_bytes(part['bytes']):>9}"
        lines.append(f"  {name:<12} {size}  {weights}".rstrip())
    if "memory" in d:
        lines.append(memory_line(d["memory"]))
    lines += [f"  note     {note}" for note in d["notes"]]
    if "verified" in d:
        lines.append(f"  verified {len(d['verified'])} files have the sha256 that was recorded when they were written")
    return "\n".join(lines)


def _count(number: int) -> str:
    return _scaled(number, (("", 1), (" k", 10**3), (" M", 10**6), (" B", 10**9)))


def _bytes(number: int) -> str:
    return _scaled(number, ((" B", 1), (" kB", 10**3), (" MB", 10**6), (" GB", 10**9)))


def _scaled(number: int, units: tuple[tuple[str, int], ...]) -> str:
    unit, size = max((u for u in units if number >= u[1]), key=lambda u: u[1], default=units[0])
    return f"{number}{unit}" if size == 1 else f"{number / size:.2f}{unit}"


def describe_lora(path: Path) -> dict[str, Any]:
    """A LoRA as plain JSON values. Reads its header and the alphas, nothing else. Raises CheckpointError."""
    file = open_lora(path)
    places = file.places.values()
    parts = Counter(place.part for place in places)
    sizes = [math.prod(entry.shape) for entry in file.entries.values()]
    found: dict[str, Any] = {
        "path": str(path),
        "sha256": digest_file(path),
        "bytes": path.stat().st_size,
        "parameters": sum(sizes),
        "dtype": " and ".join(sorted({entry.dtype for entry in file.entries.values() if entry.shape})),
        "base": file.base.words() if parts["transformer"] or file.homeless else None,
        "text_encoder": tell_encoder(file.shapes("text_encoder")) if parts["text_encoder"] else None,
        "layout": file.layout,
        "kinds": list(file.kinds),
        "ranks": {str(rank): count for rank, count in file.ranks.items()},
        "alphas": _alphas(file),
        "modules": dict(parts),
        "unknown_keys": [*file.unknown, *(key for name in file.homeless for key in file.groups[name].values())],
    }
    if file.stated:
        found["stated_base"] = file.stated
    if file.contradiction:
        found["contradiction"] = file.contradiction
    return found | told(file.metadata)


def _alphas(file: LoraFile) -> dict[str, int]:
    """alpha -> of how many modules; "none" where nothing is stated, and the strength is 1."""
    arrays: dict[str, mx.array] = {}
    if any("alpha" in roles for roles in file.groups.values()):
        arrays = file.arrays()
    found: Counter[str] = Counter()
    for name, place in file.places.items():
        stated = file.strengths.of(place.part, place.name)
        alpha = stated_alpha(file.group(name, arrays), stated)
        found["none" if alpha is None else f"{alpha:g}{' by root' if stated.by_root else ''}"] += 1
    return dict(found)


def format_lora(d: dict[str, Any]) -> str:
    """What `describe_lora` returned, as lines for a person."""
    modules = ", ".join(f"{count} of the {part.replace('_', ' ')}" for part, count in d["modules"].items()) or "none"
    ranks = ", ".join(f"{rank} ({count} modules)" for rank, count in d["ranks"].items()) or "none"
    alphas = ", ".join(f"{alpha} ({count} modules)" for alpha, count in d["alphas"].items()) or "none"
    lines = [
        f"{' and '.join(d['kinds'])} for {d['base'] or d['text_encoder'] or 'nothing that klein_mlx knows'}",
        f"  path     {d['path']}, {d['bytes'] / 1e6:.2f} MB, {d['dtype']}",
        f"  layout   {d['layout']}",
        f"  rank     {ranks}",
        f"  alpha    {alphas}",
        f"  modules  {modules}",
    ]
    if d["text_encoder"] and d["base"]:
        lines.append(f"  encoder  {d['text_encoder']}")
    if "stated_base" in d:
        lines.append(f"  states   {d['stated_base']}")
    if "contradiction" in d:
        lines.append(f"  beware   {d['contradiction']}")
    if d["unknown_keys"]:
        lines.append(f"  unknown  {len(d['unknown_keys'])} keys, {d['unknown_keys'][0][:100]} ...")
    lines.append(f"  license  {d.get('licence', 'not stated')}")
    lines.append(f"  trigger  {', '.join(d.get('trigger_words', ())) or 'not stated'}")
    for name in ("title", "author", "trained_on", "description"):
        if name in d:
            lines.append(f"  {name.replace('_', ' '):<8} {d[name]}")
    return "\n".join([*lines, f"  sha256   {d['sha256']}"])


def verify(source: Source | PartFile) -> list[str]:
    """Read every file of a checkpoint of ours, and compare. Returns the names that were compared.

    Raises CheckpointError for a file that has changed, is missing from the record, or for a model without a record.
    """
    record = read_json(source.path / CONFIG_FILE).get("sha256") if isinstance(source, Checkpoint) else None
    if not isinstance(source, Checkpoint) or not isinstance(record, dict) or not record:
        raise CheckpointError(f"{source.path}: holds no record of its files; convert it to have one")
    files = {path.name: path for path in source.files() if path.name != CONFIG_FILE}
    if odd := sorted(files.keys() - record.keys()):
        raise CheckpointError(f"{files[odd[0]]}: is not in the record of {CONFIG_FILE}; convert again")
    for name in record:
        path = source.path / str(name)
        if path.name != name:
            raise CheckpointError(f"{source.path / CONFIG_FILE}: records {name!r}; it must be a file beside it")
        if digest_file(path) != record[name]:
            raise CheckpointError(f"{path}: has changed since it was written; convert or download it again")
    return sorted(record)
