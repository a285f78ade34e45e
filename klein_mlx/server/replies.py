"""Replies: a job's error as ours, streams that end when the client leaves."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from klein_mlx.server.errors import ApiError
from klein_mlx.server.jobs import Job

STATUS = {
    "invalid_value": 400,
    "does_not_fit": 400,
    "superseded": 409,
    "cancelled": 499,
    "worker_crashed": 503,
    "worker_down": 503,
    "model_not_loaded": 503,
    "shutting_down": 503,
    "internal_error": 500,
}


def job_error(event: Mapping[str, Any], names: Mapping[str, str] | None = None) -> ApiError:
    """A job's final event, other than done, as an error. names: the API's, of arguments."""
    code = event.get("code") or event["type"]
    param = event.get("param")
    message = event.get("message") or f"the job was {code}"
    for name in names or {}:
        if "_" in name:  # no word of the language
            message = message.replace(name, (names or {})[name])
    return ApiError(STATUS.get(code, 500), message, (names or {}).get(param or "", param), code)


async def read_events(request: Request, job: Job) -> AsyncGenerator[dict[str, Any], None]:
    """A job's events; it is cancelled, and the iteration ends, when the client leaves."""
    events = job.events()
    gone = asyncio.create_task(_gone(request))
    try:
        while True:
            event = asyncio.ensure_future(anext(events, None))
            await asyncio.wait([event, gone], return_when=asyncio.FIRST_COMPLETED)
            if not event.done():
                event.cancel()
                return
            found = event.result()
            if found is None:
                return
            yield found
    finally:
        gone.cancel()
        if not job.is_finished:
            request.app.state.jobs.cancel(job)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Lines(Response):
    """A stream of text pieces. As long as the client does not take them, no more are asked for."""

    def __init__(self, pieces: AsyncIterator[str], media_type: str, headers: Mapping[str, str] | None = None):
        super().__init__(None, 200, dict(headers or {}), media_type)
        del self.headers["content-length"]
        self.pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for piece in self.pieces:
                await send({"type": "http.response.body", "body": piece.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except OSError:
            pass  # the client left
        finally:
            await self.pieces.aclose()  # type: ignore[attr-defined]


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
