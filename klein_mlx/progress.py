"""A run while it works, as a user sees it: a bar over all steps, notes as they come, the pictures as they are done."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from klein_mlx.events import Picture, Run, Step
from klein_mlx.terminal import has_bar


def pictures(run: Run, quiet: bool, view: Callable[[Step | Picture], None] | None = None) -> Iterator[Any]:
    """The run's images as they are finished, with a progress bar over all steps and the notes as they come.

    view: called with every event, while the bar is out of the way.
    """
    total = run.request.steps * len(run.request.pictures)
    told = 0
    with tqdm(total=total, desc="steps", disable=quiet or not has_bar(sys.stderr), leave=False) as bar:
        for event in run:
            for note in run.notes[told:]:
                bar.write(note, file=sys.stderr) if not quiet else None
            told = len(run.notes)
            if view:
                with bar.external_write_mode():
                    view(event)
            if isinstance(event, Picture):
                yield event.image
            else:
                bar.update()
