"""Codes that know the model: a Source whose weights are quantized on the inputs that they will really have.

A few prompts are run through the unquantized model; then layer after layer is coded, each on what the coded layers
before it hand on (klein_convert.coding), so that it makes up for their errors as well as for its own. The result is in
MLX's ordinary formats. Which layers need more bits is ranked first, by the error that each alone causes in the
velocity. Needs the unquantized transformer and text encoder in memory, as they are stored.
"""

import heapq
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from klein_convert.coding import (
    Coded,
    Look,
    Sample,
    code_part,
    encoder_stages,
    quantized_layer,
    transformer_stages,
)
from klein_mlx.config import ModelConfig
from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.model.layers import layer_at, set_layer
from klein_mlx.model.sampler import (
    Predict,
    all_ids,
    euler_steps,
    latents_to_tokens,
    make_sigmas,
    noise,
    tokens_to_latents,
)
from klein_mlx.model.tokenizer import Tokens
from klein_mlx.model.transformer import Transformer, rope_tables
from klein_mlx.runtime.encodings import encode_prompt
from klein_mlx.weights.bits import Quantize, parse, settle
from klein_mlx.weights.checkpoint import Derived, ReadRows, Source, build, expected, load_part, read_tokenizer
from klein_mlx.weights.quantize import Quantization, check_shapes, named
from klein_mlx.weights.safetensors import Deferred, Weight

