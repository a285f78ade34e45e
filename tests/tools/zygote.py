"""The command without the cost of its start: a process that has the package loaded and forks itself for each run.

`run` is `subprocess.run` for `klein-mlx`, with the same streams, folder, environment, limits and exit code. Half of a
command's time on tiny is Python and its imports; the tests start hundreds. On macOS, where a fork beside Metal is not
safe, and where a variable differs that an interpreter reads at its own start, a real process is started.
"""

import atexit
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOADED = (
    *("klein_mlx.pipeline", "klein_mlx.formats.describe", "klein_convert.checkpoint", "klein_convert.export"),
    *(f"klein_mlx.cli.{name}" for name in ("main", "generate", "again", "show", "info", "lora", "convert", "models")),
    *("klein_mlx.cli.batch", "klein_mlx.cli.prompts", "klein_mlx.cli.terminal", "klein_mlx.cli.download"),
    *("PIL.PngImagePlugin", "PIL.JpegImagePlugin", "PIL.WebPImagePlugin", "tokenizers", "numpy", "tqdm"),
)
AT_START = ("PYTHON", "LC_", "LANG", "LD_", "OPENBLAS", "OMP", "MKL", "TZ")  # such names count only then
COMMAND = [sys.executable, "-m", "klein_mlx"]


class Zygote:
    """One such process. environment: the variables of AT_START that it is started with. Raises ConnectionError where
    the package cannot be loaded."""

    def __init__(self, environment: Mapping[str, str]):
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        started = {"PATH": os.environ.get("PATH", ""), **environment}
        words = [sys.executable, __file__, str(theirs.fileno())]
        self.process = subprocess.Popen(words, pass_fds=[theirs.fileno()], env=started)
        theirs.close()
        if not self.ours.recv(100):
            self.ours.close()
            self.process.wait()
            raise ConnectionError
        atexit.register(self.close)

    def close(self) -> None:
        """End it, as the process that asks ends."""
        self.ours.close()
        self.process.wait()

    def run(self, request: Mapping[str, Any], stdin: bytes, timeout: float) -> tuple[int, bytes, bytes]:
        """Exit code as subprocess has it, stdout, stderr. Raises TimeoutExpired, after the command is killed."""
        pipes = [os.pipe() for _ in range(3)]
        inner = [pipes[0][0], pipes[1][1], pipes[2][1]]
        socket.send_fds(self.ours, [json.dumps(request).encode()], inner)
        for one in inner:
            os.close(one)
        texts: list[bytes] = [b"", b""]
        threads = [threading.Thread(target=_feed, args=(pipes[0][1], stdin))]
        threads += [threading.Thread(target=_drain, args=(pipes[n][0], texts, n - 1)) for n in (1, 2)]
        for thread in threads:
            thread.start()
        pid = json.loads(self.ours.recv(100))
        self.ours.settimeout(timeout)
        try:
            status = json.loads(self.ours.recv(100))
        except TimeoutError:
            os.killpg(pid, signal.SIGKILL)
            self.ours.settimeout(None)
            self.ours.recv(100)
            for thread in threads:
                thread.join()
            raise subprocess.TimeoutExpired("klein-mlx", timeout, texts[0], texts[1]) from None
        self.ours.settimeout(None)
        for thread in threads:
            thread.join()
        return os.waitstatus_to_exitcode(status), texts[0], texts[1]


def _feed(file: int, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), open(file, "wb") as stream:
        stream.write(data)


def _drain(file: int, texts: list[bytes], index: int) -> None:
    with open(file, "rb") as stream:
        texts[index] = stream.read()


_zygotes = threading.local()


def run(
    arguments: Sequence[object],
    *,
    cwd: Path,
    env: Mapping[str, str],
    stdin: bytes = b"",
    timeout: float = 60,
    memory: int | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run `klein-mlx` with these arguments to its end, in a session of its own.

    memory: bytes of address space that it may have. Raises subprocess.TimeoutExpired, after it is killed.
    """
    words = [os.fspath(word) if isinstance(word, Path) else str(word) for word in arguments]
    start = {name: value for name, value in env.items() if name.startswith(AT_START)}
    if sys.platform != "linux":
        return spawn([*COMMAND, *words], cwd=cwd, env=env, stdin=stdin, timeout=timeout, memory=memory)
    key = tuple(sorted(start.items()))
    kept: dict[Any, Zygote] = _zygotes.__dict__.setdefault("kept", {})
    try:
        kept[key] = kept.get(key) or Zygote(start)
    except ConnectionError:
        return spawn([*COMMAND, *words], cwd=cwd, env=env, stdin=stdin, timeout=timeout, memory=memory)
    request = {"words": words, "cwd": os.fspath(cwd), "env": dict(env), "memory": memory}
    code, stdout, stderr = kept[key].run(request, stdin, timeout)
    return subprocess.CompletedProcess(words, code, stdout, stderr)


def limit(memory: int | None) -> list[str]:
    """What goes before a command for so many bytes of address space: a shell, since a function between fork and exec is
    not safe beside MLX's threads. macOS does not keep to such a limit: there, nothing."""
    if memory is None or sys.platform != "linux":
        return []
    return ["/bin/sh", "-c", 'ulimit -v "$0"; exec "$@"', str(memory >> 10)]


def spawn(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdin: bytes, timeout: float, memory: int | None
) -> subprocess.CompletedProcess[bytes]:
    """Any command as a process of its own."""
    words = [*limit(memory), *command]
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    with subprocess.Popen(words, cwd=cwd, env=env, start_new_session=True, **pipes) as process:
        try:
            stdout, stderr = process.communicate(stdin, timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired("klein-mlx", timeout, *process.communicate()) from None
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


def serve(connection: socket.socket) -> dict[str, Any]:
    """Fork for every request; returns in the child, with its request. Ends with the process that asks."""
    connection.send(b"ready")
    while True:
        message, inner, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            os._exit(0)
        pid = os.fork()
        if not pid:
            connection.close()
            for number, file in enumerate(inner):
                os.dup2(file, number)
                os.close(file)
            return json.loads(message)
        for file in inner:
            os.close(file)
        connection.send(json.dumps(pid).encode())
        connection.send(json.dumps(os.waitpid(pid, 0)[1]).encode())


def become(request: Mapping[str, Any]) -> None:
    """Take on a request's session, folder, environment, limit, streams and words."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if request["memory"]:
        resource.setrlimit(resource.RLIMIT_AS, (request["memory"],) * 2)
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        before = getattr(sys, name)
        stream = open(number, mode, encoding=before.encoding, errors=before.errors, closefd=False)  # noqa: SIM115
        if name == "stderr":
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = ["klein-mlx", *request["words"]]


if __name__ == "__main__":
    import gc
    import importlib

    root = Path(__file__).parents[2]
    sys.path[0:1] = [str(root), str(root / "convert")]
    for module in LOADED:
        importlib.import_module(module)
    gc.freeze()
    become(serve(socket.socket(fileno=int(sys.argv[1]))))
    sys.exit(importlib.import_module("klein_mlx.cli.main").main())
