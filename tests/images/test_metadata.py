"""Recipes inside pictures: round trips in every format, no secrets, and metadata that is damaged or hostile."""

import io
import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import klein_mlx
from klein_mlx.errors import RequestError
from klein_mlx.images.saving import fits, parameters_text, parse_parameters, read_metadata, save_image

PROMPT = '赤い狐 🦊👩‍👩‍👧 مرحبا <b>&amp; "quoted" \\ \x00\x0b\ufffe end]]>'
RECIPE: dict[str, Any] = {
    "recipe": 1,
    "klein_mlx": "0.1.0",
    "prompt": PROMPT,
    "negative": "ぼやけた, dull: 1",
    "seed": 2**64 - 1,
    "steps": 4,
    "guidance": 1.0,
    "size": "64x48",
    "model": {"id": "tiny", "fingerprint": "ab" * 32},
}
SUFFIXES = (".png", ".jpg", ".webp")


def picture() -> Image.Image:
    return Image.effect_noise((64, 48), 60).convert("RGB")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_recipe_comes_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    klein_mlx.save(picture(), path, recipe=RECIPE)
    found = read_metadata(path)
    assert found.recipe == RECIPE
    assert found.parameters == parameters_text(RECIPE)
    told = parse_parameters(found.parameters)
    assert told["prompt"] == PROMPT.replace("\x00", "\ufffd").replace("\x0b", "\ufffd").replace("\ufffe", "\ufffd")
    assert told["negative"] == RECIPE["negative"]
    assert told["settings"]["Seed"] == str(2**64 - 1)
    assert told["settings"]["Size"] == "64x48"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_pixels_do_not_depend_on_it_and_the_bytes_on_no_time(tmp_path: Path, suffix: str) -> None:
    image = picture()
    for name, recipe in (("a", RECIPE), ("b", RECIPE), ("c", None)):
        save_image(image, tmp_path / f"{name}{suffix}", recipe=recipe)
    a, b, c = ((tmp_path / f"{name}{suffix}").read_bytes() for name in "abc")
    assert a == b
    assert len(c) < len(a)
    assert read_metadata(tmp_path / f"c{suffix}").recipe is None
    with Image.open(tmp_path / f"a{suffix}") as with_recipe, Image.open(tmp_path / f"c{suffix}") as without:
        assert with_recipe.convert("RGB").tobytes() == without.convert("RGB").tobytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_xmp_is_well_formed_and_holds_the_prompt(tmp_path: Path, suffix: str) -> None:
    import xml.etree.ElementTree as xml

    save_image(picture(), tmp_path / f"x{suffix}", recipe=RECIPE)
    with Image.open(tmp_path / f"x{suffix}") as image:
        packet = image.info.get("xmp") or image.info["XML:com.adobe.xmp"]
    tree = xml.fromstring(packet if isinstance(packet, str) else packet.decode())
    (text,) = tree.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li")
    assert text.text
    assert text.text.startswith("赤い狐 🦊👩‍👩‍👧 مرحبا <b>&amp; ")


