"""The first use of a model, with a hub that runs here: what is said and asked, what is fetched, and every way to fail.

Each case runs the real command with an empty cache of its own.
"""

import fcntl
import importlib
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import zygote
from faults import start
from hub_server import COMMIT, Hub, hub
from huggingface_hub import constants

from klein_mlx import CheckpointError
from klein_mlx.weights.hub import plan_download, reason

TINY = Path(__file__).parents[2] / "klein_mlx" / "tiny"
NAMES = ["klein.json", "text_encoder.safetensors", "tokenizer.json", "transformer.safetensors", "vae.safetensors"]
ASK = ("a star", "--model", "owner/name", "--steps", "1", "--seed", "1", "-o", "x.png")
# Any connection is refused, and said so, in whatever library.
NO_SOCKETS = """
import socket, sys
def refuse(*args, **options):
    raise AssertionError("a network call")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from klein_mlx.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def served(tmp_path: Path) -> Any:
    """A hub with tiny as owner/name, and files beside it that nobody needs."""
    folder = tmp_path / "served"
    folder.mkdir()
    for name in NAMES:
        (folder / name).symlink_to(TINY / name)
    (folder / "tiny-single-file.safetensors").write_bytes(b"x" * 1000)
    (folder / "README.md").write_text("# x")
    with hub(folder) as server:
        yield server


def klein(
    server: Hub, tmp_path: Path, *arguments: str, code: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {**server.environment(tmp_path / "home"), **environment}
    if not code:
        done = zygote.run(arguments, cwd=tmp_path, env=kept)
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=60, env=kept, stdin=subprocess.DEVNULL
    )


def blobs(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "home").rglob("blobs/*"))


def test_a_download_then_no_network_at_all(served: Hub, tmp_path: Path) -> None:
    first = klein(served, tmp_path, *ASK, "--yes")
    assert (first.returncode, first.stdout) == (0, "x.png\n"), first.stderr
    total = sum(served.size(name) for name in NAMES)
    for words in (
        "owner/name is not on this machine yet",
        f"from     {served.address}/owner/name",
        f"{total / 1e6:.1f} MB in 5 files",
        str(tmp_path / "home"),
        "license  apache-2.0",
        "memory   needs about 7.4 MB of ",
    ):
        assert words in first.stderr
    got = [path.split(f"/{COMMIT}/")[1] for path in served.asked if path.startswith("GET /owner/name/resolve")]
    assert sorted(got) == NAMES, "only the files that are needed, each of them once"
    served.asked.clear()
    again = klein(served, tmp_path, *ASK, "--force", code=NO_SOCKETS)
    assert (again.returncode, again.stderr.splitlines()[0]) == (0, "seed 1")
    assert served.asked == []
    assert klein(served, tmp_path, "info", "owner/name", "--json", code=NO_SOCKETS).returncode == 0


def test_what_is_here_already_is_offered(served: Hub, tmp_path: Path) -> None:
    """Models that are whole; not the pieces of one."""
    (tmp_path / "own" / "models").mkdir(parents=True)
    (tmp_path / "own" / "models" / "mine").symlink_to(TINY)
    (tmp_path / "own" / "models" / "nothing").mkdir()
    (tmp_path / "home" / "hub" / "models--someone--klein").mkdir(parents=True)
    done = klein(served, tmp_path, "info", "owner/name", "--yes", KLEIN_MLX_HOME=str(tmp_path / "own"))
    assert done.returncode == 0, done.stderr
    assert "  or take  --model mine: on this machine already\n" in done.stderr


def test_only_what_is_missing_is_fetched(served: Hub, tmp_path: Path) -> None:
    """With a part from elsewhere its weights are not fetched; later they alone are."""
    assert klein(served, tmp_path, *ASK, "--yes", "--vae", str(TINY / "vae.safetensors"), "--quiet").returncode == 0
    assert not any("vae.safetensors" in path for path in served.asked)
    served.asked.clear()
    done = klein(served, tmp_path, *ASK, "--yes", "--force")
    assert done.returncode == 0
    assert "1.5 MB in 1 files; 8.5 MB are here already" in done.stderr
    got = [path for path in served.asked if path.startswith("GET /owner/name/resolve")]
    assert [path.rpartition("/")[2] for path in got] == ["vae.safetensors"]


def test_a_part_from_the_hub(served: Hub, tmp_path: Path) -> None:
    """Asked for as a model is; of the repository only the part is fetched, and later no network is needed."""
    command = ("convert", "tiny", "x", "--dry-run", "--transformer", "owner/name")
    done = klein(served, tmp_path, *command)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "owner/name is not on this machine: 7.4 MB from http://127.0.0.1" in done.stderr
    done = klein(served, tmp_path, *command, "--offline", code=NO_SOCKETS)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: owner/name: its transformer is not (fully) in ")
    done = klein(served, tmp_path, *command, "--yes")
    assert done.returncode == 0, done.stderr
    assert "license  apache-2.0" in done.stderr
    got = sorted(path.rpartition("/")[2] for path in served.asked if path.startswith("GET /owner/name/resolve"))
    assert got == ["klein.json", "tokenizer.json", "transformer.safetensors"]
    assert klein(served, tmp_path, *command, code=NO_SOCKETS).returncode == 0


TRAIN = ("train", "pictures", "-o", "x.safetensors", "-m", "owner/name")


@pytest.mark.parametrize("command", [ASK, TRAIN])
def test_nobody_to_ask(served: Hub, tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "pictures").mkdir()
    if command is TRAIN:
        done = klein(served, tmp_path, *command)
        assert "data is 'pictures', which holds no pictures" in done.stderr
        assert served.asked == []
        (tmp_path / "pictures" / "a.png").touch()
    done = klein(served, tmp_path, *command)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "owner/name is not on this machine: 9.9 MB from http://127.0.0.1" in done.stderr
    assert "add --yes to download it, or first: klein-mlx models pull owner/name" in done.stderr
    assert blobs(tmp_path) == []


@pytest.mark.parametrize(("given", "environment"), [(("--offline",), {}), ((), {"HF_HUB_OFFLINE": "1"})])
def test_offline(served: Hub, tmp_path: Path, given: tuple[str, ...], environment: dict[str, str]) -> None:
    done = klein(served, tmp_path, *ASK, "--yes", *given, code=NO_SOCKETS, **environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: owner/name: is not (fully) ")
    assert "copy" in done.stderr
    assert served.asked == []


REFUSED = {"X-Error-Message": "Invalid credentials in Authorization header"}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (("/api/models", 401, {}), "is not there, or not for everybody: check the spelling, or `hf auth login`"),
        (("/api/models", 401, {"X-Error-Code": "RepoNotFound"}), "no such repository, or your token may not see it"),
        (("/api/models", 401, REFUSED), "the Hub refused your token: `hf auth login` with a new one"),
        (("/api/models", 404, {"X-Error-Code": "RepoNotFound"}), "no such repository"),
        (("/api/models", 404, {"X-Error-Code": "RevisionNotFound"}), "has no revision 'v2'"),
        (("/api/models", 403, {"X-Error-Code": "GatedRepo"}), "is gated: accept its license on huggingface.co"),
        (("auth-check", 403, {"X-Error-Code": "GatedRepo"}), "is gated: accept its license on huggingface.co"),
        (("/api/models", 429, {}), "too many requests (the Hub answered 429): wait some minutes"),
        (("/api/models", 500, {}), "the Hub has a problem (it answered 500): try again later"),
        (("/api/models", 200, {"Content-Type": "text/html"}), "what answered is not the Hub (a network's login page?)"),
    ],
)
def test_what_the_hub_refuses_at_once(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, words: str
) -> None:
    """The library's own errors, from the answers that cause them, as one line with the remedy."""
    monkeypatch.setattr(constants, "ENDPOINT", served.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    if fault[2] is REFUSED:
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    served.gated = fault[0] == "auth-check"
    served.page = b"<html>log in</html>" if fault[1] == 200 else b"{}"
    served.faults.append(fault)
    with pytest.raises(CheckpointError) as caught:
        plan_download("owner/name", revision="v2")
    assert str(caught.value).startswith("owner/name: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "words"), [(403, "is gated: accept its license"), (500, "(it answered 500): try again later")]
)
def test_what_the_hub_refuses_of_the_files(served: Hub, tmp_path: Path, status: int, words: str) -> None:
    """One line with the remedy, exit code 2, no picture, and nothing half-fetched."""
    served.faults.append(("GET /owner", status, {}))
    done = klein(served, tmp_path, *ASK, "--yes", "--quiet")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert words in done.stderr
    assert not (tmp_path / "x.png").exists()
    assert not [path for path in blobs(tmp_path) if path.suffix == ".incomplete"]


def test_no_network(served: Hub, tmp_path: Path) -> None:
    done = klein(served, tmp_path, *ASK, "--yes", HF_ENDPOINT="http://127.0.0.1:9")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "owner/name: cannot reach 127.0.0.1:9" in done.stderr


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"HF_ENDPOINT": "nonsense"}, "HF_ENDPOINT is 'nonsense'; it must be a URL such as https://huggingface.co"),
        (
            {"HF_ENDPOINT": "https://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"},
            "your connection and HTTPS_PROXY",
        ),
        ({"HF_HOME": "/dev/null/x"}, "/dev/null/x/hub is not writable for you; set HF_HOME"),
        ({"HF_HUB_CACHE": "/dev/null/x"}, "/dev/null/x is not writable for you (Not a directory); set HF_HOME"),
    ],
)
def test_a_wrong_environment(served: Hub, tmp_path: Path, environment: dict[str, str], words: str) -> None:
    done = klein(served, tmp_path, *ASK, "--yes", **environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert words in done.stderr


@pytest.mark.slow
def test_a_connection_that_breaks_in_the_middle_of_a_file(served: Hub, tmp_path: Path) -> None:
    """The library tries again; what never comes whole is told, and what came whole stays."""
    served.faults.append(("GET /owner/name/resolve/" + COMMIT + "/vae", "drop", {}))
    done = klein(served, tmp_path, *ASK, "--yes", "--quiet")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "the connection broke in the middle of a file: run it again (files that are whole are kept)" in done.stderr
    assert not [path for path in blobs(tmp_path) if path.suffix == ".incomplete"]
    assert len([path for path in blobs(tmp_path) if path.stat().st_size > 1e6]) == 2  # those that came whole


def test_a_full_disk(served: Hub, tmp_path: Path) -> None:
    """Our own check, before a byte is fetched; the library only warns."""
    code = """
import shutil, sys
usage = shutil.disk_usage
shutil.disk_usage = lambda path: usage(path)._replace(free=200 << 20)
from klein_mlx.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
    done = klein(served, tmp_path, *ASK, "--yes", code=code)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "278.4 MB are needed in" in done.stderr
    assert "and 209.7 MB are free: free some (klein-mlx models rm), or set HF_HOME to a larger disk" in done.stderr
    assert not any("resolve" in path for path in served.asked)


def test_a_repository_of_something_else(tmp_path: Path) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "flux.gguf").write_bytes(b"GGUF")
    with hub(folder) as server:
        done = klein(server, tmp_path, *ASK, "--yes")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "has no weights in diffusers' layout or ours; give it as --transformer" in done.stderr


def asked_in_a_terminal(server: Hub, tmp_path: Path, answer: str, *given: str) -> tuple[int, str]:
    """The command with a terminal as stdin and stderr; `answer` is typed at the question."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "klein_mlx", *ASK, *given]
    environment = {**server.environment(tmp_path / "home"), "TERM": "xterm"}
    with subprocess.Popen(
        command, stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, cwd=tmp_path, env=environment
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the other end is closed
                piece = b""
            shown += piece
            if not piece:
                break
            if answer and b"Download it? [Y/n] " in shown:
                os.write(ours, answer.encode())
                answer = ""
        process.wait(30)
    os.close(ours)
    return process.returncode, shown.decode()


def test_the_question(served: Hub, tmp_path: Path) -> None:
    code, shown = asked_in_a_terminal(served, tmp_path, "n\n")
    assert code == 0
    assert "owner/name was not downloaded; nothing else was done" in shown
    assert blobs(tmp_path) == []
    served.pace = 0.001
    code, shown = asked_in_a_terminal(served, tmp_path, "\n")
    assert code == 0, shown
    bars = [line for line in shown.replace("\r", "\n").splitlines() if line.startswith("name:")]
    assert bars, "a bar over all files"
    assert all("/9.95M" in line for line in bars), bars
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_download_that_is_stopped(served: Hub, tmp_path: Path, sent: signal.Signals) -> None:
    """Ctrl-C ends it within seconds though the files would take minutes, with exit code 130. Even after kill -9 the
    process that downloads ends by itself, and no piece of a file stays."""
    served.pace = 1.0
    environment = {**dict.fromkeys(os.environ), "HF_HUB_OFFLINE": None, **served.environment(tmp_path / "home")}

    def pieces() -> list[Path]:
        return [path for path in blobs(tmp_path) if path.suffix == ".incomplete"]

    with start(*ASK, "--yes", "--quiet", folder=tmp_path, changes=environment) as process:
        deadline = time.monotonic() + 60
        while not pieces():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(sent)
        process.wait(20)
        assert process.stderr
        assert process.stderr.read() == (b"interrupted\n" if sent == signal.SIGINT else b"")
    assert process.returncode == (130 if sent == signal.SIGINT else -sent)
    deadline = time.monotonic() + 30
    while pieces():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_short_name_is_told_with_its_origin(served: Hub, tmp_path: Path) -> None:
    done = klein(served, tmp_path, "a star", "--model", "4b-q44")
    assert "unknown model '4b-q44' (did you mean 4b-q4?)" in done.stderr
    done = klein(served, tmp_path, "a star", "--model", "4b-q4", "--yes")
    assert done.stderr.startswith("error: mlx-community/flux2-klein-4b-4bit: no such repository")


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("ProxyError", "403 Forbidden", "the proxy refused (403 Forbidden): check HTTPS_PROXY"),
        (
            "ConnectError",
            "refused",
            "cannot reach huggingface.co (refused): check your connection, or use --model FOLDER",
        ),
        ("ReadError", "x", "the connection broke in the middle of a file"),
    ],
)
def test_each_failure_of_the_network_has_its_own_line(
    kind: str, text: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the library raises it that huggingface_hub connects with."""
    library = importlib.import_module("huggingface_hub.utils._http")
    error = getattr(getattr(library, "httpx2", None) or library.httpx, kind)(text)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert reason(error, None).startswith(words)
