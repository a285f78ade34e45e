"""Positions of tokens as rotations of their heads' channels, and the norm of q and k that goes with them.

Source: diffusers, models/transformers/transformer_flux2.py (Flux2PosEmbed) and models/embeddings.py (apply_rotary_emb).
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from klein_mlx.model.compile import Chain
from klein_mlx.model.layers import Device


class Rope(NamedTuple):
    """What tokens are to the heads that they pass, first axis: the tokens.

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


def normed_and_rotated(
    device: Device, qk: mx.array, scale: mx.array, rope: Rope, eps: float, img_scale: mx.array | None = None
) -> mx.array:
    """RMSNorm of every head's q and k, then neighboring pairs of channels rotated by the tables' angles.

    qk: (B, S, n, heads, head_dim), any float dtype, returned in it; n is 2 for q and k, 1 for one of them. scale: the
    norms' weights, (n, head_dim) float32; with img_scale only those of the prompt's tokens, and img_scale the others'.
    """
    qk = mx.fast.rms_norm(qk, None, eps)  # q and k together; their weights follow with the rotation, in one kernel
    scales = [_halves(mx.expand_dims(weights, -2)) for weights in (scale, img_scale) if weights is not None]
    tables = mx.expand_dims(rope.first, 1), mx.expand_dims(rope.second, 1)
    if img_scale is None:
        return device.run(_scale_and_rotate, *_halves(qk), *tables, *scales[0]).flatten(-2)
    text = mx.expand_dims(rope.text, (-1, -2))
    return device.run(_scale_and_rotate_streams, *_halves(qk), *tables, *scales[0], *scales[1], text).flatten(-2)


def _halves(x: mx.array) -> tuple[mx.array, mx.array]:
    """The first and the second channel of each pair, each (..., head_dim / 2, 1)."""
    pairs = mx.unflatten(x, -1, (-1, 2))
    return pairs[..., :1], pairs[..., 1:]


# The halves are taken before the cast to float32, outside of this chain, so that it is one kernel.
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
