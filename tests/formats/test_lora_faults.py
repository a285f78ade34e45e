"""LoRAs that cannot be applied are refused in one line: what they are, what is wrong, or the first key not used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from folders import raw_safetensors, refusal
from lora_kinds import KINDS
from lora_layouts import AB, DOWN_UP, LAYOUTS, Tensors, make_twin, save, to_bfl, written
from lora_runs import difference, pipeline, velocity

from klein_mlx import KleinPipeline
from klein_mlx.config import ModelConfig
from klein_mlx.errors import RequestError
from klein_mlx.formats.lora import read_lora
from klein_mlx.formats.part import KLEIN
from klein_mlx.runtime.run import Picture

KLEIN_4B = ModelConfig(KLEIN["transformer"], KLEIN["text_encoder"], KLEIN["vae"], True, (9, 18, 27))
TO_Q = "transformer.transformer_blocks.0.attn.to_q"
BLOCK = "diffusion_model.double_blocks.0.img_attn.proj"


def good() -> Tensors:
    return written(to_bfl(make_twin()), "diffusion_model.", *DOWN_UP, alpha=True)


def one(rows: int, columns: int, name: str, rank: int = 2) -> Tensors:
    return {
        f"{name}.lora_A.weight": np.ones((rank, columns), np.float32),
        f"{name}.lora_B.weight": np.ones((rows, rank), np.float32),
    }


def told(tensors: Tensors, tmp_path: Path, metadata: dict[str, str] | None = None) -> str:
    """The line with which a golden model refuses a file."""
    file = save(tmp_path / "lora.safetensors", tensors, metadata)
    return refusal(lambda: read_lora(file, pipeline().config))


NORM = "diffusion_model.double_blocks.0.img_attn.norm.query_norm"


@pytest.mark.parametrize(("role", "shape"), [("diff_b", (32,)), ("dora_scale", (32,)), ("dora_scale", (1, 32))])
def test_what_a_norm_cannot_have(role: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """A bias would be left out unsaid; a magnitude has no rows or columns to measure."""
    tensors = {f"{NORM}.diff": np.ones(32, np.float32)}
    assert read_lora(save(tmp_path / "sound.safetensors", tensors), pipeline().config).modules == 1
    line = told({**tensors, f"{NORM}.{role}": np.ones(shape, np.float32)}, tmp_path)
    assert f"{NORM}.{role} has no use: double_blocks.0.img.norm_q is not a linear layer" in line


# ---- damaged, or not whole ----


def without(role: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[f"{BLOCK}.{role}"]

    return change


def put(role: str, values: Any) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{BLOCK}.{role}": np.array(values, np.float32)})


def broken_factor(value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        array = tensors[f"{BLOCK}.lora_up.weight"].copy()
        array[3, 1] = value
        tensors[f"{BLOCK}.lora_up.weight"] = array

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("lora_up.weight"), "has lora_A (down) and no lora_B (up)"),
        (without("lora_down.weight"), "has lora_B (up) and no lora_A (down)"),
        (put("lora_down.weight", np.ones((5, 64))), "lora_A has rank 5, lora_B has 3"),
        (put("alpha", float("nan")), "alpha is nan; it must be a number over 0"),
        (put("alpha", float("inf")), "alpha is inf; it must be a number over 0"),
        (put("alpha", 0.0), "alpha is 0; it must be a number over 0"),
        (put("alpha", -4.0), "alpha is -4; it must be a number over 0"),
        (put("alpha", 1e9), "alpha is 1e+09 at rank 3"),
        (put("alpha", [1.0, 2.0]), "alpha has shape (2,); it must be one number"),
        (broken_factor(float("nan")), "lora_up.weight holds NaN or infinity"),
        (broken_factor(float("inf")), "lora_up.weight holds NaN or infinity"),
        (put("lora_down.weight", np.ones((3, 32))), "is made for a weight of shape (64, 32); here it is (64, 64)"),
        (put("lora_down.weight", np.ones((3, 64, 3, 3))), "its down has shape (3, 64, 3, 3); factors must be matrices"),
        (put("lora_down.weight", np.ones(64)), "its down has shape (64,); factors must be matrices"),
        (put("lora_mid.weight", np.ones((3, 2))), "its core has shape (3, 2); it must be (3, 3)"),
        (put("lora_mid.weight", np.ones((3, 3, 3, 3))), "its core has shape (3, 3, 3, 3); it must be (3, 3)"),
        (put("dora_scale", 1.0), "its DoRA magnitude has shape (1,); it must be (64, 1) or (1, 64)"),
        (put("lora_down.weight", np.ones((0, 64))), "it is empty"),
        (put("dora_scale", np.ones((7, 1))), "its DoRA magnitude has shape (7, 1); it must be (64, 1) or (1, 64)"),
        (put("hada_w1_a", np.ones((64, 2))), "is a LoHa without hada_w1_b"),
        (put("lokr_w1", np.ones((8, 8))), "is a LoKr without lokr_w2"),
        (put("oft_blocks", np.ones((2, 2, 2))), "is OFT; klein_mlx applies LoRA, DoRA, LoHa, LoKr"),
        (put("set_weight", np.ones((2, 2))), "is a replacement of weights; klein_mlx applies"),
        (put("lora_A.second.weight", np.ones((3, 64))), "are present"),
        (put("diff", np.ones((64, 64))), "has a LoRA and a full difference; klein_mlx reads one per module"),
    ],
)
def test_a_damaged_file_is_refused(change: Callable[[Tensors], None], message: str, tmp_path: Path) -> None:
    tensors = good()
    change(tensors)
    assert message in told(tensors, tmp_path)


@pytest.mark.parametrize("kind", ["loha", "loha tucker", "lokr factored", "lokr both factored", "lokr tucker"])
def test_factors_that_are_no_matrices_are_refused(kind: str, tmp_path: Path) -> None:
    """Each of a module's factors, with an axis less, more, or a kernel."""
    tensors = KINDS[kind]()[0]
    config = pipeline().config
    module = next(iter(tensors)).rpartition(".")[0]
    for name in [name for name in tensors if name.startswith(f"{module}.") and not name.endswith("alpha")]:
        array = tensors[name]
        for wrong in (array.reshape(-1), array.reshape(*array.shape, 1), np.stack([array] * 3, -1), array.sum()):
            file = save(tmp_path / "lora.safetensors", tensors | {name: np.asarray(wrong, np.float32)})
            assert module in refusal(lambda file=file: read_lora(file, config))


