"""Pictures and sketches drawn in the terminal while a run works: what `--show` and `--show-steps` ask for."""

import argparse
import sys
from collections.abc import Callable

from klein_mlx.events import Picture, Step
from klein_mlx.pipeline import KleinPipeline

View = Callable[[Step | Picture], None]
_SKETCH_COLUMNS = 24


def viewer(args: argparse.Namespace, pipe: KleinPipeline) -> View | None:
    """What draws a run's events on stdout; None if nothing is to be shown, or nothing can be: stdout is no terminal,
    or one without pictures and colours."""
    if not (args.show or args.show_steps) or args.quiet or args.json or str(args.output) == "-":
        return None
    import os

    from klein_mlx.terminal import protocol

    if not sys.stdout.isatty() or protocol(os.environ) is None:
        return None
    if args.show_steps:
        keep_sketches(pipe)
    return view_of(True, args.show_steps)


def view_of(pictures: bool, steps: bool) -> View | None:
    """Draws finished pictures, or sketches after each step but the last too; None if neither."""
    from klein_mlx.terminal import show

    def view(event: Step | Picture) -> None:
        if isinstance(event, Picture):
            show(event.image, sys.stdout)
        elif steps and event.index < event.of and (sketch := event.sketch()):
            show(sketch, sys.stdout, _SKETCH_COLUMNS)

    return view if pictures else None


def keep_sketches(pipe: KleinPipeline) -> None:
    """Let the model's sketches use, and keep, what earlier pictures taught."""
    from klein_mlx.places import cache_folder
    from klein_mlx.sketch import Sketcher

    folder = cache_folder()
    pipe.sketcher = Sketcher(pipe.source, folder / "sketches" if folder else None)
