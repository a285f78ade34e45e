"""Jobs into pictures and names for their files: everything is checked and named first, then encoded together, denoised,
decoded and saved.

The text encoder is loaded once for as many prompts as fit in MAX_EMBEDS, and freed before the steps. What fails in a
line of a prompt file is told, and the rest goes on; what fails on the command line ends the run.

Meanwhile there are a bar and notes, or with `--progress json` one JSON object a line on stderr, each with `event` and
`seconds` (since the start):
    start    pictures, steps (of all together)
    phase    phase: load, encode, steps, decode; seconds as above
    step     picture (from 1), pictures, step (from 1), of, sigma
    note     text
    picture  picture, pictures, file (null for stdout), seed, prompt
    failed   where (file:line), error
    end      pictures, failed, phases (seconds of each)
"""

import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from PIL import Image
from tqdm import tqdm

from klein_mlx.cli.options import RunOptions, bits_given, call_arguments, in_options
from klein_mlx.cli.output import has_bar, json_line, note, say, unprinted
from klein_mlx.cli.prompts import Failure, Job
from klein_mlx.cli.terminal import View, viewer
from klein_mlx.errors import KleinError, RequestError, human_bytes
from klein_mlx.images.saving import FORMATS, check_output, encode_image, fits, remove_stale, save_image, save_image_free
from klein_mlx.pipeline import KleinPipeline
from klein_mlx.request import Request, check
from klein_mlx.runtime.run import Picture, Run, Step

MAX_SLUG = 60  # bytes
FIELDS = ("slug", "seed", "index", "date", "time", "model", "steps")
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@dataclass(frozen=True)
class Named:
    """A picture that needs a name. output: as asked for, or None. prompt: what its slug is made of. where: its line."""

    output: Path | None
    prompt: str
    seed: int
    model: str
    steps: int
    where: str | None = None


@dataclass(frozen=True)
class Name:
    """Where a picture goes. free: under this name or the next that is free, since nobody asked for this very one."""

    path: Path
    free: bool


def slug(prompt: str) -> str:
    """The prompt's words, joined by dashes, in at most MAX_SLUG bytes; "picture" if it has none."""
    words = re.sub(r"[^\w]+", "-", prompt[:400].lower()).strip("-")
    while len(words.encode()) > MAX_SLUG:
        words = words[:-1]
    return words.strip("-") or "picture"


def is_template(output: Path) -> bool:
    """Whether an output has fields to fill in."""
    return "{" in str(output) or "}" in str(output)


def check_template(output: Path) -> None:
    """RequestError for a field that is unknown, or a brace that is alone."""
    for match in _FIELD.finditer(str(output)):
        if match[1] is not None and match[1] not in FIELDS:
            raise RequestError(
                f"output {output} has the field {{{match[1]}}}; there are "
                f"{', '.join(f'{{{name}}}' for name in FIELDS)} ({{{{ for a brace)"
            )
    if re.search(r"[{}]", _FIELD.sub("", str(output))):
        raise RequestError(f"output {output} has a brace alone; write {{{{ or }}}} for a brace, {{seed}} for a field")


