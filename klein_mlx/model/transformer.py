"""FLUX.2's transformer: text and image tokens in, velocity out.

Reads top to bottom: modulation, rotary positions, attention, the double block (text and image keep their own weights
and meet in attention), the single block (one stream, attention and MLP in parallel), the model. It knows arrays and
their config; not prompts, pictures, files or the sampler.

Source: diffusers, models/transformers/transformer_flux2.py (Flux2Transformer2DModel) and models/embeddings.py
(apply_rotary_emb). Weight names are our own.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from klein_mlx.config import EMBEDDED_GUIDANCE, TransformerConfig
from klein_mlx.model.compile import Chain, CompiledBlocks
from klein_mlx.model.layers import Device, Linear, Placed, add_branch, cut, join, modulated, separate, wide

KeysValues = tuple[mx.array, mx.array]  # of a block, the keys turned already, both (B, S, heads, head_dim)
Note = Callable[[mx.array, mx.array], Sequence[mx.array]]  # keeps what it wants of a block's keys and values
RunBlock = Callable[..., Any]  # (block, *its arguments, note=None) -> the block's result, without keys and values


# FLOP that one attention kernel may take: a GPU that also draws a screen is not to be held for seconds (macOS would end
# the work). At 1024 x 1024 klein 4B needs 0.26e12.
LONGEST_ATTENTION = 10**12


class Modulation(NamedTuple):
    """AdaLN's three vectors, each (hidden,): x is normalized, times `scale` (the 1 + is inside), plus `shift`; what a
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
    """Rotary tables shared by all heads; the first axis is the token.

    first, second: rotary tables, (tokens, 1, head_dim / 2, 2) float32: what the first and the second channel of each
    pair add to both, (cos, sin) and (-sin, cos). text: (tokens, 1, 1) bool, which of them are the prompt's. lengths:
    how many tokens each process has whose keys and values are read, where several share them; else empty.
    """

    first: mx.array
    second: mx.array
    text: mx.array
    lengths: tuple[int, ...] = ()

    def rows(self, start: int, stop: int | None = None) -> "Rope":
        """The tables of some of the tokens."""
        return self._replace(first=self.first[start:stop], second=self.second[start:stop], text=self.text[start:stop])


def joined(parts: Sequence[Rope], lengths: tuple[int, ...]) -> Rope:
    """The tables of some tokens, and of others behind them. lengths: as in `Rope`."""
    if len(parts) == 1:
        return parts[0]._replace(lengths=lengths)
    first, second, text = (mx.concatenate([part[table] for part in parts]) for table in range(3))  # type: ignore[misc]
    return Rope(first, second, text, lengths)


