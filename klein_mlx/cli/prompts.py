"""Many prompts: a file's lines, each a prompt or a JSON object of options, as jobs with their seeds and wildcards.

A bad line becomes a failure that names file and line; the others go on.

Prompts vary by `{red|blue}`, `{2::red|blue}`, and `__colors__`, a line of colors.txt. A picture's choices are drawn
from its seed, from left to right, an outer choice before what stands inside it: the same template with the same seed
and files gives the same prompt, alone or among others. Braces without a bar between them are text, so that prompts in
JSON stay as they are; `\\{`, `\\|`, `\\}` and `\\_` are text everywhere in a template.
"""

import json
import os
import random
import re
import secrets
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from klein_mlx.cli.options import KEYS, TABLE, RunOptions
from klein_mlx.cli.settings import join, option_value
from klein_mlx.errors import KleinError, RequestError, nearest
from klein_mlx.options import MAX_IMAGES, MAX_PROMPT, MAX_SEED

MAX_LINE = 4 * MAX_PROMPT + 100_000  # bytes
NO_LINES = (".toml", ".yaml", ".yml", ".csv", ".tsv")  # their lines would be taken for prompts
MAX_BYTES = 1 << 28  # of a whole prompt file


@dataclass
class Job:
    """One request. options: complete. prompt: as the model gets it. extra: what its recipe says besides.
    where: file and line, or None for the command line's own."""

    options: RunOptions
    prompt: str
    where: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A line, or a request, that cannot be done."""

    where: str
    error: KleinError


def read_jobs(options: RunOptions) -> list[Job | Failure]:
    """What the options ask for, in order.

    A prompt that varies makes a job for every seed, any other one job with all of its seeds. Raises RequestError for
    what concerns all of them, and for the command line's own prompt.
    """
    if options.prompt is not None and options.prompt_file is not None:
        raise RequestError("a prompt and --prompt-file are given; give one of them")
    if options.prompt_file is None:
        return list(_vary(options, None))
    jobs: list[Job | Failure] = []
    for where, line in _lines(options.prompt_file):
        try:
            jobs += _vary(_line_options(options, line), where)
        except RequestError as error:
            jobs.append(Failure(where, error))
    if not jobs:
        raise RequestError(f"--prompt-file {options.prompt_file} has no prompt; it must have one per line")
    return jobs


def _lines(name: str) -> Iterator[tuple[str, str | RequestError]]:
    """(file:line, text) of every line that is neither empty nor a comment; an error in place of one that is no text."""
    shown = "stdin" if name == "-" else name
    if name.lower().endswith(NO_LINES):
        raise RequestError(f"--prompt-file {name} is not read; it must have one prompt per line, or be JSONL")
    try:
        if name != "-" and (stat.S_ISCHR(mode := os.stat(name).st_mode) or stat.S_ISBLK(mode)):
            raise RequestError(f"--prompt-file {name} is a device; it must be a file, or - for stdin")
        file = sys.stdin.buffer if name == "-" else Path(name).open("rb")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RequestError(f"--prompt-file {name} cannot be read: {reason}") from None
    with file:
        number = size = 0
        while content := file.readline(MAX_LINE + 1):
            number += 1
            size = _counted(size, content, shown)
            where = f"{shown}:{number}"
            if len(content) > MAX_LINE:
                yield where, RequestError(f"the line has over {MAX_LINE} bytes")
                while content and not content.endswith(b"\n"):
                    content = file.readline(MAX_LINE + 1)
                    size = _counted(size, content, shown)
                continue
            try:
                line = content.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                yield where, RequestError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8")
                continue
            if _ARRAY.match(line):
                raise RequestError(f"{where}: a JSON array is not read; write one object per line, without brackets")
            if line and not line.startswith("#"):
                yield where, line


def _counted(size: int, content: bytes, shown: str) -> int:
    """The bytes read so far. Raises RequestError for more than a prompt file may have."""
    size += len(content)
    if size > MAX_BYTES:
        raise RequestError(f"--prompt-file {shown} has over {MAX_BYTES >> 20} MiB; give fewer prompts at once")
    return size


def _line_options(options: RunOptions, line: str | RequestError) -> RunOptions:
    """The options of one line, over those of the run."""
    if isinstance(line, RequestError):
        raise line
    if not line.startswith("{"):
        return replace(options, prompt=line)
    try:
        values = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        if '"' not in line.partition(":")[0]:  # a prompt that begins with a choice: {red|blue} ...
            return replace(options, prompt=line)
        deep = isinstance(error, RecursionError)
        reason = getattr(error, "msg", "nested too deeply" if deep else "an integer is too long")
        column = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise RequestError(f"the line is not a JSON object: {reason}{column}") from None
    if not isinstance(values.get("prompt"), str):
        raise RequestError("the line has no prompt; it must be a string under the key prompt")
    return join_line(options, _line_values(values))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen = [key for key, _ in pairs]
        twice = next(key for key in values if seen.count(key) > 1)
        raise RequestError(f"the line gives {twice[:60]!r} twice; give it once")
    return values


def _line_values(values: Mapping[str, Any]) -> dict[str, Any]:
    read = {}
    for key, value in values.items():
        name = KEYS.get(key.replace("-", "_"))
        if name is None or TABLE[name].typed:
            near = nearest(key.replace("-", "_"), [own.key for own in TABLE.values() if not own.per_run])
            raise RequestError(f"{key[:60]} is unknown" + (f"; did you mean {near}?" if near else ""))
        if TABLE[name].per_run:
            raise RequestError(f"{key} applies to the whole run; give it on the command line")
        if name in read:
            raise RequestError(f"{key} is {TABLE[name].key}, which the line gives already; give it once")
        if value is not None:
            read[name] = option_value(TABLE[name], value)
    output = read.get("output")
    if output is not None and (output.is_absolute() or ".." in output.parts):
        raise RequestError(f"output is {str(output)[:60]!r}; a line's output must stay below the current folder")
    return read


def join_line(options: RunOptions, values: Mapping[str, Any]) -> RunOptions:
    """A line's options over those of the run, less what the line excludes."""
    return RunOptions(**join(values, {one.name: getattr(options, one.name) for one in fields(options)}))


