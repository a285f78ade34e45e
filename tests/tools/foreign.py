"""The golden model's parts in foreign names, made without the tables that the converter reads."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
from folders import GOLDEN, read_weights, weight_file

from klein_mlx.config import PARTS
from klein_mlx.formats.open import open_model

Weights = dict[str, mx.array]

BFL = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
}
_DOUBLE = {
    "attn.to_out.0": "img_attn.proj.weight",
    "attn.to_add_out": "txt_attn.proj.weight",
    "attn.norm_q": "img_attn.norm.query_norm.scale",
    "attn.norm_k": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k": "txt_attn.norm.key_norm.scale",
    "ff.linear_in": "img_mlp.0.weight",
    "ff.linear_out": "img_mlp.2.weight",
    "ff_context.linear_in": "txt_mlp.0.weight",
    "ff_context.linear_out": "txt_mlp.2.weight",
}
_SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1.weight",
    "attn.to_out": "linear2.weight",
    "attn.norm_q": "norm.query_norm.scale",
    "attn.norm_k": "norm.key_norm.scale",
}


def golden(part: str) -> Weights:
    return read_weights(weight_file(GOLDEN, part))


def to_bfl(theirs: Weights, prefix: str = "") -> Weights:
    """diffusers' transformer as Black Forest Labs name it: q, k and v in one matrix, the final shift first."""
    out: Weights = {}
    for name, array in theirs.items():
        path = name.removesuffix(".weight")
        double = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", path)
        single = re.fullmatch(r"single_transformer_blocks\.(\d+)\.(.+)", path)
        if path == "norm_out.linear":
            scale, shift = mx.split(array, 2)
            out["final_layer.adaLN_modulation.1.weight"] = mx.concatenate([shift, scale])
        elif double and double[2] in ("attn.to_q", "attn.add_q_proj"):
            stream, names = ("img", "to_{}") if double[2] == "attn.to_q" else ("txt", "add_{}_proj")
            rows = [theirs[f"transformer_blocks.{double[1]}.attn.{names.format(x)}.weight"] for x in "qkv"]
            out[f"double_blocks.{double[1]}.{stream}_attn.qkv.weight"] = mx.concatenate(rows)
        elif double and double[2] in _DOUBLE:
            out[f"double_blocks.{double[1]}.{_DOUBLE[double[2]]}"] = array
        elif single:
            out[f"single_blocks.{single[1]}.{_SINGLE[single[2]]}"] = array
        elif path in BFL:
            out[f"{BFL[path]}.weight"] = array
    return {prefix + name: array for name, array in out.items()}


def to_ldm(theirs: Weights, levels: int = 4, linear_attention: bool = False) -> Weights:
    """diffusers' VAE as latent diffusion names it: levels of the decoder from the other end, 1 x 1 convolutions."""
    out: Weights = {}
    for name, array in theirs.items():
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
        if "attentions.0." in name:
            name = name.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm", "norm")
            name = name.replace("to_out.0", "proj_out").replace("to_", "")
            if array.ndim == 2 and not linear_attention:
                array = array[..., None, None]
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        out[re.sub(r"^(post_)?quant_conv", lambda m: ("decoder." if m[1] else "encoder.") + m[0], name)] = array
    return out


def to_llama_cpp(theirs: Weights) -> Weights:
    """transformers' Qwen3 as llama.cpp names it."""
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
        **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"},
        **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    }
    out: Weights = {}
    for name, array in theirs.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
        whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
        if layer:
            out[f"blk.{layer[1]}.{names[layer[2]]}.weight"] = array
        elif name in whole:
            out[whole[name]] = array
    return out


def to_mflux(part: str, theirs: Weights) -> Weights:
    """A part as mflux names it, convolutions channels-last."""
    out: Weights = {}
    for name, array in theirs.items():
        if name in ("lm_head.weight", "bn.num_batches_tracked"):
            continue
        name = name.removeprefix("model.").replace(".to_out.0.", ".to_out.").replace(".timestep_embedder.", ".")
        out[name] = mx.contiguous(array.transpose(0, 2, 3, 1)) if part == "vae" and array.ndim == 4 else array
    return out


def save(path: Path, weights: Mapping[str, mx.array], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path), dict(weights), metadata or {})
    return path


def opened(part: str, path: Path) -> Weights:
    """The part's weights under our names, with this file in the golden model."""
    found = open_model(GOLDEN, parts={part: path}).weights(part)
    return {name: weight if isinstance(weight, mx.array) else weight.load() for name, weight in found.items()}


WRITERS: dict[str, Callable[[Weights], Weights]] = {"transformer": to_bfl, "text_encoder": dict, "vae": to_ldm}


def comfy_files(folder: Path) -> dict[str, Path]:
    """The three files that ComfyUI is given; their names say nothing."""
    return {part: save(folder / f"{part[::-1]}.safetensors", WRITERS[part](golden(part))) for part in PARTS}


PREFIXES = {
    "transformer": "model.diffusion_model.",
    "text_encoder": "text_encoders.qwen3_4b.transformer.",
    "vae": "vae.",
}


def all_in_one(path: Path, *parts: str) -> Path:
    """A ComfyUI checkpoint, with the scalar that it saves beside an encoder."""
    weights = {"text_encoders.qwen3_4b.logit_scale": mx.array([4.6])}
    for part in parts or PARTS:
        weights |= {PREFIXES[part] + name: array for name, array in WRITERS[part](golden(part)).items()}
    return save(path, weights)