def test_integers_are_no_factors_but_may_be_alpha(tmp_path: Path) -> None:
    tensors = good()
    tensors[f"{BLOCK}.alpha"] = np.array(4, np.int64)
    file = save(tmp_path / "good.safetensors", tensors)
    assert read_lora(file, pipeline().config).modules == len(to_bfl(make_twin()))
    tensors[f"{BLOCK}.lora_up.weight"] = np.ones((64, 3), np.int32)
    assert "up has dtype I32" in told(tensors, tmp_path)
    tensors = good()
    tensors[f"{BLOCK}.alpha"] = np.array(4, np.float64)
    assert "alpha has dtype F64; klein_mlx reads BF16, F16, F32" in told(tensors, tmp_path)  # MLX does not


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("no json", "its lora_adapter_metadata is not a JSON object"),
        (json.dumps({"transformer.lora_alpha": "4"}), "lora_alpha of context_embedder is '4'"),
        (json.dumps({"transformer.lora_alpha": float("nan")}), "it must be over 0"),
        (json.dumps({"transformer.alpha_pattern": {"(a+)+$": 1}}), "does not read the pattern '(a+)+$'"),
        (json.dumps({"transformer.alpha_pattern": {"(": 1}}), "'(' is not a regular expression"),
    ],
)
def test_metadata_that_is_wrong_is_refused(metadata: str, message: str, tmp_path: Path) -> None:
    tensors = LAYOUTS["peft"](make_twin())[0]
    assert message in told(tensors, tmp_path, {"lora_adapter_metadata": metadata})


