"""A picture's size as people say it: 1024x768, 16:9, 2mp."""

import math
import re

from klein_mlx.errors import RequestError

MEGAPIXEL = 1024 * 1024
_RIGHT = "it must be WIDTHxHEIGHT (1024x768), an aspect (16:9), megapixels (2mp), or both (16:9,2mp)"


def parse_size(text: str, multiple: int, default_side: int) -> tuple[int, int]:
    """(width, height) in pixels of a text.

    text: "1024x768" as it is; an aspect, "16:9", of default_side**2 pixels; "2mp": a square of 2 * 1024 * 1024; or an
    aspect with its pixels, "16:9,2mp". multiple: of which sides are made, nearest in shape and area together.
    Raises RequestError for any other text, or an aspect beyond 8 : 1.
    """
    clean = text.strip().lower()
    if exact := re.fullmatch(r"(\d{1,5})\s*[x×]\s*(\d{1,5})", clean):
        return int(exact[1]), int(exact[2])
    aspect, area = 1.0, float(default_side**2)
    for part in re.split(r"[,\s]+", clean):
        ratio = re.fullmatch(r"(\d{1,4}(?:\.\d{1,4})?):(\d{1,4}(?:\.\d{1,4})?)", part)
        pixels = re.fullmatch(r"(\d{1,3}(?:\.\d{1,4})?|\.\d{1,4})mp", part)
        if ratio and float(ratio[1]) and float(ratio[2]):
            aspect = float(ratio[1]) / float(ratio[2])
        elif pixels and float(pixels[1]):
            area = float(pixels[1]) * MEGAPIXEL
        else:
            raise RequestError(f"--size is {text[:40]!r}; {_RIGHT}")
    if not 1 / 8 <= aspect <= 8:
        raise RequestError(f"--size is {text[:40]!r}; its aspect must be at most 8 : 1")
    return _nearest(math.sqrt(area * aspect), math.sqrt(area / aspect), multiple)


def _nearest(width: float, height: float, multiple: int) -> tuple[int, int]:
    """The multiples around these sides whose shape and area are nearest, as ratios."""

    def around(side: float) -> list[int]:
        below = max(1, math.floor(side / multiple)) * multiple
        return [below, below + multiple]

    def distance(size: tuple[int, int]) -> float:
        w, h = size
        return abs(math.log(w / h * height / width)) + abs(math.log(w * h / (width * height)))

    return min(((w, h) for w in around(width) for h in around(height)), key=distance)
