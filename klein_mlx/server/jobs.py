"""Jobs: one runs at a time, a bounded number wait; a session's newest job replaces its older ones.

It knows the worker and the events of jobs; no HTTP.
"""

import asyncio
import itertools
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from klein_mlx.server.process import SHUTTING_DOWN, Worker, WorkerError
from klein_mlx.server.timings import Timings

log = logging.getLogger(__name__)
MAX_LIVE_IN_A_ROW = 4
FINAL = ("done", "error", "superseded", "cancelled")


class QueueFull(Exception):
    """No more jobs can wait. seconds: after which to try again."""

    def __init__(self, seconds: int):
        super().__init__(seconds)
        self.seconds = seconds


@dataclass(eq=False)
class Job:
    """One request. spec: what the worker takes; pictures: its blobs. session: of a live page, or None. keep: whether
    its pictures go to the gallery. source: the API by which it came, where that matters.

    Its events are dicts with a "type": queued, step, image, then one of FINAL; pictures are bytes under "data". A
    preview that was not fetched yet gives way to the next: a slow reader gets fewer of them.
    """

    spec: dict[str, Any]
    pictures: list[bytes] = field(default_factory=list)
    session: str | None = None
    keep: bool = True
    source: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: str = "new"
    created: float = field(default_factory=time.monotonic)
    step: dict[str, Any] = field(default_factory=dict)
    latest: bytes | None = None
    _events: deque[dict[str, Any]] = field(default_factory=deque)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_finished(self) -> bool:
        return self.state in FINAL

    def put(self, event: dict[str, Any]) -> None:
        """Add an event; none follow the final one."""
        if self.is_finished:
            return
        kind = event["type"]
        if kind in ("queued", "step"):
            stays = "data" not in event  # a preview, until the next one
            kept = [old for old in self._events if old["type"] != kind or (stays and "data" in old)]
            self._events = deque(kept)
        if kind in FINAL:
            self.state, self.pictures = kind, []
        self._events.append(event)
        self._news.set()

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Events as they come, the final one last."""
        while True:
            while self._events:
                event = self._events.popleft()
                yield event
                if event["type"] in FINAL:
                    return
            self._news.clear()
            await self._news.wait()


class Jobs:
    """The queue in front of a worker. limit: of jobs that wait; those of live pages are counted apart.

    on_picture, on_end: called with a job and its event, for each picture and once at the end of a run.
    """

    def __init__(self, worker: Worker, limit: int, idle_seconds: float = 0.0):
        self.worker, self.limit, self.idle_seconds = worker, limit, idle_seconds
        self.timings = Timings()
        self.running: Job | None = None
        self.live: deque[Job] = deque()
        self.batch: deque[Job] = deque()
        self.finished = 0
        self.durations: deque[float] = deque(maxlen=8)
        self._in_a_row = 0
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.on_picture: Callable[[Job, dict[str, Any]], None] = lambda job, event: None
        self.on_end: Callable[[Job, dict[str, Any]], None] = lambda job, event: None

    def start(self) -> None:
        """Begin to work off the queue."""
        self._task = asyncio.create_task(self._work())

    def close(self) -> None:
        """Take no more jobs; end those that wait or run with an error, and the worker."""
        error = {"type": "error", "code": "shutting_down", "message": SHUTTING_DOWN, "param": None}
        for job in [*self.live, *self.batch, *([self.running] if self.running else [])]:
            job.put(error)
        if self._task:
            self._task.cancel()
        self.worker.close()

    async def stop(self) -> None:
        """Close, and wait for the worker's end."""
        self.close()
        await self.worker.stop()

    def submit(self, job: Job) -> Job:
        """Queue a job. Raises QueueFull, or WorkerError if the worker is down."""
        if self.worker.closed:
            raise WorkerError("shutting_down", SHUTTING_DOWN)
        if self.worker.state == "down":
            raise WorkerError("worker_down", self.worker.reason or "the worker is down")
        if job.session is not None:
            self._supersede(job.session)
            queue = self.live
        else:
            queue = self.batch
        if len(queue) >= self.limit:
            raise QueueFull(self.retry_after)
        queue.append(job)
        job.state = "waiting"
        job.put({"type": "queued", "id": job.id, "position": self.position(job)})
        self._news.set()
        return job

    def position(self, job: Job) -> int:
        """How many jobs come before this one."""
        before = list(itertools.takewhile(lambda other: other is not job, [*self.live, *self.batch]))
        return len(before) + (self.running is not None)

    @property
    def retry_after(self) -> int:
        """Seconds until there is probably room: the mean of the last runs times the queue."""
        mean = sum(self.durations) / len(self.durations) if self.durations else 1.0
        return max(1, round(mean * (len(self.batch) + 1)))

    def find(self, name: str) -> Job | None:
        jobs = [*([self.running] if self.running else []), *self.live, *self.batch]
        return next((job for job in jobs if job.id == name), None)

    def cancel(self, job: Job, reason: str = "cancelled") -> None:
        """End a job, whether it waits or runs. reason: its final event's type."""
        if job.is_finished:
            return
        for queue in (self.live, self.batch):
            if job in queue:
                queue.remove(job)
        if job is self.running:
            self.worker.cancel(job.id)
        job.put({"type": reason})

    def _supersede(self, session: str) -> None:
        older = [job for job in self.live if job.session == session]
        if self.running is not None and self.running.session == session:
            older.append(self.running)
        for job in older:
            self.cancel(job, "superseded")

    async def _next(self) -> Job | None:
        """The next job, or None after the idle time. Live jobs go first, but not more than MAX_LIVE_IN_A_ROW."""
        while not self.live and not self.batch:
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), self.idle_seconds or None)
            except TimeoutError:
                return None
        live = bool(self.live) and (not self.batch or self._in_a_row < MAX_LIVE_IN_A_ROW)
        self._in_a_row = self._in_a_row + 1 if live else 0
        return self.live.popleft() if live else self.batch.popleft()

    async def _work(self) -> None:
        while True:
            job = await self._next()
            if job is None:
                if self.worker.state == "ready":
                    await self.worker.stop()
                continue
            await self._one(job)

    async def _one(self, job: Job) -> None:
        self.running, job.state = job, "running"
        start = time.monotonic()
        try:
            await self.worker.ready()
            if not job.is_finished:
                start = time.monotonic()
                await self.worker.run({"job": job.id, **job.spec}, job.pictures, lambda *event: self._told(job, *event))
                self.durations.append(time.monotonic() - start)
        except WorkerError as error:
            job.put({"type": "error", "code": error.code, "message": str(error), "param": None})
            if error.code == "worker_crashed":
                self._after_crash()
        except Exception:
            log.exception("a job failed")
            job.put({"type": "error", "code": "internal_error", "message": "the server failed", "param": None})
        finally:
            self.running = None
            self.finished += 1

    def _after_crash(self) -> None:
        """Start the next worker at once; if there will be none, nothing waits for it."""
        if self.worker.state == "down":
            for job in [*self.live, *self.batch]:
                job.put({"type": "error", "code": "worker_down", "message": str(self.worker.reason), "param": None})
            self.live.clear()
            self.batch.clear()
        else:
            self._restart = asyncio.create_task(self._restarted())

    async def _restarted(self) -> None:
        try:
            await self.worker.ready()
        except WorkerError:
            pass  # the next job tells it

    def _told(self, job: Job, event: dict[str, Any], blobs: list[bytes]) -> None:
        """The worker's event as the job's."""
        kind = event.pop("event")
        event.pop("job", None)
        if blobs:
            event["data"] = blobs[0]
            job.latest = blobs[0]
        if kind == "step":
            job.step = {key: event[key] for key in ("picture", "index", "of", "seconds")}
        if kind == "done":
            if not event.get("cancelled"):
                self.timings.learn(event["size"], event["steps"], event["seconds"])
            elif not job.is_finished:
                kind = "cancelled"
        event = {"type": kind, **event}
        if kind == "image":
            self.on_picture(job, event)
        elif kind in FINAL:
            self.on_end(job, event)
        job.put(event)
