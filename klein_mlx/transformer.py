"""FLUX.2's transformer: text and image tokens in, velocity out.

Reads top to bottom: modulation, rotary positions, attention, the double block (text and image keep their own weights
and meet in attention), the single block (one stream, attention and MLP in parallel), the model. It knows arrays and
their config; not prompts, pictures, files or the sampler.

Source: diffusers, models/transformers/transformer_flux2.py (Flux2Transformer2DModel). Weight names are our own.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from klein_mlx.config import TransformerConfig
from klein_mlx.fusion import fused
from klein_mlx.linear import cut, linear, linear_split
from klein_mlx.residual import add_branch, modulated, wide

KeysValues = tuple[mx.array, mx.array]  # of a block, the keys turned already, both (B, S, heads, head_dim)
Note = Callable[[mx.array, mx.array], None]  # is shown a block's keys and values
RunBlock = Callable[..., Any]  # (block, its arguments) -> what the block returns


class Modulation(NamedTuple):
    """AdaLN's three vectors, each (hidden,): x is normalised, times `scale` (the 1 + is inside), plus `shift`; what a
    branch returns is multiplied by `gate`."""

    shift: mx.array
    scale: mx.array
    gate: mx.array


class Modulations(NamedTuple):
    """All that a noise level decides; the same for every block of a kind, so it is computed once per step.

    txt, img: (attention, mlp) of the double blocks' streams; single: of the single blocks; final: the shift and scale
    of the last layer, which has no gate.
    """

    txt: tuple[Modulation, Modulation]
    img: tuple[Modulation, Modulation]
    single: Modulation
    final: tuple[mx.array, mx.array]


class Rope(NamedTuple):
    """Rotary tables, each (tokens, 1, head_dim / 2, 2) float32: what the first and the second channel of each pair add
    to both, (cos, sin) and (-sin, cos)."""

    first: mx.array
    second: mx.array


def rope_tables(ids: mx.array, axes_dims: tuple[int, ...], theta: float) -> Rope:
    """The rotary tables of tokens at `ids`.

    ids: (S, 4) integers, a token's (t, h, w, l). axes_dims: how many of a head's channels each axis turns.
    Frequencies and angles are float64, as in the reference; the tables are float32.
    Source: diffusers, Flux2PosEmbed.
    """
    import numpy as np

    positions = np.array(ids, dtype=np.float64)
    angles = [
        np.outer(positions[:, axis], theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim))
        for axis, dim in enumerate(axes_dims)
    ]
    angle = np.concatenate(angles, axis=-1)[:, None, :]
    cos, sin = np.cos(angle), np.sin(angle)
    return Rope(
        mx.array(np.stack([cos, sin], axis=-1).astype(np.float32)),
        mx.array(np.stack([-sin, cos], axis=-1).astype(np.float32)),
    )


def apply_rope(x: mx.array, rope: Rope) -> mx.array:
    """Turn neighbouring pairs of channels by the tables' angles.

    x: (..., S, heads, head_dim), any float dtype; turned in float32, returned in x's dtype.
    """
    return _turn(*_halves(x), *rope).flatten(-2)


def apply_scaled_rope(qk: mx.array, scale: mx.array, rope: Rope) -> mx.array:
    """Finish the q/k norm and turn, in one kernel.

    qk: (B, S, 2, heads, head_dim), q and k normalised without their weights; scale: (2, head_dim) float32, those.
    """
    scales = _halves(mx.expand_dims(scale, 1))
    return _scale_and_turn(*_halves(qk), *scales, *(mx.expand_dims(table, 1) for table in rope)).flatten(-2)


def _halves(x: mx.array) -> tuple[mx.array, mx.array]:
    """The first and the second channel of each pair, each (..., head_dim / 2, 1)."""
    pairs = mx.unflatten(x, -1, (-1, 2))
    return pairs[..., :1], pairs[..., 1:]


# The halves are taken before the cast to float32, outside of these chains, so that each chain is one kernel.
@fused
def _turn(first: mx.array, second: mx.array, table_1: mx.array, table_2: mx.array) -> mx.array:
    turned = first.astype(mx.float32) * table_1 + second.astype(mx.float32) * table_2
    return turned.astype(first.dtype)


@fused
def _scale_and_turn(
    first: mx.array, second: mx.array, scale_1: mx.array, scale_2: mx.array, table_1: mx.array, table_2: mx.array
) -> mx.array:
    turned = first.astype(mx.float32) * (scale_1 * table_1) + second.astype(mx.float32) * (scale_2 * table_2)
    return turned.astype(first.dtype)


def attend(
    q: mx.array, k: mx.array, v: mx.array, extra: KeysValues | None = None, note: Note | None = None
) -> mx.array:
    """Full attention. q, k, v: (B, S, heads, head_dim), turned already. Returns (B, S, heads * head_dim).

    extra: keys and values of more tokens that q attends to. note: is shown k and v.
    """
    if note is not None:
        note(k, v)
    if extra is not None:
        k, v = mx.concatenate([k, extra[0]], axis=1), mx.concatenate([v, extra[1]], axis=1)
    q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
    return out.transpose(0, 2, 1, 3).flatten(2)


def timestep_embedding(timestep: mx.array, channels: int) -> mx.array:
    """Sinusoids of a timestep in 0..1000. timestep: (1,), any float dtype. Returns (1, channels) in its dtype.

    Cosines before sines, the reverse of the usual order. Source: diffusers, get_timestep_embedding(flip_sin_to_cos).
    """
    import numpy as np

    half = channels // 2
    # numpy's exp: MLX's is some ulp off in float32, which a timestep near 1000 magnifies.
    frequencies = mx.array(np.exp(np.arange(half, dtype=np.float32) * np.float32(-math.log(10000.0)) / half))
    angle = timestep.astype(mx.float32)[:, None] * frequencies
    return mx.concatenate([mx.cos(angle), mx.sin(angle)], axis=-1).astype(timestep.dtype)


class TimeEmbedding(nn.Module):
    """Timestep -> `vec`, from which all modulations are projected."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, hidden, bias=False)
        self.linear_2 = nn.Linear(hidden, hidden, bias=False)

    def __call__(self, timestep: mx.array) -> mx.array:
        return self.linear_2(_silu(self.linear_1(timestep_embedding(timestep, self.channels))))


