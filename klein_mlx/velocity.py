"""The transformer as the sampler's `predict`: a function of latents and sigma, with the conditioning inside."""

import mlx.core as mx

from klein_mlx.conditioning import References, all_ids
from klein_mlx.latents import latents_to_tokens, tokens_to_latents
from klein_mlx.sampler import Predict
from klein_mlx.transformer import Transformer, rope_tables


class Tracked:
    """A predict function that remembers its last velocity, for previews."""

    def __init__(self, predict: Predict):
        self._predict = predict
        self.velocity = mx.array(0.0)

    def __call__(self, latents: mx.array, sigma: float) -> mx.array:
        self.velocity = self._predict(latents, sigma)
        return self.velocity


def velocity(
    transformer: Transformer, prompt_embeds: mx.array, references: References | None, grid: tuple[int, int]
) -> Predict:
    """`transformer` as a function of latents and sigma; the rotary tables are made once."""
    h, w = grid
    config = transformer.config
    ids = all_ids(prompt_embeds.shape[1], h, w, references)
    rope = rope_tables(ids, config.axes_dims_rope, config.rope_theta)

    def predict(latents: mx.array, sigma: float) -> mx.array:
        tokens = latents_to_tokens(latents)
        if references is not None:
            tokens = mx.concatenate([tokens, references.tokens], axis=1)
        modulations = transformer.modulations(sigma, latents.dtype)
        return tokens_to_latents(transformer(tokens, prompt_embeds, modulations, rope, h * w), h, w)

    return predict
