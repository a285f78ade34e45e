"""What a conversion refuses, plans, records and verifies: damaged weights, sizes, digests, the model card, uploads."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import pytest
from folders import GOLDEN, copy_model, edit_json, edit_weights, nothing_but, quantizable_model, refusal

from klein_convert.__main__ import main
from klein_convert.checkpoint import convert_checkpoint, plan_conversion
from klein_convert.destination import model_card
from klein_mlx.formats.describe import verify
from klein_mlx.formats.open import open_model
from klein_mlx.weights.quantize import Quantization, quantize_weights
from klein_mlx.weights.safetensors import Deferred

# ---- NaN and infinity ----

DAMAGED = {
    "transformer": ("transformer_blocks.0.attn.to_q.weight", "double_blocks.0.img.to_q.weight"),
    "vae": ("bn.running_var", "latent_var"),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("part", "bits"), [("transformer", None), ("transformer", 4), ("vae", None)])
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, part: str, bits: int | None, value: float) -> None:
    model = quantizable_model(tmp_path / "model")
    theirs, ours = DAMAGED[part]

    def damage(weights: dict[str, mx.array]) -> None:
        array = weights[theirs].reshape(-1)
        array[array.size // 2] = value
        weights[theirs] = array.reshape(weights[theirs].shape)

    edit_weights(model, part, damage)
    told = refusal(lambda: convert_checkpoint(model, tmp_path / "ours", quantize=bits))
    assert told == f"{ours}: holds NaN or infinity: the source is damaged; get it again"
    assert nothing_but(tmp_path, "model")


def test_a_weight_that_is_no_number_is_named_when_it_is_loaded(tmp_path: Path) -> None:
    from klein_mlx import KleinPipeline

    model = copy_model(tmp_path / "model")
    edit_weights(model, "vae", lambda weights: weights.update({"bn.running_var": weights["bn.running_var"] * mx.inf}))
    pipe = KleinPipeline.from_pretrained(model)
    told = refusal(lambda: pipe("a fox", num_inference_steps=1, width=64, height=64))
    assert told == f"{model}: the vae's latent_var holds NaN or infinity: get it again"


def test_a_decoded_weight_is_looked_at_too() -> None:
    array = mx.array([[1.0, float("nan")] * 32]).astype(mx.bfloat16)
    name = "layers.0.mlp.up_proj.weight"
    weights = {name: Deferred((1, 64), mx.bfloat16, lambda: array)}
    (packed, *_) = quantize_weights("text_encoder", weights, Quantization(4)).values()
    assert isinstance(packed, Deferred)
    assert f"{name}: holds NaN" in refusal(packed.load)


# ---- the plan ----


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, target = quantizable_model(tmp_path / "model"), tmp_path / "ours"
    assert main([str(model), str(target), "-q", "4", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert nothing_but(tmp_path, "model")
    assert [line.split()[0] for line in lines] == ["read", "write", "transformer", "text_encoder", "vae", "free"]
    assert re.search(r" [kM]B  4-bit in groups of 64$", lines[2])
    plan = plan_conversion(open_model(model), target, quantize=4)
    convert_checkpoint(model, target, quantize=4)
    for part, size in plan.written.items():
        content = (target / f"{part}.safetensors").read_bytes()
        assert len(content) == size + 8 + int.from_bytes(content[:8], "little")


def test_a_dry_run_checks_as_the_run_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ours").mkdir()
    assert main([str(GOLDEN), str(tmp_path / "ours"), "--dry-run"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([str(GOLDEN), str(tmp_path / "x"), "--dry-run", "-q", "4"]) == 2
    assert "has 160 inputs" in capsys.readouterr().err


# ---- the record ----


def test_the_record_is_of_what_was_written(tmp_path: Path) -> None:
    path = convert_checkpoint(GOLDEN, tmp_path / "ours", verify=True)
    record = json.loads((path / "klein.json").read_text())["sha256"]
    assert set(record) == {p.name for p in path.iterdir()} - {"klein.json", "README.md"}
    for name, digest in record.items():
        assert digest == hashlib.sha256((path / name).read_bytes()).hexdigest()
    assert verify(open_model(path)) == sorted(record)


def test_the_record_names_every_quantised_layer(tmp_path: Path) -> None:
    path = convert_checkpoint(quantizable_model(tmp_path / "model"), tmp_path / "ours", quantize=8)
    stored = json.loads((path / "klein.json").read_text())["quantization"]
    for part, values in stored.items():
        weights = open_model(path).weights(part)
        assert set(values["layers"]) == {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}
        assert all(own == {"bits": 8, "group_size": 64, "mode": "affine"} for own in values["layers"].values())


def test_info_verifies_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from klein_mlx.cli.main import main as command

    path = convert_checkpoint(GOLDEN, tmp_path / "ours")
    assert command(["info", "--verify", str(path)]) == 0
    assert capsys.readouterr().out.endswith("4 files have the sha256 that was recorded when they were written\n")
    content = bytearray((path / "vae.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "vae.safetensors").write_bytes(content)
    assert command(["info", str(path)]) == 0
    assert command(["info", "--verify", str(path)]) == 2
    assert "vae.safetensors: has changed since it was written" in capsys.readouterr().err
    assert command(["info", "--verify", str(GOLDEN)]) == 2
    assert "holds no record of its files" in capsys.readouterr().err


def test_a_record_that_is_no_record_is_told(tmp_path: Path) -> None:
    path = convert_checkpoint(GOLDEN, tmp_path / "ours")
    edit_json(path / "klein.json", lambda values: values["sha256"].pop("vae.safetensors"))
    assert "vae.safetensors: is not in the record" in refusal(lambda: verify(open_model(path)))
    record = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.iterdir() if p.name != "klein.json"}
    edit_json(path / "klein.json", lambda values: values.update(sha256={**record, "../x": ""}))
    assert "records '../x'; it must be a file beside it" in refusal(lambda: verify(open_model(path)))


def test_verifying_finds_what_was_not_written_as_it_was_read(tmp_path: Path, monkeypatch: Any) -> None:
    from klein_convert import writer

    honest = writer._made
    monkeypatch.setattr(
        writer, "_made", lambda name, weight, *rest: honest(name, mx.zeros(weight.shape, weight.dtype), *rest)
    )
    told = refusal(lambda: convert_checkpoint(GOLDEN, tmp_path / "ours", verify=True))
    assert "was not written as it was read" in told
    assert nothing_but(tmp_path)


# ---- the card ----


def test_the_card_states_licence_origin_and_changes(tmp_path: Path) -> None:
    model = quantizable_model(tmp_path / "model")
    (model / "LICENSE.md").write_text("the licence of the original")
    (model / "NOTICE").write_text("a notice of the original")
    path = convert_checkpoint(model, tmp_path / "ours", quantize=4)
    assert (path / "LICENSE").read_text() == "the licence of the original"
    assert (path / "NOTICE").read_text() == "a notice of the original"
    card = (path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mlx\n")
    assert "the transformer is 4-bit" in card
    assert str(tmp_path) not in card


def test_apache_s_notices_are_there(tmp_path: Path) -> None:
    path = convert_checkpoint(copy_model(tmp_path / "model"), tmp_path / "ours", variant="tiny")
    assert "Apache License" in (path / "LICENSE").read_text()
    settings = json.loads((path / "klein.json").read_text())
    settings["source"] |= {"name": "black-forest-labs/FLUX.2-klein-4B", "revision": "abc"}
    settings["quantization"] = {"transformer": Quantization(4).to_dict()}
    card = model_card(settings)
    for words in (
        "license: apache-2.0",
        "base_model:\n- black-forest-labs/FLUX.2-klein-4B\nbase_model_relation: quantized",
        "Made from black-forest-labs/FLUX.2-klein-4B at revision abc by klein-mlx",
        "unofficial",
        "the weight files were modified",
        "https://www.apache.org/licenses/LICENSE-2.0",
    ):
        assert words in card, words


# ---- the upload ----


class FakeHub:
    """Stands in for huggingface_hub.HfApi."""

    calls: list[tuple[str, Any]] = []
    error: Exception | None = None

    def create_repo(self, repository: str, **options: Any) -> str:
        self.calls.append((repository, options))
        if self.error:
            raise self.error
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", options))


def test_a_finished_folder_is_uploaded(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(FakeHub, "calls", [])
    target = tmp_path / "ours"
    assert main([str(GOLDEN), str(target), "--upload", "owner/name"]) == 0
    assert capsys.readouterr().out == f"{target}\nhttps://huggingface.co/owner/name\n"
    assert FakeHub.calls[1][1]["folder_path"] == str(target)
    monkeypatch.setattr(FakeHub, "error", ConnectionError("no route"))
    assert main([str(GOLDEN), str(tmp_path / "two"), "--upload", "owner/name"]) == 2
    assert f"the upload failed (no route); {tmp_path / 'two'} is complete" in capsys.readouterr().err


def test_an_upload_that_cannot_be_is_told_before_the_work(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for name, message in (("x", "it must be owner/name"), ("owner/name", "log in first")):
        assert main([str(GOLDEN), str(tmp_path / "ours"), "--upload", name]) == 2
        assert message in capsys.readouterr().err
    assert nothing_but(tmp_path)