def rope_tables(ids: mx.array, axes_dims: tuple[int, ...], theta: float, length: int) -> Rope:
    """The rotary tables of tokens at `ids`.

    ids: (S, 4) integers, a token's (t, h, w, l). axes_dims: how many of a head's channels each axis turns. length: how
    many of the first tokens are the prompt's.
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
        (mx.arange(len(positions)) < length)[:, None, None],
    )


def attend(
    device: Device,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    extra: KeysValues | None = None,
    lengths: tuple[int, ...] = (),
) -> mx.array:
    """Full attention. q: (B, Q, heads, head_dim); k, v: (B, S, heads, head_dim); q and k are rotated already.

    Returns (B, Q, heads * head_dim). extra: keys and values of more tokens that q attends to. lengths: as in `Rope`.
    """
    if extra is not None:
        k, v = mx.concatenate([k, extra[0]], axis=1), mx.concatenate([v, extra[1]], axis=1)
    if lengths:  # in one exchange: two might come in another order elsewhere
        k, v = mx.split(gathered(mx.concatenate([k, v], axis=-1), lengths), 2, axis=-1)
    q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
    rows = max(1, LONGEST_ATTENTION // (4 * q.shape[0] * q.shape[1] * k.shape[2] * q.shape[3]))
    parts = [device.attention(q[:, :, i : i + rows], k, v).transpose(0, 2, 1, 3) for i in range(0, q.shape[2], rows)]
    # Joined token by token, as Metal's attention writes them: joined head by head they would have to be copied again.
    return (parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)).flatten(2)


def gathered(x: mx.array, lengths: Sequence[int]) -> mx.array:
    """All processes' tokens, in the order of the processes. x: (B, S, ...), this one's. lengths: S of each."""
    most = max(lengths)
    if x.shape[1] < most:
        x = mx.pad(x, [(0, 0), (0, most - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])
    whole = mx.distributed.all_gather(x.swapaxes(0, 1))
    if min(lengths) < most:
        whole = mx.concatenate([whole[most * i : most * i + length] for i, length in enumerate(lengths)])
    return whole.swapaxes(0, 1)


def normed_and_rotated(
    device: Device, qk: mx.array, scale: mx.array, rope: Rope, eps: float, img_scale: mx.array | None = None
) -> mx.array:
    """RMSNorm of every head's q and k, then neighboring pairs of channels rotated by the tables' angles.

    qk: (B, S, n, heads, head_dim), any float dtype, returned in it; n is 2 for q and k, 1 for one of them. scale: the
    norms' weights, (n, head_dim) float32; with img_scale only those of the prompt's tokens, and img_scale the others'.
    """
    qk = mx.fast.rms_norm(qk, None, eps)  # q and k together; their weights follow with the rotation, in one kernel
    scales = [mx.expand_dims(weights, -2) for weights in (scale, img_scale) if weights is not None]
    pairs = [mx.unflatten(a, -1, (-1, 2)) for a in (qk, *scales)]
    # The halves, (..., head_dim / 2, 1), are taken before the cast to float32, outside of the chain: it is one kernel.
    first, second, *weights = (half for pair in pairs for half in (pair[..., :1], pair[..., 1:]))
    tables = mx.expand_dims(rope.first, 1), mx.expand_dims(rope.second, 1)
    if img_scale is None:
        return device.form(_scale_and_rotate)(first, second, *tables, *weights).flatten(-2)
    text = mx.expand_dims(rope.text, (-1, -2))
    return device.form(_scale_and_rotate_streams)(first, second, *tables, *weights, text).flatten(-2)


@Chain
def _scale_and_rotate(
    first: mx.array, second: mx.array, table_1: mx.array, table_2: mx.array, scale_1: mx.array, scale_2: mx.array
) -> mx.array:
    rotated = first.astype(mx.float32) * (scale_1 * table_1) + second.astype(mx.float32) * (scale_2 * table_2)
    return rotated.astype(first.dtype)


@Chain
def _scale_and_rotate_streams(
    first: mx.array,
    second: mx.array,
    table_1: mx.array,
    table_2: mx.array,
    txt_1: mx.array,
    txt_2: mx.array,
    img_1: mx.array,
    img_2: mx.array,
    text: mx.array,
) -> mx.array:
    """As `_scale_and_rotate`, each token with its stream's weights. text: which tokens are the prompt's."""
    scale_1, scale_2 = mx.where(text, txt_1, img_1), mx.where(text, txt_2, img_2)
    rotated = first.astype(mx.float32) * (scale_1 * table_1) + second.astype(mx.float32) * (scale_2 * table_2)
    return rotated.astype(first.dtype)


def timestep_embedding(timestep: mx.array, channels: int) -> mx.array:
    """Sinusoids of a timestep in 0..1000. timestep: (1,), any float dtype. Returns (1, channels) in its dtype.

    Cosines before sines, the reverse of the usual order. Source: diffusers, get_timestep_embedding(flip_sin_to_cos).
    """
    import numpy as np

    half = channels // 2
    # exp rounded once: in float32 MLX's is some ulp off, and numpy's one, which a guidance of 4000 magnifies.
    exponents = np.arange(half, dtype=np.float32) * np.float32(-math.log(10000.0)) / half
    frequencies = mx.array(np.exp(exponents.astype(np.float64)).astype(np.float32))
    angle = timestep.astype(mx.float32)[:, None] * frequencies
    return mx.concatenate([mx.cos(angle), mx.sin(angle)], axis=-1).astype(timestep.dtype)


class TimeEmbedding(Placed):
    """Timestep -> `vec`, from which all modulations are projected."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.channels = channels
        self.linear_1 = Linear(channels, hidden)
        self.linear_2 = Linear(hidden, hidden)

    def __call__(self, timestep: mx.array) -> mx.array:
        return self.linear_2(_silu(self.linear_1(timestep_embedding(timestep, self.channels))))


