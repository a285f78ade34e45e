"""What a run of the command can be asked: a picture's options, and those of the model, the files and the terminal.

Parsers are built from the fields, and so is everything else that reads options: the config file, the lines of a prompt
file, recipes, completion.
"""

import argparse
import math
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klein_mlx.cli.hints import option_hint
from klein_mlx.cli.output import say
from klein_mlx.errors import KleinError, RequestError, named
from klein_mlx.options import Option, Options, option, option_of

if TYPE_CHECKING:
    from klein_mlx.config import ModelConfig
    from klein_mlx.weights.bits import Asked

DEFAULT_MODEL = "black-forest-labs/FLUX.2-klein-4B"
DTYPES = ("bfloat16", "float32", "float16")
KEPT = ("all", "transformer", "nothing")

GENERATE_EXAMPLES = """examples:
  klein-mlx "a red circle left of a blue square" --model tiny -o out.png
  klein-mlx "a red fox in the snow" --width 768 --height 1024 --seed 7
  klein-mlx "make it autumn" -i fox.png -o autumn.png
  klein-mlx "a red hat" --init-image fox.png --mask head.png -o hat.png
  klein-mlx "snowy hills" --init-image fox.png --extend left=256,right=256 -o wide.png
"""

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
            raise RequestError("--size", text[:40], _RIGHT)
    if not 1 / 8 <= aspect <= 8:
        raise RequestError("--size", text[:40], "its aspect must be at most 8 : 1")
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


def _run_option(help: str, flag: str, value: Any = None, **details: Any) -> Any:
    return option(help, flag, value, per_run=True, **details)


def _switch(help: str, flag: str, **details: Any) -> Any:
    return _run_option(help, flag, False, kind=bool, **details)


