"""The application: routes and what they share. It never imports MLX."""

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from klein_mlx.server import native, openai, sdapi
from klein_mlx.server.errors import ApiError, printable
from klein_mlx.server.guard import Guard
from klein_mlx.server.jobs import Job, Jobs, QueueFull
from klein_mlx.server.process import Worker, WorkerError
from klein_mlx.server.settings import Settings

log = logging.getLogger(__name__)
STUDIO = Path(__file__).resolve().parent / "studio"
STUDIO_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


class Shared:
    """What the routes share, as `app.state`. files: pictures that can be fetched by a URL for a while."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.worker = Worker(settings)
        self.jobs = Jobs(self.worker, settings.queue, settings.idle_seconds)
        self.jobs.on_picture, self.jobs.on_end = self._save, self._log
        self.uploads, self.files = native.Uploads(), native.Uploads()
        self._tasks: set[asyncio.Task[Any]] = set()

    def submit(self, job: Job) -> Job:
        """Queue a job. Raises ApiError."""
        try:
            self.jobs.submit(job)
        except QueueFull as error:
            words = f"{self.jobs.limit} requests are waiting; try again in {error.seconds} s"
            raise ApiError(429, words, None, "queue_full", {"Retry-After": str(error.seconds)}) from None
        except WorkerError as error:
            raise ApiError(503, str(error), None, error.code) from None
        return job

    def wake(self) -> None:
        """Start the worker, and let it read the model's parts, without waiting for it."""
        if self.worker.state == "off":
            task = asyncio.create_task(self._wake())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _wake(self) -> None:
        with contextlib.suppress(WorkerError):  # the first request tells it
            await self.worker.ready()
            self.jobs.timings.start(self.worker.facts.get("predicted"))
            self.worker.warm()

    def _save(self, job: Job, event: dict[str, Any]) -> None:
        """Keep a finished picture in the gallery: written beside, then renamed."""
        folder = self.settings.save
        if folder is None or not job.keep:
            return
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}{job.spec['format']}"
        temporary = folder / f".{name}.part"
        try:
            temporary.write_bytes(event["data"])
            os.replace(temporary, folder / name)
        except OSError as error:
            log.error("%s cannot be written: %s", folder / name, error.strerror)
            temporary.unlink(missing_ok=True)

    def _log(self, job: Job, event: dict[str, Any]) -> None:
        """One line for a run."""
        prompt = ""
        if self.settings.log_prompts:
            prompt = f" {printable(str(job.spec['arguments'].get('prompt')))}"
        if event["type"] == "done":
            width, height = event["size"]
            log.info("%s: %dx%d, %.2f s%s", job.id, width, height, sum(event["seconds"].values()), prompt)
        else:
            log.info("%s: %s%s", job.id, printable(str(event.get("message", event["type"]))), prompt)


async def studio(request: Request) -> Response:
    """The page and its files, from the package; opening the page starts the worker."""
    name = request.path_params.get("name", "index.html")
    found = studio_files().get(name)
    if found is None:
        raise ApiError(404, "there is no such page", None, "not_found")
    if name == "index.html":
        request.app.state.wake()
    data, tag = found
    headers = {"Cache-Control": "no-cache", "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(None, 304, headers)
    return Response(data, media_type=STUDIO_TYPES[Path(name).suffix], headers=headers)


@cache
def studio_files() -> dict[str, tuple[bytes, str]]:
    """The page's files by name: bytes and ETag. 50 kB, read once: opening them per request takes a thread each."""
    files = {path.name: path.read_bytes() for path in STUDIO.iterdir() if path.suffix in STUDIO_TYPES}
    return {name: (data, f'"{hashlib.sha256(data).hexdigest()[:16]}"') for name, data in files.items()}


async def health(request: Request) -> Response:
    """GET /healthz."""
    return JSONResponse({"status": "ok", "worker": request.app.state.jobs.worker.state})


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _worker_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, WorkerError)
    return ApiError(503, str(error), None, error.code).response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "there is no such page", 405: f"{request.method} is not possible here"}
    headers = dict(error.headers or {})
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_value")
    return ApiError(error.status_code, words.get(error.status_code, error.detail), None, code, headers).response()


async def _left(request: Request, error: Exception) -> Response:
    return ApiError(499, "the client left", None, "cancelled").response()


async def _bug(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, printable(request.url.path), exc_info=error)
    return ApiError(500, "the server failed; its log says why", None, "internal_error").response()


def make_app(settings: Settings, port: int | None = None) -> Guard:
    """The ASGI application. port: on which the server listens, if not that of the settings."""
    shared = Shared(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        shared.jobs.start()
        try:
            yield
        finally:
            await shared.jobs.stop()

    routes = [
        Route("/", studio),
        Route("/healthz", health),
        *native.ROUTES,
        *openai.ROUTES,
        *sdapi.ROUTES,
        Route("/{name}", studio),
    ]
    handlers: dict[Any, Any] = {
        ApiError: _api_error,
        WorkerError: _worker_error,
        HTTPException: _http_error,
        ClientDisconnect: _left,  # before all of its body came
        Exception: _bug,
    }
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.state = shared  # type: ignore[assignment]
    return Guard(app, settings, port)
