"""Running the application: the socket, uvicorn with time limits of its own, signals."""

import asyncio
import errno
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from klein_mlx.errors import RequestError
from klein_mlx.server.app import Shared, make_app
from klein_mlx.server.guard import url
from klein_mlx.server.settings import Settings

MAX_HEADER = 16 * 1024  # bytes
MAX_CONNECTIONS = 256
SHUTDOWN_SECONDS = 1


def open_socket(settings: Settings) -> socket.socket:
    """Listen. Raises RequestError for a port or an address that cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio asks before it sets TCP_NODELAY
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise RequestError(f"port {settings.port} is in use; choose another with --port") from None
        raise RequestError(
            f"cannot listen at {settings.host} port {settings.port} ({error.strerror}); check --host and --port"
        ) from None
    return listener


class Server(uvicorn.Server):
    """uvicorn's server, which answers the requests that wait or run before it closes their connections."""

    shared: Shared

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.shared.jobs.close()
        await super().shutdown(sockets)


def make_server(settings: Settings, listener: socket.socket) -> Server:
    """A server of the application for this socket."""
    app = make_app(settings, listener.getsockname()[1])
    config = uvicorn.Config(
        app,
        http=limited(settings.read_seconds),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    server = Server(config)
    server.shared = app.app.state  # type: ignore[attr-defined]
    return server


def serve(settings: Settings, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. ready: called with the URL once requests are answered. Raises RequestError."""
    listener = open_socket(settings)
    server = make_server(settings, listener)

    async def main() -> None:
        task = asyncio.create_task(server.serve([listener]))
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        if server.started:
            ready(url(settings, listener.getsockname()[1]))
        await task

    with listener:
        asyncio.run(main())


class Background:
    """A server in a thread of this process, for tests and scripts. url: of the page. shared: what the routes share."""

    def __init__(self, settings: Settings):
        self.listener = open_socket(settings)
        self.server = make_server(settings, self.listener)
        self.shared = self.server.shared
        self.url = url(settings, self.listener.getsockname()[1])
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.run(self.server.serve([self.listener]))

    def __enter__(self) -> "Background":
        self.thread.start()
        while not self.server.started and self.thread.is_alive():
            self.thread.join(0.01)
        return self

    def __exit__(self, *details: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.listener.close()


def limited(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which closes a connection whose header does not come within so many seconds."""

    class Limited(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._arm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._timer is None and (self.cycle is None or self.cycle.response_complete):
                self._arm()
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before:
                self._disarm()

        def _arm(self) -> None:
            self._timer = self.loop.call_later(seconds, self.transport.close)

        def _disarm(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Limited
