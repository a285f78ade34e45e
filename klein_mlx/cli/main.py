"""The command `klein-mlx`: which subcommand, its exit code, and every error as one line.

`generate` is the subcommand when none is named. Results (paths, JSON) go to stdout, everything else to stderr. Exit
codes: 0 done, 1 a bug, 2 the request cannot be carried out, 130 interrupted. Nothing heavy is imported before the
arguments are known to be good.
"""

import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from klein_mlx.cli.hints import command_hint
from klein_mlx.cli.options import GENERATE_EXAMPLES, Parser, in_options
from klein_mlx.cli.output import finish, log_as_notes, note, say
from klein_mlx.errors import Declined, KleinError, RequestError, Stopped, human_bytes, one_line


class Command(NamedTuple):
    """A subcommand. module: has `add_arguments(parser)` and `run(args) -> exit code`; loaded when it is asked for."""

    help: str
    module: str
    epilog: str | None = None


CONVERT_EXAMPLES = """examples:
  klein-mlx convert black-forest-labs/FLUX.2-klein-4B klein-4bit --quantize 4 --verify
  klein-mlx convert FOLDER DESTINATION --transformer flux-2-klein-4b.gguf --dry-run
  klein-mlx convert klein-4bit klein-diffusers --to diffusers
"""
BENCH_EXAMPLES = """examples:
  klein-mlx bench --model tiny
  klein-mlx bench --model klein-4bit --size 512x512 --cold
  klein-mlx bench --predict "M3 Max" --quantize 4
"""
DOCTOR_EXAMPLES = """examples:
  klein-mlx doctor
  klein-mlx doctor --only attention --dtype float16
  klein-mlx doctor --model 4b --report
  klein-mlx doctor --report > report.md
"""
AGAIN_EXAMPLES = """examples:
  klein-mlx again fox.png -o same.png
  klein-mlx again fox.png --seed 8 --steps 8
  klein-mlx again autumn.png -i fox.png --prompt "make it winter"
"""
SHOW_EXAMPLES = """examples:
  klein-mlx show fox.png
  klein-mlx show *.png --json
"""
INFO_EXAMPLES = """examples:
  klein-mlx info tiny
  klein-mlx info klein-4bit --verify
  klein-mlx info flux-2-klein-4b-Q4_K_M.gguf --json
"""
LORA_EXAMPLES = """examples:
  klein-mlx lora info style.safetensors
  klein-mlx generate "a red fox" --lora style.safetensors:0.8
  klein-mlx convert black-forest-labs/FLUX.2-klein-4B merged --lora style.safetensors
"""
MODELS_EXAMPLES = """examples:
  klein-mlx models
  klein-mlx models pull 4b-q4
  klein-mlx models rm black-forest-labs/FLUX.2-klein-4B
  klein-mlx info "$(klein-mlx models path 4b)"
"""
COMPLETION_EXAMPLES = """examples:
  klein-mlx completion zsh > ~/.zsh/completions/_klein-mlx     (a folder of $fpath)
  source <(klein-mlx completion bash)
  klein-mlx completion fish > ~/.config/fish/completions/klein-mlx.fish
"""

SERVE_EXAMPLES = """examples:
  klein-mlx serve --demo --open
  klein-mlx serve --model 4b -q 4
  klein-mlx serve --host 0.0.0.0 --token --save pictures
"""
MCP_EXAMPLES = """examples:
  klein-mlx mcp --model tiny
  klein-mlx mcp --model 4b -q 4 --root ~/Pictures
"""
TRAIN_EXAMPLES = """examples:
  klein-mlx train pictures -o style.safetensors --trigger "xyz style" --dry-run
  klein-mlx train pictures -o style.safetensors --model base-4b --rank 16 --steps 800
  klein-mlx train --resume RUN --steps 1200
"""
COMMANDS = {
    "generate": Command("make a picture from a prompt", "klein_mlx.cli.generate", GENERATE_EXAMPLES),
    "again": Command("make a picture again from its recipe, with changes", "klein_mlx.cli.again", AGAIN_EXAMPLES),
    "show": Command("show how a picture was made, from its recipe", "klein_mlx.cli.show", SHOW_EXAMPLES),
    "models": Command("list models on disk; pull, rm, path", "klein_mlx.cli.models", MODELS_EXAMPLES),
    "convert": Command("convert or quantize a model to an MLX checkpoint", "klein_mlx.cli.convert", CONVERT_EXAMPLES),
    "bench": Command("measure time and memory here, or predict them for a Mac", "klein_mlx.cli.bench", BENCH_EXAMPLES),
    "train": Command("train a LoRA, or the whole model, on your pictures", "klein_mlx.cli.train", TRAIN_EXAMPLES),
    "doctor": Command("check that this Mac computes correctly", "klein_mlx.cli.doctor", DOCTOR_EXAMPLES),
    "lora": Command("describe a LoRA file: model, layout, rank", "klein_mlx.cli.lora", LORA_EXAMPLES),
    "info": Command("describe a model, a LoRA or a picture file", "klein_mlx.cli.info", INFO_EXAMPLES),
    "serve": Command("serve the studio page and an HTTP API", "klein_mlx.cli.serve", SERVE_EXAMPLES),
    "mcp": Command("serve tools to agents: MCP over stdin and stdout", "klein_mlx.cli.mcp", MCP_EXAMPLES),
    "completion": Command("print a completion script for a shell", "klein_mlx.cli.completion", COMPLETION_EXAMPLES),
}