class Heads(Placed):
    """What both kinds of blocks have: heads whose q and k are normalized by weights of their own, then turned.

    Arranged (see Transformer.arrange), a module has norm_qk in place of norm_q and norm_k.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.hidden, self.head_dim, self.eps = config.hidden_size, config.attention_head_dim, config.eps
        self.norm_q = nn.RMSNorm(self.head_dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(self.head_dim, eps=config.eps)
        self._dtype: mx.Dtype | None = None

    @property
    def dtype(self) -> mx.Dtype:
        """What the layers compute in."""
        return self._dtype or self.norm_q.weight.dtype

    def scale(self) -> mx.array:
        """Weights of the q and the k norm, (2, head_dim) float32."""
        if "norm_qk" in self:
            return self.norm_qk
        return mx.stack([self.norm_q.weight, self.norm_k.weight]).astype(mx.float32)

    def arrange(self) -> None:
        """Bring the weights into the layout that is fastest to use, lazily. Arranged already, nothing changes."""
        if "norm_qk" not in self:
            self._dtype, self.norm_qk = self.dtype, self.scale()
            del self.norm_q, self.norm_k

    def separate(self) -> None:
        """Undo `arrange`, as far as checkpoint names that are gone must be there again."""
        if "norm_qk" in self:
            for index, name in enumerate(("norm_q", "norm_k")):
                norm = nn.RMSNorm(self.head_dim, eps=self.eps)
                norm.weight = self.norm_qk[index].astype(self.dtype)
                self[name] = norm
            self._dtype = None
            del self.norm_qk

    def read(self, x: mx.array, mod: Modulation) -> mx.array:
        """What the first branch reads of the stream."""
        return modulated(x, mod.shift, mod.scale, self.eps, self.dtype)

    def split_heads(self, x: mx.array) -> mx.array:
        """(B, S, n * head_dim) -> (B, S, n, head_dim)."""
        return mx.unflatten(x, -1, (-1, self.head_dim))

    def turned(self, x: mx.array, which: int, rope: Rope) -> mx.array:
        """q (which: 0) or k (1) alone, (B, S, hidden), normed and rotated: (B, S, heads, head_dim)."""
        one = mx.unflatten(x, -1, (1, -1, self.head_dim))
        return normed_and_rotated(self.device, one, self.scale()[which : which + 1], rope, self.eps)[:, :, 0]


class Stream(Heads):
    """One stream's own weights inside a double block: attention projections, q/k norms and the MLP.

    Arranged, it has to_qk in place of to_q and to_k, if those are of one kind.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        hidden, mlp = self.hidden, config.mlp_size
        self.to_q = Linear(hidden, hidden)
        self.to_k = Linear(hidden, hidden)
        self.to_v = Linear(hidden, hidden)
        self.to_out = Linear(hidden, hidden)
        self.mlp_in = Linear(hidden, 2 * mlp)
        self.mlp_out = Linear(mlp, hidden)

    def arrange(self) -> None:
        super().arrange()
        join(self, "to_q", "to_k", "to_qk")

    def separate(self) -> None:
        super().separate()
        separate(self, "to_q", "to_k", "to_qk")

    def qk_and_v(self, x: mx.array, mod: Modulation) -> tuple[mx.array, mx.array]:
        """Of the modulated stream: q and k, (B, S, 2, heads, head_dim), not normed yet; v, (B, S, heads, head_dim)."""
        x = self.read(x, mod)
        if "to_qk" in self:
            qk = self["to_qk"](x)
        else:
            qk = mx.concatenate([self.to_q(x), self.to_k(x)], axis=-1)
        return mx.unflatten(qk, -1, (2, -1, self.head_dim)), self.split_heads(self.to_v(x))

    def keys_values(self, h: mx.array, rope: Rope) -> KeysValues:
        """Of what `read` returned. With `attending`, what a call does, for some of the tokens at a time."""
        k = self["to_qk"].part(h, slice(self.hidden, None)) if "to_qk" in self else self.to_k(h)
        return self.turned(k, 1, rope), self.split_heads(self.to_v(h))

    def attending(
        self, x: mx.array, h: mx.array, mods: tuple[Modulation, Modulation], rope: Rope, keys_values: KeysValues
    ) -> mx.array:
        """x, some tokens of the stream, behind the block, in which they attend to these keys and values. h: of `read`;
        rope: theirs."""
        q = self["to_qk"].part(h, slice(self.hidden)) if "to_qk" in self else self.to_q(h)
        return self.finish(x, attend(self.device, self.turned(q, 0, rope), *keys_values), mods)

    def finish(self, x: mx.array, attention: mx.array, mods: tuple[Modulation, Modulation]) -> mx.array:
        """Add what attention returned for this stream, then the MLP."""
        mod_attention, mod_mlp = mods
        x = add_branch(x, mod_attention.gate, self.to_out, attention)
        h = self.mlp_in(modulated(x, mod_mlp.shift, mod_mlp.scale, self.eps, attention.dtype))
        return add_branch(x, mod_mlp.gate, self.mlp_out, None, *mx.split(h, 2, axis=-1))

    def __call__(self, x: mx.array, mods: tuple[Modulation, Modulation], rope: Rope) -> tuple[mx.array, KeysValues]:
        """The stream without the other one: x (B, N, hidden), tokens that see each other only."""
        qk, v = self.qk_and_v(x, mods[0])
        qk = normed_and_rotated(self.device, qk, self.scale(), rope, self.eps)
        q, k = qk[:, :, 0], qk[:, :, 1]
        return self.finish(x, attend(self.device, q, k, v, None, rope.lengths), mods), (k, v)


