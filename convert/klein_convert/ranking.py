"""Which layers need more bits: the error that each one alone causes in the velocity, and bits shared out by it."""

import heapq
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from klein_convert.coding import Coded, layer_at, quantized_layer, set_layer
from klein_convert.stages import Look
from klein_mlx.model.tokenizer import Tokens
from klein_mlx.runtime.encodings import encode_prompt
from klein_mlx.weights.quantize import Quantization

LEVELS = (3, 4, 5, 6, 8)
BASE = Quantization(4)
BUDGET = 1.055  # of what 4 bits everywhere take
_SCALES = 0.5  # bits per weight for scale and bias, in groups of 64

Unit = tuple[str, str]  # part, path: of a layer of the transformer, of a whole block of the encoder
Velocity = Callable[[Any, mx.array, Look], mx.array]  # of a transformer, at a look, given a prompt's embeddings


def unit_of(part: str, path: str) -> Unit:
    """What is ranked as one: the encoder's layers by their blocks, of which none touches the velocity alone."""
    found = re.match(r"layers\.\d+", path) if part == "text_encoder" else None
    return part, found[0] if found else path


def rank(
    modules: Mapping[str, Any],
    coded: Mapping[str, Coded],
    tokens: Sequence[Tokens],
    runs: Sequence[Sequence[Look]],
    velocity: Velocity,
) -> dict[Unit, float]:
    """The relative velocity error of every unit, coded with BASE while all else is whole, the largest first.

    modules: the whole parts. coded: their layers, each coded for itself. runs: per prompt, what the whole model sees.
    """
    right = [[velocity(modules["transformer"], look.embeds, look) for look in run] for run in runs]
    mx.eval(right)
    size = sum(float((wanted**2).sum()) for run in right for wanted in run)
    units: dict[Unit, list[str]] = {}
    for part, layers in coded.items():
        for path in layers:
            units.setdefault(unit_of(part, path), []).append(path)
    errors: dict[Unit, float] = {}
    for (part, unit), paths in units.items():
        module: nn.Module = modules[part]
        kept = {path: layer_at(module, path) for path in paths}
        for path, layer in kept.items():
            set_layer(module, path, quantized_layer(layer, BASE, coded[part][path]))
        off = 0.0
        for prompt, run, wanted in zip(tokens, runs, right, strict=True):
            embeds = encode_prompt(modules["text_encoder"], prompt, 0) if part == "text_encoder" else run[0].embeds
            for look, v in zip(run, wanted, strict=True):
                off += float(((velocity(modules["transformer"], embeds, look) - v) ** 2).sum())
        for path, layer in kept.items():
            set_layer(module, path, layer)
        errors[part, unit] = math.sqrt(off / size)
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def share_out(errors: Mapping[Unit, float], weights: Mapping[Unit, int], budget: float = BUDGET) -> dict[Unit, int]:
    """Bits for each unit, so that the sum of squared errors is least at `budget` times the size of 4 bits everywhere.

    errors: of each unit at 4 bits. weights: how many it has. Errors of different units add as squares, and each bit
    halves a unit's. All start at the lowest level; the upgrade that gains most per byte comes first.
    """
    room = budget * sum(count * (4 + _SCALES) for count in weights.values())
    room -= sum(count * (LEVELS[0] + _SCALES) for count in weights.values())
    bits = dict.fromkeys(errors, LEVELS[0])

    def upgrade(unit: Unit) -> tuple[float, Unit, int] | None:
        above = [level for level in LEVELS if level > bits[unit]]
        if not above:
            return None
        gain = errors[unit] ** 2 * (4.0 ** (4 - bits[unit]) - 4.0 ** (4 - above[0]))
        return -gain / (weights[unit] * (above[0] - bits[unit])), unit, above[0]

    waiting = [found for unit in errors if (found := upgrade(unit))]
    heapq.heapify(waiting)
    while waiting:
        _, unit, level = heapq.heappop(waiting)
        cost = weights[unit] * (level - bits[unit])
        if cost > room:
            continue
        room -= cost
        bits[unit] = level
        if found := upgrade(unit):
            heapq.heappush(waiting, found)
    return bits
