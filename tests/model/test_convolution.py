"""The CPU's own way to convolve is MLX's convolution, in less memory."""

from typing import Any

import mlx.core as mx
import pytest

from klein_mlx.bench.cost import trace
from klein_mlx.model.layers import Cpu, Gpu, place
from klein_mlx.model.vae import SAME, Conv, Downsample, Pace, convolve_by_rows

DEVICES = [Cpu(), Gpu(), Gpu(conv="matmul")]


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape)))


def convolution(device: Any, channels: int, dtype: mx.Dtype, outputs: int = 5) -> Conv:
    conv = Conv(channels, outputs)
    conv.weight, conv.bias = normal(outputs, 3, 3, channels), normal(outputs)
    conv.set_dtype(dtype)
    place(conv, device)
    return conv


def twice(x: mx.array) -> mx.array:
    """Each pixel four times."""
    return mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2)


def exact(conv: Conv, x: mx.array) -> mx.array:
    """By MLX's, in float32."""
    wide = (a.astype(mx.float32) for a in (x, conv.weight))
    return mx.conv2d(*wide, padding=1) + conv.bias.astype(mx.float32)


@pytest.mark.parametrize("channels", [3, 32])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_every_device_convolves(channels: int, dtype: mx.Dtype, device: Any) -> None:
    """float32 to rounding; bfloat16 within its roundings at the end (2^-8 of the largest number each). In strips as in
    one piece, whatever they leave over, and with kernels that are stored turned round."""
    conv, x = convolution(device, channels, dtype), normal(2, 9, 6, channels).astype(dtype)
    wanted = exact(conv, x)
    bound = (1e-5 if dtype == mx.float32 else 2**-7) * mx.abs(wanted).max().item()
    for _ in range(2):
        for ours in (conv(x), *(conv.strips(x, rows) for rows in (1, 2, 4, 9))):
            assert ours.dtype == dtype
            assert mx.abs(ours - wanted).max().item() <= bound
        conv.arrange()
    assert conv.turned == (dtype == mx.bfloat16)


@pytest.mark.parametrize("device", DEVICES)
def test_enlarging_is_a_convolution_of_the_doubled_picture(device: Any) -> None:
    """In float32 to 1e-5, in strips of any height too."""
    conv, x = convolution(device, 32, mx.float32), normal(2, 7, 6, 32)
    wanted = exact(conv, twice(x))
    for rows in (None, 1, 2, 5, 6, 14, 100):
        assert mx.abs(conv.enlarge(x, rows) - wanted).max() <= 1e-5 * mx.abs(wanted).max()


@pytest.mark.parametrize("device", DEVICES)
def test_enlarging_in_bfloat16(device: Any) -> None:
    """The kernels' sums are rounded once more: no more than half as much again as the error of the doubled picture."""
    conv, x = convolution(device, 64, mx.bfloat16, 64), normal(1, 16, 16, 64).astype(mx.bfloat16)
    wanted = exact(conv, twice(x))
    conv.arrange()
    ours, before = (mx.linalg.norm(out - wanted).item() for out in (conv.enlarge(x), conv(twice(x))))
    assert ours <= 1.5 * before


def test_enlarging_takes_less_work_and_copies_nothing() -> None:
    for device in (Gpu(), Gpu(conv="matmul")):
        conv = convolution(device, 32, mx.bfloat16, 64)
        cost = trace(conv, conv.enlarge, mx.zeros((1, 40, 30, 32), mx.bfloat16))
        assert cost.flops == 2 * 80 * 60 * 64 * 4 * 32
        assert not cost.copies


def test_a_convolution_as_one_matmul_unfolds_nothing() -> None:
    """One matmul of the whole sum, of rows that overlap: no copies. Alive are the picture with a border, three shifted
    ones, and the result; moved beside the matmul are those, written and read once."""
    conv = convolution(Gpu(conv="matmul"), 32, mx.bfloat16, 32)
    x = mx.zeros((1, 40, 30, 32), mx.bfloat16)
    cost = trace(conv, conv, x)
    assert cost.counts["AddMM"] == 1
    assert not {"Matmul", "Convolution"} & cost.counts.keys()
    assert cost.flops == 2 * 40 * 30 * 32 * 9 * 32
    assert not cost.copies
    border = 42 * 32 / (40 * 30)
    assert cost.live <= (1 + 3) * border * x.nbytes + conv.weight.nbytes
    assert cost.traffic <= (2 + 6) * border * x.nbytes + 2 * conv.weight.nbytes


def test_pieces_are_started_before_the_last_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """In strips nothing is waited for that was only just started, and never are more than two under way."""
    started: list[int] = []
    waits: list[int] = []
    start, wait = mx.async_eval, mx.eval

    def noted_start(*arrays: mx.array) -> None:
        started.append(len(started))
        start(*arrays)

    def noted_wait(*arrays: mx.array) -> None:
        waits.append(len(started))
        wait(*arrays)

    monkeypatch.setattr(mx, "async_eval", noted_start)
    monkeypatch.setattr(mx, "eval", noted_wait)
    pace = Pace()
    for _ in range(5):
        pace(mx.ones((2,)) + 1)
    assert waits == [2, 3, 4, 5]
    waits.clear()
    started.clear()
    conv = convolution(Gpu(), 16, mx.float32)
    conv.strips(normal(1, 12, 6, 16), 3)
    assert (len(started), waits) == (4, [2, 3, 4])


def test_a_gpu_never_takes_half_precision_by_winograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metal takes a convolution that is asked for with `flip` another way; float32 may stay as it is."""
    asked, real = [], mx.conv_general

    def conv_general(*args: Any, **kwargs: Any) -> mx.array:
        asked.append(kwargs["flip"])
        return real(*args, **kwargs)

    monkeypatch.setattr(mx, "conv_general", conv_general)
    for dtype in (mx.bfloat16, mx.float32):
        conv, x = Conv(32, 8), normal(1, 10, 7, 32).astype(dtype)
        conv.set_dtype(dtype)
        place(conv, Gpu())
        conv.arrange()
        mx.eval(conv(x), conv.strips(x, 4))
    assert asked == [True] * 4 + [False] * 4


@pytest.mark.parametrize("rows", [1, 3, 4, 100])
def test_halving_in_strips(rows: int) -> None:
    down, x = Downsample(8), normal(2, 16, 12, 8)
    whole = down(x)
    assert whole.shape == (2, 8, 6, 8)
    assert mx.allclose(down(x, rows), whole, atol=1e-5)


def test_memory_of_a_convolution() -> None:
    """MLX's takes nine times the picture on a CPU; this is the picture with a border, shifted, and the result twice."""
    x, weight, bias = normal(1, 128, 128, 64), normal(64, 3, 3, 64), normal(64)
    mx.eval(x, weight, bias)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(convolve_by_rows(x, weight, bias, SAME))
    assert mx.get_peak_memory() - before < 5.2 * x.nbytes
