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
from klein_mlx.model import layers, transformer, vae
from klein_mlx.model.branched import Branched
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
    original = transformer.rope_tables

    def tables(*args: Any) -> transformer.Rope:
        found = original(*args)
        return found._replace(first=found.second, second=found.first)

    patch.setattr(transformer, "rope_tables", tables)


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


def other_arguments(where: Any, name: str, change: Callable[..., tuple[Any, ...]]) -> Fault:
    """The function called with what `change` makes of its arguments."""
    original = getattr(where, name)
    return lambda patch: patch.setattr(where, name, lambda *args: original(*change(*args)))


def without_bias(patch: pytest.MonkeyPatch) -> None:
    """Neither convolutions nor linear layers add one."""
    rows, linear = vae.CONVOLUTIONS["rows"], Cpu.linear
    patch.setitem(vae.CONVOLUTIONS, "rows", lambda x, weight, bias, *rest: rows(x, weight, 0 * bias, *rest))
    patch.setattr(Cpu, "linear", lambda self, x, weight, added=None: linear(self, x, weight))


def other_groups(patch: pytest.MonkeyPatch) -> None:
    """Twice as many, half as wide."""
    original = vae.GroupNorm.affine

    def affine(self: vae.GroupNorm, *args: Any) -> Any:
        more = vae.GroupNorm(2 * self.groups, self.weight.size)
        more.weight, more.bias = self.weight, self.bias
        return original(more, *args)

    patch.setattr(vae.GroupNorm, "affine", affine)


def without_branch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Branched, "__call__", lambda self, x: self.base(x))


# Of queries, keys and values, (batch, heads, tokens, channels).
wrong_scale = other_arguments(Cpu, "attention", lambda self, q, k, v, *mask: (self, 1.2 * q, k, v, *mask))
other_heads = other_arguments(Cpu, "attention", lambda self, q, k, v, *m: (self, q, k, mx.roll(v, 1, axis=1), *m))
without_mask = other_arguments(Cpu, "attention", lambda self, q, k, v, *mask: (self, q, k, v))
wrong_theta = other_arguments(
    transformer, "rope_tables", lambda ids, axes, theta, length: (ids, axes, 5 * theta, length)
)
swapped_shift = other_arguments(transformer, "modulated", lambda x, shift, scale, *rest: (x, scale, shift, *rest))
without_gate = other_arguments(transformer, "add_branch", lambda x, gate, *rest: (x, mx.ones_like(gate), *rest))

FAULTS: list[Any] = [
    pytest.param("matmul", transposed, marks=pytest.mark.slow),
    ("lora", transposed),
    ("lora", without_branch),
    ("gated-sum", transposed),
    ("gated-sum", without_gate),
    ("attention", swapped_attention),
    ("attention", wrong_scale),
    ("attention", other_heads),
    ("norm-rotation", wrong_epsilon(transformer, "normed_and_rotated", 4)),
    ("norm-rotation", swapped_rotation),
    ("norm-rotation", wrong_theta),
    ("layer-norm", wrong_epsilon(transformer, "modulated", 3)),
    ("layer-norm", swapped_shift),
    ("swiglu", swapped_swiglu),
    ("quantized", shifted_bits),
    ("dequantized", shifted_bits),
    ("group-norm", lambda patch: patch.setattr(vae, "EPS", 1e-5)),
    ("group-norm", other_groups),
    ("convolution", without_bias),
    ("convolution", lambda patch: patch.setattr(vae, "SAME", ((1, 1), (2, 0)))),
    pytest.param("single-block", swapped_swiglu, marks=pytest.mark.slow),
    pytest.param("double-block", swapped_swiglu, marks=pytest.mark.slow),
    pytest.param("encoder-layer", swapped_swiglu, marks=pytest.mark.slow),
    ("encoder-layer", other_heads),
    pytest.param("encoder-layer", without_mask, marks=pytest.mark.slow),
    ("decoder-level", lambda patch: patch.setattr(vae, "_quarters", mixed_quarters)),
    ("decoder-level", without_bias),
]


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_a_fault_is_named(monkeypatch: pytest.MonkeyPatch, name: str, fault: Fault) -> None:
    fault(monkeypatch)
    assert fails(name)


def test_every_kernel_has_a_fault() -> None:
    """The others' are below: versions, a stage of tiny, an estimate, a rate."""
    assert {getattr(fault, "values", fault)[0] for fault in FAULTS} == set(shapes.names())
    assert {check.name for check in doctor.CHECKS} - set(shapes.names()) == {
        *("environment", "reference", "memory", "speed")
    }


