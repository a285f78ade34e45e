"""A picture's recipe inside its file: PNG text, EXIF and XMP, written in the one save and read back from any picture.

It knows dicts, bytes and PIL; not what a recipe means. Three forms say the same: the JSON object that `again` reads,
the `parameters` text that other programs show, and an XMP description, which holds the prompt alone. Nothing in them
depends on the time: the same picture is the same file.
"""

import json
import re
import struct
import warnings
import xml.etree.ElementTree as xml
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from PIL import Image

from klein_mlx.errors import RequestError

KEY = "klein_mlx"  # of the PNG text that holds the JSON
NAMESPACE = "urn:klein_mlx:recipe"
MAX_SEGMENT = 65_000  # bytes of EXIF or XMP in a JPEG, whose segments end at 65,533
MAX_READ = 8 * 1024 * 1024  # bytes of metadata that are looked at
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, struct.error)
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ASCII, _SHORT, _LONG, _RATIONAL, _UNDEFINED = 2, 3, 4, 5, 7


@dataclass(frozen=True)
class Found:
    """What a picture says of itself. recipe: klein_mlx's own, or None. parameters: the text form, or None."""

    recipe: dict[str, Any] | None
    parameters: str | None


def save_options(image: Image.Image, format: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """What `image.save` takes so that the file holds the recipe.

    format: PNG, JPEG or WEBP. recipe: JSON values; an empty one gives no options. A JPEG whose recipe is over its
    limits (a prompt of 20,000 words) keeps the beginning of the text alone.
    """
    if not recipe:
        return {}
    text, told = parameters_text(recipe), compact_json(recipe)
    prompt = recipe.get("prompt") or ""
    if format == "PNG":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_itxt("parameters", text)
        info.add_itxt(KEY, told)
        info.add_itxt("XML:com.adobe.xmp", _xmp(prompt, None).decode())
        return {"pnginfo": info}
    xmp = _xmp(prompt, told)
    if format == "JPEG" and len(xmp) > MAX_SEGMENT:
        xmp, text, prompt = _xmp(prompt[:4000], None), text[:16_000], prompt[:4000]
    return {"exif": _exif(image.size, prompt, text), "xmp": xmp}


def fits(format: str, recipe: dict[str, Any]) -> bool:
    """Whether a file of this format can hold the whole recipe."""
    return format != "JPEG" or len(_xmp(recipe.get("prompt") or "", compact_json(recipe))) <= MAX_SEGMENT


def compact_json(recipe: dict[str, Any]) -> str:
    """JSON in one line; what XML cannot hold is escaped, everything else stays as it is."""
    text = json.dumps(recipe, ensure_ascii=False, separators=(",", ":"))
    return _NOT_XML.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def parameters_text(recipe: dict[str, Any]) -> str:
    """The text form that Stable Diffusion web UIs write: the prompt, the negative prompt, a line of settings."""
    model = recipe.get("model") or {}
    settings = {
        "Steps": recipe.get("steps"),
        "Sampler": "Euler",
        "CFG scale": f"{recipe.get('guidance') or 1:g}",
        "Seed": recipe.get("seed"),
        "Size": recipe.get("size"),
        "Model": model.get("id") or model.get("name"),
        "Model hash": (model.get("fingerprint") or "")[:10] or None,
        "Denoising strength": recipe.get("strength"),
        "Version": f"klein_mlx {recipe.get('klein_mlx')}",
    }
    lines = [recipe.get("prompt") or ""]
    if recipe.get("negative"):
        lines.append(f"Negative prompt: {recipe['negative']}")
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None))
    return _clean("\n".join(lines))


def read_metadata(path: str | Path) -> Found:
    """What a picture's file says of how it was made; its pixels are not decoded.

    Raises RequestError for a file that is no picture. Metadata that is damaged counts as none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
                info = dict(image.info)
                text = {name: value for name, value in info.items() if isinstance(value, str)}
    except FileNotFoundError:
        raise RequestError(f"image {path} does not exist") from None
    except IsADirectoryError:
        raise RequestError(f"image {path} is a folder; name a picture") from None
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        reason = "it is no PNG, JPEG or WebP" if "cannot identify" in str(error) else str(error).partition("\n")[0]
        raise RequestError(f"image {path} cannot be read: {reason or type(error).__name__}") from None
    recipe = _parse(text.get(KEY)) or _recipe_of_xmp(info.get("xmp"))
    return Found(recipe, text.get("parameters") or _user_comment(info.get("exif")))


def parse_parameters(text: str) -> dict[str, Any]:
    """The parts of a web UI's text form: prompt, negative, and the settings by their names, all as text."""
    body, _, last = text.rstrip().rpartition("\n")
    settings = dict(re.findall(r'([A-Z][\w ]{0,40}): ("(?:[^"\\]|\\.)*"|[^,]*)(?:, |$)', last))
    if "Steps" not in settings:
        body, settings = text.rstrip(), {}
    prompt, _, negative = body.partition("\nNegative prompt: ")
    return {"prompt": prompt, **({"negative": negative} if negative else {}), "settings": settings}