@pytest.mark.parametrize("digits", [400, 5000])
def test_numbers_beyond_floats_are_refused(digits: int, tmp_path: Path) -> None:
    """JSON knows no largest number; Python refuses to read one of 5000 digits."""
    huge = "9" * digits
    tensors = LAYOUTS["peft"](make_twin())[0]
    line = told(tensors, tmp_path, {"lora_adapter_metadata": f'{{"transformer.lora_alpha": {huge}}}'})
    assert ("lora_alpha of context_embedder is" if digits == 400 else "is not a JSON object") in line
    assert "lora_alpha of context_embedder is inf" in told(tensors, tmp_path, {"lora_alpha": huge, "lora_rank": "3"})
    assert "lora_alpha of context_embedder is 'two'" in told(tensors, tmp_path, {"lora_alpha": "two"})
    whole = {"transformer.x_embedder.lokr_w1": np.ones((2, 2)), "transformer.x_embedder.lokr_w2": np.ones((32, 16))}
    whole = {name: array.astype(np.float32) for name, array in whole.items()}
    file = save(tmp_path / "lokr.safetensors", whole, {"lora_adapter_metadata": f'{{"alpha": 2, "r": {"9" * 400}}}'})
    assert read_lora(file, pipeline().config).modules == 1  # a rank that none can be is none


