"""The model's formulas written plainly, in float32 on the CPU; `klein_mlx.bench.shapes` compares with them.

They share no code with klein_mlx.model, so a fault there cannot hide here. Arrays of any float dtype go in and are read
as they are; all results are float32.

Source: the formulas of diffusers (transformer_flux2.py, autoencoder_kl_flux2.py) and transformers (qwen3).
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import ParamSpec

import mlx.core as mx

P = ParamSpec("P")
Weights = Mapping[str, mx.array]
QUERIES = 256  # attention's rows of scores that are alive at once


def on_cpu(function: Callable[P, mx.array]) -> Callable[P, mx.array]:
    """Run on the CPU, in float32, and evaluate."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> mx.array:
        with mx.stream(mx.cpu):
            out = function(*args, **kwargs).astype(mx.float32)
            mx.eval(out)
            return out

    return call


def _wide(x: mx.array) -> mx.array:
    return x.astype(mx.float32)


@on_cpu
def matmul(x: mx.array, weight: mx.array) -> mx.array:
    """(..., K), (N, K) -> (..., N)."""
    return _wide(x) @ _wide(weight).T


@on_cpu
def attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
    """(B, L, heads, dim), (B, S, heads or a divisor, dim) twice -> (B, L, heads * dim). mask: (L, S) bool."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (_wide(a).transpose(0, 2, 1, 3) for a in (q, k, v))
    k, v = mx.repeat(k, groups, axis=1), mx.repeat(v, groups, axis=1)
    out = []
    for first in range(0, q.shape[2], QUERIES):
        scores = q[:, :, first : first + QUERIES] @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = mx.where(mask[first : first + QUERIES], scores, -mx.inf)
        scores = mx.exp(scores - scores.max(axis=-1, keepdims=True))
        out.append(scores / scores.sum(axis=-1, keepdims=True) @ v)
        mx.eval(out[-1])
    return mx.concatenate(out, axis=2).transpose(0, 2, 1, 3).flatten(2)


@on_cpu
def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    x = _wide(x)
    return x / mx.sqrt(mx.mean(x * x, axis=-1, keepdims=True) + eps) * _wide(weight)


@on_cpu
def modulated(x: mx.array, shift: mx.array, scale: mx.array, eps: float) -> mx.array:
    """LayerNorm(x) * scale + shift; the 1 + is inside of scale."""
    x = _wide(x)
    x = x - x.mean(axis=-1, keepdims=True)
    return x / mx.sqrt(mx.mean(x * x, axis=-1, keepdims=True) + eps) * _wide(scale) + _wide(shift)


@on_cpu
def rotate(x: mx.array, ids: mx.array, axes: tuple[int, ...], theta: float) -> mx.array:
    """Neighbouring channels as complex numbers, turned by their position. x: (B, S, heads, dim); ids: (S, axes)."""
    angles = [
        _wide(ids[:, axis, None]) * theta ** (-mx.arange(0, dim, 2).astype(mx.float32) / dim)
        for axis, dim in enumerate(axes)
    ]
    angle = mx.concatenate(angles, axis=-1)[:, None]
    even, odd = _wide(x[..., 0::2]), _wide(x[..., 1::2])
    cos, sin = mx.cos(angle), mx.sin(angle)
    return mx.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).flatten(-2)


@on_cpu
def rotate_halves(x: mx.array, theta: float) -> mx.array:
    """Channel i and channel i + dim / 2 as complex numbers, turned by the row. x: (B, S, heads, dim)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-mx.arange(half).astype(mx.float32) / half)
    angle = (mx.arange(x.shape[1]).astype(mx.float32)[:, None] * frequency)[:, None]
    first, second = _wide(x[..., :half]), _wide(x[..., half:])
    cos, sin = mx.cos(angle), mx.sin(angle)
    return mx.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


@on_cpu
def swiglu(gate: mx.array, value: mx.array) -> mx.array:
    gate = _wide(gate)
    return gate / (1 + mx.exp(-gate)) * _wide(value)


@on_cpu
def add(x: mx.array, gate: mx.array, branch: mx.array) -> mx.array:
    return _wide(x) + _wide(gate) * _wide(branch)


