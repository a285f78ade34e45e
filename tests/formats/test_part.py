"""Parts from files of their own: Black Forest Labs' single file, ComfyUI's three, in any mix; and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from folders import GOLDEN, assert_equal, copy_model, loaded, quantizable_model, refusal, weight_file
from foreign import all_in_one, comfy_files, golden, opened, save, to_bfl, to_ldm

from klein_convert.__main__ import main
from klein_convert.checkpoint import convert_checkpoint
from klein_mlx.config import PARTS
from klein_mlx.errors import RequestError
from klein_mlx.formats.describe import describe
from klein_mlx.formats.open import open_any, open_model
from klein_mlx.formats.part import KLEIN, open_part


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file states no groups of the VAE's norms: they are klein's. The golden model has fewer channels."""
    monkeypatch.setitem(KLEIN, "vae", replace(KLEIN["vae"], norm_num_groups=4))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_single_file_is_the_folder_s_transformer_bit_for_bit(tmp_path: Path, prefix: str) -> None:
    path = save(tmp_path / "vae.safetensors", to_bfl(golden("transformer"), prefix))
    assert_equal(opened("transformer", path), open_model(GOLDEN).weights("transformer"))  # type: ignore[arg-type]


def test_newer_files_spell_the_norms_as_weights(tmp_path: Path) -> None:
    weights = {n.replace("_norm.scale", "_norm.weight"): a for n, a in to_bfl(golden("transformer")).items()}
    path = save(tmp_path / "x.safetensors", weights)
    assert_equal(opened("transformer", path), open_model(GOLDEN).weights("transformer"))  # type: ignore[arg-type]


@pytest.mark.parametrize("linear", [False, True])
def test_an_ldm_vae_is_the_folder_s_bit_for_bit(tmp_path: Path, linear: bool) -> None:
    path = save(tmp_path / "x.safetensors", to_ldm(golden("vae"), linear_attention=linear))
    assert_equal(opened("vae", path), open_model(GOLDEN).weights("vae"))  # type: ignore[arg-type]


@pytest.mark.parametrize("part", PARTS)
def test_diffusers_own_names_in_a_file_of_their_own(tmp_path: Path, part: str) -> None:
    path = save(tmp_path / "x.safetensors", golden(part))
    assert_equal(opened(part, path), open_model(GOLDEN).weights(part))  # type: ignore[arg-type]
    assert_equal(opened(part, GOLDEN / part), open_model(GOLDEN).weights(part))  # type: ignore[arg-type]
    assert_equal(opened(part, GOLDEN), open_model(GOLDEN).weights(part))  # type: ignore[arg-type]


@pytest.mark.parametrize("part", PARTS)
def test_the_config_is_told_from_the_shapes(tmp_path: Path, part: str) -> None:
    config = open_part(comfy_files(tmp_path)[part], like=getattr(open_model(GOLDEN).config, part)).config
    assert config == getattr(open_model(GOLDEN).config, part)


def test_three_files_and_a_base_convert_to_what_the_folder_does(tmp_path: Path) -> None:
    files = comfy_files(tmp_path / "comfy")
    base = copy_model(tmp_path / "base")
    for part in PARTS:
        weight_file(base, part).unlink()  # nothing is taken from there
    mixed = convert_checkpoint(open_model(base, parts=files), tmp_path / "mixed")
    assert_equal(loaded(mixed, mx.bfloat16), loaded(GOLDEN, mx.bfloat16))
    source = json.loads((mixed / "klein.json").read_text())["source"]
    assert source["parts"]["transformer"] == {
        "name": files["transformer"].name,
        "format": "BFL names, safetensors",
    }
    assert files["vae"].name in source["sha256"]
    assert str(tmp_path) not in json.dumps(source)


def test_one_part_changes_and_the_others_stay(tmp_path: Path) -> None:
    weights = {name: array * 2 for name, array in to_bfl(golden("transformer")).items()}
    mixed = open_model(GOLDEN, parts={"transformer": save(tmp_path / "x.safetensors", weights), "vae": None})
    whole = open_model(GOLDEN)
    for part in ("text_encoder", "vae"):
        assert_equal(mixed.weights(part), whole.weights(part))  # type: ignore[arg-type]
    ours = mixed.weights("transformer")["img_in.weight"]
    assert mx.array_equal(ours, 2 * whole.weights("transformer")["img_in.weight"])  # type: ignore[arg-type]