LEVELS = (3, 4, 5, 6, 8)
BUDGET = 1.055  # of what 4 bits everywhere take
_SCALES = 32  # bits for scale and bias of a group

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
    base: Mapping[str, Quantization],
) -> dict[Unit, float]:
    """The relative velocity error of every unit, coded as `base` says while all else is whole, the largest first.

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
            set_layer(module, path, quantized_layer(layer, base[part], coded[part][path]))
        off = 0.0
        for prompt, run, wanted in zip(tokens, runs, right, strict=True):
            embeds = encode_prompt(modules["text_encoder"], prompt, 0) if part == "text_encoder" else run[0].embeds
            for look, v in zip(run, wanted, strict=True):
                off += float(((velocity(modules["transformer"], embeds, look) - v) ** 2).sum())
        for path, layer in kept.items():
            set_layer(module, path, layer)
        errors[part, unit] = math.sqrt(off / size)
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def share_out(
    errors: Mapping[Unit, float], weights: Mapping[Unit, int], budget: float = BUDGET, groups: Mapping[str, int] = {}
) -> dict[Unit, int]:
    """Bits for each unit, so that the sum of squared errors is least at `budget` times the size of 4 bits everywhere.

    errors: of each unit at 4 bits. weights: how many it has. groups: their size, by part (64). Errors of different
    units add as squares, and each bit halves a unit's. All start at the lowest level; the upgrade that gains most per
    byte comes first.
    """
    scales = {unit: _SCALES / groups.get(unit[0], 64) for unit in weights}
    room = sum(count * (budget * (4 + scales[unit]) - (LEVELS[0] + scales[unit])) for unit, count in weights.items())
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


PROMPTS = (
    "a red fox in the snow at dawn, photograph",
    "portrait of an old sailor, oil painting",
    "a blue square left of a red circle on a green background",
    "a city street at night with neon signs in the rain",
    "make it autumn",
    "a bowl of oranges on a wooden table, soft light from a window",
    "minimal poster with the word HELLO in bold letters",
    "a castle on a hill, detailed fantasy illustration, wide shot of the valley with a river and a small village",
)
STEPS = 4
_LEVELS = 64  # noise levels on which the modulations are coded
_MAX_SIDE = 512
_RANKED_PROMPTS = 2

Done = Callable[[str], None]


@dataclass(frozen=True)
class CalibratedSource(Derived):
    """Another Source with some layers coded already; to whoever reads it, a quantized model."""

    coded: Mapping[str, Coded]

    def weights(self, part: str) -> dict[str, Weight]:
        weights = dict(self.base.weights(part))
        for path, arrays in self.coded.get(part, {}).items():
            del weights[f"{path}.weight"]
            weights |= named(path, arrays)
        return weights

    def rows(self, part: str, name: str) -> ReadRows | None:
        return None if name.rpartition(".")[0] in self.coded.get(part, {}) else self.base.rows(part, name)


def calibrate(
    source: Source,
    quantize: Quantize,
    *,
    prompts: Sequence[str] = PROMPTS,
    steps: int = STEPS,
    seed: int = 0,
    done: Done = lambda path: None,
) -> CalibratedSource:
    """Code the layers that `quantize` names (klein_mlx.weights.bits), on these prompts. A preset's bits are shared
    out anew, by the error that each layer causes in this model's velocity; what was asked for beside it stays.

    steps: denoising steps of the calibration's pictures, which have half the model's default sides. done: told each
    layer's path. Raises RequestError if there is nothing to quantize or no prompt, CheckpointError for stored parts.
    """
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise RequestError("prompts is empty or holds an empty line; calibration needs at least one prompt")
    settled = settle(asked := parse(quantize), source)
    if asked is None:
        raise RequestError("calibrate needs bits to calibrate for: give quantize as well, as in mixed-4")
    if source.quantization:
        stored = " and ".join(source.quantization)
        raise CheckpointError(f"{source.path}: its {stored} is quantized already; calibration starts from the original")
    base = {
        part: Quantization.of_layers(free)
        for part, own in settled.items()
        if (free := asked.left_to_preset(part, own.layers or ()))
    }
    for part, own in [*settled.items(), *base.items()]:
        check_shapes(part, expected(part, source.config), own)
    config = source.config.text_encoder
    tokenizer = read_tokenizer(source.tokenizer_file, config.vocab_size, config.model_type)
    tokens = [tokenizer([prompt], source.config.max_sequence_length) for prompt in prompts]
    whole = {part: _load_whole(part, source) for part in ("text_encoder", "transformer")}
    encoder: Any = whole["text_encoder"]
    right = [encode_prompt(encoder, prompt, 0) for prompt in tokens]
    runs = looks(source.config, whole["transformer"], right, steps, seed)
    told: dict[str, Any] = {"prompts": len(prompts), "steps": steps, "seed": seed}
    if base:
        errors, shared = _share_out(source, whole, base, tokens, runs, done)
        settled = {p: Quantization.of_layers({**(own.layers or {}), **shared.get(p, {})}) for p, own in settled.items()}
        told["velocity_errors"] = {f"{part}.{path}": float(f"{error:.3g}") for (part, path), error in errors.items()}
    coded: dict[str, Coded] = {}
    if "text_encoder" in settled:
        samples = [(Sample(prompt), Sample(prompt)) for prompt in tokens]
        coded["text_encoder"], encoder = _code(source, whole, "text_encoder", samples, settled, done)
    if "transformer" in settled:
        now = [encode_prompt(encoder, prompt, 0) for prompt in tokens]
        pairs = [(look, replace(look, embeds=e)) for run, e in zip(runs, now, strict=True) for look in run]
        coded["transformer"], _ = _code(
            source, whole, "transformer", [(Sample(a), Sample(b)) for a, b in pairs], settled, done
        )
    return CalibratedSource(source, source.config, settled, {**source.info, "calibration": told}, coded)


def _code(
    source: Source,
    whole: Mapping[str, nn.Module],
    part: str,
    samples: Sequence[tuple[Sample, Sample]],
    settled: Mapping[str, Quantization],
    done: Done,
    alone: bool = False,
) -> tuple[Coded, Any]:
    copy = _copy(part, whole[part], source.config)
    if part == "text_encoder":
        stages = encoder_stages(source.config)
    else:
        stages = transformer_stages(source.config, [(index + 0.5) / _LEVELS for index in range(_LEVELS)])
    return code_part(whole[part], copy, stages, samples, settled[part], _dtype(source, part), done, alone), copy


def _share_out(
    source: Source,
    whole: Mapping[str, nn.Module],
    base: Mapping[str, Quantization],
    tokens: Sequence[Tokens],
    runs: Sequence[Sequence[Look]],
    done: Done,
) -> tuple[dict[Unit, float], dict[str, dict[str, Quantization]]]:
    """What each layer of `base` alone does to the velocity, and the settings that follow from it."""
    given = {"text_encoder": list(tokens), "transformer": [look for run in runs for look in run]}
    coded: dict[str, Coded] = {}
    for part in base:
        samples = [(Sample(x), Sample(x)) for x in given[part]]
        coded[part], _ = _code(source, whole, part, samples, base, lambda path: None, alone=True)
    few = slice(_RANKED_PROMPTS)
    errors = rank(whole, coded, tokens[few], [run[:: max(1, len(run) // 2)] for run in runs[few]], velocity, base)
    weights: dict[Unit, int] = {}
    for part, layers in coded.items():
        for path in layers:
            count = layer_at(whole[part], path).weight.size
            weights[unit_of(part, path)] = weights.get(unit_of(part, path), 0) + count
    bits = share_out(errors, weights, groups={part: own.group_size for part, own in base.items()})
    shared = {
        part: {path: replace(own, bits=bits[unit_of(part, path)]) for path, own in (base[part].layers or {}).items()}
        for part in base
    }
    return errors, shared


def velocity(transformer: Transformer, embeds: mx.array, look: Look) -> mx.array:
    """At a look's latents and noise level, given these embeddings."""
    return predict(transformer, embeds, look)(look.latents, look.sigma)


