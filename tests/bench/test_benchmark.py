"""`bench`: every phase measured, a last line that a program can read, predictions that agree with published times."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pair
import pytest

from klein_mlx.bench.cost import Kernel
from klein_mlx.bench.measure import Phases, limit, peak_rss, reset_peak_rss
from klein_mlx.bench.predict import (
    APPLE,
    CHIPS,
    EFFICIENCY,
    PictureCost,
    find_chip,
    klein,
    named_chip,
    picture_cost,
    predict,
    seconds,
)
from klein_mlx.cli import main as cli
from klein_mlx.errors import RequestError
from klein_mlx.weights.quantize import QUANTIZED_PARTS, Quantization


def bench(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[str, dict[str, Any]]:
    """(the table, the JSON object of --json)."""
    assert cli.main(["bench", *options]) == 0
    table = capsys.readouterr().out
    assert cli.main(["bench", *options, "--json"]) == 0
    return table, json.loads(capsys.readouterr().out)


def chip(name: str) -> Any:
    return named_chip(name)


@pytest.fixture(scope="module")
def cost() -> PictureCost:
    return picture_cost(klein("4b"), 1024, 1024, 4)


def test_every_phase_of_a_warm_run(capsys: pytest.CaptureFixture[str]) -> None:
    table, report = bench(capsys, "--model", "tiny", "--runs", "2", "--steps", "2", "--size", "64x96")
    phases = ["import", "encode", "step 1", "step 2", "decode", "save", "total"]
    assert list(report["seconds"]) == phases  # everything is loaded by the picture that is not counted
    assert all(phase in table for phase in phases)
    for spread in report["seconds"].values():
        assert 0 <= spread["min"] <= spread["median"] <= spread["max"]
    assert (report["width"], report["height"], report["tokens"]) == (64, 96, {"text": 48, "image": 24})
    worked = phases[1:-2]
    assert all(report["peak_memory"][phase] > 0 for phase in worked)
    assert all(report["peak_rss"][phase] > 1e7 for phase in worked)
    assert report["pictures_per_minute"] == pytest.approx(60 / report["seconds"]["total"]["median"], rel=0.01)
    assert set(report["share_of_limit"]) == {"encode", "step", "decode"}
    assert report["limit"]["tflops"] > 0
    assert report["predicted"] is False
    assert report["mode"] == "warm"


@pytest.mark.slow
def test_a_cold_run_loads_for_every_picture(capsys: pytest.CaptureFixture[str]) -> None:
    _, report = bench(capsys, "--model", "tiny", "--runs", "2", "--steps", "1", "--cold")
    assert list(report["seconds"]) == ["import", "load", "encode", "step 1", "decode", "save", "total"]
    assert report["seconds"]["import"]["min"] > 0.01, "no Python imports MLX and numpy faster"
    assert report["seconds"]["load"]["min"] > 0
    assert report["mode"] == "cold"


def test_a_phase_inside_of_another_counts_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 5.0, 5.5])  # encode begins, load begins, load ends, encode ends
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    phases = Phases()
    with phases.watch("encode"), phases.watch("load"):
        mx.eval(mx.zeros((1 << 22,)))
    assert phases.seconds == {"load": 4.0, "encode": 1.5}
    assert phases.memory["load"] >= phases.memory["encode"] + (1 << 23)  # its 16 MB were gone when encode went on


def test_the_peak_of_a_phase_is_not_the_one_before_it() -> None:
    phases = Phases()
    with phases.watch("large"):
        mx.eval(mx.zeros((1 << 22,)))
    with phases.watch("small"):
        mx.eval(mx.zeros((1 << 10,)))
    assert phases.memory["large"] >= phases.memory["small"] + (1 << 23)


def test_peak_rss_sees_memory_come_and_go() -> None:
    resets = reset_peak_rss()
    before = peak_rss()
    block = b"x" * (1 << 26)
    assert peak_rss() >= before + (1 << 25) * resets  # else what came before may have been more
    del block
    if resets:
        assert reset_peak_rss()
        assert peak_rss() < before + (1 << 25)


def test_the_limit_here_is_measured() -> None:
    tflops, source = limit(mx.float32)
    assert tflops > 1e-5
    assert "measured" in source


def test_chips() -> None:
    """A family's members have about the same peak per core; bandwidth and peak grow from one to the next."""
    assert len({c.name for c in CHIPS}) == len(CHIPS)
    for generation in range(1, 6):
        family = [c for c in CHIPS if c.generation == generation]
        assert [c.cores for c in family] == sorted(c.cores for c in family)
        assert [c.bandwidth for c in family] == sorted(c.bandwidth for c in family)
        per_core = [c.tflops / c.cores for c in family]
        assert max(per_core) <= 1.16 * min(per_core)  # M3 and M3 Pro clock higher than M3 Max, as listed
    assert all(c.source for c in CHIPS)
    assert {c.generation for c in CHIPS if c.source == APPLE} == {1, 2}
    assert find_chip("Apple M3 Max") == find_chip("m3  max") == chip("M3 Max")
    assert find_chip("Apple M99") is None
    with pytest.raises(RequestError, match="'M3 Mini'; it must be one of M1, M1 Pro"):
        named_chip("M3 Mini")


