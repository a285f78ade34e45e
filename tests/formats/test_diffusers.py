"""What a folder in diffusers' layout states besides weights: which layers are tapped, and the noise schedule."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from folders import GOLDEN, assert_equal, copy_model, deepen, edit_json, edit_weights, refusal, shard, weight_file
from foreign import read_weights, save, to_mflux

from klein_convert.checkpoint import convert_checkpoint
from klein_convert.export import export_diffusers
from klein_mlx.config import PARTS, default_taps
from klein_mlx.formats.open import open_model
from klein_mlx.formats.part import KLEIN
from klein_mlx.model.sampler import empirical_mu, make_sigmas


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_model(tmp_path / "model")


@pytest.mark.parametrize("layers", [28, 30, 32, 36, 40])
def test_klein_s_taps_whatever_the_depth(folder: Path, layers: int, tmp_path: Path) -> None:
    deepen(folder, layers)
    source = open_model(folder)
    assert source.config.taps == (9, 18, 27)
    assert len({name.split(".")[1] for name in source.weights("text_encoder") if name.startswith("layers.")}) == 27
    if layers == 28:
        ours = convert_checkpoint(folder, tmp_path / "ours")
        assert open_model(ours).config.taps == (9, 18, 27)
        again = export_diffusers(open_model(ours), tmp_path / "again")
        assert open_model(again).config.taps == (9, 18, 27)
        assert "text_encoder_out_layers" not in json.loads((again / "model_index.json").read_text())


def test_the_last_layer_s_output_is_normalized_in_diffusers_layout(folder: Path) -> None:
    deepen(folder, 27)
    assert "layer 27 is tapped, and the text encoder has 27" in refusal(lambda: open_model(folder))
    edit_json(folder / "model_index.json", lambda values: values.update(text_encoder_out_layers=[9, 18, 26]))
    assert open_model(folder).config.taps == (9, 18, 26)


def test_shallower_encoders_are_tapped_at_fractions() -> None:
    assert [default_taps(n) for n in (4, 8, 26, 27)] == [(1, 2, 3), (2, 4, 6), (6, 13, 19), (9, 18, 27)]


def test_either_config_may_state_the_taps_and_both_must_agree(folder: Path) -> None:
    name = "text_encoder_out_layers"
    edit_json(folder / "text_encoder" / "config.json", lambda values: values.update({name: [1, 3, 3]}))
    assert "the tapped layers are (1, 3, 3)" in refusal(lambda: open_model(folder))
    edit_json(folder / "text_encoder" / "config.json", lambda values: values.update({name: [2, 1, 3]}))
    assert "they must be at least 1 and increasing" in refusal(lambda: open_model(folder))
    edit_json(folder / "text_encoder" / "config.json", lambda values: values.update({name: [1, 2, 3]}))
    edit_json(folder / "model_index.json", lambda values: values.update({name: [1, 2, 3]}))
    assert open_model(folder).config.taps == (1, 2, 3)
    edit_json(folder / "model_index.json", lambda values: values.update({name: [1, 2]}))
    assert "make them agree" in refusal(lambda: open_model(folder))


@pytest.mark.parametrize("layers", [27, 28, 36])
def test_a_trimmed_pack_of_mflux_has_klein_s_taps(
    folder: Path, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mflux never normalizes what it taps, so 27 layers are enough; layers 27 to 35 are never read."""
    from dataclasses import replace

    monkeypatch.setitem(KLEIN, "vae", replace(KLEIN["vae"], norm_num_groups=4))
    deepen(folder, layers)
    pack = tmp_path / "pack"
    (folder / "tokenizer").rename(tmp_path / "tokenizer")
    for part in PARTS:
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        save(pack / part / "model.safetensors", to_mflux(part, read_weights(folder / part / f"{stem}.safetensors")))
    (tmp_path / "tokenizer").rename(pack / "tokenizer")
    source = open_model(pack)
    assert source.config.taps == (9, 18, 27)
    ours = open_model(convert_checkpoint(source, tmp_path / "ours"))
    assert ours.config.taps == (9, 18, 27)
    assert len(ours.weights("text_encoder")) == 27 * 11 + 1


# ---- the schedule ----


