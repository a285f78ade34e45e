"""The native API under /api: generate as a stream of JSON lines, status, uploads, estimate, gallery, LoRAs."""

import base64
import re
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from klein_mlx.server.asks import (
    FORMATS,
    LONG,
    MEDIA,
    arguments_of,
    checked,
    choice,
    loras_of,
    make_job,
    picture,
    pictures_of,
    prompt_of,
    whole,
)
from klein_mlx.server.bodies import content_type, read_form, read_json
from klein_mlx.server.errors import ApiError
from klein_mlx.server.jobs import Job
from klein_mlx.server.pictures import picture_size
from klein_mlx.server.replies import Lines, compact, read_events

MAX_UPLOADS = 64
FILE_SECONDS = 600.0
MAX_UPLOAD_BYTES = 512 * 1024 * 1024
OWN = ("session", "draft", "previews", "lora", "loras", "format", "quality", "references", "mask", "model", "image")
PREVIEWS = ("none", "sketch", "decoded")
_GALLERY_NAME = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{8}\.(png|jpg|webp)")


class Uploads(OrderedDict[str, bytes]):
    """Pictures that clients sent ahead, by id; the least recently used leave first."""

    def add(self, data: bytes, suffix: str = "") -> str:
        name = f"up_{secrets.token_hex(12)}{suffix}"
        self[name] = data
        while len(self) > MAX_UPLOADS or sum(map(len, self.values())) > MAX_UPLOAD_BYTES:
            self.popitem(last=False)
        return name

    def __getitem__(self, name: str) -> bytes:
        self.move_to_end(name)
        return super().__getitem__(name)


async def generate(request: Request) -> Response:
    """POST /api/generate."""
    state = request.app.state
    job = native_job(await read_json(request), state.uploads)
    headers = {"X-Klein-Job": job.id}
    state.submit(job)
    return Lines(_lines(request, job), "application/x-ndjson", headers)


def native_job(values: dict[str, Any], uploads: Uploads) -> Job:
    """A request of the native API as a job. Raises ApiError."""
    ignored: list[str] = []
    arguments = {"prompt": prompt_of(values), **arguments_of(values, ignored, OWN)}
    if ignored:
        raise ApiError(400, f"{ignored[0]} is not a field of a request", ignored[0])
    previews = choice(values, "previews", "sketch", (*PREVIEWS, True, False))
    if isinstance(previews, int):
        previews = "sketch" if previews else "none"
    kind = choice(values, "format", "png", FORMATS)
    session, quality = values.get("session"), whole(values, "quality", None, 0, 100)
    if session is not None and not (isinstance(session, str) and 0 < len(session) <= 100):
        raise ApiError(400, "session must be a string of up to 100 characters", "session")
    job = make_job(
        arguments,
        pictures_of(values, uploads),
        loras=loras_of(values),
        previews=previews,
        format=FORMATS[kind],
        quality=quality,
        session=session,
    )
    job.keep = not values.get("draft")
    return job


async def _lines(request: Request, job: Job) -> AsyncIterator[str]:
    """A job's events as JSON lines; pictures as data URIs."""
    async for event in read_events(request, job):
        event = dict(event)
        if (data := event.pop("data", None)) is not None:
            media = "image/webp" if event["type"] == "step" else MEDIA[job.spec["format"]]
            event["image"] = f"data:{media};base64,{base64.b64encode(data).decode()}"
        if event["type"] == "error":
            event["param"] = LONG.get(event.get("param") or "", event.get("param"))
        yield compact(event) + "\n"


async def cancel(request: Request) -> Response:
    """DELETE /api/jobs/ID."""
    job = request.app.state.jobs.find(request.path_params["id"])
    if job is None:
        raise ApiError(404, "there is no such job", None, "not_found")
    request.app.state.jobs.cancel(job)
    return JSONResponse({"id": job.id, "state": job.state})


async def status(request: Request) -> Response:
    """GET /api/status."""
    state = request.app.state
    jobs, worker = state.jobs, state.jobs.worker
    timings, facts = jobs.timings, worker.facts
    running = None if jobs.running is None else {"id": jobs.running.id, **jobs.running.step}
    side = facts.get("size", 1024)
    steps = facts.get("steps", 4)
    return JSONResponse(
        {
            "worker": worker.state,
            "reason": worker.reason,
            "starts": worker.starts,
            "model": {"name": state.settings.name, **{k: v for k, v in facts.items() if k not in ("predicted",)}},
            "queue": len(jobs.batch) + len(jobs.live),
            "limit": jobs.limit,
            "running": running,
            "finished": jobs.finished,
            "memory_gb": round(worker.memory / 1e9, 3),
            "memory_peak_gb": round(worker.memory_peak / 1e9, 3),
            "seconds": timings.predict(side, side, steps),
            "draft": timings.draft(side, steps),
            "gallery": state.settings.save is not None,
        }
    )


