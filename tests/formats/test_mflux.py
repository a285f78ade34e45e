"""Folders that MLX programs quantised: mflux's whole models, mlx-lm's Qwen3; kept at their bits."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from folders import assert_equal, edit_json, loaded, parameters, quantizable_model, read_weights, refusal, weight_file
from foreign import Weights, save, to_mflux

from klein_convert.checkpoint import convert_checkpoint
from klein_convert.export import export_diffusers
from klein_mlx.config import PARTS
from klein_mlx.formats.describe import describe
from klein_mlx.formats.open import open_any, open_model
from klein_mlx.formats.part import KLEIN
from klein_mlx.weights.checkpoint import load_part
from klein_mlx.weights.quantize import Quantization


def quantise(weights: Weights, bits: int, group_size: int = 64) -> Weights:
    """Every matrix that MLX can quantise, as nn.quantize does."""
    out: Weights = {}
    for name, array in weights.items():
        if array.ndim != 2 or array.shape[1] % group_size:
            out[name] = array
            continue
        path = name.removesuffix(".weight")
        arrays = mx.quantize(array, group_size, bits)
        out |= {f"{path}.{kind}": a for kind, a in zip(("weight", "scales", "biases"), arrays, strict=True)}
    return out


def save_mflux(folder: Path, model: Path, bits: int | None) -> Path:
    """As mflux-save lays a model out: numbered shards with an index, the bits in the metadata, no configs."""
    shutil.copytree(model / "tokenizer", folder / "tokenizer")
    for part in PARTS:
        weights = to_mflux(part, read_weights(weight_file(model, part)))
        if bits:
            weights = quantise(weights, bits)
        (folder / part).mkdir()
        names = sorted(weights)
        told = {"quantization_level": str(bits), "mflux_version": "0.17.0"}
        weight_map = {}
        for number in range(2):
            mine = names[number::2]
            path = folder / part / f"{number}.safetensors"
            mx.save_safetensors(str(path), {name: weights[name] for name in mine}, told)
            weight_map |= dict.fromkeys(mine, path.name)
        index = {"metadata": told, "weight_map": weight_map}
        (folder / part / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """mflux's folders state no groups of the VAE's norms: they are klein's. The golden model has fewer channels."""
    monkeypatch.setitem(KLEIN, "vae", replace(KLEIN["vae"], norm_num_groups=4))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return quantizable_model(tmp_path / "model")


def test_an_unquantised_mflux_folder_is_the_model_it_was_saved_from(tmp_path: Path, model: Path) -> None:
    folder = save_mflux(tmp_path / "saved", model, None)
    source = open_model(folder)
    assert (source.info["format"], source.info["made_by"]) == ("mflux", "mflux 0.17.0")
    for part in PARTS:
        assert_equal(source.weights(part), open_model(model).weights(part))  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_quantised_mflux_folder_keeps_its_bits(tmp_path: Path, model: Path, bits: int) -> None:
    folder = save_mflux(tmp_path / "saved", model, bits)
    source = open_model(folder)
    assert describe(source)["parts"]["transformer"]["bits"] == bits
    ours = source.weights("transformer")
    theirs = {n: a for s in (0, 1) for n, a in read_weights(folder / "transformer" / f"{s}.safetensors").items()}
    for kind in ("weight", "scales", "biases"):
        assert mx.array_equal(ours[f"mod_img.{kind}"], theirs[f"double_stream_modulation_img.linear.{kind}"])
        halves = mx.split(theirs[f"norm_out.linear.{kind}"], 2)  # (scale, shift) there
        assert mx.array_equal(ours[f"final_mod.{kind}"], mx.concatenate(halves[::-1]))
    module = load_part("text_encoder", source, mx.bfloat16)
    assert isinstance(module.embed_tokens, nn.QuantizedEmbedding)
    assert module.embed_tokens.bits == bits
    whole = parameters(load_part("text_encoder", open_model(model), mx.bfloat16))
    packed = [module.embed_tokens[kind] for kind in ("weight", "scales", "biases")]
    restored = mx.dequantize(*packed, group_size=64, bits=bits)
    assert mx.abs(restored - whole["embed_tokens.weight"]).max().item() < 0.2


def test_it_converts_to_the_same_and_says_so_layer_by_layer(tmp_path: Path, model: Path) -> None:
    folder = save_mflux(tmp_path / "saved", model, 4)
    ours = convert_checkpoint(folder, tmp_path / "ours")
    assert_equal(loaded(ours, mx.bfloat16), loaded(folder, mx.bfloat16))
    stored = json.loads((ours / "klein.json").read_text())["quantization"]["text_encoder"]
    assert stored["layers"]["embed_tokens"] == {"bits": 4, "group_size": 64, "mode": "affine"}
    assert open_model(ours).quantization == open_model(folder).quantization


