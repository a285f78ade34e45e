"""Two processes on this machine, over MLX's ring: the same bytes as one that accumulates twice; a peer that is lost."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import silhouettes

pytestmark = pytest.mark.slow

WORDS = [
    "--model",
    "tiny",
    "--resolution",
    "64",
    "--rank",
    "2",
    "--warmup",
    "0",
    "--hold-out",
    "0",
    "--save-every",
    "1",
]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def command(data: Path, output: Path, steps: int, accumulate: int) -> list[str]:
    words = [sys.executable, "-m", "klein_mlx", "train", str(data), "-o", str(output), *WORDS]
    return [*words, "--steps", str(steps), "--accumulate", str(accumulate), "--seed", "3"]


def start(rank: int, hosts: Path, data: Path, output: Path, steps: int) -> "subprocess.Popen[str]":
    """A process of a distributed run, as mlx.launch starts it."""
    environment = {**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command(data, output, steps, 1), env=environment, text=True, **pipes)  # type: ignore[call-overload]


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps([[f"127.0.0.1:{free_port()}"], [f"127.0.0.1:{free_port()}"]]))
    return path


def test_two_processes_are_one_that_accumulates_twice(hosts: Path, tmp_path: Path) -> None:
    data = silhouettes.make(tmp_path / "pictures", 4)
    (tmp_path / "one").mkdir()
    outputs = [tmp_path / "style.safetensors", tmp_path / "one" / "style.safetensors"]
    peers = [start(rank, hosts, data, outputs[0], 2) for rank in (0, 1)]
    told = [peer.communicate(timeout=120) for peer in peers]
    assert [peer.returncode for peer in peers] == [0, 0], told
    assert told[0][0].strip() == str(outputs[0])
    assert told[1][0] == told[1][1] == ""  # only the first one speaks
    subprocess.run(command(data, outputs[1], 2, 2), check=True, capture_output=True)  # on the same device
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_a_lost_peer_ends_the_others(hosts: Path, tmp_path: Path) -> None:
    data, output = silhouettes.make(tmp_path / "pictures", 2), tmp_path / "style.safetensors"
    peers = [start(rank, hosts, data, output, 10_000) for rank in (0, 1)]
    checkpoints = tmp_path / "style.run" / "checkpoints"
    until = time.monotonic() + 90
    while not list(checkpoints.glob("step-*")) and time.monotonic() < until:
        time.sleep(0.2)
    peers[1].kill()
    _, errors = peers[0].communicate(timeout=30)
    peers[1].communicate()
    assert peers[0].returncode == 1, errors
    assert "another machine is gone" in errors
    assert "the last checkpoint is" in errors