def _load_whole(part: str, source: Source) -> Any:
    """A part with its matrices as they are stored, which computes in float32: what one layer changes would drown in
    bfloat16's rounding. A module computes in the dtype of its norms and embeddings."""
    module = load_part(part, source, _dtype(source, part))

    def widened(name: str, array: mx.array) -> mx.array:
        return array.astype(mx.float32) if array.ndim == 1 or name == "embed_tokens.weight" else array

    flat: Any = tree_flatten(module.parameters())
    module.load_weights([(name, widened(name, array)) for name, array in flat])
    return module


def looks(config: ModelConfig, transformer: Any, embeds: Sequence[mx.array], steps: int, seed: int) -> list[list[Look]]:
    """Per prompt, the latents that the unquantized model passes through."""
    side = min(config.default_size // 2, _MAX_SIDE) // config.pixels_per_token
    runs = []
    for number, given in enumerate(embeds):
        latents = noise(mx.random.key(seed + number), side, side, config.transformer.in_channels)
        sigmas = make_sigmas(side * side, steps, time_shift=config.time_shift)
        rope = _rope(config, given.shape[1], side)
        first = Look(latents, sigmas[0], given, rope)
        run, walk = [first], euler_steps(predict(transformer, given, first), latents, sigmas)
        for sigma in sigmas[1:-1]:
            run.append(replace(first, latents=next(walk), sigma=sigma))
            mx.eval(run[-1].latents)
        runs.append(run)
    return runs


def predict(transformer: Transformer, embeds: mx.array, look: Look) -> Predict:
    """The velocity as a function of latents and sigma, for latents of this look's size."""
    h, w = look.latents.shape[1:3]
    txt = transformer.embed_text(embeds)

    def at(latents: mx.array, sigma: float) -> mx.array:
        modulations = transformer.modulations(sigma, latents.dtype)
        return tokens_to_latents(transformer(latents_to_tokens(latents), txt, modulations, look.rope, h * w), h, w)

    return at


def _copy(part: str, module: nn.Module, config: ModelConfig) -> nn.Module:
    copy = build(part, config)
    copy.load_weights(tree_flatten(module.parameters()))  # type: ignore[arg-type]
    copy.eval()
    return copy


def _dtype(source: Source, part: str) -> mx.Dtype:
    matrices: list[mx.array | Deferred] = [w for w in source.weights(part).values() if len(w.shape) == 2]
    return matrices[0].dtype


def _rope(config: ModelConfig, length: int, side: int) -> Any:
    ids = all_ids(length, side, side, None)
    return rope_tables(ids, config.transformer.axes_dims_rope, config.transformer.rope_theta, length)
