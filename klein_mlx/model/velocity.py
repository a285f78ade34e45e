"""The transformer as the sampler's `predict`: a function of latents and sigma, with the conditioning inside."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import mlx.core as mx

from klein_mlx.config import EMBEDDED_GUIDANCE, TransformerConfig
from klein_mlx.model.layers import wide
from klein_mlx.model.sampler import Predict, References, all_ids, guide, latents_to_tokens, tokens_to_latents, with_cfg
from klein_mlx.model.transformer import (
    KeysValues,
    Modulations,
    Rope,
    RunBlock,
    Transformer,
    call_block,
    gathered,
    joined,
    rope_tables,
)

Reuse = Literal["alone", "first step"]


class Peers(NamedTuple):
    """Processes that share a picture's tokens: of the text, the image and the references each has a run of its own.

    Each reads the keys and values of all, once per block. The group that mx.distributed.init made exchanges them.
    """

    rank: int = 0
    size: int = 1

    def run(self, count: int, rank: int | None = None) -> tuple[int, int]:
        """Of so many tokens a process's first, this one's by default, and the one behind its last."""
        rank = self.rank if rank is None else rank
        return count * rank // self.size, count * (rank + 1) // self.size

    def own(self, x: mx.array) -> mx.array:
        """This process's tokens. x: (B, N, ...)."""
        return x if self.size == 1 else x[:, slice(*self.run(x.shape[1]))]

    def lengths(self, *counts: int) -> tuple[int, ...]:
        """How many tokens each process has of streams of so many; empty for a process alone."""
        runs = ([self.run(count, rank) for count in counts] for rank in range(self.size))
        return () if self.size == 1 else tuple(sum(stop - start for start, stop in own) for own in runs)

    def sent(self, tokens: int, config: TransformerConfig, itemsize: int) -> int:
        """Bytes of keys and values that the first process sends to each other one in a pass. tokens: all streams'."""
        blocks = config.num_layers + config.num_single_layers
        return blocks * 2 * (self.run(tokens)[1] - self.run(tokens)[0]) * config.hidden_size * itemsize


class Tracked:
    """A predict function that remembers its last velocity, for previews."""

    def __init__(self, predict: Predict):
        self._predict = predict
        self.velocity = mx.array(0.0)

    def __call__(self, latents: mx.array, sigma: float) -> mx.array:
        self.velocity = self._predict(latents, sigma)
        return self.velocity


class ReferenceMemory:
    """Every block's keys and values of the references, in the order in which the blocks run.

    count: how many of the last tokens are the references'.
    """

    def __init__(self, count: int):
        self.count = count
        self.kept: list[KeysValues] = []

    def note(self, k: mx.array, v: mx.array) -> KeysValues:
        """Keep the references' part of a block's keys and values, and return it."""
        # Copied, or the slices would keep all tokens' arrays alive.
        self.kept.append((mx.contiguous(k[:, -self.count :]), mx.contiguous(v[:, -self.count :])))
        return self.kept[-1]

    def extras(self, batch: int) -> list[KeysValues]:
        """What was kept, for `batch` rows."""
        return [tuple(mx.broadcast_to(a, (batch, *a.shape[1:])) for a in pair) for pair in self.kept]  # type: ignore[misc]


class Tables:
    """What all steps, and all pictures of one size, share: rotary tables and the modulations of every noise level.

    grid: rows and columns of the picture's tokens. sigmas: the noise levels that will be asked for. still: with those
    of sigma 0, which references alone have. guidance: the scale, where the transformer embeds it. Evaluated at once:
    the transformer's weights are not held.
    """

    def __init__(
        self,
        transformer: Transformer,
        references: References | None,
        grid: tuple[int, int],
        sigmas: Sequence[float],
        dtype: mx.Dtype,
        still: bool = False,
        guidance: float = EMBEDDED_GUIDANCE,
    ):
        self.references, self.grid, self.dtype = references, grid, dtype
        self._config = transformer.config
        self._ropes: dict[int, Rope] = {}
        levels = [*sigmas, 0.0] if still else [*sigmas]
        self._modulations = dict(zip(levels, transformer.all_modulations(levels, dtype, guidance), strict=True))
        mx.eval(list(self._modulations.values()))

    def rope(self, length: int) -> Rope:
        """The rotary tables of [text of this length, image, references]."""
        if length not in self._ropes:
            ids = all_ids(length, *self.grid, self.references)
            self._ropes[length] = rope_tables(ids, self._config.axes_dims_rope, self._config.rope_theta, length)
        return self._ropes[length]

    def modulations(self, sigma: float) -> Modulations:
        """Those of one of the noise levels that the tables were made for."""
        return self._modulations[sigma]


