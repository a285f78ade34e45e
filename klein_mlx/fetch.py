"""A download in a process of its own: Ctrl-C ends it at once, and nothing half-fetched stays.

`huggingface_hub` downloads in threads that cannot be interrupted: within one process, Ctrl-C would wait for the files
under way. The child prints one JSON object a line: {"done": bytes}, and at last {"folder": path} or {"error": line}.
It ends when its stdin does, so that it never outlives its parent.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from klein_mlx.errors import CheckpointError
from klein_mlx.hub import Plan, cache_folder, download

_INTERVAL = 0.1  # seconds between two reports of progress
_PATIENCE = 2.0  # seconds for a child that was told to end
_CHILD = "import sys; sys.path[:] = sys.argv[1:]; from klein_mlx.fetch import serve; serve()"


def fetch(plan: Plan, *, patterns: Sequence[str], show: Callable[[int], None]) -> Path:
    """Bring what a plan lacks; `show` is called with the bytes that have come so far.

    Returns the folder in the cache. Raises CheckpointError; KeyboardInterrupt passes through, once the child is gone.
    Files that came whole stay in the cache, of the others nothing does.
    """
    request = {"hub_id": plan.hub_id, "revision": plan.revision, "patterns": list(patterns)}
    command = [sys.executable, "-P", "-c", _CHILD, *sys.path]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    result: dict[str, Any] = {}
    with subprocess.Popen(command, text=True, start_new_session=True, **pipes) as child:
        assert child.stdin
        assert child.stdout
        try:
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
            for line in child.stdout:
                result = json.loads(line)
                if "done" in result:
                    show(result["done"])
        except BrokenPipeError:
            pass  # the child is gone: its exit code is told below
        finally:
            _end(child)
    if "folder" in result:
        return Path(result["folder"])
    raise CheckpointError(
        result.get("error") or f"{plan.hub_id}: the download ended by itself (exit code {child.returncode}); try again"
    )


def _end(child: "subprocess.Popen[str]") -> None:
    """Close its stdin, which tells it to end; kill it if it does not."""
    assert child.stdin
    try:
        child.stdin.close()
    except BrokenPipeError:
        pass
    try:
        child.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()


# ---- in the child ----


def serve() -> None:
    """Read a request from stdin, download, print what happens; the process ends here."""
    request = json.loads(sys.stdin.readline())
    started = _unfinished(request["hub_id"])
    threading.Thread(target=_end_with_parent, args=(request["hub_id"], started), daemon=True).start()
    try:
        patterns, report = request["patterns"], _Report()
        folder = download(request["hub_id"], revision=request["revision"], patterns=patterns, advance=report)
        _tell({"folder": str(folder)})
    except CheckpointError as error:
        _tell({"error": str(error)})
    sys.stdout.flush()
    os._exit(0)  # no thread is waited for


class _Report:
    """Print the bytes that have come, not too often."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self.last > _INTERVAL:
            self.last = now
            _tell({"done": done})


def _tell(message: dict[str, Any]) -> None:
    try:
        print(json.dumps(message), flush=True)
    except BrokenPipeError:
        os._exit(1)


def _end_with_parent(hub_id: str, started: set[Path]) -> None:
    """Wait until stdin ends; then delete what is unfinished and was not there at the start, and leave."""
    while sys.stdin.read(1):
        pass
    for path in _unfinished(hub_id) - started:
        path.unlink(missing_ok=True)
    os._exit(1)


def _unfinished(hub_id: str) -> set[Path]:
    folder = cache_folder() / f"models--{hub_id.replace('/', '--')}" / "blobs"
    return set(folder.glob("*.incomplete"))
