"""The path of a prompt: files, calls, and switches between files, counted by sys.setprofile with tiny.

`python tests/benchmarks/path_of_a_prompt.py [--most 20]` counts a prompt on the command line, an API call that opens
the model, and a warm call. Everything is imported by an uncounted run; comprehensions do not count as calls.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import klein_mlx
from klein_mlx import KleinPipeline
from klein_mlx.cli.main import main as command

ROOT = str(Path(klein_mlx.__file__).parents[1]) + os.sep


class Passed:
    """What one run passes."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.switches, self._last = 0, ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(ROOT) or code.co_name.startswith("<"):
            return
        name = code.co_filename.removeprefix(ROOT)
        if not name.startswith(("klein_mlx", "convert")):
            return
        self.calls[name, code.co_qualname] += 1
        self.switches += name != self._last
        self._last = name

    @property
    def files(self) -> set[str]:
        return {name for name, _ in self.calls}


def count(work: Callable[[], object]) -> Passed:
    path = Passed()
    sys.setprofile(path)
    try:
        work()
    finally:
        sys.setprofile(None)
    return path


def paths() -> dict[str, Passed]:
    """Of a command-line prompt, an API call and a warm call."""
    pipes: list[KleinPipeline] = []

    def prompt() -> None:
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
            command(["generate", "a red circle", "-m", "tiny", "--seed", "1", "--quiet", "-o", f"{folder}/picture.png"])

    def call() -> None:
        pipes.append(KleinPipeline.from_pretrained("tiny", keep="all"))
        pipes[-1]("a red circle", seed=1)

    prompt()
    call()
    return {
        "command-line prompt": count(prompt),
        "API call": count(call),
        "warm call": count(lambda: pipes[-1]("a blue star", seed=2)),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--most", type=int, default=0, help="the functions called most")
    most = parser.parse_args().most
    for name, path in paths().items():
        total = sum(path.calls.values())
        print(f"{name}: {len(path.files)} files, {total} calls, {path.switches} switches between files")
        for (file, function), calls in path.calls.most_common(most):
            print(f"  {calls:>5} {file} {function}")


if __name__ == "__main__":
    main()
