"""A run while it works: a bar and notes for people, or one JSON object a line for programs; both on stderr.

`--progress json` prints objects with `event` and `seconds` (since the start):
    start    pictures, steps (of all together)
    phase    phase: load, encode, steps, decode; seconds as above
    step     picture (from 1), pictures, step (from 1), of, sigma
    note     text
    picture  picture, pictures, file (null for stdout), seed, prompt
    failed   where (file:line), error
    end      pictures, failed, phases (seconds of each)
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from klein_mlx.cli.output import json_line, note
from klein_mlx.cli.terminal import has_bar
from klein_mlx.runtime.run import Picture, Run, Step

PHASES = {"load": "loading", "encode": "encoding", "steps": "step", "decode": "decoding"}


class Progress:
    """What people see. quiet: nothing but failures."""

    def __init__(self, pictures: int, steps: int, quiet: bool = False):
        self.pictures, self.quiet, self.done, self.start = pictures, quiet, 0, time.perf_counter()
        off = quiet or not has_bar(sys.stderr)
        self._bar = tqdm(total=steps, desc=PHASES["load"], disable=off, leave=False)
        self._over = threading.Event()
        if not off:
            threading.Thread(target=self._run_clock, daemon=True).start()

    def _run_clock(self) -> None:
        """Draw the bar's clock while no step ends: a load or a decode may take long."""
        while not self._over.wait(0.5):
            self._bar.refresh()

    def phase(self, name: str) -> None:
        """A phase begins."""
        self._bar.set_description(PHASES.get(name, name))

    def step(self, step: Step) -> None:
        self._bar.update()

    def view(self, view: Callable[[Step | Picture], None] | None, event: Step | Picture) -> None:
        """Draw an event, while the bar is out of the way."""
        if view:
            with self._bar.external_write_mode():
                view(event)

    def note(self, text: str) -> None:
        if not self.quiet:
            note(text)

    def picture(self, file: str | None, seed: int | None, prompt: str | None) -> None:
        self.done += 1

    def failed(self, where: str, error: str) -> None:
        note(f"error: {where}: {error}")

    def end(self, failed: int, phases: Mapping[str, float]) -> None:
        """The summary, where there is more to tell than one picture's name."""
        self.close()
        if self.quiet:
            return
        seconds = time.perf_counter() - self.start
        made = f"{self.done} of {self.pictures}" if self.done < self.pictures else str(self.done)
        told = ", ".join(f"{phase} {took:.1f}" for phase, took in phases.items())
        tail = f"; {failed} failed" if failed else ""
        peak = f"; peak memory {mx.get_peak_memory() / 1e9:.2f} GB"
        note(f"{made} picture{'s' * (self.pictures != 1)} in {seconds:.1f} s ({told}){peak}{tail}")

    def close(self) -> None:
        self._over.set()
        self._bar.close()


class JsonProgress(Progress):
    """The same for programs."""

    def __init__(self, pictures: int, steps: int, quiet: bool = False):
        super().__init__(pictures, steps, quiet=True)
        self._phase = ""
        self._tell("start", pictures=pictures, steps=steps)

    def _tell(self, event: str, **values: Any) -> None:
        seconds = round(time.perf_counter() - self.start, 3)
        note(json_line({"event": event, "seconds": seconds, **values}))

    def phase(self, name: str) -> None:
        if name != self._phase:
            self._phase = name
            self._tell("phase", phase=name)

    def step(self, step: Step) -> None:
        number = {"picture": self.done + 1, "pictures": self.pictures}
        self._tell("step", **number, step=step.index, of=step.of, sigma=round(step.sigma, 6))

    def note(self, text: str) -> None:
        self._tell("note", text=text)

    def picture(self, file: str | None, seed: int | None, prompt: str | None) -> None:
        super().picture(file, seed, prompt)
        self._tell("picture", picture=self.done, pictures=self.pictures, file=file, seed=seed, prompt=prompt)

    def failed(self, where: str, error: str) -> None:
        self._tell("failed", where=where, error=error)

    def end(self, failed: int, phases: Mapping[str, float]) -> None:
        self.close()
        seconds = {phase: round(took, 3) for phase, took in phases.items()}
        self._tell("end", pictures=self.done, failed=failed, phases=seconds)


def pictures(run: Run, quiet: bool, view: Callable[[Step | Picture], None] | None = None) -> Iterator[Picture]:
    """The run's pictures as they are finished, with a progress bar over all steps and the notes as they come.

    view: called with every event, while the bar is out of the way.
    """
    total = run.request.steps * len(run.request.pictures)
    told = 0
    with tqdm(total=total, desc="steps", disable=quiet or not has_bar(sys.stderr), leave=False) as bar:
        for event in run:
            note(*run.notes[told:] if not quiet else ())
            told = len(run.notes)
            if view:
                with bar.external_write_mode():
                    view(event)
            if isinstance(event, Picture):
                yield event
            else:
                bar.update()
