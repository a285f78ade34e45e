"""`klein-mlx convert SOURCE DESTINATION`: any model that can be read into a checkpoint of our own, or diffusers'."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from klein_mlx.bit_options import add_bit_arguments, asked_bits
from klein_mlx.config import PARTS
from klein_mlx.errors import RequestError
from klein_mlx.terminal import has_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `klein-mlx convert` takes."""
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a folder in diffusers' layout, of mflux's or of our own, or a hub id")
    add("destination", metavar="DESTINATION", help="the folder to make; its parent must exist")
    add_bit_arguments(parser, "quantise the weights (default: keep dtypes)")
    for part in PARTS:
        option, name = part.replace("_", "-"), part.replace("_", " ")
        add(f"--{option}", metavar="FILE", help=f"take the {name} from this file or folder instead")
    add("--to", choices=("klein", "diffusers"), default="klein", help="the layout to write (default: our own)")
    add("--verify", action="store_true", help="read what was written again and compare it with the source")
    add("--dry-run", action="store_true", help="print what would be done, with sizes; write nothing")
    add("--upload", metavar="REPO", help="upload the result to this repository of the Hub (owner/name)")
    add("--force", action="store_true", help="replace a checkpoint that is there already")
    add("--variant", metavar="NAME", help='"tiny" marks the embedded checkpoint; others are told from their sizes')
    add("--revision", help="the source's revision on the hub")
    add("--offline", action="store_true", help="use only what is on disk")
    add("-y", "--yes", action="store_true", help="download what is missing without asking")
    add("--quiet", action="store_true", help="no progress on stderr")


def run(args: argparse.Namespace) -> int:
    """Convert as the parsed arguments say; prints the destination. Returns the exit code; raises KleinError."""
    from klein_mlx.convert import convert_checkpoint, find_vae, open_model
    from klein_mlx.convert.export import export_diffusers
    from klein_mlx.convert.folder import plan_conversion
    from klein_mlx.convert.upload import check_upload, upload
    from klein_mlx.download import obtain, obtain_vae

    asked = asked_bits(args)  # before a download, which may take long
    if args.to == "diffusers" and (asked or args.variant or args.verify or args.dry_run):
        raise RequestError(
            "--to diffusers writes whole weights; it takes no --quantize, --variant, --verify, --dry-run"
        )
    if args.upload and not args.dry_run:
        check_upload(args.upload)
    parts = {part: getattr(args, part) for part in PARTS}
    consent = {"offline": args.offline, "yes": args.yes, "quiet": args.quiet}
    if args.vae:
        parts["vae"] = find_vae(obtain_vae(args.vae, **consent), local_files_only=args.offline)
    needed = {part for part in PARTS if parts[part] is None}
    model = obtain(args.source, revision=args.revision, parts=needed, **consent)
    source = open_model(model, revision=args.revision, local_files_only=args.offline, parts=parts)
    if args.dry_run:
        print("\n".join(plan_conversion(source, args.destination, quantize=asked, force=args.force).lines()))
        return 0
    odd: list[str] = []
    with _progress(args.quiet) as show:
        if args.to == "diffusers":
            path = export_diffusers(source, args.destination, force=args.force, progress=show)
        else:
            options = {"quantize": asked, "force": args.force, "variant": args.variant, "verify": args.verify}
            warn = lambda line: odd.append(f"warning: {line}")  # noqa: E731
            path = convert_checkpoint(source, args.destination, **options, progress=show, warn=warn)
    print(*odd, sep="\n", end="\n" * bool(odd), file=sys.stderr)
    print(path)
    if args.upload:
        print(upload(path, args.upload))
    return 0


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr with bytes, rate and time left, where stderr is a terminal."""
    if quiet or not has_bar(sys.stderr):
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, desc="converting", leave=False, file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
