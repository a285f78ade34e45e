"""Opening and loading: strict, lazy, and one clear line for every damaged folder."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from folders import GOLDEN, copy_model, edit_json, edit_weights, parameters, refusal, weight_file
from mlx.utils import tree_flatten

from klein_convert.checkpoint import convert_checkpoint
from klein_mlx.bench.predict import klein
from klein_mlx.config import PARTS
from klein_mlx.formats.open import open_model
from klein_mlx.weights import checkpoint
from klein_mlx.weights.checkpoint import build, expected, load_part, read_weights
from klein_mlx.weights.quantize import Quantization


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_model(tmp_path / "model")


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return convert_checkpoint(GOLDEN, tmp_path / "ours")


# ---- loading ----


@pytest.mark.parametrize("part", PARTS)
def test_a_part_loads_whole_and_in_the_dtype_asked_for(part: str) -> None:
    module = load_part(part, open_model(GOLDEN), mx.float32)
    weights = parameters(module)
    assert {name: array.shape for name, array in weights.items()} == expected(part, open_model(GOLDEN).config)
    assert {array.dtype for array in weights.values()} == {mx.float32}
    assert not module.training


def test_latent_statistics_stay_float32() -> None:
    module = load_part("vae", open_model(GOLDEN), mx.bfloat16)
    dtypes = {name: array.dtype for name, array in parameters(module).items()}
    assert {name for name, dtype in dtypes.items() if dtype == mx.float32} == {"latent_mean", "latent_var"}
    assert set(dtypes.values()) == {mx.float32, mx.bfloat16}


def test_nothing_is_read_before_it_is_used() -> None:
    source = open_model(GOLDEN)
    mx.clear_cache()
    before = mx.get_active_memory()
    modules = [load_part(part, source, mx.float32) for part in PARTS]
    assert mx.get_active_memory() - before < 10_000  # the weights are 1.7 MB
    mx.eval([module.parameters() for module in modules])
    assert mx.get_active_memory() - before > 1_000_000


def test_only_the_layers_below_the_last_tap_are_loaded() -> None:
    source = open_model(GOLDEN)
    assert source.config.text_encoder.num_hidden_layers == 4
    assert source.config.taps == (1, 2, 3)
    names = source.weights("text_encoder")
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {"0", "1", "2"}


def test_model_index_may_state_what_diffusers_keeps_as_defaults(folder: Path) -> None:
    edit_json(folder / "text_encoder" / "config.json", lambda values: values.update(num_hidden_layers=8))
    config = open_model(folder).config
    assert (config.taps, config.max_sequence_length, config.default_size) == ((2, 4, 6), 512, 1024)
    changes = {"text_encoder_out_layers": [1, 2, 3], "max_sequence_length": 40, "default_size": 128}
    edit_json(folder / "model_index.json", lambda values: values.update(changes) or values.pop("is_distilled"))
    config = open_model(folder).config
    assert (config.taps, config.max_sequence_length, config.default_size) == ((1, 2, 3), 40, 128)
    assert config.is_distilled is False


def test_quantising_a_quantised_model_otherwise_is_refused(tmp_path: Path) -> None:
    from folders import quantizable_model

    model = quantizable_model(tmp_path / "model")
    source = open_model(convert_checkpoint(model, tmp_path / "ours", quantize=8))
    assert load_part("transformer", source, mx.float32, Quantization(8))
    told = refusal(lambda: load_part("transformer", source, mx.float32, Quantization(4)))
    assert "8-bit already" in told


# ---- names, shapes, dtypes ----

EDITS = {
    "missing": (lambda w: w.pop("proj_out.weight"), "1 missing (proj_out.weight)"),
    "unknown": (lambda w: w.update(extra=mx.zeros(3)), "1 unknown (extra)"),
    "both": (
        lambda w: [w.pop("proj_out.weight"), w.pop("x_embedder.weight"), w.update(extra=mx.zeros(3))],
        "2 missing (proj_out.weight ...), 1 unknown (extra)",
    ),
    "transposed": (
        lambda w: w.update({"x_embedder.weight": w["x_embedder.weight"].T}),
        "x_embedder.weight has shape (32, 64); it must be (64, 32)",
    ),
    "integers": (
        lambda w: w.update({"proj_out.weight": w["proj_out.weight"].astype(mx.int32)}),
        "proj_out.weight has dtype I32; it must be BF16 or F16 or F32",
    ),
    "a further layer": (
        lambda w: w.update({"transformer_blocks.1.attn.to_q.weight": mx.zeros((64, 64))}),
        "1 unknown (transformer_blocks.1.attn.to_q.weight)",
    ),
    "a name that is no line": (lambda w: w.update({"a\nb": mx.zeros(3)}), r"1 unknown ('a\nb')"),
}


@pytest.mark.parametrize("name", EDITS)
def test_weights_that_do_not_fit_are_named_with_their_file(folder: Path, name: str) -> None:
    edit, message = EDITS[name]
    edit_weights(folder, "transformer", edit)
    told = refusal(lambda: load_part("transformer", open_model(folder), mx.float32))
    assert told == f"{weight_file(folder, 'transformer')}: {message}"


def test_our_own_format_is_as_strict(ours: Path) -> None:
    path = ours / "vae.safetensors"
    weights = mx.load(str(path))
    assert isinstance(weights, dict)
    mx.eval(weights)
    weights["decoder.conv_in.weight"] = weights["decoder.conv_in.weight"].transpose(0, 3, 1, 2)
    mx.save_safetensors(str(path), weights)
    told = refusal(lambda: load_part("vae", open_model(ours), mx.float32))
    assert re.fullmatch(rf"{path}: decoder.conv_in.weight has shape \(32, 8, 3, 3\); it must be \(32, 3, 3, 8\)", told)


def test_an_encoder_layer_beyond_the_config_is_unknown(folder: Path) -> None:
    edit_weights(folder, "text_encoder", lambda w: w.update({"model.layers.4.mlp.up_proj.weight": mx.zeros(3)}))
    assert "1 unknown (model.layers.4." in refusal(lambda: open_model(folder).weights("text_encoder"))


# ---- configs ----


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "transformer/config.json",
            {"_class_name": "FluxTransformer2DModel"},
            "_class_name is 'FluxTransformer2DModel'",
        ),
        ("text_encoder/config.json", {"model_type": "mistral3"}, "model_type is 'mistral3'"),
        ("text_encoder/config.json", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; FLUX.2 [klein] has 'silu'"),
        ("text_encoder/config.json", {"rope_scaling": {"factor": 4}}, "rope_scaling is {'factor': 4}"),
        ("text_encoder/config.json", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ("vae/config.json", {"patch_size": [4, 4]}, "patch_size is [4, 4]"),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, "FLUX.2 [klein] has 'AutoencoderKLFlux2'"),
        ("transformer/config.json", {"guidance_embeds": True}, "FLUX.2 [dev]"),
        ("transformer/config.json", {"num_layers": 1 << 29}, "klein_mlx builds 1024 at most"),
        ("transformer/config.json", {"num_attention_heads": 4}, "has shape"),
        ("text_encoder/config.json", {"vocab_size": 500}, "embed_tokens.weight has shape (512, 64)"),
        ("model_index.json", {"is_distilled": "yes"}, "is_distilled is 'yes'"),
        ("model_index.json", {"text_encoder_out_layers": "9"}, "the tapped layers are '9'"),
        ("model_index.json", {"text_encoder_out_layers": [2, 3, 5]}, "layer 5 is tapped"),
        ("model_index.json", {"max_sequence_length": 0}, "max_sequence_length is 0"),
        ("model_index.json", {"default_size": 12.5}, "default_size is 12.5"),
    ],
)
def test_a_wrong_config_is_told(folder: Path, name: str, values: dict[str, Any], message: str) -> None:
    edit_json(folder / name, lambda config: config.update(values))

    def load() -> None:
        source = open_model(folder)
        for part in PARTS:
            load_part(part, source, mx.float32)

    assert message in refusal(load)


def test_nothing_in_a_config_is_executed(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for part in PARTS:
        (folder / part / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
        asked = {"model_file": "evil.py", "auto_map": {"AutoModel": "evil.Model"}, "trust_remote_code": True}
        edit_json(folder / part / "config.json", lambda config, asked=asked: config.update(asked))
        load_part(part, open_model(folder), mx.float32)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v.pop("format_version"), "format_version is None"),
        (lambda v: v.update(format_version="1"), "format_version is '1'"),
        (lambda v: v.update(format_version=2), "format 2 is newer"),
        (lambda v: v.pop("vae"), "vae is missing"),
        (lambda v: v.update(vae=[]), "vae is not an object"),
        (lambda v: v.pop("taps"), "the tapped layers are None"),
        (lambda v: v.update(source=None), "source is None; it must be an object"),
        (lambda v: v.update(licence="MIT\nfree"), "it must be one line of text"),
        (lambda v: v.pop("quantization"), "quantization is missing"),
        (lambda v: v.update(quantization={"vae": {"bits": 4, "group_size": 64, "mode": "affine"}}), "of 'vae'"),
        (
            lambda v: v.update(quantization={"transformer": {"bits": 7, "group_size": 64, "mode": "affine"}}),
            "bits is 7",
        ),
        (lambda v: v.update(quantization={"transformer": {"bits": 4, "group_size": 1, "mode": "affine"}}), "size is 1"),
        (lambda v: v.update(quantization={"transformer": {"bits": 4, "group_size": 64, "mode": "x"}}), "mode is 'x'"),
        (lambda v: v.update(quantization={"transformer": {"bits": True, "group_size": 64}}), "must hold bits"),
        (lambda v: v.update(quantization={"transformer": {"bits": 4, "group_size": 64, "mode": "affine"}}), "missing"),
    ],
)
def test_a_wrong_klein_json_is_told(ours: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit_json(ours / "klein.json", edit)
    told = refusal(lambda: open_model(ours).weights("transformer"))
    assert message in told
    assert told.startswith(str(ours))


@pytest.mark.parametrize("name", ["tokenizer.json", "transformer.safetensors"])
def test_a_missing_file_of_ours_is_told(ours: Path, name: str) -> None:
    (ours / name).unlink()
    told = refusal(lambda: open_model(ours).weights("transformer"))
    assert told.startswith(f"{ours / name}: is missing")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_read_in_few_evaluations(part: str) -> None:
    """Of klein 4B's shapes, whose weights are not made: a sixteenth of all bytes at a time, or 256 MB."""
    floats = tree_flatten(build(part, klein("4b")).parameters())
    arrays = [(name, array.astype(mx.bfloat16)) for name, array in floats]  # type: ignore[union-attr]
    groups = list(checkpoint._groups(arrays))
    assert [name for group in groups for name, _ in group] == [name for name, _ in arrays]
    assert len(groups) <= 60
    largest = max(array.nbytes for _, array in arrays)
    assert max(sum(array.nbytes for _, array in group) for group in groups) <= max(256 << 20, largest)


def test_the_first_array_that_is_not_finite_is_named() -> None:
    module = build("vae", open_model("tiny").config)
    assert read_weights(module) is None
    module.decoder.conv_out.bias = mx.array([0.0, float("nan"), 0.0])  # type: ignore[union-attr]
    assert read_weights(module) == "decoder.conv_out.bias"