def test_the_counts_of_a_picture(cost: PictureCost) -> None:
    """FLOPs as by arithmetic: 2.85 for the encoder, 34.66 a step, 8.94 for the decoder, 150.5 in all."""
    assert cost.step.flops == pytest.approx(34.66e12, rel=0.005)
    assert cost.encode.flops == pytest.approx(2.85e12, rel=0.025)
    assert cost.flops == pytest.approx(150.5e12, rel=0.005)
    assert picture_cost(klein("9b"), 512, 512, 4).step.flops > 2 * picture_cost(klein("4b"), 512, 512, 4).step.flops


@pytest.mark.parametrize(
    ("name", "fastest", "slowest"),
    [
        ("M3 Max", 0.95 * 14.2, 19.0),  # Draw Things; flux2.c
        ("M4 Pro", 0.9 * 27.0, 27.0),  # mflux, which does the same arithmetic and moves more
        ("M2 Pro", 0.9 * 44.0, 47.0),  # mflux
    ],
)
def test_predictions_lie_among_published_times(cost: PictureCost, name: str, fastest: float, slowest: float) -> None:
    """Seconds of a 1024 x 1024 picture in 4 steps of klein 4B."""
    found = predict(cost, chip(name))
    assert fastest <= found.picture <= slowest
    assert found.floor < found.fastest < found.picture < found.slowest
    assert found.picture == pytest.approx(found.encode + 4 * found.step + found.decode)


def test_mflux_by_the_same_model_takes_its_published_time(cost: PictureCost) -> None:
    """What the efficiencies are fitted to: mflux's counted steps, and its decoder's 130 GB, on two Macs."""

    def mflux(name: str, kernels: int, traffic: float) -> float:
        likely = EFFICIENCY[chip(name).generation][1]
        moved = [Kernel("Add", 0, round(traffic / kernels))] * kernels
        step = seconds([Kernel("Matmul", cost.step.flops, 0), *moved], chip(name), likely)
        decode = [Kernel("Convolution", cost.decode.flops, 0), Kernel("Add", 0, 130 * 10**9)]
        return 4 * step + seconds([*decode, Kernel("Matmul", cost.encode.flops, 0)], chip(name), likely)

    assert mflux("M4 Pro", 962, 53.8e9) == pytest.approx(27.0, rel=0.05)
    assert 44 <= mflux("M2 Pro", 1418, 84.3e9) <= 47


def test_an_m5_convolves_without_its_matrix_units(cost: PictureCost) -> None:
    """mflux measures 0.75 to 0.9 s for a decoder of this kind on an M5 Max; by the matrix units it would be 0.3 s."""
    m5, m4 = chip("M5 Max"), chip("M4 Max")
    assert 0.6 < predict(cost, m5).decode < 0.9
    assert predict(cost, m5).decode > predict(cost, m4).decode / 2
    as_matmuls = [Kernel("Matmul", k.flops, k.moved) if k.name == "Convolution" else k for k in cost.decode.kernels]
    assert seconds(as_matmuls, m5, EFFICIENCY[5][1]) < predict(cost, m5).decode / 2


def test_a_chip_is_predicted_with_its_own_choices(cost: PictureCost) -> None:
    """An M5's convolutions are matmuls; an M4 dequantizes 4-bit weights but for the text stream's 512 tokens."""
    m5, m4 = chip("M5 Max"), chip("M4 Max")
    own = picture_cost(klein("4b"), 1024, 1024, 4, device=m5.device)
    assert own.decode.counts["Convolution"] < cost.decode.counts["Convolution"] / 10
    assert own.step.flops == cost.step.flops
    assert predict(own, m5).decode < 0.6 * predict(cost, m5).decode
    bits = dict.fromkeys(QUANTIZED_PARTS, Quantization(4))
    packed = picture_cost(klein("4b"), 1024, 1024, 4, quantization=bits, device=m4.device)
    assert packed.step.counts["QuantizedMatmul"] == 5 * 5
    assert packed.step.counts["dequantize"] >= 100
    assert packed.encode.counts["dequantize"] == 0


def test_a_launch_takes_microseconds() -> None:
    """A thousand kernels that do nothing: 3 to 8 ms. A step of 344 is not to be told as waiting for its launches."""
    assert 3e-3 <= seconds([Kernel("Add", 0, 0)] * 1000, chip("M3 Max"), 1.0) <= 8e-3


