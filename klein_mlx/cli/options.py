"""The options of `klein-mlx generate`: their names, their help, and errors told in their words."""

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klein_mlx.errors import KleinError, RequestError, nearest

if TYPE_CHECKING:
    from klein_mlx.weights.bits import Asked


MEGAPIXEL = 1024 * 1024


_RIGHT = "it must be WIDTHxHEIGHT (1024x768), an aspect (16:9), megapixels (2mp), or both (16:9,2mp)"


def parse_size(text: str, multiple: int, default_side: int) -> tuple[int, int]:
    """(width, height) in pixels of a text.

    text: "1024x768" as it is; an aspect, "16:9", of default_side**2 pixels; "2mp": a square of 2 * 1024 * 1024; or an
    aspect with its pixels, "16:9,2mp". multiple: of which sides are made, nearest in shape and area together.
    Raises RequestError for any other text, or an aspect beyond 8 : 1.
    """
    clean = text.strip().lower()
    if exact := re.fullmatch(r"(\d{1,5})\s*[x×]\s*(\d{1,5})", clean):
        return int(exact[1]), int(exact[2])
    aspect, area = 1.0, float(default_side**2)
    for part in re.split(r"[,\s]+", clean):
        ratio = re.fullmatch(r"(\d{1,4}(?:\.\d{1,4})?):(\d{1,4}(?:\.\d{1,4})?)", part)
        pixels = re.fullmatch(r"(\d{1,3}(?:\.\d{1,4})?|\.\d{1,4})mp", part)
        if ratio and float(ratio[1]) and float(ratio[2]):
            aspect = float(ratio[1]) / float(ratio[2])
        elif pixels and float(pixels[1]):
            area = float(pixels[1]) * MEGAPIXEL
        else:
            raise RequestError(f"--size is {text[:40]!r}; {_RIGHT}")
    if not 1 / 8 <= aspect <= 8:
        raise RequestError(f"--size is {text[:40]!r}; its aspect must be at most 8 : 1")
    return _nearest(math.sqrt(area * aspect), math.sqrt(area / aspect), multiple)


def _nearest(width: float, height: float, multiple: int) -> tuple[int, int]:
    """The multiples around these sides whose shape and area are nearest, as ratios."""

    def around(side: float) -> list[int]:
        below = max(1, math.floor(side / multiple)) * multiple
        return [below, below + multiple]

    def distance(size: tuple[int, int]) -> float:
        w, h = size
        return abs(math.log(w / h * height / width)) + abs(math.log(w * h / (width * height)))

    return min(((w, h) for w in around(width) for h in around(height)), key=distance)


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
    from klein_mlx.weights.bits import from_options

    return from_options(
        args.quantize, args.group_size, args.transformer_bits, args.text_encoder_bits, args.quantize_layer or []
    )


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
    from klein_mlx.weights.lora import checked_scale

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


DEFAULT_MODEL = "black-forest-labs/FLUX.2-klein-4B"


GENERATE_EXAMPLES = """examples:
  klein-mlx "a red circle left of a blue square" --model tiny -o out.png
  klein-mlx "a red fox in the snow" --width 768 --height 1024 --seed 7
  klein-mlx "make it autumn" -i fox.png -o autumn.png
  klein-mlx "a red hat" --init-image fox.png --mask head.png -o hat.png
  klein-mlx "snowy hills" --init-image fox.png --extend left=256,right=256 -o wide.png
"""


