"""mflux on the same model and request, measured beside ours: in processes of its own, by the Python that has it."""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from klein_mlx.errors import RequestError
from klein_mlx.pipeline import KleinPipeline

RUNNER = Path(__file__).with_name("mflux_runner.py")
VARIANTS = ("4b", "base-4b", "9b", "base-9b")


class Mflux:
    """A process with mflux's model in it.

    one_picture: it is started for each picture anew, and frees the encoder before the steps and the transformer after
    them, as ours does that keeps nothing.
    """

    def __init__(self, python: str | None, model: str, variant: str, quantize: int | None, one_picture: bool):
        self.on_cpu = mx.default_device().type != mx.DeviceType.gpu
        self.one_picture = one_picture
        self._asked = {
            "model": model,
            "variant": variant,
            "quantize": quantize,
            "one_picture": one_picture,
            "float32": self.on_cpu,
        }
        self._python = python or sys.executable
        self._process: subprocess.Popen[str] | None = None
        self.version = ""

    def picture(self, line: dict[str, Any]) -> dict[str, Any]:
        """Make one picture; returns seconds per phase, peak_memory and peak_rss. Raises RequestError if mflux fails."""
        process = self._process or self._start()
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended: what it said is told below
                process.stdin.write(json.dumps(line) + "\n")
                process.stdin.flush()
            return self._answer(process)
        finally:
            if self.one_picture:
                self.close()

    def _start(self) -> "subprocess.Popen[str]":
        self._process = subprocess.Popen(
            [self._python, str(RUNNER), json.dumps(self._asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.version = self._answer(self._process)["version"]
        return self._process

    def _answer(self, process: "subprocess.Popen[str]") -> dict[str, Any]:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        if line:
            return json.loads(line)
        told = process.stderr.read().strip().splitlines()
        raise RequestError(f"mflux cannot run this: {told[-1][:300] if told else 'it ended without a word'}")

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
            self._process.terminate()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def mflux(args: argparse.Namespace, pipe: KleinPipeline) -> Iterator[Mflux]:
    """mflux with the model that the pipeline has. Raises RequestError where it has none or cannot read the model."""
    python = args.compare_python or sys.executable
    try:
        found = subprocess.run(
            [python, "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('mflux') is None)"], timeout=60
        )
    except OSError as error:
        raise RequestError(f"--compare-python is {python!r}, which cannot be run: {error.strerror}") from None
    if found.returncode:
        raise RequestError(f"mflux is not installed for {python}: `pip install mflux`, or give --compare-python")
    variant = pipe.config.variant.name
    if variant not in VARIANTS and (variant != "distilled" or not _is_wide(pipe)):
        raise RequestError(f"mflux has no variant {variant}; it has {', '.join(VARIANTS)}")
    if pipe.source.info.get("format") == "klein_mlx":
        raise RequestError("mflux reads no checkpoint of ours: give the folder or hub id in diffusers' layout")
    model = pipe.source.path if pipe.source.path.is_dir() else args.model
    ours = pipe.parts.quantization.get("transformer")
    quantize = ours.bits if ours else None
    one_picture = args.cold or pipe.parts.keep != "all"
    process = Mflux(python, str(model), variant if variant in VARIANTS else "4b", quantize, one_picture)
    try:
        yield process
    finally:
        process.close()


def _is_wide(pipe: KleinPipeline) -> bool:
    """Whether the model is a klein 4B but for its depth, as tests cut it."""
    t, e = pipe.config.transformer, pipe.config.text_encoder
    return (t.hidden_size, t.joint_attention_dim, e.num_hidden_layers) == (3072, 7680, 36)


def summary(process: Mflux, pictures: list[dict[str, Any]]) -> dict[str, Any]:
    """mflux's pictures as one JSON object: spreads of seconds, and the highest peaks."""
    phases = list(pictures[0]["seconds"])
    columns = {name: [p["seconds"][name] for p in pictures] for name in phases}
    columns["total"] = [sum(p["seconds"].values()) for p in pictures]
    return {
        "version": process.version,
        "float32_matmuls": process.on_cpu,
        "seconds": {
            name: {"min": min(column), "median": statistics.median(column), "max": max(column)}
            for name, column in columns.items()
        },
        "cpu_seconds": min(p["cpu_seconds"] for p in pictures),
        "peak_memory": max(p["peak_memory"] for p in pictures),
        "peak_rss": max(p["peak_rss"] for p in pictures),
    }


def ratios(report: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Ours over mflux's, under 1 is better: each phase's fastest (others use the machine too), the processor's time,
    the highest peaks."""
    found = {
        name: spread["min"] / other["seconds"][name]["min"]
        for name, spread in report["seconds"].items()
        if other["seconds"].get(name, {}).get("min")
    }
    found["CPU"] = report["cpu_seconds"] / other["cpu_seconds"]
    found["MLX peak"] = max(report["peak_memory"].values()) / other["peak_memory"]
    found["RSS peak"] = max(report["peak_rss"].values()) / other["peak_rss"]
    return {name: round(value, 4) for name, value in found.items()}
