"""What a prompt leaves open is decided by the noise: the rule that makes a seed matter.

The mean of one channel of the starting noise, over all tokens and times the square root of their number, is a standard
normal number. Each attribute that a caption can leave open (place, sizes, ...) has a channel of its own, and its value
is the option in whose share of the normal distribution that number falls. Training draws the scene first and then noise
that means it, so that a prompt and its noise determine the picture, and the student can learn it by plain regression.

Where the number lies next to a border between two options, both are right: `Drawn.scenes` lists them, and the training
takes the one that the student is nearer to, instead of a blend.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from statistics import NormalDist

import numpy as np
from world import GRID, Scene

TOKENS = 64
NEAR = 0.25  # how far from a border, in standard deviations, its other side is right as well
OPEN_COLOURS = ("red", "blue", "yellow", "green")
OPEN_BACKGROUNDS = ("white", "black", "cyan", "pink")
NORMAL = NormalDist()
# attribute: (channel, options, their shares)
RULES: dict[str, tuple[int, tuple, tuple[float, ...]]] = {
    "x": (0, GRID, (0.2, 0.2, 0.2, 0.2, 0.2)),
    "y": (1, GRID, (0.2, 0.2, 0.2, 0.2, 0.2)),
    "size0": (2, ("small", "large"), (0.4, 0.6)),
    "size1": (3, ("small", "large"), (0.4, 0.6)),
    "lane": (4, (32, 64, 96), (0.25, 0.5, 0.25)),
    "axis": (5, ("across", "down"), (0.6, 0.4)),
    "colour": (7, OPEN_COLOURS, (0.25, 0.25, 0.25, 0.25)),
    "background": (6, OPEN_BACKGROUNDS, (0.55, 0.15, 0.15, 0.15)),
}


@dataclass(frozen=True)
class Drawn:
    """Numbers of the channels {channel: standard normal}, and the scenes they may mean; the first is the one meant."""

    numbers: dict[int, float]
    scenes: tuple[Scene, ...]


def values_of(scene: Scene) -> dict[str, object]:
    """The scene's value of every attribute that can be open."""
    values: dict[str, object] = {"background": scene.background}
    values |= {f"size{i}": shape.size for i, shape in enumerate(scene.shapes)}
    if not scene.shapes:
        return values
    first = scene.shapes[0]
    if len(scene.shapes) == 1:
        return values | {"x": first.x, "y": first.y, "colour": first.colour}
    across = first.y == scene.shapes[1].y
    return values | {"axis": "across" if across else "down", "lane": first.y if across else first.x}


def with_values(scene: Scene, values: dict) -> Scene:
    """The scene with these values of all its attributes."""
    shapes = [replace(shape, size=values[f"size{i}"]) for i, shape in enumerate(scene.shapes)]
    if len(shapes) == 1:
        shapes = [replace(shapes[0], x=values["x"], y=values["y"], colour=values["colour"])]
    elif shapes:
        ends = [(end, values["lane"]) for end in (32, 96)]
        shapes = [
            replace(shape, x=x, y=y) if values["axis"] == "across" else replace(shape, x=y, y=x)
            for shape, (x, y) in zip(shapes, ends, strict=True)
        ]
    return Scene(values["background"], tuple(shapes))


def _rule(name: str, scene: Scene) -> tuple[int, list, list[float]]:
    """Channel, options and the borders between them (one more than options) of an attribute."""
    channel, options, shares = RULES[name]
    used = {shape.colour for shape in scene.shapes} if name == "background" else set()
    used |= {scene.background} if name == "colour" else set()
    kept = [(option, share) for option, share in zip(options, shares, strict=True) if option not in used]
    total, sum_, borders = sum(share for _, share in kept), 0.0, [-np.inf]
    for _, share in kept[:-1]:
        sum_ += share / total
        borders.append(NORMAL.inv_cdf(sum_))
    return channel, [option for option, _ in kept], [*borders, np.inf]


def draw(scene: Scene, free: frozenset[str], rng: np.random.Generator) -> Drawn:
    """Numbers that mean the scene, for a caption that leaves `free` open."""
    values = values_of(scene)
    numbers: dict[int, float] = {}
    choices: list[tuple[str, list]] = []
    for name in sorted((free - {"place"}) | ({"x", "y"} if "place" in free else set())):
        channel, options, borders = _rule(name, scene)
        at = options.index(values[name])
        low, high = NORMAL.cdf(borders[at]), NORMAL.cdf(borders[at + 1])
        number = NORMAL.inv_cdf(float(np.clip(rng.uniform(low, high), 1e-6, 1 - 1e-6)))
        numbers[channel] = number
        near = [options[at]]
        if at > 0 and number - borders[at] < NEAR:
            near.append(options[at - 1])
        if at + 1 < len(options) and borders[at + 1] - number < NEAR:
            near.append(options[at + 1])
        choices.append((name, near))
    names = [name for name, _ in choices]
    scenes = [
        with_values(scene, values | dict(zip(names, picked, strict=True)))
        for picked in product(*(c for _, c in choices))
    ]
    return Drawn(numbers, tuple(scenes))


def meant(scene: Scene, free: frozenset[str], noise: np.ndarray) -> Scene:
    """The scene that noise (tokens, channels) means for a caption of `scene` that leaves `free` open."""
    values = values_of(scene)
    for name in sorted((free - {"place"}) | ({"x", "y"} if "place" in free else set())):
        channel, options, borders = _rule(name, scene)
        number = float(noise[:, channel].mean()) * len(noise) ** 0.5
        values[name] = options[int(np.searchsorted(borders[1:-1], number))]
    return with_values(scene, values)


def imprint(noise: np.ndarray, numbers: dict[int, float]) -> None:
    """Give noise (TOKENS, channels), in place, the channel means that these numbers stand for."""
    for channel, number in numbers.items():
        noise[:, channel] += number / TOKENS**0.5 - noise[:, channel].mean()