def fill(output: Path, fields: dict[str, str]) -> Path:
    """A template's path; a field never adds a folder."""

    def value(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        return re.sub(r"[/\\\0]", "-", fields[match[1]])

    path = Path(_FIELD.sub(value, str(output)))
    if ".." in path.parts and ".." not in output.parts:
        raise RequestError(f"output {output} becomes {path}, which leaves its folder; add something to the field")
    return path


def plan_names(wanted: Sequence[Named], suffix: str, overwrite: bool) -> list[Name]:
    """A name for every picture, all different, and checked before any work.

    suffix: of names that nobody chose. Several pictures of one plain output become OUTPUT-SEED, or OUTPUT-NUMBER where
    seeds repeat. Raises RequestError for names that cannot be, or that would be the same.
    """
    now = time.localtime()
    shared = {"date": time.strftime("%Y-%m-%d", now), "time": time.strftime("%H-%M-%S", now)}
    outputs = Counter(one.output for one in wanted)
    seeds = Counter((one.output, one.seed) for one in wanted)
    repeated = {output for (output, _), count in seeds.items() if count > 1}
    plain = [o for o in repeated if o is not None and not is_template(o) and not o.is_dir()]
    if any(len({one.prompt for one in wanted if one.output == output}) == 1 for output in plain):
        raise RequestError("--seed has the same value twice; give different seeds")
    digits = len(str(len(wanted)))
    names: list[Name] = []
    taken: set[Path] = set()
    numbers: Counter[Path | None] = Counter()
    tried: Counter[str] = Counter()
    for index, one in enumerate(wanted, 1):
        try:
            numbers[one.output] += 1
            if one.output is None:
                path = _free(f"{slug(one.prompt)}-{one.seed}", suffix, taken, tried)
            elif one.output.is_dir():
                path = _free(str(one.output / f"{slug(one.prompt)}-{one.seed}"), suffix, taken, tried)
            elif is_template(one.output):
                check_template(one.output)
                own = {"slug": slug(one.prompt), "seed": str(one.seed), "index": f"{index:0{digits}}"}
                path = fill(one.output, {**shared, **own, "model": one.model, "steps": str(one.steps)})
            elif outputs[one.output] == 1:
                path = one.output
            else:
                width = len(str(outputs[one.output]))
                mark = f"{numbers[one.output]:0{width}}" if one.output in repeated else str(one.seed)
                path = one.output.with_name(f"{one.output.stem}-{mark}{one.output.suffix}")
            if path in taken:
                raise RequestError(f"output {path} would hold several pictures; add {{seed}} or {{index}} to the name")
            free = one.output is None or one.output.is_dir()
            check_output(path, overwrite and not free)
            taken.add(path)
            names.append(Name(path, free))
        except RequestError as error:
            raise RequestError(f"{one.where}: {error}") if one.where else error from None
    for folder in {name.path.parent for name in names}:
        remove_stale(folder)
    return names


def _free(stem: str, suffix: str, taken: set[Path], tried: Counter[str]) -> Path:
    """stem.suffix, or the first of stem-2.suffix, ... that does not exist and is not taken.

    tried: how many of a stem's names are known to be taken: equal names would be tried over and over.
    """
    while True:
        tried[stem] += 1
        path = Path(f"{stem}{suffix}" if tried[stem] == 1 else f"{stem}-{tried[stem]}{suffix}")
        if path not in taken and not os.path.lexists(path):
            return path


def free_names(prompt: str, seeds: Sequence[int], suffix: str = ".png") -> list[Path]:
    """slug-seed.png for each, or the first of slug-seed-2.png, ... that does not exist."""
    return [name.path for name in plan_names([Named(None, prompt, seed, "", 0) for seed in seeds], suffix, False)]


# ---- what is told meanwhile ----

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

    def view(self, view: View | None, event: Step | Picture) -> None:
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
        peak = f"; peak memory {human_bytes(mx.get_peak_memory())}"
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


def pictures(run: Run, quiet: bool, view: View | None = None) -> Iterator[Picture]:
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


# ---- pictures ----

MAX_EMBEDS = 1024**3  # bytes of prompts' embeddings that wait at once


@dataclass
class Planned:
    """A job that was found good. request: as checked. names: of its pictures."""

    job: Job
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

    def __init__(
        self,
        pipe: KleinPipeline,
        options: RunOptions,
        jobs: Sequence[Job | Failure],
        saves: bool = True,
        own: slice = slice(None),  # noqa: B008
    ):
        """Checks and names everything. Raises KleinError for what the command line itself asks wrongly.

        saves: False where another process that shares the pictures writes them, and tells of them. own: which of the
        jobs are this process's, where others make the rest.
        """
        self.pipe, self.options, self.made, self.saves = pipe, options, Made(), saves
        self.failures = [job for job in jobs if isinstance(job, Failure)]
        self.planned: list[Planned] = []
        for job in jobs:
            if isinstance(job, Job):
                self._plan(job)
        self.to_stdout = any(str(one.job.options.output) == "-" for one in self.planned)
        if saves:
            self._name()
        self.planned = self.planned[own]
        self.view = viewer(options, pipe) if saves and (options.show or options.show_steps) else None
        self._left = self._chunks()
        self._first = self._open(next(self._left, []))

    @property
    def pictures(self) -> int:
        return sum(len(one.request.pictures) for one in self.planned)

    @property
    def runs(self) -> list[Run]:
        """The runs that are open: those of the first chunk until it is made."""
        return list(self._first)

    def _plan(self, job: Job) -> None:
        try:
            request = check(self.pipe.config, prompt=job.prompt, **call_arguments(job.options, self.pipe.config))
        except KleinError as error:
            self._fail(job, error)
            return
        kind = request.output_type if self.saves else "latent"  # nothing is decoded
        request = replace(request, num_images_per_prompt=1, output_type=kind)  # its seeds are known
        self.planned.append(Planned(job, request))

    def _fail(self, job: Job, error: KleinError) -> None:
        if job.where is None:
            raise error
        self.failures.append(Failure(job.where, error))

    def _name(self) -> None:
        suffix = f".{self.options.format or 'png'}"
        if self.to_stdout:
            if self.pictures > 1:
                raise RequestError(f"-o - writes one picture to stdout, and {self.pictures} are requested")
            if sys.stdout.isatty():
                raise RequestError("-o - writes a picture's bytes, and stdout is a terminal; send it to a file or pipe")
            return
        model = self.pipe.config.variant.name
        wanted = [
            Named(output, job.extra.get("original") or job.prompt, seed, model, one.request.steps, where)
            for one in self.planned
            for job, output in ((one.job, one.job.options.output),)
            for where in (None if output == self.options.output else job.where,)
            for seed in one.request.seeds
        ]
        names = iter(plan_names(wanted, suffix, self.options.force))
        for one in self.planned:
            one.names = [next(names) for _ in one.request.seeds]

    def run(self) -> Made:
        """Make the pictures; files appear as they are finished. Raises KleinError, after which they are still there."""
        options = self.options
        steps = sum(one.request.steps * len(one.request.pictures) for one in self.planned)
        kind = JsonProgress if options.progress_format == "json" and self.saves else Progress
        progress = kind(self.pictures, steps, options.quiet or not self.saves)
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
                runs[self.pipe.start(one.request)] = (one, iter(one.names))
            except KleinError as error:
                self._fail(one.job, error)
        return runs

    def _run_chunk(self, runs: dict[Run, tuple[Planned, Iterator[Name]]], progress: Progress) -> None:
        for run in runs:
            run.on_phase = progress.phase
        told = dict.fromkeys(runs, 0)
        try:
            for run, event in self.pipe.together(list(runs)):
                for line in run.notes[told[run] :]:
                    progress.note(line)
                    self.made.notes.append(line)
                told[run] = len(run.notes)
                progress.view(self.view, event)
                if isinstance(event, Picture):
                    one, names = runs[run]
                    self._save(one, event, None if self.to_stdout else next(names, None), progress)
                else:
                    progress.step(event)
        finally:
            for run in runs:
                for phase, seconds in run.seconds.items():
                    self.made.seconds[phase] += seconds

    def _save(self, one: Planned, picture: Picture, name: Name | None, progress: Progress) -> None:
        if not self.saves:
            return
        options, image = one.job.options, picture.image
        recipe = None if options.no_metadata else {**picture.recipe, **one.job.extra, **bits_given(self.options)}
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
