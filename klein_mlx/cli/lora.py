"""`klein-mlx lora info LORA`: what a LoRA file is, before it is put on a model."""

import argparse

from klein_mlx.cli.options import add_options
from klein_mlx.cli.output import cleaned, say, say_json
from klein_mlx.errors import RequestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `klein-mlx lora` takes."""
    add = parser.add_argument
    parser.usage = "klein-mlx lora info LORA [OPTIONS]"
    add("words", nargs="+", metavar="LORA", help="a file, a name in the LoRA folder, or a Hub id")
    add_options(parser, ("lora_folder", "offline"))
    add("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Print what a LoRA is. Returns the exit code; raises KleinError."""
    from klein_mlx.formats.describe import describe_lora, format_lora
    from klein_mlx.formats.lora_metadata import find_lora

    words = args.words[1:] if args.words[0] == "info" else args.words
    if len(words) != 1:
        raise RequestError("klein-mlx lora info needs one LORA; for example: klein-mlx lora info style.safetensors")
    found = describe_lora(find_lora(words[0], folder=args.lora_folder, local_files_only=bool(args.offline)))
    if args.json:
        say_json(found)
    else:
        say(*format_lora(cleaned(found)).split("\n"))
    return 0
