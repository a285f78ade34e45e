"""The options that name LoRAs, for every command that takes some: `--lora PATH[:SCALE]`, which may be repeated."""

import argparse
import re
from typing import Any

from klein_mlx.errors import RequestError


def add_lora_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """what: what is done with them, for the help."""
    add = parser.add_argument
    add(
        "--lora",
        action="append",
        metavar="LORA[:SCALE]",
        help=f"{what}: a file, a name in the LoRA folder, or a hub id; repeat for more",
    )
    add("--lora-partial", action="store_true", help="leave out keys of a LoRA that belong to nothing in this model")
    add_lora_folder(parser)


def add_lora_folder(parser: argparse.ArgumentParser) -> None:
    """Where a LoRA's name is looked up."""
    where = "where names are looked up ($KLEIN_MLX_LORAS, ~/.config/klein-mlx/loras)"
    parser.add_argument("--lora-folder", metavar="FOLDER", help=where)


def split_scale(text: str) -> tuple[str, float]:
    """`PATH:SCALE`, cut at the last colon if a number follows it; the scale is 1 else."""
    path, colon, scale = text.rpartition(":")
    if path and colon and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", scale, re.I):
        return path, float(scale)
    return text, 1.0


def asked_loras(args: argparse.Namespace) -> list[tuple[str, float]]:
    """Path and scale of each LoRA, in the order in which they were given."""
    from klein_mlx.lora import checked_scale

    loras = [split_scale(text) for text in args.lora or ()]
    for path, scale in loras:
        try:
            checked_scale(scale)
        except RequestError as error:
            raise RequestError(f"--lora {path:.200}: its {error}") from None
    return loras


def lora_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `KleinPipeline.load_lora` takes besides."""
    return {"partial": args.lora_partial, "folder": args.lora_folder, "local_files_only": args.offline}
