"""`klein-mlx lora info LORA`: what a LoRA file is, before it is put on a model."""

import argparse

from klein_mlx.cli.options import add_options
from klein_mlx.cli.output import cleaned, say, say_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `klein-mlx lora` takes."""
    add = parser.add_argument
    add("action", choices=("info",), metavar="info", help="what the file is: model, layout, rank, words, license")
    add("lora", help="a file, a name in the LoRA folder, or a hub id")
    add_options(parser, ("lora_folder", "offline"))
    add("--json", action="store_true", help="as a JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Print what a LoRA is. Returns the exit code; raises KleinError."""
    from klein_mlx.formats.describe import describe_lora, format_lora
    from klein_mlx.formats.lora_metadata import find_lora

    found = describe_lora(find_lora(args.lora, folder=args.lora_folder, local_files_only=bool(args.offline)))
    if args.json:
        say_json(found)
    else:
        say(*format_lora(cleaned(found)).split("\n"))
    return 0