def _clean(text: str) -> str:
    """Text that XML can hold; a replacement character stands where it could not."""
    return _NOT_XML.sub("\ufffd", text)


def _parse(text: str | bytes | None) -> dict[str, Any] | None:
    if not text or len(text) > MAX_READ:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and type(value.get("recipe")) is int else None


# ---- XMP ----


def _xmp(prompt: str, told: str | None) -> bytes:
    """An XMP packet: the prompt as dc:description, which file managers show, and the recipe's JSON if there is one."""
    own = f' xmlns:klein="{NAMESPACE}"><klein:recipe>{escape(told)}</klein:recipe' if told else ""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/"'
        f'{own}><dc:description><rdf:Alt><rdf:li xml:lang="x-default">{escape(_clean(prompt))}</rdf:li>'
        '</rdf:Alt></dc:description></rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    ).encode()


def _recipe_of_xmp(packet: Any) -> dict[str, Any] | None:
    """From an XMP packet, as an element or, as some programs rewrite it, an attribute."""
    if not isinstance(packet, bytes) or len(packet) > MAX_READ or b"<!DOCTYPE" in packet or b"<!ENTITY" in packet:
        return None
    try:
        tree = xml.fromstring(packet.decode("utf-8-sig").strip("\0 \r\n\t"))
    except (xml.ParseError, ValueError, RecursionError):
        return None
    name = f"{{{NAMESPACE}}}recipe"
    return next((r for node in tree.iter() if (r := _parse(node.text if node.tag == name else node.get(name)))), None)


# ---- EXIF ----


def _exif(size: tuple[int, int], prompt: str, text: str) -> bytes:
    """Big-endian EXIF, as its UTF-16 comment is: the prompt, the text form, and what EXIF wants of every picture."""
    comment = b"UNICODE\0" + text.encode("utf-16-be")
    unit = struct.pack(">II", 72, 1)
    inner = [
        (0x9000, _UNDEFINED, b"0232"),
        (0x9101, _UNDEFINED, b"\1\2\3\0"),
        (0x9286, _UNDEFINED, comment),
        (0xA000, _UNDEFINED, b"0100"),
        (0xA001, _SHORT, struct.pack(">H", 1)),  # sRGB
        (0xA002, _LONG, struct.pack(">I", size[0])),
        (0xA003, _LONG, struct.pack(">I", size[1])),
    ]
    outer = [
        (0x010E, _ASCII, _clean(prompt).encode() + b"\0"),
        (0x011A, _RATIONAL, unit),
        (0x011B, _RATIONAL, unit),
        (0x0128, _SHORT, struct.pack(">H", 2)),
        (0x0131, _ASCII, b"klein_mlx\0"),
        (0x0213, _SHORT, struct.pack(">H", 1)),
    ]
    where = 8 + len(_directory([*outer, (0x8769, _LONG, bytes(4))], 8))
    first = _directory([*outer, (0x8769, _LONG, struct.pack(">I", where))], 8)
    return b"Exif\0\0" + b"MM\0*" + struct.pack(">I", 8) + first + _directory(inner, where)


def _directory(entries: list[tuple[int, int, bytes]], offset: int) -> bytes:
    """A TIFF directory that begins at `offset`, its larger values behind it."""
    sizes = {_ASCII: 1, _SHORT: 2, _LONG: 4, _RATIONAL: 8, _UNDEFINED: 1}
    behind, rows = b"", struct.pack(">H", len(entries))
    start = offset + 2 + 12 * len(entries) + 4
    for tag, kind, value in sorted(entries):
        if len(value) <= 4:
            field = value.ljust(4, b"\0")
        else:
            field = struct.pack(">I", start + len(behind))
            behind += value + b"\0" * (len(value) % 2)
        rows += struct.pack(">HHI", tag, kind, len(value) // sizes[kind]) + field
    return rows + bytes(4) + behind


def _user_comment(exif: Any) -> str | None:
    """The text of an EXIF comment, whichever way its UTF-16 lies; None where there is none."""
    if not isinstance(exif, bytes) or len(exif) > MAX_READ:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damage
            read = Image.Exif()
            read.load(exif)
            value = read.get_ifd(0x8769).get(0x9286)
    except _UNREADABLE:
        return None
    if isinstance(value, str):
        value = value.encode("utf-8", "replace")
    if not isinstance(value, bytes) or len(value) <= 8:
        return None
    body = value[8:]
    if value.startswith(b"UNICODE\0"):
        big, little = (body.decode(name, "replace") for name in ("utf-16-be", "utf-16-le"))
        text = max(big, little, key=lambda text: sum(char.isascii() for char in text))
    else:
        text = body.decode("utf-8", "replace")
    return text.strip("\0 ") or None
