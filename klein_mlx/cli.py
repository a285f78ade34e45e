"""The command `klein-mlx`: parse -> request -> call -> print.

Results (paths, JSON) go to stdout, everything else to stderr. Exit codes: 0 done, 1 a bug, 2 what was asked cannot be
done, 130 interrupted. Nothing heavy is imported before the arguments are known to be good.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klein_mlx.errors import KleinError, RequestError

if TYPE_CHECKING:
    from klein_mlx.events import Run
    from klein_mlx.pipeline import KleinPipeline

DEFAULT_MODEL = "black-forest-labs/FLUX.2-klein-4B"

GENERATE_EXAMPLES = """examples:
  klein-mlx generate --model tiny "a red circle left of a blue square" -o out.png
  klein-mlx generate "a red fox in the snow" --width 768 --height 1024 --seed 7
  klein-mlx generate "make it autumn" -i fox.png -o autumn.png
"""


# What the library calls an argument, and what the command line does.
OPTIONS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "negative_prompt": "--negative",
    "num_images_per_prompt": "--count",
    "max_sequence_length": "--max-sequence-length",
    **{name: f"--{name}" for name in ("width", "height", "seed", "quantize", "dtype", "keep")},
}


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors and without abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> Any:
        raise RequestError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    from klein_mlx import __version__
    from klein_mlx.convert.__main__ import add_convert_arguments

    parser = _Parser(prog="klein-mlx", description="FLUX.2 [klein] on Apple silicon: make and edit pictures with MLX.")
    parser.add_argument("--version", action="version", version=f"klein-mlx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="make a picture from a prompt", epilog=GENERATE_EXAMPLES)
    _add_generate_arguments(generate)
    convert = commands.add_parser("convert", help="turn PyTorch weights into an MLX checkpoint")
    add_convert_arguments(convert)
    info = commands.add_parser("info", help="what a model is: variant, sizes, bits, licence")
    info.add_argument("model", help='a folder, a hub id, or "tiny"')
    info.add_argument("--json", action="store_true", help="as a JSON object on stdout")
    return parser


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", nargs="?", help="what to draw, or how to change the reference")
    add("-m", "--model", default=DEFAULT_MODEL, help='a hub id, a folder, or "tiny" (default: %(default)s)')
    add("-i", "--image", action="append", metavar="FILE", help="a reference to edit or to draw from; repeat for more")
    add("--width", type=int, help="in pixels, a multiple of 16 (default: the reference's, or 1024; 128 for tiny)")
    add("--height", type=int, help="in pixels, a multiple of 16")
    add("--steps", type=int, help="denoising steps (default: the variant's, 4 for distilled ones)")
    add("--guidance", type=float, help="guidance scale (default: the variant's; base variants only)")
    add("--negative", metavar="TEXT", help="what to steer away from; needs guidance over 1")
    add("--seed", type=int, action="append", help="0 to 2**64 - 1; repeat for several pictures (default: random)")
    add("-n", "--count", type=int, default=1, help="pictures, of seeds SEED, SEED + 1, ... (default: 1)")
    add("-q", "--quantize", metavar="BITS", help="4 or 8: quantise the weights while loading")
    add("--dtype", help="bfloat16, float16 or float32 (default: bfloat16 on a GPU, float32 on a CPU)")
    add("--keep", help="what stays in memory between phases: all, transformer or nothing")
    add("--max-sequence-length", type=int, metavar="N", help="text positions (default: the checkpoint's, 512)")
    add("--revision", help="the model's revision on the hub")
    add("--offline", action="store_true", help="use only what is on disk")
    add("-o", "--output", type=Path, metavar="FILE", help=".png, .jpg or .webp (default: a name from prompt and seed)")
    add("--force", action="store_true", help="overwrite the output file")
    add("--json", action="store_true", help="one JSON object on the last line of stdout")
    add("--quiet", action="store_true", help="no progress and no notes on stderr")


def _slug(prompt: str) -> str:
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")
    while len(words.encode()) > 60:
        words = words[:-1]
    return words.strip("-") or "picture"


def _output_paths(args: argparse.Namespace, run: "Run") -> list[Path]:
    """One path per picture; checked before any work."""
    from klein_mlx.images import check_output

    pictures = run.request.pictures
    if args.output is None:
        return _free_names(_slug(args.prompt), [seed for _, seed in pictures])
    if len(pictures) == 1:
        paths = [args.output]
    else:
        stem, suffix = args.output.stem, args.output.suffix
        paths = [args.output.with_name(f"{stem}-{seed}{suffix}") for _, seed in pictures]
    if len(set(paths)) < len(paths):
        raise RequestError("--seed has the same value twice; give different seeds")
    for path in paths:
        check_output(path, args.force)
    return paths


def _free_names(slug: str, seeds: Sequence[int]) -> list[Path]:
    """slug-seed.png for each, or the first of slug-seed-2.png, ... that does not exist."""
    from klein_mlx.images import check_output

    paths: list[Path] = []
    for seed in seeds:
        path, number = Path(f"{slug}-{seed}.png"), 2
        while path in paths or os.path.lexists(path):
            path = Path(f"{slug}-{seed}-{number}.png")
            number += 1
        check_output(path, overwrite=False)
        paths.append(path)
    return paths


def _say(args: argparse.Namespace, line: str) -> None:
    if not args.quiet:
        print(line, file=sys.stderr)


def _generate(args: argparse.Namespace) -> int:
    if args.prompt is None:
        raise RequestError('no prompt is given; for example: klein-mlx generate "a red fox in the snow"')
    if args.output is not None:
        from klein_mlx.images import check_output

        check_output(args.output, args.force or args.count > 1 or len(args.seed or ()) > 1)
    pipe, run = _open(args)
    paths = _output_paths(args, run)
    seeds = ", ".join(str(seed) for seed in run.request.seeds)
    _say(args, f"seed {seeds}" if len(run.request.seeds) == 1 else f"seeds {seeds}")
    files = []
    for image, path in zip(_pictures(args, run), paths, strict=True):
        from klein_mlx.images import save_image

        save_image(image, path, args.force)
        files.append(str(path))
        if not args.json:
            print(path, flush=True)
    if args.json:
        print(json.dumps(_report(pipe, run, files)), flush=True)
    return 0


def _open(args: argparse.Namespace) -> "tuple[KleinPipeline, Run]":
    from klein_mlx.pipeline import KleinPipeline

    pipe = KleinPipeline.from_pretrained(
        args.model,
        quantize=args.quantize,
        dtype=args.dtype,
        keep=args.keep,
        revision=args.revision,
        local_files_only=args.offline,
    )
    run = pipe.stream(
        args.prompt,
        image=args.image,
        width=args.width,
        height=args.height,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        negative_prompt=args.negative,
        num_images_per_prompt=args.count,
        seed=args.seed[0] if args.seed and len(args.seed) == 1 else args.seed,
        max_sequence_length=args.max_sequence_length,
    )
    return pipe, run


def _pictures(args: argparse.Namespace, run: "Run") -> Any:
    """The run's images as they are finished, with a progress bar over all steps and the notes as they come."""
    from tqdm import tqdm

    from klein_mlx.events import Picture

    total = run.request.steps * len(run.request.pictures)
    told = 0
    with tqdm(total=total, desc="steps", disable=args.quiet or not sys.stderr.isatty(), leave=False) as bar:
        for event in run:
            for note in run.notes[told:]:
                bar.write(note, file=sys.stderr) if not args.quiet else None
            told = len(run.notes)
            if isinstance(event, Picture):
                yield event.image
            else:
                bar.update()


