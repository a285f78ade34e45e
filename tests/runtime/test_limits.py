"""What is asked of the whole machine while a run works: bounded, and put back."""

import threading
from pathlib import Path

import mlx.core as mx
import pytest

from klein_mlx import KleinPipeline
from klein_mlx.runtime.memory import CACHE_SHARE, ReadAhead, memory_limits


def cache_limit() -> int:
    """The limit in force; MLX tells it only when another is set."""
    limit = mx.set_cache_limit(0)
    mx.set_cache_limit(limit)
    return limit


def test_the_cache_is_bounded_inside_and_free_again_behind() -> None:
    before = mx.set_cache_limit(50_000_000)
    try:
        with memory_limits(peak=10, machine=CACHE_SHARE * 1_000_000):
            assert cache_limit() == 1_000_000
        assert cache_limit() == 50_000_000
        with memory_limits(peak=10, machine=CACHE_SHARE * 10**9):
            assert cache_limit() == 50_000_000, "a tighter limit of the caller's stays"
    finally:
        mx.set_cache_limit(before)


def test_memory_is_wired_on_metal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and a margin, never more than there is; what was wired before is again."""
    wired = [123]

    def set_wired_limit(limit: int) -> int:
        wired.append(limit)
        return wired[-2]

    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    with memory_limits(peak=500, machine=1000):
        assert wired == [123]  # the device is the CPU, on a Mac too
    del wired[1:]
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.DeviceType.gpu))
    with memory_limits(peak=500, machine=1000):
        assert wired[-1] == 500
    assert wired[-1] == 123
    with memory_limits(peak=5000, machine=1000):
        assert wired[-1] == 1000


def test_of_two_the_last_one_out_puts_the_limits_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the process's: who left first would loosen the other's, and who left last would put back a tight one."""
    wired = [123]

    def set_wired_limit(limit: int) -> int:
        wired.append(limit)
        return wired[-2]

    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.DeviceType.gpu))
    before = mx.set_cache_limit(50_000_000)
    machine = CACHE_SHARE * 1_000_000
    try:
        first, second = memory_limits(500, machine), memory_limits(700, machine)
        first.__enter__()
        second.__enter__()
        assert wired[-1] == 1200
        first.__exit__(None, None, None)
        assert cache_limit() == 1_000_000, "the second still works"
        second.__exit__(None, None, None)
        assert cache_limit() == 50_000_000
        assert wired[-1] == 123
    finally:
        mx.set_cache_limit(before)


def test_a_run_leaves_the_limits_as_they_were_whenever_the_caller_has_the_word() -> None:
    before = mx.set_cache_limit(20_000_000)
    try:
        run = KleinPipeline.from_pretrained("tiny").stream("a red circle", num_inference_steps=2)
        for _ in run:
            assert cache_limit() == 20_000_000
        run.close()
        assert cache_limit() == 20_000_000
    finally:
        mx.set_cache_limit(before)


def test_files_are_read_ahead(tmp_path: Path) -> None:
    """All of them, in the background; a file that is not there is somebody else's trouble."""
    paths = [tmp_path / name for name in ("a", "none", "b")]
    paths[0].write_bytes(b"x" * 10_000_000)
    paths[2].write_bytes(b"y" * 1234)
    threads = threading.active_count()
    with ReadAhead(paths) as ahead:
        ahead.wait()
        assert ahead.done == 10_001_234
    with ReadAhead([]):
        assert threading.active_count() == threads


def test_reading_ahead_stops_with_the_run(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(8 << 30)  # sparse: no disk is used
    with ReadAhead([path]) as ahead:
        pass
    assert ahead.done < 8 << 30


def test_what_is_read_ahead_is_what_will_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transformer's files while a prompt is encoded; nothing if it is loaded, or the prompt is known, or memory is
    short."""
    asked: list[list[str]] = []

    class Recorded(ReadAhead):
        def __init__(self, paths: list[Path]):
            asked.append([path.name for path in paths])
            super().__init__(paths)

    monkeypatch.setattr("klein_mlx.pipeline.ReadAhead", Recorded)
    pipe = KleinPipeline.from_pretrained("tiny", keep="nothing")
    for prompt in ("a red circle", "a red circle"):
        pipe(prompt, num_inference_steps=1)
    assert "transformer.safetensors" in asked[0]
    assert "text_encoder.safetensors" not in asked[0]
    assert asked[1] == []
    kept = KleinPipeline.from_pretrained("tiny", keep="all")
    for prompt in ("a red circle", "a blue circle"):
        kept(prompt, num_inference_steps=1)
    assert asked[3] == []
    size = sum(path.stat().st_size for path in pipe.source.files(["transformer"]))
    for machine, files in ((1.1 * size, 0), (1.5 * size, 3)):
        monkeypatch.setattr("klein_mlx.runtime.parts.machine_memory", lambda machine=machine: machine)
        assert len(pipe.parts.files_ahead(size // 4)) == files
