"""Both models in stages: which layers read what, and how a stage is run, so that layers can be coded one after another.

A stage is a block or what stands before and behind the blocks. Its layers come in groups, in the order in which they
are computed; the layers of a group's list share one input.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from klein_mlx.config import ModelConfig
from klein_mlx.model.latents import latents_to_tokens
from klein_mlx.model.rope import Rope
from klein_mlx.model.tokenizer import Tokens
from klein_mlx.model.transformer import Modulations

Groups = tuple[tuple[tuple[str, ...], ...], ...]


@dataclass
class Sample:
    """One prompt at one noise level, on its way through a model: what one side (whole, or coded) has computed so far.

    given: what the model is given. state: of the part's stages, rebuilt by each.
    """

    given: Any
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """run(module, sample) computes the stage on the sample's state and returns the new state; nothing is changed."""

    groups: Groups
    run: Callable[[Any, Sample], dict[str, Any]]


@dataclass(frozen=True)
class Look:
    """What the transformer is given: latents (1, h, w, C) at a noise level, the prompt's embeddings (1, L, D)."""

    latents: mx.array
    sigma: float
    embeds: mx.array
    rope: Rope


def encoder_stages(config: ModelConfig) -> list[Stage]:
    """Of the text encoder; a sample's `given` is the tokens of one prompt. Ends with state["embeds"]."""
    stages = [Stage((), _start_encoder)]
    for index in range(config.taps[-1]):
        at = f"layers.{index}"
        groups = (
            (tuple(f"{at}.self_attn.{x}_proj" for x in "qkv"),),
            ((f"{at}.self_attn.o_proj",),),
            ((f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"),),
            ((f"{at}.mlp.down_proj",),),
        )
        stages.append(Stage(groups, _encoder_layer(index, index + 1 in config.taps)))
    return stages


def _start_encoder(module: Any, sample: Sample) -> dict[str, Any]:
    tokens: Tokens = sample.given
    return {"x": module.embed_tokens(tokens.input_ids), "taps": []}


def _encoder_layer(index: int, tapped: bool) -> Callable[[Any, Sample], dict[str, Any]]:
    def run(module: Any, sample: Sample) -> dict[str, Any]:
        tokens: Tokens = sample.given
        mask = mx.tri(tokens.input_ids.shape[1], dtype=mx.bool_)[None, None] & tokens.attention_mask[:, None, None, :]
        x = module.layers[index](sample.state["x"], mask)
        return {"x": x, "taps": [*sample.state["taps"], *([x] if tapped else [])]}

    return run


def transformer_stages(config: ModelConfig, sigmas: list[float]) -> list[Stage]:
    """Of the transformer; a sample's `given` is a Look. Ends with state["velocity"], tokens (1, N, C).

    sigmas: noise levels at which the modulations are to be right.
    """

    def modulate(module: Any, sample: Sample) -> dict[str, Any]:
        look: Look = sample.given
        # All levels at once, so that the layers' inputs are those of all of them.
        found = module.all_modulations([look.sigma, *sigmas], look.latents.dtype)
        return {"mods": found[0]}

    def enter(module: Any, sample: Sample) -> dict[str, Any]:
        look: Look = sample.given
        img = module.img_in(latents_to_tokens(look.latents))
        return {**sample.state, "txt": module.embed_text(look.embeds), "img": img}

    t = config.transformer
    time = ((("time_in.linear_1",),), (("time_in.linear_2",),), (("mod_img", "mod_txt", "mod_single", "final_mod"),))
    stages = [Stage(time, modulate), Stage(((("img_in",), ("txt_in",)),), enter)]
    for index in range(t.num_layers):
        both = [f"double_blocks.{index}.{stream}" for stream in ("txt", "img")]
        qkv = tuple(tuple(f"{at}.to_{x}" for x in "qkv") for at in both)
        rest = [tuple((f"{at}.{name}",) for at in both) for name in ("to_out", "mlp_in", "mlp_out")]
        stages.append(Stage((qkv, *rest), _double_block(index)))
    stages.append(Stage((), _join))
    for index in range(t.num_single_layers):
        at = f"single_blocks.{index}"
        stages.append(Stage((((f"{at}.linear_in",),), ((f"{at}.linear_out",),)), _single_block(index)))
    return [*stages, Stage(((("final_out",),),), _finish)]


def _double_block(index: int) -> Callable[[Any, Sample], dict[str, Any]]:
    def run(module: Any, sample: Sample) -> dict[str, Any]:
        state, mods = sample.state, sample.state["mods"]
        (txt, img), _ = module.double_blocks[index](state["txt"], state["img"], mods.txt, mods.img, sample.given.rope)
        return {"mods": mods, "txt": txt, "img": img}

    return run


def _join(module: Any, sample: Sample) -> dict[str, Any]:
    state = sample.state
    return {"mods": state["mods"], "x": mx.concatenate([state["txt"], state["img"]], axis=1)}


def _single_block(index: int) -> Callable[[Any, Sample], dict[str, Any]]:
    def run(module: Any, sample: Sample) -> dict[str, Any]:
        mods: Modulations = sample.state["mods"]
        x, _ = module.single_blocks[index](sample.state["x"], mods.single, sample.given.rope)
        return {"mods": mods, "x": x}

    return run


def _finish(module: Any, sample: Sample) -> dict[str, Any]:
    state, look = sample.state, sample.given
    shift, scale = state["mods"].final
    x = state["x"][:, look.embeds.shape[1] :]
    return {"velocity": module.final_out(mx.fast.layer_norm(x, scale, shift, module.config.eps))}
