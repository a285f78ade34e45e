"""The command `klein-mlx`: which subcommand, its exit code, and every error as one line.

Results (paths, JSON) go to stdout, everything else to stderr. Exit codes: 0 done, 1 a bug, 2 what was asked cannot be
done, 130 interrupted. Nothing heavy is imported before the arguments are known to be good.
"""

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from klein_mlx.errors import KleinError
from klein_mlx.options import GENERATE_EXAMPLES, Parser, in_options


class Command(NamedTuple):
    """A subcommand. module: has `add_arguments(parser)` and `run(args) -> exit code`; loaded when it is asked for."""

    help: str
    module: str
    epilog: str | None = None


COMMANDS = {
    "generate": Command("make a picture from a prompt", "klein_mlx.generate", GENERATE_EXAMPLES),
    "convert": Command("turn PyTorch weights into an MLX checkpoint", "klein_mlx.convert.command"),
    "info": Command("what a model is: variant, sizes, bits, licence", "klein_mlx.convert.info_command"),
}


def _parser(named: str | None) -> argparse.ArgumentParser:
    """The whole command's parser; only the named subcommand gets its options, so that --help loads none of them."""
    from klein_mlx import __version__

    parser = Parser(prog="klein-mlx", description="FLUX.2 [klein] on Apple silicon: make and edit pictures with MLX.")
    parser.add_argument("--version", action="version", version=f"klein-mlx {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, epilog=command.epilog)
        if name == named:
            importlib.import_module(command.module).add_arguments(subparser)
    return parser


def ready_streams() -> None:
    """Let printing never fail for its words: not where stdout or stderr is closed, nor where it knows ASCII only."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    ready_streams()
    try:
        given = sys.argv[1:] if argv is None else list(argv)
        args = _parser(next((word for word in given if not word.startswith("-")), None)).parse_args(given)
        return importlib.import_module(COMMANDS[args.command].module).run(args)
    except KleinError as error:
        print(f"error: {in_options(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of stdout is gone; point stdout elsewhere so that Python does not complain while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a program that SIGPIPE ends
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"error: the result cannot be printed: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2


if __name__ == "__main__":
    sys.exit(main())
