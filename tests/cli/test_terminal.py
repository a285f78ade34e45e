"""Pictures in a terminal: which protocol for which one, and what is drawn, read back by a decoder of each protocol."""

import base64
import io
import re
from typing import Any

import pytest
from PIL import Image, ImageChops

from klein_mlx.cli import terminal
from klein_mlx.cli.terminal import CHUNK, encode, half_blocks, iterm, kitty, protocol, show, sixel


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({}, None),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, None),
        ({"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1", "NO_COLOR": "1"}, None),
        ({"TERM": "xterm-kitty", "NO_COLOR": ""}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm", "COLORTERM": "truecolor"}, "iterm"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "230804"}, "kitty"),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "210800"}, "blocks256"),
        ({"TERM": "foot", "COLORTERM": "truecolor"}, "sixel"),
        ({"TERM": "mlterm"}, "sixel"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, "blocks256"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "vscode", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "screen-256color", "TMUX": "/tmp/x", "KITTY_WINDOW_ID": "1"}, "blocks256"),
        ({"TERM": "tmux-256color", "TERM_PROGRAM": "tmux", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "screen", "STY": "1", "LC_TERMINAL": "iTerm2"}, None),
        ({"TERM": "xterm"}, None),
        ({"TERM": "linux"}, None),
    ],
)
def test_protocols(environment: dict[str, str], kind: str | None) -> None:
    assert protocol(environment) == kind


@pytest.fixture
def image() -> Image.Image:
    """Noise, so that its PNG needs several chunks, with a plain half, so that runs are repeated."""
    image = Image.merge("RGB", [Image.effect_noise((90, 61), 100) for _ in range(3)])
    image.paste((10, 200, 30), (45, 0, 90, 61))
    return image


def test_kitty(image: Image.Image) -> None:
    """Chunks of at most 4096 characters, m=1 on all but the last; together they are the picture."""
    drawn = kitty(image, 40)
    commands = re.findall(r"\033_G([^;]*);([^\033]*)\033\\", drawn)
    assert "".join(f"\033_G{keys};{data}\033\\" for keys, data in commands) == drawn
    assert len(commands) > 2
    assert commands[0][0] == "a=T,f=100,q=2,c=40,m=1"
    assert [keys for keys, _ in commands[1:]] == ["m=1"] * (len(commands) - 2) + ["m=0"]
    assert all(len(data) == CHUNK for _, data in commands[:-1])
    decoded = Image.open(io.BytesIO(base64.standard_b64decode("".join(data for _, data in commands))))
    assert decoded.tobytes() == image.tobytes()


def test_kitty_in_one_chunk() -> None:
    assert re.fullmatch(r"\033_Ga=T,f=100,q=2,c=4,m=0;[^\033]+\033\\", kitty(Image.new("RGB", (8, 8)), 4))


def test_iterm(image: Image.Image) -> None:
    match = re.fullmatch(r"\033\]1337;File=inline=1;size=(\d+);width=40;preserveAspectRatio=1:(.*)\a", iterm(image, 40))
    assert match
    data = base64.standard_b64decode(match[2])
    assert len(data) == int(match[1])
    assert Image.open(io.BytesIO(data)).tobytes() == image.tobytes()


def decode_sixel(drawn: str) -> Image.Image:
    """What a terminal would show of sixels."""
    match = re.fullmatch(r'\033P0;1;0q"1;1;(\d+);(\d+)(.*)\033\\', drawn, re.S)
    assert match
    image, palette, colour, x, top = Image.new("RGB", (int(match[1]), int(match[2]))), {}, 0, 0, 0
    for token in re.findall(r"#\d+;2;\d+;\d+;\d+|#\d+|!\d+.|.", match[3]):
        if token.startswith("#"):
            colour, *values = (int(value) for value in token[1:].split(";"))
            if values:
                palette[colour] = tuple(round(value * 2.55) for value in values[1:])
        elif token == "$":
            x = 0
        elif token == "-":
            x, top = 0, top + 6
        else:
            count, sign = (int(token[1:-1]), token[-1]) if token.startswith("!") else (1, token)
            for _ in range(count):
                for row in range(6):
                    if ord(sign) - 63 >> row & 1:
                        image.putpixel((x, top + row), palette[colour])
                x += 1
    return image


