"""What `bench --tune` chooses by a fake clock, what is kept of it, and that every choice gives the same picture."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from klein_mlx import KleinPipeline, RequestError
from klein_mlx.bench.measure import ROWS, Sizes, best_of_three, tune
from klein_mlx.bench.predict import klein
from klein_mlx.cli import main as cli
from klein_mlx.model import layers
from klein_mlx.model.layers import Cpu, Gpu
from klein_mlx.runtime import memory
from klein_mlx.runtime.memory import Work, step_bytes

SMALL = Sizes(hidden=128, tokens=(4, 8, 16), long=24, rows=8, channels=16, pixels=6, text=4, side=2)
GPU = Gpu(dense_from=1024, compiles=False)


class FakeClock:
    """Seconds by what a way's name ends in, else 1; calls every way, and keeps what it returned."""

    def __init__(self, times: dict[str, float] | None = None):
        self.times, self.results = times or {}, {}

    def __call__(self, name: str, way: Callable[[], mx.array]) -> float:
        self.results[name] = way()
        mx.eval(self.results[name])
        return next((seconds for end, seconds in self.times.items() if name.endswith(end)), 1.0)


def test_nothing_changes_where_nothing_is_faster() -> None:
    tuned = tune(GPU, FakeClock(), SMALL)
    assert tuned.choices == {
        "dense": {"3": None, "4": None, "5": None, "6": None, "8": None},
        "conv": "direct",
        "rows": None,
        "dtype": "bfloat16",
    }
    usual = Gpu(conv="matmul", rows=ROWS, dtype=mx.float16, compiles=False)
    chosen = tune(usual, FakeClock(), SMALL).choices
    assert (chosen["conv"], chosen["rows"], chosen["dtype"]) == ("matmul", ROWS, "float16")


def test_what_is_faster_is_chosen() -> None:
    times = {" 16 tokens, dequantized": 0.5, " 8 tokens, dequantized": 0.5, "matmul": 0.9, "rows": 0.96}
    clock = FakeClock({**times, "float16": 0.98})
    tuned = tune(GPU, clock, SMALL)
    assert tuned.choices["dense"] == dict.fromkeys("34568", 8)  # faster at 8 and at 16 tokens, not at 4
    assert (tuned.choices["conv"], tuned.choices["rows"]) == ("matmul", ROWS)
    assert tuned.choices["dtype"] == "bfloat16"  # 2 % may be chance
    assert tuned.seconds.keys() == clock.results.keys()
    chosen = memory.with_choices(GPU, tuned.choices)
    assert [chosen.is_dequantized(tokens, 4) for tokens in (7, 8)] == [False, True]


def test_all_ways_are_equal_to_rounding() -> None:
    """In float32 by the order of sums; the block in two dtypes of 16 bits by a few last bits of bfloat16."""
    clock = FakeClock()
    tune(replace(GPU, dtype=mx.float32), clock, SMALL)
    pairs = [*clock.results.items()]
    assert len(pairs) == 5 * 2 + 3 * 2
    for (name, one), (_, other) in zip(pairs[::2], pairs[1::2], strict=True):
        off = mx.abs(one.astype(mx.float32) - other.astype(mx.float32)).max()
        assert off.item() <= (2**-6 if "block" in name else 1e-6) * mx.abs(one).max().item(), name


def test_the_clock_takes_the_shortest_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 9.0, 10.0, 13.0, 20.0, 22.0, 30.0, 35.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    assert best_of_three("", lambda: mx.array(1)) == 2.0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gpu:
    """A machine whose device is a GPU of this kind, with a cache folder of its own."""
    monkeypatch.setattr(memory, "here", lambda at_once=False: GPU)
    monkeypatch.setattr(layers, "here", lambda at_once=False: GPU)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(memory.CHOICES, raising=False)
    return GPU


