"""`klein-mlx convert SOURCE DESTINATION`: any model that can be read into a checkpoint of our own, or diffusers'."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from klein_mlx.cli.options import (
    BITS,
    LORAS,
    add_options,
    asked_bits,
    asked_loras,
    file_name,
    lora_options,
    refuse_alone,
)
from klein_mlx.cli.output import byte_bar, note, say
from klein_mlx.config import ONE_STEP, PARTS, TINY
from klein_mlx.errors import RequestError

if TYPE_CHECKING:
    from klein_mlx.weights.bits import Asked
    from klein_mlx.weights.checkpoint import Source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `klein-mlx convert` takes."""
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a model to convert: a folder, a file, a Hub id or a short name")
    add("destination", type=file_name, metavar="DESTINATION", help="the folder to write; its parent must exist")
    add_options(parser, BITS, quantize="quantize the weights: 3, 4, 5, 6, 8, mxfp4, nvfp4, mxfp8 or mixed-4")
    add("--calibrate", action="store_true", help="calibrate on a few prompts: more accurate; takes minutes to an hour")
    add(
        "--calibrate-prompts",
        metavar="FILE",
        help="with --calibrate: prompts to draw, one per line (default: built in)",
    )
    for part in PARTS:
        option, name = part.replace("_", "-"), part.replace("_", " ").replace("vae", "VAE")
        add(f"--{option}", metavar="FILE", help=f"take the {name} from this file, folder or Hub id instead")
    add_options(
        parser, LORAS, lora="merge a LoRA into the weights at strength SCALE (1), before quantizing; repeat for more"
    )
    add("--to", choices=("klein", "diffusers"), default="klein", help="the layout to write (default: klein)")
    add("--verify", action="store_true", help="read the result back and compare it with the source")
    add("--dry-run", action="store_true", help="print the plan with sizes; write nothing")
    add("--upload", metavar="REPO", help="upload the result to this repository on the Hub (owner/name)")
    add("--force", action="store_true", help="replace a checkpoint that is there already")
    add("--variant", metavar="NAME", help="the model's variant, where its files do not say")
    add_options(parser, ("revision", "offline", "yes"))
    add("--quiet", action="store_true", help="no progress on stderr")


def run(args: argparse.Namespace) -> int:
    """Convert as the parsed arguments say; prints the destination. Returns the exit code; raises KleinError."""
    from klein_convert.checkpoint import check_variant, convert_checkpoint, plan_conversion
    from klein_convert.destination import check_upload, upload
    from klein_convert.export import export_diffusers, merge_loras
    from klein_mlx.cli.download import Consent, obtain, obtain_part
    from klein_mlx.formats.open import open_model, with_variant

    refuse_alone(vars(args), vars(args))
    asked = asked_bits(args)  # before a download, which may take long
    if args.to == "diffusers" and (asked or args.verify or args.dry_run):
        raise RequestError("--to diffusers writes whole weights; it takes no --quantize, --verify, --dry-run")
    prompts = _prompts(args)
    check_variant(args.variant)
    if args.upload:
        check_upload(args.upload, token=not args.dry_run)
    consent = Consent(args.offline, args.yes, args.quiet)
    parts = {p: obtain_part(p, value, consent=consent) if (value := getattr(args, p)) else None for p in PARTS}
    needed = {part for part in PARTS if parts[part] is None}
    model = obtain(args.source, revision=args.revision, parts=needed, consent=consent)
    revision = None if os.path.exists(model) else args.revision  # a file of the Hub's is a path by now
    source = open_model(model, revision=revision, local_files_only=args.offline, parts=parts)
    source = merge_loras(source, asked_loras(args.lora), **lora_options(args))
    if args.variant and (args.variant != TINY.name or args.to == "diffusers"):
        source = with_variant(source, args.variant)
    if args.dry_run:
        say(*plan_conversion(source, args.destination, quantize=asked, force=args.force).lines())
        return 0
    if prompts:
        source = _calibrated(source, asked, prompts, args.quiet)
        asked = None
    odd: list[str] = []
    with byte_bar("converting", args.quiet) as show:
        if args.to == "diffusers":
            if source.config.variant == ONE_STEP:
                odd.append(f"diffusers' layout does not state {ONE_STEP.name}: open it with --variant {ONE_STEP.name}")
            path = export_diffusers(source, args.destination, force=args.force, progress=show)
        else:
            options = {"quantize": asked, "force": args.force, "variant": args.variant, "verify": args.verify}
            warn = lambda line: odd.append(f"warning: {line}")  # noqa: E731
            path = convert_checkpoint(source, args.destination, **options, progress=show, warn=warn)
    note(*odd)
    say(str(path))
    if args.upload:
        say(upload(path, args.upload))
    return 0


def _prompts(args: argparse.Namespace) -> Sequence[str]:
    """What to calibrate on; nothing if that is not asked for."""
    if not args.calibrate:
        if args.calibrate_prompts:
            raise RequestError("--calibrate-prompts needs --calibrate")
        return ()
    if asked_bits(args) is None:
        raise RequestError("--calibrate needs --quantize, as in --quantize mixed-4")
    if args.calibrate_prompts is None:
        from klein_convert.calibrate import PROMPTS

        return PROMPTS
    try:
        lines = Path(args.calibrate_prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RequestError(f"{args.calibrate_prompts}: cannot be read as text ({error})") from None
    if not any(line.strip() for line in lines):
        raise RequestError(f"{args.calibrate_prompts}: holds no prompt; it must have one per line")
    return [line.strip() for line in lines if line.strip()]


def _calibrated(source: "Source", asked: "Asked | None", prompts: Sequence[str], quiet: bool) -> "Source":
    from tqdm import tqdm

    from klein_convert.calibrate import calibrate
    from klein_mlx.weights.bits import settle

    layers = sum(len(settings.layers or ()) for settings in settle(asked, source).values())
    with tqdm(
        total=layers, desc="calibrating", unit="layer", leave=False, disable=quiet or not sys.stderr.isatty()
    ) as bar:
        return calibrate(source, asked, prompts=prompts, done=lambda path: (bar.update(), None)[1])
