"""Pictures that the command is given as references, init images and masks, and what becomes of them: class I."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from faults import TINY, accepted, refused, run_fault
from PIL import Image, PngImagePlugin

SIDE = 64  # the smallest reference


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, data: bytes = b"") -> bytes:
    """A PNG of 8-bit RGB with these chunks before its data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def bomb(path: Path) -> None:
    """100 MB of one text, compressed to 100 kB, before an ordinary picture's data."""
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100 << 20), 9))
    path.write_bytes(png(SIDE, SIDE, text, data=bytes((3 * SIDE + 1) * SIDE)))


def heavy(path: Path) -> None:
    """A picture with 100 MB of metadata that nobody asked for."""
    path.write_bytes(png(SIDE, SIDE, chunk(b"prVt", bytes(100 << 20)), data=bytes((3 * SIDE + 1) * SIDE)))


def cut(kind: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        Image.effect_noise((200, 200), 90).convert("RGB").save(path, kind)
        path.write_bytes(path.read_bytes()[:2000])

    return make


def written(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def drawn(width: int, height: int) -> Callable[[Path], None]:
    return lambda path: Image.new("RGB", (width, height), "red").save(path)


def floating(path: Path) -> None:
    Image.fromarray(np.linspace(0, 2, SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE)).save(path)


HEIC = struct.pack(">I", 24) + b"ftypheic" + bytes(12)
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(touched) (w) file closefile\nshowpage\n%%EOF\n"

REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty.png": (written(b""), "empty.png cannot be read: the file is empty"),
    "text.png": (written(b"a red fox"), "text.png cannot be read: not a picture in a known format"),
    "page.png": (written(b"<!DOCTYPE html><html>404</html>"), "it is a web page; download the picture itself"),
    "pointer.png": (written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "it is a Git LFS pointer"),
    "drawing.svg": (written(b'<?xml version="1.0"?>\n<svg width="9"/>'), "it is SVG; convert it first: sips -s format"),
    "paper.pdf": (written(b"%PDF-1.7\n"), "it is a PDF; convert it first: sips -s format png"),
    "drawing.eps": (written(POSTSCRIPT), "it is PostScript; convert it first"),
    "eps-in-disguise.png": (written(POSTSCRIPT), "it is PostScript; convert it first"),
    "phone.heic": (written(HEIC), "it is HEIC, as iPhones write it; convert it first: sips -s format png"),
    "heic-in-disguise.jpg": (written(HEIC), "it is HEIC"),
    "film.png": (written(HEIC.replace(b"heic", b"qt  ")), "it is a video"),
    "cut.png": (cut("PNG"), "cut.png cannot be read: "),
    "cut.jpg": (cut("JPEG"), "cut.jpg cannot be read: "),
    "cut.webp": (cut("WEBP"), "cut.webp cannot be read: "),
    "float.tiff": (floating, "the image has floating-point pixels"),
    "dot.png": (drawn(1, 1), "a reference is 1 x 1; both sides must be at least 64 pixels"),
    "line.png": (drawn(1, 10_000), "a reference is 1 x 10000; both sides must be at least 64"),
    "strip.png": (drawn(64, 1024), "a reference is 64 x 1024; its aspect must be at most 8 : 1"),
    "wide.png": (written(png(15_000, 15_000)), "wide.png has over 178 million pixels; scale it down first"),
    "bomb.png": (written(png(65_535, 65_535)), "bomb.png has over 178 million pixels; scale it down first"),
    "negative.png": (written(png(2**31, 2**31)), "negative.png"),
    "text-bomb.png": (bomb, "text-bomb.png cannot be read: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_to_start_from(tmp_path: Path, name: str) -> None:
    make, words = REFUSED[name]
    make(tmp_path / name)
    (tmp_path / "out.png").write_bytes(b"kept")
    outcome = refused("generate", "a star", "-i", name, "-o", "out.png", "--force", *TINY, folder=tmp_path, words=words)
    assert outcome.seconds < 10


@pytest.mark.parametrize(
    ("option", "given", "words"),
    [
        ("--image", "none.png", "none.png does not exist"),
        ("--init-image", "none.png", "none.png does not exist"),
        ("--mask", "none.png", "none.png does not exist"),
        ("--mask", "-", "- is stdin, which is not read; give a file"),
        ("--image", "-", "- is stdin, which is not read; give a file"),
        ("--image", ".", ". is not a file"),
        ("--image", "pipe.png", "pipe.png is not a file"),
        ("--image", "https://example.com/fox.png", "is a URL; download it, and give the file"),
        ("--image", "", "--image '' does not exist"),
        ("--image", "loop.png", "loop.png"),
        ("--image", "x" * 300 + ".png", "xxx"),
    ],
)
def test_paths_that_are_no_file(tmp_path: Path, option: str, given: str, words: str) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    drawn(SIDE, SIDE)(tmp_path / "in.png")
    start = ("--init-image", "in.png") if option == "--mask" else ()
    refused("generate", "a star", *start, f"{option}={given}", "-o", "out.png", *TINY, folder=tmp_path, words=words)


def test_eleven_references(tmp_path: Path) -> None:
    drawn(SIDE, SIDE)(tmp_path / "in.png")
    several = ["-i", "in.png"] * 17
    refused("generate", "a star", *several, "-o", "out.png", *TINY, folder=tmp_path, words=("17", "10"))


def test_the_same_reference_twice(tmp_path: Path) -> None:
    drawn(SIDE, SIDE)(tmp_path / "in.png")
    twice = ("-i", "in.png", "-i", "in.png")
    accepted("generate", "a star", *twice, "-o", "out.png", *TINY, folder=tmp_path, changes=["+out.png"])


def animate(path: Path) -> None:
    Image.new("RGB", (SIDE, SIDE), "red").save(path, save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))])


