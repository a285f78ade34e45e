"""`klein-mlx completion bash|zsh|fish`: a script that completes every option, made from the parsers themselves."""

import argparse
from pathlib import Path

from klein_mlx.aliases import ALIASES
from klein_mlx.places import cached_models, own_models, own_names
from klein_mlx.shells import SHELLS, Given, Option

_FILES = {"FILE", "FOLDER", "SOURCE", "DESTINATION", "VAE"}  # metavars of paths
_MODELS = {"MODEL", "SOURCE"}  # metavars of models
VALUES = {  # of options whose values are checked later, in the words of the request
    "keep": ("all", "transformer", "nothing"),
    "dtype": ("bfloat16", "float16", "float32"),
    "quantize": ("4", "8", "3", "5", "6", "mxfp4", "nvfp4", "mxfp8", "mixed-4"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `klein-mlx completion` takes."""
    parser.add_argument(
        "shell", choices=(*SHELLS, "models"), help="for which shell; or models: the names that --model knows here"
    )


def run(args: argparse.Namespace) -> int:
    """Print the script, or the names of models. Returns the exit code."""
    if args.shell == "models":
        print("\n".join(model_names()))
        return 0
    from klein_mlx.cli import COMMANDS, command_parser

    commands = {name: (row.help, given(command_parser(name))) for name, row in COMMANDS.items()}
    print(SHELLS[args.shell](commands), end="")
    return 0


def given(parser: argparse.ArgumentParser) -> Given:
    """What a parser takes, as the shells are told it."""
    options, positional = [], Option((), "", takes=False)
    for action in parser._actions:
        option = _option(action)
        if action.option_strings:
            options.append(option)
        elif option.kind or option.values:
            positional = Option(
                (), option.help, True, option.kind or positional.kind, positional.values + option.values
            )
    return Given(tuple(options), positional)


def _option(action: argparse.Action) -> Option:
    shown = str(action.metavar or action.dest).upper()
    kind = "model" if shown in _MODELS or action.dest == "model" else "file" if _is_file(action, shown) else None
    values = tuple(map(str, action.choices)) if action.choices else VALUES.get(action.dest, ())
    return Option(tuple(action.option_strings), _one_line(action), action.nargs != 0, kind, values)


def _is_file(action: argparse.Action, shown: str) -> bool:
    return shown in _FILES or action.type is Path


def _one_line(action: argparse.Action) -> str:
    told = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    return " ".join(told.partition(" (default")[0].split())


# ---- names of models ----


def model_names() -> list[str]:
    """Every name that --model knows: tiny, short names, the config's, one's own, klein models of the Hub's cache."""
    own = (path.name for path in own_models())
    return list(dict.fromkeys(["tiny", *ALIASES, *own_names(), *own, *cached_models()]))
