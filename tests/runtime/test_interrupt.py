"""Ctrl-C inside a phase that takes seconds: the command ends long before the phase would."""

import json
import os
import resource
import signal
import subprocess
from pathlib import Path

import medium
import pytest
from faults import start


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return medium.make(tmp_path_factory.mktemp("interrupt") / "medium")


def computed(pid: int) -> float:
    """Seconds of processor time that a process has taken."""
    try:
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    except FileNotFoundError:  # macOS, whose ps tells hundredths
        told = subprocess.run(["ps", "-o", "time=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout
        minutes, seconds = told.strip().split(":")[-2:]
        return 60 * int(minutes) + float(seconds)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["encode", "steps", "decode"])
def test_ctrl_c_inside_a_long_phase(tmp_path: Path, model: Path, phase: str) -> None:
    """Sent as the phase begins. A step of 180 million parameters at this size takes over 5 s on a core; what is
    computed between two looks at the signal is meant to take a quarter of a second. Processor time is compared: other
    programs take none of it."""
    size = ("--width", "640", "--height", "640", "--steps", "1", "--seed", "0")
    arguments = ("generate", "a star", "-m", model, *size, "--progress", "json", "-o", "x.png")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with start(*arguments, folder=tmp_path, memory=12 << 30) as process:
        assert process.stderr is not None
        told = {}
        while told.get("phase") != phase:
            line = process.stderr.readline()
            assert line, "the command ended before the phase"
            told = json.loads(line)
        sent = computed(process.pid)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime - sent
    assert process.returncode == 130, stderr
    assert b"Traceback" not in stderr
    assert taken < 3
    assert list(tmp_path.iterdir()) == []
