"""The small checks that every request goes through, and their words."""

import operator
from typing import Any

from klein_mlx.errors import RequestError


def integer(what: str, value: Any, low: int, high: int) -> int:
    """`value`, an int or numpy's, as an int if it is in low..high; else a RequestError that names it."""
    try:
        whole = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = None
    if whole is None or not low <= whole <= high:
        raise RequestError(f"{what} is {short(value)}; it must be a whole number from {low} to {high}")
    return whole


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def flag(what: str, value: Any) -> bool:
    """`value` if it is True or False; else a RequestError."""
    if not isinstance(value, bool):
        raise RequestError(f"{what} is {short(value)}; it must be True or False")
    return value


def short(value: Any) -> str:
    """A value as it is written in Python, cut to fit one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