def test_sixel(image: Image.Image) -> None:
    """Every pixel is set, to its colour in the palette of 255; the palette's own values are rounded to percents."""
    drawn = sixel(image)
    assert "!" in drawn
    right = image.quantize(255, dither=Image.Dither.FLOYDSTEINBERG).convert("RGB")
    difference: Any = ImageChops.difference(decode_sixel(drawn), right).getextrema()
    assert max(high for _, high in difference) <= 2  # half a percent of 255, and a rounding


def decode_blocks(drawn: str) -> list[list[tuple[int, int, int]]]:
    """Rows of pixels."""

    def colour(code: list[int]) -> tuple[int, int, int]:
        if code[0] == 2:
            return code[1], code[2], code[3]
        if code[1] >= 232:
            grey = 8 + 10 * (code[1] - 232)
            return grey, grey, grey
        levels, cube = (0, 95, 135, 175, 215, 255), code[1] - 16
        return levels[cube // 36], levels[cube // 6 % 6], levels[cube % 6]

    rows: list[list[tuple[int, int, int]]] = []
    for line in drawn.splitlines():
        assert line.endswith("\033[0m")
        upper, lower, above, below = [], [], None, None
        for codes, blocks in re.findall(r"\033\[([\d;]+)m(\u2580+)", line):
            numbers = [int(number) for number in codes.split(";")]
            size = 4 if numbers[1] == 2 else 2
            above, below = colour(numbers[1 : 1 + size]), None
            if len(numbers) > 1 + size:
                below = colour(numbers[2 + size :])
            upper += [above] * len(blocks)
            lower += [below] * len(blocks)
        rows += [upper, lower] if lower[0] else [upper]  # type: ignore[list-item]
    return rows


@pytest.mark.parametrize(("colours", "tolerance"), [(1 << 24, 0), (256, 48)])  # half of the cube's longest step
def test_half_blocks(image: Image.Image, colours: int, tolerance: int) -> None:
    rows = decode_blocks(half_blocks(image, 30, colours))
    small = image.resize((30, 20), Image.Resampling.BOX)
    assert (len(rows), len(rows[0])) == (20, 30)
    data: Any = small.load()
    worst = max(
        abs(got - wanted)
        for y, row in enumerate(rows)
        for x, pixel in enumerate(row)
        for got, wanted in zip(pixel, data[x, y], strict=True)
    )
    assert worst <= tolerance


@pytest.mark.parametrize(
    ("color", "code"),
    [((0, 0, 0), 16), ((255, 255, 255), 231), ((255, 0, 0), 196), ((128, 128, 128), 244), ((95, 135, 175), 67)],
)
def test_256_colors_are_the_palette_s(color: tuple[int, int, int], code: int) -> None:
    """Of a mid grey the cube's nearest, 135, would be brighter by 7, and a linear cube's 153 by 25."""
    assert f"38;5;{code};48;5;{code}m" in half_blocks(Image.new("RGB", (8, 8), color), 8, 256)


def test_half_blocks_of_an_odd_height_and_of_a_small_picture() -> None:
    assert len(decode_blocks(half_blocks(Image.new("RGB", (8, 3)), 8))) == 3
    assert len(decode_blocks(half_blocks(Image.new("RGB", (2, 2), "red"), 8))) == 8


class Screen(io.StringIO):
    """A terminal, or a file."""

    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_only_on_a_terminal(image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "os", type("Environment", (), {"environ": {"TERM": "xterm-kitty"}}))
    monkeypatch.setenv("COLUMNS", "20")
    file, screen = Screen(False), Screen(True)
    assert not show(image, file)
    assert file.getvalue() == ""
    assert show(image, screen)
    assert ",c=19," in screen.getvalue(), "no wider than the terminal"
    monkeypatch.setattr(terminal, "os", type("Environment", (), {"environ": {"TERM": "dumb"}}))
    assert not show(image, Screen(True))


@pytest.mark.parametrize("kind", ["kitty", "iterm", "sixel", "blocks", "blocks256"])
def test_every_drawing_ends_its_line(image: Image.Image, kind: str) -> None:
    assert encode(image, kind, 10).endswith("\n")
