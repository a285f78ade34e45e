"""What the transformer attends to besides the picture: the prompt's embeddings and the references' tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
from PIL import Image

from klein_mlx.images import to_pixels
from klein_mlx.latents import image_ids, latents_to_tokens, patchify, text_ids
from klein_mlx.strips import Done
from klein_mlx.text_encoder import TextEncoder
from klein_mlx.tokenizer import Tokens
from klein_mlx.vae import VAE, strip_rows

FIRST_REFERENCE_T, REFERENCE_T_STEP = 10, 10


@dataclass(frozen=True)
class References:
    """The reference pictures as tokens. tokens: (1, N, C); ids: (N, 4)."""

    tokens: mx.array
    ids: mx.array


def encode_prompt(encoder: TextEncoder, tokens: Tokens, index: int, done: Done | None = None) -> mx.array:
    """Embeddings (1, L, joint dim) of one of the tokenised prompts, evaluated. done: called after each layer."""
    row = slice(index, index + 1)
    embeds = encoder(tokens.input_ids[row], tokens.attention_mask[row], done)
    mx.eval(embeds)  # a lazy output would keep the encoder's weights alive
    return embeds


def encode_reference(vae: VAE, image: Image.Image, dtype: mx.Dtype, done: Done | None = None) -> mx.array:
    """Normalised latents (1, h, w, C) of a prepared reference, evaluated. done: called after each layer."""
    z = vae.encode(to_pixels(image).astype(dtype), strip_rows(image.height, image.width), done)
    latents = vae.normalize(patchify(z))
    mx.eval(latents)
    return latents


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