def test_it_computes_what_the_dequantised_weights_do(tmp_path: Path, model: Path) -> None:
    from klein_mlx import KleinPipeline

    folder = save_mflux(tmp_path / "saved", model, 8)
    values = {}
    for name, path in (("whole", model), ("eight", folder)):
        pipe = KleinPipeline(open_model(path), dtype=mx.float32)
        taps = {"num_inference_steps": 1, "seed": 1, "width": 64, "height": 64, "output_type": "latent"}
        values[name] = pipe("a red fox", **taps).images
    error = mx.linalg.norm(values["whole"] - values["eight"]) / mx.linalg.norm(values["whole"])
    assert 0 < error.item() < 0.05


@pytest.mark.parametrize(
    ("bits", "group_size", "mode"),
    [(4, 64, "affine"), (6, 32, "affine"), (4, 32, "affine"), (4, 32, "mxfp4"), (8, 32, "mxfp8")],
)
def test_mlx_lm_s_qwen3_is_the_encoder(tmp_path: Path, model: Path, bits: int, group_size: int, mode: str) -> None:
    """Written by mlx-lm's own quantiser and saver."""
    mlx_lm = pytest.importorskip("mlx_lm.utils")
    from mlx_lm.models.qwen3 import Model, ModelArgs

    values = json.loads((model / "text_encoder" / "config.json").read_text())
    values = {**values, "rope_theta": 1e6, "tie_word_embeddings": True}
    qwen = Model(ModelArgs.from_dict(values))
    qwen.load_weights(list(qwen.sanitize(read_weights(weight_file(model, "text_encoder"))).items()))
    qwen, values = mlx_lm.quantize_model(qwen, values, group_size, bits, mode=mode)
    folder = tmp_path / "qwen"
    folder.mkdir()
    mlx_lm.save_model(folder, qwen)
    mlx_lm.save_config(values, folder / "config.json")

    source = open_model(model, parts={"text_encoder": folder})
    quantization = source.quantization["text_encoder"]
    assert quantization.layers
    assert set(quantization.layers.values()) == {Quantization(bits, group_size, mode)}
    theirs = read_weights(folder / "model.safetensors")
    ours = source.weights("text_encoder")
    assert all(mx.array_equal(array, theirs[f"model.{name}"]) for name, array in ours.items())
    told, whole = describe(open_any(folder)), describe(open_any(model / "text_encoder"))
    tied = values["vocab_size"] * values["hidden_size"]  # the language head, which mlx-lm does not save
    assert (told["part"], told["parameters"]) == ("text_encoder", whole["parameters"] - tied * untied(model))
    assert told["quantization"] == Quantization(bits, group_size, mode).told()
    path = convert_checkpoint(source, tmp_path / "ours")
    assert_equal(loaded(path, mx.bfloat16), {**loaded_from(source)})


def untied(model: Path) -> bool:
    return "lm_head.weight" in read_weights(weight_file(model, "text_encoder"))


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 32), (2, 64), (6, 32), (3, 64)])
@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_a_part_s_parameters_whatever_its_groups(
    tmp_path: Path, model: Path, part: str, bits: int, group_size: int
) -> None:
    """Bits times group size is all that shapes tell; 4 bits by 32 look as 2 by 64 do. One layer has other bits, as in
    mflux's mixed packs, where the file says only what most have.
    """
    odd = {"transformer": "single_transformer_blocks.0.attn.to_out", "text_encoder": "layers.0.mlp.down_proj"}[part]
    ours = {"transformer": "single_blocks.0.linear_out", "text_encoder": "layers.0.mlp.down_proj"}[part]
    weights = to_mflux(part, read_weights(weight_file(model, part)))
    weights = {name: array.astype(mx.bfloat16) for name, array in weights.items()}
    packed = quantise(weights, bits, group_size) | quantise({f"{odd}.weight": weights[f"{odd}.weight"]}, 5, group_size)
    path = save(tmp_path / "x.safetensors", packed, {"quantization_level": str(bits)})
    told, whole = describe(open_any(path)), describe(open_any(save(tmp_path / "y.safetensors", weights)))
    assert (told["parameters"], told["config"]) == (whole["parameters"], whole["config"])
    assert told["quantization"].startswith(f"{bits}-bit in groups of {group_size}")
    stored = open_model(model, parts={part: path}).quantization[part]
    assert stored.of(part, ours) == Quantization(5, group_size)


def loaded_from(source: object) -> Weights:
    modules = {part: load_part(part, source, mx.bfloat16) for part in PARTS}  # type: ignore[arg-type]
    return {f"{part}.{name}": a for part, module in modules.items() for name, a in parameters(module).items()}


