"""A run that is killed at any moment leaves whole files under their final names, and goes on where its last checkpoint
was."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
import silhouettes

from klein_mlx.train.runs import RunFolder
from klein_mlx.weights.safetensors import read_header

KILLS = int(os.environ.get("KLEIN_TEST_KILLS", "5"))


def whole(path: Path) -> bool:
    """Whether every number of a safetensors file is there."""
    read_header(path)
    return all(mx.isfinite(array).all().item() for array in mx.load(str(path)).values())  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_killed_run_leaves_whole_files(tmp_path: Path) -> None:
    """KLEIN_TEST_KILLS: how many times, 5 unless given."""
    data, output = silhouettes.make(tmp_path / "pictures", 2), tmp_path / "style.safetensors"
    run, seen = tmp_path / "style.run", 0
    words = ["--model", "tiny", "--resolution", "64", "--rank", "2", "--accumulate", "1", "--save-every", "1"]
    words += ["--keep-last", "2", "--hold-out", "0", "--steps", "100000", "--quiet"]
    chance = random.Random(0)
    for _ in range(KILLS):
        began = [str(data), "-o", str(output), *words]
        command = ["--resume", str(run)] if (run / "options.toml").exists() else began
        process = subprocess.Popen([sys.executable, "-m", "klein_mlx", "train", *command])
        until = time.monotonic() + 120
        while not RunFolder(run).checkpoints and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 4))  # while it starts, encodes, updates or saves
        assert process.poll() is None
        process.kill()
        process.wait()
        files = [path for path in run.rglob("*.safetensors") if not any(p.startswith(".") for p in path.parts)]
        assert all(whole(path) for path in files)
        for checkpoint in RunFolder(run).checkpoints:
            step = json.loads((checkpoint / "state.json").read_text())["step"]
            assert checkpoint.name == f"step-{step:08}"
            assert {path.name for path in checkpoint.iterdir()} == {
                "state.json",
                "state.safetensors",
                "lora.safetensors",
            }
            seen = max(seen, step)
        assert not output.exists()
    assert seen > 0


def test_a_checkpoint_is_gone_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far its removal comes: no step's folder lacks a file."""
    folder = RunFolder(tmp_path / "x.run")
    for step in (1, 2, 3):
        folder.save(step, {"step": step}, {"a": mx.zeros(1)}, lambda beside: None)

    def killed(path: Path, **options: object) -> None:
        (Path(path) / "state.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.thin_out(1, None)
    assert [path.name for path in folder.checkpoints] == ["step-00000003"]
    monkeypatch.undo()
    folder.thin_out(1, None)
    assert len([*(tmp_path / "x.run" / "checkpoints").iterdir()]) == 1
