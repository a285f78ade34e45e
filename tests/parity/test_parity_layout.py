"""The names and shapes of the published models' weights, as diffusers' and transformers' own classes have them."""

from typing import Any

import pytest

from klein_mlx.config import ModelConfig, TextEncoderConfig, TransformerConfig, VAEConfig, default_taps
from klein_mlx.formats.names import diffusers_name, is_left_out, their_shape
from klein_mlx.weights.checkpoint import expected

pytestmark = pytest.mark.parity

# From the table of variants: double and single blocks, heads; the encoder's hidden size, MLP, tied embeddings.
SIZES = {"4b": (5, 20, 24, 2560, 9728, True), "9b": (8, 24, 32, 4096, 12288, False)}


def reference_models(name: str, decoder: tuple[int, ...] | None) -> dict[str, Any]:
    """The three parts with weights on no device: names and shapes only."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
    from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

    double, single, heads, hidden, mlp, tied = SIZES[name]
    encoder = Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        return {
            "transformer": Flux2Transformer2DModel(
                num_layers=double,
                num_single_layers=single,
                num_attention_heads=heads,
                joint_attention_dim=3 * hidden,
                guidance_embeds=False,
            ),
            "text_encoder": Qwen3ForCausalLM(encoder),
            "vae": AutoencoderKLFlux2(decoder_block_out_channels=decoder) if decoder else AutoencoderKLFlux2(),
        }


@pytest.mark.parametrize(("name", "decoder"), [("4b", None), ("9b", None), ("4b", (96, 192, 384, 384))])
def test_every_weight_of_the_published_models_has_its_place(name: str, decoder: tuple[int, ...] | None) -> None:
    models = reference_models(name, decoder)
    transformer = TransformerConfig.from_dict(dict(models["transformer"].config))
    encoder = TextEncoderConfig.from_dict(models["text_encoder"].config.to_dict())
    vae = VAEConfig.from_dict(dict(models["vae"].config))
    config = ModelConfig(transformer, encoder, vae, True, default_taps(encoder.num_hidden_layers))
    assert config.taps == (9, 18, 27)
    assert config.variant.name == name
    for part, model in models.items():
        theirs = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        ours = {}
        for key, shape in expected(part, config).items():
            foreign, layout = diffusers_name(part, key)
            ours[foreign] = their_shape(layout, shape)
        kept = {key: shape for key, shape in theirs.items() if not is_left_out(part, key, config)}
        assert ours == kept
