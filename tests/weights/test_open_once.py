"""A model's headers are read once, however often its parts are asked for; a file that was replaced is read again."""

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import safetensors

from klein_mlx import KleinPipeline
from klein_mlx.weights.safetensors import read_header

TINY = Path(__file__).parents[2] / "klein_mlx" / "tiny"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file's header is read."""
    found: Counter[str] = Counter()
    real = safetensors.safe_open

    def noting(path: Any, *args: Any, **kwargs: Any) -> Any:
        found[Path(path).name] += 1
        return real(path, *args, **kwargs)

    monkeypatch.setattr(safetensors, "safe_open", noting)
    return found


def test_a_picture_reads_each_header_once(tmp_path: Path, opened: Counter[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    KleinPipeline.from_pretrained(folder, keep="nothing")("a star", seed=1, width=64, height=64, num_inference_steps=1)
    assert opened == {"text_encoder.safetensors": 1, "transformer.safetensors": 1, "vae.safetensors": 1}


def test_a_file_in_another_s_place_is_read(tmp_path: Path, opened: Counter[str]) -> None:
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    mx.save_safetensors(str(path), {"x": mx.zeros(3)})
    mx.save_safetensors(str(other), {"y": mx.zeros(3)})
    first = read_header(path)
    first.clear()  # the caller's own
    assert set(read_header(path)) == {"x"}
    os.replace(other, path)
    assert set(read_header(path)) == {"y"}
    assert opened == {"a.safetensors": 2}
