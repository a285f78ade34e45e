"""The port against diffusers, run side by side on random weights of two sizes, in float32 on the CPU.

`tiny` is the committed model made again; `medium` has 0.18 G parameters and klein's head size and rotary axes. The
reference's tensors are made here, not read. On Linux MLX's own float32 matmul is slow: with
LD_PRELOAD=.../openblas-pthread/libblas.so.3 this file takes a minute, without it several.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from golden import cases, oracle, port

pytestmark = pytest.mark.parity

EMBEDS, BLOCKS, LATENTS, VAE = 1e-4, 1e-4, 5e-4, 1e-4
MEDIUM_RUNS = ("empty_prompt", "one_reference", "guided")


@pytest.fixture(scope="module")
def reference() -> Any:
    return oracle.import_reference()


class Both:
    """One model, both implementations."""

    def __init__(self, name: str, folder: Path, reference: Any):
        self.name, self.folder, self.reference = name, folder, reference
        self.pipe = reference.load(folder)
        self.port = port.Port(folder)
        self.text = reference.text(self.pipe)


@pytest.fixture(scope="module", params=["tiny", "medium"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, reference: Any) -> Iterator[Both]:
    import random_models

    folder = tmp_path_factory.mktemp(request.param)
    random_models.make(folder, getattr(random_models, request.param.upper()))
    with mx.stream(mx.cpu):
        yield Both(request.param, folder, reference)


@pytest.mark.parametrize("length", ["short", "long"])
def test_text(both: Both, length: str):
    prompts = cases.PROMPTS if length == "short" else tuple(cases.PROMPTS[i] for i in cases.LONG_PROMPTS)
    ours = port.text(both.port, prompts, cases.SHORT if length == "short" else cases.LONG)
    for key in ("input_ids", "attention_mask", "txt_ids"):
        np.testing.assert_array_equal(ours[key], both.text[f"{length}.{key}"])
    assert (
        _report(both, f"{length} prompt_embeds", ours["prompt_embeds"], both.text[f"{length}.prompt_embeds"]) <= EMBEDS
    )


def test_transformer(both: Both):
    wanted = both.reference.transformer(both.pipe, both.text["short.prompt_embeds"][[0, 2]])
    num_img = cases.GRID[0] * cases.GRID[1]
    for name, grids in (("plain", ()), ("references", cases.REFERENCE_GRIDS)):
        tensors = {key.removeprefix(f"{name}."): v for key, v in wanted.items() if key.startswith(f"{name}.")}
        np.testing.assert_array_equal(np.array(port.position_ids(cases.GRID, grids)), tensors["img_ids"])
        ours = port.transformer(both.port, tensors, num_img)
        tensors["velocity"] = tensors["velocity"][:, :num_img]
        for key, value in ours.items():
            assert _report(both, f"{name} {key}", value, tensors[key]) <= BLOCKS


def test_small_inputs(both: Both):
    wanted = {key.removeprefix("small."): v for key, v in both.reference.small_inputs(both.pipe).items()}
    for key, value in port.small_inputs(both.port, wanted).items():
        assert _report(both, f"small {key}", value, wanted[key]) <= BLOCKS


def test_vae(both: Both):
    wanted = both.reference.vae(both.pipe)
    ours = port.vae(both.port, wanted["pixels"], wanted["latents"])
    for key in ("z", "normalised", "denormalised", "decoded"):
        assert _report(both, key, ours[key], wanted[key]) <= VAE
    assert np.abs(ours["decoded_8bit"].astype(int) - wanted["decoded_8bit"]).max() <= 1


@pytest.mark.parametrize("name", cases.RUNS)
def test_run(both: Both, name: str):
    if both.name == "medium" and name not in MEDIUM_RUNS:
        pytest.skip("the tiny model covers it")
    wanted = {key.split(".")[1]: value for key, value in both.reference.runs(both.pipe, (name,)).items()}
    ours = port.run(both.port, name, wanted["noise"])
    assert _report(both, f"{name} latents", ours["latents"][-1], wanted["latents"][-1]) <= LATENTS
    assert np.abs(ours["images"].astype(int) - wanted["images"]).max() <= 1
    height, width = (16 * side for side in cases.RUNS[name].grid)
    assert ours["images"].shape[1:3] == (height, width)


def test_bfloat16_velocity(both: Both):
    """In bfloat16 the two agree as far as bfloat16 goes: closer to each other than 0.04 of the largest value, and the
    port no farther from the float32 result than twice the reference's own distance."""
    import torch

    half = both.reference.load(both.folder, torch.bfloat16)
    embeds = both.text["short.prompt_embeds"][[0, 2]]
    wanted = both.reference.transformer(half, embeds)
    exact = both.reference.transformer(both.pipe, embeds)["plain.velocity"]
    plain = {key.removeprefix("plain."): v for key, v in wanted.items() if key.startswith("plain.")}
    ours = port.transformer(port.Port(both.folder, mx.bfloat16), plain, cases.GRID[0] * cases.GRID[1])["velocity"]
    assert _report(both, "bfloat16 velocity", ours, plain["velocity"]) <= 0.04
    own = np.linalg.norm(plain["velocity"] - exact)
    print(f"{both.name} bfloat16 distance over the reference's own: {np.linalg.norm(ours - exact) / own:.2f}")
    assert np.linalg.norm(ours - exact) <= 2 * own


def _report(both: Both, what: str, ours: np.ndarray, wanted: np.ndarray) -> float:
    """The error, printed too (pytest -rP shows it)."""
    error = port.error(ours, wanted)
    print(f"{both.name} {what}: {error:.1e}")
    return error
