"""Which variant a model is: as its files state it, as its user settles it, with a note where a name says otherwise."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from folders import GOLDEN, copy_model, edit_json, quantizable_model, refusal
from foreign import golden, save, to_bfl
from PIL import Image
from test_mflux import save_mflux

from klein_convert.checkpoint import convert_checkpoint
from klein_convert.export import export_diffusers
from klein_mlx import KleinPipeline
from klein_mlx.cli.download import Consent, obtain
from klein_mlx.cli.main import main
from klein_mlx.config import ONE_STEP, VARIANTS, named_variant, settle_variant
from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.formats.describe import describe, format_description
from klein_mlx.formats.open import open_any, open_model
from klein_mlx.formats.part import KLEIN, PartFile


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in test_mflux."""
    monkeypatch.setitem(KLEIN, "vae", replace(KLEIN["vae"], norm_num_groups=4))


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("flux-2-klein-4b.safetensors", "4b"),
        ("flux-2-klein-base-4b-fp8.safetensors", "base-4b"),
        ("black-forest-labs/FLUX.2-klein-9b-kv", "9b-kv"),
        ("FLUX.2 [klein] Base 9B", "base-9b"),
        ("flux2-klein-1step-rdm", "4b-1step"),
        ("flux2-klein-base-4b-mflux-q4", "base-4b"),
        ("my-klein-finetune", None),
        ("base-4b", None),
    ],
)
def test_a_name_speaks_of_a_variant(name: str, variant: str | None) -> None:
    assert named_variant(name) == variant


