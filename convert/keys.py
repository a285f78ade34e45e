"""How diffusers names what we name: tables, and the lookup that reads them.

A rule pairs one of our names with diffusers' name and says how the array is laid out there. `*` stands for an index
and is filled in order; digits in diffusers' names are literal. `klein_mlx.convert.layouts` knows the layouts.
"""

import re
from typing import NamedTuple

from klein_mlx.config import ModelConfig

SAME = "same"
CONV = "conv"  # there (out, in, height, width), here (out, height, width, in)
POINTWISE = "pointwise"  # there a 1 x 1 convolution (out, in, 1, 1), here a linear layer (out, in)
HALVES = "halves"  # there (scale, shift) along the first axis, here (shift, scale)


class Rule(NamedTuple):
    """One row: our name's module path, diffusers', and the layout of its weight (a bias is always SAME)."""

    ours: str
    theirs: str
    layout: str = SAME


TRANSFORMER = (
    Rule("img_in", "x_embedder"),
    Rule("txt_in", "context_embedder"),
    Rule("time_in.linear_1", "time_guidance_embed.timestep_embedder.linear_1"),
    Rule("time_in.linear_2", "time_guidance_embed.timestep_embedder.linear_2"),
    Rule("mod_img", "double_stream_modulation_img.linear"),
    Rule("mod_txt", "double_stream_modulation_txt.linear"),
    Rule("mod_single", "single_stream_modulation.linear"),
    Rule("double_blocks.*.img.to_q", "transformer_blocks.*.attn.to_q"),
    Rule("double_blocks.*.img.to_k", "transformer_blocks.*.attn.to_k"),
    Rule("double_blocks.*.img.to_v", "transformer_blocks.*.attn.to_v"),
    Rule("double_blocks.*.img.to_out", "transformer_blocks.*.attn.to_out.0"),
    Rule("double_blocks.*.img.norm_q", "transformer_blocks.*.attn.norm_q"),
    Rule("double_blocks.*.img.norm_k", "transformer_blocks.*.attn.norm_k"),
    Rule("double_blocks.*.img.mlp_in", "transformer_blocks.*.ff.linear_in"),
    Rule("double_blocks.*.img.mlp_out", "transformer_blocks.*.ff.linear_out"),
    Rule("double_blocks.*.txt.to_q", "transformer_blocks.*.attn.add_q_proj"),
    Rule("double_blocks.*.txt.to_k", "transformer_blocks.*.attn.add_k_proj"),
    Rule("double_blocks.*.txt.to_v", "transformer_blocks.*.attn.add_v_proj"),
    Rule("double_blocks.*.txt.to_out", "transformer_blocks.*.attn.to_add_out"),
    Rule("double_blocks.*.txt.norm_q", "transformer_blocks.*.attn.norm_added_q"),
    Rule("double_blocks.*.txt.norm_k", "transformer_blocks.*.attn.norm_added_k"),
    Rule("double_blocks.*.txt.mlp_in", "transformer_blocks.*.ff_context.linear_in"),
    Rule("double_blocks.*.txt.mlp_out", "transformer_blocks.*.ff_context.linear_out"),
    Rule("single_blocks.*.linear_in", "single_transformer_blocks.*.attn.to_qkv_mlp_proj"),
    Rule("single_blocks.*.linear_out", "single_transformer_blocks.*.attn.to_out"),
    Rule("single_blocks.*.norm_q", "single_transformer_blocks.*.attn.norm_q"),
    Rule("single_blocks.*.norm_k", "single_transformer_blocks.*.attn.norm_k"),
    Rule("final_mod", "norm_out.linear", HALVES),
    Rule("final_out", "proj_out"),
)

