"""What a model is, told from its configs and headers: nothing is evaluated, so it costs milliseconds at any size."""

from typing import Any

import mlx.core as mx

from klein_mlx.checkpoint import Source
from klein_mlx.config import PARTS
from klein_mlx.quantize import Quantization


def describe(source: Source) -> dict[str, Any]:
    """A model as plain JSON values: variant, defaults, origin, licence; and per part parameters, bytes, dtype, bits.

    parameters: as before quantisation. dtype: of the floating weights. bits: 4 or 8 if the part is quantised, else
    None. Only what is loaded counts: the encoder's layers above the last tap do not.
    """
    config, variant = source.config, source.config.variant
    parts = {part: _part(source.weights(part), source.quantization.get(part)) for part in PARTS}
    return {
        "variant": variant.name,
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
        "parts": parts,
        "parameters": sum(part["parameters"] for part in parts.values()),
        "bytes": sum(part["bytes"] for part in parts.values()),
    }


def _part(weights: dict[str, mx.array], quantization: Quantization | None) -> dict[str, Any]:
    parameters = 0
    for name, array in weights.items():
        path, _, kind = name.rpartition(".")
        if f"{path}.scales" not in weights:
            parameters += array.size
        elif quantization and kind == "weight":
            parameters += array.size * 32 // quantization.bits
    dtypes = {str(a.dtype).removeprefix("mlx.core.") for a in weights.values() if mx.issubdtype(a.dtype, mx.floating)}
    return {
        "parameters": parameters,
        "bytes": sum(array.nbytes for array in weights.values()),
        "dtype": " and ".join(sorted(dtypes)),
        "bits": quantization.bits if quantization else None,
        "group_size": quantization.group_size if quantization else None,
    }


def format_description(description: dict[str, Any]) -> str:
    """What `describe` returned, as lines for a person."""
    d = description
    kind = "distilled" if d["is_distilled"] else "not distilled"
    lines = [
        f"FLUX.2 [klein], variant {d['variant']} ({kind}): {d['steps']} steps, guidance {d['guidance']:g}",
        f"  folder   {d['path']} ({d['format']} format)",
        f"  source   {d['source'] or 'not stated'}",
        f"  licence  {d['licence']}",
        f"  default  {d['default_size']} x {d['default_size']} pixels, {d['max_sequence_length']} text positions, "
        f"encoder layers {', '.join(str(tap) for tap in d['taps'])}",
    ]
    for name, part in (*d["parts"].items(), ("total", {**d, "dtype": "", "bits": None})):
        weights = part["dtype"]
        if part["bits"]:
            weights = f"{part['bits']}-bit in groups of {part['group_size']}, the rest {weights}"
        size = f"{_count(part['parameters']):>9} parameters {_bytes(part['bytes']):>9}"
        lines.append(f"  {name:<12} {size}  {weights}".rstrip())
    return "\n".join(lines)


def _count(number: int) -> str:
    return _scaled(number, (("", 1), (" k", 10**3), (" M", 10**6), (" B", 10**9)))


def _bytes(number: int) -> str:
    return _scaled(number, ((" B", 1), (" kB", 10**3), (" MB", 10**6), (" GB", 10**9)))


def _scaled(number: int, units: tuple[tuple[str, int], ...]) -> str:
    unit, size = max((u for u in units if number >= u[1]), key=lambda u: u[1], default=units[0])
    return f"{number}{unit}" if size == 1 else f"{number / size:.2f}{unit}"
