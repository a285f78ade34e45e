"""Mistral-Small's language model as a text encoder: FLUX.2 [dev]'s. Qwen3's layers without its q and k norms.

Prompts are padded on the left, so the padding's queries see no key at all: attention adds nothing to them. What an
embedding of padding becomes by the MLPs alone is read by the transformer as well.

Source: transformers, models/mistral/modeling_mistral.py with its default attention ("sdpa"), in which a query that sees
no key gives zeros; diffusers, Flux2Pipeline._get_mistral_3_small_prompt_embeds.
"""

import mlx.core as mx

from klein_mlx.config import TextEncoderConfig
from klein_mlx.model import text_encoder


class Attention(text_encoder.Attention):
    """Grouped-query attention with rotary positions over half-split channels."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__(config)
        del self.q_norm, self.k_norm

    def __call__(self, x: mx.array, mask: mx.array, residual: mx.array) -> mx.array:
        """Attention of the normed x, added to the residual."""
        q, k, v = (mx.unflatten(p(x), -1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = self.device.attention(self._rope(q), self._rope(k), v.transpose(0, 2, 1, 3), mask)
        out = mx.where(mask.any(axis=-1, keepdims=True), out, 0)
        return self.o_proj.added(out.transpose(0, 2, 1, 3).flatten(2), residual)


class Layer(text_encoder.Layer):
    """One pre-norm decoder layer."""

    attention = Attention


class MistralEncoder(text_encoder.TextEncoder):
    """Mistral-Small's language model up to its last tapped layer."""

    layer = Layer
