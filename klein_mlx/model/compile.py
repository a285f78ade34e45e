"""Elementwise chains as one kernel, and blocks as compiled functions.

On a GPU mx.compile makes one kernel of a chain of elementwise operations. On a CPU it would call a C++ compiler, so
nothing is compiled there.
"""

from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, Generic, ParamSpec

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

P = ParamSpec("P")


class Chain(Generic[P]):
    """A chain of elementwise operations. Called, it is one kernel; `plain` runs operation by operation, `cpu` as a CPU
    does it best. Inside a larger mx.compile a call dissolves into that.
    """

    def __init__(self, plain: Callable[P, mx.array]):
        self.plain = self.cpu = plain
        self._compiled = mx.compile(plain)

    def on_cpu(self, function: Callable[P, mx.array]) -> Callable[P, mx.array]:
        """Have a CPU compute the chain by this function."""
        self.cpu = function
        return function

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> mx.array:
        return self._compiled(*args, **kwargs)


def fused(function: Callable[P, mx.array]) -> Callable[P, mx.array]:
    """A chain that looks, at each call, whether the default device can compile it; for code outside of a model."""
    chain = Chain(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> mx.array:
        on_gpu = mx.default_device().type == mx.DeviceType.gpu
        return (chain if on_gpu else function)(*args, **kwargs)

    return call


class CompiledBlocks:
    """Calls a model's blocks as compiled functions of their weights and inputs.

    Blocks of one `signature` share a function, so a model is traced once per kind of block and per shape, however many
    blocks and calls it has. A function works on a copy of the block without weights: no weights are held, and a model
    may leave memory and come back without being traced again. traces: how often a block has been traced.
    """

    def __init__(self) -> None:
        self.traces = 0
        self._functions: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, block: Any, *args: Any) -> Any:
        """block(*args), for a device that compiles. args: trees of arrays; what else is in them must be hashable, and
        decides the code too."""
        leaves = [leaf for _, leaf in tree_flatten(args)]
        key = block.signature, tuple(None if isinstance(leaf, mx.array) else (leaf,) for leaf in leaves)
        if key not in self._functions:
            self._functions[key] = mx.compile(self._function(block, args))
        return self._functions[key](block.parameters(), [leaf for leaf in leaves if isinstance(leaf, mx.array)])

    def _function(self, block: nn.Module, args: Any) -> Callable[..., Any]:
        """Of this kind of block: weights and arrays in the order of `args` to what the block returns."""
        skeleton = without_weights(block)
        places = tree_map(lambda leaf: _PLACE if isinstance(leaf, mx.array) else leaf, args)

        def run(weights: dict[str, Any], arrays: list[mx.array]) -> Any:
            self.traces += 1
            given = iter(arrays)
            # A copy each time: what is traced must not outlive its trace.
            own = fill(without_weights(skeleton), weights)
            return own(*tree_map(lambda leaf: next(given) if leaf is _PLACE else leaf, places))

        return run


_PLACE = object()  # where an array goes


def without_weights(module: nn.Module) -> Any:
    """A copy of a module and of those in it, with their settings and without their arrays."""
    copy = type(module).__new__(type(module))
    nn.Module.__init__(copy)
    vars(copy).update(vars(module))
    for name, value in module.items():
        if not isinstance(value, mx.array):
            copy[name] = tree_map(without_weights, value, is_leaf=lambda one: isinstance(one, nn.Module))
    return copy


def fill(module: Any, weights: Any) -> Any:
    """Put a tree of arrays, as `parameters` returns it, into a module made by `without_weights`; returns the module."""
    places = enumerate(weights) if isinstance(weights, list) else weights.items()
    for name, value in places:
        if isinstance(value, mx.array):
            module[name] = value
        else:
            fill(module[name], value)
    return module


def signature(module: nn.Module) -> Hashable:
    """What decides a module's code besides the shapes of its arrays: the types and settings of the modules in it."""
    return tuple(
        (path, type(one), *((k, v) for k, v in sorted(vars(one).items()) if isinstance(v, Hashable)))
        for path, one in module.named_modules()
    )