class DoubleBlock(Placed):
    """Text and image streams with weights of their own, joined in one attention over [text, image, references]."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.txt = Stream(config)
        self.img = Stream(config)

    def arrange(self) -> None:
        """As of both streams."""
        self.txt.arrange()
        self.img.arrange()

    def __call__(
        self,
        txt: mx.array,
        img: mx.array,
        mod_txt: tuple[Modulation, Modulation],
        mod_img: tuple[Modulation, Modulation],
        rope: Rope,
        extra: KeysValues | None = None,
    ) -> tuple[tuple[mx.array, mx.array], KeysValues]:
        """txt: (B, L, hidden); img: (B, N, hidden). extra: as in `attend`.

        Returns txt and img, same shapes, and the keys and values of all their tokens, (B, L + N, heads, head_dim).
        """
        pairs = zip(self.txt.qk_and_v(txt, mod_txt[0]), self.img.qk_and_v(img, mod_img[0]), strict=True)
        qk, v = (mx.concatenate([*pair], axis=1) for pair in pairs)
        scales = self.txt.scale(), self.img.scale()
        qk = normed_and_rotated(self.device, qk, scales[0], rope, self.txt.eps, scales[1])
        q, k = qk[:, :, 0], qk[:, :, 1]
        attention = attend(self.device, q, k, v, extra, rope.lengths)
        length = txt.shape[1]
        txt = self.txt.finish(txt, attention[:, :length], mod_txt)
        img = self.img.finish(img, attention[:, length:], mod_img)
        return (txt, img), (k, v)


class SingleBlock(Heads):
    """One stream over all tokens; attention and MLP read the same input and share the projections in and out.

    Arranged, its linear_out is cut for its two inputs.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        hidden, mlp = self.hidden, config.mlp_size
        self.mlp = mlp
        self.linear_in = Linear(hidden, 3 * hidden + 2 * mlp)
        self.linear_out = Linear(hidden + mlp, hidden)

    def arrange(self) -> None:
        super().arrange()
        self.linear_out = cut(self.linear_out, self.hidden)

    def __call__(
        self,
        x: mx.array,
        mod: Modulation,
        rope: Rope,
        extra: KeysValues | None = None,
        wanted: tuple[int, int] | None = None,
    ) -> tuple[mx.array, KeysValues]:
        """x: (B, S, hidden), the tokens [text, image, references]; extra: as in `attend`.

        wanted: the first token of which anything is read afterwards, and the one behind the last; None: all. Others
        give keys and values only. Returns x, or the wanted tokens of it, and the keys and values of all tokens.
        """
        h = self.read(x, mod)
        if wanted is not None:
            x, part = x[:, slice(*wanted)], h[:, slice(*wanted)]
            k, v = self.keys_values(h, rope)
            return self.attending(x, part, mod, rope.rows(*wanted), (k, v), extra), (k, v)
        qk, rest = self.linear_in.split(h, 2 * self.hidden)
        v, gate, value = mx.split(rest, [self.hidden, self.hidden + self.mlp], axis=-1)
        qk = mx.unflatten(qk, -1, (2, -1, self.head_dim))
        qk = normed_and_rotated(self.device, qk, self.scale(), rope, self.eps)
        q, k = qk[:, :, 0], qk[:, :, 1]
        v = self.split_heads(v)
        attention = attend(self.device, q, k, v, extra, rope.lengths)
        return add_branch(x, mod.gate, self.linear_out, attention, gate, value), (k, v)

    def keys_values(self, h: mx.array, rope: Rope) -> KeysValues:
        """Of what `read` returned. With `attending`, what a call does, for some of the tokens at a time."""
        k, v = (self.linear_in.part(h, slice(i * self.hidden, (i + 1) * self.hidden)) for i in (1, 2))
        return self.turned(k, 1, rope), self.split_heads(v)

    def attending(
        self,
        x: mx.array,
        h: mx.array,
        mod: Modulation,
        rope: Rope,
        keys_values: KeysValues,
        extra: KeysValues | None = None,
    ) -> mx.array:
        """x, some of the tokens, behind the block, in which they attend to these keys and values. h: of `read`; rope:
        theirs."""
        q, mlp = (self.linear_in.part(h, own) for own in (slice(self.hidden), slice(3 * self.hidden, None)))
        attention = attend(self.device, self.turned(q, 0, rope), *keys_values, extra, rope.lengths)
        return add_branch(x, mod.gate, self.linear_out, attention, *mx.split(mlp, 2, axis=-1))