BASES = "its factors belong to the base that training changed; save it as a plain LoRA"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init_lora_weights": "pissa"}, f"is PiSSA: {BASES}"),
        ({"init_lora_weights": "pissa_niter_16"}, f"is PiSSA: {BASES}"),
        ({"init_lora_weights": "olora"}, f"is OLoRA: {BASES}"),
        ({"init_lora_weights": "OLoRA"}, f"is OLoRA: {BASES}"),
        ({"init_lora_weights": "corda"}, f"is CorDA: {BASES}"),
        ({"init_lora_weights": "loftq"}, f"is LoftQ: {BASES}"),
        ({"init_lora_weights": "lora_ga"}, f"is LoRA-GA: {BASES}"),
        ({"init_lora_weights": "tomorrow"}, "has init_lora_weights 'tomorrow', which klein_mlx does not know"),
        ({"alora_invocation_tokens": [1, 2]}, "is an activated LoRA (aLoRA), which klein_mlx does not apply"),
        ({"use_qalora": True}, "is a QALoRA, which klein_mlx does not apply"),
        ({"kasa_config": {}, "layer_replication": [[0, 2]]}, "is a LoRA of replicated layers, which"),
        ({"peft_type": "HIRA"}, "peft_type is 'HIRA'; klein_mlx applies PEFT's LORA, LOHA and LOKR"),
    ],
)
def test_a_method_that_factors_alone_do_not_tell_is_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """In the file's own metadata, and in the adapter_config.json beside it."""
    tensors = LAYOUTS["peft"](make_twin())[0]
    metadata = {f"transformer.{key}": value for key, value in config.items()}
    assert message in told(tensors, tmp_path, {"lora_adapter_metadata": json.dumps(metadata)})
    file = save(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert message in refusal(lambda: read_lora(file, pipeline().config))


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_a_start_that_leaves_the_base_alone_is_applied(init: Any, tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.init_lora_weights": init})}
    file = save(tmp_path / "lora.safetensors", LAYOUTS["peft"](make_twin())[0], metadata)
    assert read_lora(file, pipeline().config).modules == len(make_twin())


def test_what_is_no_lora_is_told(tmp_path: Path) -> None:
    assert "is not a LoRA: it holds a.weight" in told({"a.weight": np.ones(3, np.float32)}, tmp_path)
    weights = {"double_stream_modulation_img.lin.weight": np.ones((6, 1), np.float32)}
    assert "is not a LoRA: it is a transformer; give it as --transformer" in told(weights, tmp_path)
    (tmp_path / "page.safetensors").write_text("<html><body>404</body></html>")
    assert "web page" in refusal(lambda: read_lora(tmp_path / "page.safetensors", KLEIN_4B))


# ---- keys that are not used ----


def test_unused_keys_are_named_and_may_be_left_out(tmp_path: Path) -> None:
    tensors = good() | one(4, 4, "diffusion_model.double_blocks.0.strange") | {"loose": np.ones(1, np.float32)}
    message = told(tensors, tmp_path)
    assert "3 of 66 keys are not used: diffusion_model.double_blocks.0.strange.lora_A.weight" in message
    assert "--lora-partial leaves them out" in message
    pipe = pipeline()
    pipe.load_lora(tmp_path / "lora.safetensors", name="some", partial=True)
    assert len(pipe.parts.loras.get("some").unused) == 3
    whole = pipeline()
    whole.load_lora(save(tmp_path / "good.safetensors", good()))
    assert mx.array_equal(velocity(pipe), velocity(whole))


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
@pytest.mark.parametrize("key", ["lora_up.weight_scale", "magnitude_vector", "lora_mystery.weight", "scale"])
def test_what_belongs_to_a_module_that_is_used_is_never_left_out(key: str, prefix: str, tmp_path: Path) -> None:
    """Without its magnitude or its scale the module would be applied, and wrongly."""
    joint = "." if prefix.endswith(".") else "_"
    tensors = written(to_bfl(make_twin()), prefix, *DOWN_UP, alpha=True, joint=joint)
    name = f"{prefix}{'double_blocks.0.img_attn.proj'.replace('.', joint)}.{key}"
    file = save(tmp_path / "lora.safetensors", tensors | {name: np.ones(64, np.float32)})
    config = pipeline().config
    message = f"klein_mlx does not know {name}, without which its module would be applied wrongly"
    for partial in (False, True):
        assert message in refusal(lambda partial=partial: read_lora(file, config, partial))


def test_float8_factors_are_the_numbers_that_they_stand_for(tmp_path: Path) -> None:
    """All codes of e4m3 but NaN, against a table by the format's definition. e5m2, which MLX does not load, is
    refused, and so is a scale beside a factor."""
    codes = np.arange(127)
    power, fraction = codes >> 3, codes & 7
    values = (fraction + (power > 0) * 8) * 2.0 ** (np.maximum(power, 1) - 10)
    table = dict(zip([*codes, *(codes | 128)], [*values, *-values], strict=True))
    down = np.resize(list(table), (2, 64)).astype(np.uint8)
    up = np.resize([*table][::-1], (64, 2)).astype(np.uint8)

    def write(dtype: str) -> Path:
        header = {
            f"{BLOCK}.lora_A.weight": {"dtype": dtype, "shape": [2, 64], "data_offsets": [0, 128]},
            f"{BLOCK}.lora_B.weight": {"dtype": dtype, "shape": [64, 2], "data_offsets": [128, 256]},
        }
        file = tmp_path / "lora.safetensors"
        file.write_bytes(raw_safetensors(header, down.tobytes() + up.tobytes()))
        return file

    (change,) = read_lora(write("F8_E4M3"), pipeline().config).changes["transformer"]["double_blocks.0.img.to_out"]
    for found, wanted in ((change.delta.down, down), (change.delta.up, up)):  # type: ignore[union-attr]
        assert np.array_equal(np.array(found.astype(mx.float32)), np.vectorize(table.__getitem__)(wanted))
    file = write("F8_E5M2")
    assert "down has dtype F8_E5M2; klein_mlx reads" in refusal(lambda: read_lora(file, pipeline().config))


def test_a_file_of_which_nothing_fits_is_refused_even_in_part(tmp_path: Path) -> None:
    file = save(tmp_path / "kohya.safetensors", one(4, 4, "lora_unet_strange_module_0_proj"))
    assert "none of its 1 modules is one of this model's" in refusal(lambda: read_lora(file, KLEIN_4B))
    file = save(tmp_path / "lora.safetensors", one(4, 4, "strange.module"))
    for partial in (False, True):
        assert "none of its 1 modules is one of this model's" in refusal(
            lambda partial=partial: read_lora(file, KLEIN_4B, partial)
        )


# ---- for another model ----


@pytest.mark.parametrize(
    ("tensors", "base"),
    [
        (one(12288, 4096, "diffusion_model.double_blocks.7.img_attn.qkv"), "FLUX.2 [klein] 9B (hidden size 4096)"),
        (one(4096, 4096, "transformer.transformer_blocks.0.attn.to_q"), "FLUX.2 [klein] 9B (hidden size 4096)"),
        (one(18432, 6144, "lora_unet_double_blocks_0_img_attn_qkv"), "FLUX.2 [dev] (hidden size 6144)"),
        (one(21504, 3072, "lora_unet_single_blocks_0_linear1"), "FLUX.1 (hidden size 3072)"),
        (one(9216, 3072, "lora_unet_double_blocks_18_img_attn_qkv"), "FLUX.1 (hidden size 3072)"),
        (one(18432, 3072, "lora_unet_double_blocks_0_img_mod_lin"), "FLUX.1;"),
        (one(3072, 3072, "transformer.single_transformer_blocks.0.attn.to_q"), "FLUX.1;"),
        (one(12288, 3072, "transformer.transformer_blocks.0.ff.net.0.proj"), "FLUX.1;"),
        (one(320, 320, "lora_unet_down_blocks_0_attentions_0_proj_in"), "Stable Diffusion or SDXL"),
        (one(768, 768, "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"), "a CLIP text encoder"),
        (one(5120, 5120, "diffusion_model.blocks.0.cross_attn.q"), "Wan"),
        (one(3072, 3072, "transformer.transformer_blocks.0.img_mlp.net.0.proj"), "Qwen-Image"),
        (one(4096, 4096, "text_encoder.model.layers.0.self_attn.q_proj"), "the text encoder Qwen3-8B"),
        (one(5120, 5120, "text_encoder.model.layers.0.self_attn.q_proj"), "the text encoder Mistral-Small"),
        (one(2048, 2048, "transformer.transformer_blocks.0.attn.to_q"), "a model of hidden size 2048"),
        (one(3072, 3072, "transformer.transformer_blocks.59.attn.to_q"), "Qwen-Image (hidden size 3072)"),
        (one(9216, 3072, "lora_unet_double_blocks_19_img_attn_qkv"), "HunyuanVideo (hidden size 3072)"),
        (one(18432, 3072, "lora_unet_double_blocks_0_img_mod_linear"), "HunyuanVideo;"),
        (one(9216, 3072, "lora_unet_single_blocks_0_modulation_linear"), "HunyuanVideo;"),
        (one(12288, 3072, "lora_unet_double_blocks_0_txt_mlp_fc1"), "HunyuanVideo;"),
        (one(3072, 3072, "lora_unet_single_transformer_blocks_39_attn_to_q"), "HunyuanVideo;"),
        (one(9216, 3072, "lora_unet_single_blocks_0_modulation_lin"), "FLUX.1;"),
        (one(2048, 2048, "lora_unet_blocks_0_self_attn_output_proj"), "Anima or Cosmos-Predict2;"),
        (one(5120, 5120, "lora_unet_blocks_0_self_attn_k"), "Wan;"),
        (one(13824, 5120, "transformer.blocks.0.ffn.net.0.proj"), "Wan;"),
        (one(2048, 2048, "transformer.transformer_blocks.0.attn1.to_q"), "a model with cross-attention (LTX-Video"),
        (one(3840, 3840, "diffusion_model.layers.0.attention.to_q"), "Z-Image or Lumina;"),
        (one(1024, 1024, "lora_te_layers_0_self_attn_o_proj"), "the text encoder"),
    ],
)
def test_a_lora_for_another_model_is_refused_by_what_it_is(tensors: Tensors, base: str, tmp_path: Path) -> None:
    file = save(tmp_path / "lora.safetensors", tensors)
    message = refusal(lambda: read_lora(file, KLEIN_4B))
    assert f"is a LoRA for {base}" in message
    assert "this model is klein 4b (hidden size 3072)" in message


def test_one_for_this_model_is_not(tmp_path: Path) -> None:
    """In BFL's names, whose q, k and v have FLUX.1's shapes; a Qwen3-4B's attention is wider than its hidden size."""
    tensors = one(9216, 3072, "lora_unet_double_blocks_4_img_attn_qkv")
    tensors |= one(27648, 3072, "lora_unet_single_blocks_19_linear1")
    tensors |= one(4096, 2560, "lora_te_model_layers_3_self_attn_q_proj")
    lora = read_lora(save(tmp_path / "lora.safetensors", tensors), KLEIN_4B)
    assert lora.modules == 3
    assert set(lora.changes["transformer"]) == {
        *(f"double_blocks.4.img.to_{x}" for x in "qkv"),
        "single_blocks.19.linear_in",
    }


# ---- scales and names ----


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 101, -1e9, "1", True, None])
def test_a_scale_must_be_a_number(scale: Any, tmp_path: Path) -> None:
    file, pipe = save(tmp_path / "lora.safetensors", good()), pipeline()
    with pytest.raises(RequestError, match=r"^scale is .*; it must be a number from -100 to 100$"):
        pipe.load_lora(file, scale)
    pipe.load_lora(file, name="a")
    with pytest.raises(RequestError, match="scale is"):
        pipe.set_lora_scale("a", scale)
    assert [lora.scale for lora in pipe.loras] == [1.0]


