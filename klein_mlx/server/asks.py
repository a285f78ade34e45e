"""What clients ask for, as jobs for the worker: the fields of the product's own options, by its names and short ones.

The list of fields is read from `klein_mlx.options`; values are checked in the worker. Here pass only fields whose types
cannot name a file: numbers, flags, lists of numbers, and the texts in TEXTS.
"""

import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

import klein_mlx.options
from klein_mlx.errors import RequestError
from klein_mlx.server.errors import ApiError
from klein_mlx.server.jobs import Job
from klein_mlx.server.pictures import decode_base64, picture_size
from klein_mlx.server.settings import MAX_IMAGES, MAX_PROMPT, MAX_REFERENCES

TEXTS = ("negative_prompt", "extend", "rng")
SHORT = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "n": "num_images_per_prompt",
    "negative": "negative_prompt",
    "references": "image",
    "mask": "mask_image",
    "image": "image",
}
LONG = {long: short for short, long in SHORT.items() if short != "image"}
PICTURES = ("image", "init_image", "mask_image")
FORMATS = {"png": ".png", "jpeg": ".jpg", "jpg": ".jpg", "webp": ".webp"}
MAX_LORAS = 20
SIDE = 16  # of a token, in pixels
MEDIA = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}


@cache
def fields() -> dict[str, Any]:
    """The options that a client may set, pictures left out, and their types."""
    hints = typing.get_type_hints(klein_mlx.options.Options)
    hidden = {"prompt", "latents", "prompt_embeds", "output_type", "progress", *PICTURES}
    return {name: kind for name, kind in hints.items() if name not in hidden and (name in TEXTS or _is_plain(kind))}


def _is_plain(kind: Any) -> bool:
    """Whether a type holds numbers, flags and fixed words only."""
    if kind in (int, float, bool, types.NoneType):
        return True
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return True
    known = (typing.Union, types.UnionType, list, tuple, Sequence)
    return (origin in known or origin is not None and origin in (Sequence, list, tuple)) and all(
        _is_plain(one) for one in inner if one is not Ellipsis
    )


def prompt_of(values: Mapping[str, Any]) -> str:
    """Its prompt. Raises ApiError."""
    prompt = values.get("prompt")
    if not isinstance(prompt, str):
        raise ApiError(400, "prompt must be a string", "prompt")
    if not prompt.strip():
        raise ApiError(400, "prompt is empty; describe a picture", "prompt")
    if len(prompt) > MAX_PROMPT:
        raise ApiError(400, f"prompt has {len(prompt)} characters; it may have {MAX_PROMPT}", "prompt")
    return prompt


def arguments_of(values: Mapping[str, Any], ignored: list[str], used: Sequence[str] = ()) -> dict[str, Any]:
    """What the pipeline takes, of a request's fields; names that are not known are added to `ignored`.

    used: fields that the caller reads itself. Raises ApiError for values that can be no value of the field.
    """
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name in used or name == "prompt":
            continue
        long = SHORT.get(name, name)
        if long in PICTURES:
            continue
        if long not in fields():
            ignored.append(name)
        elif value is not None:
            if long not in TEXTS and not _holds(value):
                raise ApiError(
                    400, f"{name} is {str(value)[:40]!r}; it must be a number, a flag or a list of them", name
                )
            arguments[long] = value
    count = arguments.get("num_images_per_prompt", 1)
    if type(count) is not int or not 1 <= count <= MAX_IMAGES:
        raise ApiError(400, f"n is {str(count)[:40]}; it must be a whole number from 1 to {MAX_IMAGES}", "n")
    seed = arguments.get("seed")
    if isinstance(seed, list) and len(seed) > MAX_IMAGES:
        raise ApiError(400, f"seed has {len(seed)} values; it may have {MAX_IMAGES}", "seed")
    return arguments


