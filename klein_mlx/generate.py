"""`klein-mlx generate`: a request from the options, its pictures into files, their paths on stdout."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klein_mlx.asked import call_arguments, open_pipeline
from klein_mlx.errors import RequestError
from klein_mlx.options import add_generate_arguments as add_arguments

if TYPE_CHECKING:
    from klein_mlx.events import Run
    from klein_mlx.pipeline import KleinPipeline

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Make the pictures that the parsed options ask for. Returns the exit code; raises KleinError."""
    if args.prompt is None:
        raise RequestError('no prompt is given; for example: klein-mlx generate "a red fox in the snow"')
    if args.output is not None:
        from klein_mlx.saving import check_output

        check_output(args.output, args.force or args.count > 1 or len(args.seed or ()) > 1)
    pipe = open_pipeline(args)
    run = pipe.stream(args.prompt, **call_arguments(args))
    paths = _paths(args, run)
    _tell(args, run, paths)
    files = []
    from klein_mlx.progress import pictures
    from klein_mlx.saving import save_image, save_image_free
    from klein_mlx.viewing import viewer

    for image, path in zip(pictures(run, args.quiet, viewer(args, pipe)), paths, strict=True):
        if args.output is None:
            path = save_image_free(image, path)
        else:
            save_image(image, path, args.force)
        files.append(str(path))
        if not args.json:
            print(path, flush=True)
    if args.json:
        print(json.dumps(_report(pipe, run, files)), flush=True)
    return 0


def _paths(args: argparse.Namespace, run: "Run") -> list[Path]:
    from klein_mlx.naming import free_names, output_paths

    seeds = [seed for _, seed in run.request.pictures]
    if args.output is None:
        return free_names(args.prompt, seeds)
    return output_paths(args.output, seeds, args.force)


def _tell(args: argparse.Namespace, run: "Run", paths: list[Path]) -> None:
    """What is worth knowing before the work: the seeds, and that a format loses what an edit keeps."""
    edit = run.request.edit
    lossy = [path.suffix for path in paths if path.suffix.lower() != ".png"]
    if edit and (edit.mask_image is not None or edit.extends) and lossy and not args.quiet:
        words = f"{lossy[0]} changes every pixel a little; .png keeps those that are not painted exactly"
        print(words, file=sys.stderr)
    seeds = ", ".join(str(seed) for seed in run.request.seeds)
    untold = args.seed is None and args.output is not None and not args.json  # by no name, option or result
    if not args.quiet or untold:
        print(f"seed {seeds}" if len(run.request.seeds) == 1 else f"seeds {seeds}", file=sys.stderr)


def _report(pipe: "KleinPipeline", run: "Run", files: list[str]) -> dict[str, Any]:
    import mlx.core as mx

    return {
        "files": files,
        "seeds": [seed for _, seed in run.request.pictures],
        "model": pipe.config.variant.name,
        "steps": run.request.steps,
        "keep": pipe.parts.keep,
        "loras": [asdict(lora) for lora in pipe.loras],
        "notes": run.notes,
        "seconds": {phase: round(seconds, 3) for phase, seconds in run.seconds.items()},
        "peak_memory": mx.get_peak_memory(),
    }
