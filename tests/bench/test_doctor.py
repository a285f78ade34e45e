"""`klein-mlx doctor`: its checks hold here, each names a fault in what it checks, and the command tells."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from klein_mlx import pipeline
from klein_mlx.bench import capacity, doctor, machine, naive, reference, shapes
from klein_mlx.bench.checks import Row, Setting, error
from klein_mlx.cli.main import main
from klein_mlx.model import layers, rope, transformer, vae
from klein_mlx.model.layers import Cpu
from klein_mlx.runtime import memory

SMALL = Setting(mx.float32, 0.5, gpu=False)  # a slow CPU: the fewest rows
HALF = replace(SMALL, dtype=mx.bfloat16)
BLOCKS = ("double-block", "single-block", "encoder-layer", "decoder-level")


def rows(name: str, setting: Setting = SMALL) -> list[Row]:
    check = next(c for c in doctor.CHECKS if c.name == name)
    return [finding.row for finding in doctor.examine(check, setting)]


def fails(name: str, setting: Setting = SMALL) -> bool:
    found = rows(name, setting)
    assert all(row.name == name for row in found)
    return any(row.holds is False for row in found)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("name", [n for n in shapes.names() if n not in (*BLOCKS, "matmul")])
def test_kernels_hold(name: str, dtype: mx.Dtype) -> None:
    assert not fails(name, replace(SMALL, dtype=dtype))


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_hold(name: str) -> None:
    """In float16 the most ways differ: a wide residual stream, branches that are scaled."""
    assert not fails(name, replace(SMALL, dtype=mx.float16))


def test_memory_holds_and_speed_tells_seconds() -> None:
    assert not fails("memory")
    figures = {key: value for row in rows("speed") for key, value in row.figures.items()}
    assert {"matmul", "attention", "convolution", "bandwidth", "seconds_512", "seconds_1024"} == set(figures)
    assert figures["seconds_1024"] > 2 * figures["seconds_512"] > 0


# ---- a fault in each ----

Fault = Callable[[pytest.MonkeyPatch], None]


def wrong_epsilon(module: Any, name: str, position: int) -> Fault:
    """The function's epsilon ten times as large."""
    original = getattr(module, name)

    def call(*args: Any) -> Any:
        return original(*(10 * a if i == position else a for i, a in enumerate(args)))

    return lambda patch: patch.setattr(module, name, call)


def swapped_attention(patch: pytest.MonkeyPatch) -> None:
    """Queries and keys the wrong way round."""
    original = Cpu.attention
    patch.setattr(Cpu, "attention", lambda self, q, k, v, mask=None: original(self, k, q, v, mask))


def swapped_swiglu(patch: pytest.MonkeyPatch) -> None:
    """Gate and value the wrong way round."""
    original = layers.swiglu.cpu
    patch.setattr(layers.swiglu, "cpu", lambda gate, value: original(value, gate))


def mixed_quarters(weight: mx.array) -> list[list[mx.array]]:
    """Upper and lower rows exchanged."""
    return QUARTERS(weight)[::-1]


QUARTERS = vae._quarters


def transposed(patch: pytest.MonkeyPatch) -> None:
    def turned(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def call(self: Cpu, x: mx.array, weight: mx.array, added: mx.array | None = None) -> mx.array:
            return original(self, x, weight.T if weight.shape[0] == weight.shape[1] else weight[:, ::-1], added)

        return call

    patch.setattr(Cpu, "matmul", turned(Cpu.matmul))
    patch.setattr(Cpu, "linear", turned(Cpu.linear))


def swapped_rotation(patch: pytest.MonkeyPatch) -> None:
    """Sines of the wrong sign."""
    original = rope.rope_tables

    def tables(*args: Any) -> rope.Rope:
        found = original(*args)
        return found._replace(first=found.second, second=found.first)

    patch.setattr(rope, "rope_tables", tables)


def shifted_bits(patch: pytest.MonkeyPatch) -> None:
    original, own = mx.quantized_matmul, mx.dequantize

    def late(call: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def changed(*args: Any, **kwargs: Any) -> mx.array:
            scales = 2 if call is original else 1  # the scales' place among the arguments
            moved = [mx.roll(a, 1, 1) if i == scales else a for i, a in enumerate(args)]
            return call(*moved, **kwargs)

        return changed

    patch.setattr(mx, "quantized_matmul", late(original))
    patch.setattr(layers, "dequantize", lambda arrays, kind: late(own)(*arrays, **kind))


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        pytest.param("matmul", transposed, marks=pytest.mark.slow),
        ("lora", transposed),
        ("gated-sum", transposed),
        ("attention", swapped_attention),
        ("norm-rotation", wrong_epsilon(transformer, "normed_and_rotated", 4)),
        ("norm-rotation", swapped_rotation),
        ("layer-norm", wrong_epsilon(transformer, "modulated", 3)),
        ("swiglu", swapped_swiglu),
        ("quantized", shifted_bits),
        ("dequantized", shifted_bits),
        ("group-norm", lambda patch: patch.setattr(vae, "EPS", 1e-5)),
        pytest.param("single-block", swapped_swiglu, marks=pytest.mark.slow),
        pytest.param("double-block", swapped_swiglu, marks=pytest.mark.slow),
        pytest.param("encoder-layer", swapped_swiglu, marks=pytest.mark.slow),
        ("decoder-level", lambda patch: patch.setattr(vae, "_quarters", mixed_quarters)),
    ],
)
def test_a_fault_is_named(monkeypatch: pytest.MonkeyPatch, name: str, fault: Fault) -> None:
    fault(monkeypatch)
    assert fails(name)


