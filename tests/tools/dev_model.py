"""A small FLUX.2 [dev] with random weights: the golden model with what dev has otherwise. No torch is needed."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from folders import copy_model, edit_json, edit_weights
from foreign import Weights, to_bfl

SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
GUIDANCE = "time_guidance_embed.guidance_embedder"


def make(folder: Path, prefix: str = "language_model.model.") -> Path:
    """prefix: of the language model's weights in the encoder's file."""
    copy_model(folder)
    edit_json(folder / "model_index.json", lambda values: values.pop("is_distilled"))
    edit_json(folder / "model_index.json", lambda values: values.update(_class_name="Flux2Pipeline"))
    edit_json(folder / "transformer" / "config.json", lambda values: values.pop("guidance_embeds"))
    edit_weights(folder, "transformer", _add_guidance)
    edit_weights(folder, "text_encoder", lambda weights: _as_mistral(weights, prefix))
    path = folder / "text_encoder" / "config.json"
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    values = json.loads(path.read_text())
    inner = {name: values[name] for name in (*kept, "num_key_value_heads")}
    inner |= {"model_type": "mistral", "rope_theta": 1e9, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
    path.write_text(json.dumps({"model_type": "mistral3", "text_config": inner, "vision_config": {}}))
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer()))
    return folder


def _add_guidance(weights: Weights) -> None:
    like = "time_guidance_embed.timestep_embedder"
    for number in (1, 2):
        shape = weights[f"{like}.linear_{number}.weight"].shape
        random = mx.random.normal(shape, key=mx.random.key(number)) * shape[1] ** -0.5
        weights[f"{GUIDANCE}.linear_{number}.weight"] = random.astype(mx.bfloat16)


def _as_mistral(weights: Weights, prefix: str) -> None:
    for name in list(weights):
        array = weights.pop(name)
        if "q_norm" not in name and "k_norm" not in name:
            weights[name.replace("model.", prefix, 1)] = array
    if prefix != "model.":
        beside = "model." if prefix == "model.language_model." else ""
        weights[f"{beside}vision_tower.patch_conv.weight"] = mx.ones((2, 2))
        weights[f"{beside}multi_modal_projector.norm.weight"] = mx.ones(2)


def tokenizer() -> dict[str, Any]:
    """A tokenizer.json laid out as Mistral's: special tokens, then bytes, and one word that is a token."""
    from tokenizers.pre_tokenizers import ByteLevel

    from klein_mlx.model.tokenizer import MISTRAL

    vocab = {token: number for number, token in enumerate((*SPECIAL, *sorted(ByteLevel.alphabet()), "fo", "fox"))}
    added = [{"id": number, "content": token, "special": True} for number, token in enumerate(SPECIAL)]
    split = {"type": "Split", "pattern": {"Regex": MISTRAL.words[1]}, "behavior": "Isolated", "invert": False}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": [["f", "o"], ["fo", "x"]]}
    steps = {"type": "Sequence", "pretokenizers": [split, letters]}
    return {"model": model, "added_tokens": added, "normalizer": None, "pre_tokenizer": steps, "post_processor": None}


def dev_to_bfl(theirs: Weights, prefix: str = "") -> Weights:
    """diffusers' transformer of dev as Black Forest Labs name it."""
    out = to_bfl(theirs, prefix)
    for number, name in ((1, "in_layer"), (2, "out_layer")):
        out[f"{prefix}guidance_in.{name}.weight"] = theirs[f"{GUIDANCE}.linear_{number}.weight"]
    return out