def phone(path: Path) -> None:
    """A camera's JPEG with a second picture in it, turned by its EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    first, second = Image.new("RGB", (96, 80), "red"), Image.new("RGB", (96, 80))
    first.save(path, "MPO", save_all=True, append_images=[second], exif=exif)


def commented(path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", "日本 🦊" * 1000)
    Image.new("RGB", (SIDE, SIDE)).save(path, pnginfo=info)


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("moving.gif", animate, "an animation; its first frame is used"),
        ("moving.webp", animate, "an animation; its first frame is used"),
        ("pages.tiff", animate, "it has several pages; the first is used"),
        ("phone.jpg", phone, "seed 0"),
        ("commented.png", commented, "seed 0"),
        ("heavy.png", heavy, "seed 0"),
        ("odd.png", drawn(70, 65), "a reference of 70 x 65 is used as 64 x 64"),
        ("clear.png", lambda path: Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 0)).save(path), "is taken as white"),
        ("grey.png", lambda path: Image.new("I;16", (SIDE, SIDE), 40_000).save(path), "seed 0"),
        ("print.jpg", lambda path: Image.new("CMYK", (SIDE, SIDE)).save(path), "seed 0"),
    ],
)
def test_pictures_that_are_read(tmp_path: Path, name: str, make: Callable[[Path], object], words: str) -> None:
    make(tmp_path / name)
    arguments = ("generate", "a star", "-i", name, "-o", "out.png", *TINY[:-1])
    outcome = accepted(*arguments, folder=tmp_path, words=words, changes=["+out.png"])
    if name == "phone.jpg":
        assert "animation" not in outcome.stderr


@pytest.mark.parametrize(
    ("mask", "code", "words"),
    [
        (Image.new("L", (SIDE, 2 * SIDE), 255), 2, "mask"),
        (Image.new("L", (2 * SIDE, 2 * SIDE), 255), 2, "mask"),
        (Image.new("L", (SIDE, SIDE), 0), 2, "mask"),
        (Image.new("L", (SIDE, SIDE), 255), 0, ""),
        (Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 255)), 0, ""),
    ],
    ids=["another aspect", "another size", "black", "white", "RGBA"],
)
def test_masks(tmp_path: Path, mask: Image.Image, code: int, words: str) -> None:
    drawn(SIDE, SIDE)(tmp_path / "in.png")
    mask.save(tmp_path / "mask.png")
    edit = ("--init-image", "in.png", "--mask", "mask.png", "-o", "out.png")
    outcome = run_fault("generate", "a star", *edit, *TINY, folder=tmp_path)
    assert outcome.code == code, outcome
    assert words in outcome.stderr
    assert outcome.changes == (("+out.png",) if code == 0 else ())