@dataclass(frozen=True)
class RunOptions(Options):
    """Everything that can be asked of `klein-mlx generate`. models, wildcards: from the config file: short names of
    models, and the folders in which __names__ are looked up."""

    prompt: str | None = option(
        "what to draw, or how to change the reference image; {red|blue} and __name__ vary it; - reads stdin",
        "--prompt",
        short=("-p",),
        metavar="TEXT",
        common=True,
    )
    size: str | None = option(
        "WIDTHxHEIGHT (1024x768), aspect (16:9), megapixels (2mp) or both (16:9,2mp)",
        "--size",
        metavar="SIZE",
        excludes=("width", "height"),
        common=True,
    )
    output: Path | None = option(
        ".png, .jpg or .webp, with {{slug}} {{seed}} {{index}} {{date}} {{time}} {{model}} {{steps}}; a folder; "
        "- is stdout",
        "--output",
        short=("-o",),
        kind=Path,
        metavar="FILE",
        default="{{slug}}-{{seed}}.png, or the next free name",
        common=True,
    )
    model: str = _run_option(
        'model on the Hub, a folder, a short name ("klein-mlx models") or "tiny"',
        "--model",
        DEFAULT_MODEL,
        short=("-m",),
        default=DEFAULT_MODEL,
        excludes=("revision",),
        common=True,
    )
    quantize: str | None = _run_option(
        "quantize the weights while loading: 3, 4, 5, 6, 8, mxfp4, nvfp4, mxfp8 or mixed-4",
        "--quantize",
        short=("-q",),
        metavar="BITS",
        common=True,
    )
    lora: Sequence[str] | None = _run_option(
        "apply a LoRA at strength SCALE (1): a file, a name in the LoRA folder, or a Hub id",
        "--lora",
        many=True,
        metavar="LORA[:SCALE]",
        common=True,
    )
    show: bool = _switch("draw the pictures in the terminal, where it can", "--show", common=True)
    revision: str | None = _run_option("the model's revision on the Hub", "--revision", group="model")
    group_size: int | None = _run_option(
        "weights that share a scale: 32, 64 or 128", "--group-size", kind=int, metavar="N", default="64", group="model"
    )
    transformer_bits: str | None = _run_option(
        "like {quantize}, for the transformer only (none: leave it as it is)",
        "--transformer-bits",
        metavar="BITS",
        group="model",
    )
    text_encoder_bits: str | None = _run_option(
        "like {quantize}, for the text encoder only", "--text-encoder-bits", metavar="BITS", group="model"
    )
    quantize_layer: Sequence[str] | None = _run_option(
        "bits of the layers that match, such as 'double_blocks.*.to_v=8'; later patterns override",
        "--quantize-layer",
        many=True,
        metavar="PATTERN=BITS",
        group="model",
    )
    transformer: str | None = _run_option(
        "file, folder or Hub id in place of the model's own (BFL's, ComfyUI's, GGUF, ...)",
        "--transformer",
        metavar="FILE",
        group="model",
    )
    text_encoder: str | None = _run_option(
        "likewise for the text encoder (ComfyUI's, GGUF, mlx-lm's, ...)",
        "--text-encoder",
        metavar="FILE",
        group="model",
    )
    variant: str | None = _run_option(
        "the model's variant, where its files do not say: 4b, base-4b, 4b-1step, 9b-kv, ...",
        "--variant",
        metavar="NAME",
        group="model",
    )
    vae: str | None = _run_option(
        "file, folder or Hub id in place of the model's own VAE",
        "--vae",
        metavar="VAE",
        excludes=("small_decoder",),
        group="model",
    )
    small_decoder: bool = _switch(
        "FLUX.2-small-decoder as the VAE: decodes faster", "--small-decoder", excludes=("vae",), group="model"
    )
    lora_partial: bool = _switch(
        "skip keys of a LoRA that match nothing in this model", "--lora-partial", group="model"
    )
    lora_folder: str | None = _run_option(
        "where LoRA names are looked up",
        "--lora-folder",
        metavar="FOLDER",
        default="$KLEIN_MLX_LORAS, or ~/.config/klein-mlx/loras",
        group="model",
    )
    dtype: str | None = _run_option(
        "dtype to compute in; float16 suits M1 and M2",
        "--dtype",
        choices=DTYPES,
        metavar="DTYPE",
        default="bfloat16 on a GPU, float32 on a CPU",
        group="model",
    )
    prompt_cache: str | bool | None = _run_option(
        "cache prompt embeddings on disk; a repeated prompt skips the text encoder",
        "--prompt-cache",
        bare=True,
        metavar="FOLDER",
        group="model",
    )
    keep: str | None = _run_option(
        "what stays in memory between phases",
        "--keep",
        choices=KEPT,
        metavar="WHAT",
        default="as memory allows",
        group="model",
    )
    offline: bool = _switch("use only what is on disk", "--offline", group="model")
    yes: bool = _switch("download what is missing without asking", "--yes", short=("-y",), group="model")
    prompt_file: str | None = _run_option(
        "one prompt per line, # for comments; or JSONL with any options; - is stdin",
        "--prompt-file",
        metavar="FILE",
        typed=True,
        group="many at once",
    )
    no_wildcards: bool = _switch("take {a|b} and __name__ in prompts literally", "--no-wildcards", group="many at once")
    enhance: bool = _switch(
        "let a language model rewrite the prompt; the recipe keeps both", "--enhance", group="many at once"
    )
    enhance_model: str | None = _run_option(
        "language model for {enhance}: a folder or Hub id",
        "--enhance-model",
        metavar="MODEL",
        default="the model's own Qwen3",
        group="many at once",
    )
    grid: str | None = _run_option(
        "also make a contact sheet of all pictures", "--grid", bare="", metavar="FILE", group="many at once"
    )
    config: str | None = _run_option(
        "file with defaults, presets and models",
        "--config",
        metavar="FILE",
        default="~/.config/klein-mlx/config.toml",
        typed=True,
        group="many at once",
    )
    preset: str | None = _run_option(
        "options from the config's [presets.NAME]", "--preset", metavar="NAME", group="many at once"
    )
    format: str | None = _run_option(
        "file format for automatic names and for -o -",
        "--format",
        choices=("png", "jpg", "jpeg", "webp"),
        metavar="FORMAT",
        default="png",
        group="output",
    )
    open: bool = _switch("open the pictures in the system's viewer", "--open", group="output")
    force: bool = _switch("overwrite the output file", "--force", group="output")
    show_steps: bool = _switch("also draw a sketch after each step", "--show-steps", group="output")
    no_metadata: bool = _switch("keep the recipe out of the picture", "--no-metadata", group="output")
    json: bool = _switch("one JSON object on the last line of stdout", "--json", group="output")
    progress_format: str = _run_option(
        "a bar, or one JSON object per line on stderr for programs",
        "--progress",
        "bar",
        choices=("bar", "json"),
        metavar="KIND",
        default="bar",
        group="output",
    )
    quiet: bool = _switch("nothing on stderr but errors", "--quiet", group="output")
    models: Mapping[str, str] = field(default_factory=dict)
    wildcards: tuple[Path, ...] = ()

    @property
    def seeds(self) -> list[int]:
        """Those that are given; none: at random."""
        return [self.seed] if isinstance(self.seed, int) else list(self.seed or ())