class Stream(nn.Module):
    """One stream's own weights inside a double block: attention projections, q/k norms and the MLP."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        hidden, head_dim, mlp = config.hidden_size, config.attention_head_dim, config.mlp_size
        self.head_dim = head_dim
        self.eps = config.eps
        self.to_q = nn.Linear(hidden, hidden, bias=False)
        self.to_k = nn.Linear(hidden, hidden, bias=False)
        self.to_v = nn.Linear(hidden, hidden, bias=False)
        self.to_out = nn.Linear(hidden, hidden, bias=False)
        self.norm_q = nn.RMSNorm(head_dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(head_dim, eps=config.eps)
        self.mlp_in = nn.Linear(hidden, 2 * mlp, bias=False)
        self.mlp_out = nn.Linear(mlp, hidden, bias=False)

    def qkv(self, x: mx.array, mod: Modulation) -> tuple[mx.array, mx.array, mx.array]:
        """q, k, v of the modulated stream, each (B, S, heads, head_dim); q and k normalised per head."""
        x = modulated(x, mod.shift, mod.scale, self.eps, self.norm_q.weight.dtype)
        q, k, v = (mx.unflatten(linear(p, x), -1, (-1, self.head_dim)) for p in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v

    def finish(self, x: mx.array, attention: mx.array, mods: tuple[Modulation, Modulation]) -> mx.array:
        """Add what attention returned for this stream, then the MLP."""
        mod_attention, mod_mlp = mods
        x = add_branch(x, mod_attention.gate, self.to_out, attention)
        h = linear(self.mlp_in, modulated(x, mod_mlp.shift, mod_mlp.scale, self.eps, attention.dtype))
        return add_branch(x, mod_mlp.gate, self.mlp_out, None, *mx.split(h, 2, axis=-1))

    def __call__(self, x: mx.array, mods: tuple[Modulation, Modulation], rope: Rope, note: Note) -> mx.array:
        """The stream without the other one: x (B, N, hidden), tokens that see each other only."""
        q, k, v = self.qkv(x, mods[0])
        return self.finish(x, attend(apply_rope(q, rope), apply_rope(k, rope), v, note=note), mods)


class DoubleBlock(nn.Module):
    """Text and image streams with weights of their own, joined in one attention over [text, image, references]."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.txt = Stream(config)
        self.img = Stream(config)

    def __call__(
        self,
        txt: mx.array,
        img: mx.array,
        mod_txt: tuple[Modulation, Modulation],
        mod_img: tuple[Modulation, Modulation],
        rope: Rope,
        extra: KeysValues | None = None,
        note: Note | None = None,
    ) -> tuple[mx.array, mx.array]:
        """txt: (B, L, hidden); img: (B, N, hidden). Returns both, same shapes. extra, note: as in `attend`."""
        txt_q, txt_k, txt_v = self.txt.qkv(txt, mod_txt[0])
        img_q, img_k, img_v = self.img.qkv(img, mod_img[0])
        qk = mx.concatenate([txt_q, img_q, txt_k, img_k], axis=1)
        qk = apply_rope(mx.unflatten(qk, 1, (2, -1)), rope)  # q and k are turned in one kernel
        attention = attend(qk[:, 0], qk[:, 1], mx.concatenate([txt_v, img_v], axis=1), extra, note)
        length = txt.shape[1]
        txt = self.txt.finish(txt, attention[:, :length], mod_txt)
        img = self.img.finish(img, attention[:, length:], mod_img)
        return txt, img