def velocity(
    transformer: Transformer,
    prompt_embeds: mx.array,
    tables: Tables,
    reuse: Reuse | None = None,
    run: RunBlock = call_block,
    peers: Peers = Peers(),  # noqa: B008
) -> Predict:
    """`transformer` as a function of latents and sigma; the text is embedded once.

    prompt_embeds: (B, L, D); the latents (1, h, w, C) are the same for all, and the velocity is (B, h, w, C).
    tables: with the references and the noise levels. reuse: how the references' keys and values serve several steps,
    or None: they are computed in each. "alone": the references see only each other, as 9b-kv was trained; exact.
    "first step": those of the first step, as an approximation for the other variants. run: calls a block. peers: that
    each call this with the same arguments.
    """
    (h, w), references = tables.grid, tables.references
    batch, length = prompt_embeds.shape[:2]
    counts = (length, h * w, 0 if references is None else references.ids.shape[0])
    starts = (0, length, length + h * w)
    whole = tables.rope(length)
    txt = peers.own(transformer.embed_text(prompt_embeds.astype(wide(tables.dtype))))
    mx.eval(txt)
    start, stop = peers.run(counts[2])
    memory = None if reuse is None or references is None else ReferenceMemory(stop - start)

    def rope(streams: slice, lengths: tuple[int, ...]) -> Rope:
        """The tables of this process's tokens of some of the streams."""
        runs = [(at + own[0], at + own[1]) for at, own in zip(starts, map(peers.run, counts), strict=True)][streams]
        if peers.size == 1:
            runs = [(runs[0][0], runs[-1][1])]
        return joined([whole.rows(*one) for one in runs], lengths)

    lengths, (first, behind) = peers.lengths(*counts), peers.run(h * w)
    all_tokens = rope(slice(2 if references is None else 3), lengths)
    without_references = all_tokens if memory is None else rope(slice(2), lengths)

    def predict(latents: mx.array, sigma: float) -> mx.array:
        tokens, table, note, extras = peers.own(latents_to_tokens(latents)), all_tokens, None, None
        if memory is not None and reuse == "alone" and not memory.kept:
            assert references is not None
            apart = rope(slice(2, 3), peers.lengths(counts[2]))
            transformer.remember(peers.own(references.tokens), tables.modulations(0.0), apart, memory.note, run)
            mx.eval(memory.kept)
        if memory is not None and memory.kept:
            table, extras = without_references, memory.extras(batch)
        elif references is not None:
            tokens = mx.concatenate([tokens, peers.own(references.tokens)], axis=1)
            note = None if memory is None else memory.note
        tokens = mx.broadcast_to(tokens, (batch, *tokens.shape[1:]))
        out = transformer(tokens, txt, tables.modulations(sigma), table, behind - first, extras, note, run)
        if peers.size > 1:
            out = gathered(out, peers.lengths(h * w))
            mx.eval(out)  # else a later pass's exchanges might come before this one's in another process
        if memory is not None and note is not None:
            mx.eval(out, memory.kept)  # else the next step would hold all of this one's arrays
        return tokens_to_latents(out, h, w)

    return predict


def guided_velocity(
    transformer: Transformer,
    prompt_embeds: mx.array,
    negative: mx.array,
    tables: Tables,
    guidance: float,
    batched: bool,
    reuse: Reuse | None = None,
    run: RunBlock = call_block,
    peers: Peers = Peers(),  # noqa: B008
) -> Predict:
    """The velocity under classifier-free guidance.

    prompt_embeds, negative: (1, L, D). batched: both branches in one pass, which needs one L.
    tables, reuse, run, peers: as in `velocity`.
    """
    if not batched:
        conditional = velocity(transformer, prompt_embeds, tables, reuse, run, peers)
        return with_cfg(conditional, velocity(transformer, negative, tables, reuse, run, peers), guidance)
    both = velocity(transformer, mx.concatenate([prompt_embeds, negative]), tables, reuse, run, peers)

    def predict(latents: mx.array, sigma: float) -> mx.array:
        conditional, unconditional = mx.split(both(latents, sigma), 2)
        return guide(conditional, unconditional, guidance)

    return predict
