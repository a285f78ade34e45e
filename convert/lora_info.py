"""What a LoRA file is: for which model, in whose layout, of what rank; told from its header, and from what it says."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx

from klein_mlx.convert.lora import LoraFile, open_lora
from klein_mlx.convert.lora_base import tell_encoder
from klein_mlx.convert.lora_factors import alpha_of
from klein_mlx.convert.lora_metadata import told
from klein_mlx.convert.writer import digest_file
from klein_mlx.weights import WeightFiles


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
    return found | told(file.metadata)


def _alphas(file: LoraFile) -> dict[str, int]:
    """alpha -> of how many modules; "none" where nothing is stated, and the strength is 1."""
    arrays: dict[str, mx.array] = {}
    if any("alpha" in roles for roles in file.groups.values()):
        arrays = WeightFiles(file.path, {file.path: dict(file.entries)}).arrays()
    found: Counter[str] = Counter()
    for name, place in file.places.items():
        stated = file.strengths.of(place.part, place.name)
        alpha = alpha_of(file.group(name, arrays)) if arrays else None
        alpha = stated.alpha if alpha is None else alpha
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
    if d["unknown_keys"]:
        lines.append(f"  unknown  {len(d['unknown_keys'])} keys, {d['unknown_keys'][0][:100]} ...")
    lines.append(f"  licence  {d.get('licence', 'not stated')}")
    lines.append(f"  trigger  {', '.join(d.get('trigger_words', ())) or 'not stated'}")
    for name in ("title", "author", "trained_on", "description"):
        if name in d:
            lines.append(f"  {name.replace('_', ' '):<8} {d[name]}")
    return "\n".join([*lines, f"  sha256   {d['sha256']}"])
