"""What pictures' files are called: by the output asked for, by a template, or by prompt and seed."""

import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from klein_mlx.errors import RequestError
from klein_mlx.images.saving import check_output, remove_stale

MAX_SLUG = 60  # bytes
FIELDS = ("slug", "seed", "index", "date", "time", "model", "steps")
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@dataclass(frozen=True)
class Named:
    """A picture that needs a name. output: as asked for, or None. prompt: what its slug is made of."""

    output: Path | None
    prompt: str
    seed: int
    model: str
    steps: int


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