TABLE: dict[str, Option] = {one.name: own for one in fields(RunOptions) if (own := option_of(one)) and own.flag}
FLAGS = {name: own.flag for name, own in TABLE.items() if own.flag}
KEYS = {key: name for name, own in TABLE.items() for key in (own.key, name)}  # in files: the flag's name, or Python's
IMAGES = (".png", ".jpg", ".jpeg", ".webp")


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, without abbreviations, and with a short --help where options are many."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("formatter_class", partial(argparse.RawDescriptionHelpFormatter, max_help_position=26))
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.color = False  # Python 3.14 would color the help, and `say` escapes its codes
        self.rare: list[argparse._ArgumentGroup] = []  # headings whose options only --help-all explains

    def _print_message(self, message: str, file: object = None) -> None:
        """A help: argparse itself would keep silent where stdout is full."""
        say(*message.rstrip("\n").split("\n"))

    def error(self, message: str) -> Any:
        """What argparse found, in our words: the option, its value, what would be right."""
        if found := re.fullmatch(r"argument (?:\S+/)?(\S+): invalid (\w+) value: (.*)", message, re.S):
            message = f"{found[1]} is {_shortened(found[3])}; it must be {_KINDS[found[2]]}"
        elif found := re.fullmatch(
            r"argument (?:\S+/)?(\S+): invalid choice: (.*) \(choose from (.*)\)", message, re.S
        ):
            choices = found[3].replace("'", "")
            message = f"{found[1]} is {_shortened(found[2])}; it must be one of {choices}"
        elif found := re.fullmatch(r"argument (?:\S+/)?(\S+): expected .*argument", message):
            action = self._option_string_actions[found[1]]
            message = f"{found[1]} needs a value: {action.metavar or action.dest.upper()}"
        elif found := re.fullmatch(r"the following arguments are required: (.*)", message):
            message = f"{self.prog} needs {found[1].replace(', ', ' and ')}"
        raise RequestError(f"{message}{self._hint(message)} (see {self.prog} --help)")

    def _hint(self, message: str) -> str:
        """What may have been meant by an argument that is not known."""
        _, unknown, rest = message.partition("unrecognized arguments: ")
        if not unknown:
            return ""
        option = next((word.partition("=")[0] for word in rest.split() if word.startswith("-")), None)
        if option is not None:
            return option_hint(option, self._option_string_actions, self.prog.removeprefix("klein-mlx "))
        dests = {action.dest for action in self._actions}
        if "words" in dests and any(word.lower().endswith(IMAGES) for word in rest.split()):
            return "; repeat the option for every file: -i a.png -i b.png"
        if "words" in dests:
            return "; put the prompt in quotes, as one argument"
        if "picture" in dests:
            return "; another prompt is --prompt"
        wants_model = "--model" in self._option_string_actions and not self._get_positional_actions()
        return f"; name a model with --model {rest:.60}" if wants_model else ""

    def format_help(self) -> str:
        return self.all_help() if not self.rare else self.common_help()

    def explain(self) -> None:
        """Give options their ranges and defaults, which only a help shows."""
        for action in self._actions:
            own = TABLE.get(action.dest)
            if own and action.help == own.help:
                action.help = explained(own)

    def all_help(self) -> str:
        """Every option."""
        self.explain()
        return super().format_help()

    def common_help(self) -> str:
        """The common options explained, the others by their names."""
        self.explain()
        groups, self._action_groups = self._action_groups, [g for g in self._action_groups if g not in self.rare]
        epilog, self.epilog = self.epilog, None
        try:
            told = super().format_help()
        finally:
            self._action_groups, self.epilog = groups, epilog
        lines = ["more, explained by --help-all:"]
        for group in self.rare:
            shown = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
            flags = ", ".join(next(s for s in action.option_strings if s.startswith("--")) for action in shown)
            lines += textwrap.wrap(f"  {group.title}: {flags}", 80, subsequent_indent="    ", break_on_hyphens=False)
        return "\n".join([told, *lines, "", epilog or ""]).rstrip() + "\n"


