"""Pictures in a terminal: whole ones, sketches while they are made, and sheets of many.

Which protocol a terminal knows for pictures is told from its environment. Inside tmux and screen,
which swallow the protocols, and in terminals that know none, a picture is drawn with half blocks: two pixels a cell.
"""

import base64
import io
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, TextIO

from PIL import Image, ImageDraw, ImageFont

from klein_mlx.pipeline import KleinPipeline
from klein_mlx.runtime.run import Picture, Step

if TYPE_CHECKING:
    from klein_mlx.cli.options import RunOptions

ESC = "\033"
CHUNK = 4096  # characters of base64 that kitty takes at once
CELL = (8, 16)  # pixels of a character, where the terminal cannot be asked
_MOST = 768  # pixels of a side that are sent; the file has the rest


def protocol(environment: Mapping[str, str]) -> str | None:
    """How a terminal with this environment shows pictures.

    Returns "kitty", "iterm", "sixel", "blocks" (24-bit colours), "blocks256" or None: not at all.
    """
    get = environment.get
    term, program = get("TERM", ""), get("TERM_PROGRAM", "")
    if get("NO_COLOR") or term in ("", "dumb"):
        return None
    blocks = _blocks(term, get("COLORTERM", ""))
    if get("TMUX") or get("STY") or term.startswith(("tmux", "screen")):
        return blocks
    if get("KITTY_WINDOW_ID") or term == "xterm-kitty" or program == "ghostty" or term == "xterm-ghostty":
        return "kitty"
    if program in ("WezTerm", "iTerm.app", "mintty", "rio") or get("LC_TERMINAL") == "iTerm2":
        return "iterm"
    version = get("KONSOLE_VERSION", "")
    if version.isdigit() and int(version) >= 220400:
        return "kitty"
    if term.startswith(("foot", "mlterm", "contour", "yaft")):
        return "sixel"
    return blocks


def _blocks(term: str, colours: str) -> str | None:
    if colours in ("truecolor", "24bit") or term.endswith("-direct"):
        return "blocks"
    return "blocks256" if "256color" in term else None


def show(image: Image.Image, stream: TextIO, columns: int = 48) -> bool:
    """Draw a picture on a terminal, at most so many columns wide; False, and nothing, where it cannot be shown."""
    kind = protocol(os.environ) if stream.isatty() else None
    if kind is None:
        return False
    width, height = shutil.get_terminal_size()
    columns = max(1, min(columns, width - 1, int(2 * (height - 2) * image.width / image.height)))
    stream.write(encode(image, kind, columns))
    stream.flush()
    return True


def encode(image: Image.Image, kind: str, columns: int) -> str:
    """What draws a picture, and moves below it.

    image: RGB. kind: as from `protocol`. columns: how wide; the height follows from the aspect.
    """
    if kind == "kitty":
        return kitty(image, columns) + "\n"
    if kind == "iterm":
        return iterm(image, columns) + "\n"
    if kind == "sixel":
        return sixel(_scaled(image, columns * CELL[0])) + "\n"
    return half_blocks(image, columns, 256 if kind == "blocks256" else 1 << 24)


def kitty(image: Image.Image, columns: int) -> str:
    """kitty's graphics protocol: a PNG in chunks of base64; the terminal scales it, and is not to answer."""
    data = base64.standard_b64encode(_png(image)).decode()
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    written = []
    for index, chunk in enumerate(chunks):
        keys = f"a=T,f=100,q=2,c={columns}," if index == 0 else ""
        written.append(f"{ESC}_G{keys}m={int(index < len(chunks) - 1)};{chunk}{ESC}\\")
    return "".join(written)


def iterm(image: Image.Image, columns: int) -> str:
    """iTerm2's inline images, which WezTerm knows too."""
    data = _png(image)
    keys = f"inline=1;size={len(data)};width={columns};preserveAspectRatio=1"
    return f"{ESC}]1337;File={keys}:{base64.standard_b64encode(data).decode()}\a"


