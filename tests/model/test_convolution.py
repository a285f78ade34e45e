"""The CPU's own way to convolve is MLX's convolution, in less memory."""

from typing import Any

import mlx.core as mx
import pytest

from klein_mlx.model.layers import matmul_policy
from klein_mlx.model.vae_layers import Conv, Downsample, convolve


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape)))


@pytest.mark.parametrize("channels", [3, 32])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_nine_matmuls_are_a_convolution(channels: int, dtype: mx.Dtype) -> None:
    """float32 to rounding; bfloat16 within its one rounding at the end (2^-8 of the largest number)."""
    x, weight, bias = normal(2, 9, 6, channels).astype(dtype), normal(5, 3, 3, channels).astype(dtype), normal(5)
    wanted = mx.conv2d(x.astype(mx.float32), weight.astype(mx.float32), padding=(0, 1)) + bias
    ours = convolve(x, weight, bias.astype(dtype))
    assert ours.dtype == dtype
    bound = 1e-5 if dtype == mx.float32 else 2**-7
    assert mx.abs(ours - wanted).max().item() <= bound * mx.abs(wanted).max().item()


def test_the_policy_decides() -> None:
    conv, x = Conv(32, 8), normal(1, 10, 7, 32)
    with matmul_policy("direct"):
        mlx = conv(x)
    assert mx.allclose(conv(x), mlx, atol=1e-5)


@pytest.mark.parametrize("policy", ["auto", "direct"])
def test_turned_kernels_are_turned_back(policy: str) -> None:
    """Bit for bit: the same products in the same order."""
    conv, x = Conv(32, 8), normal(1, 10, 7, 32).astype(mx.bfloat16)
    conv.set_dtype(mx.bfloat16)
    with matmul_policy(policy):
        plain, strips = conv(x), conv.strips(x, 4)
        mx.eval(plain, strips)
        conv.arrange()
        conv.arrange()  # arranged already, nothing changes
        assert conv.turned
        assert mx.array_equal(conv(x), plain)
        assert mx.array_equal(conv.strips(x, 4), strips)


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
        conv.arrange()
        with matmul_policy("direct"):
            mx.eval(conv(x), conv.strips(x, 4))
    assert asked == [True] * 4 + [False] * 4


@pytest.mark.parametrize("rows", [1, 3, 4, 100])
def test_halving_in_strips(rows: int) -> None:
    down, x = Downsample(8), normal(2, 16, 12, 8)
    whole = down(x)
    assert whole.shape == (2, 8, 6, 8)
    assert mx.allclose(down(x, rows), whole, atol=1e-5)


def test_memory_of_a_convolution() -> None:
    """What MLX's takes on a CPU is nine times the picture; this is the picture shifted, and the result twice."""
    x, weight, bias = normal(1, 130, 128, 64), normal(64, 3, 3, 64), normal(64)
    mx.eval(x, weight, bias)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(convolve(x, weight, bias))
    assert mx.get_peak_memory() - before < 5 * x.nbytes
