"""Back to diffusers: the folder that is written reads as the model that it came from; diffusers itself loads it."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from folders import GOLDEN, assert_equal, nothing_but, quantizable_model, refusal
from foreign import golden, save, to_bfl

from klein_convert.__main__ import main
from klein_convert.checkpoint import convert_checkpoint
from klein_convert.export import export_diffusers
from klein_mlx.config import PARTS
from klein_mlx.formats.open import open_model
from klein_mlx.weights.checkpoint import Checkpoint


def test_there_and_back_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    ours = convert_checkpoint(GOLDEN, tmp_path / "ours")
    back = export_diffusers(open_model(ours), tmp_path / "back")
    for part in PARTS:
        assert_equal(open_model(back).weights(part), open_model(GOLDEN).weights(part))  # type: ignore[arg-type]
    assert open_model(back).config == open_model(GOLDEN).config


def test_the_layer_behind_the_last_tap_adds_nothing(tmp_path: Path) -> None:
    source = open_model(GOLDEN, parts={"transformer": save(tmp_path / "x.safetensors", to_bfl(golden("transformer")))})
    back = export_diffusers(source, tmp_path / "back")
    weights = mx.load(str(back / "text_encoder" / "model.safetensors"))
    config = json.loads((back / "text_encoder" / "config.json").read_text())
    last = f"model.layers.{config['num_hidden_layers'] - 1}."
    assert config["num_hidden_layers"] == open_model(GOLDEN).config.taps[-1] + 1
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert not weights[f"{last}{name}.weight"].any().item()  # type: ignore[index]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_dequantised(tmp_path: Path, bits: int) -> None:
    ours = convert_checkpoint(quantizable_model(tmp_path / "model"), tmp_path / "ours", quantize=bits)
    back = open_model(export_diffusers(open_model(ours), tmp_path / "back")).weights("transformer")
    stored = open_model(ours).weights("transformer")
    path = "single_blocks.1.linear_in"
    arrays = [stored[f"{path}.{kind}"] for kind in ("weight", "scales", "biases")]
    exact = [arrays[0], *(a.astype(mx.float32) for a in arrays[1:])]  # type: ignore[union-attr]
    right = mx.dequantize(*exact, group_size=64, bits=bits).astype(mx.bfloat16)  # type: ignore[arg-type]
    assert mx.array_equal(back[f"{path}.weight"], right)  # type: ignore[arg-type]
    assert mx.array_equal(back["mod_img.weight"], stored["mod_img.weight"])  # type: ignore[arg-type]


def test_the_command_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN), str(tmp_path / "back"), "--to", "diffusers"]) == 0
    assert main([str(GOLDEN), str(tmp_path / "back"), "--to", "diffusers"]) == 2
    assert main([str(GOLDEN), str(tmp_path / "back"), "--to", "diffusers", "--force"]) == 0
    assert main([str(GOLDEN), str(tmp_path / "x"), "--to", "diffusers", "-q", "4"]) == 2
    assert "takes no --quantize" in capsys.readouterr().err
    assert nothing_but(tmp_path, "back")


def test_only_such_a_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    told = refusal(lambda: export_diffusers(open_model(GOLDEN), tmp_path / "notes", force=True))
    assert "is not a folder with a model_index.json, so it is not replaced" in told


@pytest.mark.parity
def test_diffusers_loads_it_and_makes_the_same_picture(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline

    ours = convert_checkpoint(GOLDEN, tmp_path / "ours")
    source = open_model(ours)
    assert isinstance(source, Checkpoint)
    back = export_diffusers(source, tmp_path / "back")
    pictures = []
    for folder in (GOLDEN, back):
        pipe = Flux2KleinPipeline.from_pretrained(str(folder), dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        noise = torch.randn((1, 32, 4, 4), generator=torch.Generator().manual_seed(0))
        options = {"num_inference_steps": 2, "guidance_scale": 1.0, "text_encoder_out_layers": (1, 2, 3)}
        result: Any = pipe(prompt="a red fox", height=64, width=64, latents=noise, output_type="np", **options)
        pictures.append(result.images)
    assert (pictures[0] == pictures[1]).all()
