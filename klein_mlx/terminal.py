"""Pictures in a terminal: which protocol it knows, told from its environment, and the bytes that it draws.

Pure functions of a picture and of environment variables; nothing is printed here but by `show`. Inside tmux and screen,
which swallow the protocols, and in terminals that know none, a picture is drawn with half blocks: two pixels a cell.
"""

import base64
import io
import os
import re
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from PIL import Image

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


def has_bar(stream: TextIO) -> bool:
    """Whether a line can be drawn over again there: a terminal, and not a dumb one."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def show(image: "Image.Image", stream: TextIO, columns: int = 48) -> bool:
    """Draw a picture on a terminal, at most so many columns wide; False, and nothing, where it cannot be shown."""
    kind = protocol(os.environ) if stream.isatty() else None
    if kind is None:
        return False
    width, height = shutil.get_terminal_size()
    columns = max(1, min(columns, width - 1, int(2 * (height - 2) * image.width / image.height)))
    stream.write(encode(image, kind, columns))
    stream.flush()
    return True


def encode(image: "Image.Image", kind: str, columns: int) -> str:
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


def kitty(image: "Image.Image", columns: int) -> str:
    """kitty's graphics protocol: a PNG in chunks of base64; the terminal scales it, and is not to answer."""
    data = base64.standard_b64encode(_png(image)).decode()
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    written = []
    for index, chunk in enumerate(chunks):
        keys = f"a=T,f=100,q=2,c={columns}," if index == 0 else ""
        written.append(f"{ESC}_G{keys}m={int(index < len(chunks) - 1)};{chunk}{ESC}\\")
    return "".join(written)


def iterm(image: "Image.Image", columns: int) -> str:
    """iTerm2's inline images, which WezTerm knows too."""
    data = _png(image)
    keys = f"inline=1;size={len(data)};width={columns};preserveAspectRatio=1"
    return f"{ESC}]1337;File={keys}:{base64.standard_b64encode(data).decode()}\a"


def sixel(image: "Image.Image") -> str:
    """DEC's sixels: bands of six rows, a bit per row, one colour of the palette after another."""
    from PIL import Image

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
            lines.append(f"#{colour}{_repeated(bits.decode())}")
        bands.append("$".join(lines))
    return f'{ESC}P0;1;0q"1;1;{width};{height}{"".join(colours)}{"-".join(bands)}{ESC}\\'


def _repeated(line: str) -> str:
    """Runs of four and more as !count."""
    return re.sub(r"(.)\1{3,}", lambda run: f"!{len(run[0])}{run[1]}", line)


def half_blocks(image: "Image.Image", columns: int, colours: int = 1 << 24) -> str:
    """Two pixels a cell, the upper as the colour of a half block, the lower as its background.

    colours: 256 for the cube of 6 x 6 x 6, else 24 bits.
    """
    small = _scaled(image, columns, enlarge=True)
    width, height = small.size
    data = small.tobytes()

    def colour(x: int, y: int) -> str:
        red, green, blue = data[3 * (y * width + x) : 3 * (y * width + x) + 3]
        if colours == 256:
            return "5;" + str(16 + sum(round(v / 51) * step for v, step in ((red, 36), (green, 6), (blue, 1))))
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


def _png(image: "Image.Image") -> bytes:
    stored = io.BytesIO()
    width = _MOST if image.width >= image.height else round(_MOST * image.width / image.height)
    _scaled(image, width).save(stored, "PNG")
    return stored.getvalue()


def _scaled(image: "Image.Image", width: int, enlarge: bool = False) -> "Image.Image":
    """To so many pixels across, if it has more; or if it is to be enlarged too."""
    from PIL import Image

    if image.width <= width and not enlarge:
        return image
    height = max(1, round(image.height * width / image.width))
    return image.resize((width, height), Image.Resampling.BOX if image.width > width else Image.Resampling.NEAREST)
