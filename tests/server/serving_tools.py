"""Helpers of the server's tests: a running server of tiny, JSON lines, raw sockets, pictures as bytes."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from klein_mlx.server.serving import Background
from klein_mlx.server.settings import Settings

SMALL = {"width": 64, "height": 64, "steps": 1}


@contextmanager
def running(**settings: Any) -> Iterator[Background]:
    """A server of tiny at a free port; the port of `url` is the real one."""
    with Background(Settings(**{"model": "tiny", "port": 0, **settings})) as server:
        yield server


def client(server: Background, **options: Any) -> httpx.Client:
    return httpx.Client(base_url=server.url.partition("?")[0], timeout=60, trust_env=False, verify=False, **options)


def lines(http: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    """All events of POST /api/generate."""
    with http.stream("POST", "/api/generate", json=body) as reply:
        reply.read() if reply.status_code != 200 else None
        assert reply.status_code == 200, reply.text
        return [json.loads(line) for line in reply.iter_lines()]


def until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """Wait for a condition; its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
    return value


@contextmanager
def held(server: Background) -> Iterator[None]:
    """The worker stands still: what runs goes on afterwards."""
    pid = server.shared.worker.pid
    assert pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def raw(server: Background, data: bytes, seconds: float = 10) -> bytes:
    """What comes back for these bytes until the server closes the connection. Raises TimeoutError if it stays open."""
    port = server.listener.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port), seconds) as connection:
        connection.settimeout(seconds)
        received = b""
        try:
            with suppress(OSError):  # hung up on, perhaps with a reply; macOS has an error of its own for it
                connection.sendall(data)
            while chunk := connection.recv(1 << 16):
                received += chunk
        except ConnectionResetError:
            pass
        return received


def resident(pid: int) -> float:
    """MB that a process holds."""
    if sys.platform == "linux":  # ps is not everywhere
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    told = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout
    return int(told) * 1024 / 1e6


def port_of(server: Background) -> int:
    return server.listener.getsockname()[1]


def npm_install(folder: Path, package: str) -> Path:
    """A package of npm's in a folder; its node_modules. Skips the test where it cannot be had."""
    words = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--ignore-scripts", package]
    try:
        subprocess.run(words, check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        pytest.skip(f"{package} cannot be had: npm is not here, or has no network")
    return folder / "node_modules"


def picture_bytes(
    color: str = "red", size: tuple[int, int] = (128, 128), kind: str = "PNG", mode: str = "RGB"
) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, kind)
    return file.getvalue()


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def opened(text: str) -> Image.Image:
    """A picture of base64 or a data URI."""
    return Image.open(io.BytesIO(base64.b64decode(text.rpartition(",")[2])))