_LIGHT = ("show", "models", "lora", "completion")  # compute nothing
_LIBRARIES, _PER_CORE = 1_100_000_000, 64_000_000  # bytes of address space: measured with tiny; a heap for each thread

HELP = """usage: klein-mlx "PROMPT" [OPTIONS]     a picture: klein-mlx generate
       klein-mlx [OPTIONS]              an interactive prompt
       klein-mlx COMMAND [OPTIONS]      or klein-mlx COMMAND --help

FLUX.2 [klein] on Apple silicon: make and edit pictures with MLX.

commands:
{commands}

examples:
  klein-mlx "a red fox in the snow"
  klein-mlx "make it autumn" -i fox.png -o autumn.png
  klein-mlx "a red circle left of a blue square" --model tiny -o out.png
  klein-mlx models pull 4b-q4
  klein-mlx info tiny

options:
  -h, --help   this text
  --version    the version
"""


def top_help() -> str:
    """What `klein-mlx --help` prints: every command with a line of its own; it loads none of them."""
    width = max(map(len, COMMANDS))
    return HELP.format(commands="\n".join(f"  {name:<{width}}  {row.help}" for name, row in COMMANDS.items()))


def command_parser(name: str) -> Parser:
    """A subcommand's parser, with its options; its module is loaded."""
    command = COMMANDS[name]
    parser = Parser(
        prog=f"klein-mlx {name}", description=f"{command.help[0].upper()}{command.help[1:]}.", epilog=command.epilog
    )
    importlib.import_module(command.module).add_arguments(parser)
    return parser


def choose(given: Sequence[str]) -> tuple[str, list[str]]:
    """The subcommand that these words ask for, and the words that are its own.

    A first word that is no subcommand begins a prompt, and so does an option. Raises RequestError for a single bare
    word that is nearly a subcommand: it is a slip more often than a prompt, and must not begin a download.
    """
    first = given[0] if given else ""
    if first in COMMANDS:
        return first, list(given[1:])
    if first and not first.startswith("-"):
        refuse_slip(first)
    return "generate", list(given)


def refuse_slip(prompt: str) -> None:
    """RequestError for a prompt that is a subcommand, or one word that is nearly one."""
    if prompt in COMMANDS:
        raise RequestError(f"options come after the command: klein-mlx {prompt} ... (or klein-mlx generate {prompt})")
    meant = command_hint(prompt.lower(), COMMANDS) if prompt.isascii() and prompt.replace("2", "").isalpha() else None
    if meant is not None:
        raise RequestError(
            f"{prompt!r} is not a command; did you mean: {f'klein-mlx {meant}'.rstrip()}?"
            f" (for a picture: klein-mlx generate {prompt})"
        )


