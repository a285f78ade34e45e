"""LoRAs that diffusers loads rightly do the same here: its own velocity, its own encoder, its own merged layers."""

import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from folders import GOLDEN
from lora_kinds import KINDS, lokr
from lora_layouts import LAYOUTS, Tensors, Twin, make_twin, save
from lora_runs import SIDE, TEXT, difference, pipeline, velocity

from klein_mlx.errors import CheckpointError

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

# What diffusers 0.42 leaves out or gets wrong, so that it is taken out of the twin: final adaLN in BFL's names (its
# halves are not swapped), and of kohya's names all modulations.
FINAL = ("norm_out.linear",)
MODULATIONS = (
    "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.linear",
    "single_stream_modulation.linear",
)
RIGHT = {
    "peft": (),
    "adapter metadata": (),
    "rslora": (),
    "ai-toolkit": FINAL,
    "peft dump": FINAL,
    "kohya": (*FINAL, *MODULATIONS),
    "musubi sparse": (*FINAL, *MODULATIONS),
}


def reference_velocity(pipe: Any, sigma: float = 0.7) -> mx.array:
    """diffusers' transformer on the tokens of `lora_runs.velocity`."""
    model, rng = pipe.transformer, np.random.default_rng(5)
    channels, joint = model.config.in_channels, model.config.joint_attention_dim
    tokens = torch.from_numpy(rng.standard_normal((1, SIDE * SIDE, channels), np.float32))
    embeds = torch.from_numpy(rng.standard_normal((1, TEXT, joint), np.float32))
    grid = torch.zeros(1, channels, SIDE, SIDE)
    with torch.no_grad():
        out = model(
            hidden_states=tokens,
            encoder_hidden_states=embeds,
            timestep=torch.tensor([np.float32(sigma)]),
            img_ids=pipe._prepare_latent_ids(grid),
            txt_ids=pipe._prepare_text_ids(embeds),
            return_dict=False,
        )[0]
    return mx.array(out.numpy())


def load_reference(file: Path) -> Any:
    from parity_reference import load

    pipe = load(GOLDEN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, local_files_only=True)
    return pipe


def ours(file: Path) -> mx.array:
    pipe = pipeline()
    pipe.load_lora(file)
    return velocity(pipe)


def check(file: Path) -> None:
    right, found = reference_velocity(load_reference(file)), ours(file)
    assert difference(found, right) < 1e-4
    assert difference(velocity(pipeline()), right) > 0.02


@pytest.mark.parametrize("layout", RIGHT)
def test_diffusers_gives_the_same_velocity(layout: str, tmp_path: Path) -> None:
    twin: Twin = {path: factors for path, factors in make_twin().items() if path not in RIGHT[layout]}
    check(save(tmp_path / "lora.safetensors", *LAYOUTS[layout](twin)))


def without_final(tensors: Tensors) -> Tensors:
    return {name: array for name, array in tensors.items() if "final_layer.adaLN" not in name}


@pytest.mark.parametrize("kind", ["full", "factored"])
def test_diffusers_gives_the_same_for_a_lokr(kind: str, tmp_path: Path) -> None:
    """It fuses its own q, k and v for this; the same factor divides both sides, as PEFT makes them. A quarter of the
    strength: at the whole of it velocities reach 2000, and float32's rounding 2e-4 of that."""
    tensors = without_final(lokr(kind, out_factor=4)[0])
    tensors = {name: array / 4 if name.endswith("lokr_w1") else array for name, array in tensors.items()}
    check(save(tmp_path / "lora.safetensors", tensors))


def test_peft_gives_the_same_for_dora(tmp_path: Path) -> None:
    """PEFT's magnitudes, on all linear layers of diffusers' transformer."""
    tensors = {name: array for name, array in KINDS["dora peft"]()[0].items() if not name.endswith(".alpha")}
    check(save(tmp_path / "lora.safetensors", tensors))


TARGETS = ["to_q", "to_k", "add_v_proj", "to_add_out", "linear_in", "to_qkv_mlp_proj", "to_out.0", "proj_out"]


