"""`train(options)`: a run as an iterator of what happens; the caller owns what is printed and when it ends.

Encode, free, load, update. Everything that is drawn by chance is decided by the seed and the update's number, so a run
that is resumed goes on as if it had never stopped, to the byte.
"""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import mlx.core as mx

from klein_mlx.errors import RequestError, of_device
from klein_mlx.pipeline import KleinPipeline
from klein_mlx.runtime.distributed import Group, LostPeer
from klein_mlx.runtime.memory import machine_memory, memory_limits
from klein_mlx.train.cache import Encoded
from klein_mlx.train.export import lora_files, origin_of, save_checkpoint, save_lora, save_tensors
from klein_mlx.train.optimize import rate_at
from klein_mlx.train.options import TrainOptions, with_paths_made_absolute
from klein_mlx.train.plan import Plan, make_plan
from klein_mlx.train.previews import Preview, Previews, is_flat
from klein_mlx.train.runs import LORA, RunFolder
from klein_mlx.train.session import Session, Update

__all__ = ["Checkpoint", "Done", "Notice", "Preview", "TrainStep", "Training", "train"]

COLLAPSED = 1.5  # times the best held-out loss
MAX_SKIPPED = 10  # in a row


@dataclass(frozen=True)
class TrainStep:
    """After one update. index: from 1. held_out: the loss on held-out pictures, where it was just measured.

    seconds: that the update took. peak: the most bytes of MLX's memory in it. skipped: its gradient was not finite.
    """

    index: int
    of: int
    loss: float
    held_out: float | None
    seconds: float
    peak: int
    learning_rate: float = 0.0
    grad_norm: float = 0.0
    skipped: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, whole on disk."""

    path: Path
    step: int = 0


@dataclass(frozen=True)
class Notice:
    """A line for the user: what is being done, or what went wrong."""

    text: str
    is_warning: bool = False


@dataclass(frozen=True)
class Done:
    """The files, or the folder, that hold the result."""

    paths: tuple[Path, ...]


Event = TrainStep | Checkpoint | Preview | Notice | Done


class _Closed(BaseException):
    """Raised inside of a run that was closed while it worked."""


@dataclass
class _Watch:
    """What tells a collapse."""

    best: float | None = None
    best_step: int | None = None
    skipped: int = 0
    warned: set[str] = field(default_factory=set)


class Training:
    """A running training: iterate for its events. `finish()` ends it after the running update, `close()` after the
    running block; both leave a checkpoint of the last update."""

    def __init__(self, options: TrainOptions, resume: bool = False):
        self.options = with_paths_made_absolute(options.checked())
        self.resume = resume
        self.step = 0
        self._finishing = self._closed = self._working = False
        self._group = Group(self.options.backend)
        self._folder = RunFolder(self.options.run_folder, self._group.rank == 0)
        self._watch, self._saved, self._started = _Watch(), -1, time.perf_counter()
        self._events = self._run()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        if self._closed:
            raise StopIteration
        self._working = True
        try:
            return next(self._events)
        except _Closed:
            raise StopIteration from None
        finally:
            self._working = False

    def finish(self) -> None:
        """Let the running update be the last one."""
        self._finishing = True

    def close(self) -> None:
        """Stop: between events at once, while an update runs (from another thread, a callback) after its block."""
        self._closed = True
        if not self._working:
            self._events.close()

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self._group.rank == 0

    # ---- the run ----

    def _run(self) -> Generator[Event, None, None]:
        plan = make_plan(self.options)
        self._check_output()
        self._folder.open(self.options, self.resume)
        try:
            with memory_limits(0, machine_memory()):
                yield from self._with(plan)
        except LostPeer as error:
            last = self._folder.checkpoints[-1:] or ["none yet"]
            raise LostPeer(f"{error}; the last checkpoint is {last[0]}") from None
        except RuntimeError as error:
            raise of_device(error) or error from None
        finally:
            self._folder.close()

    def _check_output(self) -> None:
        """Nothing is overwritten, unless it is this run's own."""
        output = Path(self.options.output)
        files = [output] if self.options.method == "full" else lora_files(output, self.options.format).values()
        for path in files:
            if path.exists() and not self.resume:
                raise RequestError(f"{path} exists; give another name, or remove it")
        if not output.parent.is_dir():
            raise RequestError(f"{output.parent} is not a folder; make it first")

    def _with(self, plan: Plan) -> Iterator[Event]:
        options = self.options
        for line in plan.lines():
            yield Notice(line)
        pipe = KleinPipeline(plan.source, quantize=options.bits, dtype=options.dtype, keep="nothing")
        encoded = Encoded(pipe, options, self._folder.folder / "cache")
        texts, pictures = encoded.missing(plan.table.items, plan.captions)
        if texts or pictures:
            yield Notice(f"encoding   {len(texts)} captions and {len(pictures)} pictures")
        for note in encoded.fill(plan.table.items, plan.captions, lambda line: self._pause()):
            yield Notice(note)
        if self._finishing:
            return
        session = Session(plan, encoded, self._group, self._pause)
        layers = len(session.trainables.adapters) or len(session.trainables.weights)
        kind = "adapters" if session.trainables.adapters else "weights"
        yield Notice(f"training   {session.trainables.numbers:,} numbers in {layers} {kind}")
        self._restore(plan, session)
        previews = Previews(plan, self._folder.folder / "previews")
        try:
            yield from self._updates(plan, session, previews)
        except LostPeer:
            raise
        except BaseException:
            if not session.is_changing:
                self._save(plan, session)
            raise
        if self.step > self._saved and self._group.rank == 0:
            yield self._save(plan, session)
        if self._group.rank == 0 and self.step >= options.steps:
            yield Done(self._write(plan, session))

    def _pause(self) -> None:
        if self._closed:
            raise _Closed

    def _updates(self, plan: Plan, session: Session, previews: Previews) -> Iterator[Event]:
        options = self.options
        while self.step < options.steps and not self._is_to_end():
            start = time.perf_counter()
            mx.reset_peak_memory()
            update = session.update(self.step)
            self.step += 1
            seconds, held_out = time.perf_counter() - start, None
            if self.step % options.hold_out_every == 0 or self.step == options.steps:
                held_out = session.held_out_loss() if self._group.rank == 0 else None
            yield self._told(update, held_out, seconds)
            yield from self._warnings(update, held_out)
            if self._is_collapsed() and self._group.agree(options.stop_early):
                return
            due = previews.is_due(self.step, time.perf_counter() - self._started)
            asked = options.preview_every and self.step % options.preview_every == 0
            if self.step % options.save_every == 0 or self.step == options.steps or (asked and options.preview):
                if self._group.rank == 0:
                    checkpoint = self._save(plan, session)
                    yield checkpoint
                    if due:
                        yield from self._draw(session, previews, checkpoint.path)

    def _is_to_end(self) -> bool:
        return self._group.agree(self._finishing or self._folder.asks_to_stop())

    def _told(self, update: Update, held_out: float | None, seconds: float) -> TrainStep:
        """The step's event, which is logged too."""
        rate, peak = rate_at(self.options, self.step - 1), mx.get_peak_memory()
        step = TrainStep(
            *(self.step, self.options.steps, update.loss, held_out, seconds, peak, rate, update.norm, update.skipped)
        )
        entry = {"step": step.index, "loss": _finite(step.loss), "held_out": _finite(held_out), "lr": rate}
        entry |= {"grad_norm": _finite(update.norm), "seconds": round(seconds, 4), "peak_gb": round(peak / 1e9, 4)}
        self._folder.log(entry | {"skipped": update.skipped})
        return step

    # ---- collapse ----

    def _warnings(self, update: Update, held_out: float | None) -> Iterator[Notice]:
        watch = self._watch
        watch.skipped = watch.skipped + 1 if update.skipped else 0
        if watch.skipped == MAX_SKIPPED:
            yield self._warning("skipped", f"{MAX_SKIPPED} updates in a row were not finite")
        if held_out is None:
            return
        if watch.best is None or held_out < watch.best:
            watch.best, watch.best_step = held_out, self.step
        elif held_out > COLLAPSED * watch.best:
            yield self._warning(
                "held out", f"the held-out loss is {held_out:.4f}, {held_out / watch.best:.1f} times the best"
            )

    def _warning(self, kind: str, what: str) -> Notice:
        self._watch.warned.add(kind)
        best = self._watch.best_step
        saved = [path for path in self._folder.checkpoints if best is None or path <= self._folder.checkpoint(best)]
        where = (
            f"the best checkpoint is {saved[-1]}" if saved else "there is no good checkpoint; use a lower learning rate"
        )
        return Notice(f"step {self.step}: {what}: training has collapsed; {where}", True)

    def _is_collapsed(self) -> bool:
        return bool(self._watch.warned)

    # ---- previews and files ----

    def _draw(self, session: Session, previews: Previews, checkpoint: Path) -> Iterator[Event]:
        session.unload()
        for preview in previews.draw(self.step, checkpoint):
            yield preview
            if is_flat(preview.image):
                yield self._warning("preview", f"the preview of {preview.prompt[:40]!r} shows nothing")
        session.reload()

    def _restore(self, plan: Plan, session: Session) -> None:
        found = self._folder.newest() if self.resume else None
        if found is None:
            return
        state, arrays, path = found
        if state.get("data") != plan.table.digest:
            raise RequestError(
                f"data is {self.options.data!r}, which has changed since {path}; train anew, or undo that"
            )
        self.step = self._saved = int(state["step"])
        if self.step > self.options.steps:
            raise RequestError(f"steps is {self.options.steps}, but {path} has {self.step} already; give more")
        best = state.get("best") or [None, None]
        self._watch.best, self._watch.best_step = best
        session.restore(arrays)
        self._folder.cut_log(self.step)

    def _save(self, plan: Plan, session: Session) -> Checkpoint:
        path = self._folder.checkpoint(self.step)
        if self._saved == self.step or self._group.rank:
            return Checkpoint(path, self.step)
        watch = self._watch
        state: dict[str, Any] = {"step": self.step, "data": plan.table.digest, "best": [watch.best, watch.best_step]}
        state["options"] = self.options.to_toml()

        def write(folder: Path) -> None:
            origin = self._origin(plan)
            if self.options.method == "full":
                save_tensors(folder / "transformer.safetensors", session.result, origin.metadata())
            else:
                save_lora(folder / LORA, session.trainables, session.result, "diffusers", origin)

        self._folder.save(self.step, state, session.state(), write)
        self._saved = self.step
        self._folder.thin_out(self.options.keep_last, watch.best_step)
        return Checkpoint(path, self.step)

    def _origin(self, plan: Plan) -> Any:
        options = self.options
        title = Path(options.output).name.removesuffix(".safetensors")
        return origin_of(plan.source.config, title, options.trigger, self.step, len(plan.table.items))

    def _write(self, plan: Plan, session: Session) -> tuple[Path, ...]:
        options, output = self.options, Path(self.options.output)
        if options.method != "full":
            return tuple(save_lora(output, session.trainables, session.result, options.format, self._origin(plan)))
        if output.exists():
            raise RequestError(f"{output} exists; the result is in {self._folder.checkpoint(self.step)}")
        return (save_checkpoint(output, plan.source, session.result, self._origin(plan)),)


def _finite(value: float | None) -> float | None:
    """What JSON can hold."""
    return value if value is not None and abs(value) < float("inf") else None


def train(options: TrainOptions, *, resume: bool = False) -> Training:
    """Train; returns an iterator of TrainStep, Checkpoint, Preview, Notice, and Done at the end.

    resume: go on with the run in `options.run_folder`, whose other options must be the same.
    Raises RequestError and CheckpointError for what cannot be done, LostPeer where another machine is gone.
    """
    return Training(options, resume)
