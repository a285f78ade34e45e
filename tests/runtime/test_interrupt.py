"""Ctrl-C inside a phase that takes seconds: the command ends long before the phase would."""

import json
import signal
import time
from pathlib import Path

import medium
import pytest
from faults import start


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return medium.make(tmp_path_factory.mktemp("interrupt") / "medium")


@pytest.mark.parametrize("phase", ["encode", "steps", "decode"])
def test_ctrl_c_inside_a_long_phase(tmp_path: Path, model: Path, phase: str) -> None:
    """Sent as the phase begins. A step of 180 million parameters at this size takes over 5 s on a core; what is
    computed between two looks at the signal is meant to take a quarter of a second."""
    size = ("--width", "640", "--height", "640", "--steps", "1", "--seed", "0")
    arguments = ("generate", "a star", "-m", model, *size, "--progress", "json", "-o", "x.png")
    with start(*arguments, folder=tmp_path, memory=12 << 30) as process:
        assert process.stderr is not None
        told = {}
        while told.get("phase") != phase:
            line = process.stderr.readline()
            assert line, "the command ended before the phase"
            told = json.loads(line)
        time.sleep(0.1)
        sent = time.perf_counter()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        taken = time.perf_counter() - sent
    assert process.returncode == 130, stderr
    assert b"Traceback" not in stderr
    assert taken < 2.5
    assert list(tmp_path.iterdir()) == []
