"""Qwen3, and Mistral-Small for [dev], as text encoders: token ids in, the hidden states of a few tapped layers out.

Only the layers up to the last tap exist: neither the final norm nor the language head is ever needed. The module
knows ids and masks, not prompts or templates.

Source: transformers, models/qwen3/modeling_qwen3.py, and models/mistral/modeling_mistral.py with its default attention
("sdpa"), in which a query that sees no key gives zeros; diffusers, Flux2KleinPipeline._get_qwen3_prompt_embeds and
Flux2Pipeline._get_mistral_3_small_prompt_embeds.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from klein_mlx.config import TextEncoderConfig
from klein_mlx.model.layers import Done, Linear, Placed, join, separate, swiglu


class Attention(Placed):
    """Grouped-query attention with RMS-normed q and k and rotary positions over half-split channels."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        hidden, self.head_dim, self.rope_theta = config.hidden_size, config.head_dim, config.rope_theta
        self.q_proj = Linear(hidden, config.num_attention_heads * self.head_dim)
        self.k_proj = Linear(hidden, config.num_key_value_heads * self.head_dim)
        self.v_proj = Linear(hidden, config.num_key_value_heads * self.head_dim)
        self.o_proj = Linear(config.num_attention_heads * self.head_dim, hidden)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, mask: mx.array, residual: mx.array) -> mx.array:
        """Attention of the normed x, added to the residual."""
        q, k, v = (mx.unflatten(p(x), -1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self._rope(self.q_norm(q)), self._rope(self.k_norm(k))
        out = self.device.attention(q, k, v.transpose(0, 2, 1, 3), mask)
        return self.o_proj.added(out.transpose(0, 2, 1, 3).flatten(2), residual)

    def _rope(self, x: mx.array) -> mx.array:
        """(B, L, heads, head_dim) -> (B, heads, L, head_dim), turned by position."""
        x = x.transpose(0, 2, 1, 3)
        return mx.fast.rope(x, self.head_dim, traditional=False, base=self.rope_theta, scale=1.0, offset=0)


class MLP(Placed):
    """residual + down(silu(gate(x)) * up(x)).

    Arranged (see TextEncoder.arrange), it has gate_up_proj in place of gate_proj and up_proj, if those are of one kind.
    """

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def arrange(self) -> None:
        """Hold both layers that read x as one, lazily."""
        join(self, "gate_proj", "up_proj", "gate_up_proj")

    def separate(self) -> None:
        """Undo `arrange`."""
        separate(self, "gate_proj", "up_proj", "gate_up_proj")

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:
        if "gate_up_proj" in self:
            gate, value = mx.split(self["gate_up_proj"](x), 2, axis=-1)
        else:
            gate, value = self.gate_proj(x), self.up_proj(x)
        return self.down_proj.added(self.device.form(swiglu)(gate, value), residual)


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    attention = Attention

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = self.attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        x = self.self_attn(self.input_layernorm(x), mask, x)
        return self.mlp(self.post_attention_layernorm(x), x)


class TextEncoder(Placed):
    """Qwen3 up to its last tapped layer.

    taps: rising layer counts; tap k is the residual stream after k layers (transformers' hidden_states[k]).
    embed_tokens: an nn.Embedding, or whatever else gives the rows of token ids.
    """

    layer = Layer

    def __init__(self, config: TextEncoderConfig, taps: tuple[int, ...]):
        super().__init__()
        self.taps = taps
        self.embed_tokens: Any = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [self.layer(config) for _ in range(taps[-1])]

    def arrange(self) -> None:
        """Bring the weights from the checkpoint's layout into one of fewer and larger matmuls, lazily."""
        for layer in self.layers:
            layer.mlp.arrange()

    def __call__(self, input_ids: mx.array, attention_mask: mx.array, done: Done | None = None) -> mx.array:
        """What the transformer attends to.

        input_ids: (B, L) integers, padded on one side. attention_mask: (B, L) bool, False on padding.
        Returns prompt_embeds (B, L, taps * hidden), the tapped states of each token one after the other; padding
        positions have values too (on the right they see the prompt), and the transformer reads them. done: called after
        each layer.
        """
        length = input_ids.shape[1]
        causal = mx.tri(length, dtype=mx.bool_)
        mask = causal[None, None] & attention_mask[:, None, None, :]
        x = self.embed_tokens(input_ids)
        states = []
        for count, layer in enumerate(self.layers, start=1):
            x = layer(x, mask)
            if count in self.taps:
                states.append(x)
            if done:
                done(x)
        return mx.concatenate(states, axis=-1)


# ---- Mistral-Small: Qwen3's layers without its q and k norms ----


class MistralAttention(Attention):
    """Prompts are padded on the left, so the padding's queries see no key at all: attention adds nothing to them. What
    an embedding of padding becomes by the MLPs alone is read by the transformer as well."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__(config)
        del self.q_norm, self.k_norm

    def __call__(self, x: mx.array, mask: mx.array, residual: mx.array) -> mx.array:
        q, k, v = (mx.unflatten(p(x), -1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = self.device.attention(self._rope(q), self._rope(k), v.transpose(0, 2, 1, 3), mask)
        out = mx.where(mask.any(axis=-1, keepdims=True), out, 0)
        return self.o_proj.added(out.transpose(0, 2, 1, 3).flatten(2), residual)


class MistralLayer(Layer):
    attention = MistralAttention


class MistralEncoder(TextEncoder):
    """Mistral-Small's language model up to its last tapped layer."""

    layer = MistralLayer