def test_both_ways_of_convolving_are_checked_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU emulated by this CPU; a fault in one of them is named with it."""
    monkeypatch.setattr(layers, "device_of", lambda *_: layers.Gpu(compiles=False))
    gpu = replace(HALF, gpu=True)
    assert [row.holds for row in rows("convolution", gpu)] == [True] * 8
    right = vae.CONVOLUTIONS["matmul"]
    monkeypatch.setitem(vae.CONVOLUTIONS, "matmul", lambda *args: 0 * right(*args))
    assert {row.text.split(", ")[2] for row in rows("convolution", gpu) if not row.holds} == {"matmul"}


# ---- speed ----


@pytest.fixture
def rated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, bool | None]]:
    """What holds of each rate, by a chip's name and the rates; the seconds are a small model's."""
    small = capacity.picture_cost(capacity.MEDIUM, 64, 64, 1)
    monkeypatch.setattr(capacity, "picture_cost", lambda *_, **__: small)

    def run(chip: str, setting: Setting, rates: dict[str, float]) -> dict[str, bool | None]:
        monkeypatch.setattr(capacity, "device_name", lambda: chip)
        monkeypatch.setattr(capacity, "measure", lambda _: {name: (rate, "") for name, rate in rates.items()})
        found = rows("speed", setting)
        assert all(row.remedy for row in found if row.holds is False)
        return {name: row.holds for row in found for name in row.figures if name in rates}

    return run


# What the slowest sound case reaches: an M1 Max with 24 of its 32 cores, in bfloat16.
M1_MAX = {"matmul": 3.5, "attention": 3.0, "convolution": 2.5, "bandwidth": 300.0}


@pytest.mark.parametrize("name", [None, *M1_MAX])
def test_a_rate_that_no_chip_has_is_named(name: str | None, rated: Callable[..., dict[str, bool | None]]) -> None:
    """A tenth of it: a kernel in software, another program on the GPU."""
    gpu = replace(HALF, gpu=True, gigaflops=1000.0)
    rates = M1_MAX | ({name: M1_MAX[name] / 10} if name else {})
    assert rated("Apple M1 Max", gpu, rates) == {key: key != name for key in M1_MAX}


def test_a_gpu_that_nobody_knows_is_measured_by_its_cpu(rated: Callable[..., dict[str, bool | None]]) -> None:
    gpu = replace(HALF, gpu=True, gigaflops=1000.0)
    assert rated("Apple M9", gpu, M1_MAX)["matmul"] is True
    assert rated("llvmpipe", gpu, M1_MAX | {"matmul": 0.05})["matmul"] is False


@pytest.mark.parametrize(("system", "rate", "holds"), [("linux", 0.002, True), ("linux", 2e-4, False)])
def test_a_debug_build_is_named(
    system: str, rate: float, holds: bool, rated: Callable[..., dict[str, bool | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity.sys, "platform", system)
    assert rated("x86_64 CPU (Linux)", SMALL, M1_MAX | {"matmul": rate}) == {
        **dict.fromkeys(M1_MAX),
        "matmul": holds,
    }


def test_a_mac_that_computes_on_its_cpu_is_named(
    rated: Callable[..., dict[str, bool | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity.sys, "platform", "darwin")
    assert rated("arm CPU (Darwin)", SMALL, M1_MAX)["matmul"] is False


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
    monkeypatch.setattr(layers, "swiglu", None)  # as a name that another MLX does not have
    assert [row.holds for row in rows("swiglu")] == [False]


# ---- tiny against diffusers ----


def test_tiny_is_what_diffusers_makes() -> None:
    """Float32 to 1e-4, as the golden tests; 4 bits as diffusers with the same weights, dequantized."""
    for bits in (None, 4):
        found, bound = reference.stages(mx.float32, bits), reference.bounds(SMALL, mx.float32, bits)
        assert all(found[stage] <= bound[stage] for stage in reference.STAGES), found


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("bits", [None, 4])
def test_sixteen_bits_are_well_within_their_bounds(dtype: mx.Dtype, bits: int | None) -> None:
    """A device that rounds elsewhere shows other errors, up to some times as large."""
    found, bound = reference.stages(dtype, bits), reference.bounds(SMALL, dtype, bits)
    assert all(found[stage] <= 0.4 * bound[stage] for stage in reference.STAGES), found


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
    assert doctor.private("Error: '/opt/x y', 300 GB/s, ~/z") == "Error: '... y', 300 GB/s, ..."
    monkeypatch.setenv("HOME", "/Users/anna belle")
    assert doctor.private("no /Users/anna belle/x") == "no ..."
    monkeypatch.setenv("USER", "zoe")
    assert doctor.private("held by zoe") == "held by ..."


@pytest.mark.parametrize("name", [check.name for check in doctor.CHECKS])
def test_every_check_runs_alone(name: str) -> None:
    assert [check.name for check in doctor.chosen([name])] == [name]


def test_a_name_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--only", "atention"]) == 2
    assert "did you mean attention?" in capsys.readouterr().err


def test_seconds_follow_from_the_rates() -> None:
    """Twice the rates, half of the seconds."""
    cost = capacity.picture_cost(capacity.MEDIUM, 256, 256, 2)
    rates = {"matmul": 1.0, "attention": 1.0, "convolution": 1.0, "bandwidth": 10.0}
    twice = {name: 2 * rate for name, rate in rates.items()}
    assert capacity.picture_seconds(cost, twice) == pytest.approx(capacity.picture_seconds(cost, rates) / 2)
