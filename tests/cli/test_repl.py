"""The session: lines taken apart, commands, and the whole of it through a terminal with tiny."""

import codecs
import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from klein_mlx import CheckpointError, KleinPipeline, RequestError
from klein_mlx.cli.main import main
from klein_mlx.cli.prompts import expand
from klein_mlx.cli.repl import Asked, Session, _session, read_prompt
from klein_mlx.cli.settings import complete


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("a red fox", Asked("a red fox")),
        ("512x768 a red fox", Asked("a red fox", [], (512, 768))),
        ("512x768", Asked("512x768")),
        ("a 512x768 poster", Asked("a 512x768 poster")),
        ("$ make it autumn", Asked("make it autumn", [3])),
        ("put $1 beside $2, please", Asked("put beside , please", [1, 2])),
        ("96x128 $2 at night", Asked("at night", [2], (96, 128))),
        ("a $$5 bill", Asked("a $5 bill")),
        ("a price of $2.50", Asked("a price of $2.50")),
        ("the $HOME of a fox", Asked("the $HOME of a fox")),
    ],
)
def test_prompts(line: str, asked: Asked) -> None:
    assert read_prompt(line, pictures=3) == asked


@pytest.mark.parametrize(
    ("line", "pictures", "words"),
    [
        ("$4 at night", 3, r"\$4 is not a picture of this session, there are \$1 to \$3; \$\$ is a dollar sign"),
        ("$0 at night", 3, r"\$0 is not a picture"),
        ("$ at night", 0, "there are none yet"),
        ("$2", 3, "this line has no prompt"),
        ("512x768 $", 3, "this line has no prompt"),
    ],
)
def test_prompts_that_cannot_be(line: str, pictures: int, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        read_prompt(line, pictures)


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A session with tiny in an empty folder; `told` has what it said."""
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    settings: dict[str, Any] = {"seed": 7, "width": None, "height": None, "num_inference_steps": 1}
    session = Session(
        KleinPipeline.from_pretrained("tiny", keep="all"), settings, lambda *lines: told.append("\n".join(lines))
    )
    session.told = told  # type: ignore[attr-defined]
    return session


def test_pictures_and_references(session: Any) -> None:
    """A reference is the earlier picture itself: the same as giving its file to the library."""
    assert session.line("a red circle")
    assert session.line("96x128 $ make the circle green")
    assert [path.name for _, path in session.pictures] == ["a-red-circle-7.png", "make-the-circle-green-7.png"]
    assert re.fullmatch(r"\$2  make-the-circle-green-7.png  seed 7  \d+\.\d s", session.told[-1])
    own = session.pipe(
        "make the circle green", image="a-red-circle-7.png", width=96, height=128, seed=7, num_inference_steps=1
    )
    with Image.open("make-the-circle-green-7.png") as saved:
        assert saved.tobytes() == own.images[0].tobytes()
    assert set(session.pipe.parts.loaded) == {"transformer", "text_encoder", "vae"}, "the model is kept warm"


def test_commands(session: Any, tmp_path: Path) -> None:
    for line in ("!seed 9", "!size 64x96", "!steps 2", "a star"):
        assert session.line(line)
    assert session.told[:3] == ["seed 9", "size 64x96", "steps 2"]
    session.line("!size 16:9")
    assert session.told[-1] == "size 176x96"
    assert session.pictures[0][0].size == (64, 96)
    session.line("!save copy.webp")
    assert (tmp_path / "copy.webp").exists()
    session.line("!undo")
    assert session.told[-1] == "$1 is forgotten; a-star-9.png stays"
    assert (tmp_path / "a-star-9.png").exists()
    for line in ("!seed random", "!size default", "!steps default", "!show off", ""):
        assert session.line(line)
    assert session.told[-4:] == ["seed random", "size 128x128, or that of the picture to change", "steps 4", "show off"]
    session.line("!help")
    assert "!undo" in session.told[-1]
    assert not session.line("!quit")


def test_a_prompt_varies_by_its_seed(session: Any) -> None:
    """As on the command line: the same template and seed give the same prompt."""
    session.vary = lambda prompt, seeds: [expand(prompt, seed, []) for seed in seeds]
    session.settings["num_images_per_prompt"] = 3
    session.line("a {red|green|blue|yellow} star")
    wanted = [expand("a {red|green|blue|yellow} star", seed, []) for seed in (7, 8, 9)]
    assert len(set(wanted)) > 1
    assert [recipe["prompt"] for recipe in session.recipes.values()] == wanted
    assert [recipe["seed"] for recipe in session.recipes.values()] == [7, 8, 9]


def test_a_picture_can_be_made_again(session: Any) -> None:
    """Its recipe says the template and the bits that were asked for, as the command's does."""
    session.pipe = KleinPipeline.from_pretrained("tiny", quantize=4)
    session.bits = {"quantize": "4"}
    session.vary = lambda prompt, seeds: [expand(prompt, seed, []) for seed in seeds]
    session.settings |= {"width": 64, "height": 64}
    session.line("a {red|green} star")
    ((image, path),) = session.pictures
    assert session.recipes[path]["template"] == "a {red|green} star"
    assert main(["again", str(path), "-o", "again.png", "--quiet"]) == 0
    with Image.open("again.png") as again:
        assert again.tobytes() == image.tobytes()


def test_a_session_keeps_to_the_options_of_its_loras(session: Any, tmp_path: Path) -> None:
    """Those that it began with: the folder, and that keys may be left out."""
    (tmp_path / "own").mkdir()
    save_file(
        {
            f"transformer.{layer}.lora_{side}.weight": np.ones(shape, np.float32)
            for layer in ("single_transformer_blocks.0.attn.to_out", "single_transformer_blocks.99.attn.to_out")
            for side, shape in (("A", (1, 768)), ("B", (192, 1)))
        },
        str(tmp_path / "own" / "style.safetensors"),
    )
    session.loras = {"partial": True, "folder": "own"}
    session.line("!lora style:0.5")
    assert session.told[-1] == "style:0.5"
    options = complete({"model": "tiny", "lora_partial": True, "lora_folder": "own"}, session=True)
    assert _session(options).loras == {"partial": True, "folder": "own", "local_files_only": False}


def test_another_model(session: Any) -> None:
    """Its own size and steps, the same seed; one that is not there changes nothing."""
    session.reopen = lambda name: KleinPipeline.from_pretrained(name, quantize=8)
    before = session.pipe
    session.line("!model tiny")
    assert session.told[-1] == "model tiny: tiny"
    assert session.pipe is not before
    assert (session.settings["seed"], session.settings["num_inference_steps"]) == (7, None)
    kept = session.pipe
    with pytest.raises(CheckpointError):
        session.line("!model ./nothing")
    assert session.pipe is kept


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("!seed x", "!seed is 'x'; it must be a whole number"),
        ("!seed -1", "seed is -1; it must be a whole number from 0"),
        ("!size 100x64", "width is 100; it must be a multiple of 16"),
        ("!size big", "!size is 'big'; it must be WIDTHxHEIGHT (1024x768), an aspect (16:9), megapixels (2mp)"),
        ("!steps 0", "steps is 0; it must be a whole number from 1 to 1000"),
        ("!svae x.png", "!svae is not a command; did you mean !save?"),
        ("!save", "!save needs a name"),
        ("!save x.png", "there are none yet"),
        ("!show", "there are none yet"),
        ("!undo", "there is no picture to forget"),
        ("100x64 a star", "width is 100"),
    ],
)
def test_lines_that_cannot_be(session: Any, line: str, words: str) -> None:
    """They change nothing."""
    before = dict(session.settings)
    with pytest.raises(RequestError, match=re.escape(words)):
        session.line(line)
    assert session.settings == before