def edit_schedule(folder: Path, **changes: Any) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", lambda values: values.update(changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shift_terminal", 0.02),
        ("use_karras_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_beta_sigmas", True),
        ("use_flow_sigmas", True),
        ("invert_sigmas", True),
        ("stochastic_sampling", True),
        ("num_train_timesteps", 500),
        ("_class_name", "FlowMatchHeunDiscreteScheduler"),
        ("time_shift_type", "cubic"),
        ("use_dynamic_shifting", "yes"),
        ("shift", -1.0),
    ],
)
def test_a_schedule_that_is_not_followed_is_refused_by_key_and_value(folder: Path, key: str, value: Any) -> None:
    edit_schedule(folder, **{key: value})
    told = refusal(lambda: open_model(folder))
    assert told.startswith(f"{folder / 'scheduler' / 'scheduler_config.json'}: {key} is {value!r}")


@pytest.mark.parametrize(
    ("changes", "shift"),
    [
        ({}, "exponential"),
        ({"shift_terminal": 0, "base_shift": 0.1, "max_shift": 2.0, "shift": 7.0}, "exponential"),
        ({"time_shift_type": "linear"}, "linear"),
        ({"use_dynamic_shifting": False}, 3.0),
        ({"use_dynamic_shifting": False, "shift": 1.0}, 1.0),
    ],
)
def test_a_schedule_that_is_followed_reaches_the_steps_and_every_copy(
    folder: Path, changes: dict[str, Any], shift: str | float, tmp_path: Path
) -> None:
    edit_schedule(folder, **changes)
    assert open_model(folder).config.time_shift == shift
    ours = open_model(convert_checkpoint(folder, tmp_path / "ours"))
    assert ours.config.time_shift == shift
    assert open_model(export_diffusers(ours, tmp_path / "theirs")).config.time_shift == shift


def test_what_the_scheduler_leaves_out_is_diffusers_default_and_no_scheduler_is_klein_s(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    assert open_model(folder).config.time_shift == 1.0
    (folder / "scheduler" / "scheduler_config.json").unlink()
    assert open_model(folder).config.time_shift == "exponential"


def test_shifts_of_the_levels() -> None:
    assert make_sigmas(1024, 2, time_shift=1.0) == [1.0, 0.5, 0.0]
    assert make_sigmas(1024, 2, time_shift=3.0) == pytest.approx([1.0, 0.75, 0.0])
    mu = empirical_mu(1024, 2)
    assert make_sigmas(1024, 2, time_shift="linear") == pytest.approx([1.0, mu / (mu + 1), 0.0])


def test_klein_json_may_state_a_shift(folder: Path, tmp_path: Path) -> None:
    edit_schedule(folder, time_shift_type="linear")
    ours = convert_checkpoint(folder, tmp_path / "ours")
    for wrong in (0, -3, True, "cubic", [1]):
        edit_json(ours / "klein.json", lambda values, wrong=wrong: values.update(time_shift=wrong))
        assert "time_shift is" in refusal(lambda: open_model(ours))
    mx.clear_cache()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("sharded", ["", ".safetensors.index.fp16.json", ".fp16.safetensors.index.json"])
def test_files_that_state_their_precision(folder: Path, part: str, sharded: str) -> None:
    """`save_pretrained(variant="fp16")`: model.fp16.safetensors, or shards with an index, of either name."""
    weights: Any = open_model(folder).weights(part)
    right = {name: array.astype(mx.float16) for name, array in weights.items()}
    edit_weights(folder, part, lambda weights: weights.update({n: a.astype(mx.float16) for n, a in weights.items()}))
    path = weight_file(folder, part)
    if sharded:
        index = json.loads(shard(folder, part).read_text())
        for name in set(index["weight_map"].values()):
            (path.parent / name).rename(path.parent / name.replace("-0", ".fp16-0", 1))
        index["weight_map"] = {key: name.replace("-0", ".fp16-0", 1) for key, name in index["weight_map"].items()}
        path.with_name(f"{path.name}.index.json").unlink()
        path.with_name(f"{path.stem}{sharded}").write_text(json.dumps(index))
    else:
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    assert_equal(open_model(folder).weights(part), right)  # type: ignore[arg-type]
    assert_equal(open_model(GOLDEN, parts={part: folder / part}).weights(part), right)  # type: ignore[arg-type]
    save(path.with_name(f"{path.stem}.bf16.safetensors"), {"x": mx.zeros(1)})
    told = refusal(lambda: open_model(folder).weights(part))
    held = f"{path.stem}{sharded or '.fp16.safetensors'}"
    assert told == f"{path.parent}: holds {path.stem}.bf16.safetensors and {held}; keep the one that you want"
    save(path, {})
    assert "missing" in refusal(lambda: open_model(folder).weights(part)), "the plain file comes first"