def peft_config(kind: str) -> Any:
    """One of PEFT's methods, on layers of every kind."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    common: dict[str, Any] = {"r": 4, "target_modules": TARGETS}
    patterns = {"alpha_pattern": {"to_q": 16, r"transformer_blocks\.1\..*to_k": 2}, "rank_pattern": {"linear_in": 2}}
    configs = {
        "alpha over rank": lambda: LoraConfig(**common, lora_alpha=6, init_lora_weights=False),
        "rank-stabilized": lambda: LoraConfig(**common, lora_alpha=6, use_rslora=True, init_lora_weights=False),
        "patterns": lambda: LoraConfig(**common, lora_alpha=6, **patterns, init_lora_weights=False),
        "patterns by root": lambda: LoraConfig(
            **common, lora_alpha=6, **patterns, use_rslora=True, init_lora_weights="gaussian"
        ),
        "orthogonal": lambda: LoraConfig(**common, lora_alpha=6, init_lora_weights="orthogonal"),
        "mica": lambda: LoraConfig(**common, lora_alpha=6, init_lora_weights="mica"),
        "DoRA by root": lambda: LoraConfig(**common, lora_alpha=6, use_dora=True, use_rslora=True),
        "bias": lambda: LoraConfig(**common, lora_alpha=6, lora_bias=True, init_lora_weights=False),
        "LoHa": lambda: LoHaConfig(**common, alpha=6, init_weights=False),
        "LoKr": lambda: LoKrConfig(**common, alpha=6, init_weights=False),
        "LoKr in three": lambda: LoKrConfig(
            **common, alpha=6, decompose_both=True, decompose_factor=4, init_weights=False
        ),
        "LoKr whole": lambda: LoKrConfig(target_modules=TARGETS, r=64, alpha=24, init_weights=False),
        "pissa": lambda: LoraConfig(**common, lora_alpha=6, init_lora_weights="pissa"),
        "olora": lambda: LoraConfig(**common, lora_alpha=6, init_lora_weights="olora", use_rslora=True),
    }
    return configs[kind]()


def trained(kind: str) -> Any:
    """diffusers' golden pipeline, PEFT's method on its transformer, all adapter weights moved."""
    from parity_reference import load
    from peft import get_peft_model

    torch.manual_seed(1)
    reference = load(GOLDEN)
    reference.transformer = get_peft_model(reference.transformer, peft_config(kind))
    return reference


def move(model: Any) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(mark in name for mark in ("lora_", "hada_", "lokr_")):
                weight.add_(0.1 * torch.randn_like(weight) * weight.abs().mean().clamp(min=0.05))


KINDS_OF_PEFT = ["alpha over rank", "rank-stabilized", "patterns", "patterns by root", "orthogonal", "mica"]
KINDS_OF_PEFT += ["DoRA by root", "bias", "LoHa", "LoKr", "LoKr in three", "LoKr whole"]


@pytest.mark.parametrize("kind", KINDS_OF_PEFT)
def test_what_peft_saves_does_what_it_did(kind: str, tmp_path: Path) -> None:
    """Its own adapter_model.safetensors and adapter_config.json."""
    reference = trained(kind)
    move(reference.transformer)
    reference.transformer.save_pretrained(str(tmp_path))
    right = reference_velocity(reference)
    assert difference(ours(tmp_path), right) < 1e-4
    assert difference(velocity(pipeline()), right) > 0.005


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_base_that_training_changed(kind: str, tmp_path: Path) -> None:
    """As PEFT saves it, it is refused by name; what PEFT's conversion makes of it does what training did."""
    reference = trained(kind)
    model = reference.transformer
    config = model.peft_config["default"]
    config.init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    config.init_lora_weights = kind
    move(model)
    model.save_pretrained(str(tmp_path / "as it is"))
    model.save_pretrained(str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    name = {"pissa": "PiSSA", "olora": "OLoRA"}[kind]
    with pytest.raises(CheckpointError, match=f"is {name}: its factors belong to the base that training changed"):
        ours(tmp_path / "as it is")
    assert difference(ours(tmp_path / "converted"), reference_velocity(reference)) < 1e-4


@pytest.mark.parametrize("layout", ["comfyui", "bare bfl", "diffsynth", "mflux"])
def test_where_diffusers_does_not_apply_all_of_it_we_do(layout: str, tmp_path: Path) -> None:
    """These it refuses, or loads without all of them taking effect: the PEFT twin says what is right."""
    twin = make_twin()
    right = save(tmp_path / "right.safetensors", *LAYOUTS["peft"](twin))
    assert difference(ours(save(tmp_path / "lora.safetensors", *LAYOUTS[layout](twin))), ours(right)) < 1e-5


def test_peft_on_the_text_encoder_gives_the_same_embeddings(tmp_path: Path) -> None:
    """LoRA's of the encoder, put on transformers' Qwen3 by PEFT itself and saved by it."""
    from parity_reference import load, taps
    from peft import LoraConfig, get_peft_model

    reference = load(GOLDEN)
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "o_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(reference.text_encoder, config)
    model.save_pretrained(str(tmp_path))
    reference.text_encoder = model
    with torch.no_grad():
        right, _ = reference.encode_prompt("a fox", max_sequence_length=20, text_encoder_out_layers=taps(reference))
    pipe = pipeline()
    pipe.load_lora(tmp_path)
    run = pipe.stream("a fox", seed=0, max_sequence_length=20)
    found = pipe.encodings.of_prompt(run, "a fox")
    assert difference(found, mx.array(right.numpy())) < 1e-4
    pipe.parts.release(run, "text_encoder")
    pipe.unload_lora()
    plain = pipe.encodings.of_prompt(run, "a fox")
    assert difference(plain, mx.array(right.numpy())) > 0.01