def call_block(block: Any, *args: Any, note: Note | None = None) -> Any:
    """The block's result. note: is shown its keys and values."""
    out, keys_values = block(*args)
    if note is not None:
        note(*keys_values)
    return out


def in_parts(blocks: CompiledBlocks, part_done: Callable[..., None]) -> RunBlock:
    """Calls a transformer's blocks one by one. part_done: called after each with its result, and what was kept of it;
    what it raises ends the step there."""

    def call(block: Any, *args: Any, note: Note | None = None) -> Any:
        out, keys_values = blocks(block, *args) if block.device.compiles else block(*args)
        kept = () if note is None else note(*keys_values)
        del keys_values  # they share memory with the block's largest arrays
        part_done(*(out if isinstance(out, tuple) else (out,)), *kept)
        return out

    return call


class Transformer(Placed):
    """FLUX.2's velocity model. Token order everywhere: text, image, references."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        hidden = config.hidden_size
        self.config = config
        self.img_in = Linear(config.in_channels, hidden)
        self.txt_in = Linear(config.joint_attention_dim, hidden)
        self.time_in = TimeEmbedding(config.timestep_guidance_channels, hidden)
        if config.guidance_embeds:
            self.guidance_in = TimeEmbedding(config.timestep_guidance_channels, hidden)
        self.mod_img = Linear(hidden, 6 * hidden)
        self.mod_txt = Linear(hidden, 6 * hidden)
        self.mod_single = Linear(hidden, 3 * hidden)
        self.double_blocks = [DoubleBlock(config) for _ in range(config.num_layers)]
        self.single_blocks = [SingleBlock(config) for _ in range(config.num_single_layers)]
        self.final_mod = Linear(hidden, 2 * hidden)
        self.final_out = Linear(hidden, config.in_channels)

    def arrange(self) -> None:
        """Bring the weights from the checkpoint's layout into that of a step, lazily. Call once they are loaded; names
        and shapes of parameters change, results only by the order of sums."""
        for block in (*self.double_blocks, *self.single_blocks):
            block.arrange()

    def modulations(self, sigma: float, dtype: mx.Dtype, guidance: float = EMBEDDED_GUIDANCE) -> Modulations:
        """What noise level `sigma` (0..1) asks of every block, in the compute dtype."""
        return self.all_modulations([sigma], dtype, guidance)[0]

    def all_modulations(
        self, sigmas: Sequence[float], dtype: mx.Dtype, guidance: float = EMBEDDED_GUIDANCE
    ) -> list[Modulations]:
        """The modulations of several noise levels, by one matmul per projection. dtype: that of the layers. guidance:
        the scale, where it is embedded.

        The reference rounds the timestep to the compute dtype, divides by 1000 and multiplies again: in bfloat16 that
        moves it by up to 4 near 1000, and the model was trained so. In float32 it is exact, and so it is kept beside
        float16 layers.
        """
        timesteps = mx.array([1000.0 * sigma for sigma in sigmas]).astype(wide(dtype)) / 1000 * 1000
        vec = self.time_in(timesteps)
        if self.config.guidance_embeds:
            vec = vec + self.guidance_in(mx.array([guidance]).astype(timesteps.dtype) * 1000)
        vec = _silu(vec)
        projections = (self.mod_txt, self.mod_img, self.mod_single, self.final_mod)
        return [_modulations(*rows) for rows in zip(*(list(layer(vec)) for layer in projections), strict=True)]

    def embed_text(self, prompt_embeds: mx.array) -> mx.array:
        """prompt_embeds (B, L, joint dim) as the text stream's start, (B, L, hidden): the same in all steps.

        prompt_embeds: `wide` of the layers' dtype; some are so large that float16 could not hold them.
        """
        return self.txt_in(prompt_embeds)

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
        rope: of the ids [text, image, references]. num_img: how many of the tokens are the image's. extras: for
        every block in turn, as in `attend`. note: is shown each block's keys and values. run: calls a block with its
        arguments; it may compile, evaluate, or stop.
        Returns (B, num_img, in_channels), in the dtype of `tokens`, which is the layers'; all else is `wide` of it.
        """
        blocks = len(self.double_blocks) + len(self.single_blocks)
        later = iter([None] * blocks if extras is None else extras)
        img = self.img_in(tokens).astype(wide(tokens.dtype))
        for block in self.double_blocks:
            txt, img = run(block, txt, img, modulations.txt, modulations.img, rope, next(later), note=note)
        x = mx.concatenate([txt, img], axis=1)
        # After the last block only the image's tokens are read; it needs only keys and values of the others.
        image = txt.shape[1], txt.shape[1] + num_img
        for block in self.single_blocks[:-1]:
            x = run(block, x, modulations.single, rope, next(later), note=note)
        if self.single_blocks:
            x = run(self.single_blocks[-1], x, modulations.single, rope, next(later), image, note=note)
        else:
            x = x[:, slice(*image)]
        shift, scale = modulations.final
        return self.final_out(modulated(x, shift, scale, self.config.eps, tokens.dtype))

    def remember(
        self, tokens: mx.array, modulations: Modulations, rope: Rope, note: Note, run: RunBlock = call_block
    ) -> None:
        """Run references alone, as 9b-kv wants them: they see each other only, at the modulations of sigma 0.

        tokens: (B, N, in_channels), all references'. rope: of their ids. note: is shown every block's keys and values.
        run: calls a block, as in a step; of the double blocks only their image streams.
        Since nothing else reaches these tokens, this one pass serves all steps. Source: diffusers,
        Flux2Transformer2DModel.forward with kv_cache_mode="extract", which does the same inside the first step.
        """
        x = self.img_in(tokens).astype(wide(tokens.dtype))
        for block in self.double_blocks:
            x = run(block.img, x, modulations.img, rope, note=note)
        for block in self.single_blocks:
            x = run(block, x, modulations.single, rope, note=note)


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
