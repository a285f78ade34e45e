"""LoRAs as the trainers write them: applied in full, to the right rows, with the right strength; those of other models
refused by what they are."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from folders import refusal
from real_loras import effects, records, vector, write

from klein_mlx.config import ModelConfig
from klein_mlx.formats.describe import describe_lora
from klein_mlx.formats.lora import open_lora, read_lora
from klein_mlx.formats.names import HALVES, TRANSFORMER
from klein_mlx.formats.part import KLEIN
from klein_mlx.weights.lora import Change, Full, Kronecker, LowRank

KLEIN_4B = ModelConfig(KLEIN["transformer"], KLEIN["text_encoder"], KLEIN["vae"], True, (9, 18, 27))
TRAINERS, FOREIGN = records("trainers_4b"), records("foreign_models")
REFUSED = "OneTrainer OFT (oft_R.weight)"
# One block of each kind and all that is in none: the others are alike, and a file of whole differences is large.
ONE_BLOCK = r"blocks[._]0[._]|^(?!.*blocks)"


def times(change: Change) -> np.ndarray:
    """A change's difference times `vector`, without making the difference."""
    delta = change.delta
    if isinstance(delta, LowRank):
        x = mx.array(vector(delta.down.shape[1]))
        return np.array(delta.factor * (delta.up.astype(mx.float32) @ (delta.down.astype(mx.float32) @ x)))
    if isinstance(delta, Kronecker):
        left, right = delta.left.astype(mx.float32), delta.right.astype(mx.float32)
        x = mx.array(vector(left.shape[1] * right.shape[1])).reshape(left.shape[1], right.shape[1])
        whole = np.array(delta.factor * (left @ x @ right.T).reshape(-1))
        return whole if delta.rows is None else np.concatenate([whole[a:b] for a, b in delta.rows])
    assert isinstance(delta, Full)
    return np.array(delta.dense() @ mx.array(vector(delta.difference.shape[1])))


def our_path(theirs: str) -> tuple[str, bool]:
    """Our path of one of diffusers' modules, and whether its halves are swapped here."""
    words = theirs.split(".")
    index = next((word for word in words if word.isdigit() and words[words.index(word) - 1].endswith("blocks")), "*")
    generic = theirs.replace(f"blocks.{index}.", "blocks.*.")
    rule = next(rule for rule in TRANSFORMER if rule.theirs == generic)
    return rule.ours.replace("*", index), rule.layout == HALVES


@pytest.mark.parametrize("title", [title for title in TRAINERS if title != REFUSED])
def test_a_trainer_s_lora_is_applied_in_full(title: str, tmp_path: Path) -> None:
    """Every module of the whole file finds its place; those of one block have the differences that the factors say,
    to float32's rounding of sums of up to 12288 products."""
    record = TRAINERS[title]
    tensors = write(tmp_path / "lora.safetensors", record, only=ONE_BLOCK)
    lora = read_lora(tmp_path / "lora.safetensors", KLEIN_4B)
    right = effects(tensors, record["metadata"])
    assert {our_path(theirs)[0] for theirs in right} == set(lora.changes["transformer"])
    for theirs, effect in right.items():
        path, swapped = our_path(theirs)
        changes = lora.changes["transformer"][path]
        found, wanted = sum(times(change) for change in changes), effect.times
        if swapped:
            wanted = np.concatenate(np.split(wanted, 2)[::-1])
        assert np.abs(found - wanted).max() <= 2e-5 * np.abs(wanted).max(), path
        magnitude = changes[0].magnitude
        assert (magnitude is None) == (effect.magnitude is None), path
        if magnitude is not None:
            assert np.array_equal(np.array(magnitude.astype(mx.float32)), effect.magnitude), path
    assert lora.unused == ()


def header(path: Path, record: dict[str, Any]) -> Path:
    """The whole record as a file of zeros that takes no space on disk."""
    from folders import raw_safetensors

    sizes, entries, end = {"F16": 2, "BF16": 2, "F32": 4}, {}, 0
    for name, spec in record["tensors"].items():
        dtype, shape = (record["dtype"], spec) if "dtype" in record else spec
        start, end = end, end + sizes[dtype] * int(np.prod(shape, dtype=np.int64))
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    if record["metadata"]:
        entries["__metadata__"] = record["metadata"]
    start = raw_safetensors(entries)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + end)
    return path


