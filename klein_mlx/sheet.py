"""A contact sheet: all pictures of a run on one, with a line below each."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP, LABEL = 8, 20  # pixels


def contact_sheet(pictures: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """The pictures, with their labels, in rows as square as they go, on white.

    pictures: one or more, each at most a cell's size; the largest decides the cell.
    """
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width = max(image.width for image, _ in pictures)
    height = max(image.height for image, _ in pictures)
    size = (columns * (width + GAP) + GAP, rows * (height + LABEL + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for number, (image, label) in enumerate(pictures):
        left = GAP + number % columns * (width + GAP)
        top = GAP + number // columns * (height + LABEL + GAP)
        sheet.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
        draw.text((left + 2, top + height + 4), label.encode("ascii", "replace").decode(), fill="black", font=font)
    return sheet
