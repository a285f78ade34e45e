"""Completion scripts for bash, zsh and fish, from a description of commands and options. It knows no parser."""

import argparse
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from klein_mlx.paths import cached_models, own_models, own_names
from klein_mlx.weights.hub import ALIASES

PROGRAM = "klein-mlx"


DEFAULT = "generate"  # the command where none is named


MODELS = f"{PROGRAM} completion models 2>/dev/null"


class Option(NamedTuple):
    """An option, or what a positional may be. takes: a value. kind: "file", "model" or None. values: all there are."""

    names: tuple[str, ...]
    help: str
    takes: bool
    kind: str | None = None
    values: tuple[str, ...] = ()


class Given(NamedTuple):
    """What a command takes."""

    options: tuple[Option, ...]
    positional: Option


Commands = Mapping[str, tuple[str, Given]]  # name -> help, what it takes


def bash(commands: Commands) -> str:
    """For bash 3.2 and newer: the one that macOS has knows no compopt and no mapfile."""
    names = " ".join(commands)
    cases = []
    for name, (_, given) in commands.items():
        lines = [f"    {name})", f"      options={shlex.quote(' '.join(n for o in given.options for n in o.names))}"]
        lines.append('      case "$prev" in')
        for option in given.options:
            if option.takes:
                lines.append(f"        {'|'.join(option.names)}) {_bash_values(option)}; return ;;")
        lines += ["      esac", f'      [[ "$cur" == -* ]] || {{ {_bash_values(given.positional)}; }}', "      ;;"]
        cases += lines
    body = "\n".join(cases)
    return f"""# {PROGRAM} completion for bash: into ~/.bashrc:  source <({PROGRAM} completion bash)
_klein_mlx() {{
  local cur prev command options
  COMPREPLY=()
  cur="${{COMP_WORDS[COMP_CWORD]}}"
  prev="${{COMP_WORDS[COMP_CWORD-1]}}"
  command={DEFAULT}
  case " {names} " in
    *" ${{COMP_WORDS[1]}} "*) [[ $COMP_CWORD -gt 1 ]] && command="${{COMP_WORDS[1]}}" ;;
  esac
  case "$command" in
{body}
  esac
  if [[ "$cur" == -* ]]; then
    COMPREPLY=( $(compgen -W "$options" -- "$cur") )
  elif [[ $COMP_CWORD -eq 1 ]]; then
    COMPREPLY=( $(compgen -W "{names}" -- "$cur") )
  fi
}}
complete -o default -F _klein_mlx {PROGRAM}
"""


def _bash_values(option: Option) -> str:
    """Fills COMPREPLY; left empty, bash completes files by itself."""
    if option.kind == "model" or option.values:
        words = " ".join([*option.values, *([f"$({MODELS})"] if option.kind == "model" else [])])
        return f'COMPREPLY=( $(compgen -W "{words}" -- "$cur") )'
    return ":"


def zsh(commands: Commands) -> str:
    """With descriptions; an autoloaded function or sourced."""
    described = "\n".join(f"    {_zsh_quoted(f'{name}:{help}')}" for name, (help, _) in commands.items())
    cases = []
    for name, (_, given) in commands.items():
        specs = [spec for option in given.options for spec in _zsh_specs(option)]
        specs.append(f"'*:{name}:{_zsh_values(given.positional) or ' '}'")
        cases.append(f"    {name})\n      _arguments -s \\\n        " + " \\\n        ".join(specs) + "\n      ;;")
    body = "\n".join(cases)
    return f"""#compdef {PROGRAM}
# {PROGRAM} completion for zsh: as _klein-mlx in a folder of $fpath, or sourced after compinit
_klein_mlx_models() {{
  local -a names
  names=(${{(f)"$({MODELS})"}})
  _describe 'model' names
}}
_klein_mlx() {{
  local -a commands
  commands=(
{described}
  )
  local command={DEFAULT}
  if (( CURRENT == 2 )) && [[ "$PREFIX" != -* ]]; then
    _describe 'command' commands
    return
  fi
  case "$words[2]" in
    {"|".join(commands)}) command="$words[2]"; shift words; (( CURRENT-- )) ;;
  esac
  case "$command" in
{body}
  esac
}}
if [[ "$funcstack[1]" == _klein-mlx ]]; then
  _klein_mlx "$@"
elif (( $+functions[compdef] )); then
  compdef _klein_mlx {PROGRAM}
fi
"""


def _zsh_specs(option: Option) -> list[str]:
    help = option.help.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")
    value = f":value:{_zsh_values(option) or ' '}" if option.takes else ""
    return [_zsh_quoted(f"*{name}[{help}]{value}") for name in option.names]


def _zsh_values(option: Option) -> str:
    if option.kind == "model":
        own = f"compadd {' '.join(option.values)}; " if option.values else ""
        return f"{{{own}_klein_mlx_models; _files}}"
    if option.values:
        return f"({' '.join(option.values)})"
    return "_files" if option.kind == "file" else ""


def _zsh_quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def fish(commands: Commands) -> str:
    """With descriptions; for ~/.config/fish/completions/klein-mlx.fish."""
    names = " ".join(commands)
    lines = [
        f"# {PROGRAM} completion for fish: {PROGRAM} completion fish > ~/.config/fish/completions/{PROGRAM}.fish",
        "function __klein_mlx_command",
        "    set -l words (commandline -opc)",
        f"    if test (count $words) -gt 1; and contains -- $words[2] {names}",
        "        echo $words[2]",
        "    else",
        f"        echo {DEFAULT}",
        "    end",
        "end",
        "function __klein_mlx_is",
        "    test (__klein_mlx_command) = $argv[1]",
        "end",
    ]
    first = "test (count (commandline -opc)) -eq 1"
    for name, (help, given) in commands.items():
        lines.append(f"complete -c {PROGRAM} -n '{first}' -a {name} -d {_fish_quoted(help)}")
        lines += [_fish_option(name, option) for option in given.options]
        if given.positional.takes:
            condition = f"__klein_mlx_is {name}" + (f"; and not {first}" if name != DEFAULT else "")
            lines.append(f"complete -c {PROGRAM} -n '{condition}'{_fish_values(given.positional, False)}")
    return "\n".join(lines) + "\n"


def _fish_option(command: str, option: Option) -> str:
    long = [f"-l {name[2:]}" for name in option.names if name.startswith("--")]
    short = [f"-s {name[1:]}" for name in option.names if not name.startswith("--")]
    words = " ".join([*long, *short])
    values = _fish_values(option, True) if option.takes else ""
    return f"complete -c {PROGRAM} -n '__klein_mlx_is {command}' {words} -d {_fish_quoted(option.help)}{values}"


def _fish_values(option: Option, required: bool) -> str:
    words = [*option.values, *([f"({MODELS})"] if option.kind == "model" else [])]
    if not words:
        return " -r" if required else ""
    return f' {"-x" if required and option.kind != "model" else "-r" if required else ""} -a "{" ".join(words)}"'


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS: dict[str, Callable[[Commands], str]] = {"bash": bash, "zsh": zsh, "fish": fish}


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
    from klein_mlx.cli.main import COMMANDS, command_parser

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


def model_names() -> list[str]:
    """Every name that --model knows: tiny, short names, the config's, one's own, klein models of the Hub's cache."""
    own = (path.name for path in own_models())
    return list(dict.fromkeys(["tiny", *ALIASES, *own_names(), *own, *cached_models()]))
