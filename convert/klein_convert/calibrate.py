"""Codes that know the model: a Source whose weights are quantised on the inputs that they will really have.

A few prompts are run through the unquantised model; then layer after layer is coded, each on what the coded layers
before it hand on (klein_convert.coding), so that it makes up for their errors as well as for its own. The result is in
MLX's ordinary formats. Needs the unquantised transformer and text encoder in memory, as they are stored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from klein_convert.coding import Coded, code_part, layer_at
from klein_convert.ranking import BASE, Unit, rank, share_out, unit_of
from klein_convert.stages import Look, Sample, encoder_stages, transformer_stages
from klein_mlx.config import PARTS, ModelConfig
from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.model.latents import all_ids, latents_to_tokens, noise, tokens_to_latents
from klein_mlx.model.rope import rope_tables
from klein_mlx.model.sampler import Predict, euler_steps, make_sigmas
from klein_mlx.model.tokenizer import Tokens
from klein_mlx.model.transformer import Transformer
from klein_mlx.runtime.encodings import encode_prompt
from klein_mlx.weights.bits import Quantize, parse, settle
from klein_mlx.weights.checkpoint import Source, build, load_part, read_tokenizer
from klein_mlx.weights.quantize import Quantization, named
from klein_mlx.weights.rows import ReadRows
from klein_mlx.weights.safetensors import Deferred, Weight

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
class CalibratedSource:
    """Another Source with some layers coded already; to whoever reads it, a quantised model."""

    original: Source
    quantization: Mapping[str, Quantization]
    coded: Mapping[str, Coded]
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.original.path

    @property
    def config(self) -> ModelConfig:
        return self.original.config

    @property
    def tokenizer_file(self) -> Path:
        return self.original.tokenizer_file

    def weights(self, part: str) -> dict[str, Weight]:
        weights = dict(self.original.weights(part))
        for path, arrays in self.coded.get(part, {}).items():
            del weights[f"{path}.weight"]
            weights |= named(path, arrays)
        return weights

    def rows(self, part: str, name: str) -> ReadRows | None:
        return None if name.rpartition(".")[0] in self.coded.get(part, {}) else self.original.rows(part, name)

    def files(self, parts: Sequence[str] = PARTS) -> list[Path]:
        return self.original.files(parts)


def calibrate(
    source: Source,
    quantize: Quantize,
    *,
    prompts: Sequence[str] = PROMPTS,
    steps: int = STEPS,
    seed: int = 0,
    done: Done = lambda path: None,
) -> CalibratedSource:
    """Code the layers that `quantize` names (klein_mlx.weights.bits), on these prompts. A preset's bits are shared out
    anew, by the error that each layer causes in this model's velocity.

    steps: denoising steps of the calibration's pictures, which have half the model's default sides. done: told each
    layer's path. Raises RequestError if there is nothing to quantise or no prompt, CheckpointError for stored parts.
    """
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise RequestError("prompts is empty or holds an empty line; calibration needs at least one prompt")
    settled = settle(asked := parse(quantize), source)
    if asked is None:
        raise RequestError("calibrate needs bits to calibrate for: give quantize as well, as in mixed-4")
    if source.quantization:
        stored = " and ".join(source.quantization)
        raise CheckpointError(f"{source.path}: its {stored} is quantised already; calibration starts from the original")
    tokenizer = read_tokenizer(source.tokenizer_file, source.config.text_encoder.vocab_size)
    tokens = [tokenizer([prompt], source.config.max_sequence_length) for prompt in prompts]
    whole = {part: _load_whole(part, source) for part in ("text_encoder", "transformer")}
    encoder: Any = whole["text_encoder"]
    right = [encode_prompt(encoder, prompt, 0) for prompt in tokens]
    runs = looks(source.config, whole["transformer"], right, steps, seed)
    told: dict[str, Any] = {"prompts": len(prompts), "steps": steps, "seed": seed}
    if asked.name is not None:
        errors, settled = _share_out(source, whole, settled, tokens, runs, done)
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
    return CalibratedSource(source, settled, coded, {**source.info, "calibration": told})


def _code(
    source: Source,
    whole: Mapping[str, nn.Module],
    part: str,
    samples: Sequence[tuple[Sample, Sample]],
    settled: Mapping[str, Quantization],
    done: Done,
    alone: bool = False,
) -> tuple[Coded, Any]:
    """A part's layers, coded, and the module that holds them."""
    copy = _copy(part, whole[part], source.config)
    if part == "text_encoder":
        stages = encoder_stages(source.config)
    else:
        stages = transformer_stages(source.config, [(index + 0.5) / _LEVELS for index in range(_LEVELS)])
    return code_part(whole[part], copy, stages, samples, settled[part], _dtype(source, part), done, alone), copy


def _share_out(
    source: Source,
    whole: Mapping[str, nn.Module],
    settled: Mapping[str, Quantization],
    tokens: Sequence[Tokens],
    runs: Sequence[Sequence[Look]],
    done: Done,
) -> tuple[dict[Unit, float], dict[str, Quantization]]:
    """What each layer alone does to the velocity, and the bits that follow from it, for the preset's layers."""
    base = {
        part: Quantization.of_layers({path: replace(BASE, searched=True) for path in own.layers or ()})
        for part, own in settled.items()
    }
    given = {"text_encoder": list(tokens), "transformer": [look for run in runs for look in run]}
    coded: dict[str, Coded] = {}
    for part in base:
        samples = [(Sample(x), Sample(x)) for x in given[part]]
        coded[part], _ = _code(source, whole, part, samples, base, lambda path: None, alone=True)
    few = slice(_RANKED_PROMPTS)
    errors = rank(whole, coded, tokens[few], [run[:: max(1, len(run) // 2)] for run in runs[few]], velocity)
    weights: dict[Unit, int] = {}
    for part, layers in coded.items():
        for path in layers:
            count = layer_at(whole[part], path).weight.size
            weights[unit_of(part, path)] = weights.get(unit_of(part, path), 0) + count
    bits = share_out(errors, weights)
    shared = {
        part: Quantization.of_layers({p: Quantization(bits[unit_of(part, p)], searched=True) for p in layers})
        for part, layers in coded.items()
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
    """Per prompt, the latents that the unquantised model passes through."""
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
    """Another module with the same arrays."""
    copy = build(part, config)
    copy.load_weights(tree_flatten(module.parameters()))  # type: ignore[arg-type]
    copy.eval()
    return copy


def _dtype(source: Source, part: str) -> mx.Dtype:
    """In which a part's matrices are stored."""
    matrices: list[mx.array | Deferred] = [w for w in source.weights(part).values() if len(w.shape) == 2]
    return matrices[0].dtype


def _rope(config: ModelConfig, length: int, side: int) -> Any:
    ids = all_ids(length, side, side, None)
    return rope_tables(ids, config.transformer.axes_dims_rope, config.transformer.rope_theta, length)