def test_one_file_may_hold_all_three(tmp_path: Path) -> None:
    path = all_in_one(tmp_path / "all.safetensors")
    for part in PARTS:
        assert_equal(opened(part, path), open_model(GOLDEN).weights(part))  # type: ignore[arg-type]
    assert "holds transformer, text_encoder, vae; say which" in refusal(lambda: open_part(path))


@pytest.mark.parametrize("lone_in_folder", [False, True])
def test_one_file_is_a_model(tmp_path: Path, lone_in_folder: bool, small_groups: None) -> None:
    file = all_in_one(tmp_path / "model" / "all.safetensors")
    shutil.copy(GOLDEN / "tokenizer" / "tokenizer.json", file.parent)
    source, whole = open_model(file.parent if lone_in_folder else file), open_model(GOLDEN)
    for part in PARTS:
        assert_equal(source.weights(part), whole.weights(part))  # type: ignore[arg-type]
    assert source.files() == [file.parent / "tokenizer.json", file]
    assert (source.info["format"], source.config.taps) == ("single file", whole.config.taps)
    told, right = describe(open_any(file)), describe(whole)
    assert {name: part["parameters"] for name, part in told["parts"].items()} == {
        name: part["parameters"] for name, part in right["parts"].items()
    }
    other = save(tmp_path / "x.safetensors", {name: a * 2 for name, a in to_bfl(golden("transformer")).items()})
    mixed = open_model(file, parts={"transformer": other})
    assert mx.array_equal(
        mixed.weights("transformer")["img_in.weight"], 2 * whole.weights("transformer")["img_in.weight"]
    )
    assert mixed.info["source"]["parts"] == {
        "transformer": {"name": "x.safetensors", "format": "BFL names, safetensors"}
    }


def test_one_file_converts(tmp_path: Path, small_groups: None, capsys: pytest.CaptureFixture[str]) -> None:
    file = all_in_one(tmp_path / "model" / "all.safetensors")
    shutil.copy(GOLDEN / "tokenizer" / "tokenizer.json", file.parent)
    assert main([str(file), str(tmp_path / "ours"), "--verify"]) == 0
    for part in PARTS:
        assert_equal(open_model(tmp_path / "ours").weights(part), open_model(GOLDEN).weights(part))  # type: ignore[arg-type]
    told = open_model(tmp_path / "ours").info["source"]
    assert (told["name"], sorted(told["sha256"])) == ("all.safetensors", ["all.safetensors", "tokenizer.json"])


def test_what_one_file_lacks_is_named(tmp_path: Path, small_groups: None) -> None:
    two = all_in_one(tmp_path / "two.safetensors", "transformer", "vae")
    told = f"{two}: holds transformer and vae, and no text_encoder; add --text-encoder"
    assert refusal(lambda: open_model(two)) == refusal(lambda: open_any(two)) == told
    encoder = comfy_files(tmp_path)["text_encoder"]
    told = refusal(lambda: open_model(two, parts={"text_encoder": encoder}, local_files_only=True))
    assert told.startswith(f"{two}: has no tokenizer; put Qwen3's tokenizer.json beside it (black-forest-labs/")
    shutil.copy(GOLDEN / "tokenizer" / "tokenizer.json", tmp_path)
    source = open_model(two, parts={"text_encoder": encoder})
    assert_equal(source.weights("text_encoder"), open_model(GOLDEN).weights("text_encoder"))  # type: ignore[arg-type]


def test_three_files_are_a_model_without_a_base(tmp_path: Path, small_groups: None) -> None:
    files = comfy_files(tmp_path)
    shutil.copy(GOLDEN / "tokenizer" / "tokenizer.json", tmp_path)
    source = open_model(files.pop("transformer"), parts=files)
    for part in PARTS:
        assert_equal(source.weights(part), open_model(GOLDEN).weights(part))  # type: ignore[arg-type]


def test_a_file_given_as_a_model_is_told_what_to_do(tmp_path: Path) -> None:
    path = comfy_files(tmp_path)["text_encoder"]
    assert f"{path}: is a text-encoder alone; give a whole model, and this file as --text-encoder" == refusal(
        lambda: open_model(path)
    )
    assert "is a text_encoder, not a vae; give it as --text-encoder" in refusal(lambda: open_part(path, "vae"))
    with pytest.raises(RequestError, match="part is 'unet'"):
        open_model(GOLDEN, parts={"unet": path})


def test_parts_that_do_not_fit_together_are_told(tmp_path: Path) -> None:
    weights = to_bfl(golden("transformer"))
    weights["txt_in.weight"] = mx.zeros((64, 3 * 128), mx.bfloat16)
    path = save(tmp_path / "x.safetensors", weights)
    told = refusal(lambda: open_model(GOLDEN, parts={"transformer": path}))
    assert "joint_attention_dim is 384, but the other parts need 192" in told


