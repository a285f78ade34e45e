"""The server's side of the worker process: starting it, one job at a time, its death and its rest."""

import asyncio
import contextlib
import itertools
import json
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from klein_mlx.errors import KleinError
from klein_mlx.server.frames import HEAD, MAX_FRAME, pack, unpack
from klein_mlx.server.settings import Settings

EXIT_SECONDS = 3.0
MAX_DEATHS, DEATH_SECONDS = 3, 60.0
SHUTTING_DOWN = "the server is shutting down"
ROOT = Path(__file__).resolve().parents[2]

Event = dict[str, Any]
Listener = Callable[[Event, list[bytes]], None]


class WorkerError(KleinError):
    """The worker cannot serve. code: worker_crashed, worker_down, model_not_loaded or shutting_down."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class Worker:
    """A child process that makes pictures; started when first needed.

    state: off, loading, ready, busy, or down (it died MAX_DEATHS times within DEATH_SECONDS and stays away). facts: of
    the model, as `klein_mlx.server.worker.model_facts`, once it was loaded.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.state = "off"
        self.reason: str | None = None
        self.facts: dict[str, Any] = {}
        self.memory = self.memory_peak = 0
        self.starts = 0
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._listener: Listener | None = None
        self._job: asyncio.Future[None] | None = None
        self._ending = self.closed = False
        self._answers: dict[int, asyncio.Future[Event]] = {}
        self._numbers = itertools.count()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self.state not in ("off", "down") else None

    async def ready(self) -> None:
        """Start the process unless it is there, and wait for its model. Raises WorkerError."""
        if self.closed:
            raise WorkerError("shutting_down", SHUTTING_DOWN)
        if self.state == "down":
            raise WorkerError("worker_down", self.reason or "the worker does not start")
        if self.state in ("ready", "busy"):
            return
        if self._starting is None or self._starting.done():
            self._starting = asyncio.create_task(self._start())
        starting = self._starting
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            if starting.cancelled():
                raise WorkerError("shutting_down", SHUTTING_DOWN) from None
            raise

    async def _start(self) -> None:
        self.state = "loading"
        if self._reading is not None:
            await self._reading  # the one before is still on its way out
            self.state = "loading"
        self._ending = False
        self.starts += 1
        ours, theirs = socket.socketpair()
        told = {"model": self.settings.model, "pipeline": dict(self.settings.pipeline), "loras": self.settings.loras}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "klein_mlx.server.worker", str(theirs.fileno()), json.dumps(told)),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal is the server's to handle
                env={**os.environ, "PYTHONPATH": path},
            )
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        self._ready = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read(reader, self._process))
        await self._ready

    async def _read(self, reader: asyncio.StreamReader, process: asyncio.subprocess.Process) -> None:
        """Take its events until it ends."""
        try:
            while True:
                length, blobs = HEAD.unpack(await reader.readexactly(HEAD.size))
                if length + blobs > MAX_FRAME:
                    break
                self._take(*unpack(await reader.readexactly(length), await reader.readexactly(blobs)))
        except (asyncio.IncompleteReadError, OSError, ValueError, KeyError):
            pass
        if self._writer:
            self._writer.close()
        try:  # Not killed at once: `kill` would reap it under the event loop's hands, and its exit code were lost.
            code = await asyncio.wait_for(process.wait(), EXIT_SECONDS)
        except TimeoutError:
            process.kill()
            code = await process.wait()
        self._died(code)

    def _take(self, event: Event, blobs: list[bytes]) -> None:
        kind = event["event"]
        self.memory = event.pop("memory", self.memory)
        self.memory_peak = event.pop("memory_peak", self.memory_peak)
        if kind == "ready":
            del event["event"]
            self.facts, self.state, self.reason = event, "ready", None
            if self._ready and not self._ready.done():
                self._ready.set_result(None)
        elif kind == "failed":
            self._ending, self.reason = True, event["message"]
            if self._ready and not self._ready.done():
                self._ready.set_exception(WorkerError("model_not_loaded", event["message"]))
        elif kind == "answer":
            waiting = self._answers.pop(event["id"], None)
            if waiting and not waiting.done():
                waiting.set_result(event)
        elif self._listener and self._job and not self._job.done():
            self._listener(event, blobs)
            if kind in ("done", "error"):
                self._job.set_result(None)

    def _died(self, code: int) -> None:
        """Its socket is closed and it is gone; expected or not."""
        self.state, self._writer = "off", None
        told = f"signal {-code}" if code < 0 else f"exit code {code}"
        error = WorkerError("worker_crashed", f"the worker process died ({told}); a new one starts")
        if not self._ending:
            now = time.monotonic()
            self._deaths.append(now)
            if len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < DEATH_SECONDS:
                self.state = "down"
                deaths = f"{MAX_DEATHS} times within {DEATH_SECONDS:.0f} s"
                self.reason = f"the worker died {deaths} (last: {told}); restart the server"
                error = WorkerError("worker_crashed", self.reason)
        if self.closed:
            error = WorkerError("shutting_down", SHUTTING_DOWN)
        waiting = [self._ready, self._job, *self._answers.values()]
        self._answers = {}
        for future in waiting:
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # it may be that nobody waits for it

    async def run(self, job: dict[str, Any], pictures: Sequence[bytes], listener: Listener) -> None:
        """Send a job and hand its events to `listener` until its last, done or error. Raises WorkerError."""
        await self.ready()
        assert self._writer is not None
        self._job, self._listener, self.state = asyncio.get_running_loop().create_future(), listener, "busy"
        try:
            self._writer.write(pack({"do": "run", **job}, pictures))
            await self._drain()
            await self._job
        finally:
            self._listener = None
            if self.state == "busy":
                self.state = "ready"

    async def _drain(self) -> None:
        with contextlib.suppress(OSError):  # it died: the reading task says so
            if self._writer:
                await self._writer.drain()

    def cancel(self, job: str) -> None:
        """Let a job that runs stop at its next part."""
        if self._writer is not None and self.state == "busy":
            self._writer.write(pack({"do": "cancel", "job": job}))

    def warm(self) -> None:
        """Let it read the model's parts, if it has nothing else to do."""
        if self._writer is not None and self.state == "ready":
            self._writer.write(pack({"do": "warm"}))

    async def ask(self, what: str, **values: Any) -> Event:
        """Ask what its reader thread knows: "estimate" (peak, machine, fits) or "loras". Raises WorkerError."""
        await self.ready()
        assert self._writer is not None
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        self._writer.write(pack({"do": "ask", "what": what, "id": number, **values}))
        return await self._answers[number]

    def close(self) -> None:
        """End the process, and start none again."""
        self.closed = True
        self._end()

    async def stop(self) -> None:
        """End the process and wait for that; what it does is lost."""
        self._end()
        if self._reading is not None:
            await asyncio.wait([self._reading], timeout=2)

    def _end(self) -> None:
        self._ending = True
        if self._starting and not self._starting.done():
            self._starting.cancel()
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
