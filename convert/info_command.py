"""`klein-mlx info MODEL`: what a model or a file is, without reading its weights."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `klein-mlx info` takes."""
    parser.add_argument("model", help='a folder, a hub id, "tiny", or a file that holds a part of a model')
    parser.add_argument("--verify", action="store_true", help="read every file and compare it with its recorded sha256")
    parser.add_argument("-y", "--yes", action="store_true", help="download what is missing without asking")
    parser.add_argument("--json", action="store_true", help="as a JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Print what a model or a file is. Returns the exit code; raises KleinError."""
    from klein_mlx.convert import describe, format_description, open_any
    from klein_mlx.convert.verify import verify
    from klein_mlx.download import obtain

    source = open_any(obtain(args.model, yes=args.yes))
    description = describe(source)
    if args.verify:
        description["verified"] = verify(source)
    print(json.dumps(description) if args.json else format_description(description))
    return 0
