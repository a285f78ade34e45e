"""Two and three processes on this machine, over MLX's ring, that make one picture; and lines that are dealt out."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from PIL import Image

from klein_mlx.bench.predict import klein
from klein_mlx.model.velocity import Peers
from klein_mlx.runtime.distributed import Group

HERE = Path(__file__).parent


def processes(count: int, command: list[str], folder: Path) -> "list[subprocess.Popen[str]]":
    """As mlx.launch starts them."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    (folder / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]))
    for one in sockets:
        one.close()
    environment = {**os.environ, "MLX_HOSTFILE": str(folder / "hosts.json")}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return [
        subprocess.Popen(command, env={**environment, "MLX_RANK": str(rank)}, text=True, cwd=folder, **pipes)
        for rank in range(count)
    ]


def finished(peers: "list[subprocess.Popen[str]]") -> list[tuple[int, str, str]]:
    told = [peer.communicate(timeout=240) for peer in peers]
    return [(peer.returncode, *words) for peer, words in zip(peers, told, strict=True)]


def klein_mlx(*words: str) -> list[str]:
    return [sys.executable, "-m", "klein_mlx", "generate", *words, "--model", "tiny", "--dtype", "float32"]


@pytest.mark.parametrize("size", [2, 3, 7])
def test_every_token_has_one_process(size: int) -> None:
    peers = [Peers(rank, size) for rank in range(size)]
    for count in (7, 36, 4096):
        runs = [one.run(count) for one in peers]
        assert (runs[0][0], runs[-1][1]) == (0, count)
        assert all(one[1] == other[0] for one, other in pairwise(runs))
        assert peers[0].lengths(count, 512) == tuple(
            b - a + one.run(512)[1] - one.run(512)[0] for one, (a, b) in zip(peers, runs, strict=True)
        )
    x = mx.arange(36).reshape(1, 36)
    assert mx.array_equal(mx.concatenate([one.own(x) for one in peers], axis=1), x)
    assert Peers().lengths(36, 512) == ()


def test_one_process_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As mlx.launch -n 1 starts it: with a list of hosts that is blank."""
    (tmp_path / "hosts.json").write_text("\n")
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
    group = Group("any")
    assert (group.rank, group.size, group.peers, group.share([1, "a"])) == (0, 1, Peers(), [1, "a"])


def test_bytes_of_a_step() -> None:
    """25 blocks' keys and values of half of 4608 tokens, 3072 channels in bfloat16."""
    assert Peers(0, 2).sent(4608, klein("4b").transformer, 2) == 25 * 2 * 2304 * 3072 * 2 == 707_788_800


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_the_velocity_is_that_of_one_process(count: int, tmp_path: Path) -> None:
    """In float32, two steps: with references, kept ones, and guidance in one pass and in two, and by functions that are
    compiled; 15 image tokens, 7 of the text, 6 of a reference, so that the processes have unequal parts."""
    for code, out, errors in finished(processes(count, [sys.executable, str(HERE / "shared_velocity.py")], tmp_path)):
        assert code == 0, errors
        found = json.loads(out)
        assert len(found) == 7
        assert max(found.values()) < 2e-6, found


@pytest.mark.slow
def test_two_processes_make_one_picture(tmp_path: Path) -> None:
    """With a reference, of a random seed, which both must know; the first one saves and tells."""
    Image.new("RGB", (64, 64), "orange").save(tmp_path / "x.png")
    words = klein_mlx("a red circle", "-i", "x.png", "--size", "96x64", "--steps", "2")
    words += ["-o", "out.png"]
    first, second = finished(processes(2, words, tmp_path))
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert first[1] == "out.png\n"
    assert second[1:] == ("", "")
    # 5 blocks' keys and values of half of 48 text, 24 image and 16 reference tokens, 192 channels in float32
    assert "2 processes share each picture; a step sends 0.338 MB from each" in first[2]
    seed = first[2].split("seed ")[1].split()[0]
    words[-1:] = ["alone.png", "--seed", seed]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)  # on the same device, which this test is not
    pictures = [Image.open(tmp_path / name).convert("RGB").tobytes() for name in ("out.png", "alone.png")]
    assert max(abs(a - b) for a, b in zip(*pictures, strict=True)) <= 1


@pytest.mark.slow
def test_lines_of_a_prompt_file_are_dealt_out(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("a red circle\na blue square\na green star\n")
    words = klein_mlx("--prompt-file", "lines.txt", "--size", "64x64", "--steps", "1", "-o", "{index}.png")
    first, second = finished(processes(2, words, tmp_path))
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert (first[1].split(), second[1].split()) == (["1.png", "3.png"], ["2.png"])
    assert "rank 1 of 2: 1 of 3 lines" in second[2]
    assert all((tmp_path / f"{index}.png").exists() for index in (1, 2, 3))


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other(tmp_path: Path) -> None:
    words = klein_mlx("a red circle", "--size", "256x256", "--steps", "100", "-o", "out.png", "--progress", "json")
    peers = processes(2, words, tmp_path)
    assert peers[0].stderr
    for line in peers[0].stderr:
        if '"step"' in line:
            break
    peers[1].send_signal(signal.SIGKILL)
    until = time.monotonic() + 60
    while peers[0].poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    errors = peers[0].communicate(timeout=5)[1]
    peers[1].communicate()
    assert peers[0].returncode == 2, errors
    assert [line for line in errors.splitlines() if "error" in line][-1].count("another machine is gone") == 1
    assert not (tmp_path / "out.png").exists()


@pytest.mark.slow
def test_what_one_cannot_do_none_begins(tmp_path: Path) -> None:
    """Each tells its own error; nobody waits for the others."""
    told = finished(processes(2, klein_mlx("a red circle", "--size", "65x64", "-o", "out.png"), tmp_path))
    assert [code for code, *_ in told] == [2, 2]
    assert all("multiple of" in errors and "Traceback" not in errors for *_, errors in told)