def sized(monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden model's sizes stand for the 4B's."""
    c = open_model(GOLDEN).config.transformer
    mine = (c.hidden_size, c.num_layers, c.num_single_layers)
    rows = tuple(replace(row, dimensions=mine) if "4b" in row.name else row for row in VARIANTS)
    monkeypatch.setattr("klein_mlx.config.VARIANTS", rows)
    monkeypatch.setattr("klein_mlx.formats.part.VARIANTS", rows)


@pytest.mark.parametrize("metadata", [None, {"modelspec.title": "FLUX.2 klein base 4B"}])
def test_a_base_model_s_file_on_a_distilled_folder(
    tmp_path: Path, metadata: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same names, same shapes: its name or its metadata raise a doubt, the user settles it, a copy keeps it."""
    sized(monkeypatch)
    name = "mine" if metadata else "flux-2-klein-base-4b"
    path = save(tmp_path / f"{name}.safetensors", to_bfl(golden("transformer")), metadata)
    source = open_model(GOLDEN, parts={"transformer": path})
    assert source.config.variant.name == "4b"
    (note,) = source.info["notes"]
    assert note.startswith(
        f"{name}.safetensors speaks of base-4b, and runs as 4b (4 steps, guidance 1); --variant base-4b"
    )
    assert note in format_description(describe(source))
    assert note in KleinPipeline(source).stream("a fox", seed=0).notes
    settled = open_model(GOLDEN, parts={"transformer": path}, variant="base-4b")
    assert (settled.config.variant.name, settled.config.is_distilled) == ("base-4b", False)
    assert "notes" not in settled.info
    ours = open_model(convert_checkpoint(source, tmp_path / "ours", variant="base-4b"))
    assert ours.config.variant.name == "base-4b"
    kept = open_model(GOLDEN, parts={"transformer": path}, variant="4b")
    assert (kept.config.variant.name, "notes" in kept.info) == ("4b", False)
    assert "the transformer has the sizes of 4b or base-4b" in refusal(lambda: open_model(GOLDEN, variant="9b"))
    assert "it must be one of 4b, base-4b, 9b" in refusal(lambda: open_model(GOLDEN, variant="4c"))


@pytest.mark.parametrize(
    ("record", "distilled"),
    [
        ({"model_name": "flux2-klein-base-4b", "base_model": None}, False),
        ({"model_name": "someone/mine", "base_model": "flux2-klein-base-4b"}, False),
        ({"model_name": "flux2-klein-4b", "base_model": None}, True),
        ({"model_name": "someone/mine", "base_model": None}, True),
        (None, True),
    ],
)
def test_mflux_records_what_it_saved(tmp_path: Path, record: dict[str, Any] | None, distilled: bool) -> None:
    folder = save_mflux(tmp_path / "theirs", quantizable_model(tmp_path / "model"), 8)
    if record:
        (folder / "mflux_model.json").write_text(json.dumps({"format_version": 1, "quantize": 8, **record}))
    source = open_model(folder)
    assert source.config.is_distilled is distilled
    assert open_model(convert_checkpoint(source, tmp_path / "ours")).config.is_distilled is distilled


def test_mflux_s_folder_without_a_record_has_a_note_by_its_name(tmp_path: Path) -> None:
    folder = save_mflux(tmp_path / "flux2-klein-base-4b-mflux-q8", quantizable_model(tmp_path / "model"), 8)
    assert "speaks of base-4b" in open_model(folder).info["notes"][0]
    assert open_model(folder, variant="base-4b").config.is_distilled is False


# ---- the one-step transformer ----


def one_step(folder: Path) -> Path:
    return save(folder / "one.safetensors", to_bfl(golden("transformer"), "model."))


def test_the_one_step_transformer_is_told_by_its_names(tmp_path: Path) -> None:
    path = one_step(tmp_path)
    part = open_any(path)
    assert isinstance(part, PartFile)
    assert (part.part, part.found.dialect, part.found.prefix) == ("transformer", "BFL", "model.")
    source = open_model(GOLDEN, parts={"transformer": path})
    config = source.config
    assert config.variant == ONE_STEP
    assert (config.max_sequence_length, config.default_size) == (232, 512)
    assert (config.variant.steps, config.variant.licence) == (1, "Apache-2.0")
    assert source.info["licence"] == "Apache-2.0"
    right = open_model(GOLDEN).weights("transformer")
    found = source.weights("transformer")
    assert all(mx.array_equal(found[name], right[name]) for name in right)  # type: ignore[arg-type]
    ours = open_model(convert_checkpoint(source, tmp_path / "ours"))
    assert (ours.config, ours.config.variant) == (config, ONE_STEP)
    plain = open_model(ours.path, parts={"transformer": GOLDEN})
    assert (plain.config.variant.name, plain.config.max_sequence_length) == ("distilled", 512)


@pytest.mark.parametrize("length", [None, 48, 512])
def test_one_step_from_pure_noise(tmp_path: Path, length: int | None) -> None:
    pipe = KleinPipeline(open_model(GOLDEN, parts={"transformer": one_step(tmp_path)}))
    run = pipe.stream(
        "a fox", seed=1, width=64, height=64, **({} if length is None else {"max_sequence_length": length})
    )
    assert run.request.max_sequence_length == (length or 232)
    assert run.plan.recipe["schedule"] == [1.0, 0.0]
    assert (run.request.steps, run.request.guidance) == (1, 1.0)
    steps = [event for event in run if hasattr(event, "sigma")]
    assert len(steps) == 1
    with pytest.raises(RequestError, match="draws from text alone"):
        pipe.stream("a fox", image=[GOLDEN / "x.png"])
    with pytest.raises(RequestError, match="draws from text alone"):
        pipe.stream("a fox", init_image=GOLDEN / "x.png")


def test_other_uses_of_its_weights_are_asked_for_by_variant(tmp_path: Path) -> None:
    source = open_model(GOLDEN, parts={"transformer": one_step(tmp_path)}, variant="4b")
    assert (source.config.variant.steps, source.config.variant.edits) == (4, True)
    assert (source.config.max_sequence_length, source.config.default_size) == (512, 1024)
    plain = save(tmp_path / "plain.safetensors", to_bfl(golden("transformer")))
    forced = open_model(GOLDEN, parts={"transformer": plain}, variant="4b-1step")
    assert forced.config.variant == ONE_STEP


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Repositories as the Hub's cache has them: the one-step transformer's, and the 4B's. Nothing is fetched."""
    found = {}
    for hub_id in (ONE_STEP.hub_id, VARIANTS[0].hub_id):
        assert hub_id
        found[hub_id] = tmp_path / f"models--{hub_id.replace('/', '--')}" / "snapshots" / "abc"
    one, base = found.values()
    one.mkdir(parents=True)
    one_step(one).rename(one / "model.safetensors")
    copy_model(base)

    def download(hub_id: str, *, local_files_only: bool = False, **_: Any) -> Path:
        if not found[hub_id].is_dir():
            raise CheckpointError(f"{hub_id}: is not here")
        return found[hub_id]

    monkeypatch.setattr("klein_mlx.formats.open.download", download)
    return found


def test_the_one_step_repository_is_a_model_on_the_4b_s(cached: dict[str, Path], tmp_path: Path) -> None:
    source = open_model("4b-1step", local_files_only=True)
    one, base = cached.values()
    assert source.config.variant == ONE_STEP
    assert (source.config.max_sequence_length, source.config.default_size) == (232, 512)
    assert (source.path, source.info["licence"]) == (one, "Apache-2.0")
    assert source.files(["transformer"])[-1] == one / "model.safetensors"
    assert {path.parts[-2] for path in source.files(["vae", "text_encoder"])} >= {"vae", "text_encoder"}
    pipe = KleinPipeline(source)
    model = pipe("a fox", seed=1, width=64, height=64).recipes[0]["model"]
    assert (model["id"], model["revision"], model["variant"]) == (ONE_STEP.hub_id, "abc", "4b-1step")
    assert "parts" not in model  # so it is made again without naming files
    ours = open_model(convert_checkpoint(source, tmp_path / "ours"))
    assert (ours.config, ours.info["licence"]) == (source.config, "Apache-2.0")
    (base / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        open_model("4b-1step", local_files_only=True)


def test_the_one_step_repository_in_the_command(
    cached: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`info` with the memory of a picture; edits refused unless forced; what is missing is fetched from both."""
    assert main(["info", "4b-1step", "--size", "512x512"]) == 0
    told = capsys.readouterr().out
    assert "4b-1step" in told
    assert "Apache-2.0" in told
    Image.new("RGB", (64, 64), "red").save(tmp_path / "x.png")
    edit = ["make it blue", "-i", str(tmp_path / "x.png"), "-m", "4b-1step", "-o", str(tmp_path / "out.png")]
    assert main([*edit, "--offline"]) == 2
    assert "4b-1step draws from text alone" in capsys.readouterr().err
    assert main([*edit, "--offline", "--variant", "4b", "--steps", "1", "--size", "64x64"]) == 0
    brought: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(
        "klein_mlx.cli.download.bring", lambda hub_id, patterns, **_: brought.append((hub_id, patterns))
    )
    for folder in cached.values():
        folder.rename(folder.with_name("away"))
    assert obtain("4b-1step", consent=Consent(yes=True)) == ONE_STEP.hub_id
    assert [hub_id for hub_id, _ in brought] == [VARIANTS[0].hub_id, ONE_STEP.hub_id]
    assert brought[0][1](["vae/x.safetensors", "transformer/x.safetensors"]) == ["vae/x.safetensors"]
    assert brought[1][1] == ["LICENSE*", "NOTICE*", "model.safetensors"]


@pytest.mark.parametrize("variant", ["base-4b", "4b-1step"])
def test_the_variant_reaches_what_is_told_predicted_and_exported(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one_step = variant == ONE_STEP.name
    if not one_step:
        sized(monkeypatch)
    asked = ["--variant", variant]
    assert main(["info", str(GOLDEN), *asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["variant"], told["steps"], told["guidance"]) == (variant, *((1, 1.0) if one_step else (50, 4.0)))
    assert main(["bench", "-m", str(GOLDEN), *asked, "--predict", "M3 Max", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["steps"]) == (variant, 1 if one_step else 50)
    assert main(["convert", str(GOLDEN), str(tmp_path / "out"), "--to", "diffusers", "--quiet", *asked]) == 0
    noted = "diffusers' layout does not state 4b-1step: open it with --variant 4b-1step"
    assert (noted in capsys.readouterr().err) == one_step
    assert open_model(tmp_path / "out", variant=variant if one_step else None).config.variant.name == variant


def test_a_variant_of_other_sizes_or_of_a_part_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sized(monkeypatch)
    model = str(GOLDEN)
    for command in (["info", model], ["convert", model, "x", "--to", "diffusers"], ["bench", "-m", model, "--predict"]):
        assert main([*command, "--variant", "9b-kv"]) == 2
        assert "variant is '9b-kv', and the transformer has the sizes of 4b or base-4b" in capsys.readouterr().err
    path = save(tmp_path / "x.safetensors", to_bfl(golden("transformer")))
    assert main(["info", str(path), "--variant", "4b"]) == 2
    assert "--variant needs a whole model" in capsys.readouterr().err


def test_the_kv_variant_is_exported_as_such(tmp_path: Path) -> None:
    source = open_model(GOLDEN)
    source = replace(source, config=replace(source.config, caches_references=True))  # type: ignore[type-var]
    assert open_model(export_diffusers(source, tmp_path / "out")).config.caches_references


def test_an_unlisted_size_keeps_its_license(tmp_path: Path) -> None:
    base = convert_checkpoint(open_model("tiny"), tmp_path / "base", variant="base-4b")
    found = describe(open_model(base))
    assert (found["variant"], found["steps"], found["guidance"], found["licence"]) == ("base", 50, 4.0, "Apache-2.0")


def test_settling_changes_nothing_else(tmp_path: Path) -> None:
    folder = copy_model(tmp_path / "model")
    edit_json(folder / "model_index.json", lambda values: values.update(max_sequence_length=40, default_size=128))
    config = open_model(folder).config
    settled = settle_variant(config, "base-4b")
    assert replace(settled, is_distilled=True) == config


@pytest.mark.parametrize("prefix", ["qwen3_4b.transformer.", "text_encoders.qwen3_8b.transformer.", "text_encoder."])
def test_an_encoder_behind_a_prefix(tmp_path: Path, prefix: str) -> None:
    theirs = golden("text_encoder")
    path = save(tmp_path / "x.safetensors", {f"{prefix}{name}": array for name, array in theirs.items()})
    right = open_model(GOLDEN).weights("text_encoder")
    found = open_model(GOLDEN, parts={"text_encoder": path}).weights("text_encoder")
    assert all(mx.array_equal(found[name], right[name]) for name in right)  # type: ignore[arg-type]
