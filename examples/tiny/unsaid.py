"""What a prompt leaves open is decided by the noise: the rule that makes a seed matter.

Every place has a token, the upper left one of the four around it. Of the starting noise at these tokens,
- channel 0 says where the shapes are: at the place, or the pair of places, where it is largest;
- channel 1 says how large a shape is, by its value at the shape's token; channel 2, which colour it has.

Training draws the scene first and then noise that means it, so that a prompt and its noise determine the picture, and
the student can learn it by plain regression. Where a value lies next to a border, or two places are nearly equal,
either is right: `meant` lists them, and training takes the one that the student is nearer to, instead of a blend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from statistics import NormalDist

import numpy as np
from world import GRID, Scene, Shape

TOKENS, ROW = 64, 8
NEAR = 0.6  # how far from a border, or from the largest value, another choice is right as well
OPEN_COLOURS = ("red", "blue", "yellow", "green")
OPEN_BACKGROUND = "white"
SIZES = (("small", 0.4), ("large", 0.6))
PLACE, SIZE, COLOUR = 0, 1, 2  # channels
NORMAL = NormalDist()
Centre = tuple[int, int]


def token_of(centre: Centre) -> int:
    """The token of a place: its upper left one."""
    return (centre[1] // 16 - 1) * ROW + centre[0] // 16 - 1


def layouts(scene: Scene, free: frozenset[str]) -> list[tuple[Centre, ...]]:
    """Where the shapes may be, for a caption that leaves `free` open."""
    if len(scene.shapes) == 1 and "place" in free:
        return [((x, y),) for y, x in product(GRID, GRID)]
    if len(scene.shapes) == 2 and "lane" in free:
        across = scene.shapes[0].y == scene.shapes[1].y
        found: list[tuple[Centre, ...]] = []
        for lane in (32, 64, 96):
            found += [((32, lane), (96, lane))] if across or "axis" in free else []
            found += [((lane, 32), (lane, 96))] if not across or "axis" in free else []
        return found
    return [tuple((shape.x, shape.y) for shape in scene.shapes)]


def _scores(noise: np.ndarray, choices: Sequence[tuple[Centre, ...]]) -> np.ndarray:
    each = [[noise[token_of(centre), PLACE] for centre in centres] for centres in choices]
    return np.array([sum(values) / max(1, len(values)) ** 0.5 for values in each])


def _borders(options: Sequence[tuple[str, float]]) -> list[float]:
    total = sum(share for _, share in options)
    sums = np.cumsum([share / total for _, share in options])[:-1]
    return [-np.inf, *(NORMAL.inv_cdf(float(s)) for s in sums), np.inf]


def _near(value: float, options: Sequence[tuple[str, float]]) -> list[str]:
    """The options that a standard normal number may mean, the right one first."""
    borders = _borders(options)
    at = int(np.searchsorted(borders[1:-1], value))
    found = [options[at][0]]
    found += [options[at - 1][0]] if value - borders[at] < NEAR else []
    found += [options[at + 1][0]] if borders[at + 1] - value < NEAR else []
    return found


def _colours(scene: Scene) -> list[tuple[str, float]]:
    return [(colour, 1.0) for colour in OPEN_COLOURS if colour != scene.background]


def meant(scene: Scene, free: frozenset[str], noise: np.ndarray) -> list[Scene]:
    """The scenes that noise (TOKENS, channels) may mean for a caption of `scene` that leaves `free` open, the right one
    first."""
    choices = layouts(scene, free)
    scores = _scores(noise, choices)
    found: list[Scene] = []
    for at in np.argsort(-scores, kind="stable"):
        if scores[at] < scores.max() - NEAR:
            break
        options: list[list[Shape]] = []
        for i, (shape, centre) in enumerate(zip(scene.shapes, choices[at], strict=True)):
            own = noise[token_of(centre)]
            sizes = _near(own[SIZE], SIZES) if f"size{i}" in free else [shape.size]
            colours = _near(own[COLOUR], _colours(scene)) if "colour" in free else [shape.colour]
            options.append([Shape(shape.kind, colour, size, *centre) for size, colour in product(sizes, colours)])
        found += [replace(scene, shapes=shapes) for shapes in product(*options)]
    return found


def _impose(value: str, options: Sequence[tuple[str, float]], rng: np.random.Generator) -> float:
    """A standard normal number, given that it means `value`."""
    borders = _borders(options)
    at = [name for name, _ in options].index(value)
    low, high = NORMAL.cdf(borders[at]), NORMAL.cdf(borders[at + 1])
    return NORMAL.inv_cdf(float(np.clip(rng.uniform(low, high), 1e-6, 1 - 1e-6)))


def impose(scene: Scene, free: frozenset[str], noise: np.ndarray, rng: np.random.Generator) -> None:
    """Change standard normal noise, in place, into noise that means the scene; its distribution given that is exact."""
    choices = layouts(scene, free)
    wanted = choices.index(tuple((shape.x, shape.y) for shape in scene.shapes)) if scene.shapes else 0
    while (largest := int(_scores(noise, choices).argmax())) != wanted:
        if len(scene.shapes) == 1:  # exchangeable: the largest value changes places with the wanted one's
            tokens = [token_of(choices[i][0]) for i in (largest, wanted)]
            noise[tokens, PLACE] = noise[tokens[::-1], PLACE]
        else:
            noise[:, PLACE] = rng.standard_normal(len(noise))
    for i, shape in enumerate(scene.shapes):
        own = noise[token_of((shape.x, shape.y))]
        if f"size{i}" in free:
            own[SIZE] = _impose(shape.size, SIZES, rng)
        if "colour" in free:
            own[COLOUR] = _impose(shape.colour, _colours(scene), rng)