def test_a_width_that_no_setting_explains_is_refused(tmp_path: Path, model: Path) -> None:
    folder = save_mflux(tmp_path / "saved", model, 4)
    path = folder / "transformer" / "0.safetensors"
    weights = read_weights(path)
    name = next(n for n in sorted(weights) if n.startswith("single") and n.endswith(".scales"))
    weights[name] = mx.repeat(weights[name], 8, axis=1)
    path.unlink()
    mx.save_safetensors(str(path), weights, {"quantization_level": "4"})
    assert "is quantized in a way that klein_mlx does not read" in refusal(lambda: open_model(folder).quantization)


@pytest.mark.parametrize("through_ours", [False, True])
def test_a_quantized_folder_is_exported_whole_its_biases_too(tmp_path: Path, through_ours: bool) -> None:
    """mflux quantizes the VAE's attention, whose layers have biases of their own."""
    folder = save_mflux(tmp_path / "theirs", quantizable_model(tmp_path / "model"), 8)
    source = open_model(folder)
    if through_ours:
        source = open_model(convert_checkpoint(source, tmp_path / "ours"))
    out = export_diffusers(source, tmp_path / "out")
    assert_equal(loaded(out, mx.float32), {n: a for n, a in dequantized(folder).items()})


def dequantized(folder: Path) -> Weights:
    source, whole = open_model(folder), {}
    for part in PARTS:
        for path, layer in load_part(part, source, mx.float32).named_modules():
            own = {name: array for name, array in layer.items() if isinstance(array, mx.array)}
            if "scales" in own:
                scales, biases = own.pop("scales"), own.pop("biases")
                weight = mx.dequantize(own["weight"], scales, biases, layer.group_size, layer.bits)
                own["weight"] = weight.astype(mx.bfloat16).astype(mx.float32)
            whole |= {f"{part}.{path}.{name}".replace("..", "."): array for name, array in own.items()}
    return whole


@pytest.mark.parametrize(("bits", "indexed"), [(1, False), (2, False), (2, True)])
def test_prismml_s_folder_is_a_model(tmp_path: Path, model: Path, bits: int, indexed: bool) -> None:
    """Bonsai: the transformer's blocks in 1 or 2 bits under diffusers' names, the rest of it whole; mlx-lm's Qwen3 in
    4 bits; diffusers' VAE; a constant shift in the scheduler.
    """
    plain = tmp_path / "plain"
    shutil.copytree(model, plain)
    for part, width, quantized in (("transformer", bits, "_blocks"), ("text_encoder", 4, "")):
        path = weight_file(model, part)
        weights = read_weights(path)
        packed = quantise({name: array for name, array in weights.items() if quantized in name}, width)
        save(path, {name: array for name, array in weights.items() if name not in packed} | packed)
        for layer in (name.removesuffix("scales") for name in packed if name.endswith("scales")):
            scales, biases = (packed[layer + kind].astype(mx.float32) for kind in ("scales", "biases"))
            whole = mx.dequantize(packed[f"{layer}weight"], scales, biases, 64, width)
            weights[f"{layer}weight"] = whole.astype(mx.bfloat16)
        save(weight_file(plain, part), weights)
    if not indexed:
        (model / "model_index.json").unlink()
    (model / "transformer" / "quantization_config.json").write_text(json.dumps({"bits": bits, "group_size": 64}))
    edit_json(model / "transformer" / "config.json", lambda stated: stated.pop("timestep_guidance_channels"))
    edit_json(model / "scheduler" / "scheduler_config.json", lambda stated: stated.update(use_dynamic_shifting=False))
    (model / "transformer").rename(model / "transformer-packed-mflux")
    (model / "text_encoder").rename(model / "text_encoder-mlx-4bit")
    if indexed:  # the tokenizer lies beside the encoder as well
        (model / "tokenizer").rename(tmp_path / "tokenizer")
        assert "tokenizer.json: is missing" in refusal(lambda: open_model(model))
        shutil.copy(tmp_path / "tokenizer" / "tokenizer.json", model / "text_encoder-mlx-4bit")
    source = open_model(model)
    assert source.config.time_shift == 3
    kinds = {part: quantization.told() for part, quantization in source.quantization.items()}
    assert kinds == {
        "transformer": f"{bits}-bit in groups of 64",
        "text_encoder": "4-bit in groups of 64",
    }
    assert_equal(dequantized(model), loaded(plain, mx.float32))
    told, right = describe(source)["parts"], describe(open_model(plain))["parts"]
    assert [told[part]["parameters"] for part in PARTS] == [right[part]["parameters"] for part in PARTS]
    assert describe(open_any(model / "transformer-packed-mflux"))["quantized_layers"] == 16
    if indexed:
        convert_checkpoint(source, tmp_path / "ours", verify=True)
        assert open_model(tmp_path / "ours").quantization == source.quantization
