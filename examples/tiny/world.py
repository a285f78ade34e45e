"""The small world of the `tiny` checkpoint: scenes, pictures, edits and the held-out rule (words: captions.py).

A scene is a plain background with at most two shapes; a picture of it is 128 x 128. Everything random comes from a
`numpy.random.Generator` that is passed in. This file knows numpy and PIL only: no torch, no model, no checker.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

SIDE = 128
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (245, 220, 60),
    "orange": (245, 140, 30),
    "purple": (130, 50, 170),
    "cyan": (60, 210, 220),
    "pink": (250, 150, 190),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
KINDS = ("circle", "square", "triangle", "star", "ring", "cross")
RADIUS = {"small": 15, "large": 28}
# Centres lie on token boundaries (a token is 16 x 16 pixels), so a moved shape is exactly a moved pattern of tokens.
PLACES: dict[str, tuple[int, int]] = {
    "centre": (64, 64),
    "left": (32, 64),
    "right": (96, 64),
    "top": (64, 32),
    "bottom": (64, 96),
    "top left": (32, 32),
    "top right": (96, 32),
    "bottom left": (32, 96),
    "bottom right": (96, 96),
}
GRID = (32, 48, 64, 80, 96)  # where centres lie: on token boundaries
EDIT_KINDS = ("recolour", "background", "remove", "replace")


@dataclass(frozen=True)
class Shape:
    """One shape; (x, y) is its centre in pixels, x to the right and y down."""

    kind: str
    colour: str
    size: str
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """A background colour and zero to two shapes that do not overlap."""

    background: str
    shapes: tuple[Shape, ...] = ()


@dataclass(frozen=True)
class Edit:
    """One change of a scene: `kind` of EDIT_KINDS, `index` of the shape, `value` the new colour or kind."""

    kind: str
    index: int = 0
    value: str = ""


# --- pictures -------------------------------------------------------------------------------------------------------


def _outline(kind: str) -> list[tuple[float, float]]:
    """The corners of a polygonal shape in a box of [-1, 1] x [-1, 1], y down."""
    if kind == "square":
        return [(-0.87, -0.87), (0.87, -0.87), (0.87, 0.87), (-0.87, 0.87)]
    if kind == "triangle":
        return [(0.0, -0.97), (1.0, 0.85), (-1.0, 0.85)]
    if kind == "star":
        angles = np.pi * (np.arange(10) / 5 - 0.5)
        radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.48)
        return [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, angles, strict=True)]
    w = 0.33
    return [
        *[(-w, -1.0), (w, -1.0), (w, -w), (1.0, -w), (1.0, w), (w, w)],
        *[(w, 1.0), (-w, 1.0), (-w, w), (-1.0, w), (-1.0, -w), (-w, -w)],
    ]


@cache
def silhouette(kind: str, size: str) -> np.ndarray:
    """Coverage (64, 64) float32 in [0, 1] of a shape centred in the box."""
    scale, box = 8, 64
    canvas = Image.new("L", (box * scale, box * scale), 0)
    draw = ImageDraw.Draw(canvas)
    middle, radius = box * scale / 2, RADIUS[size] * scale
    if kind in ("circle", "ring"):
        draw.ellipse([middle - radius, middle - radius, middle + radius, middle + radius], fill=255)
        if kind == "ring":
            hole = 0.55 * radius
            draw.ellipse([middle - hole, middle - hole, middle + hole, middle + hole], fill=0)
    else:
        draw.polygon([(middle + radius * x, middle + radius * y) for x, y in _outline(kind)], fill=255)
    return np.asarray(canvas.resize((box, box), Image.Resampling.BOX), dtype=np.float32) / 255


def shape_mask(shape: Shape) -> np.ndarray:
    """Coverage (128, 128) float32 in [0, 1] of one shape."""
    mask = np.zeros((SIDE, SIDE), np.float32)
    mask[shape.y - 32 : shape.y + 32, shape.x - 32 : shape.x + 32] = silhouette(shape.kind, shape.size)
    return mask


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene: (128, 128, 3) uint8."""
    picture = np.empty((SIDE, SIDE, 3), np.float32)
    picture[:] = COLOURS[scene.background]
    for shape in scene.shapes:
        mask = shape_mask(shape)[..., None]
        picture += mask * (np.asarray(COLOURS[shape.colour], np.float32) - picture)
    return np.rint(picture).astype(np.uint8)


