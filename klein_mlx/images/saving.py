"""Pictures into files: checked before any work, written beside and put into place, never half of one.

A recipe goes in with them, in three forms that say the same: the JSON object that `again` reads, the `parameters` text
that other programs show, and an XMP description, which holds the prompt alone. Nothing in them depends on the time: the
same picture is the same file.
"""

import fcntl
import io
import json
import os
import re
import secrets
import xml.etree.ElementTree as xml
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from PIL.ExifTags import Base

from klein_mlx.errors import RequestError
from klein_mlx.images.reading import reading

MAX_NAME = 255  # bytes of a file's name, on every common disk
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_TEMPORARY = re.compile(r"\.klein-[0-9a-f]{16}\.part")
_QUALITY = {"JPEG": {"quality": 95}, "WEBP": {"quality": 95}}


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse, before any work, a path to which `save_image` could not write."""
    folder = path.parent
    if "\0" in str(path):
        raise RequestError(f"output {str(path)!r} has a zero byte in its name; no disk allows that")
    if (length := len(os.fsencode(path.name))) > MAX_NAME:
        raise RequestError(f"output {path.name[:30]}... has a name of {length} bytes; it must have at most {MAX_NAME}")
    if path.suffix.lower() not in FORMATS:
        ending = f"ends in {path.suffix}" if path.suffix else "is not a folder, and has no suffix"
        raise RequestError(f"output {path} {ending}; it must end in {', '.join(FORMATS)}")
    if not os.path.isdir(folder):
        raise RequestError(f"output folder {folder} does not exist; make it first")
    if os.path.isdir(path):
        raise RequestError(f"output {path} is a folder; name a file")
    if not overwrite and os.path.lexists(path):
        raise RequestError(f"output {path} exists; choose another name, or overwrite it with --force")
    probe = _beside(path)
    try:  # trying is the only sure test: for root, read-only disks and network folders
        probe.open("xb").close()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise RequestError(f"output folder {folder} is not writable ({error.strerror}); choose another") from None


def encode_image(
    image: Image.Image, suffix: str, recipe: dict[str, Any] | None = None, quality: int | None = None
) -> bytes:
    """A picture's file as bytes: suffix as in FORMATS; recipe, JSON values, goes inside. quality: 0..100, of JPEG and
    WebP (95)."""
    file = io.BytesIO()
    kind = FORMATS[suffix]
    options = _QUALITY.get(kind, {})
    if options and quality is not None:
        options = {"quality": quality}
    image.save(file, format=kind, **options, **save_options(image, kind, recipe or {}))
    return file.getvalue()


def save_image(
    image: Image.Image, path: str | Path, overwrite: bool = False, recipe: dict[str, Any] | None = None
) -> None:
    """Write beside, flush, then put into place: the path holds a whole picture or what it held before.

    path: ending in .png, .jpg, .jpeg or .webp. recipe: JSON values to put inside, as a Picture has them, or None.
    Raises RequestError if it exists and `overwrite` is false, or if the disk refuses.
    """
    path = Path(path)
    check_output(path, overwrite)
    with _refusals(path):
        data = encode_image(image, path.suffix.lower(), recipe)
    save_bytes(data, path, overwrite)


def save_bytes(data: bytes, path: Path, overwrite: bool = False) -> None:
    """The second half of `save_image`, for a picture that is encoded already."""
    beside = _beside(path)
    try:
        with _refusals(path), _held(beside) as file:
            # Not straight into the file: Pillow takes a write that a full disk cut short for a whole one.
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            _put(beside, path, overwrite)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """What the disk refuses, as RequestError."""
    try:
        yield
    except FileExistsError:
        raise RequestError(f"output {path} exists; choose another name, or overwrite it with --force") from None
    except OSError as error:
        raise RequestError(f"output {path} cannot be written: {error.strerror or error}") from None


def save_image_free(image: Image.Image, path: Path, recipe: dict[str, Any] | None = None) -> Path:
    """As save_image, under this name or, if another program has taken it meanwhile, the next free one; returns it."""
    number, free = 2, path
    while True:
        try:
            save_image(image, free, recipe=recipe)
            return free
        except RequestError:
            if not os.path.lexists(free):
                raise
        free, number = path.with_name(f"{path.stem}-{number}{path.suffix}"), number + 1


def _beside(path: Path) -> Path:
    """A new hidden name in the same folder, so that the final rename stays on one disk."""
    return path.parent / f".klein-{secrets.token_hex(8)}.part"


def _held(beside: Path) -> BinaryIO:
    """A new file, locked for as long as it is open, so that no other run takes it for a killed one's."""
    while True:
        file = beside.open("xb")
        with suppress(OSError):  # a disk without locks: nothing is ever removed there
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # removed between opening and locking it


def remove_stale(folder: Path) -> None:
    """Remove what killed runs left half-written in a folder: temporary files that nobody holds."""
    try:
        names = [name for name in os.listdir(folder) if _TEMPORARY.fullmatch(name)]
    except OSError:
        return
    for name in names:
        with suppress(OSError):
            handle = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(folder / name)
            finally:
                os.close(handle)


def _put(beside: Path, path: Path, overwrite: bool) -> None:
    if overwrite:
        os.replace(beside, path)
        return
    try:
        os.link(beside, path)  # unlike a rename, never replaces a file that appeared meanwhile
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links (exFAT, SMB)
        if os.path.lexists(path):
            raise FileExistsError(path) from None
        os.rename(beside, path)


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
        raise RequestError(f"picture {path} is a folder; name a picture")
    if not os.path.exists(path):
        raise RequestError(f"picture {path} does not exist")
    if not os.path.isfile(path):
        raise RequestError(f"picture {path} is not a regular file")
    with (
        reading(f"picture {path}", path, "it is not a PNG, JPEG or WebP"),
        Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image,
    ):
        info = dict(image.info)
    return metadata_of(info)


def metadata_of(info: Mapping[Any, Any]) -> Found:
    """The same of an opened picture's `info`."""
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
    own = f' xmlns:klein="{NAMESPACE}"><klein:recipe>{escape(told, quote=False)}</klein:recipe' if told else ""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/"'
        f'{own}><dc:description><rdf:Alt><rdf:li xml:lang="x-default">{escape(_clean(prompt), quote=False)}</rdf:li>'
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
