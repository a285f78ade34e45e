"""`klein-mlx train DATA -o NAME.safetensors`: the flags are TrainOptions' fields; what happens is told on stderr."""

import argparse
import json
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, replace
from typing import TYPE_CHECKING, Any

from klein_mlx.cli.output import has_bar, note, say
from klein_mlx.errors import RequestError, human_bytes
from klein_mlx.train.options import TrainOptions, kind_of, make_options, read_toml, stored_values, table

if TYPE_CHECKING:
    from klein_mlx.train.loop import Event, Training

_KINDS = {"int": int, "flo": float}
_MEAN = 50  # steps that the loss is averaged over


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `klein-mlx train` takes: every option of a run, and how to begin it."""
    for name, field in table().items():
        told, kind = field.metadata, kind_of(field)
        flag = f"--{name.replace('_', '-')}"
        default = "" if field.default in (MISSING, None, (), False) else f" (default: {field.default})"
        words: dict[str, Any] = {"help": f"{told['help']}{default}".replace("%", "%%"), "default": None}
        if told.get("positional"):
            parser.add_argument(name, nargs="?", metavar=name.upper(), **words)
            continue
        if kind == "bool":
            words["action"] = argparse.BooleanOptionalAction
        elif told["choices"]:
            words["choices"] = told["choices"]
        else:
            words |= {
                "type": _KINDS.get(kind[:3], str),
                "metavar": told.get("metavar", "N" if kind[:3] == "int" else "X"),
            }
        if told.get("many"):
            words["nargs"] = "+"
        parser.add_argument(*told.get("short", ()), flag, **words)
    parser.add_argument("--config", metavar="FILE", help="options from a TOML file; the command line overrides it")
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder")
    parser.add_argument("--dry-run", action="store_true", help="check data and options, print the plan; train nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object per line and event on stdout")
    parser.add_argument("-y", "--yes", action="store_true", help="download the model without asking")
    parser.add_argument("--quiet", action="store_true", help="only warnings and the result")


def run(args: argparse.Namespace) -> int:
    """Train. Returns the exit code; raises KleinError."""
    options = _obtained(_options(args), args)
    if args.dry_run:
        from klein_mlx.train.plan import make_plan

        lines = make_plan(options).lines()
        say(*([json.dumps({"event": "plan", "lines": lines})] if args.json else lines))
        return 0
    from klein_mlx.runtime.distributed import LostPeer
    from klein_mlx.train.loop import train

    training = train(options, resume=args.resume is not None)
    try:
        return _follow(training, args)
    except LostPeer as error:
        note(f"error: {error}")
        return 1


def _options(args: argparse.Namespace) -> TrainOptions:
    """What was typed, then the TOML file, or the run that is resumed."""
    typed = {name: getattr(args, name) for name in table() if getattr(args, name) is not None}
    typed = {name: tuple(value) if isinstance(value, list) else value for name, value in typed.items()}
    values = read_toml(args.config) if args.config else {}
    if args.resume:
        values = {**stored_values(args.resume), "run": args.resume, **values}
    options = make_options({**values, **typed})
    for name, why in options.unused().items():
        if name in typed:
            raise RequestError(f"--{name.replace('_', '-')} decides nothing here: {why}")
    return options


def _obtained(options: TrainOptions, args: argparse.Namespace) -> TrainOptions:
    """With the model on disk, downloaded if the user agrees. Raises KleinError."""
    from klein_mlx.cli.bench import source_without_files
    from klein_mlx.cli.download import Consent, obtain
    from klein_mlx.config import published, resolve
    from klein_mlx.paths import own_names
    from klein_mlx.train.dataset import read_items
    from klein_mlx.train.plan import check_variant

    if published(options.model, own_names()):  # what is refused without the weights is refused before a download
        check_variant(source_without_files(options.model, None).config, options)
    read_items(options)
    model = obtain(options.model, consent=Consent(yes=args.yes, quiet=args.quiet))
    # A name that anybody knows stays as it is: the run records it, and Python may resume it by that name.
    return options if model == resolve(options.model) else replace(options, model=model)


def _follow(training: "Training", args: argparse.Namespace) -> int:
    """Tell what happens, until it ends or a signal ends it."""
    signals: list[int] = []
    show = _Json() if args.json else _Lines(training.options.steps, args.quiet)
    with _ending(training, signals):
        try:
            for event in training:
                if training.is_first:
                    show.event(event)
        finally:
            show.close()
    return 128 + signals[0] if signals else 0


@contextmanager
def _ending(training: "Training", signals: list[int]) -> Iterator[None]:
    """The first Ctrl-C, or a kill, lets the running update be the last; the second one ends it at once."""

    def end(number: int, frame: object) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)
        training.finish()

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class _Lines:
    """What people see: lines, and a bar with loss, held-out loss, time and memory."""

    def __init__(self, steps: int, quiet: bool):
        from tqdm import tqdm

        self._quiet, self._start = quiet, time.perf_counter()
        self._losses: deque[float] = deque(maxlen=_MEAN)
        self._held_out: float | None = None
        self._bar = tqdm(total=steps, desc="steps", disable=quiet or not has_bar(sys.stderr), leave=False)

    def event(self, event: "Event") -> None:
        from klein_mlx.train.loop import Checkpoint, Done, Notice, Preview, TrainStep

        if isinstance(event, TrainStep):
            self._step(event)
        elif isinstance(event, Notice):
            self._tell(event.text, event.is_warning)
        elif isinstance(event, Checkpoint):
            self._tell(f"checkpoint {event.path}")
        elif isinstance(event, Preview):
            self._tell(f"preview    {event.path}")
        elif isinstance(event, Done):
            self.close()
            for path in event.paths:
                say(str(path))

    def _step(self, step: Any) -> None:
        self._losses.append(step.loss)
        self._held_out = self._held_out if step.held_out is None else step.held_out
        mean = sum(self._losses) / len(self._losses)
        told = f"loss {mean:.4f}"
        if self._held_out is not None:
            told += f", held out {self._held_out:.4f}"
        told += f", {step.seconds:.2f} s/step, peak {human_bytes(step.peak)}"
        self._bar.n = step.index
        self._bar.set_postfix_str(told, refresh=True)
        if step.held_out is not None and self._bar.disable:
            left = (step.of - step.index) * step.seconds
            self._tell(f"step {step.index} of {step.of}: {told}, {left:.0f} s left")

    def _tell(self, text: str, is_warning: bool = False) -> None:
        if is_warning or not self._quiet:
            self._bar.write(f"{'warning: ' * is_warning}{text}", file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


class _Json:
    """One object per line on stdout."""

    def event(self, event: "Event") -> None:
        from klein_mlx.train.loop import Done, Preview

        values: dict[str, Any] = {name: value for name, value in vars(event).items() if name != "image"}
        if isinstance(event, Done):
            values = {"paths": [str(path) for path in event.paths]}
        if isinstance(event, Preview):
            values["path"] = str(event.path)
        say(json.dumps({"event": type(event).__name__.lower(), **values}, default=str))

    def close(self) -> None:
        pass