# Becomes a command whose terminal stdin is, with Ctrl-C heard.
OWN_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """The command in a terminal of 24 lines."""

    def __init__(self, folder: Path, *arguments: str, columns: int = 80, **environment: str):
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        kept = {**os.environ, "TERM": "xterm-256color", "HOME": str(folder), "PYTHONWARNINGS": "error", **environment}
        strange = ("XDG_", "KLEIN_", "COLUMNS", "LINES")  # the size is the terminal's own
        kept = {name: value for name, value in kept.items() if not name.startswith(strange)}
        command = [sys.executable, "-c", OWN_TERMINAL, sys.executable, "-m", "klein_mlx", *arguments]
        pipes: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
        self.process = subprocess.Popen(command, cwd=folder, env=kept, **pipes)
        os.close(theirs)
        self.shown = ""
        self.decode = codecs.getincrementaldecoder("utf-8")().decode  # a read may end within a character

    def settle(self) -> None:
        """Before a signal at the prompt: between showing it and waiting for a key, readline hears none."""
        time.sleep(0.5)

    def until(self, words: str, seconds: float = 60) -> str:
        """What was shown since the last time, up to and with these words."""
        deadline = time.monotonic() + seconds
        while words not in self.shown:
            piece = self.read(max(0, deadline - time.monotonic()))
            assert piece, f"{words!r} did not come, but: {self.shown!r}"
            self.shown += self.decode(piece)
        found, _, self.shown = self.shown.partition(words)
        return found + words

    def read(self, seconds: float) -> bytes:
        """What is shown next; nothing at the session's end, which Linux tells by an error, or if nothing came."""
        with contextlib.suppress(OSError):
            if select.select([self.ours], [], [], seconds)[0]:
                return os.read(self.ours, 1 << 16)
        return b""

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def end(self) -> int:
        while self.read(60):  # on macOS a process ends only when what it printed was read
            pass
        return self.process.wait(60)

    def close(self) -> None:
        self.process.kill()
        os.close(self.ours)
        self.process.wait()


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    """Opens a Terminal in this folder; what still runs in it at the end is killed."""
    terminals: list[Terminal] = []

    def open_terminal(*arguments: str, **options: Any) -> Terminal:
        terminals.append(Terminal(tmp_path, *arguments, **options))
        return terminals[-1]

    yield open_terminal
    for terminal in terminals:
        terminal.close()


