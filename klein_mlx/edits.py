"""What may be asked about a picture to start from: strength, mask, extension. Part of the one door, `request.check`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from klein_mlx.errors import RequestError, integer

MASK_BLUR, MAX_BLUR, MAX_MARGIN = 4, 256, 8192  # pixels
STRENGTH = 0.6  # of an init image without a mask; with one, 1: what is white is painted anew
SIDES = ("left", "top", "right", "bottom")


@dataclass(frozen=True)
class Edit:
    """A checked edit of `init_image`; pictures are as given, not yet opened.

    strength: (0, 1], or None if `sigmas` say where to start. mask_image: white is repainted, or None. mask_blur: the
    width in pixels of the soft edge, inside the mask. padding_mask_crop: pixels around the mask to which the picture is
    cropped while it is repainted, or None. margins: pixels to add at SIDES, or None. extend_to: (width, height) to
    extend to, or None. init_reference: whether the model is shown the picture as its first reference too.
    """

    init_image: Any
    strength: float | None
    mask_image: Any
    mask_blur: int
    invert_mask: bool
    padding_mask_crop: int | None
    margins: tuple[int, int, int, int] | None
    extend_to: tuple[int, int] | None
    init_reference: bool

    @property
    def extends(self) -> bool:
        return self.margins is not None or self.extend_to is not None


def check_edit(
    *,
    sigmas: Any,
    init_image: Any = None,
    strength: float | None = None,
    mask_image: Any = None,
    mask_blur: int | None = None,
    invert_mask: bool = False,
    padding_mask_crop: int | None = None,
    extend: Any = None,
    init_reference: bool | None = None,
) -> Edit | None:
    """None if there is no init image; else the edit. The arguments are in range, and are fields of `Options`.

    Raises RequestError for what does not go together.
    """
    asked = {"strength": strength, "mask_image": mask_image, "extend": extend, "init_reference": init_reference}
    if init_image is None:
        for name, value in asked.items():
            if value is not None:
                raise RequestError(name, rule="needs an {init_image}: the picture to start from")
    if mask_image is None:
        if invert_mask:
            raise RequestError("invert_mask", rule="needs a {mask_image}")
        if padding_mask_crop is not None:
            raise RequestError("padding_mask_crop", rule="needs a {mask_image}: it crops the picture around the mask")
        if mask_blur is not None and extend is None:
            rule = "needs a {mask_image} or {extend}: without them nothing has an edge"
            raise RequestError("mask_blur", rule=rule)
    if init_image is None:
        return None
    if padding_mask_crop is not None and extend is not None:
        raise RequestError("padding_mask_crop", rule="does not go with {extend}: the new area surrounds the picture")
    margins, extend_to = _extension(extend)
    painted_over = mask_image is not None or extend is not None
    return Edit(
        init_image=init_image,
        strength=_strength(strength, sigmas, 1.0 if painted_over else STRENGTH),
        mask_image=mask_image,
        mask_blur=MASK_BLUR if mask_blur is None else mask_blur,
        invert_mask=invert_mask,
        padding_mask_crop=padding_mask_crop,
        margins=margins,
        extend_to=extend_to,
        init_reference=painted_over if init_reference is None else init_reference,
    )


def _strength(strength: float | None, sigmas: Any, default: float) -> float | None:
    if strength is None:
        return default if sigmas is None else None
    if sigmas is not None:
        raise RequestError("strength", rule="and {sigmas} both say where to start; give one of them")
    return strength


def _extension(extend: Any) -> tuple[tuple[int, int, int, int] | None, tuple[int, int] | None]:
    """(margins at SIDES, None) or (None, size) of "left=256,right=256", {"left": 256}, "1536x1024" or (1536, 1024)."""
    if extend is None:
        return None, None
    rule = (
        "it must be pixels to add, such as left=256,right=256 (left, top, right, bottom), or a size, such as 1536x1024"
    )
    wrong = RequestError("extend", extend, rule)
    if isinstance(extend, str):
        size = re.fullmatch(r"(\d{1,5})\s*[xX]\s*(\d{1,5})", extend.strip())
        extend = (int(size[1]), int(size[2])) if size else _pairs(extend, wrong)
    if isinstance(extend, tuple | list):
        if len(extend) != 2:
            raise wrong
        return None, (integer("extend's width", extend[0], 1, MAX_MARGIN), integer("height", extend[1], 1, MAX_MARGIN))
    if not isinstance(extend, Mapping) or not extend or set(extend) - set(SIDES):
        raise wrong
    left, top, right, bottom = (integer(f"extend's {side}", extend.get(side, 0), 0, MAX_MARGIN) for side in SIDES)
    if not left + top + right + bottom:
        raise wrong
    return (left, top, right, bottom), None


def _pairs(text: str, wrong: RequestError) -> dict[str, int]:
    pairs: dict[str, int] = {}
    for item in text.split(","):
        name, equals, number = (part.strip() for part in item.partition("="))
        if not equals or name in pairs or not re.fullmatch(r"\d{1,5}", number):
            raise wrong
        pairs[name] = int(number)
    return pairs