class SingleBlock(nn.Module):
    """One stream over all tokens; attention and MLP read the same input and share the projections in and out."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        hidden, mlp = config.hidden_size, config.mlp_size
        self.hidden, self.mlp, self.head_dim, self.eps = hidden, mlp, config.attention_head_dim, config.eps
        self.dtype: mx.Dtype | None = None  # what the layers compute in, once `arrange` has taken the norms away
        self.linear_in = nn.Linear(hidden, 3 * hidden + 2 * mlp, bias=False)
        self.linear_out = nn.Linear(hidden + mlp, hidden, bias=False)
        self.norm_q = nn.RMSNorm(self.head_dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(self.head_dim, eps=config.eps)

    def arrange(self) -> None:
        """Bring the weights into the layout that is fastest to use: linear_out cut for its two inputs, and norm_qk
        (2, head_dim) float32 in place of the weights of both norms."""
        self.linear_out = cut(self.linear_out, self.hidden)
        self.dtype = self.norm_q.weight.dtype
        self.norm_qk = self._scale()
        del self.norm_q, self.norm_k

    def _scale(self) -> mx.array:
        """Weights of the q and the k norm, (2, head_dim) float32."""
        if "norm_qk" in self:
            return self.norm_qk
        return mx.stack([self.norm_q.weight, self.norm_k.weight]).astype(mx.float32)

    def __call__(
        self, x: mx.array, mod: Modulation, rope: Rope, extra: KeysValues | None = None, note: Note | None = None
    ) -> mx.array:
        """x: (B, S, hidden), the tokens [text, image, references]; extra, note: as in `attend`. Returns x's shape."""
        h = modulated(x, mod.shift, mod.scale, self.eps, self.dtype or self.norm_q.weight.dtype)
        qk, rest = linear_split(self.linear_in, h, 2 * self.hidden)
        qk = mx.unflatten(qk, -1, (2, -1, self.head_dim))
        # Normalised together; the two weights follow with the rotation.
        qk = apply_scaled_rope(mx.fast.rms_norm(qk, None, self.eps), self._scale(), rope)
        v, gate, value = mx.split(rest, [self.hidden, self.hidden + self.mlp], axis=-1)
        attention = attend(qk[:, :, 0], qk[:, :, 1], mx.unflatten(v, -1, (-1, self.head_dim)), extra, note)
        return add_branch(x, mod.gate, self.linear_out, attention, gate, value)


def call_block(block: nn.Module, *args: Any) -> Any:
    return block(*args)  # type: ignore[operator]


