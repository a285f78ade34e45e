"""Where a picture is repainted: the working size, the mask, the border to add, and the way back to the file's pixels.

It knows PIL and numpy; not the model. Source of the sizes, of the crop around a mask and of the mask's tokens:
diffusers, Flux2KleinInpaintPipeline and VaeImageProcessor (get_crop_region, _resize_and_fill).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from klein_mlx.errors import RequestError, Shown
from klein_mlx.images.reading import MIN_REFERENCE_SIDE, REFERENCE_AREA, scaled_size
from klein_mlx.options import MAX_MARGIN
from klein_mlx.request import Edit

if TYPE_CHECKING:
    import numpy as np

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Canvas:
    """An init image as the model takes it, and the way back.

    image: RGB, of the working size, sides multiples of a token: what is encoded. tokens: (h, w) float32 in 0..1, how
    much each token is painted, or None: all of it. original: RGB, the file's pixels, extended where that was asked for.
    opacity: (H, W) float32 in 0..1 of the original's size, 0 where its pixels must come back; or None: the painted
    picture is the result. box: the part of the original that `image` shows. filled: whether it keeps its aspect there,
    with its borders filled, or is stretched.
    """

    image: Image.Image
    tokens: "np.ndarray | None"
    original: Image.Image
    opacity: "np.ndarray | None"
    box: Box
    filled: bool

    def paste(self, painted: Image.Image) -> Image.Image:
        """The result: `painted` (of the working size) where the mask says so, the original's own pixels elsewhere."""
        if self.opacity is None:
            return painted
        import numpy as np

        left, top, right, bottom = self.box
        size = (right - left, bottom - top)
        if self.filled:
            painted = painted.crop(_inner_box(size, painted.size))
        if painted.size != size:
            painted = painted.resize(size, Image.Resampling.LANCZOS)
        pixels = np.array(self.original)
        under = pixels[top:bottom, left:right].astype(np.float32)
        opacity = self.opacity[top:bottom, left:right, None]
        mixed = under + opacity * (np.asarray(painted, dtype=np.float32) - under)
        pixels[top:bottom, left:right] = np.rint(mixed).astype(np.uint8)
        return Image.fromarray(pixels)


def make_canvas(
    edit: Edit, picture: Image.Image, mask: Image.Image | None, size: tuple[int | None, int | None], multiple: int
) -> tuple[Canvas, list[str]]:
    """Lay out an edit.

    picture: RGB. mask: RGB or grey, or None. size: the working (width, height) asked for, or None for either: the
    picture's, scaled down to 1024 * 1024 pixels if it has more, cut to multiples. multiple: pixels per token (16).
    Returns the canvas and a line on what was scaled, if anything was. Raises RequestError for a mask that does not fit.
    """
    grey = None if mask is None else _grey(mask, picture.size, edit.invert_mask)
    original = picture
    if edit.extends:
        margins = _margins(edit, picture.size)
        original, grey = _extended(picture, margins), _extended_mask(picture.size, grey, margins)
    scaled = scaled_size(original.size, REFERENCE_AREA)
    working = tuple(asked or side // multiple * multiple for asked, side in zip(size, scaled, strict=True))
    if min(original.size) < MIN_REFERENCE_SIDE:
        rule = f"both sides must be at least {MIN_REFERENCE_SIDE} pixels"
        raise RequestError("init_image", Shown(_by(original.size)), rule)
    box = (0, 0, *original.size)
    if grey is not None and edit.padding_mask_crop is not None:
        box = crop_region(grey, (working[0], working[1]), edit.padding_mask_crop)
    filled = edit.padding_mask_crop is not None

    def work(image: Image.Image) -> Image.Image:
        return _fill(image.crop(box), working) if filled else _resize(image, working)

    tokens = opacity = None
    if grey is not None:
        tokens = token_mask(work(grey), multiple)
        if not tokens.any():
            if mask is None:
                rule = "adds too little to be painted; add at least half a token, 8 pixels of klein's"
                raise RequestError("extend", rule=rule)
            rule = "has white areas that are too thin to repaint; widen them, or crop around them"
            raise RequestError("mask_image", rule=rule)
        opacity = soft_edge(_painted(grey), edit.mask_blur)
    # diffusers scales the picture to the area first, then to multiples; the mask at once.
    twice = size == (None, None) and not filled
    canvas = Canvas(work(_resize(original, scaled) if twice else original), tokens, original, opacity, box, filled)
    shown = (box[2] - box[0], box[3] - box[1])
    notes = [] if shown == working else [f"{shown[0]} x {shown[1]} of the init image are painted at {_by(working)}"]
    return canvas, notes


def crop_region(mask: Image.Image, size: tuple[int, int], padding: int) -> Box:
    """The part of a picture that holds all of a mask that is not black, widened by `padding` pixels where there are
    any, then grown to the aspect of `size` as far as the picture goes. mask: grey. size: (width, height).
    """
    found = mask.getbbox()
    if found is None:
        raise RequestError("mask_image", rule="is all black: nothing would be repainted")
    left, top = max(found[0] - padding, 0), max(found[1] - padding, 0)
    right, bottom = min(found[2] + padding, mask.width), min(found[3] + padding, mask.height)
    aspect = size[0] / size[1]
    if (right - left) / (bottom - top) > aspect:
        top, bottom = _grow(top, bottom, int((right - left) / aspect - (bottom - top)), mask.height)
    else:
        left, right = _grow(left, right, int((bottom - top) * aspect - (right - left)), mask.width)
    return left, top, right, bottom


def _grow(start: int, end: int, more: int, limit: int) -> tuple[int, int]:
    """Lengthen start..end by `more` on both sides alike, moved and then cut to stay within 0..limit."""
    start, end = start - more // 2, end + more - more // 2
    back = max(end - limit, 0)
    start, end = start - back, end - back
    if start < 0:
        start, end = 0, end - start
    return start, min(end, limit)


def token_mask(mask: Image.Image, multiple: int) -> "np.ndarray":
    """How much of each token is painted: the mean of the four pixels at its centre, each 0 or 1.

    mask: grey, sides multiples of `multiple`. Returns (h, w) float32. Source: diffusers, prepare_mask_latents, whose
    bilinear interpolation to a sixteenth reads just these pixels.
    """
    import numpy as np

    painted = _painted(mask).astype(np.float32)
    first, second = multiple // 2 - 1, multiple // 2
    rows = (painted[first::multiple] + painted[second::multiple]) / 2
    return (rows[:, first::multiple] + rows[:, second::multiple]) / 2


def soft_edge(painted: "np.ndarray", width: int) -> "np.ndarray":
    """The painted picture's opacity: 0 outside, rising over `width` pixels inside, then 1.

    painted: (H, W) bool. Returns (H, W) float32; a pixel's value is min(d / (width + 1), 1), d its distance in pixels
    (along rows, columns and diagonals alike) from the nearest that is not painted. The picture's border has no edge.
    """
    import numpy as np

    inside = painted.astype(np.uint8)
    total = inside.astype(np.uint16)
    for _ in range(width):
        grown = np.pad(inside, 1, constant_values=1)
        rows = np.minimum(np.minimum(grown[:-2], grown[1:-1]), grown[2:])
        inside = np.minimum(np.minimum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])
        total += inside
    return total.astype(np.float32) / (width + 1)