TEXT_ENCODER = (
    Rule("embed_tokens", "model.embed_tokens"),
    *(
        Rule(f"layers.*.{path}", f"model.layers.*.{path}")
        for path in (
            "input_layernorm",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "self_attn.q_norm",
            "self_attn.k_norm",
            "post_attention_layernorm",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ),
)


def _resnets(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The rules of the VAE's resnets at one place; only those of a level change their width and have a shortcut."""
    shortcut = Rule(f"{ours}.shortcut", f"{theirs}.conv_shortcut", POINTWISE)
    return (
        Rule(f"{ours}.norm1", f"{theirs}.norm1"),
        Rule(f"{ours}.conv1", f"{theirs}.conv1", CONV),
        Rule(f"{ours}.norm2", f"{theirs}.norm2"),
        Rule(f"{ours}.conv2", f"{theirs}.conv2", CONV),
        *(() if ".mid." in ours else (shortcut,)),
    )


def _half(half: str) -> tuple[Rule, ...]:
    """The rules that the VAE's encoder and decoder share."""
    attention = f"{half}.mid_block.attentions.0"
    return (
        Rule(f"{half}.conv_in", f"{half}.conv_in", CONV),
        *_resnets(f"{half}.mid.resnets.*", f"{half}.mid_block.resnets.*"),
        Rule(f"{half}.mid.attention.norm", f"{attention}.group_norm"),
        Rule(f"{half}.mid.attention.to_q", f"{attention}.to_q"),
        Rule(f"{half}.mid.attention.to_k", f"{attention}.to_k"),
        Rule(f"{half}.mid.attention.to_v", f"{attention}.to_v"),
        Rule(f"{half}.mid.attention.to_out", f"{attention}.to_out.0"),
        Rule(f"{half}.norm_out", f"{half}.conv_norm_out"),
        Rule(f"{half}.conv_out", f"{half}.conv_out", CONV),
    )


VAE = (
    *_half("encoder"),
    *_resnets("encoder.down.*.resnets.*", "encoder.down_blocks.*.resnets.*"),
    Rule("encoder.down.*.downsample", "encoder.down_blocks.*.downsamplers.0.conv", CONV),
    *_half("decoder"),
    *_resnets("decoder.up.*.resnets.*", "decoder.up_blocks.*.resnets.*"),
    Rule("decoder.up.*.upsample", "decoder.up_blocks.*.upsamplers.0.conv", CONV),
    Rule("quant_conv", "quant_conv", POINTWISE),
    Rule("post_quant_conv", "post_quant_conv", POINTWISE),
)

TABLES = {"transformer": TRANSFORMER, "text_encoder": TEXT_ENCODER, "vae": VAE}

# Names that are not a module path with `weight` or `bias` behind it.
WHOLE = {"latent_mean": "bn.running_mean", "latent_var": "bn.running_var"}


def diffusers_name(part: str, ours: str) -> tuple[str, str]:
    """diffusers' name of one of our weights, and its layout there. A KeyError for a name that no rule knows."""
    if ours in WHOLE:
        return WHOLE[ours], SAME
    path, _, kind = ours.rpartition(".")
    indices = re.findall(r"(?<=\.)\d+(?=\.|$)", path)
    rule = _BY_OURS[part][re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)]
    theirs = rule.theirs
    for index in indices:
        theirs = theirs.replace("*", index, 1)
    return f"{theirs}.{kind}", rule.layout if kind == "weight" else SAME


_BY_OURS = {part: {rule.ours: rule for rule in table} for part, table in TABLES.items()}


def is_left_out(part: str, theirs: str, config: ModelConfig) -> bool:
    """Whether a weight is one that diffusers' folders hold and a picture never needs.

    The encoder's layers above the last tap, its final norm and language head; the BatchNorm's training counter.
    """
    if part == "text_encoder":
        layer = re.match(r"model\.layers\.(\d{1,4})\.", theirs)
        if layer:
            return config.taps[-1] <= int(layer[1]) < config.text_encoder.num_hidden_layers
        return theirs in ("model.norm.weight", "lm_head.weight")
    return part == "vae" and theirs == "bn.num_batches_tracked"
