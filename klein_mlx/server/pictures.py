"""Pictures that clients send: bytes only, checked by content; no path or URL is ever opened."""

import base64
import binascii
import io
import re
import warnings
from typing import TYPE_CHECKING

from klein_mlx.errors import RequestError
from klein_mlx.server.settings import MAX_PIXELS

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, OverflowError)
_DATA_URI = re.compile(r"data:[\w.+/-]{0,100}(?:;[\w=.+-]{1,40})*;base64,", re.ASCII | re.IGNORECASE)


def open_picture(data: bytes, what: str) -> "Image.Image":
    """A picture, not decoded yet. what: its name in messages.

    Raises RequestError for data that is no picture of FORMATS, or that has over MAX_PIXELS by its header.
    """
    from PIL import Image

    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes; MAX_PIXELS is the limit here
            image = Image.open(io.BytesIO(data), formats=[kind for kind in FORMATS if kind in Image.OPEN])
    except Image.DecompressionBombError:
        raise RequestError(f"{what} has too many pixels; it may have {MAX_PIXELS // 10**6} million pixels") from None
    except _UNREADABLE:
        raise RequestError(f"{what} is not a picture; it must be one of {', '.join(FORMATS)}") from None
    if image.width * image.height > MAX_PIXELS:
        raise RequestError(
            f"{what} is {image.width} x {image.height}; it may have {MAX_PIXELS // 10**6} million pixels"
        )
    return image


def load_picture(data: bytes, what: str) -> "Image.Image":
    """A picture, decoded. Raises RequestError as `open_picture` does, and for one that is damaged."""
    image = open_picture(data, what)
    try:
        image.load()
    except _UNREADABLE as error:
        raise RequestError(f"{what} cannot be read: {str(error) or type(error).__name__}") from None
    return image


def picture_size(data: bytes, what: str) -> tuple[int, int]:
    """(width, height) as its header says. Raises RequestError as `open_picture` does."""
    with open_picture(data, what) as image:
        return image.size


def decode_base64(text: str, what: str) -> bytes:
    """The bytes of a data URI or of plain base64. Raises RequestError for anything else, URLs and paths by name."""
    start = text[:256]
    if found := _DATA_URI.match(start):
        text = text[found.end() :]
    elif re.match(r"[a-zA-Z][a-zA-Z0-9+.-]{0,20}:", start):
        raise RequestError(f"{what} is a URL ({start[:40]!r}); send the picture itself, as base64 or a data URI")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"{what} is not base64; send the picture itself, as base64 or a data URI") from None


def request_field(error: RequestError) -> str | None:
    """The argument that an error is about, if it says so."""
    stated = getattr(error, "field", None)
    if isinstance(stated, str):
        return stated
    if re.match(r"\d+ x \d+ ", str(error)):  # too many pixels
        return "width"
    words = re.match(r"(?:a |the )?([a-z_]+)\b", str(error))
    name = words[1] if words else ""
    names = {"width", "height", "prompt", "seed", "strength", "extend", "image", "init_image", "lora", "sigmas"}
    known = names | {"mask", "reference", "num_inference_steps", "guidance_scale", "num_images_per_prompt"}
    if name == "reference":
        return "image"
    return name if name in known or "_" in name else None