def test_names_are_kept_apart(tmp_path: Path) -> None:
    file, pipe = save(tmp_path / "style.safetensors", good()), pipeline()
    assert [pipe.load_lora(file).name for _ in range(3)] == ["style", "style-2", "style-3"]
    with pytest.raises(RequestError, match="a LoRA of that name is loaded"):
        pipe.load_lora(file, name="style")
    pipe.unload_lora("style-2")
    assert [lora.name for lora in pipe.loras] == ["style", "style-3"]
    with pytest.raises(RequestError, match=r"no LoRA of that name is loaded \(loaded: style, style-3\)"):
        pipe.unload_lora("style-2")
    pipe.unload_lora()
    with pytest.raises(RequestError, match="no LoRA is loaded"):
        pipe.unload_lora()
    with pytest.raises(RequestError, match="none is loaded"):
        pipe.set_lora_scale("style", 1.0)


def test_scales_add_up_and_undo(tmp_path: Path) -> None:
    """Scale 0 is nothing, to the bit. A LoRA of scale -1 beside itself undoes it, to float32's rounding; twenty of a
    twentieth are one."""
    file = save(tmp_path / "lora.safetensors", LAYOUTS["peft"](make_twin())[0])
    pipe = pipeline()
    plain = velocity(pipe)
    pipe.load_lora(file, 0.0, name="a")
    assert mx.array_equal(velocity(pipe), plain)
    pipe.set_lora_scale("a", 1.0)
    whole = velocity(pipe)
    assert difference(whole, plain) > 0.1
    pipe.load_lora(file, -1.0, name="b")
    assert difference(velocity(pipe), plain) < 1e-5
    pipe.unload_lora()
    assert mx.array_equal(velocity(pipe), plain)
    for _ in range(20):
        pipe.load_lora(file, 0.05)
    assert difference(velocity(pipe), whole) < 1e-5