def _holds(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 1000 and all(isinstance(one, int | float) for one in value)
    return isinstance(value, int | float | str)  # a fixed word; the worker knows which


def picture(value: Any, what: str, uploads: Mapping[str, bytes]) -> bytes:
    """A picture's bytes, of a form's file, base64, a data URI, or the id of an upload; its header is checked.

    Raises ApiError.
    """
    if isinstance(value, bytes):
        return checked(value, what)
    if not isinstance(value, str):
        raise ApiError(400, f"{what} must be a picture, as base64, a data URI or an upload's id", what)
    try:
        data = uploads[value] if value in uploads else decode_base64(value, what)
        picture_size(data, what)
    except RequestError as error:
        raise ApiError(400, str(error), what) from None
    return data


def checked(data: bytes, what: str) -> bytes:
    """A picture that came as bytes, its header checked. Raises ApiError."""
    try:
        picture_size(data, what)
    except RequestError as error:
        raise ApiError(400, str(error), what) from None
    return data


def pictures_of(values: Mapping[str, Any], uploads: Mapping[str, bytes]) -> list[tuple[str, bytes]]:
    """(argument, bytes) of every picture of a request, references first. Raises ApiError."""
    found = []
    for name in ("references", "image"):
        items = values.get(name) or []
        for item in items if isinstance(items, list) else [items]:
            found.append(("image", picture(item, name, uploads)))
    for name, argument in (("init_image", "init_image"), ("mask", "mask_image"), ("mask_image", "mask_image")):
        if values.get(name) is not None:
            found.append((argument, picture(values[name], name, uploads)))
    return found


def whole(values: Mapping[str, Any], name: str, default: Any, low: int, high: int) -> Any:
    """A field that is a whole number from low to high, or the default where it is missing or null. Raises ApiError."""
    value = values.get(name)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise ApiError(400, f"{name} is {str(value)[:40]}; it must be a whole number from {low} to {high}", name)
    return value


def choice(values: Mapping[str, Any], name: str, default: Any, choices: Iterable[Any]) -> Any:
    """A field that is one of some values, or the default where it is missing or null. Raises ApiError."""
    value = values.get(name)
    if value is None:
        return default
    if value not in tuple(choices):
        words = ", ".join(str(one).lower() for one in choices)
        raise ApiError(400, f"{name} is {str(value)[:40]!r}; it must be one of {words}", name)
    return value


def near(side: int) -> int:
    """The multiple of 16 that is nearest to a side, in pixels."""
    return max(1, (side + SIDE // 2) // SIDE) * SIDE


def loras_of(values: Mapping[str, Any]) -> list[list[Any]]:
    """(name, scale) of each of a request's "lora" or "loras": {"name": ..., "scale": 0.8}, "name" or "name:0.8".

    Raises ApiError.
    """
    field = "lora" if values.get("lora") is not None else "loras"
    value = values.get(field)
    if value is None:
        return []
    items = value if isinstance(value, list) else [value]
    if len(items) > MAX_LORAS:
        raise ApiError(400, f"{field} has {len(items)} entries; it may have {MAX_LORAS}", field)
    found = []
    for item in items:
        name, scale = (item.get("name"), item.get("scale", 1.0)) if isinstance(item, dict) else (item, 1.0)
        if isinstance(item, str) and ":" in item:
            name, _, text = item.rpartition(":")
            try:
                scale = float(text)
            except ValueError:
                scale = None
        plain = isinstance(name, str) and 0 < len(name) <= 300
        if not plain or not isinstance(scale, int | float) or isinstance(scale, bool) or not -100 <= scale <= 100:
            words = f'{field} must be names in the LoRA folder, such as {{"name": "style", "scale": 0.8}}'
            raise ApiError(400, words, field)
        found.append([name, float(scale)])
    return found


def make_job(
    arguments: dict[str, Any],
    pictures: Sequence[tuple[str, bytes]] = (),
    *,
    alpha_mask: bool = False,
    loras: Sequence[Sequence[Any]] = (),
    previews: str = "none",
    preview_count: int | None = None,
    preview_format: str = ".webp",
    format: str = ".png",
    quality: int | None = None,
    session: str | None = None,
) -> Job:
    """A job. pictures: (argument, bytes) in their order. alpha_mask: the mask's transparent pixels are repainted.

    preview_count: how many previews a picture has, spread over its steps; None: one after each step.
    """
    references = sum(field == "image" for field, _ in pictures)
    if references > MAX_REFERENCES:
        raise ApiError(400, f"{references} pictures are given; there may be {MAX_REFERENCES}", "image")
    spec = {
        "arguments": arguments,
        "pictures": [{"field": field, "alpha": alpha_mask and field == "mask_image"} for field, _ in pictures],
        "loras": [list(one) for one in loras],
        "previews": previews,
        "preview_count": preview_count,
        "preview_format": preview_format,
        "format": format,
        "quality": quality,
    }
    return Job(spec, [data for _, data in pictures], session)
