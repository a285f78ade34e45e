"""Linear layers: every way of computing one gives the same numbers."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from klein_mlx.linear import linear, linear_added, linear_joined, linear_split, matmul_policy


def layer(kind: str, dtype: mx.Dtype) -> nn.Module:
    mx.random.seed(0)
    plain = nn.Linear(128, 192, bias=kind == "bias")
    plain.set_dtype(dtype)
    if kind in ("plain", "bias"):
        return plain
    return nn.QuantizedLinear.from_linear(plain, group_size=64, bits=int(kind))


def exact(module: nn.Module, x: mx.array) -> mx.array:
    """The layer in float32."""
    weight, bias = module["weight"], module.get("bias", mx.array(0.0))
    if isinstance(module, nn.QuantizedLinear):
        scales = (module[name].astype(mx.float32) for name in ("scales", "biases"))
        weight = mx.dequantize(weight, *scales, group_size=module.group_size, bits=module.bits)
    return x.astype(mx.float32) @ weight.astype(mx.float32).T + bias.astype(mx.float32)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("policy", ["auto", "direct", "expand"])
@pytest.mark.parametrize("kind", ["plain", "bias", "4", "8"])
def test_all_ways_agree(kind: str, policy: str, dtype: mx.Dtype) -> None:
    """With float32 arithmetic on the same weights: in float32 to 1e-5, in bfloat16 to two roundings of values up to 2.

    MLX's quantised matmul on a CPU adds up in bfloat16 itself: 128 terms, an error of several roundings.
    """
    module, x = layer(kind, dtype), mx.random.normal((2, 7, 128), key=mx.random.key(1)).astype(dtype)
    wanted = exact(module, x)
    tolerance = 1e-5 if dtype == mx.float32 else 0.1 if kind in "48" and policy == "direct" else 2 * 2**-7
    with matmul_policy(policy):
        out = linear(module, x)
        first, second = linear_split(module, x, 64)
        joined = linear_joined(module, x[..., :64], x[..., 64:])
        added = linear_added(module, x, wanted.astype(dtype))
    assert out.dtype == added.dtype == joined.dtype == dtype
    assert mx.allclose(out, wanted, atol=tolerance)
    assert mx.allclose(mx.concatenate([first, second], axis=-1), wanted, atol=tolerance)
    assert mx.allclose(joined, wanted, atol=tolerance)
    assert mx.allclose(added, wanted + wanted, atol=2 * tolerance)


def test_a_module_of_another_kind_is_called() -> None:
    """A layer with something beside it (a LoRA branch) decides for itself."""

    class Doubled(nn.Linear):
        def __call__(self, x: mx.array) -> mx.array:
            return 2 * super().__call__(x)

    module, x = Doubled(128, 192, bias=False), mx.random.normal((3, 128))
    wanted = 2 * (x @ module.weight.T)
    assert mx.allclose(linear(module, x), wanted, atol=1e-5)
    assert mx.allclose(linear_split(module, x, 64)[1], wanted[:, 64:], atol=1e-5)
    assert mx.allclose(linear_joined(module, x[:, :64], x[:, 64:]), wanted, atol=1e-5)
    assert mx.allclose(linear_added(module, x, x[:, :1]), wanted + x[:, :1], atol=1e-5)


def test_the_policy_ends_with_its_block() -> None:
    with (
        pytest.raises(ValueError, match="policy is 'fast'; it must be one of auto, direct, expand"),
        matmul_policy("fast"),
    ):
        pass
    with pytest.raises(ZeroDivisionError), matmul_policy("direct"):
        raise ZeroDivisionError
    from klein_mlx import linear as module

    assert module._policy.get() == "auto"
