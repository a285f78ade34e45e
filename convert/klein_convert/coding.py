"""Code a model's layers one after another, each on the inputs that it will have once those before it are coded.

A stage is a block or what stands before and behind the blocks. Its layers come in groups, in the order in which they
are computed; the layers of a group's list share one input.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from klein_mlx.config import ModelConfig
from klein_mlx.model.layers import Layer, QuantizedLinear, empty, layer_at, set_layer
from klein_mlx.model.sampler import latents_to_tokens
from klein_mlx.model.tokenizer import Tokens
from klein_mlx.model.transformer import Modulations, Rope
from klein_mlx.weights.quantize import Arrays, Quantization, fit_groups, pack, search

Groups = tuple[tuple[tuple[str, ...], ...], ...]


@dataclass
class Sample:
    """One prompt at one noise level, on its way through a model: what one side (whole, or coded) has computed so far.

    given: what the model is given. state: of the part's stages, rebuilt by each.
    """

    given: Any
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """run(module, sample) computes the stage on the sample's state and returns the new state; nothing is changed."""

    groups: Groups
    run: Callable[[Any, Sample], dict[str, Any]]


@dataclass(frozen=True)
class Look:
    """What the transformer is given: latents (1, h, w, C) at a noise level, the prompt's embeddings (1, L, D)."""

    latents: mx.array
    sigma: float
    embeds: mx.array
    rope: Rope


