"""`klein-mlx bench`: how long each phase takes and how much memory, on this machine; or on a Mac, as predicted.

A table for people on stdout, or one JSON object.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from klein_mlx.cli.options import (
    BITS,
    DEFAULT_MODEL,
    FLAGS,
    add_options,
    asked_bits,
    parse_size,
    refuse_alone,
    typed_options,
)
from klein_mlx.cli.output import note, say, say_json
from klein_mlx.errors import RequestError, human_bytes

if TYPE_CHECKING:
    from klein_mlx.bench.measure import Measured
    from klein_mlx.bench.predict import PictureCost, Prediction
    from klein_mlx.config import ModelConfig
    from klein_mlx.model.layers import Gpu
    from klein_mlx.pipeline import KleinPipeline

__all__ = ["add_arguments", "run"]

MAX_RUNS, PROMPT = 1000, "a red fox in the snow"
NOTE = (
    "Predicted, not measured: counted kernels, FLOPs and bytes on a roofline, the share of the peak fitted to published"
    " times of mflux, which has the same matmuls. Weights loaded; * the peak is not Apple's own figure."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `klein-mlx bench`."""
    add = parser.add_argument
    add_options(parser, ("model", "variant", "size", "num_inference_steps"))
    add("--runs", type=int, help="pictures to measure, after one warm-up picture (default: 3)")
    add("--cold", action="store_true", help="reload everything for each picture; no warm-up run")
    about = f"what to draw; a number is appended so that nothing is cached (default: {PROMPT})"
    add("--prompt", metavar="TEXT", help=about)
    add_options(parser, (*BITS, "dtype", "keep", "offline", "yes"))
    add("--json", action="store_true", help="one JSON object on stdout instead of the table")
    add(
        "--predict",
        nargs="?",
        const="all",
        metavar="CHIP",
        help='predict the time on a chip such as "M3 Max", or on every chip from M1 to M5; nothing is run',
    )
    about = "time this GPU's alternative kernels, equal to rounding, and keep the fastest"
    add("--tune", action="store_true", help=about)


def run(args: argparse.Namespace) -> int:
    """Measure, or predict, what the parsed options ask for. Returns the exit code; raises KleinError."""
    _check_used(args, list(typed_options(args)))
    args.runs = 3 if args.runs is None else args.runs
    args.prompt = PROMPT if args.prompt is None else args.prompt
    if not 1 <= args.runs <= MAX_RUNS:
        raise RequestError(f"--runs is {args.runs}; it must be 1 to {MAX_RUNS}")
    refuse_alone(vars(args), vars(args))
    if args.tune:
        return _tune(args)
    if args.predict is not None:
        return _predict(args)
    return _measure(args, _import_seconds())


def _check_used(args: argparse.Namespace, typed: list[str]) -> None:
    """RequestError for an option that would decide nothing. typed: of those that `generate` has, too."""
    given = [*typed, *(name for name in ("runs", "cold", "predict") if getattr(args, name) not in (None, False))]
    mode, unused = "--predict, which runs nothing", ("runs", "cold", "prompt", "keep")
    if args.tune:
        mode = "--tune, which times kernels alone"
        unused = tuple(name for name in given if name not in ("json", "offline", "yes"))
    elif args.predict is None:
        return
    if name := next((name for name in given if name in unused), None):
        raise RequestError(f"{FLAGS.get(name, f'--{name}')} is not for {mode}; leave it out")


def _import_seconds() -> float:
    """What importing the pipeline takes, in a process that has nothing imported yet."""
    code = "import time; start = time.perf_counter(); import klein_mlx.pipeline; print(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _size(args: argparse.Namespace, config: "ModelConfig") -> tuple[int, int]:
    """(width, height) of --size, which the request checks."""
    if args.size is None:
        return config.default_size, config.default_size
    return parse_size(args.size, config.pixels_per_token, config.default_size)


# Measuring


