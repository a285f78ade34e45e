"""Where a LoRA's name leads, what `lora info` says of it, what `convert --lora` writes, and options with scales."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from folders import GOLDEN, edit_weights, quantizable_model, refusal
from lora_kinds import KINDS
from lora_layouts import LAYOUTS, deltas, make_twin, merged_folder, save
from lora_runs import difference, pipeline, velocity

from klein_convert.export import merge_loras
from klein_mlx.cli.main import main
from klein_mlx.cli.options import split_scale
from klein_mlx.errors import CheckpointError
from klein_mlx.formats.describe import describe_lora, format_lora
from klein_mlx.formats.lora_metadata import find_lora, lora_folder
from klein_mlx.formats.open import open_model
from klein_mlx.paths import TINY_FOLDER


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A LoRA folder: style, two of the name `twice` in folders of their own, and one of macOS' leavings."""
    made = tmp_path / "loras"
    for name in ("style", "one/twice", "two/twice", "alone/pytorch_lora_weights", "._style"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        save(made / f"{name}.safetensors", LAYOUTS["peft"](make_twin())[0])
    return made


# ---- names ----


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("style", "style", 1.0),
        ("style:0.8", "style", 0.8),
        ("a:b/style.safetensors:-1", "a:b/style.safetensors", -1.0),
        ("a:b/style.safetensors", "a:b/style.safetensors", 1.0),
        ("owner/name:1e-1", "owner/name", 0.1),
        (":0.5", ":0.5", 1.0),
        ("style:", "style:", 1.0),
    ],
)
def test_the_scale_stands_behind_the_last_colon(text: str, path: str, scale: float) -> None:
    assert split_scale(text) == (path, scale)


def test_a_scale_that_is_no_number_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = save(tmp_path / "a.safetensors", LAYOUTS["peft"](make_twin())[0])
    assert main(["generate", "x", "--model", str(GOLDEN), "--lora", f"{file}:nan", "-o", str(tmp_path / "o.png")]) == 2
    assert "scale is nan; it must be a number from -100 to 100" in capsys.readouterr().err
    assert not (tmp_path / "o.png").exists()


def test_names_are_looked_up_in_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_lora("style", folder=folder) == folder / "style.safetensors"
    assert find_lora("style.safetensors", folder=folder) == folder / "style.safetensors"
    assert find_lora("one/twice", folder=folder) == folder / "one" / "twice.safetensors"
    assert find_lora("alone", folder=folder) == folder / "alone" / "pytorch_lora_weights.safetensors"
    assert find_lora(folder / "alone") == folder / "alone" / "pytorch_lora_weights.safetensors"
    monkeypatch.setenv("KLEIN_MLX_LORAS", str(folder))
    assert find_lora("style") == folder / "style.safetensors"
    monkeypatch.delenv("KLEIN_MLX_LORAS")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert lora_folder() == tmp_path / ".config" / "klein-mlx" / "loras"


def test_names_that_lead_nowhere_are_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ambiguous = refusal(lambda: find_lora("twice", folder=folder))
    assert "LoRA 'twice' is ambiguous" in ambiguous
    assert "one/twice.safetensors, two/twice.safetensors; give its folder too" in ambiguous
    assert "(it holds style ...)" in refusal(lambda: find_lora("styel", folder=folder))
    assert "there is no LoRA folder" in refusal(lambda: find_lora("style", folder=tmp_path / "absent"))
    assert "absent.safetensors: no such file" in refusal(lambda: find_lora("./absent.safetensors", folder=folder))
    assert "holds 4 safetensors files; name one of them" in refusal(lambda: find_lora(folder))
    assert "is not a file, and is not in" in refusal(lambda: find_lora("x/../../style", folder=folder / "one"))
    assert "it must be a file" in refusal(lambda: find_lora("", folder=folder))
    (tmp_path / "empty").mkdir()
    assert "holds no .safetensors file" in refusal(lambda: find_lora(tmp_path / "empty"))


