"""OpenAI's image routes under /v1: generations, edits, models. Their fields become those of the product's own jobs."""

import asyncio
import base64
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from klein_mlx.server import native
from klein_mlx.server.asks import (
    FORMATS,
    SHORT,
    SIDE,
    TEXTS,
    arguments_of,
    choice,
    fields,
    loras_of,
    make_job,
    near,
    pictures_of,
    prompt_of,
    whole,
)
from klein_mlx.server.bodies import content_type, parse_json, read_form, read_json
from klein_mlx.server.errors import ApiError
from klein_mlx.server.guard import FILES, file_key
from klein_mlx.server.jobs import FINAL, Job
from klein_mlx.server.replies import Lines, compact, job_error, read_events
from klein_mlx.server.settings import Settings

STARTED = int(time.time())
READ_HERE = (
    *("model", "size", "response_format", "output_format", "output_compression", "stream", "partial_images"),
    *("lora", "loras"),
)
NUMBERS = ("stream", "partial_images", "output_compression")
MAX_PARTIALS = 3


@dataclass
class ImageRequest:
    """A checked request and its job.

    kind: prefix of its stream's event types. format: OpenAI's name of the file format. names: from our arguments to the
    client's fields, for errors. ignored: fields without effect. start: the job's start event, with the token counts of
    prompt and references. notes: lines on what the run ignored or scaled.
    """

    job: Job
    kind: str
    format: str
    names: Mapping[str, str]
    ignored: list[str]
    streams: bool
    as_url: bool
    start: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def stated(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Fields that describe a picture in a reply."""
        size = f"{event['width']}x{event['height']}"
        return {"size": size, "quality": "high", "background": "opaque", "output_format": self.format}

    def usage(self, pictures: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Token counts: of the prompt without padding, of the references, and one per 16 x 16 pixels of output."""
        text, image = self.start["tokens"], self.start["image_tokens"]
        output = sum(one["width"] * one["height"] // SIDE**2 for one in pictures)
        return {
            "input_tokens": text + image,
            "output_tokens": output,
            "total_tokens": text + image + output,
            "input_tokens_details": {"text_tokens": text, "image_tokens": image},
        }


def image_request(values: dict[str, Any], edits: bool, uploads: Mapping[str, bytes]) -> ImageRequest:
    """Check a request of generations or edits, and make its job. Raises ApiError."""
    ignored: list[str] = []
    size = _size(values.get("size"))
    arguments = {"prompt": prompt_of(values), **arguments_of(values, ignored, READ_HERE), **size}
    pictures = pictures_of(values, uploads)
    if edits and all(argument == "mask_image" for argument, _ in pictures):
        raise ApiError(400, "image is missing; send the picture to edit, or up to 10", "image")
    arguments_used = [argument for argument, _ in pictures]
    if "mask_image" in arguments_used and "init_image" not in arguments_used and pictures[0][0] == "image":
        pictures[0] = ("init_image", pictures[0][1])  # the mask belongs to the first picture
    streams = choice(values, "stream", False, (True, False))
    partials = whole(values, "partial_images", 0, 0, MAX_PARTIALS)
    kind = choice(values, "output_format", "png", FORMATS)
    without_effect = [
        *size,
        *([] if streams else ["partial_images"]),
        *(["output_compression"] if kind == "png" else []),
    ]
    ignored += [name for name in without_effect if values.get(name) is not None]
    job = make_job(
        arguments,
        pictures,
        alpha_mask=True,
        loras=loras_of(values),
        previews="decoded" if streams and partials else "none",
        preview_count=partials,
        preview_format=FORMATS[kind],
        format=FORMATS[kind],
        quality=whole(values, "output_compression", None, 0, 100),
    )
    names = {"init_image": "image", "lora": "loras", **{SHORT.get(name, name): name for name in values}}
    return ImageRequest(
        job,
        kind="image_edit" if edits else "image_generation",
        format="jpeg" if kind == "jpg" else kind,
        names=names | dict.fromkeys(size, "size"),
        ignored=ignored,
        streams=streams,
        as_url=choice(values, "response_format", "b64_json", ("b64_json", "url")) == "url",
    )


def _size(value: Any) -> dict[str, int]:
    """Width and height of "1024x768", rounded to multiples of 16; {} for "auto": the model's or the picture's size."""
    if value is None or value == "auto":
        return {}
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", value) if isinstance(value, str) else None
    if found is None:
        raise ApiError(400, f"size is {str(value)[:40]!r}; it must be auto or WIDTHxHEIGHT, such as 1024x768", "size")
    return {"width": near(int(found[1])), "height": near(int(found[2]))}


def check_model(settings: Settings, name: Any) -> None:
    """Raises ApiError for a model that is not served."""
    if name is None or name in settings.names or (settings.any_model and isinstance(name, str)):
        return
    if not isinstance(name, str):
        raise ApiError(400, "model must be a string", "model")
    words = f"model is {name[:100]!r}; this server has {settings.name!r} (klein-mlx serve --any-model takes any name)"
    raise ApiError(404, words, "model", "model_not_found")


# ---- requests ----


async def _values(request: Request) -> dict[str, Any]:
    if content_type(request) == "multipart/form-data":
        return form_values(await read_form(request))
    return await read_json(request)


def form_values(parts: Iterable[tuple[str, str | bytes]]) -> dict[str, Any]:
    """Convert a form's fields to JSON values. Repeated fields and a[] become lists, a[][b] lists of objects; fields of
    numeric or boolean type are parsed. Raises ApiError."""
    values: dict[str, Any] = {}
    objects: dict[str, dict[str, list[Any]]] = {}
    for name, value in parts:
        head, _, rest = name.partition("[")
        if isinstance(value, str) and (_is_number(head) or rest == "][scale]"):
            value = _parsed(value)
        if inner := re.fullmatch(r"\d*\]\[(\w+)\]", rest):
            objects.setdefault(head, {}).setdefault(inner[1], []).append(value)
        elif rest or head in values:
            old = values.get(head, [])
            values[head] = [*(old if isinstance(old, list) else [old]), value]
        else:
            values[head] = value
    for head, columns in objects.items():
        if len({len(column) for column in columns.values()}) > 1:
            raise ApiError(400, f"{head}: each must have the same fields ({', '.join(columns)})", head)
        values[head] = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return values


def _is_number(name: str) -> bool:
    long = SHORT.get(name, name)
    return name in NUMBERS or (long in fields() and long not in TEXTS)


def _parsed(text: str) -> Any:
    """Parse a number, a flag, null or a list of them; return any other text unchanged."""
    try:
        value = parse_json(text.lower() if text in ("True", "False") else text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str | dict) else value


async def generations(request: Request) -> Response:
    """POST /v1/images/generations."""
    return await _answer(request, edits=False)


async def edits(request: Request) -> Response:
    """POST /v1/images/edits."""
    return await _answer(request, edits=True)


async def _answer(request: Request, edits: bool) -> Response:
    state = request.app.state
    values = await _values(request)
    check_model(state.settings, values.get("model"))
    call = image_request(values, edits, state.uploads)
    state.submit(call.job)
    headers = {"X-Klein-Job": call.job.id}
    if call.ignored:
        headers["X-Klein-Ignored"] = ", ".join(quote(name[:40], safe="[]") for name in call.ignored[:20])
    events = job_events(request, call)
    if not call.streams:
        async with aclosing(events):
            pictures = [event async for event in events if event["type"] == "image"]
        data = [{**_picture(request, call, one), "seed": one["seed"]} for one in pictures]
        stated = {**call.stated(pictures[0]), "usage": call.usage(pictures), "notes": call.notes}
        return JSONResponse({"created": int(time.time()), "data": data, **stated}, headers=headers)
    async for event in events:
        if event["type"] == "start":  # errors before that have an HTTP status of their own
            break
    return Lines(_stream(call, events), "text/event-stream", headers)


async def job_events(request: Request, call: ImageRequest) -> AsyncGenerator[dict[str, Any], None]:
    """Yield a job's events until it is done. Raises ApiError if it fails, is cancelled, or the client disconnects."""
    async with aclosing(read_events(request, call.job)) as events:
        async for event in events:
            if event["type"] == "start":
                call.start = event
            if event["type"] == "done":
                call.notes = event["notes"]
                return
            if event["type"] in FINAL:
                raise job_error(event, call.names)
            yield event
    raise ApiError(499, "the client left", None, "cancelled")


async def _stream(call: ImageRequest, events: AsyncGenerator[dict[str, Any], None]) -> AsyncIterator[str]:
    """Server-sent events: partial pictures, pictures, and an error as an object."""
    partials = 0
    try:
        async for event in events:
            if "data" not in event:
                continue
            told = {"b64_json": base64.b64encode(event["data"]).decode(), "created_at": int(time.time())}
            told |= call.stated(event)
            if event["type"] == "step":
                kind = {"type": f"{call.kind}.partial_image", "partial_image_index": partials}
                partials += 1
            else:
                kind = {"type": f"{call.kind}.completed", "usage": call.usage([event]), "seed": event["seed"]}
                partials = 0
            yield f"data: {compact(kind | told)}\n\n"
    except ApiError as error:
        yield f"data: {compact(error.body)}\n\n"
    finally:
        await events.aclose()


def _picture(request: Request, call: ImageRequest, event: Mapping[str, Any]) -> dict[str, Any]:
    """A picture as base64, or as a URL that is valid for native.FILE_SECONDS and needs no token."""
    if not call.as_url:
        return {"b64_json": base64.b64encode(event["data"]).decode()}
    state = request.app.state
    name = state.files.add(event["data"], call.job.spec["format"])
    asyncio.get_running_loop().call_later(native.FILE_SECONDS, state.files.pop, name, None)
    token = state.settings.token
    query = f"?key={file_key(token, FILES + name)}" if token else ""
    scheme = "https" if request.headers.get("x-forwarded-proto") == "https" else "http"
    return {"url": f"{scheme}://{request.headers['host']}{FILES}{name}{query}"}


async def variations(request: Request) -> Response:
    """POST /v1/images/variations."""
    words = "variations are not supported; send the picture to /v1/images/edits with a prompt"
    raise ApiError(404, words, None, "not_found")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": STARTED, "owned_by": "klein-mlx"}


async def models(request: Request) -> Response:
    """GET /v1/models."""
    names = request.app.state.settings.names
    return JSONResponse({"object": "list", "data": [_model(name) for name in names]})


async def model(request: Request) -> Response:
    """GET /v1/models/ID."""
    name = request.path_params["name"]
    check_model(request.app.state.settings, name)
    return JSONResponse(_model(name))


ROUTES = [
    Route("/v1/images/generations", generations, methods=["POST"]),
    Route("/v1/images/edits", edits, methods=["POST"]),
    Route("/v1/images/variations", variations, methods=["POST"]),
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
]
