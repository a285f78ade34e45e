"""`klein-mlx generate`: requests from the options, their pictures into files, their paths on stdout."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klein_mlx.cli.asked import open_pipeline
from klein_mlx.cli.options import add_generate_arguments as add_arguments
from klein_mlx.cli.settings import complete
from klein_mlx.errors import RequestError

if TYPE_CHECKING:
    from klein_mlx.cli.batch import Batch, Made
    from klein_mlx.cli.prompts import Job
    from klein_mlx.pipeline import KleinPipeline

__all__ = ["add_arguments", "make", "run"]


def run(args: argparse.Namespace) -> int:
    """Make the pictures that the parsed options ask for. Returns the exit code; raises KleinError."""
    return make(complete(args))


def make(args: argparse.Namespace, extra: dict[str, Any] | None = None, fingerprint: str | None = None) -> int:
    """The same with options that are complete (`settings.complete`).

    extra: what recipes say besides. fingerprint: of the model that is expected; another is told.
    """
    if args.prompt is None and args.prompt_file is None:
        raise RequestError('no prompt is given; for example: klein-mlx generate "a red fox in the snow"')
    grid = _check_outputs(args)
    from klein_mlx.cli.prompts import Job, read_jobs

    jobs = read_jobs(args)
    for job in jobs:
        if isinstance(job, Job):
            job.extra = {**(extra or {}), **job.extra}
    pipe = open_pipeline(args)
    if fingerprint not in (None, pipe.recorder.fingerprint) and not args.quiet:
        print("the model is not the one that made the picture: its fingerprint differs", file=sys.stderr)
    if args.enhance:
        _enhance(args, [job for job in jobs if isinstance(job, Job)], pipe)
    from klein_mlx.cli.batch import Batch

    batch = Batch(pipe, args, jobs)
    if args.grid and grid in [name.path for one in batch.planned for name in one.names]:
        raise RequestError(f"--grid {grid} is the name of a picture too; give it another")
    _tell(args, batch)
    made = batch.run()
    if grid is not None and made.thumbnails:
        from klein_mlx.cli.terminal import contact_sheet
        from klein_mlx.images.saving import save_image, save_image_free

        sheet = contact_sheet(made.thumbnails)
        made.files.append(str(save_image_free(sheet, grid) if args.grid == "" else grid))
        if args.grid != "":
            save_image(sheet, grid, args.force)
        if not args.json:
            print(made.files[-1], flush=True)
    if args.json:
        print(json.dumps(_report(batch, made)), flush=True)
    return 2 if made.failed else 0


def _enhance(args: argparse.Namespace, jobs: "list[Job]", pipe: "KleinPipeline") -> None:
    """Let a language model rewrite the jobs' prompts; what it made of them is told."""
    import secrets

    from klein_mlx.cli.enhance import enhance_prompts

    for job in jobs:
        job.args.seed = job.args.seed or [secrets.randbits(32)]
    prompts = [(job.prompt, job.args.seed[0]) for job in jobs]
    written, name = enhance_prompts(prompts, pipe.source, args.enhance_model, args.offline)
    for job, text in zip(jobs, written, strict=True):
        job.extra |= {"original": job.prompt, "enhanced_by": name}
        job.prompt = text
        if not args.quiet and args.progress != "json":
            print(f"enhanced: {text}", file=sys.stderr)


def _check_outputs(args: argparse.Namespace) -> Path | None:
    """Refuse what could not be written before a model is looked for; returns where the contact sheet goes, or None."""
    from klein_mlx.cli.naming import check_template, is_template
    from klein_mlx.images.saving import check_output

    output = args.output
    if output is not None and is_template(output):
        check_template(output)
    elif output is not None and str(output) == "-":
        if args.json or args.grid is not None:
            other = "--json" if args.json else "--grid"
            raise RequestError(f"-o - writes the picture to stdout, which {other} needs too; give one of them")
    elif output is not None:
        several = args.count > 1 or len(args.seed or ()) > 1 or args.prompt_file is not None
        check_output(output, args.force or several)
    if args.format is not None and output is not None and str(output) != "-":
        raise RequestError(f"--format is {args.format}, and output {output} has its own suffix; leave --format out")
    if args.grid is None:
        return None
    grid = Path(args.grid or "grid.png")
    check_output(grid, args.force or args.grid == "")
    return grid


def _tell(args: argparse.Namespace, batch: "Batch") -> None:
    """What is worth knowing first: seeds, prompts that were chosen, that a format loses what an edit keeps."""

    def say(line: str) -> None:
        if args.progress != "json" and not args.quiet:
            print(line, file=sys.stderr)

    edits = [one.request.edit for one in batch.planned]
    lossy = [name.path.suffix for one in batch.planned for name in one.names if name.path.suffix.lower() != ".png"]
    if lossy and any(edit and (edit.mask_image is not None or edit.extends) for edit in edits):
        say(f"{lossy[0]} changes every pixel a little; .png keeps those that are not painted exactly")
    jobs: list[Job] = [one.job for one in batch.planned]
    for job in jobs:
        if "template" in job.extra and job.prompt != job.extra["template"]:
            say(f"prompt: {job.prompt}")
    if args.prompt_file is not None:
        return
    seeds = [seed for one in batch.planned for seed in one.request.seeds]
    line = f"seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}"
    untold = args.seed is None and args.output is not None and not args.json  # by no name, option or result
    if args.quiet and untold and args.progress != "json":
        print(line, file=sys.stderr)
    say(line)


def _report(batch: "Batch", made: "Made") -> dict[str, Any]:
    import mlx.core as mx

    return {
        "files": made.files,
        "seeds": made.seeds,
        "prompts": made.prompts,
        "model": batch.pipe.config.variant.name,
        "steps": batch.planned[0].request.steps if batch.planned else None,
        "keep": batch.pipe.parts.keep,
        "loras": [asdict(lora) for lora in batch.pipe.loras],
        "notes": made.notes,
        "failed": made.failed,
        "seconds": {phase: round(seconds, 3) for phase, seconds in made.seconds.items()},
        "peak_memory": mx.get_peak_memory(),
    }