def test_a_repository_of_the_hub_is_asked_for_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, calls = tmp_path / "cache", []
    names = ["README.md", "style.safetensors", "adapter_config.json"]

    def snapshot(hub_id: str, **options: Any) -> str:
        calls.append((hub_id, options["local_files_only"], tuple(options["allow_patterns"])))
        if options["local_files_only"] and not cache.exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        cache.mkdir(exist_ok=True)
        save(cache / "style.safetensors", LAYOUTS["peft"](make_twin())[0])
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *args, **options: names)
    assert find_lora("owner/name", folder=tmp_path) == cache / "style.safetensors"
    assert calls == [("owner/name", offline, ("style.safetensors", "adapter_config.json")) for offline in (True, False)]
    names.append("other.safetensors")
    message = refusal(lambda: find_lora("owner/name", folder=tmp_path))
    assert "holds 2 safetensors files; name one of them: style.safetensors, other.safetensors" in message
    assert find_lora("owner/name/style.safetensors", folder=tmp_path) == cache / "style.safetensors"
    assert find_lora("owner/name", folder=tmp_path, local_files_only=True) == cache / "style.safetensors"
    assert "is not a .safetensors file" in refusal(lambda: find_lora("owner/name/style.ckpt", folder=tmp_path))
    assert "is not a .safetensors file" in refusal(lambda: find_lora("owner/name/../x.safetensors", folder=tmp_path))


def test_pefts_config_beside_its_file_states_the_strength(tmp_path: Path) -> None:
    twin = make_twin()
    tensors = {
        f"base_model.model.{path}.lora_{kind}.weight": array
        for path, factors in twin.items()
        for kind, array in (("A", factors.down), ("B", factors.up))
    }
    save(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 4.5, "peft_type": "LORA"}))
    pipe = pipeline()
    pipe.load_lora(tmp_path)
    right = velocity(pipeline(merged_folder(tmp_path / "model", deltas(twin))))
    assert difference(velocity(pipe), right) < 1e-5


# ---- what it is ----


