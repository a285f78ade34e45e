"""Pictures in and out: any file to right sRGB pixels, the reference's resize rules.

It knows PIL and pixels; not the model.
"""

import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image, ImageOps

from klein_mlx.errors import KleinError, RequestError, Shown, line_of

REFERENCE_AREA = 1024 * 1024  # a larger reference is scaled down to this many pixels
LARGE_REFERENCE_AREA = 2024 * 2024  # the same for a single large one, as in BFL's own code (diffusers has no such)
MIN_REFERENCE_SIDE, MAX_ASPECT = 64, 8

# What is opened. Pillow knows more: among them EPS, for which it would run Ghostscript, and data that is no picture.
READ = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "DIB", "JPEG2000", "PPM", "TGA", "ICO", "QOI")
CONVERT = "; convert it first: sips -s format png"
_SVG = re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!doctype svg[^>]*>\s*)?<svg", re.S | re.I)
# What people give instead: how it begins, what to say of it.
_NOT_READ: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"....ftyp(heic|heix|heim|heis|hevc|mif1|msf1)", re.S), f"it is HEIC, as iPhones write it{CONVERT}"),
    (re.compile(rb"....ftyp", re.S), "it is a video; save one of its frames"),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), f"it is PostScript{CONVERT}"),
    (re.compile(rb"%PDF"), f"it is a PDF{CONVERT}"),
    (re.compile(rb"8BPS"), f"it is Photoshop's{CONVERT}"),
    (_SVG, f"it is SVG{CONVERT}"),
    (re.compile(rb"\s*<(!doctype )?html", re.I), "it is a web page; download the picture itself"),
    (re.compile(rb"version https://git-lfs"), "it is a Git LFS pointer; fetch the file itself (git lfs pull)"),
)


def load_image(source: Any, what: str = "image") -> tuple[Image.Image, list[str]]:
    """Open a picture as 8-bit sRGB, upright.

    source: a path, a PIL image, or a numpy array (see `as_picture`). what: its name in messages. EXIF orientation is
    applied, an ICC profile converted to sRGB, alpha composited on white, 16 bits scaled to 8; an animation gives its
    first frame.
    Returns (image in mode RGB, notes on what was changed). Raises RequestError for a file that is no picture.
    """
    source = as_picture(source)
    given = isinstance(source, Image.Image)
    if not given and not isinstance(source, str | os.PathLike):
        kind = f"{type(source).__module__.partition('.')[0]}.{type(source).__name__}"
        rule = "it must be a path, a PIL image or a numpy array (H, W, 3)"
        raise RequestError(what, Shown(f"of type {kind.removeprefix('builtins.')}"), rule)
    name = what if given else f"{what} {os.fspath(source) or repr(source)}"
    with reading(name, None if given else source):
        if given:
            return _upright(source, what)
        _check_file(source, name)
        Image.init()  # a build of Pillow may lack some
        with Image.open(source, formats=[kind for kind in READ if kind in Image.OPEN]) as image:
            return _upright(image, os.fspath(source))
    raise AssertionError("unreachable")