class _AllHelp(argparse.Action):
    def __call__(self, parser: Any, *args: Any, **kwargs: Any) -> None:
        say(*parser.all_help().rstrip("\n").split("\n"))
        parser.exit()


def _shortened(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:57]}..."


def numbers(text: str) -> list[float]:
    """The numbers of "1,0.75,0.5,0.25"."""
    return [float(number) for number in text.split(",")]


def file_name(text: str) -> Path:
    """A path; the empty one would be the current folder."""
    if not text:
        raise ValueError
    return Path(text)


_KINDS = {
    "file_name": "a file or a folder",
    "int": "a whole number",
    "float": "a number",
    "numbers": "numbers and commas, such as 1,0.75,0.5,0.25",
}
_PARSED: dict[type, Any] = {int: int, float: float, list: numbers, Path: file_name, str: str}


def add_options(parser: Any, names: Iterable[str], **help: str) -> None:
    """Add these fields of `RunOptions` to a parser or a group; what is not typed is None. help: in place of a field's.

    Other spellings work too, without being shown: --num-inference-steps for --steps.
    """
    for name in names:
        own = TABLE[name]
        kind: dict[str, Any] = {"metavar": own.metavar or own.key.upper(), "type": _PARSED.get(own.kind)}
        if own.kind is bool:
            kind = {"action": argparse.BooleanOptionalAction if own.negatable else "store_true"}
        elif own.many:
            kind["action"] = "append"
        elif own.bare is not None:
            kind |= {"nargs": "?", "const": own.bare}
        unset = False if own.kind is bool and not own.negatable else None
        shared: dict[str, Any] = {"dest": name, "default": unset, **kind}
        parser.add_argument(*own.short, own.flag, help=help.get(name) or own.help, **shared)
        if others := [flag for flag in (f"--{name.replace('_', '-')}", *own.aliases) if flag != own.flag]:
            parser.add_argument(*others, help=argparse.SUPPRESS, **shared)


def explained(own: Option) -> str:
    """An option's help, with its range and default, its fields as flags."""
    more = [own.range.removeprefix("one of "), "repeat for more" if own.many else ""]
    more.append(f"default: {own.default}" if own.default else "")
    told = "; ".join(filter(None, more))
    text = named(f"{own.help} ({told})" if told else own.help, FLAGS)
    return text.replace("{{", "{").replace("}}", "}").replace("%", "%%")


def add_generate_arguments(parser: Parser) -> None:
    """Everything that can be asked of one picture or several. None: not given; `settings.complete` fills it in."""
    parser.add_argument("words", nargs="?", metavar="PROMPT", help=argparse.SUPPRESS)
    add_request_arguments(parser)


def add_request_arguments(parser: Parser) -> None:
    """The options without the prompt, in their groups: first those that are used most."""
    parser.usage = f"{parser.prog} PROMPT [OPTIONS]" if parser.usage is None else parser.usage
    common = parser.add_argument_group("common options")
    add_options(common, [name for name, own in TABLE.items() if own.common])
    common.add_argument("--help-all", action=_AllHelp, nargs=0, help="explain every option")
    for title in dict.fromkeys(own.group for own in TABLE.values() if not own.common):
        group = parser.add_argument_group(title)
        add_options(group, [name for name, own in TABLE.items() if own.group == title and not own.common])
        parser.rare.append(group)


