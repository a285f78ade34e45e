"""`klein-mlx mcp`: tools for agents, by the Model Context Protocol over stdin and stdout."""

import argparse
import os
import sys
from pathlib import Path

from klein_mlx.cli.output import note
from klein_mlx.cli.serve import add_model_arguments, lora_folder, obtained, pipeline_arguments
from klein_mlx.errors import RequestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `klein-mlx mcp` takes."""
    add_model_arguments(parser)
    add = parser.add_argument
    add("--root", type=Path, metavar="DIR", help="let the client read and save pictures in this folder; else none")


def run(args: argparse.Namespace) -> int:
    """Serve the client that started this process, until it leaves. Returns the exit code; raises KleinError."""
    from klein_mlx.server import mcp
    from klein_mlx.server.settings import Settings

    if args.root is not None and not args.root.is_dir():
        raise RequestError(f"--root {args.root} is not a folder")
    if not 0 <= args.idle_unload < 1e6:
        raise RequestError(f"--idle-unload is {args.idle_unload:g}; it must be minutes, 0 or more")
    if sys.stdin.isatty():
        note("this speaks JSON-RPC, for a program that starts it; Ctrl-D ends it")
    target = os.dup(1)
    os.dup2(2, 1)  # whatever else prints, in a library or a child: the client reads JSON only
    model, name = obtained(args)
    settings = Settings(
        model=model,
        pipeline=pipeline_arguments(args),
        aliases=tuple({name} - {model}),
        idle_seconds=60 * args.idle_unload,
        loras=lora_folder(args),
    )
    mcp.run(settings, args.root, 0, target)
    return 0