def test_a_lora_outlives_its_file_and_the_part(tmp_path: Path) -> None:
    """A part that leaves memory comes back with its LoRAs, though the file is gone by then."""
    file = save(tmp_path / "lora.safetensors", good())
    pipe, kept = pipeline(), pipeline()
    for one_of in (pipe, kept):
        one_of.load_lora(file)
    right = velocity(kept)
    pipe.parts.keep = "nothing"
    file.unlink()
    assert mx.array_equal(velocity(pipe), right)
    assert not pipe.parts.loaded
    assert mx.array_equal(velocity(pipe), right)


def test_nothing_changes_while_a_run_works(tmp_path: Path) -> None:
    file, pipe = save(tmp_path / "lora.safetensors", good()), pipeline()
    run = pipe.stream("x", seed=0, width=64, height=64, max_sequence_length=16)
    next(run)
    with pytest.raises(RequestError, match="a run is using the transformer; LoRAs can change when it has finished"):
        pipe.load_lora(file)
    assert pipe.loras == []
    run.close()
    pipe.load_lora(file)


def test_nothing_changes_between_a_run_s_pictures(tmp_path: Path) -> None:
    """There no part is held; the second picture would have been half made with other weights."""
    file, pipe = save(tmp_path / "lora.safetensors", good()), pipeline()
    pipe.load_lora(file, name="style")
    asked: dict[str, Any] = {"seed": [0, 0], "width": 64, "height": 64, "max_sequence_length": 16}
    run = pipe.stream("x", num_inference_steps=1, **asked)
    first = next(event for event in run if isinstance(event, Picture))
    for change in (lambda: pipe.set_lora_scale("style", 0.0), lambda: pipe.unload_lora(), lambda: pipe.load_lora(file)):
        with pytest.raises(RequestError, match="a run is working; LoRAs can change when it has finished or is closed"):
            change()
    second = next(event for event in run if isinstance(event, Picture))
    assert np.array_equal(np.asarray(first.image), np.asarray(second.image))
    assert not list(run)
    pipe.set_lora_scale("style", 0.0)


