"""What can go wrong, as a user is told it.

Each message is one line that says what is wrong, which value it was, and what would be right. The command line prints
it after `error:` and exits with 2; a library user catches `KleinError`. Anything else that escapes is a bug.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

_LONGEST = 1000


def one_line(text: str) -> str:
    """The text as one printable line of at most about a thousand characters."""
    line = " ".join(text.split())
    line = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


def line_of(error: BaseException) -> str:
    """What any error says, as one line of at most 200 characters; its kind where it says nothing."""
    return one_line(str(error))[:200] or type(error).__name__


class KleinError(Exception):
    """The parent of every error that a user can cause or mend.

    Its text is one printable line whatever names and values it quotes: a file may hold any bytes, and a terminal obeys
    some of them.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class Stopped(KeyboardInterrupt):
    """The process is to end (kill, a closed terminal), not only what it is doing, as Ctrl-C may mean."""


def named(text: str, names: Mapping[str, str]) -> str:
    """A text whose {fields} are replaced by these names for them, or by their own; {{word}} is left alone."""
    return re.sub(r"(?<!\{)\{(\w+)\}(?!\})", lambda found: names.get(found[1], found[1]), text)


class Shown(str):
    """A value that is described rather than quoted: "40 x 30", "all black"."""

    __repr__ = str.__str__


ABSENT = Shown()


class RequestError(KleinError):
    """What was asked cannot be done: a size, a number of steps, a prompt, a picture, an output path.

    RequestError(message), or RequestError(field, value, rule) for an argument: "FIELD is VALUE; RULE", or "FIELD RULE"
    without a value. field: the argument's name in Python. rule: what would be right; other arguments stand in braces.
    """

    def __init__(self, field: str, value: Any = ABSENT, rule: str = ""):
        self.field, self.value, self.rule = (field, value, rule) if rule else (None, ABSENT, field)
        super().__init__(self.told({}))

    def told(self, names: Mapping[str, str]) -> str:
        """The message, one line, with every argument under another name, such as its flag on the command line."""
        if self.field is None:
            return one_line(self.rule)
        value = "" if self.value is ABSENT else f"is {short(self.value)}; "
        rule = named(self.rule, names)
        name, space, detail = self.field.partition(" ")  # "quantize_layer PATTERN"
        return one_line(f"{names.get(name, name)}{space}{detail} {value}{rule}")


class Declined(KleinError):
    """The user was asked and said no; nothing is wrong."""


class DoesNotFit(RequestError):
    """A request needs more memory than there is; the message holds a plan that would fit."""


class CheckpointError(KleinError):
    """A model's files are missing, damaged, or not what they say they are."""


def of_device(error: RuntimeError) -> RequestError | None:
    """What MLX raises where the GPU failed (memory, time), in words for the user; None for any other error."""
    text = str(error)
    if not any(sign in text for sign in ("[METAL]", "[metal::", "[cuda")):
        return None
    return RequestError(
        f"the GPU failed ({text:.200}); close other programs, keep less in memory (--keep nothing), use fewer bits (-q"
        " 4), or make a smaller picture"
    )


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of these words that was probably meant by a mistyped one, or None."""
    import difflib

    return next(iter(difflib.get_close_matches(word, list(words), n=1, cutoff=0.7)), None)


def short(value: Any) -> str:
    """A value as it is written in Python, cut to fit one line."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of over 4300 digits
        text = f"a {type(value).__name__} too long to be written"
    return text if len(text) <= 60 else text[:57] + "..."


def human_bytes(count: float) -> str:
    """12.3 GB, 340.0 MB, 9.8 kB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
