r"""Prompts that vary: `{red|blue}`, `{2::red|blue}`, and `__colours__`, a line of colours.txt.

Rule: a picture's choices are drawn from its seed, from left to right, an outer choice before what stands inside it. The
same template with the same seed and files gives the same prompt, alone or among others.
Braces without a bar between them are text, so that prompts in JSON stay as they are; `\{`, `\|`, `\}` and `\_` are
text everywhere in a template.
"""

import os
import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

from klein_mlx.errors import RequestError

MAX_DEPTH, MAX_FILE, MAX_EXPANDED = 20, 16 * 1024 * 1024, 100_000  # levels; bytes; characters
_NAME = re.compile(r"__(?=\S)((?:(?!__)\S)+)__")
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
    text = _expand(text, draw, cache(lambda name: _lines(name, folders)), 0)
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


def _lines(name: str, folders: Sequence[Path]) -> list[str]:
    """The options in a wildcard's file: its lines but for empty ones and comments (#)."""
    if not re.fullmatch(r"[A-Za-z0-9][\w-]{0,99}", name.replace(_PRIVATE["_"], "_")):
        shown = "".join(_BACK.get(char, char) for char in name)
        raise RequestError(
            f"the prompt's wildcard __{shown[:60]}__ is no name; it must be letters, digits, - and _ "
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
        raise RequestError(f"the wildcard file {path} {wrong}; it must have an option a line")
    return lines
