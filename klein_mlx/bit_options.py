"""The options that say how weights are quantised, for every command that takes them. Imports nothing heavy."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from klein_mlx.bits import Asked


def add_bit_arguments(parser: argparse.ArgumentParser, purpose: str) -> None:
    """--quantize and what refines it. purpose: of --quantize, for its help."""
    add = parser.add_argument
    add("-q", "--quantize", metavar="BITS", help=f"3, 4, 5, 6, 8, mxfp4, nvfp4, mxfp8 or mixed-4: {purpose}")
    add("--group-size", type=int, metavar="N", help="weights that share a scale: 32, 64 or 128 (default: 64)")
    add("--transformer-bits", metavar="BITS", help="as --quantize, for the transformer alone (none: leave it)")
    add("--text-encoder-bits", metavar="BITS", help="as --quantize, for the text encoder alone")
    add(
        "--quantize-layer",
        action="append",
        default=[],
        metavar="PATTERN=BITS",
        help="for the layers of this pattern, as 'double_blocks.*.to_v=8'; repeat, a later one wins",
    )


def asked_bits(args: argparse.Namespace) -> "Asked | None":
    """What the parsed options ask for. Raises RequestError."""
    from klein_mlx.bits import from_options

    return from_options(
        args.quantize, args.group_size, args.transformer_bits, args.text_encoder_bits, args.quantize_layer or []
    )