def sixel(image: Image.Image) -> str:
    """DEC's sixels: bands of six rows, a bit per row, one colour of the palette after another."""

    paletted = image.quantize(255, dither=Image.Dither.FLOYDSTEINBERG)
    width, height = paletted.size
    palette, pixels = paletted.getpalette() or [], paletted.tobytes()
    used = sorted(set(pixels))
    colours = ["#{};2;{};{};{}".format(c, *(round(v / 2.55) for v in palette[3 * c : 3 * c + 3])) for c in used]
    bands = []
    for top in range(0, height, 6):
        rows = [pixels[y * width : (y + 1) * width] for y in range(top, min(top + 6, height))]
        lines = []
        for colour in sorted(set(b"".join(rows))):
            bits = bytes(63 + sum((row[x] == colour) << y for y, row in enumerate(rows)) for x in range(width))
            runs = re.sub(r"(.)\1{3,}", lambda run: f"!{len(run[0])}{run[1]}", bits.decode())  # of four and more
            lines.append(f"#{colour}{runs}")
        bands.append("$".join(lines))
    return f'{ESC}P0;1;0q"1;1;{width};{height}{"".join(colours)}{"-".join(bands)}{ESC}\\'


def half_blocks(image: Image.Image, columns: int, colours: int = 1 << 24) -> str:
    """Two pixels a cell, the upper as the colour of a half block, the lower as its background.

    colours: 256 for the usual palette's cube and greys, else 24 bits.
    """
    small = _scaled(image, columns, enlarge=True)
    width, height = small.size
    data = small.tobytes()

    def colour(x: int, y: int) -> str:
        red, green, blue = data[3 * (y * width + x) : 3 * (y * width + x) + 3]
        if colours == 256:
            return f"5;{_of_256(red, green, blue)}"
        return f"2;{red};{green};{blue}"

    lines = []
    for y in range(0, height, 2):
        cells, last = [], ""
        for x in range(width):
            below = f";48;{colour(x, y + 1)}" if y + 1 < height else ""
            now = f"{ESC}[38;{colour(x, y)}{below}m"
            cells.append(("" if now == last else now) + "\u2580")
            last = now
        lines.append("".join(cells) + f"{ESC}[0m\n")
    return "".join(lines)


_LEVELS = (0, 95, 135, 175, 215, 255)  # of the cube, xterm's


@cache
def _of_256(red: int, green: int, blue: int) -> int:
    """The nearest of the cube of 6 x 6 x 6 (16 to 231) and of the 24 greys (232 to 255)."""
    nearest = [min(range(6), key=lambda i: abs(_LEVELS[i] - value)) for value in (red, green, blue)]
    grey = min(23, max(0, round(((red + green + blue) / 3 - 8) / 10)))
    cube = tuple(_LEVELS[index] for index in nearest)

    def far(color: tuple[int, ...]) -> int:
        return sum((a - b) ** 2 for a, b in zip(color, (red, green, blue), strict=True))

    if far((8 + 10 * grey,) * 3) < far(cube):
        return 232 + grey
    return 16 + 36 * nearest[0] + 6 * nearest[1] + nearest[2]


def _png(image: Image.Image) -> bytes:
    stored = io.BytesIO()
    width = _MOST if image.width >= image.height else round(_MOST * image.width / image.height)
    _scaled(image, width).save(stored, "PNG")
    return stored.getvalue()


def _scaled(image: Image.Image, width: int, enlarge: bool = False) -> Image.Image:
    """To so many pixels across, if it has more; or if it is to be enlarged too."""

    if image.width <= width and not enlarge:
        return image
    height = max(1, round(image.height * width / image.width))
    return image.resize((width, height), Image.Resampling.BOX if image.width > width else Image.Resampling.NEAREST)


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


View = Callable[[Step | Picture], None]
_SKETCH_COLUMNS = 24


def viewer(options: "RunOptions", pipe: KleinPipeline) -> View | None:
    """What draws a run's events on stdout; None where nothing can be shown: stdout is no terminal, or one without
    pictures and colours."""
    if not sys.stdout.isatty() or protocol(os.environ) is None:
        return None
    if options.show_steps:
        keep_sketches(pipe)
    return view_of(True, options.show_steps)


def view_of(pictures: bool, steps: bool) -> View | None:
    """Draws finished pictures, or sketches after each step but the last too; None if neither."""

    def view(event: Step | Picture) -> None:
        if isinstance(event, Picture):
            show(event.image, sys.stdout)
        elif steps and event.index < event.of and (sketch := event.sketch()):
            show(sketch, sys.stdout, _SKETCH_COLUMNS)

    return view if pictures else None


def keep_sketches(pipe: KleinPipeline) -> None:
    """Let the model's sketches use, and keep, what earlier pictures taught."""
    from klein_mlx.paths import cache_folder
    from klein_mlx.runtime.pictures import Sketcher

    folder = cache_folder()
    pipe.sketcher = Sketcher(pipe.source, folder / "sketches" if folder else None)