def _vary(options: RunOptions, where: str | None) -> Iterator[Job]:
    template, seeds, count = options.prompt, options.seeds, options.num_images_per_prompt
    odd = not 1 <= count <= MAX_IMAGES or len(seeds) > 1 < count  # for the request to refuse
    odd = odd or not all(0 <= seed <= MAX_SEED for seed in seeds)
    if odd or options.no_wildcards or template is None or not is_template(template):
        yield Job(options, template or "", where)
        return
    for seed in _seeds(options):
        prompt = expand(template, seed, options.wildcards)
        extra = {"template": template} if prompt != template else {}
        yield Job(replace(options, seed=[seed], num_images_per_prompt=1), prompt, where, extra)


def _seeds(options: RunOptions) -> list[int]:
    """Every picture's seed, as the request numbers them."""
    seeds = options.seeds or [secrets.randbits(32)]
    return list(seeds) if len(seeds) > 1 else list(range(seeds[0], seeds[0] + options.num_images_per_prompt))


MAX_DEPTH, MAX_FILE, MAX_EXPANDED = 20, 16 * 1024 * 1024, 100_000  # levels; bytes; characters
_NAME = re.compile(r"__(?=\S)((?:(?!__)\S)+)__")
_ARRAY = re.compile(r'\[\s*(?:$|\{\s*")')  # a line that begins one of JSON
_SEVERAL = re.compile(r"\s*\d+(?:-\d*)?\$\$")  # dynamic prompts' "that many of these"
_WEIGHT = re.compile(r"\s*(\d{1,6}(?:\.\d{1,6})?)::")
_ESCAPED = re.compile(r"\\([{}|_\\])")
_PRIVATE = {char: chr(0xF8F0 + number) for number, char in enumerate("{}|_\\")}  # stands for an escaped one meanwhile
_BACK = {private: char for char, private in _PRIVATE.items()}


def is_template(text: str) -> bool:
    """Whether a prompt holds a choice, a wildcard, or an escape of one."""
    return "|" in text or _NAME.search(text) is not None or _ESCAPED.search(text) is not None


def expand(template: str, seed: int, folders: Sequence[Path]) -> str:
    """One prompt of a template.

    seed: of the picture. folders: where NAME.txt of `__NAME__` is looked for, in this order.
    Raises RequestError for a choice that does not end (it names the column), a name that is none or has no file.
    """
    draw = random.Random(seed).random
    text = _ESCAPED.sub(lambda match: _PRIVATE[match[1]], template)
    _check_braces(text, template)
    text = _expand(text, draw, cache(lambda name: _wildcard_lines(name, folders)), 0)
    return "".join(_BACK.get(char, char) for char in text)