@on_cpu
def convolve(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """3 x 3, zeros around. (B, H, W, C), (C', 3, 3, C) -> (B, H, W, C')."""
    height, width = x.shape[1:3]
    x = mx.pad(_wide(x), [(0, 0), (1, 1), (1, 1), (0, 0)])
    out = _wide(bias)
    for row in range(3):
        for column in range(3):
            part = mx.contiguous(x[:, row : row + height, column : column + width])
            out = out + part @ _wide(weight[:, row, column]).T
            mx.eval(out)
    return out


@on_cpu
def group_norm(x: mx.array, weight: mx.array, bias: mx.array, groups: int, eps: float) -> mx.array:
    """Of the whole picture (1, H, W, C)."""
    b, height, width, channels = x.shape
    grouped = _wide(x).reshape(b, height * width, groups, channels // groups)
    grouped = grouped - grouped.mean(axis=(1, 3), keepdims=True)
    grouped = grouped / mx.sqrt(mx.mean(grouped * grouped, axis=(1, 3), keepdims=True) + eps)
    return grouped.reshape(x.shape) * _wide(weight) + _wide(bias)


@on_cpu
def silu(x: mx.array) -> mx.array:
    return _wide(x) / (1 + mx.exp(-_wide(x)))


@on_cpu
def doubled(x: mx.array) -> mx.array:
    """Every pixel four times."""
    return mx.repeat(mx.repeat(_wide(x), 2, axis=1), 2, axis=2)


# ---- blocks ----

Turn = Callable[[mx.array], mx.array]


def _heads(x: mx.array, dim: int) -> mx.array:
    return mx.unflatten(x, -1, (-1, dim))


def single_block(weights: Weights, x: mx.array, mod: tuple[mx.array, ...], turn: Turn, eps: float) -> mx.array:
    """x: (B, S, hidden). mod: shift, scale, gate. turn: rotates (B, S, heads, dim)."""
    hidden = x.shape[-1]
    h = matmul(modulated(x, mod[0], mod[1], eps), weights["linear_in.weight"])
    q, k, v, rest = mx.split(h, [hidden, 2 * hidden, 3 * hidden], axis=-1)
    out = mx.concatenate([_attended(weights, "", [(q, k, v)], turn, eps)[0], _gated(rest)], axis=-1)
    return add(x, mod[2], matmul(out, weights["linear_out.weight"]))


def double_block(
    weights: Weights,
    streams: Mapping[str, mx.array],
    mods: Mapping[str, tuple[tuple[mx.array, ...], ...]],
    turn: Turn,
    eps: float,
) -> mx.array:
    """streams, mods: of "txt" and "img", in this order; a stream's modulations are (attention's, the MLP's).

    Returns both streams, one after the other, (B, S, hidden).
    """
    triples = []
    for name, x in streams.items():
        shift, scale, _ = mods[name][0]
        h = modulated(x, shift, scale, eps)
        triples.append(tuple(matmul(h, weights[f"{name}.to_{kind}.weight"]) for kind in "qkv"))
    out = []
    joint = _attended(weights, [f"{name}." for name in streams], triples, turn, eps)
    for (name, x), part in zip(streams.items(), joint, strict=True):
        attention_mod, mlp_mod = mods[name]
        x = add(x, attention_mod[2], matmul(part, weights[f"{name}.to_out.weight"]))
        h = matmul(modulated(x, mlp_mod[0], mlp_mod[1], eps), weights[f"{name}.mlp_in.weight"])
        out.append(add(x, mlp_mod[2], matmul(_gated(h), weights[f"{name}.mlp_out.weight"])))
    return mx.concatenate(out, axis=1)


def _gated(h: mx.array) -> mx.array:
    half = h.shape[-1] // 2
    return swiglu(h[..., :half], h[..., half:])


def _attended(
    weights: Weights, prefixes: str | list[str], triples: list[tuple[mx.array, ...]], turn: Turn, eps: float
) -> list[mx.array]:
    """Attention over all streams' tokens; each stream's part of it."""
    prefixes = [prefixes] if isinstance(prefixes, str) else prefixes
    normed: list[list[mx.array]] = [[], [], []]
    for prefix, triple in zip(prefixes, triples, strict=True):
        dim = weights[f"{prefix}norm_q.weight"].shape[0]
        q, k, v = (_heads(a, dim) for a in triple)
        normed[0].append(rms_norm(q, weights[f"{prefix}norm_q.weight"], eps))
        normed[1].append(rms_norm(k, weights[f"{prefix}norm_k.weight"], eps))
        normed[2].append(v)
    q, k, v = (mx.concatenate(part, axis=1) for part in normed)
    out = attention(turn(q), turn(k), v)
    edges = [sum(t[0].shape[1] for t in triples[: i + 1]) for i in range(len(triples) - 1)]
    return list(mx.split(out, edges, axis=1)) if edges else [out]


def encoder_layer(weights: Weights, x: mx.array, dim: int, theta: float, eps: float) -> mx.array:
    """One layer of Qwen3, causal. x: (B, L, hidden)."""
    h = rms_norm(x, weights["input_layernorm.weight"], eps)
    q, k, v = (_heads(matmul(h, weights[f"self_attn.{n}_proj.weight"]), dim) for n in "qkv")
    q, k = (rms_norm(a, weights[f"self_attn.{n}_norm.weight"], eps) for n, a in (("q", q), ("k", k)))
    out = attention(rotate_halves(q, theta), rotate_halves(k, theta), v, mx.tri(x.shape[1], dtype=mx.bool_))
    x = add(x, mx.array(1.0), matmul(out, weights["self_attn.o_proj.weight"]))
    h = rms_norm(x, weights["post_attention_layernorm.weight"], eps)
    h = swiglu(matmul(h, weights["mlp.gate_proj.weight"]), matmul(h, weights["mlp.up_proj.weight"]))
    return add(x, mx.array(1.0), matmul(h, weights["mlp.down_proj.weight"]))


def decoder_level(weights: Weights, x: mx.array, resnets: int, groups: int, eps: float) -> mx.array:
    """The VAE's resnets, then twice the size. x: (1, H, W, C)."""
    for index in range(resnets):
        own = {k.removeprefix(f"resnets.{index}."): v for k, v in weights.items() if k.startswith(f"resnets.{index}.")}
        h = x
        for n in "12":
            h = silu(group_norm(h, own[f"norm{n}.weight"], own[f"norm{n}.bias"], groups, eps))
            h = convolve(h, own[f"conv{n}.weight"], own[f"conv{n}.bias"])
        if "shortcut.weight" in own:
            x = add(own["shortcut.bias"], mx.array(1.0), matmul(x, own["shortcut.weight"]))
        x = add(x, mx.array(1.0), h)
    return convolve(doubled(x), weights["upsample.weight"], weights["upsample.bias"])