def _run(given: Sequence[str]) -> int:
    if given and given[0] in ("-h", "--help", "help"):
        if len(given) == 2 and given[1] in COMMANDS:
            given = (given[1], "--help")
        else:
            say(*top_help().rstrip("\n").split("\n"))
            return 0
    if given and given[0] in ("--version", "-V"):
        from klein_mlx.paths import version

        say(f"klein-mlx {version()}")
        return 0
    log_as_notes()
    name, words = choose(given)
    parser = command_parser(name)
    if not parser.rare:  # its --help tells all
        words = ["--help" if word == "--help-all" else word for word in words]
    args = parser.parse_args(words)
    if getattr(args, "model", None) == "":  # nowhere the default one, nor the current folder
        raise RequestError("model", "", "it must name a model, a file or a folder")
    if name not in _LIGHT:
        check_address_space()
    if name == "generate":
        _read_stdin(args, asked=given[:1] == ["generate"])
    if name == "generate" and given[:1] != ["generate"]:
        if args.words and args.words in words:
            refuse_slip(args.words)
        elif not (args.prompt or args.prompt_file) and sys.stdin.isatty() and sys.stdout.isatty():
            from klein_mlx.cli import repl

            return repl.run(args)
    return importlib.import_module(COMMANDS[name].module).run(args)


def check_address_space() -> None:
    """RequestError where `ulimit -v` leaves less than the libraries themselves take.

    They do not answer for a lack of it: OpenBLAS asks for its buffer again and again, and MLX aborts where a thread
    cannot be started.
    """
    if sys.platform != "linux":
        return
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    least = _LIBRARIES + _PER_CORE * (os.cpu_count() or 1)
    if limit != resource.RLIM_INFINITY and limit < least:
        raise RequestError(
            f"this process may address {human_bytes(limit)} (ulimit -v), but the libraries alone take up to"
            f" {human_bytes(least)}; raise the limit to that and the model's size"
        )


def _read_stdin(args: Any, asked: bool) -> None:
    """A prompt of "-", or none where something is piped in: the prompt is what stdin holds."""
    dash = args.words == "-" or args.prompt == "-"
    none = args.words is None and args.prompt is None and args.prompt_file is None
    if not dash and (asked or not none or sys.stdin is None or sys.stdin.isatty()):
        return
    from klein_mlx.options import MAX_PROMPT

    text = sys.stdin.read(4 * MAX_PROMPT).strip() if sys.stdin is not None else ""
    if dash and not text:
        raise RequestError("the prompt is to be read from stdin, which is empty")
    if text:
        args.words, args.prompt = text, None


def ready_streams() -> None:
    """Let printing never fail for its words: not where a stream is closed, nor where it knows ASCII only."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _stopped_gently(stopped: list[int]) -> Iterator[None]:
    """Let what asks a process to end (kill, a closed terminal) do what Ctrl-C does; its number is put in `stopped`."""

    def stop(number: int, frame: object) -> None:
        stopped.append(number)
        raise Stopped

    numbers = [signal.SIGTERM, signal.SIGHUP] if threading.current_thread() is threading.main_thread() else []
    before = {number: signal.getsignal(number) for number in numbers}
    numbers = [number for number in numbers if before[number] is signal.SIG_DFL]  # nohup's own choice stays
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, before[number])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    stopped: list[int] = []
    with _stopped_gently(stopped):
        code = _main(argv)
    return 128 + stopped[0] if stopped else code


def _main(argv: Sequence[str] | None) -> int:
    ready_streams()
    words = sys.argv[1:] if argv is None else list(argv)
    code = _answered(lambda: _run(words))
    return _answered(finish) or code


def _answered(work: Callable[[], int | None]) -> int:
    """The exit code of what is done here, with every error as one line on stderr."""
    try:
        return work() or 0
    except SystemExit as done:  # argparse has printed a help
        return int(done.code or 0)
    except Declined as answer:
        note(str(answer))
        return 0
    except KleinError as error:
        note(f"error: {in_options(error)}")
        return 2
    except KeyboardInterrupt:
        note("interrupted")
        return 130
    except ImportError as error:
        if not (error.name or "").startswith("mlx"):
            raise
        needs = "klein-mlx needs a Mac with Apple silicon, macOS 14 and a native Python, or Linux"
        note(f"error: MLX cannot be loaded here ({one_line(str(error))}); {needs}")
        return 2
    except BrokenPipeError:
        return 141  # as a program that SIGPIPE ends
    except MemoryError:
        note("error: this process may take no more memory; raise its limit (ulimit -v), or ask for less")
        return 2
    except OSError as error:  # of a file that nobody expected to fail
        if error.filename is None or error.strerror is None:
            raise
        note(f"error: {os.fsdecode(error.filename)}: {error.strerror}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
