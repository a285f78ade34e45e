"""A Hugging Face Hub on this machine: what `huggingface_hub` asks of the real one, and how it can fail.

`HF_ENDPOINT` points a command at it. A fault is (path part, status, headers): the first request whose path holds the
part is answered so; "drop" as status breaks the connection in the middle of the body.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the files of `folder` as the repository owner/name. asked: every path that was requested."""

    daemon_threads = True

    def __init__(self, folder: Path, licence: str = "apache-2.0"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        self.licence = licence
        self.faults: list[tuple[str, Any, dict[str, str]]] = []
        self.gated = False
        self.page = b"{}"  # the body of a fault's answer
        self.pace = 0.0  # seconds between two 64 KiB pieces
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """For a command that is to use this hub, with an empty cache in `home`."""
        away = {"HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"}
        kept = {name: value for name, value in os.environ.items() if name not in away}
        return {**kept, "HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}

    def size(self, name: str) -> int:
        return self.files[name].stat().st_size


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub  # type: ignore[assignment]

    def log_message(self, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        for part, status, headers in hub.faults:
            if part in f"{self.command} {path}":
                if status == "drop":
                    return self._send(self._content(path), body, cut=True)
                return self._send(hub.page, body, status, headers)
        if path.startswith("/api/models/owner/name"):
            rest = path.removeprefix("/api/models/owner/name").strip("/")
            return self._send(json.dumps(self._api(rest)).encode(), body)
        if path.startswith(f"/owner/name/resolve/{COMMIT}/") and path.split("/", 5)[5] in hub.files:
            return self._send(self._content(path), body)
        return self._send(b"{}", body, 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

    def _api(self, rest: str) -> Any:
        hub = self.server
        if rest.startswith("tree/"):
            return [
                {"type": "file", "path": name, "size": hub.size(name), "oid": hashlib.sha1(name.encode()).hexdigest()}
                for name in hub.files
            ]
        siblings = [{"rfilename": name, "size": hub.size(name)} for name in hub.files]
        card = {"license": hub.licence}
        gated = "auto" if hub.gated else False
        return {"id": "owner/name", "sha": COMMIT, "siblings": siblings, "cardData": card, "gated": gated, "tags": []}

    def _content(self, path: str) -> bytes:
        return self.server.files[path.split("/", 5)[5]].read_bytes()

    def _send(
        self, content: bytes, body: bool, status: int = 200, headers: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        self.send_response(status)
        told = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, **(headers or {})}
        told = {"Content-Type": "application/json", "Content-Length": str(len(content)), **told}
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        try:
            if cut:
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return
            for start in range(0, len(content), 1 << 16):
                self.wfile.write(content[start : start + (1 << 16)])
                if self.server.pace:
                    time.sleep(self.server.pace)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True


@contextmanager
def hub(folder: Path, **options: Any) -> Iterator[Hub]:
    """A running hub that serves `folder`."""
    server = Hub(folder, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