def test_a_session_in_a_terminal(tmp_path: Path, opened: Any) -> None:
    """Prompts, an edit, Ctrl-C in a picture and at the prompt, a mistake, Ctrl-D; and the history file."""
    terminal = opened("-m", "tiny", "--seed", "7", "--steps", "1")
    assert "tiny: tiny. Type a prompt" in terminal.until("klein> ")
    terminal.type("a red circle\n")
    shown = terminal.until("klein> ")
    assert "$1  a-red-circle-7.png  seed 7" in shown
    assert "\u2580" in shown, "drawn with half blocks"
    terminal.type("!show off\n")
    terminal.until("klein> ")
    terminal.type("$ make the circle green\n")
    assert "$2  make-the-circle-green-7.png" in terminal.until("klein> ")
    terminal.type("!steps 1000\n")
    terminal.until("klein> ")
    terminal.type("a star\n")
    terminal.until("steps:")
    terminal.type("\x03")
    assert "cancelled" in terminal.until("klein> ", 10)
    terminal.type("!stpes 1\n")
    assert "error: !stpes is not a command; did you mean !steps?" in terminal.until("klein> ")
    terminal.settle()
    terminal.type("half a line\x03")
    assert "Ctrl-D ends the session" in terminal.until("klein> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    pictures = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert pictures == ["a-red-circle-7.png", "make-the-circle-green-7.png"]
    history = tmp_path / ".local/state/klein-mlx/history"
    lines = history.read_text().replace("\\040", " ").splitlines()  # as libedit writes a blank, below its own heading
    assert lines[lines[0].startswith("_HiStOrY") :][:2] == ["a red circle", "!show off"]
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_a_narrow_terminal(opened: Any) -> None:
    """Bars and pictures keep to its 20 columns."""
    arguments = ("a star", "-m", "tiny", "--seed", "7", "--show-steps", "-o", "x.png")
    terminal = opened(*arguments, columns=20)
    shown = terminal.until("x.png\r\n")
    assert terminal.end() == 0
    lines = re.sub(r"\033\[[\d;]*[A-Za-z]", "", shown).replace("\r", "\n").splitlines()
    assert any("\u2580" in line for line in lines)
    assert any(line.startswith("step") for line in lines)
    assert max(map(len, lines)) <= 20


def test_a_picture_is_drawn_beside_json(opened: Any) -> None:
    """--quiet and --json leave the terminal to --show."""
    terminal = opened("a star", "-m", "tiny", "--seed", "7", "--steps", "1", "--show", "--quiet", "--json")
    assert "\u2580" in terminal.until('"files"')
    assert terminal.end() == 0


def test_kill_ends_a_session(opened: Any) -> None:
    """At the prompt too, where Ctrl-C does not."""
    terminal = opened("-m", "tiny")
    terminal.until("klein> ")
    terminal.settle()
    terminal.process.send_signal(signal.SIGTERM)
    terminal.until("interrupted")
    assert terminal.end() == 128 + signal.SIGTERM


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_a_plain_terminal_gets_no_pictures(opened: Any, environment: dict[str, str]) -> None:
    terminal = opened("-m", "tiny", "--seed", "7", "--steps", "1", "--show", **environment)
    terminal.until("klein> ")
    terminal.type("a star\n")
    shown = terminal.until("klein> ")
    assert "\u2580" not in shown
    assert "\033[38" not in shown
    terminal.type("!show\n")
    assert "this terminal cannot show pictures; it is in a-star-7.png" in terminal.until("klein> ")
    terminal.type("!quit\n")
    assert terminal.end() == 0


def test_options_of_a_session_are_kept_to(tmp_path: Path, opened: Any) -> None:
    """The pictures' format, and that they hold no recipe."""
    terminal = opened("-m", "tiny", "--seed", "7", "--steps", "1", "--format", "webp", "--no-metadata")
    terminal.until("klein> ")
    terminal.type("a secret star\n!save copy.png\n!quit\n")
    assert terminal.end() == 0
    pictures = sorted(path for path in tmp_path.iterdir() if path.is_file())
    assert [path.name for path in pictures] == ["a-secret-star-7.webp", "copy.png"]
    for path in pictures:
        assert b"secret" not in path.read_bytes()


@pytest.mark.parametrize(
    "options", [("-o", "x.png"), ("--grid",), ("--json",), ("--enhance",), ("--open",), ("--progress", "json")]
)
def test_options_that_a_session_does_not_have(opened: Any, options: tuple[str, ...]) -> None:
    """They are refused, not ignored."""
    terminal = opened("-m", "tiny", *options)
    assert "needs a prompt; a session, which begins without one, does not take it" in terminal.until("take it")
    assert terminal.end() == 2
