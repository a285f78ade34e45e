"""Completion scripts for bash, zsh and fish, which shtab makes of the command's own parsers."""

import argparse
import importlib
from typing import Any

from klein_mlx.cli.options import TABLE, Parser, add_request_arguments
from klein_mlx.cli.output import say
from klein_mlx.config import ALIASES
from klein_mlx.errors import RequestError
from klein_mlx.paths import cached_models, own_models, own_names

PROGRAM = "klein-mlx"
SHELLS = ("bash", "zsh", "fish")
BITS = ("4", "8", "3", "5", "6", "mxfp4", "nvfp4", "mxfp8", "mixed-4")
_FILES = set("FILE FOLDER DIR RUN DATA LORA SOURCE DESTINATION VAE PICTURE".split())  # metavars of paths
_MODELS = {"MODEL", "SOURCE"}  # metavars of models
# Names of models are read line by line and quoted: a folder's name is a user's data, never the shell's code.
_PREAMBLE = {
    "bash": """
_klein_mlx_models() {
  local name
  klein-mlx completion models 2>/dev/null | while IFS= read -r name; do
    case "$name" in "$1"*) printf '%q\\n' "$name" ;; esac
  done
  compgen -f -- "$1" | while IFS= read -r name; do printf '%q\\n' "$name"; done
}
""",
    "zsh": """
_klein_mlx_models() {
  local -a names
  names=("${(@f)$(klein-mlx completion models 2>/dev/null)}")
  compadd -a names
  _files
}
""",
}
_COMPLETE_MODELS = {
    "bash": "_klein_mlx_models",
    "zsh": "_klein_mlx_models",
    "fish": "(klein-mlx completion models 2>/dev/null; __fish_complete_path (commandline -ct))",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `klein-mlx completion` takes."""
    parser.add_argument(
        "shell",
        type=str.lower,
        choices=(*SHELLS, "models"),
        help="for which shell; models: print the names that --model knows",
    )


def run(args: argparse.Namespace) -> int:
    """Print the script, or the names of models. Returns the exit code; raises RequestError."""
    if args.shell == "models":
        say(*model_names())
        return 0
    try:
        import shtab
    except ImportError:
        raise RequestError("completion scripts need shtab: pip install shtab") from None
    script = shtab.complete(whole_parser(shtab.FILE), args.shell, preamble=_PREAMBLE)  # type: ignore[arg-type]
    say(*script.split("\n"))
    return 0


def whole_parser(file: Any) -> Parser:
    """One parser of everything: the options of generate, which needs no name, and every command.

    file: how shtab marks an action whose value is a path.
    """
    from klein_mlx.cli.main import COMMANDS

    parser = Parser(prog=PROGRAM)
    parser.add_argument("--version", action="store_true", help="the version")
    add_request_arguments(parser)
    _mark(parser, file)
    commands = parser.add_subparsers(parser_class=Parser)
    for name, row in COMMANDS.items():
        command = commands.add_parser(name, help=row.help)
        importlib.import_module(row.module).add_arguments(command)
        _mark(command, file)
    return parser


def _mark(parser: Parser, file: Any) -> None:
    """Say what each value may be: one of some words, a path, a model."""
    parser.explain()
    for action in parser._actions:
        shown, known = str(action.metavar or action.dest).upper(), TABLE.get(action.dest)
        if known and known.choices:
            action.choices = known.choices
        elif action.dest == "quantize":
            action.choices = BITS
        elif shown in _MODELS or action.dest == "model":
            action.complete = _COMPLETE_MODELS  # type: ignore[attr-defined]
        elif shown in _FILES:
            action.complete = file  # type: ignore[attr-defined]


def model_names() -> list[str]:
    """Every name that --model knows: tiny, short names, the config's, one's own, klein models of the Hub's cache."""
    names = ["tiny", *ALIASES, *own_names(), *(path.name for path in own_models()), *cached_models()]
    return [name for name in dict.fromkeys(names) if name.isprintable()]
