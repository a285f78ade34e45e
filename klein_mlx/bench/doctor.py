"""`klein-mlx doctor`: every check by its name, and running them one after the other.

A check is a function of a Setting that yields Rows; a fault in one never keeps the others from running.
"""

import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx

from klein_mlx.bench import capacity, machine, published, reference, shapes
from klein_mlx.bench.checks import Check, Row, Setting
from klein_mlx.errors import KleinError, RequestError, nearest
from klein_mlx.runtime.memory import compute_dtype

CHECKS = (
    Check("environment", "environment", machine.check_environment),
    Check("reference", "reference", reference.check_reference),
    *(Check(name, "shapes", run) for name, run in shapes.names().items()),
    Check("memory", "memory", capacity.check_memory),
    Check("speed", "speed", capacity.check_speed),
)


class Finding(NamedTuple):
    """A row with its check's section."""

    section: str
    row: Row


def make_setting(dtype: str | None = None) -> Setting:
    """What this machine is. dtype: the compute dtype's name; None: the device's usual one. Raises RequestError."""
    gpu = mx.default_device().type == mx.DeviceType.gpu
    return Setting(compute_dtype(dtype), cpu_gigaflops(), gpu, machine.generation())


def cpu_gigaflops() -> float:
    """What the CPU multiplies in float32, by a small matmul, the best of three."""
    size, best = 384, 0.0
    with mx.stream(mx.cpu):
        a = mx.ones((size, size))
        mx.eval(a)
        for _ in range(3):
            start = time.perf_counter()
            mx.eval(a @ a)
            best = max(best, 2 * size**3 / (time.perf_counter() - start) / 1e9)
    return best


def chosen(only: Sequence[str] | None, model: str | None = None) -> list[Check]:
    """The checks of these names or sections; all, if none is named. model: on disk; its checks come last.

    Raises RequestError for another name, CheckpointError for a model that cannot be read.
    """
    checks = [*CHECKS, *(published.model_checks(model) if model else ())]
    names = {name for check in checks for name in (check.section, check.name)}
    for name in only or ():
        if name in (published.SECTION, *published.RUNS) and not model:
            raise RequestError(f"--only {name} needs --model, such as --model 4b")
        if name not in names:
            near = nearest(name, names)
            meant = f" (did you mean {near}?)" if near else ""
            listed = ", ".join(dict.fromkeys(n for c in checks for n in (c.section, c.name)))
            raise RequestError(f"--only is {name!r}{meant}; it must be one of {listed}")
    return [check for check in checks if not only or check.name in only or check.section in only]


def examine(check: Check, setting: Setting) -> Iterator[Finding]:
    """A check's findings; what it raises is one that fails."""
    try:
        for row in check.run(setting):
            yield Finding(check.section, row)
    except Exception as error:  # another MLX may raise anything, and the next check still says something
        text = " ".join(str(KleinError(str(error))).split())
        remedy = "upgrade mlx (pip install -U mlx), and report this"
        yield Finding(check.section, Row(check.name, f"broke off: {text:.200}", False, remedy))
    finally:
        mx.clear_cache()


def private(text: str) -> str:
    """A line without the user's name and without paths, for a report that others read."""
    home = os.path.expanduser("~")
    if len(home) > 1:
        text = text.replace(home, "~")
    text = re.sub(r"(?<![\w)])~?/[^\s'\",;]+|~(?=\W|$)", "...", text)  # not the slash of GB/s
    names = {os.path.basename(home), os.environ.get("USER", ""), os.environ.get("LOGNAME", "")}
    return " ".join("..." if any(len(n) > 2 and n in word for n in names) else word for word in text.split(" "))