def test_exif_is_what_the_standard_wants(tmp_path: Path) -> None:
    """Types and charset of each entry, read by Pillow: UTF-16 in the file's own byte order, the size, sRGB."""
    save_image(picture(), tmp_path / "x.jpg", recipe={**RECIPE, "prompt": "狐"})
    with Image.open(tmp_path / "x.jpg") as image:
        exif = image.getexif()
        inner = exif.get_ifd(0x8769)
    assert exif[0x010E].encode("latin-1").decode() == "狐"  # Pillow reads EXIF's text as Latin-1
    assert (exif[0x0131], exif[0x010F]) == ("AI generated;flux2;klein_mlx", "Black Forest Labs")
    assert inner[0x9286][:8] == b"UNICODE\0"
    assert inner[0x9286][8:].decode("utf-16-be").startswith("狐\n")
    assert (inner[0xA002], inner[0xA003], inner[0xA001], inner[0x9000]) == (64, 48, 1, b"0232")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_very_long_prompt(tmp_path: Path, suffix: str) -> None:
    """A JPEG's segments end at 64 KiB: it keeps the beginning, and `fits` says so."""
    long = {**RECIPE, "prompt": "狐 and " * 12_000}
    save_image(picture(), tmp_path / f"x{suffix}", recipe=long)
    found = read_metadata(tmp_path / f"x{suffix}")
    assert found.parameters
    assert found.parameters.startswith("狐 and 狐")
    assert fits({".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[suffix], long) == (suffix != ".jpg")
    assert found.recipe == (None if suffix == ".jpg" else long)


def test_what_other_programs_write(tmp_path: Path) -> None:
    text = (
        'a cat, "odd": 1\nsecond line\nNegative prompt: dog\nSteps: 20, Sampler: DPM++ 2M, Model hash: "a,b", Seed: 5'
    )
    info = PngInfo()
    info.add_text("parameters", text)
    picture().save(tmp_path / "x.png", pnginfo=info)
    found = read_metadata(tmp_path / "x.png")
    assert (found.recipe, found.parameters) == (None, text)
    told = parse_parameters(text)
    assert told["prompt"] == 'a cat, "odd": 1\nsecond line'
    assert told["negative"] == "dog"
    assert told["settings"] == {"Steps": "20", "Sampler": "DPM++ 2M", "Model hash": '"a,b"', "Seed": "5"}
    assert parse_parameters("only words")["prompt"] == "only words"


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(*chunks: bytes) -> bytes:
    file = io.BytesIO()
    picture().save(file, format="PNG")
    content = file.getvalue()
    return content[:33] + b"".join(chunks) + content[33:]


BOMB = zlib.compress(bytes(64 * 1024 * 1024))
HOSTILE = {
    "an iTXt that ends early": chunk(b"iTXt", b"klein_mlx\0\0"),
    "an iTXt cut in its header": struct.pack(">I", 2**31 - 1) + b"iTXtklein_mlx",
    "a zTXt bomb": chunk(b"zTXt", b"klein_mlx\0\0" + BOMB),
    "an iTXt bomb": chunk(b"iTXt", b"klein_mlx\0\1\0\0\0" + BOMB),
    "bytes that are no UTF-8": chunk(b"iTXt", b"klein_mlx\0\0\0\0\0\xff\xfe\x80"),
    "JSON that is no object": chunk(b"iTXt", b"klein_mlx\0\0\0\0\0[1, 2]"),
    "JSON without a version": chunk(b"iTXt", b'klein_mlx\0\0\0\0\0{"prompt": "x"}'),
    "deep JSON": chunk(b"iTXt", b"klein_mlx\0\0\0\0\0" + b"[" * 200_000),
    "a huge number": chunk(b"iTXt", b'klein_mlx\0\0\0\0\0{"recipe": ' + b"9" * 10_000 + b"}"),
    "huge XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b"<a>" * 4_000_000),
    "entities": chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'),
}


def outcome(path: Path) -> str:
    """What is read, in a word, or the error's line."""
    try:
        found = read_metadata(path)
    except RequestError as error:
        return str(error)
    return "recipe" if found.recipe else "parameters" if found.parameters else "nothing"


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_metadata_counts_as_none(tmp_path: Path, case: str) -> None:
    (tmp_path / "x.png").write_bytes(png_with(HOSTILE[case]))
    told = outcome(tmp_path / "x.png")
    assert told in ("nothing", "parameters") or told.startswith(f"picture {tmp_path / 'x.png'} cannot be read: ")
    assert "\n" not in told


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_mutated_files_never_crash(tmp_path: Path, suffix: str) -> None:
    """Bytes changed, removed and cut at random in what stands before the pixels: a recipe, none, or one line."""
    save_image(picture(), tmp_path / f"x{suffix}", recipe=RECIPE)
    content, draw = (tmp_path / f"x{suffix}").read_bytes(), random.Random(5)
    path = tmp_path / f"y{suffix}"
    outcomes = set()
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(min(len(changed), 2500))
            changed[at : at + draw.choice((0, 1, 1, 4))] = draw.randbytes(draw.choice((0, 1, 1, 4)))
        path.write_bytes(changed[: draw.choice((len(changed), len(changed), draw.randrange(len(changed))))])
        told = outcome(path)
        assert "\n" not in told
        outcomes.add(told if told == "recipe" else told.startswith("picture "))
    assert {"recipe", True} <= outcomes


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.png", None, "does not exist"),
        ("text.png", b"hello", "it is not a PNG, JPEG or WebP"),
        ("empty.png", b"", "the file is empty"),
    ],
)
def test_what_is_no_picture(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=words):
        read_metadata(tmp_path / name)


def test_json_is_one_line_of_standard_json(tmp_path: Path) -> None:
    save_image(picture(), tmp_path / "x.png", recipe=RECIPE)
    with Image.open(tmp_path / "x.png") as image:
        text = image.info["klein_mlx"]
    assert json.loads(text) == RECIPE
    assert "\n" not in text
    assert "\0" not in text