# What the library calls an argument, and what the command line does.
OPTIONS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "negative_prompt": "--negative",
    "batch_guidance": "--batch-guidance",
    "num_images_per_prompt": "--count",
    "max_sequence_length": "--max-sequence-length",
    "literal_prompt": "--literal-prompt",
    "large_reference": "--large-reference",
    "reuse_references": "--reuse-references",
    "init_image": "--init-image",
    "init_reference": "--init-reference",
    "mask_image": "--mask",
    "mask_blur": "--mask-blur",
    "invert_mask": "--invert-mask",
    "padding_mask_crop": "--mask-crop",
    "strength": "--strength",
    "extend": "--extend",
    "group_size": "--group-size",
    "quantize_layer": "--quantize-layer",
    "transformer_bits": "--transformer-bits",
    "text_encoder_bits": "--text-encoder-bits",
    **{name: f"--{name}" for name in ("width", "height", "seed", "quantize", "dtype", "keep")},
}


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and without abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> Any:
        """What argparse found, in our words: the option, its value, what would be right."""
        kinds = {"int": "a whole number", "float": "a number"}
        if found := re.fullmatch(r"argument (?:\S+/)?(\S+): invalid (int|float) value: (.*)", message, re.S):
            value = found[3] if len(found[3]) <= 60 else f"{found[3][:57]}..."
            message = f"{found[1]} is {value}; it must be {kinds[found[2]]}"
        raise RequestError(f"{message}{self._hint(message)} (see {self.prog} --help)")

    def _hint(self, message: str) -> str:
        """What may have been meant by an argument that is not known."""
        _, known, rest = message.partition("unrecognized arguments: ")
        if not known:
            return ""
        option = next((word.partition("=")[0] for word in rest.split() if word.startswith("-")), None)
        if option is None:
            prompt = next((action for action in self._actions if action.dest == "prompt"), None)
            if prompt is None:
                return ""
            return (
                "; another prompt is --prompt"
                if prompt.option_strings
                else "; put the prompt in quotes, as one argument"
            )
        near = nearest(option, self._option_string_actions)
        return f"; did you mean {near}?" if near else ""


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that can be asked of one picture or several. None: not given; `settings.complete` fills it in."""
    add = parser.add_argument
    add("prompt", nargs="?", help="what to draw, or how to change the reference; {red|blue} and __name__ vary it")
    add_request_arguments(parser)
    for action in parser._actions:
        if action.dest != "help":
            action.default = None


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """The options without the prompt, in their groups."""
    add = parser.add_argument
    add("-m", "--model", help='a hub id, a folder, a short name ("klein-mlx models"), "tiny"')
    add("-i", "--image", action="append", metavar="FILE", help="a reference to edit or to draw from; repeat for more")
    add("--large-reference", action="store_true", help="let a single reference have 4 megapixels instead of 1")
    add("--reuse-references", action="store_true", help="compute references in the first step only (an approximation)")
    _add_edit_arguments(parser.add_argument_group("starting from a picture"))
    add("--width", type=int, help="in pixels, a multiple of 16 (default: the reference's, or 1024; 128 for tiny)")
    add("--height", type=int, help="in pixels, a multiple of 16")
    add("--size", metavar="SIZE", help="1024x768; 16:9, of the usual number of pixels; 2mp; 16:9,2mp")
    add("--steps", type=int, help="denoising steps (default: the variant's, 4 for distilled ones)")
    add("--guidance", type=float, help="guidance scale (default: the variant's; base variants only)")
    add("--sigmas", metavar="LIST", help="noise levels before the shift, as 1,0.75,0.5,0.25, in place of --steps")
    add("--negative", metavar="TEXT", help="what to steer away from; needs guidance over 1")
    add(
        "--batch-guidance",
        action=argparse.BooleanOptionalAction,
        help="guidance's two branches in one pass, or one after the other (default: as memory allows)",
    )
    add("--seed", type=int, action="append", help="0 to 2**64 - 1; repeat for several pictures (default: random)")
    add("-n", "--count", type=int, help="pictures, of seeds SEED, SEED + 1, ... (default: 1)")
    add_bit_arguments(parser, "quantise the weights while loading")
    add(
        "--transformer",
        metavar="FILE",
        help="a file or folder in place of the model's own (BFL's, ComfyUI's, GGUF, ...)",
    )
    add("--text-encoder", metavar="FILE", help="likewise (ComfyUI's, GGUF, mlx-lm's, ...)")
    add("--vae", metavar="VAE", help="a file, folder or hub id in place of the model's own VAE")
    add("--small-decoder", action="store_true", help="FLUX.2-small-decoder as the VAE: decodes faster")
    add_lora_arguments(parser, "put a LoRA on the model, SCALE times (default: 1)")
    add("--dtype", help="bfloat16, float32, or float16, for an M1 or M2 (default: bfloat16 on a GPU, float32 on a CPU)")
    add(
        "--prompt-cache",
        nargs="?",
        const=True,
        metavar="DIR",
        help="keep prompts' embeddings on disk: one that comes again loads no encoder (default: not kept)",
    )
    add("--keep", help="what stays in memory between phases: all, transformer or nothing")
    add("--max-sequence-length", type=int, metavar="N", help="text positions (default: the checkpoint's, 512)")
    add("--literal-prompt", action="store_true", help="special tokens in a prompt, as <|im_end|>, are text")
    add("--revision", help="the model's revision on the hub")
    add("--offline", action="store_true", help="use only what is on disk")
    add("-y", "--yes", action="store_true", help="download what is missing without asking")
    _add_many_arguments(parser.add_argument_group("many at once"))
    _add_output_arguments(parser.add_argument_group("output"))


def _add_many_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--prompt-file", metavar="FILE", help="a prompt a line, # for comments; or JSONL with any options; - is stdin")
    add("--no-wildcards", action="store_true", help="take {a|b} and __name__ in prompts as they are")
    add("--enhance", action="store_true", help="let a language model rewrite the prompt; the recipe keeps both")
    add("--enhance-model", metavar="MODEL", help="for --enhance: a folder or hub id (default: the model's own Qwen3)")
    add("--grid", nargs="?", const="", metavar="FILE", help="a contact sheet of all pictures too")
    add("--config", metavar="FILE", help="defaults, presets, models (default: ~/.config/klein-mlx/config.toml)")
    add("--preset", metavar="NAME", help="options from the config's [presets.NAME]")


def _add_output_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help=".png, .jpg or .webp, with {slug} {seed} {index} {date} {time} {model} {steps}; "
        "- is stdout (default: {slug}-{seed}.png, or the next free name)",
    )
    add("--format", choices=("png", "jpg", "webp"), help="of names that are made, and of -o - (default: png)")
    add("--force", action="store_true", help="overwrite the output file")
    add("--show", action="store_true", help="draw the pictures in the terminal, where it can")
    add("--show-steps", action="store_true", help="draw a sketch after each step too")
    add("--no-metadata", action="store_true", help="keep the recipe out of the picture")
    add("--json", action="store_true", help="one JSON object on the last line of stdout")
    add("--progress", choices=("bar", "json"), help="json: one object a line on stderr, for programs (default: bar)")
    add("--quiet", action="store_true", help="no progress and no notes on stderr")


def _add_edit_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--init-image", metavar="FILE", help="the picture to start from, instead of from noise")
    add("--strength", type=float, metavar="S", help="over 0, at most 1: how far to go from it (default: 0.6; masks: 1)")
    add("--mask", metavar="FILE", help="of the picture's size; white is repainted, the rest comes back as it was")
    add("--mask-blur", type=int, metavar="PX", help="width of the soft edge inside the mask (default: 4)")
    add("--invert-mask", action="store_true", help="repaint what is black instead")
    add("--mask-crop", type=int, metavar="PX", help="repaint the mask's surroundings alone, PX around it, enlarged")
    add("--extend", metavar="SIDES", help="paint a border: left=256,right=256 (left, top, right, bottom), or 1536x1024")
    add(
        "--init-reference",
        action=argparse.BooleanOptionalAction,
        help="show the picture as first reference too (default: with --mask and --extend)",
    )


def in_options(error: KleinError) -> str:
    """The error's line, with the arguments that it names called as they were typed."""
    line = " ".join(str(error).split())
    if not isinstance(error, RequestError):
        return line
    name, space, rest = line.partition(" ")
    named = "|".join(option for option in OPTIONS if "_" in option)  # other words may mean themselves
    rest = re.sub(rf"(?<![\w./'-])({named})(?![\w./'-])", lambda match: OPTIONS[match[1]], rest)
    return f"{OPTIONS.get(name, name)}{space}{rest}"
