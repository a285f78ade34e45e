"""A request's pictures, opened: the references as the model takes them, the init image's canvas, the picture's size."""

from dataclasses import dataclass

from PIL import Image

from klein_mlx.errors import RequestError
from klein_mlx.images import LARGE_REFERENCE_AREA, REFERENCE_AREA, load_image, prepare_reference
from klein_mlx.masks import Canvas, make_canvas
from klein_mlx.request import Request, check_area, check_side


@dataclass(frozen=True)
class Opened:
    """references: RGB, sides multiples of a token, in the order of their positions. canvas: of the init image, or None.
    height, width: at which is painted, in pixels. notes: what was scaled or cropped, a line each.
    """

    references: list[Image.Image]
    canvas: Canvas | None
    height: int
    width: int
    notes: list[str]


def open_pictures(request: Request, multiple: int, default_size: int) -> Opened:
    """Read every picture of a request, and decide the size.

    multiple: pixels per token (16). default_size: of a side when no picture and no size are given.
    Raises RequestError for a file that is no picture, or that does not suit.
    """
    notes: list[str] = []
    sources, references = list(request.images), []
    canvas = None
    if request.edit is not None:
        picture, canvas = _open_canvas(request, multiple, notes)
        if request.edit.init_reference and request.edit.extends:
            sources.insert(0, picture)  # itself, not its border of repeated pixels
        elif request.edit.init_reference:
            references.append(canvas.image)
    area = LARGE_REFERENCE_AREA if request.large_reference else REFERENCE_AREA
    for source in sources:
        image, told = load_image(source)
        image, note = prepare_reference(image, multiple, area)
        references.append(image)
        notes += [*told, *([note] if note else [])]
    if canvas is not None:
        first = canvas.image.size
    else:
        first = references[0].size if references else (default_size, default_size)
    width, height = request.width or first[0], request.height or first[1]
    check_side("width", width, multiple)
    check_side("height", height, multiple)
    check_area(width, height)
    if request.latents is not None and tuple(request.latents.shape[2:]) != (height // multiple, width // multiple):
        raise RequestError(
            f"latents has shape {tuple(request.latents.shape)}; for {width} x {height} pixels its last two must be "
            f"{height // multiple}, {width // multiple}"
        )
    return Opened(references, canvas, height, width, notes)


def _open_canvas(request: Request, multiple: int, notes: list[str]) -> tuple[Image.Image, Canvas]:
    """The init image as it is in its file, and its canvas."""
    edit = request.edit
    assert edit is not None
    picture, told = load_image(edit.init_image, "init_image")
    notes += told
    mask = None
    if edit.mask_image is not None:
        mask, told = load_image(edit.mask_image, "mask_image")
        notes += told
    canvas, told = make_canvas(edit, picture, mask, (request.width, request.height), multiple)
    notes += told
    return picture, canvas
