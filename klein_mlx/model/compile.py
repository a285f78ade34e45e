"""Elementwise chains as one kernel, and blocks as compiled functions, where the device can compile them.

On a GPU mx.compile makes one kernel of a chain of elementwise operations. On a CPU it would call a C++ compiler, so by
default nothing is compiled there.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

P = ParamSpec("P")

COMPILING = ("auto", "always", "never")
_compiling: ContextVar[str] = ContextVar("compiling", default="auto")


@contextmanager
def compiling(when: str) -> Iterator[None]:
    """Override the choice inside a `with`: "auto" compiles on a GPU only."""
    if when not in COMPILING:
        raise ValueError(f"when is {when!r}; it must be one of {', '.join(COMPILING)}")
    token = _compiling.set(when)
    try:
        yield
    finally:
        _compiling.reset(token)


def compiles() -> bool:
    """Whether functions are compiled here and now."""
    when = _compiling.get()
    return when == "always" or (when == "auto" and mx.default_device().type == mx.DeviceType.gpu)


def fused(function: Callable[P, mx.array]) -> Callable[P, mx.array]:
    """Compile a chain of elementwise operations where the device can; elsewhere run it as it is.

    Inside a larger mx.compile it dissolves into that.
    """
    compiled = mx.compile(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> mx.array:
        return (compiled if compiles() else function)(*args, **kwargs)

    call.__dict__["is_fused"] = True
    return call


def is_fused(value: object) -> bool:
    """Whether it is a function made by `fused`: one kernel on a GPU."""
    return getattr(value, "is_fused", None) is True


class CompiledBlocks:
    """Calls a model's blocks as compiled functions of their weights and inputs.

    Blocks that are built alike share a function, so a model is traced once per kind of block and per shape, however
    many blocks and calls it has. No weights are held: a model may leave memory and come back, and nothing is traced
    again. traces: how often a block has been traced.
    """

    def __init__(self) -> None:
        self.traces = 0
        self._functions: dict[Hashable, Callable[..., Any]] = {}
        self._traced: tuple[nn.Module, tuple[Any, ...]] | None = None  # only during a call

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        """block(*args). args: trees of arrays; what else is in them must be hashable. Functions among them are shown
        arrays and return nothing: they are called when the block is done."""
        if not compiles():
            return block(*args)
        leaves = [leaf for _, leaf in tree_flatten(args)]
        # A function is no part of the kind: it may hold arrays, and those of the next picture are another.
        kind = _kind(block), tuple(callable if callable(a) else None if isinstance(a, mx.array) else a for a in leaves)
        if kind not in self._functions:
            self._functions[kind] = mx.compile(self._function())
        self._traced = block, args
        try:
            arrays = [leaf for leaf in leaves if isinstance(leaf, mx.array)]
            out, shown = self._functions[kind](block.parameters(), arrays)
        finally:
            self._traced = None
        for function, calls in zip(filter(callable, leaves), shown, strict=True):
            for given in calls:
                function(*given)
        return out

    def _function(self) -> Callable[..., Any]:
        """A function of its own for each kind: mx.compile knows functions by their identity."""

        def run(weights: dict[str, Any], arrays: list[mx.array]) -> Any:
            assert self._traced is not None
            block, args = self._traced
            self.traces += 1
            given, own = iter(arrays), block.parameters()
            shown: list[list[tuple[mx.array, ...]]] = []  # to each function: while a block is traced nothing has values

            def replaced(leaf: Any) -> Any:
                if isinstance(leaf, mx.array):
                    return next(given)
                if not callable(leaf):
                    return leaf
                calls: list[tuple[mx.array, ...]] = []
                shown.append(calls)
                return lambda *arrays: calls.append(arrays)

            block.update(weights)
            try:
                return block(*tree_map(replaced, args)), shown
            finally:
                block.update(own)

        return run


def _kind(block: nn.Module) -> Hashable:
    """What decides a block's code besides its arrays' shapes: the types and settings of the modules in it."""
    simple = (bool, int, float, str, mx.Dtype, type(None))
    return tuple(
        (path, type(module), *((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, simple)))
        for path, module in block.named_modules()
    )
