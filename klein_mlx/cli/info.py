"""`klein-mlx info MODEL`: what a model or a file is, without reading its weights."""

import argparse
import re
from pathlib import Path
from typing import Any

from klein_mlx.cli.options import BITS, IMAGES, add_options, asked_bits, parse_size, typed_options
from klein_mlx.cli.output import cleaned, say, say_json
from klein_mlx.errors import RequestError, integer
from klein_mlx.request import MAX_REFERENCES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `klein-mlx info` takes."""
    parser.add_argument("model", help='a folder, a hub id, "tiny", or a file that holds a part of a model')
    parser.add_argument("--verify", action="store_true", help="read every file and compare it with its recorded sha256")
    add_options(parser, ("yes", "size"), size="estimate the memory of a picture of this size: 1024x768, 16:9, 2mp")
    references = "include N one-megapixel reference images in the estimate"
    parser.add_argument("--references", type=int, default=0, metavar="N", help=references)
    add_options(parser, ("dtype", "keep", "variant", *BITS))
    parser.add_argument("--json", action="store_true", help="as a JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Print what a model or a file is. Returns the exit code; raises KleinError."""
    from klein_mlx.cli.download import obtain
    from klein_mlx.formats.describe import describe, format_description, verify
    from klein_mlx.formats.open import open_any
    from klein_mlx.formats.part import PartFile

    typed_options(args)
    if (code := _other(args)) is not None:
        return code
    source = open_any(obtain(args.model, yes=args.yes, tokenizer=False), variant=args.variant)
    if args.variant and isinstance(source, PartFile):
        raise RequestError(f"--variant needs a whole model, and {args.model} is a {source.part}")
    description = describe(source)
    if args.size is not None:
        description["memory"] = _memory(source, args)
    if args.verify:
        description["verified"] = verify(source)
    if args.json:
        say_json(description)
    else:
        say(*format_description(cleaned(description)).split("\n"))
    return 0


def _other(args: argparse.Namespace) -> int | None:
    """What fits a file that is no model: a picture's recipe, a LoRA's description; None for anything else."""
    path = Path(args.model)
    if not path.is_file():
        return None
    if path.suffix.lower() in IMAGES:
        from klein_mlx.cli import show

        return show.run(argparse.Namespace(picture=[args.model], json=args.json))
    if path.suffix == ".safetensors" and _is_lora(path):
        from klein_mlx.cli import lora

        return lora.run(argparse.Namespace(lora=args.model, lora_folder=None, offline=True, json=args.json))
    return None


def _is_lora(path: Path) -> bool:
    """By the names of its tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return any(re.search(r"lora|lokr|loha|hada_w", name, re.IGNORECASE) for name in file.keys())
    except (SafetensorError, OSError):
        return False


def _memory(source: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The estimate of a picture of --size, as plain values."""
    from klein_mlx.formats.part import PartFile
    from klein_mlx.request import check_area, check_side
    from klein_mlx.runtime.memory import Work, estimate
    from klein_mlx.runtime.parts import chosen_device, compute_dtype
    from klein_mlx.weights.bits import settle

    if isinstance(source, PartFile):
        raise RequestError(f"--size needs a whole model, and {args.model} is a {source.part}")
    multiple = source.config.pixels_per_token
    width, height = parse_size(args.size, multiple, source.config.default_size)
    check_side("width", width, multiple)
    check_side("height", height, multiple)
    check_area(width, height)
    count = integer("--references", args.references, 0, MAX_REFERENCES)
    references = ((1024, 1024),) * count
    work = Work(
        height,
        width,
        references,
        count * (1024 // multiple) ** 2,
        source.config.max_sequence_length,
        memories=int(source.config.caches_references),
    )
    dtype = compute_dtype(args.dtype)
    found = estimate(source, work, dtype, settle(asked_bits(args), source), args.keep, device=chosen_device())
    return {
        "width": width,
        "height": height,
        "dtype": str(dtype).removeprefix("mlx.core."),
        "keep": found.keep,
        "phases": dict(found.phases),
        "machine": found.machine,
        "fits": found.fits,
    }