def _expand(text: str, draw: Callable[[], float], lines: Callable[[str], list[str]], depth: int) -> str:
    if depth > MAX_DEPTH:
        raise RequestError(f"the prompt's wildcards name each other without end (over {MAX_DEPTH} levels)")
    done, position, length = [], 0, 0
    choices, _ = _choices(text)
    while position < len(text):
        name = _NAME.match(text, position)
        if name:
            done.append(_expand(_pick(lines(name[1]), draw), draw, lines, depth + 1))
            position = name.end()
        elif bars := choices.get(position):
            options = [text[start + 1 : end] for start, end in pairwise([position, *bars])]
            if several := _SEVERAL.match(options[0]):
                rule = "a choice takes one of its options; write it once for each, or give --no-wildcards"
                raise RequestError(f"the prompt has a choice of several, {{{several[0]}...}}; {rule}")
            done.append(_expand(_pick(options, draw), draw, lines, depth + 1))
            position = bars[-1] + 1
        else:
            done.append(text[position])
            position += 1
        length += len(done[-1])
        if length > MAX_EXPANDED:
            raise RequestError(f"the prompt's wildcards make over {MAX_EXPANDED} characters")
    return "".join(done)


def _choices(text: str) -> tuple[dict[int, list[int]], list[int]]:
    """Where the choices are, in one pass.

    Returns ({opening brace: its own bars and, last, its closing brace}, opening braces that have a bar and no end).
    """
    choices: dict[int, list[int]] = {}
    opened: list[tuple[int, list[int]]] = []
    for position, char in enumerate(text):
        if char == "{":
            opened.append((position, []))
        elif char == "|" and opened:
            opened[-1][1].append(position)
        elif char == "}" and opened:
            start, bars = opened.pop()
            if bars:
                choices[start] = [*bars, position]
    return choices, [start for start, bars in opened if bars]


def _check_braces(text: str, template: str) -> None:
    """RequestError for an opening brace that has a bar but no end; escapes keep columns one less each."""
    _, endless = _choices(text)
    if endless:
        start = endless[0]
        column = start + 1 + sum(char in _BACK for char in text[:start])
        raise RequestError(
            f"the prompt's choice that opens at column {column} ({template[column - 1 : column + 19]!r}) has no "
            "closing brace; close it, write \\{ for a brace, or give --no-wildcards"
        )


def _pick(options: Sequence[str], draw: Callable[[], float]) -> str:
    """One option, by weights where they are given (N::text); 1 otherwise."""
    weights, texts = [], []
    for option in options:
        weight = _WEIGHT.match(option)
        weights.append(float(weight[1]) if weight else 1.0)
        texts.append(option[weight.end() :] if weight else option)
    point = draw() * sum(weights)
    for text, weight in zip(texts, weights, strict=True):
        if point < weight:
            return text
        point -= weight
    return next((t for t, w in zip(reversed(texts), reversed(weights), strict=True) if w), texts[-1])


def _wildcard_lines(name: str, folders: Sequence[Path]) -> list[str]:
    """The options in a wildcard's file: its lines but for empty ones and comments (#)."""
    if not re.fullmatch(r"[A-Za-z0-9][\w-]{0,99}", name.replace(_PRIVATE["_"], "_")):
        shown = "".join(_BACK.get(char, char) for char in name)
        raise RequestError(
            f"the prompt's wildcard __{shown[:60]}__ is not a valid name; it must be letters, digits, - and _ "
            "(a file NAME.txt), or give --no-wildcards"
        )
    path = next((path for folder in folders if os.path.isfile(path := folder / f"{name}.txt")), None)
    if path is None:
        where = ", ".join(str(folder) for folder in folders) or "any folder"
        raise RequestError(
            f"the prompt's wildcard __{name}__ has no file {name}.txt in {where}; make it, or give --no-wildcards"
        )
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RequestError(f"the wildcard file {path} cannot be read: {reason}") from None
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if len(content) > MAX_FILE or not lines:
        wrong = f"has over {MAX_FILE} bytes" if lines else "has no line"
        raise RequestError(f"the wildcard file {path} {wrong}; it must have one option per line")
    return lines
