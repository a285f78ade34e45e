"""Which model a LoRA was made for: by names and shapes, and by its metadata where several models have those."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache

from klein_mlx.config import ModelConfig, TransformerConfig
from klein_mlx.formats.infer import KLEIN
from klein_mlx.weights.checkpoint import expected

_KLEIN_4B: TransformerConfig = KLEIN["transformer"]
_BASES = {
    "FLUX.2 [klein] 4B": _KLEIN_4B,
    "FLUX.2 [klein] 9B": replace(
        _KLEIN_4B, num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288
    ),
    "FLUX.2 [dev]": replace(
        _KLEIN_4B, num_layers=8, num_single_layers=48, num_attention_heads=48, joint_attention_dim=15360
    ),
}
_HIDDEN = {config.hidden_size: name for name, config in _BASES.items()}
_ENCODERS = {
    1024: "Qwen3-0.6B (the encoder of Anima)",
    2560: "Qwen3-4B",
    4096: "Qwen3-8B",
    5120: "Mistral-Small (the encoder of FLUX.2 [dev])",
}
_FLUX1, _HUNYUAN, _QWEN, _SD = "FLUX.1", "HunyuanVideo", "Qwen-Image", "Stable Diffusion or SDXL"
_SDXL, _ANIMA, _DEV = "Stable Diffusion XL", "Anima or Cosmos-Predict2", "FLUX.2 [dev]"
_ZIMAGE = "Z-Image or Lumina"
# By names of modules that FLUX.2 does not have; dots written as underscores. The first match counts.
_FAMILIES = (
    (r"_blocks_\d+_processor_", "FLUX.1 (in XLabs' layout)"),
    (r"(^|_)(down|up|mid|input|output|middle)_blocks?_", _SD),
    (
        r"(img|txt)_mod_linear|_blocks_\d+_modulation_linear|(img|txt)_mlp_fc[12]|token_refiner"
        r"|(?<!single_)transformer_blocks_19_|single_transformer_blocks_3[89]_",
        _HUNYUAN,
    ),
    (r"distilled_guidance_layer", "Chroma"),
    (
        r"(img|txt)_mod_lin\b|single_blocks_\d+_modulation_lin\b|transformer_blocks_\d+_(ff_(context_)?net_|norm1)"
        r"|single_transformer_blocks_\d+_(attn_to_[qkv]\b|proj_|norm)|vector_in|time_text_embed",
        _FLUX1,
    ),
    (r"guidance_in_|time_guidance_embed_guidance", _DEV),
    (r"transformer_blocks_\d+_(img|txt)_(mod|mlp)_", _QWEN),
    (r"blocks_\d+_(cross|self)_attn_(q|k|v|output)_proj|adaln_modulation_(self|cross)_attn|llm_adapter", _ANIMA),
    (r"blocks_\d+_(cross|self)_attn_(q|k|v|o|k_img|v_img)\b|blocks_\d+_ffn_(\d\b|net_)", "Wan"),
    (r"blocks_\d+_attn_(wq|wk|wv|wo|gate)\b|txtfusion_", "Krea 2"),
    (r"(visual|text)_transformer_blocks_\d+", "Kandinsky 5"),
    (r"(double|single)_stream_blocks_\d+_block", "HiDream"),
    (r"joint_transformer_blocks_\d+|(double|single)_layers_\d+", "AuraFlow"),
    (r"joint_blocks_\d+", "Stable Diffusion 3"),
    (r"transformer_blocks_\d+_attn[12]_to_", "a model with cross-attention (LTX-Video, PixArt, Sana)"),
    (r"noise_refiner|context_refiner|(^|_)layers_\d+_(attention_|feed_forward)", _ZIMAGE),
    (r"text_model_encoder_layers|te\d?_text_model", "a CLIP text encoder (FLUX.1, SDXL, SD)"),
    (r"encoder_block_\d+_layer_\d+", "a T5 text encoder"),
)
# What metadata states, its letters and digits only. None: of FLUX.2, without saying which.
_STATED = (
    (r"klein.*4b", "FLUX.2 [klein] 4B"),
    (r"klein.*9b", "FLUX.2 [klein] 9B"),
    (r"flux2.*dev", _DEV),
    (r"flux2|klein", None),
    (r"chroma", "Chroma"),
    (r"flux", _FLUX1),
    (r"qwen.*image", _QWEN),
    (r"zimage|lumina", _ZIMAGE),
    (r"hunyuan.?video|framepack", _HUNYUAN),
    (r"^wan|wan\d", "Wan"),
    (r"anima$|^anima|cosmos", _ANIMA),
    (r"krea2", "Krea 2"),
    (r"kandinsky", "Kandinsky 5"),
    (r"hidream", "HiDream"),
    (r"auraflow", "AuraFlow"),
    (r"ltx", "LTX-Video"),
    (r"sdxl|stablediffusionxl|pony|illustrious", _SDXL),
    (r"sd3|stablediffusion(v?3)", "Stable Diffusion 3"),
    (r"^sd(v?[12]|15)|stablediffusion", "Stable Diffusion"),
)
_STATEMENTS = ("modelspec.architecture", "model_spec.architecture", "ss_base_model_version", "base_model", "model")
# Modules that FLUX.1, HunyuanVideo and Qwen-Image have too, by the same names and, in the 4B, of the same shapes.
_SHARED = re.compile(r"double_blocks\.\d+\.(img|txt)\.(to_[qkv]|to_out|norm_[qk])|time_in\.linear_[12]")


@dataclass(frozen=True)
class Base:
    """name: the model, in words, or None if no known one fits. hidden: the transformer's hidden size, or None."""

    name: str | None
    hidden: int | None

    def words(self) -> str:
        """Fit to follow "is a LoRA for"."""
        size = f"hidden size {self.hidden}" if self.hidden else ""
        if self.name is None:
            return f"a model of {size}" if size else "a model that klein_mlx does not know"
        return f"{self.name} ({size})" if size else self.name


