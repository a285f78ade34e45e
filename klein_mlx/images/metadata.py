"""A picture's recipe inside its file: PNG text, EXIF and XMP, written in the one save and read back from any picture.

It knows dicts, bytes and PIL; not what a recipe means. Three forms say the same: the JSON object that `again` reads,
the `parameters` text that other programs show, and an XMP description, which holds the prompt alone. Nothing in them
depends on the time: the same picture is the same file.
"""

import json
import os
import re
import xml.etree.ElementTree as xml
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from PIL import Image
from PIL.ExifTags import Base

from klein_mlx.errors import RequestError
from klein_mlx.images.reading import reading

KEY = "klein_mlx"  # of the PNG text that holds the JSON
NAMESPACE = "urn:klein_mlx:recipe"
MAX_SEGMENT = 65_000  # bytes of EXIF or XMP in a JPEG, whose segments end at 65,533
MAX_READ, MAX_LEVELS = 8 * 1024 * 1024, 8  # bytes of metadata that are looked at; levels of JSON
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


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
        return {"pnginfo": info, "exif": _exif(image.size)}
    xmp = _xmp(prompt, told)
    if format == "JPEG" and len(xmp) > MAX_SEGMENT:
        xmp, text, prompt = _xmp(prompt[:4000], None), text[:16_000], prompt[:4000]
    exif = _exif(image.size, (prompt, text))
    while format == "JPEG" and len(exif) > MAX_SEGMENT:
        prompt, text = prompt[: len(prompt) // 2], text[: len(text) // 2]
        exif = _exif(image.size, (prompt, text))
    return {"exif": exif, "xmp": xmp}


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
    if os.path.isdir(path):
        raise RequestError(f"image {path} is a folder; name a picture")
    if not os.path.exists(path):
        raise RequestError(f"image {path} does not exist")
    if not os.path.isfile(path):
        raise RequestError(f"image {path} is not a regular file")
    with (
        reading(f"image {path}", path, "it is no PNG, JPEG or WebP"),
        Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image,
    ):
        info = dict(image.info)
    text = {name: value[:MAX_READ] for name, value in info.items() if isinstance(value, str)}
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
    return value if isinstance(value, dict) and type(value.get("recipe")) is int and not _is_deep(value) else None


def _is_deep(value: Any) -> bool:
    """Whether lists and objects stand in each other more often than in any recipe: what reads one recurses."""
    level = [value]
    for _ in range(MAX_LEVELS):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items]
    return any(isinstance(item, dict | list) for item in level)


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


def _exif(size: tuple[int, int], told: tuple[str, str] | None = None) -> bytes:
    """EXIF with what BFL's own code says of provenance; told: the prompt and the text form, where they go here too."""
    exif = Image.Exif()
    exif[Base.Software] = "AI generated;flux2;klein_mlx"
    exif[Base.Make] = "Black Forest Labs"
    if told is None:
        return exif.tobytes()
    prompt, text = told
    exif[Base.ImageDescription] = _clean(prompt).encode()  # a str would lose what is not ASCII
    exif[Base.XResolution] = exif[Base.YResolution] = 72.0
    exif[Base.ResolutionUnit], exif[Base.YCbCrPositioning] = 2, 1
    exif[Base.ExifOffset] = {
        Base.ExifVersion: b"0232",
        Base.ComponentsConfiguration: b"\1\2\3\0",
        Base.UserComment: b"UNICODE\0" + text.encode("utf-16-be"),  # in the byte order of Pillow's EXIF
        Base.FlashPixVersion: b"0100",
        Base.ColorSpace: 1,  # sRGB
        Base.ExifImageWidth: size[0],
        Base.ExifImageHeight: size[1],
    }
    return exif.tobytes()


def _user_comment(exif: Any) -> str | None:
    """The text of an EXIF comment, whichever way its UTF-16 lies; None where there is none."""
    if not isinstance(exif, bytes) or len(exif) > MAX_READ:
        return None
    try:
        with reading("EXIF", None):
            read = Image.Exif()
            read.load(exif)
            value = read.get_ifd(Base.ExifOffset).get(Base.UserComment)
    except RequestError:
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
