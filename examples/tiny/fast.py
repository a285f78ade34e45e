"""The forward pass of diffusers' Flux2Transformer2DModel for training, on the module's own parameters.

The same function (evaluate.py checks it against diffusers), arranged for bfloat16 on a CPU: rotary embedding as
x * cos + (x @ SWAP) * sin, attention as two plain matrix products, everything in a form that torch.compile can fuse.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import Flux2Transformer2DModel
from torch import Tensor

GRID = 8  # image tokens a side
TXT_AXIS, REF_STEP = 3, 10


def token_ids(text: int, references: int) -> Tensor:
    """Positions (t, h, w, l) of [text, image, references]: (tokens, 4) float64."""
    txt = torch.zeros(text, 4, dtype=torch.float64)
    txt[:, TXT_AXIS] = torch.arange(text)
    y, x = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    grid = torch.stack([torch.zeros_like(x), y, x, torch.zeros_like(x)], dim=-1).reshape(-1, 4).double()
    parts = [txt]
    for i in range(1 + references):
        part = grid.clone()
        part[:, 0] = REF_STEP * i
        parts.append(part)
    return torch.cat(parts)


def rope_tables(model: Flux2Transformer2DModel, text: int, references: int) -> tuple[Tensor, Tensor]:
    """cos and sin (tokens, head dim) float32, each angle twice (interleaved pairs)."""
    angles = []
    for axis, dim in enumerate(model.config.axes_dims_rope):
        rates = model.config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(token_ids(text, references)[:, axis, None] * rates)
    table = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)
    return table.cos().float(), table.sin().float()


def swap_matrix(dim: int) -> Tensor:
    """(x @ swap)[2i] = -x[2i + 1] and (x @ swap)[2i + 1] = x[2i]."""
    swap = torch.zeros(dim, dim)
    even = torch.arange(0, dim, 2)
    swap[even + 1, even] = -1
    swap[even, even + 1] = 1
    return swap


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
    return (normed * (1 + scale) + shift).to(x.dtype)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm per head; x: (B, heads, tokens, dim)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.float()).to(x.dtype)


def _rotated(x: Tensor, rope: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Rotary embedding of all tokens; x: (B, heads, tokens, dim)."""
    cos, sin, swap = rope
    return (x.float() * cos + (x @ swap).float() * sin).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    return (torch.softmax(scores, dim=-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


def _swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def _double_block(
    block: torch.nn.Module, img: Tensor, txt: Tensor, mods: tuple[Tensor, Tensor], rope: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    attn, heads, length = block.attn, block.attn.heads, txt.shape[1]
    i, t = (m.unsqueeze(1).chunk(6, dim=-1) for m in mods)
    normed, normed_txt = _modulated(img, i[0], i[1]), _modulated(txt, t[0], t[1])

    def both(name: str, norm: str) -> Tensor:
        ours = _heads(getattr(attn, f"to_{name}")(normed), heads)
        theirs = _heads(getattr(attn, f"add_{name}_proj")(normed_txt), heads)
        if norm:
            ours = _normed(ours, getattr(attn, f"norm_{name}").weight)
            theirs = _normed(theirs, getattr(attn, f"norm_added_{name}").weight)
        return torch.cat([theirs, ours], dim=2)

    # Rotated together: torch 2.13's compiled backward of two rotations of slices of the tables gives NaN.
    mixed = _attend(_rotated(both("q", "norm"), rope), _rotated(both("k", "norm"), rope), both("v", ""))
    img = img + i[2].to(img.dtype) * attn.to_out[0](mixed[:, length:])
    txt = txt + t[2].to(txt.dtype) * attn.to_add_out(mixed[:, :length])
    ff, ff_txt = block.ff, block.ff_context
    img = img + i[5].to(img.dtype) * ff.linear_out(_swiglu(ff.linear_in(_modulated(img, i[3], i[4]))))
    txt = txt + t[5].to(txt.dtype) * ff_txt.linear_out(_swiglu(ff_txt.linear_in(_modulated(txt, t[3], t[4]))))
    return img, txt


def _single_block(block: torch.nn.Module, x: Tensor, mod: Tensor, rope: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    attn = block.attn
    shift, scale, gate = mod.unsqueeze(1).chunk(3, dim=-1)
    fused = attn.to_qkv_mlp_proj(_modulated(x, shift, scale))
    qkv, mlp = fused.split([3 * attn.inner_dim, fused.shape[-1] - 3 * attn.inner_dim], dim=-1)
    q, k, v = (_heads(part, attn.heads) for part in qkv.chunk(3, dim=-1))
    q, k = _normed(q, attn.norm_q.weight), _normed(k, attn.norm_k.weight)
    mixed = _attend(_rotated(q, rope), _rotated(k, rope), v)
    return x + gate.to(x.dtype) * attn.to_out(torch.cat([mixed, _swiglu(mlp)], dim=-1))


def velocity(
    model: Flux2Transformer2DModel, tokens: Tensor, txt: Tensor, sigma: Tensor, rope: tuple[Tensor, ...]
) -> Tensor:
    """The velocity of the image tokens.

    tokens: (B, 64 * (1 + references), C), image first; txt: (B, LENGTH, joint dim); sigma: (B,) float32 in 0..1;
    rope: cos, sin and the swap matrix. All in the dtype of the model's weights except sigma and the tables.
    Returns (B, 64, C).
    """
    dtype = tokens.dtype
    half = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)
    angles = 1000.0 * sigma.float()[:, None] * half
    embedder = model.time_guidance_embed.timestep_embedder
    vec = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
    vec = F.silu(embedder.linear_2(F.silu(embedder.linear_1(vec))))
    mods = [m.linear(vec) for m in (model.double_stream_modulation_img, model.double_stream_modulation_txt)]
    single = model.single_stream_modulation.linear(vec)
    img, txt = model.x_embedder(tokens), model.context_embedder(txt)
    for block in model.transformer_blocks:
        img, txt = _double_block(block, img, txt, (mods[0], mods[1]), rope)
    x = torch.cat([txt, img], dim=1)
    for block in model.single_transformer_blocks:
        x = _single_block(block, x, single, rope)
    x = x[:, txt.shape[1] : txt.shape[1] + GRID * GRID]
    scale, shift = model.norm_out.linear(vec).unsqueeze(1).chunk(2, dim=-1)
    return model.proj_out(_modulated(x, shift, scale))


def make_velocity(model: Flux2Transformer2DModel, text: int, compiled: bool = True) -> Callable[..., Tensor]:
    """`velocity` bound to a model: f(tokens, txt, sigma), with the tables for none, one and two references."""
    tables = []
    for references in range(3):
        cos, sin = rope_tables(model, text, references)
        tables.append((cos, sin, swap_matrix(cos.shape[1]).to(next(model.parameters()).dtype)))
    inner = torch.compile(velocity, dynamic=False) if compiled else velocity

    def call(tokens: Tensor, txt: Tensor, sigma: Tensor) -> Tensor:
        return inner(model, tokens, txt, sigma, tables[tokens.shape[1] // (GRID * GRID) - 1])

    return call