# --- which scenes there are -----------------------------------------------------------------------------------------


def held_out(kind: str, colour: str, background: str) -> bool:
    """Whether a combination never occurs in training: one in eight; every pair of the three is still seen."""
    names = list(COLOURS)
    return (3 * KINDS.index(kind) + names.index(colour) + 5 * names.index(background)) % 8 == 0


def is_held_out(scene: Scene) -> bool:
    """Whether any shape of the scene is a held-out combination with its background."""
    return any(held_out(shape.kind, shape.colour, scene.background) for shape in scene.shapes)


def is_valid(scene: Scene) -> bool:
    """Whether all colours of the scene differ: background and shapes."""
    colours = [scene.background, *(shape.colour for shape in scene.shapes)]
    return len(set(colours)) == len(colours)


def _pick(rng: np.random.Generator, options: tuple | list) -> str:
    return options[int(rng.integers(len(options)))]


def random_scene(rng: np.random.Generator, count: int | None = None, held: bool = False) -> Scene:
    """A random scene of `count` shapes (None: one or two); of two, the left or upper one comes first.

    held: False gives only scenes allowed in training; True gives scenes whose first shape is a held-out combination.
    """
    count = int(rng.integers(1, 3)) if count is None else count
    while True:
        if count == 2:
            lane = (32, 64, 64, 96)[int(rng.integers(4))]
            centres = [(32, lane), (96, lane)] if rng.random() < 0.6 else [(lane, 32), (lane, 96)]
        else:
            centres = [(GRID[int(rng.integers(5))], GRID[int(rng.integers(5))])]
            if rng.random() < 0.4:
                centres = [PLACES[_pick(rng, tuple(PLACES))]]
        colours = list(COLOURS)
        shapes = tuple(
            Shape(_pick(rng, KINDS), _pick(rng, colours), _pick(rng, ("small", "large")), x, y)
            for x, y in centres[:count]
        )
        scene = Scene(_pick(rng, colours), shapes)
        first = bool(shapes) and held_out(shapes[0].kind, shapes[0].colour, scene.background)
        if is_valid(scene) and (first if held else not is_held_out(scene)):
            return scene


# --- edits ----------------------------------------------------------------------------------------------------------


def apply_edit(scene: Scene, edit: Edit) -> Scene:
    """The scene after the edit."""
    if edit.kind == "background":
        return replace(scene, background=edit.value)
    shapes = list(scene.shapes)
    if edit.kind == "remove":
        del shapes[edit.index]
    else:
        field = "colour" if edit.kind == "recolour" else "kind"
        shapes[edit.index] = replace(shapes[edit.index], **{field: edit.value})
    return replace(scene, shapes=tuple(shapes))


def inverse_edit(scene: Scene, edit: Edit) -> Edit | None:
    """The edit that leads from apply_edit(scene, edit) back to scene; a removal has none."""
    if edit.kind == "remove":
        return None
    shape = scene.shapes[edit.index]
    old = {"background": scene.background, "recolour": shape.colour, "replace": shape.kind}[edit.kind]
    return replace(edit, value=old)


def random_edit(scene: Scene, kind: str, rng: np.random.Generator, held: bool = False) -> Edit:
    """A random edit of one kind with a valid result; held: as in random_scene, but for any shape of the result.

    Removals, and scenes for which no held-out result exists, give a result that is allowed in training.
    """
    indices = range(len(scene.shapes)) if kind != "background" else (0,)
    values = {"recolour": tuple(COLOURS), "background": tuple(COLOURS), "replace": KINDS, "remove": ("",)}[kind]
    options = []
    for index, value in product(indices, values):
        edit = Edit(kind, index, value)
        result = apply_edit(scene, edit)
        if result != scene and is_valid(result):
            options.append((is_held_out(result), edit))
    wanted = [edit for is_held, edit in options if is_held == held] or [edit for _, edit in options]
    return wanted[int(rng.integers(len(wanted)))]


def combine(first: Scene, second: Scene) -> Scene:
    """The result of the two-reference task."""
    return replace(first, background=second.background)