@cache
def shapes_of(config: ModelConfig, part: str) -> Mapping[str, tuple[int, ...]]:
    """Every weight's shape by its module's path, before quantisation."""
    return {name.removesuffix(".weight"): shape for name, shape in expected(part, config).items()}


@cache
def _base_shapes(name: str) -> Mapping[str, tuple[int, ...]]:
    config = _BASES[name]
    encoder = replace(KLEIN["text_encoder"], hidden_size=config.joint_attention_dim // 3)
    return shapes_of(ModelConfig(config, encoder, KLEIN["vae"], True, (9, 18, 27)), "transformer")


def foreign_base(unknown: Collection[str]) -> str | None:
    """What a LoRA is for if some of its modules' names belong to another family of models."""
    flat = [name.replace(".", "_") for name in unknown]
    return next((what for pattern, what in _FAMILIES if any(re.search(pattern, name) for name in flat)), None)


def stated_base(metadata: Mapping[str, str]) -> str | None:
    """The model that a LoRA's metadata states, in the words of this file; None if it states none that is known."""
    for key in _STATEMENTS:
        text = re.sub(r"[^a-z0-9]", "", metadata.get(key, "")[:200].lower())
        for pattern, what in _STATED:
            if re.search(pattern, text):
                return what
    return None


def is_ambiguous(shapes: Collection[str], base: Base) -> bool:
    """Whether other families have all of these modules by the same names, and no shape tells which family it is."""
    return base.name in (None, "FLUX.2 [klein] 4B") and all(_SHARED.fullmatch(path) for path in shapes)


def tell_base(shapes: Mapping[str, tuple[int, ...]]) -> Base:
    """Of a LoRA for FLUX.2's transformer, or one that shares its names.

    shapes: our module path -> the shape that the LoRA's weight has for it.
    """
    hidden = _hidden(shapes)
    other = _lookalike(shapes) if hidden == _KLEIN_4B.hidden_size else None
    if other:
        return Base(other, hidden)
    fitting = [name for name in _BASES if all(_base_shapes(name).get(path) == s for path, s in shapes.items())]
    if fitting and shapes:
        return Base(fitting[0], hidden)
    return Base(_HIDDEN.get(hidden or 0), hidden)


def tell_encoder(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The text encoder that a LoRA is for, by its hidden size."""
    for path, (_, inputs) in ((p, s) for p, s in shapes.items() if len(s) == 2):
        if path.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            return _ENCODERS.get(inputs, f"an encoder of hidden size {inputs}")
    return None


# Which axis of a weight, by the last word of its path, is as long as the hidden size.
_HIDDEN_AXIS: dict[str, int] = dict.fromkeys(("to_q", "to_k", "to_v", "to_out", "mlp_in", "linear_in"), 1)
_HIDDEN_AXIS |= dict.fromkeys(("mod_img", "mod_txt", "mod_single", "final_mod", "final_out"), 1)
_HIDDEN_AXIS |= dict.fromkeys(("mlp_out", "linear_out", "img_in", "txt_in", "linear_1", "linear_2"), 0)


def _hidden(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """What two of three shapes say, or more."""
    kinds = ((path.rpartition(".")[2], shape) for path, shape in shapes.items() if len(shape) == 2)
    said = Counter(shape[_HIDDEN_AXIS[kind]] for kind, shape in kinds if kind in _HIDDEN_AXIS)
    most = max(said, key=said.__getitem__, default=0)
    return most if said[most] * 3 >= 2 * said.total() > 0 else None


def _lookalike(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Families with klein 4B's hidden size and many of its names: their MLPs are narrower, and they have more double
    blocks: FLUX.1 19, HunyuanVideo 20, Qwen-Image 60 and no single ones."""
    doubles = max((int(path.split(".")[1]) for path in shapes if path.startswith("double_blocks.")), default=0)
    singles = max((int(path.split(".")[1]) for path in shapes if path.startswith("single_blocks.")), default=-1)
    hidden = _KLEIN_4B.hidden_size
    wrong = {"mlp_in": (4 * hidden, hidden), "mlp_out": (hidden, 4 * hidden)}
    wrong |= {"linear_in": (7 * hidden, hidden), "linear_out": (hidden, 5 * hidden)}
    narrower = any(shape == wrong.get(path.rpartition(".")[2]) for path, shape in shapes.items())
    if doubles > 19 and singles < 0:
        return _QWEN
    if doubles == 19 or (narrower and singles > 37):
        return _HUNYUAN
    return _FLUX1 if narrower or doubles >= _KLEIN_4B.num_layers else None
