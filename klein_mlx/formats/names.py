"""How others name what we name: diffusers, Black Forest Labs, LDM, mflux, llama.cpp; and how to tell them apart.

In the tables a `*` stands for an index; in foreign names also `+`, which counts from one, and `^`, from the other end.
"""

import re
from collections.abc import Collection
from typing import NamedTuple

import mlx.core as mx

from klein_mlx.config import ModelConfig

SAME = "same"
CONV = "conv"  # there (out, in, height, width), here (out, height, width, in)
POINTWISE = "pointwise"  # there a 1 x 1 convolution (out, in, 1, 1), here a linear layer (out, in)
HALVES = "halves"  # there (scale, shift) along the first axis, here (shift, scale)


class Rule(NamedTuple):
    """One row: our name's module path, theirs, and the layout of its weight (a bias is always SAME)."""

    ours: str
    theirs: str
    layout: str = SAME


TRANSFORMER = (
    Rule("img_in", "x_embedder"),
    Rule("txt_in", "context_embedder"),
    Rule("time_in.linear_1", "time_guidance_embed.timestep_embedder.linear_1"),
    Rule("time_in.linear_2", "time_guidance_embed.timestep_embedder.linear_2"),
    Rule("guidance_in.linear_1", "time_guidance_embed.guidance_embedder.linear_1"),
    Rule("guidance_in.linear_2", "time_guidance_embed.guidance_embedder.linear_2"),
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


def _resnets(ours: str, theirs: str, shortcut: str = "conv_shortcut") -> tuple[Rule, ...]:
    """The rules of the VAE's resnets at one place; only those of a level change their width and have a shortcut."""
    return (
        Rule(f"{ours}.norm1", f"{theirs}.norm1"),
        Rule(f"{ours}.conv1", f"{theirs}.conv1", CONV),
        Rule(f"{ours}.norm2", f"{theirs}.norm2"),
        Rule(f"{ours}.conv2", f"{theirs}.conv2", CONV),
        *(() if ".mid." in ours else (Rule(f"{ours}.shortcut", f"{theirs}.{shortcut}", POINTWISE),)),
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


_BESIDE_MISTRAL = re.compile(r"(model\.)*(vision_tower|multi_modal_projector|lm_head)\b")


def is_left_out(part: str, theirs: str, config: ModelConfig) -> bool:
    """Whether a weight is one that diffusers' folders hold and a picture never needs.

    The encoder's layers above the last tap, its final norm and language head, Mistral's vision; the BatchNorm's
    training counter.
    """
    if part == "text_encoder":
        if config.text_encoder.model_type == "mistral" and _BESIDE_MISTRAL.match(theirs):
            return True
        layer = re.match(r"model\.layers\.(\d{1,4})\.", theirs)
        if layer:
            return config.taps[-1] <= int(layer[1]) < config.text_encoder.num_hidden_layers
        return theirs in ("model.norm.weight", "lm_head.weight")
    return part == "vae" and theirs == "bn.num_batches_tracked"


THIRDS = ("third 0", "third 1", "third 2")  # there the rows of q, k and v in one matrix
MLX_POINTWISE = "mlx pointwise"  # there a 1 x 1 convolution of MLX's, (out, 1, 1, in)

BFL, LDM, MFLUX, LLAMA_CPP, DIFFUSERS = "BFL", "LDM", "mflux", "llama.cpp", "diffusers"
OURS = "klein_mlx"


def _stream(name: str) -> tuple[Rule, ...]:
    """One stream of BFL's double blocks."""
    ours, theirs = f"double_blocks.*.{name}", f"double_blocks.*.{name}"
    return (
        *(Rule(f"{ours}.to_{x}", f"{theirs}_attn.qkv", third) for x, third in zip("qkv", THIRDS, strict=True)),
        Rule(f"{ours}.to_out", f"{theirs}_attn.proj"),
        Rule(f"{ours}.norm_q", f"{theirs}_attn.norm.query_norm"),
        Rule(f"{ours}.norm_k", f"{theirs}_attn.norm.key_norm"),
        Rule(f"{ours}.mlp_in", f"{theirs}_mlp.0"),
        Rule(f"{ours}.mlp_out", f"{theirs}_mlp.2"),
    )


BFL_TRANSFORMER = (
    Rule("img_in", "img_in"),
    Rule("txt_in", "txt_in"),
    Rule("time_in.linear_1", "time_in.in_layer"),
    Rule("time_in.linear_2", "time_in.out_layer"),
    Rule("guidance_in.linear_1", "guidance_in.in_layer"),
    Rule("guidance_in.linear_2", "guidance_in.out_layer"),
    Rule("mod_img", "double_stream_modulation_img.lin"),
    Rule("mod_txt", "double_stream_modulation_txt.lin"),
    Rule("mod_single", "single_stream_modulation.lin"),
    *_stream("img"),
    *_stream("txt"),
    Rule("single_blocks.*.linear_in", "single_blocks.*.linear1"),
    Rule("single_blocks.*.linear_out", "single_blocks.*.linear2"),
    Rule("single_blocks.*.norm_q", "single_blocks.*.norm.query_norm"),
    Rule("single_blocks.*.norm_k", "single_blocks.*.norm.key_norm"),
    Rule("final_mod", "final_layer.adaLN_modulation.1"),  # (shift, scale), as ours
    Rule("final_out", "final_layer.linear"),
)


def _bfl_half(half: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{half}.conv_in", f"{half}.conv_in", CONV),
        *_resnets(f"{half}.mid.resnets.*", f"{half}.mid.block_+", "nin_shortcut"),
        Rule(f"{half}.mid.attention.norm", f"{half}.mid.attn_1.norm"),
        Rule(f"{half}.mid.attention.to_q", f"{half}.mid.attn_1.q", POINTWISE),
        Rule(f"{half}.mid.attention.to_k", f"{half}.mid.attn_1.k", POINTWISE),
        Rule(f"{half}.mid.attention.to_v", f"{half}.mid.attn_1.v", POINTWISE),
        Rule(f"{half}.mid.attention.to_out", f"{half}.mid.attn_1.proj_out", POINTWISE),
        Rule(f"{half}.norm_out", f"{half}.norm_out"),
        Rule(f"{half}.conv_out", f"{half}.conv_out", CONV),
    )


LDM_VAE = (
    *_bfl_half("encoder"),
    *_resnets("encoder.down.*.resnets.*", "encoder.down.*.block.*", "nin_shortcut"),
    Rule("encoder.down.*.downsample", "encoder.down.*.downsample.conv", CONV),
    *_bfl_half("decoder"),
    *_resnets("decoder.up.*.resnets.*", "decoder.up.^.block.*", "nin_shortcut"),
    Rule("decoder.up.*.upsample", "decoder.up.^.upsample.conv", CONV),
    Rule("quant_conv", "quant_conv", POINTWISE),
    Rule("post_quant_conv", "post_quant_conv", POINTWISE),
)


LLAMA_CPP_ENCODER = (
    Rule("embed_tokens", "token_embd"),
    Rule("layers.*.input_layernorm", "blk.*.attn_norm"),
    Rule("layers.*.self_attn.q_proj", "blk.*.attn_q"),
    Rule("layers.*.self_attn.k_proj", "blk.*.attn_k"),
    Rule("layers.*.self_attn.v_proj", "blk.*.attn_v"),
    Rule("layers.*.self_attn.o_proj", "blk.*.attn_output"),
    Rule("layers.*.self_attn.q_norm", "blk.*.attn_q_norm"),
    Rule("layers.*.self_attn.k_norm", "blk.*.attn_k_norm"),
    Rule("layers.*.post_attention_layernorm", "blk.*.ffn_norm"),
    Rule("layers.*.mlp.gate_proj", "blk.*.ffn_gate"),
    Rule("layers.*.mlp.up_proj", "blk.*.ffn_up"),
    Rule("layers.*.mlp.down_proj", "blk.*.ffn_down"),
)


def _as_mflux(part: str) -> tuple[Rule, ...]:
    """mflux renames little, and stores convolutions as MLX computes them."""
    layouts: dict[str, str] = {CONV: SAME, POINTWISE: MLX_POINTWISE}
    rules = []
    for rule in TABLES[part]:
        theirs = rule.theirs.replace(".timestep_embedder.", ".").removesuffix(".0").removeprefix("model.")
        rules.append(Rule(rule.ours, theirs, layouts[rule.layout] if rule.layout in layouts else rule.layout))
    return tuple(rules)


DIALECTS = {
    ("transformer", BFL): BFL_TRANSFORMER,
    ("vae", LDM): LDM_VAE,
    ("text_encoder", LLAMA_CPP): LLAMA_CPP_ENCODER,
    **{(part, DIFFUSERS): table for part, table in TABLES.items()},
    **{(part, MFLUX): _as_mflux(part) for part in TABLES},
}


_BY_OURS = {key: {rule.ours: rule for rule in table} for key, table in DIALECTS.items()}


def their_name(part: str, dialect: str, ours: str, levels: int = 0) -> tuple[str, str]:
    """A dialect's name of one of our weights, and its layout there. A KeyError for a name that no rule knows.

    levels: of the VAE, for what is counted from the other end.
    """
    if dialect == OURS:
        return ours, SAME
    if ours in WHOLE:
        return WHOLE[ours], SAME
    path, _, kind = ours.rpartition(".")
    indices = [int(index) for index in re.findall(r"(?<=\.)\d+(?=\.|$)", path)]
    rule = _BY_OURS[part, dialect][re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)]
    signs = re.findall(r"[*+^]", rule.theirs)
    theirs = rule.theirs
    for sign, index in zip(signs, indices, strict=True):
        number = {"*": index, "+": index + 1, "^": levels - 1 - index}[sign]
        theirs = theirs.replace(sign, str(number), 1)
    return f"{theirs}.{kind}", SAME if kind == "bias" else rule.layout


def diffusers_name(part: str, ours: str) -> tuple[str, str]:
    """As `their_name`, in diffusers' names."""
    return their_name(part, DIFFUSERS, ours)


def our_layer(part: str, dialect: str, theirs: str) -> str | None:
    """The last component of our path of a layer, as `mlp_out`, from its path in a dialect; None: no layer of ours."""
    if dialect == OURS:
        return theirs.rpartition(".")[2]
    for rule in DIALECTS[part, dialect]:
        if re.fullmatch(re.sub(r"\\?[*+^]", r"\\d+", re.escape(rule.theirs)), theirs):
            return rule.ours.rpartition(".")[2]
    return None


class Found(NamedTuple):
    """A part that a file holds: in whose names, and behind which prefix."""

    part: str
    dialect: str
    prefix: str


# A name that only this part in this dialect has.
_MARKS = (
    ("transformer", BFL, "double_stream_modulation_img.lin.weight"),
    ("transformer", MFLUX, "time_guidance_embed.linear_1.weight"),
    ("transformer", DIFFUSERS, "time_guidance_embed.timestep_embedder.linear_1.weight"),
    ("text_encoder", DIFFUSERS, "model.layers.0.self_attn.q_norm.weight"),
    ("text_encoder", MFLUX, "layers.0.self_attn.q_norm.weight"),
    ("text_encoder", LLAMA_CPP, "blk.0.attn_q_norm.weight"),
    # Mistral-Small's, which has no norms there, or another model's: their sizes tell.
    ("text_encoder", DIFFUSERS, "model.layers.0.self_attn.q_proj.weight"),
    ("text_encoder", MFLUX, "layers.0.self_attn.q_proj.weight"),
    ("text_encoder", LLAMA_CPP, "blk.0.attn_q.weight"),
    ("vae", LDM, "encoder.down.0.block.0.norm1.weight"),
    ("transformer", OURS, "mod_img.weight"),
    ("vae", OURS, "latent_mean"),
    ("vae", MFLUX, "encoder.mid_block.attentions.0.to_out.weight"),
    ("vae", DIFFUSERS, "encoder.down_blocks.0.resnets.0.norm1.weight"),
)


ONE_STEP_PREFIX = "model."  # of the transformer of klein's variant 4b-1step
# Mistral3ForConditionalGeneration's language model is behind one of the last two, by transformers' age.
_ENCODER_PREFIXES = (
    *("", "qwen3_4b.transformer.", "qwen3_8b.transformer.", "qwen3_4b.", "qwen3_8b.", "mistral3_24b.transformer."),
    *("mistral3_24b.", "language_model.", "model.language_model."),
)
_PREFIXES = {
    "transformer": ("", "model.diffusion_model.", "diffusion_model.", ONE_STEP_PREFIX),
    "text_encoder": tuple(
        f"{outer}{inner}" for outer in ("", "text_encoders.", "text_encoder.") for inner in _ENCODER_PREFIXES
    ),
    "vae": ("", "vae.", "first_stage_model."),
}


def find_parts(names: Collection[str]) -> list[Found]:
    """The parts of FLUX.2 that a file holds, told from its tensors' names; at most one of each kind."""
    found: dict[str, Found] = {}
    for part, dialect, mark in _MARKS:
        for prefix in _PREFIXES[part]:
            if part not in found and prefix + mark in names:
                found[part] = Found(part, dialect, prefix)
    return list(found.values())


def canonical(name: str) -> str:
    """A name without its prefix, where the same thing is spelled in several ways, in the spelling of the tables."""
    name = re.sub(r"(query|key)_norm\.scale$", r"\1_norm.weight", name)
    return re.sub(r"^(?:encoder|decoder)\.((?:post_)?quant_conv\.)", r"\1", name)


OTHER_LANGUAGE_MODEL = "a language model other than Qwen3 and Mistral-Small"


# What a stranger is, by a pattern that one of its names has. The first match counts.
_STRANGERS = (
    (r"lora_|\.lora\.|lokr_|hada_|dora_scale", "a LoRA: give it as --lora, beside a model"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"double_blocks\.\d+\.img_mod\.lin|^transformer_blocks\.\d+\.norm1_context\.linear", "FLUX.1"),
    (r"transformer_blocks\.\d+\.img_mod\.1", "Qwen-Image"),
    (r"noise_refiner\.\d+|cap_embedder\.", "Z-Image or Lumina"),
    (r"joint_blocks\.\d+", "Stable Diffusion 3"),
    (r"input_blocks\.\d+\.\d+|down_blocks\.\d+\.attentions", "Stable Diffusion"),
    (r"blocks\.\d+\.cross_attn\.|patch_embedding\.", "Wan"),
    (r"txt_in\.individual_token_refiner", "HunyuanVideo"),
    (r"SelfAttention\.relative_attention_bias|enc\.blk\.0\.attn_rel_b", "a T5 encoder"),
    (r"text_model\.encoder\.layers|transformer\.resblocks", "a CLIP encoder"),
    (r"visual\.(blocks|patch_embed)|vision_tower", "a vision-language model"),
    (r"model\.layers\.\d+\.self_attn|blk\.\d+\.attn_q\.weight", OTHER_LANGUAGE_MODEL),
)


def stranger(names: Collection[str]) -> str | None:
    """What a model that is not ours is, if its tensors' names tell."""
    for pattern, what in _STRANGERS:
        if any(re.search(pattern, name) for name in names):
            return what
    return None


# ---- layouts ----

INTERLEAVED = "interleaved "  # and a head's size: there its rows of both halves in turn, as rotary pairs


def by_rows(layout: str) -> bool:
    """Whether a layout moves whole rows, so that quantized weights move as well."""
    return layout in (SAME, HALVES, *THIRDS) or layout.startswith(INTERLEAVED)


def their_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a foreign file of a weight that has `shape` here."""
    if layout == CONV:
        out, height, width, inputs = shape
        return out, inputs, height, width
    if layout == MLX_POINTWISE:
        return shape[0], 1, 1, shape[1]
    if layout in THIRDS:
        return 3 * shape[0], *shape[1:]
    return (*shape, 1, 1) if layout == POINTWISE else shape


def to_ours(layout: str, array: mx.array) -> mx.array:
    """A foreign array as ours, lazily."""
    if layout == CONV:
        return mx.contiguous(array.transpose(0, 2, 3, 1))  # else every convolution copies it
    if layout == POINTWISE:
        return array.reshape(array.shape[:2])
    if layout == MLX_POINTWISE:
        return array.reshape(array.shape[0], array.shape[3])
    if layout in THIRDS:
        return mx.split(array, 3, axis=0)[THIRDS.index(layout)]
    if layout.startswith(INTERLEAVED):
        heads = mx.unflatten(array, 0, (-1, int(layout.removeprefix(INTERLEAVED)) // 2, 2))
        return heads.swapaxes(1, 2).flatten(0, 2)
    return _swap_halves(array) if layout == HALVES else array


def to_theirs(layout: str, array: mx.array) -> mx.array:
    """Our array as diffusers', lazily; the inverse of `to_ours` for diffusers' layouts."""
    if layout == CONV:
        return mx.contiguous(array.transpose(0, 3, 1, 2))
    if layout == POINTWISE:
        return array[..., None, None]
    return _swap_halves(array) if layout == HALVES else array


def _swap_halves(array: mx.array) -> mx.array:
    first, second = mx.split(array, 2, axis=0)
    return mx.concatenate([second, first], axis=0)