INTO = np.array(
    [
        [1, 0, -21 / 4, 0, 21 / 4, 0, -1, 0],
        [0, 1, 1, -17 / 4, -17 / 4, 1, 1, 0],
        [0, -1, 1, 17 / 4, -17 / 4, -1, 1, 0],
        [0, 1 / 2, 1 / 4, -5 / 2, -5 / 4, 2, 1, 0],
        [0, -1 / 2, 1 / 4, 5 / 2, -5 / 4, -2, 1, 0],
        [0, 2, 4, -5 / 2, -5, 1 / 2, 1, 0],
        [0, -2, 4, 5 / 2, -5, -1 / 2, 1, 0],
        [0, -1, 0, 21 / 4, 0, -21 / 4, 0, 1],
    ]
)
POINTS = np.array([0, 1, -1, 2, -2, 0.5, -0.5])
KERNEL = np.array(
    [
        [1, 0, 0],
        [-2 / 9, -2 / 9, -2 / 9],
        [-2 / 9, 2 / 9, -2 / 9],
        [1 / 90, 1 / 45, 2 / 45],
        [1 / 90, -1 / 45, 2 / 45],
        [32 / 45, 16 / 45, 8 / 45],
        [32 / 45, -16 / 45, 8 / 45],
        [0, 0, 1],
    ]
)
OUT = np.concatenate([POINTS ** np.arange(6)[:, None], [[0]] * 5 + [[1]]], axis=1)


def winograd(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """F(6 x 6, 3 x 3) with every intermediate rounded to x's dtype, as Metal's kernels do it. H, W: multiples of 6."""
    dtype = x.dtype
    _, height, width, channels = x.shape
    padded = mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])

    def both(matrix: np.ndarray, tiles: mx.array) -> mx.array:
        m = mx.array(matrix.astype(np.float32))
        return mx.einsum("ia,jb,...abc->...ijc", m, m, tiles.astype(mx.float32)).astype(dtype)

    tiles = mx.stack(
        [mx.stack([padded[0, r : r + 8, c : c + 8] for c in range(0, width, 6)]) for r in range(0, height, 6)]
    )
    kernels = both(KERNEL, weight)
    products = mx.einsum("rtijc,oijc->rtijo", both(INTO, tiles).astype(mx.float32), kernels.astype(mx.float32))
    out = both(OUT, products.astype(dtype))
    return out.transpose(0, 2, 1, 3, 4).reshape(1, height, width, -1) + bias