def test_predictions_are_monotone(cost: PictureCost) -> None:
    for generation in range(1, 6):
        times = [predict(cost, c).picture for c in CHIPS if c.generation == generation]
        assert times == sorted(times, reverse=True)
    m3 = chip("M3 Max")
    quantised = picture_cost(klein("4b"), 1024, 1024, 4, quantization=dict.fromkeys(QUANTIZED_PARTS, Quantization(4)))
    assert predict(cost, m3).picture < predict(quantised, m3).picture < 1.2 * predict(cost, m3).picture
    assert predict(picture_cost(klein("4b"), 512, 512, 4), m3).picture < predict(cost, m3).picture / 3
    guided = picture_cost(klein("4b"), 1024, 1024, 4, passes=2)
    assert guided.step.flops == 2 * cost.step.flops
    m1, half = chip("M1"), mx.float16
    assert predict(cost, m1, half).picture < predict(cost, m1).picture  # no native bfloat16 there
    assert predict(cost, m3, half).picture == predict(cost, m3).picture


def test_one_step_is_predicted_as_it_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    """512 x 512, 232 text tokens, one step: 11.6 TFLOP, by arithmetic; a third of four steps with 512 text tokens."""
    _, report = bench(capsys, "--predict", "M3 Max", "--model", "4b-1step")
    assert (report["model"], report["width"], report["height"], report["steps"]) == ("4b-1step", 512, 512, 1)
    assert sum(report["tflop"].values()) == pytest.approx(11.56, rel=0.02)
    _, four = bench(capsys, "--predict", "M3 Max", "--size", "512x512")
    assert report["chips"]["M3 Max"]["picture"] < four["chips"]["M3 Max"]["picture"] / 3


def test_predict_prints_every_chip_and_says_that_it_predicts(capsys: pytest.CaptureFixture[str]) -> None:
    table, report = bench(capsys, "--predict")
    assert "Predicted, not measured" in table
    assert report["predicted"] is True
    assert list(report["chips"]) == [c.name for c in CHIPS]
    assert report["model"] == "4b"
    assert (report["width"], report["steps"]) == (1024, 4)
    _, base = bench(capsys, "--predict", "m3 max", "--model", "base-4b", "--size", "512x512", "--quantize", "8")
    assert list(base["chips"]) == ["M3 Max"]
    assert (base["steps"], base["height"]) == (50, 512)
    assert base["bits"] == {"transformer": 8, "text_encoder": 8}
    _, tiny = bench(capsys, "--predict", "M1", "--model", "tiny")
    assert (tiny["model"], tiny["width"]) == ("tiny", 128)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--runs", "0"], "--runs is 0; it must be 1 to 1000"),
        (["--size", "64"], "--size is '64'; it must be WIDTHxHEIGHT (1024x768)"),
        (["--size", "64x65"], "--height is 65; it must be a multiple of 16: 64 or 80"),
        (["--predict", "M3 Mini"], "--predict is 'M3 Mini'; it must be one of"),
    ],
)
def test_errors_are_one_line(options: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--model", "tiny", *options]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert line in told[0]


def stub(folder: Path, answers: list[str]) -> str:
    """A Python that has a program: it answers the protocol with given lines."""
    script = folder / "python"
    body = [f"#!{sys.executable}", "import sys", 'print(\'{"version": "0"}\', flush=True)']
    body += [f"for answer in {answers!r}:", "    sys.stdin.readline()", "    print(answer, flush=True)"]
    script.write_text("\n".join([*body, "sys.exit('Traceback ...\\nValueError: no such weights')"]))
    script.chmod(0o755)
    return str(script)


def test_programs_are_measured_in_turn(tmp_path: Path) -> None:
    """The protocol alone: others' programs are too large for a test. The first picture of each does not count."""
    programs = []
    for name, factor in (("klein_mlx", 1.0), ("mflux", 2.0)):
        (tmp_path / name).mkdir()
        lines = [{phase: factor * n for phase in pair.PHASES} for n in (9.0, 1.0, 2.0)]
        programs.append(pair.Program(stub(tmp_path / name, [json.dumps(one) for one in lines]), {"program": name}))
    found = pair.compare(programs, {"width": 64}, 2)
    assert found["klein_mlx"]["all"] == {"min": 3.0, "median": 4.5, "max": 6.0}
    assert found["mflux"]["ratio"] == dict.fromkeys((*pair.PHASES, "all"), 0.5)
    assert "mflux       all           6.00     9.00    12.00            0.50" in pair.table(found)
    with pytest.raises(RuntimeError, match="mflux cannot run this: ValueError: no such weights"):
        programs[1].picture({})
    for program in programs:
        program.close()


def test_a_program_that_is_missing_is_named() -> None:
    """Its process runs where klein_mlx is not installed."""
    asked = {"program": "mflux", "model": "x", "dtype": "float32"}
    done = subprocess.run(
        [sys.executable, "-I", pair.__file__, "--serve", json.dumps(asked)], capture_output=True, text=True
    )
    assert done.stderr.strip().splitlines()[-1] == "ModuleNotFoundError: No module named 'mflux'"
