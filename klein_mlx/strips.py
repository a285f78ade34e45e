"""Work in strips of a picture's rows, evaluated one after the other, so that only one strip's arrays are alive."""

from collections.abc import Callable

import mlx.core as mx

# Called with what was computed so far, between parts: it may evaluate it, or raise to stop.
Done = Callable[[mx.array], None]


def settled(x: mx.array, rows: int | None, done: Done | None = None) -> mx.array:
    """In strips, evaluate before going on, so that what led to x is freed."""
    if rows:
        mx.eval(x)
    if done:
        done(x)
    return x