async def wake(request: Request) -> Response:
    """POST /api/wake: start the worker, and let it read the model, ahead of the first request."""
    request.app.state.wake()
    return JSONResponse({"worker": request.app.state.jobs.worker.state})


async def models(request: Request) -> Response:
    """GET /api/models."""
    state = request.app.state
    told = {"name": state.settings.name, "aliases": list(state.settings.aliases), "served": True}
    return JSONResponse({"models": [{**told, **state.jobs.worker.facts}]})


async def loras(request: Request) -> Response:
    """GET /api/loras."""
    found = await request.app.state.jobs.worker.ask("loras")
    return JSONResponse({"loras": [{"name": name} for name in found["loras"]]})


async def upload(request: Request) -> Response:
    """POST /api/uploads: a picture, as a form's file or as {"image": base64}; returns its id and size."""
    if content_type(request) == "multipart/form-data":
        files = [(name, value) for name, value in await read_form(request) if isinstance(value, bytes)]
        if len(files) != 1:
            raise ApiError(400, f"{len(files)} files are sent; send one", "image")
        data = checked(files[0][1], "image")
    else:
        data = picture((await read_json(request)).get("image"), "image", {})
    width, height = picture_size(data, "image")
    return JSONResponse({"id": request.app.state.uploads.add(data), "width": width, "height": height})


async def estimate(request: Request) -> Response:
    """POST /api/estimate: seconds, peak memory, whether it fits."""
    values = await read_json(request)
    state = request.app.state
    facts = state.jobs.worker.facts
    if not facts:
        await state.jobs.worker.ready()
        facts = state.jobs.worker.facts
    sides = [whole(values, name, facts["size"], 16, 8192) for name in ("width", "height")]
    steps = whole(values, "steps", facts["steps"], 1, 1000)
    count = whole(values, "n", 1, 1, 10)
    found = await state.jobs.worker.ask("estimate", width=sides[0], height=sides[1])
    predicted = state.jobs.timings.predict(sides[0], sides[1], steps, count)
    return JSONResponse(
        {
            "seconds": predicted and predicted["seconds"],
            "parts": predicted,
            "peak_gb": round(found["peak"] / 1e9, 3),
            "machine_gb": round(found["machine"] / 1e9, 3),
            "fits": found["fits"],
        }
    )


async def kept_file(request: Request) -> Response:
    """GET /api/files/ID: a picture that a reply named by its URL, for FILE_SECONDS."""
    name = request.path_params["name"]
    files = request.app.state.files
    if name not in files:
        words = f"there is no such file; a URL holds for {FILE_SECONDS // 60:.0f} minutes"
        raise ApiError(404, words, None, "not_found")
    headers = {"Content-Disposition": f'inline; filename="{name}"'}
    return Response(files[name], media_type=MEDIA[Path(name).suffix], headers=headers)


async def gallery(request: Request) -> Response:
    """GET /api/gallery: names of the kept pictures, the newest first."""
    folder: Path | None = request.app.state.settings.save
    names = [] if folder is None else sorted(p.name for p in folder.iterdir() if _GALLERY_NAME.fullmatch(p.name))
    return JSONResponse({"pictures": names[::-1][:1000]})


async def gallery_file(request: Request) -> Response:
    """GET /api/gallery/NAME; only names that the server gave."""
    folder: Path | None = request.app.state.settings.save
    name = request.path_params["name"]
    if folder is None or not _GALLERY_NAME.fullmatch(name):
        raise ApiError(404, "there is no such picture", None, "not_found")
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise ApiError(404, "there is no such picture", None, "not_found")
    headers = {"Content-Disposition": f'inline; filename="{name}"'}
    return FileResponse(path, media_type=MEDIA[path.suffix], headers=headers)


ROUTES = [
    Route("/api/generate", generate, methods=["POST"]),
    Route("/api/jobs/{id}", cancel, methods=["DELETE"]),
    Route("/api/status", status),
    Route("/api/wake", wake, methods=["POST"]),
    Route("/api/models", models),
    Route("/api/loras", loras),
    Route("/api/uploads", upload, methods=["POST"]),
    Route("/api/estimate", estimate, methods=["POST"]),
    Route("/api/files/{name}", kept_file),
    Route("/api/gallery", gallery),
    Route("/api/gallery/{name}", gallery_file),
]
