"""`klein-mlx generate`: requests from the options, their pictures into files, their paths on stdout."""

import argparse
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klein_mlx.cli.options import IMAGES, RunOptions, asked_bits, asked_loras, lora_options, typed_options
from klein_mlx.cli.options import add_generate_arguments as add_arguments
from klein_mlx.cli.output import note, say, say_json
from klein_mlx.cli.settings import complete
from klein_mlx.config import PARTS
from klein_mlx.errors import KleinError, RequestError

if TYPE_CHECKING:
    from klein_mlx.cli.batch import Batch, Made
    from klein_mlx.cli.prompts import Failure, Job
    from klein_mlx.pipeline import KleinPipeline
    from klein_mlx.runtime.distributed import Group

__all__ = ["add_arguments", "make", "run"]


def run(args: argparse.Namespace) -> int:
    """Make the pictures that the parsed options ask for. Returns the exit code; raises KleinError."""
    return make(complete(typed_options(args)))


def make(options: RunOptions, extra: dict[str, Any] | None = None, model: Mapping[str, Any] | None = None) -> int:
    """The same with options that are complete (`settings.complete`).

    extra: what recipes say besides. model: what a recipe says of its model; the user is told if this is another.
    """
    if options.prompt is None and options.prompt_file is None:
        if options.grid and not options.grid.lower().endswith(IMAGES):
            raise RequestError(
                f"--grid took {options.grid[:60]!r} for the sheet's file; put the prompt before it, or --grid=FILE"
            )
        raise RequestError('no prompt is given; for example: klein-mlx generate "a red fox in the snow"')
    group = _group()
    if group and group.rank and options.prompt_file is None:  # the first process tells and saves
        options = replace(options, quiet=True, json=False, output=None, grid=None, open=False)
    grid = _check_outputs(options)
    with _together(group):
        jobs, pipe = _opened(options, extra, model or {})
    batch = _batch(options, jobs, pipe, group)
    with _together(group):
        if options.grid and grid in [name.path for one in batch.planned for name in one.names]:
            raise RequestError(f"--grid {grid} is the name of a picture too; give it another")
    if batch.saves:
        _tell(options, batch)
    made = batch.run()
    if grid is not None and made.thumbnails:
        from klein_mlx.cli.terminal import contact_sheet
        from klein_mlx.images.saving import save_image, save_image_free

        sheet = contact_sheet(made.thumbnails)
        made.files.append(str(save_image_free(sheet, grid) if options.grid == "" else grid))
        if options.grid != "":
            save_image(sheet, grid, options.force)
        if not options.json:
            say(made.files[-1])
    if options.open and made.files:
        open_files(made.files)
    if options.json:
        say_json(_report(batch, made))
    return 2 if made.failed else 0


def _opened(
    options: RunOptions, extra: dict[str, Any] | None, model: Mapping[str, Any]
) -> "tuple[list[Job | Failure], KleinPipeline]":
    from klein_mlx.cli.prompts import Job, read_jobs

    jobs = read_jobs(options)
    for job in jobs:
        if isinstance(job, Job):
            job.extra = {**(extra or {}), **job.extra}
    pipe = open_pipeline(options)
    if model and not options.quiet:
        _compare(model, pipe, options)
    if options.enhance:
        _enhance(options, [job for job in jobs if isinstance(job, Job)], pipe)
    return jobs, pipe


def _compare(model: Mapping[str, Any], pipe: "KleinPipeline", options: RunOptions) -> None:
    """Tell where the model is not the one of a recipe, or opened as another variant: steps and guidance stay."""
    own, fingerprint, variant = pipe.recorder.model, model.get("fingerprint"), model.get("opened_as")
    if isinstance(fingerprint, str) and fingerprint != own["fingerprint"]:
        note("the model is not the one that made the picture: its fingerprint differs")
    elif isinstance(variant, str) and variant != own.get("opened_as"):
        note(f"the picture was made with --variant {variant}")
    new, steps, guidance = pipe.config.variant, options.num_inference_steps, options.guidance_scale
    if model.get("variant") not in (None, new.name) and (steps, guidance) != (new.steps, new.guidance):
        kept = [f"{steps} steps"] * bool(steps) + [f"guidance {guidance:g}"] * bool(guidance)
        if kept:
            note(f"made with {' and '.join(kept)}; {new.name}'s own are {new.steps} and {new.guidance:g}")


