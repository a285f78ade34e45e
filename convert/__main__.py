"""`python -m klein_mlx.convert SOURCE DESTINATION`, the same as `klein-mlx convert`."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from klein_mlx.errors import KleinError, RequestError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (see {self.prog} --help)")


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """What `klein-mlx convert` takes."""
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a folder in diffusers' layout, one of our own, or a hub id")
    add("destination", metavar="DESTINATION", help="the folder to make; its parent must exist")
    add(
        "-q",
        "--quantize",
        metavar="BITS",
        help="4 or 8: quantise the linear layers of the blocks (default: keep dtypes)",
    )
    add("--force", action="store_true", help="replace a checkpoint that is there already")
    add("--variant", metavar="NAME", help='"tiny" marks the embedded checkpoint; others are told from their sizes')
    add("--revision", help="the source's revision on the hub")
    add("--offline", action="store_true", help="use only what is on disk")
    add("--quiet", action="store_true", help="no progress on stderr")


def run_convert(args: argparse.Namespace) -> int:
    """Convert as the parsed arguments say; prints the destination. Returns the exit code; raises KleinError."""
    from tqdm import tqdm

    from klein_mlx.convert import convert_checkpoint, open_model
    from klein_mlx.quantize import parse

    quantization = parse(args.quantize)  # before a download, which may take long
    source = open_model(args.source, revision=args.revision, local_files_only=args.offline)
    hidden = args.quiet or not sys.stderr.isatty()
    with tqdm(unit="B", unit_scale=True, desc="converting", disable=hidden, leave=False, file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        path = convert_checkpoint(
            source,
            args.destination,
            quantize=quantization,
            force=args.force,
            variant=args.variant,
            progress=None if hidden else show,
        )
    print(path)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = _Parser(
        prog="python -m klein_mlx.convert",
        description="Turn PyTorch weights into an MLX checkpoint.",
        allow_abbrev=False,
    )
    add_convert_arguments(parser)
    try:
        return run_convert(parser.parse_args(argv))
    except KleinError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
