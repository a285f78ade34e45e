"""The checker on rendered pictures: right on right ones, also blurred and noisy, wrong on wrong ones."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "examples" / "tiny")]

import captions  # noqa: E402  # pyright: ignore[reportMissingImports]
import checker  # noqa: E402
import world  # noqa: E402  # pyright: ignore[reportMissingImports]


def blurred(picture: np.ndarray, sigma: float = 1.0, noise: float = 5.0) -> np.ndarray:
    """As from an imperfect autoencoder (about 30 dB): Gaussian blur of `sigma` pixels and Gaussian noise."""
    kernel = np.exp(-(np.arange(-4, 5) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    x = np.pad(picture.astype(np.float64), ((4, 4), (4, 4), (0, 0)), mode="edge")
    x = np.sum([kernel[i] * x[i : i + 128] for i in range(9)], axis=0)
    x = np.sum([kernel[i] * x[:, i : i + 128] for i in range(9)], axis=0)
    x += np.random.default_rng(0).normal(0, noise, x.shape)
    return np.clip(x, 0, 255).astype(np.uint8)


def exact(picture: np.ndarray) -> np.ndarray:
    return picture


def single(kind: str = "circle", colour: str = "red", size: str = "large", background: str = "blue") -> world.Scene:
    return world.Scene(background, (world.Shape(kind, colour, size, 64, 64),))


def test_the_palettes_agree() -> None:
    assert checker.PALETTE == world.COLOURS
    assert checker.KINDS == world.KINDS


@pytest.mark.parametrize("spoil", [exact, blurred])
@pytest.mark.parametrize(("kind", "size"), list(product(world.KINDS, world.RADIUS)))
def test_every_shape_is_read_on_every_ground(kind: str, size: str, spoil) -> None:
    names = list(world.COLOURS)
    for i, colour in enumerate(names):
        for step in (1, 4, 7):
            scene = single(kind, colour, size, names[(i + step) % 10])
            assert checker.judge_scene(spoil(world.render(scene)), scene)["all"], scene


@pytest.mark.parametrize("spoil", [exact, blurred])
def test_pairs_are_read(spoil) -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        scene = world.random_scene(rng, 2)
        verdict = checker.judge_scene(spoil(world.render(scene)), scene)
        assert verdict["relation"]
        assert verdict["all"], scene


@pytest.mark.parametrize("other", [k for k in world.KINDS if k != "circle"])
def test_a_wrong_shape_is_wrong(other: str) -> None:
    verdict = checker.judge_scene(blurred(world.render(single(other))), single("circle"))
    assert verdict["kinds"] == [False]
    assert verdict["colours"] == [True]
    assert verdict["background"]
    assert not verdict["all"]


def test_every_pair_of_colours_is_told_apart() -> None:
    for shown, wanted in product(world.COLOURS, world.COLOURS):
        ground = next(c for c in world.COLOURS if c not in (shown, wanted))
        picture = world.render(single(colour=shown, background=ground))
        assert checker.judge_scene(picture, single(colour=wanted, background=ground))["colours"] == [shown == wanted]
        swapped = world.render(single(colour=ground, background=shown))
        verdict = checker.judge_scene(swapped, single(colour=ground, background=wanted))
        assert verdict["background"] == (shown == wanted)


def test_swapped_places_and_swapped_colours_are_wrong() -> None:
    a, b = world.Shape("star", "red", "small", 32, 64), world.Shape("ring", "white", "large", 96, 64)
    scene = world.Scene("black", (a, b))
    mirrored = world.render(world.Scene("black", (replace(a, x=96), replace(b, x=32))))
    verdict = checker.judge_scene(mirrored, scene)
    assert not verdict["relation"]
    assert verdict["kinds"] == [True, True]
    crossed = world.render(world.Scene("black", (replace(a, colour="white"), replace(b, colour="red"))))
    assert not checker.judge_scene(crossed, scene)["all"]


def test_too_few_and_too_many_shapes_are_wrong() -> None:
    scene = world.random_scene(np.random.default_rng(3), 2)
    fewer = replace(scene, shapes=scene.shapes[:1])
    for shown, wanted in ((fewer, scene), (scene, fewer), (replace(scene, shapes=()), scene)):
        verdict = checker.judge_scene(world.render(shown), wanted)
        assert not verdict["count"]
        assert not verdict["all"]


@pytest.mark.parametrize("kind", ["smear", "half"])
def test_a_shapeless_blob_is_no_shape(kind: str) -> None:
    picture = world.render(single())
    if kind == "half":
        picture[64:] = world.COLOURS["blue"]
    else:
        picture[60:68, 20:110] = world.COLOURS["red"]
        picture[30:40, 50:60] = world.COLOURS["red"]
    assert checker.judge_scene(picture, single())["kinds"] == [False]


def test_an_odd_colour_has_no_name() -> None:
    picture = world.render(single())
    picture[(picture == world.COLOURS["red"]).all(-1)] = (128, 128, 0)
    assert checker.read(picture).regions[0].colour == "unknown"


@pytest.mark.parametrize("spoil", [exact, blurred])
@pytest.mark.parametrize("kind", world.EDIT_KINDS)
def test_edits_are_judged(kind: str, spoil) -> None:
    rng = np.random.default_rng(5)
    for _ in range(12):
        scene = world.random_scene(rng, 2)
        before = world.render(scene)
        after = world.apply_edit(scene, world.random_edit(scene, kind, rng))
        truth = world.render(after)
        assert checker.judge_edit(spoil(truth), before, truth, after)["all"]
        assert not checker.judge_edit(before, before, truth, after)["all"]


def test_an_edit_must_leave_the_rest() -> None:
    a, b = world.Shape("star", "red", "small", 32, 64), world.Shape("ring", "white", "small", 96, 64)
    scene = world.Scene("black", (a, b))
    after = world.Scene("black", (replace(a, colour="green"), b))
    before, truth = world.render(scene), world.render(after)
    moved = world.render(world.Scene("black", (replace(a, colour="green"), replace(b, y=96))))
    grown = world.render(world.Scene("black", (replace(a, colour="green"), replace(b, size="large"))))
    faded = np.clip(truth.astype(np.int16) + 20, 0, 255).astype(np.uint8)
    assert not checker.judge_edit(moved, before, truth, after)["place"]
    assert not checker.judge_edit(grown, before, truth, after)["size"]
    assert not checker.judge_edit(faded, before, truth, after)["stays"]
    assert checker.stay_error(truth, before, truth) == 0.0


def test_held_out_combinations_never_train() -> None:
    rng = np.random.default_rng(7)
    for _ in range(300):
        scene = world.random_scene(rng)
        assert not world.is_held_out(scene)
        for kind in world.EDIT_KINDS:
            assert not world.is_held_out(world.apply_edit(scene, world.random_edit(scene, kind, rng)))
    combinations = [(k, c, b) for k in world.KINDS for c in world.COLOURS for b in world.COLOURS if c != b]
    assert sum(world.held_out(*one) for one in combinations) >= 0.1 * len(combinations)
    assert all(world.is_held_out(scene) for _, scene in captions.judged_captions(50, 0))
