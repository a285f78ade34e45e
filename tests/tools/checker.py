"""Reads pictures of the `tiny` world back into words, by simple geometry, and judges them. numpy only.

A picture is an RGB array (128, 128, 3) uint8. A scene is anything with `background` and `shapes`, where a shape has
`kind`, `colour`, `x` and `y` (centre in pixels). Nothing here knows how pictures are rendered or generated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

PALETTE = {
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
NAMES = tuple(PALETTE)
KINDS = ("circle", "square", "triangle", "star", "ring", "cross")
MIN_AREA = 80  # pixels; the smallest shape has 300. Smaller specks are no shape
MAX_COLOUR_ERROR = 60.0  # Euclidean RGB distance; half of that between the two nearest colours of the palette is 46
MIN_OVERLAP = 0.8  # intersection over union with the ideal shape; circle and square, the most alike, share 0.785
MAX_SHIFT = 6.0  # pixels that a centre may be off in an edit
MAX_STAY_ERROR = 12.0  # mean absolute difference, of 255, of the pixels that an edit must leave alone


@dataclass(frozen=True)
class Region:
    """One connected region that is not background; `kind` or `colour` is "unknown" where nothing fits."""

    kind: str
    colour: str
    x: float
    y: float
    width: int
    height: int
    area: int


@dataclass(frozen=True)
class Reading:
    """What a picture shows: background colour ("unknown" if none fits) and regions, largest first."""

    background: str
    regions: tuple[Region, ...]


def _distances(pixels: np.ndarray) -> np.ndarray:
    """Euclidean distance of colours (..., 3) to every palette colour: (..., 10)."""
    palette = np.array(list(PALETTE.values()), np.float32)
    return np.sqrt(((pixels[..., None, :].astype(np.float32) - palette) ** 2).sum(-1))


def colour_name(rgb: np.ndarray) -> str:
    """The palette colour nearest to (3,), or "unknown" if none is near."""
    distances = _distances(np.asarray(rgb, np.float32))
    nearest = int(distances.argmin())
    return NAMES[nearest] if distances[nearest] <= MAX_COLOUR_ERROR else "unknown"


def components(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected components of a boolean mask, each a boolean mask, largest first."""
    left = mask.copy()
    found = []
    height, width = mask.shape
    for start in zip(*np.nonzero(mask), strict=True):
        if not left[start]:
            continue
        part = np.zeros_like(mask)
        stack = [(int(start[0]), int(start[1]))]
        left[start] = False
        while stack:
            y, x = stack.pop()
            part[y, x] = True
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= v < height and 0 <= u < width and left[v, u]:
                    left[v, u] = False
                    stack.append((v, u))
        found.append(part)
    return sorted(found, key=lambda part: -int(part.sum()))