def test_winograd_in_bfloat16_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the emulation is a convolution; in bfloat16 it loses several per cent, and the check says so."""
    x, weight, bias = shapes.draw((1, 12, 12, 32)), shapes.draw((32, 3, 3, 32), 0.06), mx.zeros(32)
    truth = naive.convolve(x, weight, bias)
    assert error(winograd(x, weight, bias), truth) < 1e-4
    assert error(winograd(*(a.astype(mx.bfloat16) for a in (x, weight, bias))), truth) > 0.02

    def call(conv: vae.Conv, picture: mx.array) -> mx.array:
        weight = conv.weight[:, ::-1, ::-1] if conv.turned else conv.weight
        side = -(-picture.shape[1] // 6) * 6
        edge = side - picture.shape[1]
        wide = mx.pad(picture, [(0, 0), (0, edge), (0, edge), (0, 0)])
        return winograd(wide, weight, conv.bias)[:, : picture.shape[1], : picture.shape[2]]

    monkeypatch.setattr(vae.Conv, "__call__", call)
    found = rows("convolution", HALF)
    assert [row.holds for row in found] == [False, True, False, True]  # whole; in strips it goes another way
    assert "MLX_CONV_WINOGRAD=0" in found[0].remedy


def test_half_of_an_estimate_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = memory.step_bytes
    monkeypatch.setattr(memory, "step_bytes", lambda *args, **kwargs: original(*args, **kwargs) // 2)
    assert fails("memory")


def test_a_single_wrong_number_is_named() -> None:
    """One of 10,000 numbers wrong by its own size, and a NaN."""
    truth = mx.random.normal((100, 100), key=mx.random.key(0))
    ours = mx.array(truth)
    ours[3, 4] = -ours[3, 4]
    assert error(ours, truth) > 0.05
    ours[3, 4] = mx.nan
    assert error(ours, truth) == float("inf")
    assert error(ours[:50], truth) == float("inf")


def test_what_breaks_off_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> mx.array:
        raise RuntimeError("[metal::load] no kernel\nof this name")

    broken.plain = broken.cpu = broken  # type: ignore[attr-defined]
    monkeypatch.setattr(layers, "swiglu", broken)
    (row,) = rows("swiglu")
    assert row.holds is False
    assert "no kernel of this name" in row.text


# ---- tiny against diffusers ----


def test_tiny_is_what_diffusers_makes() -> None:
    """Float32 to 1e-4, as the golden tests; 4 bits as diffusers with the same weights, dequantized."""
    for bits in (None, 4):
        found, bound = reference.stages(mx.float32, bits), reference.bounds(SMALL, mx.float32, bits)
        assert all(found[stage] <= bound[stage] for stage in reference.STAGES), found


def test_a_wrong_stage_of_tiny_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = pipeline.make_sigmas
    monkeypatch.setattr(pipeline, "make_sigmas", lambda *args: [s**1.01 for s in original(*args)])
    found, bound = reference.stages(mx.float32, None), reference.bounds(SMALL, mx.float32, None)
    beyond = [stage for stage in reference.STAGES if found[stage] > bound[stage]]
    assert beyond == ["latents", "edit", "guidance"]
    row = reference._row("float32", found, bound)
    assert row.holds is False
    assert "latents" in row.text
    assert "velocity" not in row.text


def test_tf32_has_bounds_of_its_own() -> None:
    m5 = replace(SMALL, gpu=True, generation=17)
    for stage in reference.STAGES[1:]:
        assert reference.bounds(m5, mx.float32, None)[stage] > reference.bounds(SMALL, mx.float32, None)[stage]
    assert reference.bounds(m5, mx.float32, 4)["ids"] == 0


def test_the_reference_is_small() -> None:
    assert reference.FILE.stat().st_size < 1_000_000


# ---- the environment ----


def test_old_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version", lambda package="klein-mlx": "0.31.2")
    on_m5 = next(row for row in rows("environment", replace(SMALL, generation=17)) if row.text.startswith("mlx "))
    on_m1 = next(row for row in rows("environment", replace(SMALL, generation=13)) if row.text.startswith("mlx "))
    assert on_m5.holds is on_m1.holds is False
    assert "12288" in on_m5.text
    assert "12288" not in on_m1.text


def test_a_broken_config_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "klein-mlx").mkdir()
    (tmp_path / "klein-mlx" / "config.toml").write_text("[generate]\nsteps = = 4\n")
    (row,) = [row for row in rows("environment") if row.text.startswith("config")]
    assert row.holds is False
    assert row.remedy == "mend config.toml: line 2"


def test_few_bytes_left_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 20}))
    assert [row.holds for row in rows("environment") if row.text.startswith("disk")] == [False, False]


# ---- the command ----


def test_the_command_tells_what_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--only", "swiglu", "--only", "gated-sum", "--dtype", "bfloat16"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "all checks hold" in out
    assert "swiglu" in out
    assert "matmul" not in out


def test_the_command_names_what_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(gate: mx.array, value: mx.array) -> mx.array:
        return value

    wrong.plain = wrong.cpu = wrong  # type: ignore[attr-defined]
    monkeypatch.setattr(layers, "swiglu", wrong)
    assert main(["doctor", "--only", "swiglu", "--json"]) == 2
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["ok"] is False
    assert report["rows"][0]["figures"]["error"] > 0.1
    assert err.startswith("error: swiglu: ")
    assert "upgrade mlx" in err
    assert err.count("\n") == 1


def test_a_report_has_no_names_and_no_paths(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", "/Users/annabelle")
    monkeypatch.setenv("MLX_METAL_JIT", "/Users/annabelle/kernels")
    assert main(["doctor", "--only", "environment", "--report"]) in (0, 2)
    out = capsys.readouterr().out
    assert out.startswith("```\nklein-mlx doctor: ")
    assert "annabelle" not in out
    assert "MLX_METAL_JIT=..." in out
    assert doctor.private("see /Users/annabelle/x: annabelle's, /tmp/y") == "see ... ... ..."


def test_a_name_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--only", "atention"]) == 2
    assert "did you mean attention?" in capsys.readouterr().err


def test_seconds_follow_from_the_rates() -> None:
    """Twice the rates, half of the seconds."""
    cost = capacity.picture_cost(capacity.MEDIUM, 256, 256, 2)
    rates = {"matmul": 1.0, "attention": 1.0, "convolution": 1.0, "bandwidth": 10.0}
    twice = {name: 2 * rate for name, rate in rates.items()}
    assert capacity.picture_seconds(cost, twice) == pytest.approx(capacity.picture_seconds(cost, rates) / 2)
