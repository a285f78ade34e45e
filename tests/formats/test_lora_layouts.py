"""Every layout and kind of LoRA does to the velocity what the same difference does inside of the weights."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from lora_kinds import KINDS
from lora_layouts import (
    APART,
    LAYOUTS,
    Tensors,
    deltas,
    linear_shapes,
    make_twin,
    merged_folder,
    save,
    written,
)
from lora_runs import difference, pipeline, velocity

from klein_mlx import KleinPipeline


@pytest.fixture(scope="module")
def plain() -> mx.array:
    return velocity(pipeline())


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> mx.array:
    """The velocity of a model that holds the twin's differences in its weights: no LoRA code is in it."""
    return velocity(pipeline(merged_folder(tmp_path_factory.mktemp("merged") / "model", deltas(make_twin()))))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_applied_in_full(layout: str, plain: mx.array, merged: mx.array, tmp_path: Path) -> None:
    """To 1e-5 of the velocity, float32 sums in another order; without the LoRA it is another velocity altogether.

    The PEFT twin is one of the layouts. Taken off again, not a bit is left of it.
    """
    tensors, metadata = LAYOUTS[layout](make_twin())
    pipe = pipeline()
    pipe.load_lora(save(tmp_path / "lora.safetensors", tensors, metadata))
    assert difference(velocity(pipe), merged) < 1e-5
    assert difference(plain, merged) > 0.1
    pipe.unload_lora()
    assert mx.array_equal(velocity(pipe), plain)


@pytest.mark.parametrize("layout", APART)
def test_q_k_and_v_may_have_ranks_of_their_own(layout: str, tmp_path: Path) -> None:
    twin = make_twin(seed=3, share_qkv=False)
    tensors, metadata = LAYOUTS[layout](twin)
    pipe = pipeline()
    pipe.load_lora(save(tmp_path / "lora.safetensors", tensors, metadata))
    right = velocity(pipeline(merged_folder(tmp_path / "model", deltas(twin))))
    assert difference(velocity(pipe), right) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_applied_in_full(kind: str, plain: mx.array, tmp_path: Path) -> None:
    """Products that are cut by rows, not their factors; magnitudes of rows and columns; differences of norms.

    To 2e-5: norms and products of float32 come on top of the sums.
    """
    tensors, differences = KINDS[kind]()
    pipe = pipeline()
    pipe.load_lora(save(tmp_path / "lora.safetensors", tensors))
    right = velocity(pipeline(merged_folder(tmp_path / "model", differences)))
    assert difference(velocity(pipe), right) < 2e-5
    assert difference(plain, right) > 0.02
    pipe.unload_lora()
    assert mx.array_equal(velocity(pipe), plain)


def test_biases_are_added(plain: mx.array, tmp_path: Path) -> None:
    """`.diff_b` of a fused layer, and PEFT's `lora_B.bias`, scaled by alpha as the factors are."""
    rng = np.random.default_rng(0)
    fused, own = rng.normal(0, 1, 192).astype(np.float32), rng.normal(0, 1, 64).astype(np.float32)
    factors = make_twin()["transformer_blocks.0.attn.to_out.0"]
    name = "diffusion_model.double_blocks.0.img_attn"
    tensors = written({f"{name}.proj": factors}, "", "lora_A.weight", "lora_B.weight", alpha=True)
    tensors |= {f"{name}.qkv.diff_b": fused, f"{name}.proj.lora_B.bias": own}
    pipe = pipeline()
    pipe.load_lora(save(tmp_path / "lora.safetensors", tensors), scale=0.5)
    found = velocity(pipe)
    right = pipeline()
    velocity(right)
    transformer: Any = right.parts.loaded["transformer"].module
    img = transformer.double_blocks[0].img
    img.separate()
    img.to_q.bias, img.to_k.bias, img.to_v.bias = (mx.array(0.5 * b) for b in np.split(fused, 3))
    img.to_out.bias = mx.array(0.5 * factors.alpha / factors.rank * own)
    img.to_out.weight = img.to_out.weight + mx.array(0.5 * factors.delta)
    assert difference(found, velocity(right)) < 1e-5
    assert difference(found, plain) > 0.02
    pipe.unload_lora()
    assert mx.array_equal(velocity(pipe), plain)


def encoder_lora(prefix: str, joint: str) -> Tensors:
    """Factors for the first encoder layer, and for one above the last tap. prefix: up to the list of layers."""
    rng, tensors = np.random.default_rng(0), {}
    rows, columns = linear_shapes("text_encoder")["model.layers.0.self_attn.o_proj"]
    up, down = rng.normal(0, 0.3, (rows, 2)).astype(np.float32), rng.normal(0, 0.3, (2, columns)).astype(np.float32)
    for layer in (0, 3):
        name = prefix + joint.join([str(layer), "self_attn", "o_proj"])
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return tensors


def test_a_text_encoder_is_reached_by_every_spelling(tmp_path: Path) -> None:
    """kohya's, ComfyUI's, diffusers' and PEFT's prefixes. Layers above the last tap are needless, and so counted."""

    def latents(pipe: KleinPipeline) -> mx.array:
        arguments: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 1, "max_sequence_length": 20}
        return pipe("a fox", output_type="latent", seed=1, **arguments).images

    pipe, found = pipeline(), []
    before = latents(pipe)
    for number, (prefix, joint) in enumerate(
        [
            ("text_encoder.model.layers.", "."),
            ("text_encoder.layers.", "."),
            ("lora_te_model_layers_", "_"),
            ("lora_te1_layers_", "_"),
            ("text_encoders.qwen3_4b.transformer.model.layers.", "."),
            ("base_model.model.model.layers.", "."),
        ]
    ):
        pipe.load_lora(save(tmp_path / f"{number}.safetensors", encoder_lora(prefix, joint)), name="words")
        assert pipe.parts.loras.get("words").needless == 1
        found.append(latents(pipe))
        pipe.unload_lora("words")
        assert mx.array_equal(latents(pipe), before)
    assert difference(found[0], before) > 0.01
    assert all(mx.array_equal(one, found[0]) for one in found)