class Transformer(nn.Module):
    """FLUX.2 [klein]'s velocity model. Token order everywhere: text, image, references."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        hidden = config.hidden_size
        self.config = config
        self.img_in = nn.Linear(config.in_channels, hidden, bias=False)
        self.txt_in = nn.Linear(config.joint_attention_dim, hidden, bias=False)
        self.time_in = TimeEmbedding(config.timestep_guidance_channels, hidden)
        self.mod_img = nn.Linear(hidden, 6 * hidden, bias=False)
        self.mod_txt = nn.Linear(hidden, 6 * hidden, bias=False)
        self.mod_single = nn.Linear(hidden, 3 * hidden, bias=False)
        self.double_blocks = [DoubleBlock(config) for _ in range(config.num_layers)]
        self.single_blocks = [SingleBlock(config) for _ in range(config.num_single_layers)]
        self.final_mod = nn.Linear(hidden, 2 * hidden, bias=False)
        self.final_out = nn.Linear(hidden, config.in_channels, bias=False)

    def arrange(self) -> None:
        """Bring the weights from the checkpoint's layout into that of a step, lazily. Call once they are loaded; names
        and shapes of parameters change, results only by the order of sums."""
        for block in self.single_blocks:
            block.arrange()

    def modulations(self, sigma: float, dtype: mx.Dtype) -> Modulations:
        """What noise level `sigma` (0..1) asks of every block, in the compute dtype."""
        return self.all_modulations([sigma], dtype)[0]

    def all_modulations(self, sigmas: Sequence[float], dtype: mx.Dtype) -> list[Modulations]:
        """The modulations of several noise levels, by one matmul per projection. dtype: that of the layers.

        The reference rounds the timestep to the compute dtype, divides by 1000 and multiplies again: in bfloat16 that
        moves it by up to 4 near 1000, and the model was trained so. In float32 it is exact, and so it is kept beside
        float16 layers.
        """
        timesteps = mx.array([1000.0 * sigma for sigma in sigmas]).astype(wide(dtype)) / 1000 * 1000
        vec = _silu(self.time_in(timesteps))
        projections = (self.mod_txt, self.mod_img, self.mod_single, self.final_mod)
        return [_modulations(*rows) for rows in zip(*(list(layer(vec)) for layer in projections), strict=True)]

    def embed_text(self, prompt_embeds: mx.array) -> mx.array:
        """prompt_embeds (B, L, joint dim) as the text stream's start, (B, L, hidden): the same in all steps.

        prompt_embeds: `wide` of the layers' dtype; some are so large that float16 could not hold them.
        """
        return linear(self.txt_in, prompt_embeds)

    def __call__(
        self,
        tokens: mx.array,
        txt: mx.array,
        modulations: Modulations,
        rope: Rope,
        num_img: int,
        extras: Sequence[KeysValues] | None = None,
        note: Note | None = None,
        run: RunBlock = call_block,
    ) -> mx.array:
        """The velocity at one noise level.

        tokens: (B, N, in_channels), the image's tokens, then the references'. txt: (B, L, hidden), from `embed_text`.
        rope: of the ids [text, image, references]. num_img: how many of the tokens are the image's. extras, note: for
        every block in turn, as in `attend`. run: calls a block with its arguments; it may compile, evaluate, or stop.
        Returns (B, num_img, in_channels), in the dtype of `tokens`, which is the layers'; all else is `wide` of it.
        """
        blocks = len(self.double_blocks) + len(self.single_blocks)
        later = iter([None] * blocks if extras is None else extras)
        told = () if note is None else (note,)
        img = linear(self.img_in, tokens).astype(wide(tokens.dtype))
        for block in self.double_blocks:
            txt, img = run(block, txt, img, modulations.txt, modulations.img, rope, next(later), *told)
        x = mx.concatenate([txt, img], axis=1)
        for block in self.single_blocks:
            x = run(block, x, modulations.single, rope, next(later), *told)
        shift, scale = modulations.final
        x = x[:, txt.shape[1] : txt.shape[1] + num_img]
        return linear(self.final_out, modulated(x, shift, scale, self.config.eps, tokens.dtype))

    def remember(
        self, tokens: mx.array, modulations: Modulations, rope: Rope, note: Note, run: RunBlock = call_block
    ) -> None:
        """Run references alone, as 9b-kv wants them: they see each other only, at the modulations of sigma 0.

        tokens: (B, N, in_channels), all references'. rope: of their ids. note: is shown every block's keys and values.
        run: calls a block, as in a step; of the double blocks only their image streams.
        Since nothing else reaches these tokens, this one pass serves all steps. Source: diffusers,
        Flux2Transformer2DModel.forward with kv_cache_mode="extract", which does the same inside the first step.
        """
        x = linear(self.img_in, tokens).astype(wide(tokens.dtype))
        for block in self.double_blocks:
            x = run(block.img, x, modulations.img, rope, note)
        for block in self.single_blocks:
            x = run(block, x, modulations.single, rope, None, note)


def _modulations(txt: mx.array, img: mx.array, single: mx.array, final: mx.array) -> Modulations:
    """One noise level's, from its row of each projection."""
    vectors = [*mx.split(txt, 6), *mx.split(img, 6), *mx.split(single, 3)]
    one, two, three, four, five = (
        Modulation(shift, 1 + scale, gate) for shift, scale, gate in zip(*[iter(vectors)] * 3, strict=True)
    )
    shift, scale = mx.split(final, 2)
    return Modulations((one, two), (three, four), five, (shift, 1 + scale))


def _silu(x: mx.array) -> mx.array:
    # mlx.nn's own is compiled, which on a CPU would call a C++ compiler.
    return x * mx.sigmoid(x)
