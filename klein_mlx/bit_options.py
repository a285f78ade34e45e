"""The options that say how weights are quantised, for every command that takes them. Imports nothing heavy."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from klein_mlx.errors import RequestError

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


def refuse_group_size_alone(typed: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """RequestError for a --group-size that was typed where none of the options quantises anything."""
    bits = ("quantize", "transformer_bits", "text_encoder_bits", "quantize_layer")
    if typed.get("group_size") is not None and not any(options.get(name) for name in bits):
        raise RequestError(f"group_size is {typed['group_size']}, but nothing is quantised; add --quantize 4")


def asked_bits(args: argparse.Namespace) -> "Asked | None":
    """What the parsed options ask for. Raises RequestError."""
    from klein_mlx.bits import from_options

    return from_options(
        args.quantize, args.group_size, args.transformer_bits, args.text_encoder_bits, args.quantize_layer or []
    )