def _report(pipe: "KleinPipeline", run: "Run", files: list[str]) -> dict[str, Any]:
    import mlx.core as mx

    return {
        "files": files,
        "seeds": [seed for _, seed in run.request.pictures],
        "model": pipe.config.variant.name,
        "steps": run.request.steps,
        "keep": pipe.parts.keep,
        "notes": run.notes,
        "seconds": {phase: round(seconds, 3) for phase, seconds in run.seconds.items()},
        "peak_memory": mx.get_peak_memory(),
    }


def _convert(args: argparse.Namespace) -> int:
    from klein_mlx.convert.__main__ import run_convert

    return run_convert(args)


def _info(args: argparse.Namespace) -> int:
    from klein_mlx.convert import describe, format_description, open_model

    description = describe(open_model(args.model))
    print(json.dumps(description) if args.json else format_description(description))
    return 0


def _in_options(error: KleinError) -> str:
    """The error's line, with an argument that it starts with called as it was typed."""
    line = " ".join(str(error).split())
    name, space, rest = line.partition(" ")
    return f"{OPTIONS[name]}{space}{rest}" if name in OPTIONS and isinstance(error, RequestError) else line


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    commands = {"generate": _generate, "convert": _convert, "info": _info}
    try:
        args = _parser().parse_args(argv)
        return commands[args.command](args)
    except KleinError as error:
        print(f"error: {_in_options(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of stdout is gone; point stdout elsewhere so that Python does not complain while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