def _inside_star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five-pointed star (inner radius 0.48) that fills the box [-1, 1] x [-1, 1], v down."""
    angles = np.pi * (np.arange(10) / 5 - 0.5)
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.48)
    px, py = radii * np.cos(angles), radii * np.sin(angles)
    px = px / px.max()
    py = 2 * (py - py.min()) / (py.max() - py.min()) - 1
    inside = np.zeros(u.shape, bool)
    for i in range(10):
        ax, ay, bx, by = px[i - 1], py[i - 1], px[i], py[i]
        crosses = (ay > v) != (by > v)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= crosses & (u < (bx - ax) * (v - ay) / (by - ay) + ax)
    return inside


def ideal(kind: str, height: int, width: int) -> np.ndarray:
    """The ideal shape that fills a box of height x width pixels: boolean mask."""
    v = (2 * np.arange(height) + 1)[:, None] / height - 1 + np.zeros((1, width))
    u = (2 * np.arange(width) + 1)[None, :] / width - 1 + np.zeros((height, 1))
    radius = u**2 + v**2
    if kind == "circle":
        return radius <= 1
    if kind == "ring":
        return (radius <= 1) & (radius >= 0.55**2)
    if kind == "triangle":
        return np.abs(u) <= (v + 1) / 2
    if kind == "cross":
        return (np.abs(u) <= 0.33) | (np.abs(v) <= 0.33)
    if kind == "star":
        return _inside_star(u, v)
    return np.ones((height, width), bool)


def shape_name(mask: np.ndarray) -> str:
    """The kind of a region (a boolean mask cut to its bounding box), or "unknown" if it looks like none."""
    height, width = mask.shape
    if not 0.75 <= width / height <= 1.35:
        return "unknown"
    overlaps = dict.fromkeys(KINDS, 0.0)
    for lost in (0, 1):  # blur takes a pixel off sharp corners and thereby off the box
        grown = np.pad(mask, lost)
        for kind in KINDS:
            wanted = ideal(kind, *grown.shape)
            overlaps[kind] = max(overlaps[kind], float((grown & wanted).sum() / (grown | wanted).sum()))
    best = max(overlaps, key=overlaps.__getitem__)
    has_hole = not mask[height * 2 // 5 : height * 3 // 5 + 1, width * 2 // 5 : width * 3 // 5 + 1].any()
    if overlaps[best] < MIN_OVERLAP or has_hole != (best == "ring"):
        return "unknown"
    return best


def _region(picture: np.ndarray, part: np.ndarray, background: np.ndarray) -> Region | None:
    """Read one component: its colour is that of its inner pixels, its outline where colour and background are even."""
    contrast = np.sqrt(((picture - background) ** 2).sum(-1))
    inner = part & (contrast >= np.quantile(contrast[part], 0.4))
    colour = np.median(picture[inner], axis=0)
    direction = colour - background
    share = (picture - background) @ direction / max(float(direction @ direction), 1.0)
    near = part.copy()
    for _ in range(2):
        near[1:] |= near[:-1].copy()
        near[:-1] |= near[1:].copy()
        near[:, 1:] |= near[:, :-1].copy()
        near[:, :-1] |= near[:, 1:].copy()
    parts = components(near & (share > 0.5))
    if not parts or parts[0].sum() < MIN_AREA:
        return None
    mask = parts[0]
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Region(
        kind=shape_name(box),
        colour=colour_name(colour),
        x=(columns[0] + columns[-1] + 1) / 2,
        y=(rows[0] + rows[-1] + 1) / 2,
        width=box.shape[1],
        height=box.shape[0],
        area=int(mask.sum()),
    )


def read(picture: np.ndarray) -> Reading:
    """Background and regions of a picture (128, 128, 3) uint8."""
    pixels = picture.astype(np.float32)
    nearest = _distances(pixels).argmin(-1)
    common = int(np.bincount(nearest.ravel(), minlength=len(NAMES)).argmax())
    background = np.median(pixels[nearest == common], axis=0)
    apart = np.sqrt(((pixels - background) ** 2).sum(-1)) > 40
    regions = []
    for part in components(apart):
        if part.sum() >= MIN_AREA and (region := _region(pixels, part, background)) is not None:
            regions.append(region)
    return Reading(colour_name(background), tuple(sorted(regions, key=lambda region: -region.area)))


def _relation(ax: float, ay: float, bx: float, by: float) -> str:
    if abs(ax - bx) >= abs(ay - by):
        return "left of" if ax < bx else "right of"
    return "above" if ay < by else "below"


def match(regions: tuple[Region, ...], shapes: Any) -> list[Region | None]:
    """For every wanted shape the region that it should be: by colour, then by kind, then whichever is left."""
    left = list(regions)
    found: list[Region | None] = [None] * len(shapes)
    tests = (
        lambda region, shape: region.colour == shape.colour and region.kind == shape.kind,
        lambda region, shape: region.colour == shape.colour,
        lambda region, shape: region.kind == shape.kind,
        lambda region, shape: True,
    )
    for test in tests:
        for i, shape in enumerate(shapes):
            hits = [region for region in left if test(region, shape)]
            if found[i] is None and hits:
                found[i] = hits[0]
                left.remove(hits[0])
    return found


def clearly_different(regions: list[Region]) -> int:
    """How many of these are in clearly different places (over 12 pixels) or of clearly different sizes (by a third)."""
    found: list[Region] = []
    for one in regions:
        if all(
            max(abs(one.x - other.x), abs(one.y - other.y)) > 12 or not 0.75 < one.width / other.width < 1.33
            for other in found
        ):
            found.append(one)
    return len(found)


def judge_scene(picture: np.ndarray, scene: Any) -> dict[str, bool | list[bool]]:
    """Whether a picture shows a scene.

    Returns `background`, `count` (as many regions as shapes), `colours` and `kinds` (one answer per shape), for two
    shapes `relation` (told apart by colour or kind, which must be right for at least one), and `all`.
    """
    reading = read(picture)
    found = match(reading.regions, scene.shapes)
    pairs = list(zip(found, scene.shapes, strict=True))
    verdict: dict[str, bool | list[bool]] = {
        "background": reading.background == scene.background,
        "count": len(reading.regions) == len(scene.shapes),
        "colours": [region is not None and region.colour == shape.colour for region, shape in pairs],
        "kinds": [region is not None and region.kind == shape.kind for region, shape in pairs],
    }
    if len(scene.shapes) == 2:
        (a, first), (b, second) = pairs
        known = any(r and (r.colour == s.colour or r.kind == s.kind) for r, s in pairs)
        wanted = _relation(first.x, first.y, second.x, second.y)
        verdict["relation"] = bool(known and a and b and _relation(a.x, a.y, b.x, b.y) == wanted)
    answers = [v for value in verdict.values() for v in (value if isinstance(value, list) else [value])]
    verdict["all"] = all(answers)
    return verdict


def stay_error(picture: np.ndarray, before: np.ndarray, truth: np.ndarray, margin: int = 3) -> float:
    """Mean absolute difference (of 255) to `before` where the edit changes nothing.

    Pixels in which `before` and `truth` differ, and those within `margin` of them, do not count.
    """
    changed = np.abs(before.astype(np.int16) - truth.astype(np.int16)).max(-1) > 8
    for _ in range(margin):
        changed[1:] |= changed[:-1].copy()
        changed[:-1] |= changed[1:].copy()
        changed[:, 1:] |= changed[:, :-1].copy()
        changed[:, :-1] |= changed[:, 1:].copy()
    if changed.all():
        return 0.0
    return float(np.abs(picture.astype(np.float32) - before.astype(np.float32))[~changed].mean())


def judge_edit(picture: np.ndarray, before: np.ndarray, truth: np.ndarray, scene: Any) -> dict[str, bool]:
    """Whether `picture` is the edit of `before` that leads to `scene`, of which `truth` is the ideal picture.

    Returns `scene` (background and every shape's colour and kind right, no shape too many), `place` (centres within
    MAX_SHIFT), `size` (boxes within a quarter), `stays` (untouched pixels within MAX_STAY_ERROR), and `all`.
    """
    regions, wanted = read(picture).regions, read(truth).regions
    found = match(regions, wanted)
    pairs = [(region, ideal) for region, ideal in zip(found, wanted, strict=True) if region is not None]
    whole = len(pairs) == len(wanted)
    verdict = {
        "scene": bool(judge_scene(picture, scene)["all"]),
        "place": whole and all(max(abs(a.x - b.x), abs(a.y - b.y)) <= MAX_SHIFT for a, b in pairs),
        "size": whole and all(0.75 <= (a.width + a.height) / (b.width + b.height) <= 1.33 for a, b in pairs),
        "stays": stay_error(picture, before, truth) <= MAX_STAY_ERROR,
    }
    verdict["all"] = all(verdict.values())
    return verdict
