"""Elementwise chains as one kernel, where the device can compile them."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import mlx.core as mx

P = ParamSpec("P")


def fused(function: Callable[P, mx.array]) -> Callable[P, mx.array]:
    """Compile a chain of elementwise operations on a GPU; on a CPU, where MLX would call a C++ compiler, run it as is.

    Inside a larger mx.compile it dissolves into that.
    """
    compiled = mx.compile(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> mx.array:
        on_gpu = mx.default_device().type == mx.DeviceType.gpu
        return (compiled if on_gpu else function)(*args, **kwargs)

    call.__dict__["is_fused"] = True
    return call


def is_fused(value: object) -> bool:
    """Whether it is a function made by `fused`: one kernel on a GPU."""
    return getattr(value, "is_fused", None) is True


@fused
def swiglu(gate: mx.array, value: mx.array) -> mx.array:
    """silu(gate) * value."""
    return gate * mx.sigmoid(gate) * value


@fused
def gated_sum(x: mx.array, gate: mx.array, branch: mx.array) -> mx.array:
    """x + gate * branch, in the dtype of x."""
    return x + gate * branch
