"""A part's config, told from the shapes of its weights: what a file without a config.json still says.

What shapes cannot say (eps, theta, groups of a norm) is taken from a config that is alike, klein's own by default.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from klein_mlx.config import TextEncoderConfig, TransformerConfig, VAEConfig
from klein_mlx.errors import CheckpointError

Shape = Callable[[str], tuple[int, ...] | None]  # of one of our weights, before quantisation; None if it is not there

KLEIN = {
    "transformer": TransformerConfig(128, 5, 20, 128, 24, 7680, 3.0, (32, 32, 32, 32)),
    "text_encoder": TextEncoderConfig(151936, 2560, 9728, 36, 32, 8, 128),
    "vae": VAEConfig((128, 256, 512, 512), 2, 32),
}
_MAX_COUNT = 1024


def infer_config(part: str, shape: Shape, like: Any = None) -> Any:
    """The config of a part with these shapes. Raises CheckpointError if a weight that is needed is not there."""
    config = _INFER[part](shape, like or KLEIN[part])
    if part == "text_encoder" and like:  # a file may lack the layers that are never used
        return replace(config, num_hidden_layers=max(config.num_hidden_layers, like.num_hidden_layers))
    return config


def _transformer(shape: Shape, like: TransformerConfig) -> TransformerConfig:
    hidden = _axis(shape, "img_in.weight", 0)
    head = _axis(shape, "double_blocks.0.img.norm_q.weight", 0)
    axes = like.axes_dims_rope if head == like.attention_head_dim else (head // 4,) * 4
    return replace(
        like,
        in_channels=_axis(shape, "final_out.weight", 0),
        num_layers=_count(shape, "double_blocks.{}.img.norm_q.weight"),
        num_single_layers=_count(shape, "single_blocks.{}.norm_q.weight"),
        attention_head_dim=head,
        num_attention_heads=hidden // max(head, 1),
        joint_attention_dim=_axis(shape, "txt_in.weight", 1),
        mlp_ratio=_axis(shape, "double_blocks.0.img.mlp_in.weight", 0) / 2 / max(hidden, 1),
        axes_dims_rope=axes,
        timestep_guidance_channels=_axis(shape, "time_in.linear_1.weight", 1),
    )


def _text_encoder(shape: Shape, like: TextEncoderConfig) -> TextEncoderConfig:
    head = max(_axis(shape, "layers.0.self_attn.q_norm.weight", 0), 1)
    return replace(
        like,
        vocab_size=_axis(shape, "embed_tokens.weight", 0),
        hidden_size=_axis(shape, "layers.0.input_layernorm.weight", 0),
        intermediate_size=_axis(shape, "layers.0.mlp.up_proj.weight", 0),
        num_hidden_layers=_count(shape, "layers.{}.input_layernorm.weight"),
        num_attention_heads=_axis(shape, "layers.0.self_attn.q_proj.weight", 0) // head,
        num_key_value_heads=_axis(shape, "layers.0.self_attn.k_proj.weight", 0) // head,
        head_dim=head,
    )


def _vae(shape: Shape, like: VAEConfig) -> VAEConfig:
    levels = _count(shape, "encoder.down.{}.resnets.0.norm1.weight")
    down = tuple(_axis(shape, f"encoder.down.{i}.resnets.0.conv1.weight", 0) for i in range(levels))
    up = tuple(_axis(shape, f"decoder.up.{i}.resnets.0.conv1.weight", 0) for i in reversed(range(levels)))
    return replace(
        like,
        block_out_channels=down,
        decoder_block_out_channels=None if up == down else up,
        layers_per_block=_count(shape, "encoder.down.0.resnets.{}.norm1.weight"),
        latent_channels=_axis(shape, "encoder.conv_out.weight", 0) // 2,
        in_channels=_axis(shape, "encoder.conv_in.weight", 3),
        out_channels=_axis(shape, "decoder.conv_out.weight", 0),
        use_quant_conv=shape("quant_conv.weight") is not None,
        use_post_quant_conv=shape("post_quant_conv.weight") is not None,
        mid_block_add_attention=shape("encoder.mid.attention.norm.weight") is not None,
    )


_INFER: dict[str, Callable[[Shape, Any], Any]] = {
    "transformer": _transformer,
    "text_encoder": _text_encoder,
    "vae": _vae,
}


def _axis(shape: Shape, name: str, axis: int) -> int:
    found = shape(name)
    if found is None:
        raise CheckpointError(f"{name} is missing: the file is not whole, or not FLUX.2 [klein]")
    if axis >= len(found):
        raise CheckpointError(f"{name} has shape {found}; FLUX.2 [klein] has more axes there")
    return found[axis]


def _count(shape: Shape, pattern: str) -> int:
    """How many of a list's elements are there."""
    return next((i for i in range(_MAX_COUNT) if shape(pattern.format(i)) is None), _MAX_COUNT)
