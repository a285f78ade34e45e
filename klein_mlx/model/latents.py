"""The grid that the sampler moves: shapes, noise, token order, position ids, patches.

Grids here are channels-last, (B, h, w, channels), h and w in tokens (pixels / 16 for klein). diffusers keeps the same
numbers as (B, channels, h, w); `from_channels_first` and `to_channels_first` are the way in and out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx


def noise(key: mx.array, h: int, w: int, channels: int) -> mx.array:
    """Standard normal latents (1, h, w, channels), float32, decided by `key` alone."""
    return mx.random.normal((1, h, w, channels), key=key)


def latents_to_tokens(latents: mx.array) -> mx.array:
    """Flatten the latent grid row by row.

    latents: (B, h, w, C), any dtype. Returns (B, h*w, C); token i is row i // w, column i % w.
    """
    return latents.flatten(1, 2)


def tokens_to_latents(tokens: mx.array, h: int, w: int) -> mx.array:
    """The inverse of `latents_to_tokens`: (B, h*w, C) -> (B, h, w, C)."""
    return mx.unflatten(tokens, 1, (h, w))


def text_ids(length: int) -> mx.array:
    """Position ids (t, h, w, l) of text tokens: (0, 0, 0, i). Returns (length, 4) int32."""
    ids = mx.zeros((length, 4), dtype=mx.int32)
    ids[:, 3] = mx.arange(length)
    return ids


def image_ids(h: int, w: int, t: int = 0) -> mx.array:
    """Position ids (t, y, x, 0) of a grid's tokens, row by row. Returns (h*w, 4) int32.

    The picture itself has t = 0; reference k (from 0) has t = 10 + 10k.
    """
    y = mx.repeat(mx.arange(h), w)
    x = mx.tile(mx.arange(w), h)
    return mx.stack([mx.full(h * w, t, mx.int32), y, x, mx.zeros(h * w, mx.int32)], axis=-1).astype(mx.int32)


def patchify(z: mx.array) -> mx.array:
    """Fold 2 x 2 neighbours into channels.

    z: (B, 2h, 2w, C), the VAE's latents. Returns (B, h, w, 4C), channel index c * 4 + dy * 2 + dx.
    """
    b, height, width, c = z.shape
    z = z.reshape(b, height // 2, 2, width // 2, 2, c)
    return z.transpose(0, 1, 3, 5, 2, 4).reshape(b, height // 2, width // 2, 4 * c)


def unpatchify(latents: mx.array) -> mx.array:
    """The inverse of `patchify`: (B, h, w, 4C) -> (B, 2h, 2w, C)."""
    b, h, w, c = latents.shape
    latents = latents.reshape(b, h, w, c // 4, 2, 2)
    return latents.transpose(0, 1, 4, 2, 5, 3).reshape(b, 2 * h, 2 * w, c // 4)


def from_channels_first(x: mx.array) -> mx.array:
    """(B, C, h, w), as diffusers keeps latents, to (B, h, w, C)."""
    return x.transpose(0, 2, 3, 1)


def to_channels_first(x: mx.array) -> mx.array:
    """(B, h, w, C) to (B, C, h, w), as diffusers keeps latents."""
    return x.transpose(0, 3, 1, 2)


FIRST_REFERENCE_T, REFERENCE_T_STEP = 10, 10


@dataclass(frozen=True)
class References:
    """The reference pictures as tokens. tokens: (1, N, C); ids: (N, 4)."""

    tokens: mx.array
    ids: mx.array


def join_references(latents: Sequence[mx.array]) -> References | None:
    """All references' tokens one after the other; reference k (from 0) stands at t = 10 + 10k."""
    if not latents:
        return None
    ids = [
        image_ids(grid.shape[1], grid.shape[2], FIRST_REFERENCE_T + REFERENCE_T_STEP * k)
        for k, grid in enumerate(latents)
    ]
    return References(
        mx.concatenate([latents_to_tokens(grid) for grid in latents], axis=1), mx.concatenate(ids, axis=0)
    )


def all_ids(text_length: int, h: int, w: int, references: References | None) -> mx.array:
    """Position ids of [text, image, references], (S, 4)."""
    parts = [text_ids(text_length), image_ids(h, w)]
    if references is not None:
        parts.append(references.ids)
    return mx.concatenate(parts, axis=0)
