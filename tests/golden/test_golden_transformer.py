"""The transformer against diffusers' tensors: every block, the velocity, the position ids; and its eps."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from golden import cases, port
from golden.files import MODEL, load

IMAGE_TOKENS = cases.GRID[0] * cases.GRID[1]
CASES = {"plain": (), "references": cases.REFERENCE_GRIDS}


@pytest.fixture(scope="module")
def model() -> Iterator[port.Port]:
    with mx.stream(mx.cpu):  # the tolerances are the CPU's
        yield port.Port(MODEL)


@pytest.mark.parametrize("name", CASES)
def test_blocks_and_velocity(model: port.Port, name: str):
    """Two prompts in a batch, and one prompt with two references. 1e-4 of the largest value, in float32: the angles of
    the timestep's sinusoids reach 1000 radians, where a float32 has steps of 6e-5."""
    golden = load("transformer", name)
    ours = port.transformer(model, golden, IMAGE_TOKENS)
    reference = golden | {"velocity": golden["velocity"][:, :IMAGE_TOKENS]}
    errors = {key: port.error(value, reference[key]) for key, value in ours.items()}
    assert len(errors) == 5
    assert max(errors.values()) <= 1e-4, errors


@pytest.mark.parametrize("name", CASES)
def test_position_ids(name: str):
    golden = load("transformer", name)
    np.testing.assert_array_equal(np.array(port.position_ids(cases.GRID, CASES[name])), golden["img_ids"])


def test_reference_tokens_are_read(model: port.Port):
    """The golden case with references differs from the one without: else it could not show a wrong position."""
    golden = load("transformer", "references")
    without = golden | {key: golden[key][..., :IMAGE_TOKENS, :] for key in ("tokens", "img_ids")}
    velocity = port.transformer(model, without, IMAGE_TOKENS)["velocity"]
    assert port.error(velocity, golden["velocity"][:, :IMAGE_TOKENS]) > 0.01


def test_norms_of_q_and_k_use_the_configs_eps(model: port.Port):
    """With inputs of 1e-3, the mean square is as small as eps (1e-6): 1e-5 would give less than half the result."""
    transformer = model.part("transformer")
    x = mx.array(cases.normal((1, 3, 2, model.config.transformer.attention_head_dim), seed=5)) * 1e-3
    block, single = transformer.double_blocks[0], transformer.single_blocks[0]
    for norm in (block.img.norm_q, block.img.norm_k, block.txt.norm_q, block.txt.norm_k, single.norm_q, single.norm_k):
        values, weight = np.array(x, dtype=np.float64), np.array(norm.weight, dtype=np.float64)
        wanted = values / np.sqrt((values**2).mean(axis=-1, keepdims=True) + 1e-6) * weight
        assert port.error(np.array(norm(x)), wanted) <= 1e-5


def test_layer_norms_use_the_configs_eps(model: port.Port):
    """Blocks and the last layer on inputs whose mean square is eps (1e-6): 1e-5 would give less than half the scale."""
    golden = load("transformer", "small")
    for key, value in port.small_inputs(model, golden).items():
        assert port.error(value, golden[key]) <= 1e-4, key


def test_final_norm_scales_before_it_shifts(model: port.Port):
    """The final AdaLN's halves: the checkpoint stores (scale, shift), and a swap moves the velocity by its own size."""
    golden = load("transformer", "plain")
    mods = model.part("transformer").modulations(float(golden["sigma"][0]), mx.float32)
    shift, scale = mods.final
    assert port.error(np.array(scale - 1), np.array(shift)) > 0.5