# ---- several machines ----


def _group() -> "Group | None":
    """The processes of mlx.launch, if that started this one."""
    if "MLX_RANK" not in os.environ:
        return None
    from klein_mlx.runtime.distributed import Group

    group = Group("any")
    return group if group.size > 1 else None


@contextmanager
def _together(group: "Group | None") -> Iterator[None]:
    """What every process must be able to do; where one is not, it says why, and the others end."""
    failed: KleinError | None = None
    try:
        yield
    except KleinError as error:
        failed = error
    if group and group.agree(failed is not None) and failed is None:
        from klein_mlx.runtime.distributed import LostPeer

        raise LostPeer(f"rank {group.rank}: another machine failed; its error says why")
    if failed:
        raise failed


def _batch(options: RunOptions, jobs: "list[Job | Failure]", pipe: "KleinPipeline", group: "Group | None") -> "Batch":
    """Everything checked and named: a prompt file's lines are dealt out, other pictures are made by all together."""
    from klein_mlx.cli.batch import Batch

    if group is None:
        return Batch(pipe, options, jobs)
    if options.prompt_file is not None:
        with _together(group):
            batch = Batch(pipe, options, jobs, own=slice(group.rank, None, group.size))
        note(f"rank {group.rank} of {group.size}: {len(batch.planned)} of {len(jobs)} lines")
        return batch
    import secrets

    from klein_mlx.cli.prompts import Job
    from klein_mlx.paths import version

    asked = [job for job in jobs if isinstance(job, Job)]
    told = [(job.prompt, job.options.seeds or [secrets.randbits(32)]) for job in asked]
    model, told = group.share((f"{pipe.recorder.fingerprint}, klein_mlx {version()}", told))
    with _together(group):
        for job, (prompt, seeds) in zip(asked, told, strict=True):
            job.prompt, job.options = prompt, replace(job.options, seed=seeds)
        if model != f"{pipe.recorder.fingerprint}, klein_mlx {version()}":
            raise RequestError(f"rank {group.rank} has another model, or another klein_mlx, than rank 0")
        pipe.peers = group.peers
        batch = Batch(pipe, options, jobs, saves=group.rank == 0)
    if group.rank == 0 and not options.quiet:
        sent = max((pipe.sent(run) for run in batch.runs), default=0)
        note(f"{group.size} processes share each picture; a step sends {sent / 1e6:.3g} MB from each")
    return batch


def open_pipeline(options: RunOptions) -> "KleinPipeline":
    """The model that the options name, opened, and downloaded first if the user agrees. Raises KleinError."""
    from klein_mlx.formats.open import SMALL_DECODER, on_disk
    from klein_mlx.pipeline import KleinPipeline
    from klein_mlx.runtime.parts import described

    if options.small_decoder and options.vae:
        raise RequestError("--small-decoder and --vae both name a VAE; give one of them")
    if options.quiet:
        logging.getLogger("klein_mlx").setLevel(logging.ERROR)
    parts = {part: getattr(options, part) for part in PARTS}
    parts["vae"] = SMALL_DECODER if options.small_decoder else options.vae
    model = on_disk(options.model, options.models, options.revision)
    if model is None or any(parts.values()):
        model, parts = _obtained(options, parts)
    pipe = KleinPipeline.from_pretrained(
        model,
        quantize=asked_bits(options),
        dtype=options.dtype,
        keep=options.keep,
        prompt_cache=options.prompt_cache,
        revision=None if os.path.exists(model) else options.revision,  # a file of the Hub's is a path by now
        local_files_only=options.offline,
        **parts,
        variant=options.variant,
    )
    for path, scale in asked_loras(options.lora):
        loaded = pipe.load_lora(path, scale, **lora_options(options))
        if not options.quiet:
            note(described(pipe.parts.loras.get(loaded.name), loaded))
    return pipe


