"""Positions of tokens as rotations of their heads' channels.

Source: diffusers, models/transformers/transformer_flux2.py (Flux2PosEmbed).
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx


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