def test_a_recipe_tells_the_loras_that_the_picture_was_made_with(tmp_path: Path) -> None:
    """Not those that were there when it was asked for."""
    file, pipe = save(tmp_path / "lora.safetensors", good()), pipeline()
    asked: dict[str, Any] = {"seed": 0, "width": 64, "height": 64, "max_sequence_length": 16}
    run = pipe.stream("x", num_inference_steps=1, **asked)
    loaded = pipe.load_lora(file, 0.5)
    (picture,) = (event for event in run if isinstance(event, Picture))
    assert picture.recipe["loras"] == [
        {"name": "lora", "file": "lora.safetensors", "sha256": loaded.sha256, "scale": 0.5}
    ]


def test_bfloat16_weights_are_rounded_once(tmp_path: Path) -> None:
    """The merged weight is the float32 sum rounded to bfloat16, to the bit."""
    twin = make_twin()
    pipe = pipeline(dtype="bfloat16")
    velocity(pipe)
    transformer: Any = pipe.parts.loaded["transformer"].module
    before = np.array(transformer.mod_img.weight.astype(mx.float32))
    pipe.load_lora(save(tmp_path / "lora.safetensors", written(twin, "transformer.", *AB, alpha=False)), 0.5)
    delta = np.array(mx.array(twin["double_stream_modulation_img.linear"].up * np.float32(1.5) * np.float32(0.5)))
    delta = mx.array(delta) @ mx.array(twin["double_stream_modulation_img.linear"].down)
    wanted = (mx.array(before) + delta).astype(mx.bfloat16)
    found = transformer.mod_img.weight
    assert found.dtype == mx.bfloat16
    assert float((found != wanted).mean()) < 0.01  # where the two float32 sums differ, a few are at the edge


@pytest.mark.parametrize("quantize", [None, 8])
def test_what_a_dtype_cannot_hold_is_told_and_taken_off(tmp_path: Path, quantize: int | None) -> None:
    """float16 ends at 65504: the line names the layer and the remedies, and the model is as it was."""
    tensors = {key: np.full(array.shape, 2000.0, np.float32) for key, array in one(192, 192, TO_Q).items()}
    file = save(tmp_path / "lora.safetensors", tensors)
    pipe = KleinPipeline.from_pretrained("tiny", dtype="float16", keep="all", quantize=quantize)
    arguments: dict[str, Any] = {"seed": 1, "width": 64, "height": 64, "num_inference_steps": 1}
    before = pipe("a star", **arguments).images[0].tobytes()
    words = "double_blocks.0.img.to_q: with these LoRAs it holds numbers beyond what float16 can; use a smaller scale"
    with pytest.raises(RequestError, match=words):
        pipe.load_lora(file, scale=100.0)
    assert not pipe.loras
    assert pipe("a star", **arguments).images[0].tobytes() == before
