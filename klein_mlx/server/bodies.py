"""Bodies of requests: JSON and multipart, within limits on bytes, depth, parts and fields.

What comes is kept in a temporary file without a name beyond a megabyte, so that a large body costs disk and not memory.
"""

import json
import math
import re
import tempfile
from collections.abc import Iterator
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from klein_mlx.server.errors import ApiError

MAX_DEPTH, MAX_PARTS, MAX_FIELD = 20, 20, 1024 * 1024
IN_MEMORY = 1024 * 1024
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object; {} where there is none. Raises ApiError."""
    with tempfile.SpooledTemporaryFile(IN_MEMORY) as file:
        async for chunk in request.stream():
            file.write(chunk)
        file.seek(0)
        text = file.read()
    if not text:
        return {}
    if content_type(request) != "application/json":
        raise ApiError(415, "the body must be application/json", None, "unsupported_media_type")
    try:
        value = parse_json(text)
    except RecursionError:
        raise ApiError(400, f"the body is nested over {MAX_DEPTH} deep", None, "invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {str(error)[:200]}", None, "invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", None, "invalid_json")
    if _depth(value) > MAX_DEPTH:
        raise ApiError(400, f"the body is nested over {MAX_DEPTH} deep", None, "invalid_json")
    return value


async def read_form(request: Request) -> list[tuple[str, str | bytes]]:
    """A multipart body's parts, (field, text or file) in their order; names of files are not looked at.

    Raises ApiError.
    """
    if content_type(request) != "multipart/form-data":
        raise ApiError(415, "the body must be multipart/form-data", None, "unsupported_media_type")
    parts: list[tuple[str, str | bytes]] = []
    try:
        async with request.form(max_files=MAX_PARTS, max_fields=MAX_PARTS, max_part_size=MAX_FIELD) as form:
            items = form.multi_items()
            if len(items) > MAX_PARTS:
                raise ApiError(400, f"the body has {len(items)} parts; it may have {MAX_PARTS}", None, "invalid_form")
            for name, value in items:
                parts.append((name, await value.read() if isinstance(value, UploadFile) else value))
    except HTTPException as error:
        raise ApiError(400, f"the form cannot be read: {error.detail[:200]}", None, "invalid_form") from None
    except (KeyError, ValueError):
        raise ApiError(400, "the form cannot be read: a part is damaged", None, "invalid_form") from None
    return parts


def parse_json(text: str | bytes) -> Any:
    """JSON whose numbers are finite and whose strings are Unicode. Raises ValueError."""
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text))
    value = json.loads(text, parse_float=_finite, parse_constant=_finite)
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # a reply that quotes it could not be sent
            raise ValueError("a string has half of a surrogate pair") from None
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _depth(value: Any) -> int:
    """How deeply lists and objects are nested."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [item for outer in level for item in _items(outer) if isinstance(item, dict | list)]
    return depth


def _items(value: Any) -> Iterator[Any]:
    return iter(value.values() if isinstance(value, dict) else value)