@pytest.mark.parametrize("title", [title for title in TRAINERS if title != REFUSED])
def test_every_name_of_a_trainer_s_lora_has_a_place(title: str, tmp_path: Path) -> None:
    file = open_lora(header(tmp_path / "lora.safetensors", TRAINERS[title]))
    assert file.unknown == file.homeless == ()
    assert file.foreign is None
    assert file.base.name in (None, "FLUX.2 [klein] 4B")
    assert file.contradiction is None


def test_oft_is_refused_by_name(tmp_path: Path) -> None:
    path = header(tmp_path / "lora.safetensors", TRAINERS[REFUSED])
    assert refusal(lambda: open_lora(path)) == (
        f"{path}: is OFT; klein_mlx applies LoRA, DoRA, LoHa, LoKr and full differences"
    )


WORDS = {"anima": "Anima", "flux": "FLUX.1", "krea2": "Krea 2", "qwen": "Qwen-Image"}
UNTOLD = "qwen_image_lora_diffusers_format"  # three modules whose names and shapes klein has too


@pytest.mark.parametrize("title", [title for title in FOREIGN if title != UNTOLD])
def test_another_model_s_lora_is_refused_by_what_it_is(title: str, tmp_path: Path) -> None:
    file = header(tmp_path / "lora.safetensors", FOREIGN[title])
    assert f"is a LoRA for {WORDS[title.split('_')[0]]}" in refusal(lambda: read_lora(file, KLEIN_4B))


@pytest.mark.parametrize(
    ("key", "value", "model"),
    [
        ("modelspec.architecture", "qwen-image/lora", "Qwen-Image"),
        ("modelspec.architecture", "Qwen-Image-Edit-2511/lora", "Qwen-Image"),
        ("ss_base_model_version", "qwen_image", "Qwen-Image"),
        ("ss_base_model_version", "flux1", "FLUX.1"),
        ("modelspec.architecture", "flux-1-dev/lora", "FLUX.1"),
        ("modelspec.architecture", "hunyuan-video", "HunyuanVideo"),
    ],
)
def test_what_the_metadata_states_decides_where_shapes_do_not(key: str, value: str, model: str, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    write(file, {**FOREIGN[UNTOLD], "metadata": {key: value}})
    line = refusal(lambda: read_lora(file, KLEIN_4B))
    assert f"is a LoRA for {model}, as its metadata states; this model is klein 4b" in line
    found = describe_lora(file)
    assert (found["stated_base"], found["base"]) == (model, f"{model}, as its metadata states")


def test_a_contradiction_is_told_where_shapes_decide(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    from klein_mlx.cli.main import main

    record = {**TRAINERS["diffusion-pipe"], "metadata": {"modelspec.architecture": "flux-1-dev/lora"}}
    file = tmp_path / "lora.safetensors"
    write(file, record, only=ONE_BLOCK)
    told = "its metadata states FLUX.1; its shapes are those of FLUX.2 [klein] 4B (hidden size 3072)"
    assert read_lora(file, KLEIN_4B).contradiction == told
    assert main(["lora", "info", str(file)]) == 0
    assert f"  states   FLUX.1\n  beware   {told}\n" in capsys.readouterr().out


@pytest.mark.parametrize("stated", ["Flux.2-klein-4b/lora", "flux2_klein_4b", "FLUX.2-klein-base-4B", "flux2", "", "x"])
def test_what_agrees_or_says_nothing_is_no_contradiction(stated: str, tmp_path: Path) -> None:
    record = {**TRAINERS["diffusion-pipe"], "metadata": {"modelspec.architecture": stated}}
    file = open_lora(header(tmp_path / "lora.safetensors", record))
    assert (file.contradiction, file.foreign, file.base.name) == (None, None, "FLUX.2 [klein] 4B")
