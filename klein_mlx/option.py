"""One option: what a field of `Options` is to its user. It knows nothing of pictures."""

from dataclasses import Field, dataclass, field
from functools import cached_property
from typing import Any

from klein_mlx.errors import RequestError, flag, integer, is_number


@dataclass(frozen=True)
class Option:
    """What a field of `Options` is to its user.

    help: a phrase; other fields stand in braces. flag: on the command line, or None: in Python only. short: further
    flags; aliases: those that no help shows. kind: of one value: str, int, float, bool, Path, or list (of numbers).
    low, high: the range, both included; `over` excludes the lower end. choices: the only values. many: a list is taken,
    on the command line by repeating the flag. negatable: --no-FLAG exists, and without either the program decides.
    bare: the value of the flag alone. metavar, default: for the help. group: its heading. common: explained by a plain
    --help. per_run: of the whole run, not of one picture: no line of a prompt file sets it. typed: on the command line
    only. excludes: fields that give way where this one is set in a nearer place.
    """

    help: str
    flag: str | None = None
    short: tuple[str, ...] = ()
    kind: type = str
    low: float | None = None
    high: float | None = None
    over: bool = False
    choices: tuple[str, ...] = ()
    many: bool = False
    negatable: bool = False
    metavar: str | None = None
    default: str = ""
    group: str = "picture"
    common: bool = False
    per_run: bool = False
    typed: bool = False
    bare: Any = None
    aliases: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()

    @cached_property
    def key(self) -> str:
        """The name in a config, a line of a prompt file, a recipe: that of the flag."""
        return (self.flag or "").lstrip("-").replace("-", "_")

    @property
    def range(self) -> str:
        """The values that are right, in words; "" for any."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.low is None or self.high is None:
            return ""
        number = "a whole number" if self.kind is int else "a number"
        return (
            f"{number} over {self.low:g} and at most {self.high:g}"
            if self.over
            else f"{number} from {self.low:g} to {self.high:g}"
        )

    def check(self, name: str, value: Any) -> Any:
        """`value` if it is of the option's kind and in its range; else a RequestError."""
        if self.kind is bool:
            return flag(name, value)
        if self.choices:
            if value not in self.choices:
                raise RequestError(name, value, f"it must be {self.range}")
        elif self.kind is int and self.low is not None and self.high is not None:
            return integer(name, value, int(self.low), int(self.high))
        elif self.low is not None and self.high is not None:
            above = is_number(value) and (self.low < value if self.over else self.low <= value)
            if not above or value > self.high:
                raise RequestError(name, value, f"it must be {self.range}")
            return float(value)
        return value


def option(help: str, flag: str | None = None, value: Any = None, **details: Any) -> Any:
    """A field of `Options`. value: its default. details: see `Option`."""
    return field(default=value, metadata={"option": Option(help, flag, **details)})


def option_of(field: "Field[Any]") -> Option | None:
    """What a field is to its user; None for one that is not the user's."""
    return field.metadata.get("option")
