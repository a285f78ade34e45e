"""Training teaches: after less than a minute, unseen prompts are drawn as the pictures that were shown.

Every case draws the 24 prompts of `silhouettes.right`, of which none is right before; how many were right when it was
measured stands beside how many must be.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import silhouettes
import train_lora
from adherence import prompts

from klein_mlx import KleinPipeline
from klein_mlx.train import TrainOptions, TrainStep, train
from klein_mlx.train.loop import Done

pytestmark = pytest.mark.slow

BASE = Path(train_lora.__file__).parent / "base"
LORA: dict[str, Any] = {"rank": 4, "learning_rate": 2e-3, "batch": 8, "accumulate": 1, "sigmas": "shifted"}
TWICE = {"batch": 4, "accumulate": 2}
FULL: dict[str, Any] = {"method": "full", "learning_rate": 3e-4, "batch": 8, "sigmas": "shifted"}


@pytest.mark.parametrize(
    ("pictures", "more", "least"),
    [
        pytest.param(24, {**LORA, "steps": 60}, 20, id="lora: 22"),
        pytest.param(24, {**LORA, "steps": 60, "method": "dora"}, 19, id="dora: 22"),
        pytest.param(24, {**LORA, "steps": 60, "bits": "4"}, 18, id="lora on 4 bits: 22"),
        pytest.param(8, {**LORA, "steps": 200, "batch": 4}, 16, id="8 pictures: 20"),
        pytest.param(24, {**FULL, "steps": 70}, 18, id="full: 21"),
        pytest.param(24, {**LORA, **TWICE, "steps": 60, "references": True}, 18, id="edits: 22"),
    ],
)
def test_it_learns(pictures: int, more: dict[str, Any], least: int, tmp_path: Path) -> None:
    more = dict(more)
    edits, full = more.pop("references", False), more.get("method") == "full"
    data = (silhouettes.make_pairs if edits else silhouettes.make)(tmp_path / "pictures", pictures)
    output = tmp_path / ("tuned" if full else "style.safetensors")
    options = TrainOptions(str(data), str(output), "tiny", resolution=128, hold_out="0", dropout=0.0, **more)
    *_, last = train(options)
    assert isinstance(last, Done)
    pipe = KleinPipeline.from_pretrained(output if full else "tiny", keep="all")
    if not full:
        assert silhouettes.right(pipe, 2, edits) == 0
        pipe.load_lora(output)
    assert silhouettes.right(pipe, 24, edits) >= least


def test_a_lora_of_the_base_works_on_the_distilled_model(tmp_path: Path) -> None:
    """As with klein: trained on 8-bit weights, with captions left out, and drawn in 4 steps without guidance; 22."""
    data, output = silhouettes.make(tmp_path / "pictures", 24), tmp_path / "style.safetensors"
    *_, last = train(TrainOptions(str(data), str(output), str(BASE), resolution=128, hold_out="0", steps=120, **LORA))
    assert isinstance(last, Done)
    pipe = KleinPipeline.from_pretrained("tiny", keep="all")
    pipe.load_lora(output)
    assert silhouettes.right(pipe, 24) >= 18


def test_the_base_follows_prompts_by_guidance() -> None:
    """Which it has from captions that were left out: of what is said of two shapes .73 is right without, .85 with."""
    pipe = KleinPipeline.from_pretrained(BASE, keep="all")
    assert (pipe.config.variant.guidance, pipe.config.is_distilled) == (4.0, False)

    def right(guidance: float) -> float:
        found = prompts(pipe, 32, num_inference_steps=20, guidance_scale=guidance)
        return (found["pair colour"] + found["pair shape"] + found["relation"]) / 3

    assert right(4.0) > right(1.0) + 0.05


def test_bfloat16_weights_learn_as_float32_ones(tmp_path: Path) -> None:
    """Full training at a rate of 1e-5, at which rounding to nearest would lose most of each update: the loss of updates
    51 to 100 was .8332 with stochastic rounding, .8330 by Kahan's sum, .8352 in float32, 1.179 rounded to nearest, and
    .8891 by a sum of Kahan whose weights are rounded to nearest."""
    data = silhouettes.make(tmp_path / "pictures", 8)
    options = TrainOptions(str(data), "", "tiny", resolution=128, hold_out="0", dropout=0.0, method="full", steps=100)

    def mean(**more: str) -> float:
        run = train(replace(options, output=str(tmp_path / "-".join(more.values())), **more))  # type: ignore[arg-type]
        losses = [event.loss for event in run if isinstance(event, TrainStep)]
        return sum(losses[50:]) / 50

    right = mean(dtype="float32")
    for rounding in ("stochastic", "kahan"):
        assert mean(dtype="bfloat16", rounding=rounding) == pytest.approx(right, rel=0.01)


def test_memory_does_not_grow(tmp_path: Path) -> None:
    """The peaks of updates 191 to 200 are those of updates 11 to 20. The smallest of each ten: arrays leave later where
    a machine is busy."""
    data = silhouettes.make(tmp_path / "pictures", 2)
    options = TrainOptions(str(data), str(tmp_path / "style.safetensors"), "tiny", resolution=64, hold_out="0")
    run = train(replace(options, rank=2, accumulate=1, steps=200, save_every=50))
    peaks = [event.peak for event in run if isinstance(event, TrainStep)]
    assert min(peaks[190:]) == pytest.approx(min(peaks[10:20]), rel=0.02)