def typed_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were typed, by the names of their fields. Raises RequestError."""
    given = {name: getattr(args, name, None) for name in TABLE}
    typed = {name: v for name, v in given.items() if v is not None and (v is not False or TABLE[name].negatable)}
    if (words := getattr(args, "words", None)) is not None:
        if "prompt" in typed:
            raise RequestError(f"a prompt is given twice, {words[:40]!r} and with --prompt; give one of them")
        typed["prompt"] = words
    for name, value in typed.items():
        if TABLE[name].choices:
            TABLE[name].check(name, value)
    return typed


# ---- what the options ask for, as the library takes it ----


def call_arguments(options: RunOptions, config: "ModelConfig") -> dict[str, Any]:
    """What `KleinPipeline.stream` takes besides the prompt. config: of the model, which decides what a size is."""
    arguments = {name: getattr(options, name) for name in CALL}
    if options.size is not None:
        if options.width is not None or options.height is not None:
            raise RequestError("size", rule="and {width} or {height} are given; give one of them")
        size = parse_size(options.size, config.pixels_per_token, config.default_size)
        arguments["width"], arguments["height"] = size
    if len(options.seeds) == 1:
        arguments["seed"] = options.seeds[0]
    return arguments


CALL = tuple(one.name for one in fields(Options) if one.name in TABLE and one.name != "prompt")


def asked_bits(options: Any) -> "Asked | None":
    """What --quantize and its refinements ask for. options: has their fields. Raises RequestError."""
    if all(getattr(options, name) is None for name in BITS):
        return None
    from klein_mlx.weights.bits import from_options

    return from_options(
        options.quantize,
        options.group_size,
        options.transformer_bits,
        options.text_encoder_bits,
        options.quantize_layer or [],
    )


def bits_given(options: Any) -> dict[str, Any]:
    """The same as a recipe says it, in the words of the options."""
    return {name: value for name in BITS if (value := getattr(options, name))}


BITS = ("quantize", "group_size", "transformer_bits", "text_encoder_bits", "quantize_layer")
LORAS = ("lora", "lora_partial", "lora_folder")


def split_scale(text: str) -> tuple[str, float]:
    """`PATH:SCALE`, cut at the last colon if a number follows it; the scale is 1 else."""
    path, colon, scale = text.rpartition(":")
    if path and colon and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", scale, re.I):
        return path, float(scale)
    return text, 1.0


def asked_loras(texts: Iterable[str] | None) -> list[tuple[str, float]]:
    """Path and scale of each LoRA, in the order in which they were given."""
    from klein_mlx.weights.lora import checked_scale

    loras = [split_scale(text) for text in texts or ()]
    for path, scale in loras:
        more = re.fullmatch(r"(.+\.safetensors)([\s:=,].*)", path, re.DOTALL)
        if more and not os.path.lexists(path):
            rule = "write FILE:0.8, and --lora once for each file"
            raise RequestError(f"--lora {more[1]:.200}: what follows, {more[2]!r:.60}, is not a scale; {rule}")
        try:
            checked_scale(scale)
        except RequestError as error:
            raise RequestError(f"--lora {path:.200}: its {error}") from None
    return loras


def lora_options(options: Any) -> dict[str, Any]:
    """What `KleinPipeline.load_lora` takes besides. options: has the fields of --lora."""
    return {
        "partial": bool(options.lora_partial),
        "folder": options.lora_folder,
        "local_files_only": bool(options.offline),
    }


def in_options(error: KleinError) -> str:
    """The error's line, with the arguments that it names called as they were typed."""
    return error.told(FLAGS) if isinstance(error, RequestError) else str(error)


def refuse_alone(typed: Mapping[str, Any], options: Mapping[str, Any], session: bool = False) -> None:
    """RequestError for what was typed and would decide nothing beside the options: a --group-size where nothing is
    quantized, what concerns LoRAs without one (a session may load one later), --open without a file."""
    if typed.get("group_size") is not None and not any(options.get(name) for name in BITS if name != "group_size"):
        raise RequestError("group_size", rule=f"is {typed['group_size']}, but nothing is quantized; add --quantize 4")
    for name in ("lora_partial", "lora_folder"):
        if typed.get(name) and not (options.get("lora") or session):
            raise RequestError(name, rule="is given, and no LoRA; add --lora FILE")
    if typed.get("open") and str(options.get("output")) == "-":
        raise RequestError("open", rule="needs a file, and -o - writes none; give one of them")