def encoder_stages(config: ModelConfig) -> list[Stage]:
    """Of the text encoder; a sample's `given` is the tokens of one prompt. Ends with state["embeds"]."""
    stages = [Stage((), _start_encoder)]
    for index in range(config.taps[-1]):
        at = f"layers.{index}"
        groups = (
            (tuple(f"{at}.self_attn.{x}_proj" for x in "qkv"),),
            ((f"{at}.self_attn.o_proj",),),
            ((f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"),),
            ((f"{at}.mlp.down_proj",),),
        )
        stages.append(Stage(groups, _encoder_layer(index, index + 1 in config.taps)))
    return stages


def _start_encoder(module: Any, sample: Sample) -> dict[str, Any]:
    tokens: Tokens = sample.given
    return {"x": module.embed_tokens(tokens.input_ids), "taps": []}


def _encoder_layer(index: int, tapped: bool) -> Callable[[Any, Sample], dict[str, Any]]:
    def run(module: Any, sample: Sample) -> dict[str, Any]:
        tokens: Tokens = sample.given
        mask = mx.tri(tokens.input_ids.shape[1], dtype=mx.bool_)[None, None] & tokens.attention_mask[:, None, None, :]
        x = module.layers[index](sample.state["x"], mask)
        return {"x": x, "taps": [*sample.state["taps"], *([x] if tapped else [])]}

    return run


def transformer_stages(config: ModelConfig, sigmas: list[float]) -> list[Stage]:
    """Of the transformer; a sample's `given` is a Look. Ends with state["velocity"], tokens (1, N, C).

    sigmas: noise levels at which the modulations are to be right.
    """

    def modulate(module: Any, sample: Sample) -> dict[str, Any]:
        look: Look = sample.given
        # All levels at once, so that the layers' inputs are those of all of them.
        found = module.all_modulations([look.sigma, *sigmas], look.latents.dtype)
        return {"mods": found[0]}

    def enter(module: Any, sample: Sample) -> dict[str, Any]:
        look: Look = sample.given
        img = module.img_in(latents_to_tokens(look.latents))
        return {**sample.state, "txt": module.embed_text(look.embeds), "img": img}

    t = config.transformer
    inputs = ("time_in", "guidance_in") if t.guidance_embeds else ("time_in",)
    first, second = (tuple((f"{name}.linear_{number}",) for name in inputs) for number in (1, 2))
    time = (first, second, (("mod_img", "mod_txt", "mod_single", "final_mod"),))
    stages = [Stage(time, modulate), Stage(((("img_in",), ("txt_in",)),), enter)]
    for index in range(t.num_layers):
        both = [f"double_blocks.{index}.{stream}" for stream in ("txt", "img")]
        qkv = tuple(tuple(f"{at}.to_{x}" for x in "qkv") for at in both)
        rest = [tuple((f"{at}.{name}",) for at in both) for name in ("to_out", "mlp_in", "mlp_out")]
        stages.append(Stage((qkv, *rest), _double_block(index)))
    stages.append(Stage((), _join))
    for index in range(t.num_single_layers):
        at = f"single_blocks.{index}"
        stages.append(Stage((((f"{at}.linear_in",),), ((f"{at}.linear_out",),)), _single_block(index)))
    return [*stages, Stage(((("final_out",),),), _finish)]


def _double_block(index: int) -> Callable[[Any, Sample], dict[str, Any]]:
    def run(module: Any, sample: Sample) -> dict[str, Any]:
        state, mods = sample.state, sample.state["mods"]
        (txt, img), _ = module.double_blocks[index](state["txt"], state["img"], mods.txt, mods.img, sample.given.rope)
        return {"mods": mods, "txt": txt, "img": img}

    return run


def _join(module: Any, sample: Sample) -> dict[str, Any]:
    state = sample.state
    return {"mods": state["mods"], "x": mx.concatenate([state["txt"], state["img"]], axis=1)}


def _single_block(index: int) -> Callable[[Any, Sample], dict[str, Any]]:
    def run(module: Any, sample: Sample) -> dict[str, Any]:
        mods: Modulations = sample.state["mods"]
        x, _ = module.single_blocks[index](sample.state["x"], mods.single, sample.given.rope)
        return {"mods": mods, "x": x}

    return run


def _finish(module: Any, sample: Sample) -> dict[str, Any]:
    state, look = sample.state, sample.given
    shift, scale = state["mods"].final
    x = state["x"][:, look.embeds.shape[1] :]
    return {"velocity": module.final_out(mx.fast.layer_norm(x, scale, shift, module.config.eps))}


# What is added to H's diagonal, in shares of its mean: inputs that were never seen count a little. Chosen on prompts
# that calibration had not seen; `aim` moves the weights themselves, so it is damped more.
DAMPING, _AIM_DAMPING = 0.05, 0.1


def damped(moments: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """H with a little of its mean diagonal added. Dead inputs get the mean alone."""
    return moments + np.eye(len(moments), dtype=moments.dtype) * (damping * moments.diagonal().mean() + 1e-12)


def feedback(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """M without its diagonal, and D, of a positive definite H (n, n): (n, n) and (n,)."""
    factor = np.linalg.cholesky(moments[::-1, ::-1])[::-1, ::-1]  # upper triangular: H = factor factor^T
    diagonal = factor.diagonal().copy()
    mixture = factor / diagonal[None, :]
    np.fill_diagonal(mixture, 0)
    return mixture, diagonal**2


def aim(weight: np.ndarray, moments: np.ndarray, drift: np.ndarray) -> np.ndarray:
    """The weight that does best on inputs that have drifted: W + W drift H^-1.

    weight: (rows, n). moments: H of the inputs as they now are. drift: (n, n), sum of (x - x_now) x_now^T, with x the
    inputs as they should be.
    """
    return weight + np.linalg.solve(damped(moments, _AIM_DAMPING), drift.T @ weight.T).T


def round_with_feedback(
    weight: np.ndarray, mixture: np.ndarray, importance: np.ndarray, group_size: int, bits: int, dtype: mx.Dtype
) -> Arrays:
    """Quantize to MLX's affine format.

    weight: (rows, columns) float32. mixture, importance: of `feedback`. dtype: of scales and biases.
    """
    rows, columns = weight.shape
    exact = np.ascontiguousarray(weight.T)  # a column is whole in memory
    importance = np.maximum(importance / importance.mean(), 1e-6)
    errors = np.empty((columns, rows), np.float32)
    codes = np.empty((columns, rows), np.float32)
    scales, biases = [], []
    for start in range(0, columns, group_size):
        group = slice(start, start + group_size)
        block = exact[group] + mixture[:start, group].T @ errors[:start]
        scale, bias = fit_groups(mx.array(block).T, mx.array(importance[group])[None], bits, dtype)
        mx.eval(scale, bias)
        step, low = np.array(scale), np.array(bias)
        inverse = 1 / np.where(np.abs(step) < 1e-12, 1, step)
        inner = mixture[group, group]
        for k in range(group_size):
            code = np.clip(np.rint((block[k] - low) * inverse), 0, 2**bits - 1)
            codes[start + k] = code
            errors[start + k] = exact[start + k] - (step * code + low)
            block[k + 1 :] += np.outer(inner[k, k + 1 :], errors[start + k])
        scales.append(scale)
        biases.append(bias)
    packed = pack(mx.array(codes).T, bits)
    result = packed, mx.stack(scales, axis=1).astype(dtype), mx.stack(biases, axis=1).astype(dtype)
    mx.eval(result)
    return result


Coded = dict[str, tuple[mx.array, ...]]  # a layer's path -> packed codes, scales and, where there are, biases


_PICTURE_SHARE = 0.8  # of the weight that tokens have where text and picture share a layer


class _Noting(Layer):
    """A layer that notes its inputs."""

    def __init__(self, layer: Any, inputs: list[mx.array]):
        super().__init__()
        self.layer, self._inputs = layer, inputs

    def __call__(self, x: mx.array) -> mx.array:
        self._inputs.append(x.reshape(-1, x.shape[-1]))
        return self.layer(x)

    def split(self, x: mx.array, at: int) -> tuple[mx.array, mx.array]:
        whole = self(x)
        return whole[..., :at], whole[..., at:]


def code_part(
    whole: nn.Module,
    coded: nn.Module,
    stages: Sequence[Stage],
    samples: Sequence[tuple[Sample, Sample]],
    quantization: Quantization,
    dtype: mx.Dtype,
    done: Callable[[str], None] = lambda path: None,
    alone: bool = False,
) -> Coded:
    """Code every layer that `quantization` names; `coded`'s layers become the coded ones, unless each is coded `alone`.

    samples: (whole's, coded's); their states are moved on. dtype: of scales and biases. done: told each layer's path.
    """
    layers = dict(quantization.layers or {})
    result: Coded = {}

    def put(path: str, inputs: "_Inputs | None") -> None:
        own = layers[path]
        result[path] = _code(layer_at(whole, path).weight, own, inputs, dtype)
        if not alone:
            set_layer(coded, path, quantized_layer(layer_at(whole, path), own, result[path]))
        done(path)

    for path in [p for p in layers if isinstance(layer_at(whole, p), nn.Embedding)]:
        put(path, None)
    for stage in stages:
        mine = [path for group in stage.groups for paths in group for path in paths if path in layers]
        right = []
        for sample, _ in samples:
            found, sample.state = _inputs(whole, stage, sample, mine)
            right.append(found)
        for group in stage.groups:
            for paths in group:
                here = [path for path in paths if path in layers]
                if not here:
                    continue
                inputs = _Inputs.of(*_moments(coded, stage, samples, right, here[0]))
                for path in here:
                    put(path, inputs)
        for _, sample in samples:
            sample.state = stage.run(coded, sample)
            mx.eval(sample.state)
        mx.clear_cache()
    return result


def _moments(
    coded: nn.Module,
    stage: Stage,
    samples: Sequence[tuple[Sample, Sample]],
    right: Sequence[dict[str, mx.array]],
    path: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Second moments of a layer's inputs in the coded model, and of what they lack with them: H and `aim`'s drift."""
    moments = drift = mx.array(0.0)
    for (_, sample), wanted in zip(samples, right, strict=True):
        now = _inputs(coded, stage, sample, [path])[0][path].astype(mx.float32)
        weights = _token_weights(sample, now.shape[0])
        lack = wanted[path].astype(mx.float32) - now
        moments, drift = moments + (now * weights).T @ now, drift + (lack * weights).T @ now
        mx.eval(moments, drift)
    return np.array(moments), np.array(drift)


def _token_weights(sample: Sample, tokens: int) -> mx.array:
    """(tokens, 1). Where text and picture are joined, the picture's tokens are as many as in a large one."""
    text = getattr(sample.given, "embeds", None)
    if text is None or "x" not in sample.state or tokens <= text.shape[1]:
        return mx.ones((tokens, 1))
    length = text.shape[1]
    picture = _PICTURE_SHARE / (tokens - length)
    rows = [mx.full((length, 1), (1 - _PICTURE_SHARE) / length), mx.full((tokens - length, 1), picture)]
    return mx.concatenate(rows) * tokens


def _inputs(
    module: nn.Module, stage: Stage, sample: Sample, paths: Sequence[str]
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """What these layers read when the stage is run, (tokens, inputs) each, and the state that it returns."""
    with noting(module, paths) as noted:
        state = stage.run(module, sample)
        found = {path: inputs[0] if len(inputs) == 1 else mx.concatenate(inputs) for path, inputs in noted.items()}
        mx.eval(found, *([state] if len(paths) != 1 else []))  # of one layer's inputs, what comes after is not needed
    return found, state


@contextmanager
def noting(module: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, list[mx.array]]]:
    """Inside, these layers note their inputs."""
    noted: dict[str, list[mx.array]] = {path: [] for path in paths}
    layers = {path: layer_at(module, path) for path in paths}
    for path, layer in layers.items():
        set_layer(module, path, _Noting(layer, noted[path]))
    try:
        yield noted
    finally:
        for path, layer in layers.items():
            set_layer(module, path, layer)


@dataclass(frozen=True)
class _Inputs:
    """Of one layer's inputs: H; what they lack, with them; and H's factors."""

    moments: np.ndarray
    drift: np.ndarray
    mixture: np.ndarray
    importance: np.ndarray

    @classmethod
    def of(cls, moments: np.ndarray, drift: np.ndarray) -> "_Inputs | None":
        """None if the inputs were always zero."""
        if not moments.any():
            return None
        return cls(moments, drift, *feedback(damped(moments)))


def _code(weight: mx.array, own: Quantization, inputs: _Inputs | None, dtype: mx.Dtype) -> tuple[mx.array, ...]:
    if own.mode != "affine":
        return tuple(mx.quantize(weight, own.group_size, own.bits, own.mode))
    if inputs is None:
        return search(weight.astype(dtype), own.group_size, own.bits)
    wanted = aim(np.array(weight.astype(mx.float32)), inputs.moments, inputs.drift)
    return round_with_feedback(wanted, inputs.mixture, inputs.importance, own.group_size, own.bits, dtype)


def quantized_layer(layer: Any, own: Quantization, arrays: tuple[mx.array, ...]) -> nn.Module:
    """A quantized layer of these arrays in the place of an nn.Linear or nn.Embedding, scales in float32."""
    packed = {
        name: array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
        for name, array in zip(("weight", "scales", "biases"), arrays, strict=False)
    }
    if not isinstance(layer, nn.Embedding):
        return QuantizedLinear.of(packed, own.group_size, own.bits, own.mode)
    result = empty(nn.QuantizedEmbedding)
    result.group_size, result.bits, result.mode = own.group_size, own.bits, own.mode
    result.num_embeddings, result.dims = layer.weight.shape
    for name, array in packed.items():
        result[name] = array
    return result