@contextmanager
def reading(
    name: str, source: str | os.PathLike[str] | None, unknown: str = "not a picture in a known format"
) -> Iterator[None]:
    """Turn whatever Pillow raises of a damaged picture into a RequestError: its errors have no common parent.

    name: of the picture, in the message. source: its file, if it has one, which is asked for the reason. unknown: what
    is said of one that is in no format which is read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes, and of metadata that is not used here
            yield
    except KleinError:
        raise
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise RequestError(name, rule=f"has over {limit} million pixels; scale it down first") from None
    except Exception as error:
        reason = line_of(error) if source is None else _reason(source, error, unknown)
        raise RequestError(name, rule=f"cannot be read: {reason}") from None


def as_picture(source: Any) -> Any:
    """A numpy array as a PIL image; anything that is no array as it is.

    source: (H, W), (H, W, 3) or (H, W, 4), uint8, bool, or floats in 0..1. Raises RequestError for other arrays.
    """
    import numpy as np

    if not isinstance(source, np.ndarray):
        return source
    array = source[0] if source.ndim == 4 and source.shape[0] == 1 else source
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype.kind == "f" and array.size and bool((array >= 0).all() and (array <= 1).all()):
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if not fits or array.dtype != np.uint8 or not array.size:
        shown = Shown(f"an array of shape {source.shape} and type {source.dtype}")
        raise RequestError("image", shown, "it must be (H, W), (H, W, 3) or (H, W, 4), uint8 or floats in 0..1")
    return Image.fromarray(array)


def _check_file(source: str | os.PathLike[str], name: str) -> None:
    """Refuse what is no file of this machine."""
    if re.match(r"(https?|ftp|data|file|s3):", os.fspath(source)):
        raise RequestError(name, rule="is a URL; download it, and give the file")
    if os.fspath(source) == "-":
        raise RequestError(name, rule="is stdin, which is not read; give a file")
    if not os.path.exists(source):
        hint = "; give files one by one" if "," in os.fspath(source) else ""
        raise RequestError(name, rule=f"does not exist{hint}")
    if not os.path.isfile(source):
        raise RequestError(name, rule="is not a file")


def _reason(source: str | os.PathLike[str], error: BaseException, unknown: str) -> str:
    """Why a file is not read: what it is instead of a picture, else what Pillow says of it."""
    try:
        with open(source, "rb") as file:
            head = file.read(1024)
    except OSError as unread:
        return unread.strerror or str(unread)
    if not head:
        return "the file is empty"
    told = next((words for begins, words in _NOT_READ if begins.match(head)), None)
    return told or (unknown if "cannot identify" in str(error) else line_of(error))


def _upright(image: Image.Image, name: str) -> tuple[Image.Image, list[str]]:
    notes = []
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # iPhones and cameras write MPO: a JPEG with extras
        kind = "it has several pages; the first" if image.format == "TIFF" else "an animation; its first frame"
        notes.append(f"{name}: {kind} is used")
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:  # type: ignore[index]
        notes.append(f"{name}: what is transparent in it is taken as white")
    return _to_srgb(ImageOps.exif_transpose(image)), notes


def _to_srgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to RGB, in sRGB."""
    profile = image.info.get("icc_profile")
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        import numpy as np

        # Pillow clips instead of scaling: 16-bit values over 255 would all be white.
        wide = np.clip(np.asarray(image, dtype=np.float64), 0, 65535)
        image = Image.fromarray(np.round(wide / 257).astype(np.uint8))
    elif image.mode == "F":
        raise RequestError("the image has floating-point pixels, whose range is unknown; save it as 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    if profile:
        image = _apply_profile(image, profile)
    return image.convert("RGB")


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    import io

    from PIL import ImageCms

    if image.mode == "RGBA":
        image = image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image  # a damaged profile, or one for another mode: the pixels as they are
    return converted if converted is not None else image


def scaled_size(size: tuple[int, int], area: int) -> tuple[int, int]:
    """A picture's (width, height), scaled down to `area` pixels if it has more, each side cut to whole pixels."""
    width, height = size
    if width * height <= area:
        return size
    scale = math.sqrt(area / (width * height))
    return int(width * scale), int(height * scale)


def prepare_reference(image: Image.Image, multiple: int, area: int = REFERENCE_AREA) -> tuple[Image.Image, str | None]:
    """Scale and crop a reference by the model's rules.

    image: RGB. multiple: pixels per token (16). area: with more pixels it is scaled down to so many (Lanczos, sides cut
    to whole pixels); then it is cropped from the centre to multiples. Returns (image, a line on what was done or None).
    Raises RequestError for a side under 64 or an aspect over 8. Source: diffusers, Flux2ImageProcessor.
    """
    width, height = image.size
    if min(width, height) < MIN_REFERENCE_SIDE:
        raise RequestError(
            f"a reference is {width} x {height}; both sides must be at least {MIN_REFERENCE_SIDE} pixels"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise RequestError(f"a reference is {width} x {height}; its aspect must be at most {MAX_ASPECT} : 1")
    if width * height > area:
        image = image.resize(scaled_size(image.size, area), Image.Resampling.LANCZOS)
    final_width, final_height = (side // multiple * multiple for side in image.size)
    left, top = (image.width - final_width) // 2, (image.height - final_height) // 2
    image = image.crop((left, top, left + final_width, top + final_height))
    if image.size == (width, height):
        return image, None
    return image, f"a reference of {width} x {height} is used as {final_width} x {final_height}"