def test_choices_are_kept_by_chip_and_version(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.chosen_device() == gpu
    assert "chip's defaults" in memory.choices_told(gpu)
    assert memory.keep_choices({"conv": "matmul", "dense": {"4": 512, "8": None}})
    chosen = memory.chosen_device()
    assert chosen == Gpu(1024, ((4, 512), (8, None)), conv="matmul", compiles=False)
    assert (chosen.is_dequantized(600, 4), chosen.is_dequantized(9999, 8)) == (True, False)
    assert chosen.is_dequantized(2000, 6)
    assert "4-bit weights dequantized from 512 tokens on, 8-bit weights as they are" in memory.choices_told(chosen)
    assert "measured here" in memory.choices_told(chosen)
    monkeypatch.setattr(memory, "version", lambda package: "99.0")
    assert memory.chosen_device() == gpu  # another MLX
    assert memory.keep_choices({"dtype": "float16"})
    assert memory.compute_dtype(None) == mx.float16
    monkeypatch.undo()
    for name in ("float32", "mlx.core.float32", "torch.float32"):
        assert memory.compute_dtype(name) == mx.float32


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "[" * 100_000, '{"KEY": 3}', '{"KEY": {"conv": "winograd"}}', '{"KEY": {"rows": -1}}']
    + ['{"KEY": {"dense": {"7": 8}}}', '{"KEY": {"dense": {"4": true}}}', '{"KEY": {"path": "/etc"}}', "\x00"],
)
def test_a_damaged_file_is_ignored_and_replaced(gpu: Gpu, text: str) -> None:
    path = memory.choices_file()
    assert path is not None
    path.parent.mkdir(parents=True)
    path.write_text(text.replace("KEY", memory.device_key()))
    assert memory.chosen_device() == gpu
    assert memory.keep_choices({"rows": 4096})
    assert memory.chosen_device().rows == 4096
    assert [one.name for one in path.parent.iterdir()] == ["choices.json"]


def test_the_environment_has_the_last_word(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.keep_choices({"rows": 4096})
    monkeypatch.setenv(memory.CHOICES, "default")
    assert memory.chosen_device() == gpu
    monkeypatch.setenv(memory.CHOICES, '{"rows": 2048}')
    assert memory.chosen_device().rows == 2048
    assert memory.CHOICES in memory.choices_told(memory.chosen_device())
    monkeypatch.setenv(memory.CHOICES, '{"rows": "many"}')
    with pytest.raises(RequestError, match=r"\$KLEIN_MLX_CHOICES is .*many.*; it must be"):
        memory.chosen_device()


def test_a_cpu_has_no_choice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory, "here", lambda at_once=False: Cpu(at_once))
    monkeypatch.setenv(memory.CHOICES, "nonsense")
    assert memory.chosen_device() == Cpu(at_once=True)
    monkeypatch.setattr(layers, "here", lambda at_once=False: Cpu(at_once))
    assert cli.main(["bench", "--tune"]) == 2
    assert "--tune is for a GPU" in capsys.readouterr().err


def test_bench_tune_tells_and_keeps(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = FakeClock({"matmul": 0.5})
    monkeypatch.setattr("klein_mlx.bench.measure.tune", lambda device: tune(device, clock, SMALL))
    assert cli.main(["bench", "--tune"]) == 0
    out = capsys.readouterr().out
    assert "chosen: convolutions matmul, matmuls whole" in out
    assert "convolution, direct" in out
    assert memory.chosen_device().conv == "matmul"
    assert cli.main(["bench", "--tune", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["choices"]["conv"], told["kept"]) == ("matmul", True)
    assert told["seconds"]["convolution, matmul"] == 0.5


@pytest.mark.parametrize(
    "choices", [{"dense": {"4": 0}}, {"dense": {"4": None}}, {"rows": 16, "conv": "matmul"}, {"dtype": "float16"}]
)
def test_every_choice_gives_the_same_picture(choices: Any) -> None:
    """tiny at 4 bits, one step in float32: to 1e-5 of the largest latent."""
    found = []
    for device in (Cpu(at_once=True), memory.with_choices(Gpu(compiles=False), choices)):
        pipe = KleinPipeline.from_pretrained("tiny", quantize=4, dtype="float32")
        pipe.parts.device = device
        found.append(pipe("a red circle", seed=1, width=64, height=64, num_inference_steps=1, output_type="np").images)
    assert abs(found[0] - found[1]).max() < 1e-4


def test_the_estimate_knows_the_choice() -> None:
    """Of a single block's weight at 4 bits: dequantized, the largest one is alive."""
    devices = [memory.with_choices(Gpu(), {"dense": {"4": least}}) for least in (None, 4608, 4609)]
    sizes = [step_bytes(klein("4b"), Work(1024, 1024), mx.bfloat16, True, device) for device in devices]
    assert [size - sizes[0] for size in sizes] == [0, 2 * 3072 * (3072 + 2 * 9216), 0]