def _measure(args: argparse.Namespace, import_seconds: float) -> int:
    from klein_mlx.bench.measure import Bench
    from klein_mlx.cli.download import Consent, obtain
    from klein_mlx.pipeline import KleinPipeline

    model = obtain(args.model or DEFAULT_MODEL, consent=Consent(args.offline, args.yes))
    own = {"quantize": asked_bits(args), "dtype": args.dtype, "keep": args.keep, "variant": args.variant}
    own["local_files_only"] = args.offline
    bench = Bench(lambda: KleinPipeline.from_pretrained(model, **own), args.prompt, args.num_inference_steps, args.cold)
    width, height = _size(args, bench.pipe.config)
    runs = []
    for number in range(1 if args.cold else 0, args.runs + 1):
        _progress(f"picture {number} of {args.runs}" if number else "warming up")
        runs.append(bench.picture(width, height, number))
    if not args.cold:
        del runs[0]
    report = _report(args, bench.pipe, runs, (width, height))
    report["seconds"] = {"import": _spread([import_seconds]), **report["seconds"]}
    if args.json:
        say_json(report)
    else:
        say(*_measured_table(report).split("\n"))
    return 0


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        note(line)


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "min": round(min(values), 4),
        "median": round(statistics.median(values), 4),
        "max": round(max(values), 4),
    }


