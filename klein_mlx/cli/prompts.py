"""Many prompts: a file's lines, each a prompt or a JSON object of options, as jobs with their seeds and wildcards.

A bad line becomes a failure that names file and line; the others go on.
"""

import argparse
import json
import secrets
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from klein_mlx.cli.settings import PER_RUN, config_folder, join, option_value, options_table
from klein_mlx.cli.wildcards import expand, is_template
from klein_mlx.errors import KleinError, RequestError, nearest
from klein_mlx.request import MAX_PROMPT, MAX_SEED

MAX_LINE = 4 * MAX_PROMPT + 100_000  # bytes


@dataclass
class Job:
    """One request. args: its options, complete. prompt: as the model gets it. extra: what its recipe says besides.
    where: file and line, or None for the command line's own."""

    args: argparse.Namespace
    prompt: str
    where: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A line, or a request, that cannot be done."""

    where: str
    error: KleinError


def read_jobs(args: argparse.Namespace) -> list[Job | Failure]:
    """What the options ask for, in order.

    A prompt that varies makes a job for every seed, any other one job with all of its seeds. Raises RequestError for
    what concerns all of them, and for the command line's own prompt.
    """
    if args.prompt is not None and args.prompt_file is not None:
        raise RequestError("a prompt and --prompt-file are given; give one of them")
    if args.prompt_file is None:
        return list(_vary(args, None))
    jobs: list[Job | Failure] = []
    for where, line in _lines(args.prompt_file):
        try:
            jobs += _vary(_line_args(args, line), where)
        except RequestError as error:
            jobs.append(Failure(where, error))
    if not jobs:
        raise RequestError(f"--prompt-file {args.prompt_file} has no prompt; it must have one a line")
    return jobs


def _lines(name: str) -> Iterator[tuple[str, str | RequestError]]:
    """(file:line, text) of every line that is neither empty nor a comment; an error in place of one that is no text."""
    shown = "stdin" if name == "-" else name
    try:
        file = sys.stdin.buffer if name == "-" else Path(name).open("rb")
    except OSError as error:
        raise RequestError(f"--prompt-file {name} cannot be read: {error.strerror}") from None
    with file:
        number = 0
        while content := file.readline(MAX_LINE + 1):
            number += 1
            where = f"{shown}:{number}"
            if len(content) > MAX_LINE:
                yield where, RequestError(f"the line has over {MAX_LINE} bytes")
                while content and not content.endswith(b"\n"):
                    content = file.readline(MAX_LINE + 1)
                continue
            try:
                line = content.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                yield where, RequestError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8")
                continue
            if line and not line.startswith("#"):
                yield where, line


def _line_args(args: argparse.Namespace, line: str | RequestError) -> argparse.Namespace:
    """The options of one line, over those of the run."""
    if isinstance(line, RequestError):
        raise line
    if not line.startswith("{"):
        return argparse.Namespace(**{**vars(args), "prompt": line})
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        if '"' not in line.partition(":")[0]:  # a prompt that begins with a choice: {red|blue} ...
            return argparse.Namespace(**{**vars(args), "prompt": line})
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        column = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise RequestError(f"the line is no JSON object: {reason}{column}") from None
    if not isinstance(values.get("prompt"), str):
        raise RequestError("the line has no prompt; it must be a text under the key prompt")
    return argparse.Namespace(**join_line(vars(args), _line_values(values)))


def _line_values(values: Mapping[str, Any]) -> dict[str, Any]:
    table, read = options_table(), {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name in PER_RUN or name == "preset":
            raise RequestError(f"{key} is of the whole run; give it on the command line")
        if name not in table:
            known = [option for option in table if option not in PER_RUN]
            near = nearest(name, known)
            raise RequestError(f"{key[:60]} is unknown" + (f"; did you mean {near}?" if near else ""))
        if value is not None:
            read[name] = option_value(name, table[name], value)
    output = read.get("output")
    if output is not None and (output.is_absolute() or ".." in output.parts):
        raise RequestError(f"output is {str(output)[:60]!r}; a line's output must stay below the current folder")
    return read


def join_line(args: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A line's options over those of the run, which keep what the line replaces out."""
    return {**dict.fromkeys(args), **join(values, args)}


def _vary(args: argparse.Namespace, where: str | None) -> Iterator[Job]:
    template = args.prompt
    odd = not 1 <= args.count <= 1000 or len(args.seed or ()) > 1 < args.count  # for the request to refuse
    odd = odd or not all(0 <= seed <= MAX_SEED for seed in args.seed or ())
    if odd or args.no_wildcards or not isinstance(template, str) or not is_template(template):
        yield Job(args, template, where)
        return
    folders = [Path("wildcards")]
    if "wildcards" in args.settings.folders:
        folders.append(args.settings.folders["wildcards"])
    if own := config_folder():
        folders.append(own / "wildcards")
    for seed in _seeds(args):
        own_args = argparse.Namespace(**{**vars(args), "seed": [seed], "count": 1})
        prompt = expand(template, seed, folders)
        extra = {"template": template} if prompt != template else {}
        yield Job(own_args, prompt, where, extra)


def _seeds(args: argparse.Namespace) -> list[int]:
    """Every picture's seed, as the request numbers them."""
    seeds = args.seed or [secrets.randbits(32)]
    return list(seeds) if len(seeds) > 1 else list(range(seeds[0], seeds[0] + args.count))