def test_info_tells_what_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": np.ones((8, 3072), np.float32),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": np.ones((9216, 8), np.float32),
        "lora_unet_double_blocks_0_img_attn_qkv.alpha": np.array(4, np.float32),
        "lora_unet_single_blocks_0_linear1.lora_down.weight": np.ones((16, 3072), np.float32),
        "lora_unet_single_blocks_0_linear1.lora_up.weight": np.ones((27648, 16), np.float32),
        "lora_te_model_layers_0_self_attn_q_proj.lora_down.weight": np.ones((8, 2560), np.float32),
        "lora_te_model_layers_0_self_attn_q_proj.lora_up.weight": np.ones((4096, 8), np.float32),
    }
    tags = {"10_style": {"sks style": 12, "a fox": 3}, "5_more": {"sks style": 5, "a cat": 7}}
    metadata = {"ss_tag_frequency": json.dumps(tags), "modelspec.license": "CC-BY-4.0", "modelspec.title": "Style\n1"}
    file = save(tmp_path / "style.safetensors", tensors, metadata)
    found = describe_lora(file)
    assert found["base"] == "FLUX.2 [klein] 4B (hidden size 3072)"
    assert found["text_encoder"] == "Qwen3-4B"
    assert found["layout"] == "BFL and diffusers names with underscores behind lora_unet_, as in lora_down.weight"
    assert (found["ranks"], found["alphas"]) == ({"8": 2, "16": 1}, {"4": 1, "none": 2})
    assert found["modules"] == {"transformer": 2, "text_encoder": 1}
    assert found["trigger_words"] == ["sks style", "a cat", "a fox"]
    assert (found["licence"], found["title"], found["unknown_keys"]) == ("CC-BY-4.0", "Style 1", [])
    assert main(["lora", "info", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main(["lora", "info", str(file)]) == 0
    assert capsys.readouterr().out.rstrip() == format_lora(found)


@pytest.mark.parametrize("kind", KINDS)
def test_info_knows_every_kind(kind: str, tmp_path: Path) -> None:
    found = describe_lora(save(tmp_path / "lora.safetensors", KINDS[kind]()[0]))
    word = {"lokr": "LoKr", "loha": "LoHa", "dora": "DoRA", "dora_scale": "DoRA", "norms": "full difference"}
    assert word[kind.split()[0]] in found["kinds"]
    assert found["unknown_keys"] == []
    assert format_lora(found)


def test_info_tells_a_stranger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {
        "lora_unet_double_blocks_0_img_mod_lin.lora_down.weight": np.ones((4, 3072), np.float32),
        "lora_unet_double_blocks_0_img_mod_lin.lora_up.weight": np.ones((18432, 4), np.float32),
    }
    file = save(tmp_path / "lora.safetensors", tensors)
    assert main(["lora", "info", str(file)]) == 0
    assert capsys.readouterr().out.startswith("LoRA for FLUX.1\n")


# ---- merged by the converter ----


@pytest.mark.parametrize("bits", [None, 4])
def test_convert_merges_before_it_quantises(bits: int | None, tmp_path: Path) -> None:
    """What is written is what a folder with the differences in its weights gives: to float32's rounding, or, where that
    moves a weight to the neighbouring step of 4 bits, to a few of those. klein.json and the digests record the LoRA."""
    base, right = quantizable_model(tmp_path / "base"), quantizable_model(tmp_path / "right")
    twin = make_twin()
    change(base, {})
    change(right, {f"{path}.weight": mx.array(np.float32(0.5) * delta) for path, delta in deltas(twin).items()})
    file = save(tmp_path / "style.safetensors", LAYOUTS["kohya"](twin)[0])
    merged = merge_loras(open_model(base), [(file, 0.5)])
    assert merged.rows("text_encoder", "embed_tokens.weight") is not None, "no LoRA changes the encoder"
    out = tmp_path / "merged"
    options = ["--quantize", str(bits)] if bits else []
    assert main(["convert", str(base), str(out), "--lora", f"{file}:0.5", "--quiet", "--verify", *options]) == 0
    record = json.loads((out / "klein.json").read_text())["source"]
    assert [(one["name"], one["scale"]) for one in record["loras"]] == [("style.safetensors", 0.5)]
    assert record["sha256"]["style.safetensors"] == record["loras"][0]["sha256"]
    found = velocity(pipeline(out))
    assert difference(found, velocity(pipeline(right, quantize=bits))) < (1e-5 if bits is None else 0.02)
    assert difference(found, velocity(pipeline(base, quantize=bits))) > 0.1
    if bits:
        message = refusal(lambda: merge_loras(open_model(out), [(file, 1.0)]))
        assert "is quantized, and merging style.safetensors into it would lose what it adds" in message


def test_a_merged_model_may_be_another_variant(tmp_path: Path) -> None:
    file = save(tmp_path / "style.safetensors", LAYOUTS["comfyui"](make_twin())[0])
    out = tmp_path / "merged"
    assert main(["convert", str(GOLDEN), str(out), "--lora", str(file), "--variant", "base-4b", "--quiet"]) == 0
    assert open_model(GOLDEN).config.is_distilled
    assert not open_model(out).config.is_distilled


def change(folder: Path, added: dict[str, mx.array]) -> None:
    """The transformer's weights as float32, with these differences."""

    def edit(weights: dict[str, mx.array]) -> None:
        for name, array in weights.items():
            weights[name] = array.astype(mx.float32) + added.get(name, mx.array(0.0))

    edit_weights(folder, "transformer", edit)


def test_export_to_diffusers_merges_too(tmp_path: Path) -> None:
    file = save(tmp_path / "style.safetensors", LAYOUTS["comfyui"](make_twin())[0])
    out = tmp_path / "exported"
    assert main(["convert", str(GOLDEN), str(out), "--to", "diffusers", "--lora", str(file), "--quiet"]) == 0
    pipe = pipeline(dtype="bfloat16")
    pipe.load_lora(file)
    assert mx.array_equal(velocity(pipeline(out, dtype="bfloat16")), velocity(pipe))


def test_a_model_s_files_in_the_folder_are_none(tmp_path: Path) -> None:
    model = tmp_path / "loras" / "model"
    model.mkdir(parents=True)
    for name in ("klein.json", "transformer.safetensors"):
        (model / name).write_bytes((TINY_FOLDER / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"LoRA 'transformer' is not a file, and is not in .* \(it is empty\)"):
        find_lora("transformer", folder=tmp_path / "loras")