def _obtained(options: RunOptions, parts: Mapping[str, str | None]) -> tuple[str, dict[str, str | None]]:
    """The model, and the parts in place of its own, as `open_model` takes them once they are on this disk."""
    from klein_mlx.cli.download import Consent, obtain, obtain_part

    told: dict[str, Any] = {"own": options.models, "consent": Consent(options.offline, options.yes, options.quiet)}
    needed = [part for part, value in parts.items() if not value]
    model = obtain(options.model, revision=options.revision, parts=needed, **told)
    return model, {part: value and obtain_part(part, value, **told) for part, value in parts.items()}


def _enhance(options: RunOptions, jobs: "list[Job]", pipe: "KleinPipeline") -> None:
    """Let a language model rewrite the jobs' prompts; what it made of them is told."""
    import secrets

    from klein_mlx.cli.enhance import enhance_prompts

    for job in jobs:
        job.options = replace(job.options, seed=job.options.seeds or [secrets.randbits(32)])
    prompts = [(job.prompt, job.options.seeds[0]) for job in jobs]
    written, name = enhance_prompts(prompts, pipe.source, options.enhance_model, options.offline)
    for job, text in zip(jobs, written, strict=True):
        job.extra |= {"original": job.prompt, "enhanced_by": name}
        job.prompt = text
        if not options.quiet and options.progress_format != "json":
            note(f"enhanced: {text}")


def _check_outputs(options: RunOptions) -> Path | None:
    """Refuse what could not be written before a model is looked for; returns where the contact sheet goes, or None."""
    from klein_mlx.cli.batch import check_template, is_template
    from klein_mlx.images.saving import check_output

    output = options.output
    if output is not None and is_template(output):
        check_template(output)
    elif output is not None and str(output) == "-":
        if options.json or options.grid is not None:
            other = "--json" if options.json else "--grid"
            raise RequestError(f"-o - writes the picture to stdout, which {other} needs too; give one of them")
    elif output is not None and not output.is_dir():
        several = options.num_images_per_prompt > 1 or len(options.seeds) > 1 or options.prompt_file is not None
        check_output(output, options.force or several)
    if options.format is not None and output is not None and str(output) != "-" and not output.is_dir():
        raise RequestError(f"--format is {options.format}, and output {output} has its own suffix; leave --format out")
    if options.grid is None:
        return None
    grid = Path(options.grid or "grid.png")
    check_output(grid, options.force or options.grid == "")
    return grid


def open_files(files: Sequence[str]) -> None:
    """Show files in the system's viewer; a note where there is none."""
    program = "open" if sys.platform == "darwin" else "xdg-open"
    calls = [[program, *files]] if program == "open" else [[program, file] for file in files]
    for call in calls:
        try:
            subprocess.run(call, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except OSError as error:
            note(f"--open: {program} cannot be run: {error.strerror}")
            return


def _tell(options: RunOptions, batch: "Batch") -> None:
    """What is worth knowing first: seeds, prompts that were chosen, that a format loses what an edit keeps."""
    if options.quiet or options.progress_format == "json":
        return
    edits = [one.request.edit for one in batch.planned]
    lossy = [name.path.suffix for one in batch.planned for name in one.names if name.path.suffix.lower() != ".png"]
    if lossy and any(edit and (edit.mask_image is not None or edit.extends) for edit in edits):
        note(f"{lossy[0]} changes every pixel a little; .png keeps those that are not painted exactly")
    for one in batch.planned:
        if "template" in one.job.extra and one.job.prompt != one.job.extra["template"]:
            note(f"prompt: {one.job.prompt}")
    if options.prompt_file is not None:
        return
    seeds = [seed for one in batch.planned for seed in one.request.seeds]
    note(f"seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}")


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
