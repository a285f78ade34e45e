"""The small world of the `tiny` checkpoint: scenes, pictures, captions, edits and the held-out rule.

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


def is_captioned(scene: Scene) -> bool:
    """Whether a caption can tell the scene: two shapes must lie around the centre. Edits know all scenes."""
    return len(scene.shapes) < 2 or sum(s.x for s in scene.shapes) == sum(s.y for s in scene.shapes) == SIDE


def random_scene(rng: np.random.Generator, count: int | None = None, held: bool = False) -> Scene:
    """A random scene of `count` shapes (None: one or two).

    held: False gives only scenes allowed in training; True gives scenes whose first shape is a held-out combination.
    """
    count = int(rng.integers(1, 3)) if count is None else count
    while True:
        if count == 2:
            lane = (32, 64, 64, 64, 96)[int(rng.integers(5))]
            ends = [(32, lane), (96, lane)] if rng.random() < 0.5 else [(lane, 32), (lane, 96)]
            centres = ends if rng.random() < 0.5 else ends[::-1]
        else:
            names = list(PLACES)
            centres = [PLACES[_pick(rng, names[:5] if rng.random() < 0.7 else names[5:])]]
        colours = list(COLOURS)
        shapes = tuple(
            Shape(_pick(rng, KINDS), _pick(rng, colours), _pick(rng, ("small", "large")), x, y)
            for x, y in centres[:count]
        )
        scene = Scene(_pick(rng, colours), shapes)
        first = bool(shapes) and held_out(shapes[0].kind, shapes[0].colour, scene.background)
        if is_valid(scene) and (first if held else not is_held_out(scene)):
            return scene


# --- captions -------------------------------------------------------------------------------------------------------


def place_of(shape: Shape) -> str:
    """The name of a single shape's place."""
    return next(name for name, centre in PLACES.items() if centre == (shape.x, shape.y))


def relation(scene: Scene) -> str:
    """Where the first of two shapes lies from the second: "left of", "right of", "above" or "below"."""
    a, b = scene.shapes
    if a.y == b.y:
        return "left of" if a.x < b.x else "right of"
    return "above" if a.y < b.y else "below"


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
ON_BACKGROUND = (
    "{what} on a {b} background",
    "{what} on {b}",
    "{what}, {b} background",
    "a {b} background with {what}",
    "on a {b} background, {what}",
    "a {b} picture with {what}",
    "{what} in front of a {b} backdrop",
    "a picture of {what} on a {b} background",
    "draw {what} on a {b} background",
)


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _noun(shape: Shape, rng: np.random.Generator) -> str:
    said = shape.size == "small" or rng.random() < 0.4
    size = _pick(rng, SIZE_WORDS[shape.size]) + " " if said else ""
    return f"{size}{shape.colour} {shape.kind}"


def _place_words(shape: Shape, rng: np.random.Generator) -> str:
    place = place_of(shape)
    if place == "centre":
        place = _pick(rng, ("centre", "center", "middle"))
        return _pick(rng, (f"in the {place}", f"at the {place}"))
    return _pick(rng, (f"on the {place}", f"at the {place}", f"in the {place}"))


def _finish(words: str, rng: np.random.Generator) -> str:
    if rng.random() < 0.2:
        words = words[0].upper() + words[1:]
    return words + ("." if rng.random() < 0.2 else "")


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of many wordings for a scene that `is_captioned`.

    What is left unsaid is the usual: large, in the centre (two shapes: around it), on white.
    """
    b = scene.background
    if not scene.shapes:
        words = _pick(rng, (f"a plain {b} background", f"an empty {b} picture", f"nothing on a {b} background"))
        return _finish(words.replace("a orange", "an orange"), rng)
    if len(scene.shapes) == 1:
        what = _article(_noun(scene.shapes[0], rng))
        if place_of(scene.shapes[0]) != "centre" or rng.random() < 0.4:
            what += " " + _place_words(scene.shapes[0], rng)
    else:
        a, c = scene.shapes
        link = relation(scene)
        if rng.random() < 0.5:
            a, c, link = c, a, OPPOSITE[link]
        what = f"{_article(_noun(a, rng))} {_pick(rng, RELATION_WORDS[link])} {_article(_noun(c, rng))}"
    if b == "white" and rng.random() < 0.3:
        return _finish(what, rng)
    words = _pick(rng, ON_BACKGROUND).format(what=what, b=b)
    return _finish(words.replace("a orange", "an orange"), rng)


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


def _refer(scene: Scene, index: int, rng: np.random.Generator) -> str:
    """Name a shape so that it is told apart: by kind, by colour and kind, or (alone) as "the shape"."""
    shape = scene.shapes[index]
    twins = sum(other.kind == shape.kind for other in scene.shapes) > 1
    if twins or rng.random() < 0.5:
        return f"the {shape.colour} {shape.kind}"
    if len(scene.shapes) == 1 and rng.random() < 0.15:
        return "the shape"
    return f"the {shape.kind}"


def instruction(scene: Scene, edit: Edit, rng: np.random.Generator) -> str:
    """One of several wordings of an edit with one reference picture (the picture of `scene`)."""
    v = edit.value
    if edit.kind == "background":
        options = (
            *(f"change the background to {v}", f"make the background {v}", f"change the background colour to {v}"),
            *(f"put it on a {v} background", f"turn the background {v}", f"paint the background {v}"),
        )
        return _finish(_pick(rng, options).replace("a orange", "an orange"), rng)
    s = _refer(scene, edit.index, rng)
    if edit.kind == "recolour":
        options = (
            *(f"make {s} {v}", f"turn {s} {v}", f"change {s} to {v}", f"paint {s} {v}", f"recolour {s} {v}"),
            *(f"change the colour of {s} to {v}", f"make the colour of {s} {v}"),
        )
    elif edit.kind == "remove":
        options = (f"remove {s}", f"delete {s}", f"erase {s}", f"take away {s}", f"remove {s} from the picture")
    else:
        new = _article(v)
        options = (f"turn {s} into {new}", f"replace {s} with {new}", f"change {s} into {new}", f"make {s} {new}")
    return _finish(_pick(rng, options), rng)


def combine_instruction(scene: Scene, rng: np.random.Generator) -> str:
    """A wording for two references: the one shape of image 1 (the picture of `scene`) on the background of image 2."""
    s = _pick(rng, ("the shape", "the shape", "the " + scene.shapes[0].kind, "the object"))
    options = (
        *(f"put {s} of image 1 on the background of image 2", f"put {s} from image 1 on the background of image 2"),
        *(f"place {s} of image 1 on the background of image 2", f"{s} of image 1 on the background of image 2"),
        *(f"put {s} of image 1 into image 2, without its shape", f"{s} from image 1 with the background of image 2"),
    )
    return _finish(_pick(rng, options), rng)


def combine(first: Scene, second: Scene) -> Scene:
    """The result of the two-reference task."""
    return replace(first, background=second.background)


def held_out_prompts(count: int, seed: int = 0) -> list[tuple[str, Scene]]:
    """`count` (caption, scene) pairs, alternately of one and two shapes, whose first shape is a held-out combination.

    The captions always name the background, as the judge needs it.
    """
    rng = np.random.default_rng(seed)
    prompts = []
    while len(prompts) < count:
        scene = random_scene(rng, count=1 + len(prompts) % 2, held=True)
        words = caption(scene, rng)
        if is_captioned(scene) and scene.background in words:
            prompts.append((words, scene))
    return prompts