def _report(
    args: argparse.Namespace, pipe: "KleinPipeline", runs: "list[Measured]", size: tuple[int, int]
) -> dict[str, Any]:
    from importlib.metadata import version

    from klein_mlx.bench.measure import device_name, limit
    from klein_mlx.bench.predict import picture_cost
    from klein_mlx.paths import version as own_version
    from klein_mlx.runtime.memory import choices_told

    config, steps = pipe.config, runs[0].steps
    phases = list(runs[0].seconds)
    seconds = {phase: _spread([r.seconds.get(phase, 0.0) for r in runs]) for phase in phases}
    totals = [sum(r.seconds.values()) for r in runs]
    quantization = {**pipe.source.quantization, **pipe.parts.quantization}
    cost = picture_cost(config, *size, steps, pipe.dtype, quantization, config.variant.passes)
    flops = {"encode": cost.encode.flops, "step": cost.step.flops, "decode": cost.decode.flops}
    step = statistics.median(t for r in runs for name, t in r.seconds.items() if name.startswith("step "))
    times = {"step": step, **{name: seconds[name]["median"] for name in ("encode", "decode") if name in seconds}}
    achieved = {name: round(flops[name] / times[name] / 1e12, 4) for name in times if times[name] > 0}
    reached, where = limit(pipe.dtype)
    side = config.pixels_per_token
    return {
        "predicted": False,
        "model": str(args.model or DEFAULT_MODEL),
        "variant": config.variant.name,
        "bits": {part: own.bits for part, own in quantization.items()},
        "dtype": str(pipe.dtype).removeprefix("mlx.core."),
        "keep": pipe.parts.keep,
        "device": device_name(),
        "choices": choices_told(pipe.parts.device),
        "versions": {"klein_mlx": own_version(), "mlx": version("mlx")},
        "mode": "cold" if args.cold else "warm",
        "runs": len(runs),
        "width": size[0],
        "height": size[1],
        "steps": steps,
        "tokens": {"text": config.max_sequence_length, "image": size[0] // side * (size[1] // side)},
        "seconds": {**seconds, "total": _spread(totals)},
        "cpu_seconds": round(min(r.cpu for r in runs), 3),
        "peak_memory": {phase: max(r.memory.get(phase, 0) for r in runs) for phase in phases},
        "peak_rss": {phase: max(r.rss.get(phase, 0) for r in runs) for phase in phases},
        "pictures_per_minute": round(60 / statistics.median(totals), 3),
        "tflop": {name: round(value / 1e12, 4) for name, value in flops.items()},
        "tflops": achieved,
        "limit": {"tflops": round(reached, 4), "source": where},
        "share_of_limit": {name: round(value / reached, 4) for name, value in achieved.items()},
    }


def _tune(args: argparse.Namespace) -> int:
    from klein_mlx.bench.measure import device_name, tune
    from klein_mlx.model.layers import Gpu, here
    from klein_mlx.paths import version
    from klein_mlx.runtime.memory import choices_told, keep_choices, with_choices

    device = here()
    if not isinstance(device, Gpu):
        raise RequestError("--tune is for a GPU; on a CPU there is nothing to choose")
    _progress("timing the ways in which this GPU may compute")
    tuned = tune(device)
    kept = keep_choices(tuned.choices)
    chosen = choices_told(with_choices(device, tuned.choices))
    if args.json:
        seconds = {name: round(value, 6) for name, value in tuned.seconds.items()}
        versions = {"mlx": version("mlx")}
        say_json(
            {"device": device_name(), "versions": versions, "choices": tuned.choices, "seconds": seconds, "kept": kept}
        )
        return 0
    say(f"{device_name()}, mlx {version('mlx')}")
    say(*(f"{name:<34}{value * 1e3:>10.2f} ms" for name, value in tuned.seconds.items()))
    say(f"chosen: {chosen}" + ("" if kept else " (could not be kept: the cache folder cannot be written to)"))
    return 0


def _measured_table(report: dict[str, Any]) -> str:
    bits, plural = _bits(report["bits"]), "s" * (report["runs"] > 1)
    lines = [
        f"{report['model']} ({report['variant']}, {bits}), {report['width']} x {report['height']}, "
        f"{_steps(report)}, {report['dtype']}, keep {report['keep']}",
        f"{report['device']}, mlx {report['versions']['mlx']}; {report['runs']} {report['mode']} picture{plural}, "
        f"{report['tokens']['text']} text and {report['tokens']['image']} image tokens",
        f"computes with {report['choices']}",
        "",
        f"{'phase':<12}{'median s':>10}{'min':>10}{'max':>10}{'MLX peak':>12}{'RSS peak':>12}",
    ]
    for phase, spread in report["seconds"].items():
        known = (report[name].get(phase) for name in ("peak_memory", "peak_rss"))
        peaks = ["" if nbytes is None else human_bytes(nbytes) for nbytes in known]
        times = "".join(f"{spread[name]:>10.3f}" for name in ("median", "min", "max"))
        lines.append(f"{phase:<12}{times}{peaks[0]:>12}{peaks[1]:>12}")
    lines += ["", f"{report['pictures_per_minute']:.2f} pictures per minute"]
    for name, value in report["tflops"].items():
        share = report["share_of_limit"][name]
        lines.append(f"{name:<12}{report['tflop'][name]:>10.4f} TFLOP at {value:.3f} TFLOPS, {share:.0%} of the limit")
    lines.append(f"the limit    {report['limit']['tflops']:.3f} TFLOPS: {report['limit']['source']}")
    return "\n".join(lines)


def _bits(bits: dict[str, int]) -> str:
    """As "4-bit"; a part whose bits differ is named."""
    if len(set(bits.values())) <= 1:
        return f"{next(iter(bits.values()))}-bit" if bits else "unquantized"
    return ", ".join(f"{part.replace('_', ' ')} {number}-bit" for part, number in bits.items())


# Predicting


def _predict(args: argparse.Namespace) -> int:
    from klein_mlx.bench.predict import CHIPS, named_chip, predict

    chips = CHIPS if args.predict.lower() == "all" else (named_chip(args.predict),)
    asked, cost_on, dtype = _predicted_cost(args)
    costs = {device: cost_on(device) for device in dict.fromkeys(chip.device for chip in chips)}
    rows = [predict(costs[chip.device], chip, dtype) for chip in chips]
    cost = costs[chips[0].device]
    report = {
        "predicted": True,
        **asked,
        "dtype": str(dtype).removeprefix("mlx.core."),
        "steps": cost.steps,
        "tflop": {part: round(getattr(cost, part).flops / 1e12, 4) for part in ("encode", "step", "decode")},
        "chips": {row.chip.name: {**_row(row), **_counts(costs[row.chip.device])} for row in rows},
    }
    if args.json:
        say_json(report)
    else:
        say(*_predicted_table(report, rows).split("\n"))
    return 0


def _counts(cost: "PictureCost") -> dict[str, Any]:
    parts = {part: getattr(cost, part) for part in ("encode", "step", "decode")}
    return {
        "kernels": {part: own.total for part, own in parts.items()},
        "traffic": {part: own.traffic for part, own in parts.items()},
    }


def source_without_files(model: str, variant: str | None) -> Any:
    """What is asked of a model's files before any is read: of a published one none need be there; else on disk."""
    from types import SimpleNamespace

    from klein_mlx.bench.predict import klein
    from klein_mlx.config import published, settle_variant
    from klein_mlx.paths import own_names

    found = published(model, own_names())
    if found is None:
        from klein_mlx.cli.download import Consent, obtain
        from klein_mlx.formats.open import open_model

        return open_model(obtain(model, consent=Consent(offline=True)), local_files_only=True, variant=variant)
    size = next(size for size in ("dev", "9b", "4b") if size in found.name)
    config = settle_variant(klein(size), variant or found.name)
    return SimpleNamespace(path=found.name, config=config, quantization={})


def _predicted_cost(args: argparse.Namespace) -> "tuple[dict[str, Any], Callable[[Gpu], PictureCost], Any]":
    """(what is asked for, its cost on a device, dtype); the model is one of the published sizes, or on disk."""
    import mlx.core as mx

    from klein_mlx.bench.predict import picture_cost
    from klein_mlx.request import check
    from klein_mlx.runtime.memory import compute_dtype
    from klein_mlx.weights.bits import settle

    dtype = mx.bfloat16 if args.dtype is None else compute_dtype(args.dtype)
    source = source_without_files(args.model or DEFAULT_MODEL, args.variant)
    config, variant = source.config, source.config.variant
    steps, passes, name = variant.steps, variant.passes, variant.name
    quantization = {**source.quantization, **settle(asked_bits(args), source)}
    width, height = _size(args, config)
    steps = args.num_inference_steps or steps
    request = check(config, prompt="", width=width, height=height, num_inference_steps=steps, seed=0)

    @cache
    def traced(device: "Gpu") -> "PictureCost":
        return picture_cost(config, width, height, request.steps, dtype, quantization, passes, device)

    def cost(device: "Gpu") -> "PictureCost":
        return traced(device if quantization else replace(device, dense_from=None))  # which would change nothing

    bits = {part: own.bits for part, own in quantization.items()}
    asked = {"model": name, "family": variant.family, "bits": bits, "width": width, "height": height}
    return asked, cost, dtype


def _row(row: "Prediction") -> dict[str, Any]:
    names = ("encode", "step", "decode", "picture", "fastest", "slowest", "floor")
    return {
        **{name: round(getattr(row, name), 3) for name in names},
        "pictures_per_minute": round(60 / row.picture, 3),
        "cores": row.chip.cores,
        "tflops": row.chip.tflops,
        "bandwidth": row.chip.bandwidth,
        "tflops_source": row.chip.source,
        "tflops_estimated": row.chip.is_estimated,
    }


def _steps(report: dict[str, Any]) -> str:
    return f"{report['steps']} step{'s' * (report['steps'] > 1)}"


def _predicted_table(report: dict[str, Any], rows: "list[Prediction]") -> str:
    bits, size = _bits(report["bits"]), f"{report['width']} x {report['height']}"
    lines = [
        f"{report['family']}, variant {report['model']} ({bits}), {size}, {_steps(report)}, {report['dtype']}",
        NOTE,
        "",
        f"{'chip':<10}{'cores':>6}{'TFLOPS':>8}{'GB/s':>6}{'encode s':>10}{'step s':>8}{'decode s':>10}"
        f"{'picture s':>11}{'range s':>17}{'at the peak':>13}{'a minute':>10}",
    ]
    for row in rows:
        chip = row.chip
        span = f"{row.fastest:.1f} - {row.slowest:.1f}"
        tflops = f"{chip.tflops:.1f}{'*' if chip.is_estimated else ' '}"
        lines.append(
            f"{chip.name:<10}{chip.cores:>6}{tflops:>8}{chip.bandwidth:>6.0f}{row.encode:>10.2f}{row.step:>8.2f}"
            f"{row.decode:>10.2f}{row.picture:>11.1f}{span:>17}{row.floor:>13.1f}{60 / row.picture:>10.2f}"
        )
    return "\n".join(lines)
