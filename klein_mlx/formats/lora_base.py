"""Which model a LoRA was made for: told from its shapes and names, never from what it is called."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache

from klein_mlx.config import ModelConfig, TransformerConfig
from klein_mlx.formats.infer import KLEIN
from klein_mlx.formats.names import stranger
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
_ENCODERS = {2560: "Qwen3-4B", 4096: "Qwen3-8B", 5120: "Mistral-Small (the encoder of FLUX.2 [dev])"}
# By names that FLUX.2 has not; dots written as underscores.
_FLUX1 = (
    r"(img|txt)_mod_lin\b|single_blocks_\d+_modulation_lin|single_transformer_blocks_\d+_(attn_to_[qkv]\b|proj_|norm)"
    r"|transformer_blocks_\d+_(ff_(context_)?net_|norm1)|vector_in|time_text_embed"
)
_OTHERS = (
    (_FLUX1, "FLUX.1"),
    (r"guidance_in_|time_guidance_embed_guidance", "FLUX.2 [dev]"),
    (r"text_model_encoder_layers|(lora|lycoris)_te\d?_text_model", "a CLIP text encoder (FLUX.1, SDXL, SD)"),
    (r"encoder_block_\d+_layer_\d+", "a T5 text encoder"),
    (r"(lora_unet|lycoris_unet|unet|lycoris)_?(down|up|mid|input|output|middle)_block", "Stable Diffusion or SDXL"),
    (r"joint_blocks_\d+", "Stable Diffusion 3"),
    (r"blocks_\d+_(cross_attn|self_attn|ffn)_", "Wan"),
    (r"transformer_blocks_\d+_(img|txt)_(mod|mlp)_", "Qwen-Image"),
    (r"noise_refiner|context_refiner|(^|_)layers_\d+_(attention_|feed_forward)", "Z-Image or Lumina"),
)


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
    for pattern, what in _OTHERS:
        if any(re.search(pattern, name) for name in flat):
            return what
    return stranger(unknown)


def tell_base(shapes: Mapping[str, tuple[int, ...]]) -> Base:
    """Of a LoRA for FLUX.2's transformer, or one that shares its names.

    shapes: our module path -> the shape that the LoRA's weight has for it.
    """
    hidden = _hidden(shapes)
    if hidden == _KLEIN_4B.hidden_size and _is_flux1(shapes, _KLEIN_4B.hidden_size):
        return Base("FLUX.1", hidden)
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
    """What most of the shapes say."""
    kinds = ((path.rpartition(".")[2], shape) for path, shape in shapes.items() if len(shape) == 2)
    said = Counter(shape[_HIDDEN_AXIS[kind]] for kind, shape in kinds if kind in _HIDDEN_AXIS)
    return max(said, key=said.__getitem__, default=None)


def _is_flux1(shapes: Mapping[str, tuple[int, ...]], hidden: int) -> bool:
    """FLUX.1 has klein 4B's hidden size and many of its names; its MLPs are narrower, and it has more double blocks."""
    wrong = {"mlp_in": (4 * hidden, hidden), "mlp_out": (hidden, 4 * hidden)}
    wrong |= {"linear_in": (7 * hidden, hidden), "linear_out": (hidden, 5 * hidden)}
    if any(shape == wrong.get(path.rpartition(".")[2]) for path, shape in shapes.items()):
        return True
    blocks = [int(path.split(".")[1]) for path in shapes if path.startswith("double_blocks.")]
    return max(blocks, default=0) >= _BASES["FLUX.2 [klein] 9B"].num_layers
