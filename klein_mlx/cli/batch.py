"""Jobs into pictures: everything is checked and named first, then encoded together, denoised, decoded and saved.

The text encoder is loaded once for as many prompts as fit in MAX_EMBEDS, and freed before the steps. What fails in a
line of a prompt file is told, and the rest goes on; what fails on the command line ends the run.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from klein_mlx.cli.naming import Name, Named, plan_names
from klein_mlx.cli.options import BITS, RunOptions, call_arguments, in_options
from klein_mlx.cli.output import say, unprinted
from klein_mlx.cli.progress import JsonProgress, Progress
from klein_mlx.cli.prompts import Failure, Job
from klein_mlx.cli.terminal import viewer
from klein_mlx.errors import KleinError, RequestError
from klein_mlx.images.metadata import fits
from klein_mlx.images.saving import FORMATS, encode_image, save_image, save_image_free
from klein_mlx.pipeline import KleinPipeline
from klein_mlx.request import Request, check
from klein_mlx.runtime.run import Picture, Run

MAX_EMBEDS = 1024**3  # bytes of prompts' embeddings that wait at once


@dataclass
class Planned:
    """A job that was found good. request: its first check, which has the seeds. names: of its pictures."""

    job: Job
    arguments: dict[str, Any]
    request: Request
    names: list[Name] = field(default_factory=list)


@dataclass
class Made:
    """What a batch has done. files: in order. thumbnails: for a contact sheet, if one was asked for."""

    files: list[str] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)
    prompts: list[str | None] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("load", "encode", "steps", "decode"), 0.0))
    thumbnails: list[tuple[Image.Image, str]] = field(default_factory=list)


class Batch:
    """The pictures that a command's jobs ask for."""

    def __init__(self, pipe: KleinPipeline, options: RunOptions, jobs: Sequence[Job | Failure]):
        """Checks and names everything. Raises KleinError for what the command line itself asks wrongly."""
        self.pipe, self.options, self.made = pipe, options, Made()
        self.failures = [job for job in jobs if isinstance(job, Failure)]
        self.planned: list[Planned] = []
        for job in jobs:
            if isinstance(job, Job):
                self._plan(job)
        self.to_stdout = any(str(one.job.options.output) == "-" for one in self.planned)
        self._name()
        self.view = viewer(options, pipe)
        self._left = self._chunks()
        self._first = self._open(next(self._left, []))

    @property
    def pictures(self) -> int:
        return sum(len(one.request.pictures) for one in self.planned)

    def _plan(self, job: Job) -> None:
        try:
            arguments = call_arguments(job.options, self.pipe.config)
            request = check(self.pipe.config, prompt=job.prompt, **arguments)
        except KleinError as error:
            self._fail(job, error)
            return
        arguments |= {"seed": list(request.seeds), "num_images_per_prompt": 1}
        self.planned.append(Planned(job, arguments, request))

    def _fail(self, job: Job, error: KleinError) -> None:
        if job.where is None:
            raise error
        self.failures.append(Failure(job.where, error))

    def _name(self) -> None:
        suffix = f".{self.options.format or 'png'}"
        if self.to_stdout:
            if self.pictures > 1:
                raise RequestError(f"-o - writes one picture to stdout, and {self.pictures} are asked for")
            if sys.stdout.isatty():
                raise RequestError("-o - writes a picture's bytes, and stdout is a terminal; send it to a file or pipe")
            return
        model = self.pipe.config.variant.name
        wanted = [
            Named(job.options.output, job.extra.get("original") or job.prompt, seed, model, one.request.steps)
            for one in self.planned
            for job in (one.job,)
            for seed in one.request.seeds
        ]
        names = iter(plan_names(wanted, suffix, self.options.force))
        for one in self.planned:
            one.names = [next(names) for _ in one.request.seeds]

    def run(self) -> Made:
        """Make the pictures; files appear as they are finished. Raises KleinError, after which they are still there."""
        options = self.options
        steps = sum(one.request.steps * len(one.request.pictures) for one in self.planned)
        kind = JsonProgress if options.progress_format == "json" else Progress
        progress = kind(self.pictures, steps, options.quiet)
        try:
            self._run_chunk(self._first, progress)
            for chunk in self._left:
                self._run_chunk(self._open(chunk), progress)
        finally:
            for failure in self.failures:
                words = in_options(failure.error)
                progress.failed(failure.where, words)
                self.made.failed.append({"where": failure.where, "error": words})
            progress.end(len(self.failures), self.made.seconds)
        return self.made

    def _chunks(self) -> Iterator[list[Planned]]:
        """Jobs whose embeddings fit in memory together."""
        config = self.pipe.config
        bytes_each = config.transformer.joint_attention_dim * self.pipe.dtype.size
        chunk: list[Planned] = []
        size = 0
        for one in self.planned:
            own = bytes_each * one.request.max_sequence_length
            if chunk and size + own > MAX_EMBEDS:
                yield chunk
                chunk, size = [], 0
            chunk.append(one)
            size += own
        if chunk:
            yield chunk

    def _open(self, chunk: list[Planned]) -> dict[Run, tuple[Planned, Iterator[Name]]]:
        """The chunk's runs, their pictures opened, with the names that theirs get."""
        runs: dict[Run, tuple[Planned, Iterator[Name]]] = {}
        for one in chunk:
            try:
                runs[self.pipe.stream(one.job.prompt, **one.arguments)] = (one, iter(one.names))
            except KleinError as error:
                self._fail(one.job, error)
        return runs

    def _run_chunk(self, runs: dict[Run, tuple[Planned, Iterator[Name]]], progress: Progress) -> None:
        for run in runs:
            run.on_phase = progress.phase
        told = dict.fromkeys(runs, 0)
        try:
            for run, event in self.pipe.together(list(runs)):
                for note in run.notes[told[run] :]:
                    progress.note(note)
                    self.made.notes.append(note)
                told[run] = len(run.notes)
                progress.view(self.view, event)
                if isinstance(event, Picture):
                    one, names = runs[run]
                    self._save(one, event, None if self.to_stdout else next(names), progress)
                else:
                    progress.step(event)
        finally:
            for run in runs:
                for phase, seconds in run.seconds.items():
                    self.made.seconds[phase] += seconds

    def _save(self, one: Planned, picture: Picture, name: Name | None, progress: Progress) -> None:
        options, image = one.job.options, picture.image
        recipe = None if options.no_metadata else {**picture.recipe, **one.job.extra, **self._bits()}
        if name is None:
            suffix = f".{options.format or 'png'}"
            self._to_stdout(encode_image(image, suffix, recipe))
            path = None
        else:
            suffix = name.path.suffix.lower()
            path = save_image_free(image, name.path, recipe) if name.free else name.path
            if not name.free:
                save_image(image, path, options.force, recipe)
        if recipe and not fits(FORMATS[suffix], recipe):
            progress.note(f"the recipe is too long for {suffix}; .png or .webp would hold it")
        self._tell(path, picture, progress)

    def _to_stdout(self, content: bytes) -> None:
        try:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise unprinted(error) from None

    def _bits(self) -> dict[str, Any]:
        """How the weights' bits were asked for, in the words of the options."""
        return {name: value for name in BITS if (value := getattr(self.options, name))}

    def _tell(self, path: Path | None, picture: Picture, progress: Progress) -> None:
        made = self.made
        if path is not None:
            made.files.append(str(path))
        made.seeds.append(picture.seed)
        made.prompts.append(picture.prompt)
        if self.options.grid is not None:
            small = picture.image.copy()
            small.thumbnail((512, 512), Image.Resampling.LANCZOS)
            made.thumbnails.append((small, f"seed {picture.seed}"))
        if path is not None and not self.options.json:
            say(str(path))
        progress.picture(None if path is None else str(path), picture.seed, picture.prompt)