def test_a_file_with_too_little_or_too_much_is_told(tmp_path: Path) -> None:
    weights = to_bfl(golden("transformer"))
    spare = save(tmp_path / "a.safetensors", weights | {"extra.weight": mx.ones(3)})
    assert "1 unknown (extra.weight)" in refusal(lambda: opened("transformer", spare))
    del weights["single_blocks.1.linear2.weight"]
    short = save(tmp_path / "b.safetensors", weights)
    assert "1 missing (single_blocks.1.linear2.weight)" in refusal(lambda: opened("transformer", short))
    del weights["txt_in.weight"]
    shorter = save(tmp_path / "c.safetensors", weights)
    assert "txt_in.weight is missing" in refusal(lambda: opened("transformer", shorter))


STRANGERS = {
    "FLUX.1": {"double_blocks.0.img_mod.lin.weight": (4, 4), "img_in.weight": (4, 4)},
    "Qwen-Image": {"transformer_blocks.0.img_mod.1.weight": (4, 4)},
    "a LoRA": {"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": (4, 4)},
    "Chroma": {"distilled_guidance_layer.in_proj.weight": (4, 4)},
    "Stable Diffusion": {"model.diffusion_model.input_blocks.0.0.weight": (4, 4)},
    "Stable Diffusion 3": {"joint_blocks.0.x_block.attn.qkv.weight": (4, 4)},
    "a T5 encoder": {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (4, 4)},
    "a CLIP encoder": {"text_model.encoder.layers.0.mlp.fc1.weight": (4, 4)},
    "a language model other than Qwen3 and Mistral-Small": {"model.layers.0.self_attn.q_proj.weight": (4, 4)},
    "a VAE without the latent statistics of FLUX.2's": {"encoder.down.0.block.0.norm1.weight": (4,)},
    "not a model that klein_mlx knows (it holds x ...)": {"x": (4,)},
}


@pytest.mark.parametrize("what", STRANGERS)
def test_another_model_is_named(tmp_path: Path, what: str) -> None:
    path = save(tmp_path / "flux-2-klein-4b.safetensors", {n: mx.zeros(s) for n, s in STRANGERS[what].items()})
    told = refusal(lambda: open_part(path))
    assert f"is {what}" in told
    assert "FLUX.2 [klein]" in told or "FLUX.2-klein" in told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"PK\x03\x04" + bytes(99), "is a PyTorch pickle"),
        (b"\x80\x02ctorch._utils" + bytes(99), "is a PyTorch pickle"),
        (b"", "has 0 bytes"),
    ],
)
def test_what_is_not_weights_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert message in refusal(lambda: open_part(path))
    assert message in refusal(lambda: open_model(path))


def test_a_pipeline_takes_parts_as_well(tmp_path: Path) -> None:
    from klein_mlx import KleinPipeline

    files = comfy_files(tmp_path)
    options = {"num_inference_steps": 1, "width": 64, "height": 64, "seed": 3, "output_type": "np"}
    mixed = KleinPipeline.from_pretrained(GOLDEN, **files)("a red fox", **options)  # type: ignore[arg-type]
    whole = KleinPipeline.from_pretrained(GOLDEN)("a red fox", **options)  # type: ignore[arg-type]
    assert (mixed.images == whole.images).all()


def test_the_command_takes_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = comfy_files(tmp_path / "files")
    options = [text for part, path in files.items() for text in (f"--{part.replace('_', '-')}", str(path))]
    assert main([str(GOLDEN), str(tmp_path / "ours"), "--verify", *options]) == 0
    assert_equal(loaded(tmp_path / "ours", mx.bfloat16), loaded(GOLDEN, mx.bfloat16))
    assert main([str(GOLDEN), str(tmp_path / "two"), "--vae", str(files["transformer"])]) == 2
    assert "is a transformer, not a vae; give it as --transformer" in capsys.readouterr().err


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_checkpoint_of_ours_is_one_too(tmp_path: Path, part: str, bits: int | None) -> None:
    model = quantizable_model(tmp_path / "model")
    ours = convert_checkpoint(model, tmp_path / "ours", quantize=bits)
    right = open_model(ours)
    for path in (ours, ours / f"{part}.safetensors"):
        mixed = open_model(model, parts={part: path})
        assert_equal(dict(mixed.weights(part)), dict(right.weights(part)))  # type: ignore[arg-type]
        assert mixed.quantization.get(part) == right.quantization.get(part)
        assert open_part(path, part).part == part