def _painted(mask: Image.Image) -> "np.ndarray":
    import numpy as np

    return np.asarray(mask) >= 128


def _grey(mask: Image.Image, size: tuple[int, int], invert: bool) -> Image.Image:
    """The mask in mode L, 255 where it is painted; refused unless it has the picture's size and some white."""
    if mask.size != size:
        rule = f"but the init image is {_by(size)}; both must have one size"
        raise RequestError("mask_image", rule=f"is {_by(mask.size)}, {rule}")
    grey = mask.convert("L")
    if invert:
        grey = grey.point(lambda value: 255 - value)
    if grey.getextrema()[1] < 128:  # type: ignore[operator]
        found, wanted = ("white", "black") if invert else ("black", "white")
        rule = f"is all {found}: nothing would be repainted; make {wanted} what is to change"
        raise RequestError("mask_image", rule=rule)
    return grey


def _margins(edit: Edit, size: tuple[int, int]) -> Box:
    """Pixels to add at the left, top, right and bottom; to a size, half of them on each side."""
    if edit.margins is not None:
        margins = edit.margins
    else:
        assert edit.extend_to is not None
        wider, higher = edit.extend_to[0] - size[0], edit.extend_to[1] - size[1]
        if min(wider, higher) < 0 or wider + higher == 0:
            rule = f"it must be larger than the init image, {_by(size)}"
            raise RequestError("extend", Shown(_by(edit.extend_to)), rule)
        margins = (wider // 2, higher // 2, wider - wider // 2, higher - higher // 2)
    final = size[0] + margins[0] + margins[2], size[1] + margins[1] + margins[3]
    if max(final) > MAX_MARGIN:
        rule = f"makes the picture {_by(final)}; its sides may have {MAX_MARGIN} pixels"
        raise RequestError("extend", rule=rule)
    return margins


def _extended(picture: Image.Image, margins: Box) -> Image.Image:
    """The picture with a border that repeats its outermost pixels."""
    import numpy as np

    left, top, right, bottom = margins
    return Image.fromarray(np.pad(np.asarray(picture), ((top, bottom), (left, right), (0, 0)), mode="edge"))


def _extended_mask(size: tuple[int, int], mask: Image.Image | None, margins: Box) -> Image.Image:
    """White all around the picture; inside it the mask, or black."""
    left, top, right, bottom = margins
    extended = Image.new("L", (size[0] + left + right, size[1] + top + bottom), 255)
    extended.paste(mask if mask is not None else Image.new("L", size, 0), (left, top))
    return extended


def _resize(image: Image.Image, size: tuple[int, ...]) -> Image.Image:
    return image if image.size == size else image.resize((size[0], size[1]), Image.Resampling.LANCZOS)


def _fill(image: Image.Image, size: tuple[int, ...]) -> Image.Image:
    """Scale into `size` with the aspect kept, centred; what stays free is filled with the nearest row or column."""
    left, top, right, bottom = _inner_box(image.size, size)
    scaled = image.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
    filled = Image.new(image.mode, (size[0], size[1]))
    filled.paste(scaled, (left, top))
    if top > 0:
        filled.paste(scaled.resize((size[0], top), box=(0, 0, size[0], 0)), (0, 0))
        filled.paste(scaled.resize((size[0], top), box=(0, scaled.height, size[0], scaled.height)), (0, bottom))
    elif left > 0:
        filled.paste(scaled.resize((left, size[1]), box=(0, 0, 0, size[1])), (0, 0))
        filled.paste(scaled.resize((left, size[1]), box=(scaled.width, 0, scaled.width, size[1])), (right, 0))
    return filled


def _inner_box(inner: tuple[int, int], size: tuple[int, ...]) -> Box:
    """Where a picture of `inner` lies in `size` when it is scaled to fit, its aspect kept, and centred."""
    width, height = size[0], size[1]
    narrow = width / height < inner[0] / inner[1]
    inner_width = width if narrow else inner[0] * height // inner[1]
    inner_height = inner[1] * width // inner[0] if narrow else height
    left, top = width // 2 - inner_width // 2, height // 2 - inner_height // 2
    return left, top, left + inner_width, top + inner_height


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]}"
