"""The transformer as the sampler's `predict`: a function of latents and sigma, with the conditioning inside."""

import os
from typing import Literal

import mlx.core as mx

from klein_mlx.conditioning import References, all_ids
from klein_mlx.latents import latents_to_tokens, tokens_to_latents
from klein_mlx.sampler import Predict, guide, with_cfg
from klein_mlx.transformer import Memory, Rope, Transformer, rope_tables

Reuse = Literal["alone", "first step"]


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
        self.kept: list[tuple[mx.array, mx.array]] = []

    def record(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """A `Memory` that keeps the references' part and changes nothing."""
        # Copied, or the slices would keep all tokens' arrays alive.
        self.kept.append((mx.contiguous(k[:, -self.count :]), mx.contiguous(v[:, -self.count :])))
        return k, v

    def replay(self) -> Memory:
        """A `Memory` for one pass: adds to each block's keys and values those that were recorded there."""
        blocks = iter(self.kept)

        def extend(k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
            kept_k, kept_v = (mx.broadcast_to(a, (k.shape[0], *a.shape[1:])) for a in next(blocks))
            return mx.concatenate([k, kept_k], axis=1), mx.concatenate([v, kept_v], axis=1)

        return extend


def velocity(
    transformer: Transformer,
    prompt_embeds: mx.array,
    references: References | None,
    grid: tuple[int, int],
    reuse: Reuse | None = None,
) -> Predict:
    """`transformer` as a function of latents and sigma; the rotary tables are made once.

    prompt_embeds: (B, L, D); the latents (1, h, w, C) are the same for all, and the velocity is (B, h, w, C).
    reuse: how the references' keys and values serve several steps, or None: they are computed in each. "alone": the
    references see only each other, as 9b-kv was trained; exact. "first step": those of the first step, as an
    approximation for the other variants.
    """
    h, w = grid
    config = transformer.config
    length = prompt_embeds.shape[1]
    rope = rope_tables(all_ids(length, h, w, references), config.axes_dims_rope, config.rope_theta)
    memory = None if reuse is None or references is None else ReferenceMemory(references.ids.shape[0])

    def predict(latents: mx.array, sigma: float) -> mx.array:
        tokens, table, now = latents_to_tokens(latents), rope, None
        if memory is not None and reuse == "alone" and not memory.kept:
            assert references is not None
            apart = Rope(*(a[length + h * w :] for a in rope))
            still = transformer.modulations(0.0, latents.dtype)
            transformer.remember(references.tokens, still, apart, memory.record)
            mx.eval(memory.kept)
        if memory is not None and memory.kept:
            table, now = Rope(*(a[: length + h * w] for a in rope)), memory.replay()
        elif references is not None:
            tokens = mx.concatenate([tokens, references.tokens], axis=1)
            now = None if memory is None else memory.record
        tokens = mx.broadcast_to(tokens, (prompt_embeds.shape[0], *tokens.shape[1:]))
        modulations = transformer.modulations(sigma, latents.dtype)
        out = transformer(tokens, prompt_embeds, modulations, table, h * w, now)
        if memory is not None and now == memory.record:
            mx.eval(out, memory.kept)  # else the next step would hold all of this one's arrays
        return tokens_to_latents(out, h, w)

    return predict


def guided_velocity(
    transformer: Transformer,
    prompt_embeds: mx.array,
    negative: mx.array,
    references: References | None,
    grid: tuple[int, int],
    guidance: float,
    batched: bool | None,
    reuse: Reuse | None = None,
) -> Predict:
    """The velocity under classifier-free guidance.

    prompt_embeds, negative: (1, L, D). batched: both branches in one pass, which needs one L; None: if memory allows.
    reuse: as in `velocity`.
    """
    if batched is None:
        tokens = prompt_embeds.shape[1] + grid[0] * grid[1] + (0 if references is None else references.ids.shape[0])
        batched = _fits_twice(tokens * transformer.config.hidden_size * prompt_embeds.dtype.size)
    if not batched:
        conditional = velocity(transformer, prompt_embeds, references, grid, reuse)
        return with_cfg(conditional, velocity(transformer, negative, references, grid, reuse), guidance)
    both = velocity(transformer, mx.concatenate([prompt_embeds, negative]), references, grid, reuse)

    def predict(latents: mx.array, sigma: float) -> mx.array:
        conditional, unconditional = mx.split(both(latents, sigma), 2)
        return guide(conditional, unconditional, guidance)

    return predict


def _fits_twice(stream: int) -> bool:
    """Whether two passes fit in a quarter of the machine's memory. stream: bytes of one pass's residual stream; inside
    a single block about 16 such arrays are alive (the stream, q, k, v, the MLP's six and three, what is joined)."""
    return 2 * 16 * stream <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4
