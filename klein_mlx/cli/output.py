"""All that the command prints, escaped: names and texts come from files, and a terminal obeys some of their characters.

Results go to stdout, everything else to stderr. Nothing else in `cli` calls `print`, but for what draws a picture.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from klein_mlx.errors import RequestError

# Control characters, line separators, and what turns the text's direction; surrogates cannot be written.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb]"
)


def printable(text: str) -> str:
    """One line that no terminal obeys: a text from outside with its control characters escaped, as \\x1b and \\n."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def say(*lines: str) -> None:
    """Print results on stdout, while any bar is out of the way. Raises RequestError if stdout takes no more."""
    try:
        _write(sys.stdout, lines)
    except BrokenPipeError:
        raise
    except OSError as error:
        _point_at_nothing(sys.stdout)  # what is still in its buffer would fail once more at the end
        raise unprinted(error) from None


def say_json(value: Any) -> None:
    """Print a result as JSON in one line."""
    say(json_line(value))


def note(*lines: str) -> None:
    """Print what is no result on stderr; where that is closed or full, nobody is there to be told."""
    try:
        _write(sys.stderr, lines)
    except OSError:
        _point_at_nothing(sys.stderr)


def ask(question: str) -> str:
    """A question on stderr, and the line that stdin answers; empty at its end."""
    print(printable(question), end=" ", file=sys.stderr, flush=True)
    return sys.stdin.readline()


def json_line(value: Any) -> str:
    """JSON whose strings are escaped where a terminal would obey them, and otherwise stay readable."""
    text = json.dumps(value, ensure_ascii=False)
    return UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def cleaned(value: Any, levels: int = 8) -> Any:
    """Plain values with every string, and every key, escaped: for what formats them in several lines.

    levels: of lists and mappings inside each other; what is below them is left out.
    """
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {cleaned(key): cleaned(item, levels - 1) for key, item in value.items()} if levels else {}
    if isinstance(value, list | tuple):
        return [cleaned(item, levels - 1) for item in value] if levels else []
    return value


def log_as_notes() -> None:
    """Let the library's warnings, which quote files too, be printed here."""
    import logging

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(record.getMessage())

    log = logging.getLogger("klein_mlx")
    if not log.handlers:
        log.addHandler(Notes())


def finish() -> None:
    """Flush stdout and stderr, so that Python has nothing left to fail with as it exits.

    Raises BrokenPipeError where the reader of stdout is gone, RequestError where it takes no more.
    """
    try:
        sys.stderr.flush()
    except OSError:
        _point_at_nothing(sys.stderr)
    try:
        sys.stdout.flush()
    except OSError as error:
        _point_at_nothing(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise
        raise unprinted(error) from None


def unprinted(error: OSError) -> RequestError:
    """What is said where stdout takes no more."""
    return RequestError(f"the result cannot be printed: {error.strerror or error}")


def _write(stream: TextIO, lines: tuple[str, ...]) -> None:
    text = "".join(f"{printable(line)}\n" for line in lines)
    if "tqdm" not in sys.modules:
        print(text, end="", file=stream, flush=True)
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(stream):
        print(text, end="", file=stream, flush=True)


def _point_at_nothing(stream: TextIO) -> None:
    """What could not be written stays in the stream's buffer, and Python would try again at its exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):  # a stream in memory
        pass


@contextmanager
def byte_bar(what: str, quiet: bool, total: int | None = None) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with bytes, rate and time left, where stderr is a terminal; inside, what it yields is told how
    many bytes are done, and how many there are. total: if that is known before."""
    from tqdm import tqdm

    hidden, shown = quiet or not has_bar(sys.stderr), {"unit": "B", "unit_scale": True, "desc": printable(what)}
    with tqdm(total=total, file=sys.stderr, disable=hidden, leave=False, dynamic_ncols=True, **shown) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(min(done, total) - bar.n)

        yield show


def has_bar(stream: TextIO) -> bool:
    """Whether a line can be drawn over again there: a terminal, and not a dumb one."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")
