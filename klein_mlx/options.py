"""What a picture can be asked: the one list, `Options`, and the calls whose arguments are made of it.

The signatures and the help of KleinPipeline's calls, the command's options, its config file, the lines of a prompt
file, recipes and shell completion are generated from its fields. `klein_mlx.request` checks what goes together.
"""

import inspect
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import KW_ONLY, Field, dataclass, field, fields
from functools import cached_property, wraps
from numbers import Real
from typing import Any, Concatenate, ParamSpec, TypeVar

from klein_mlx.errors import RequestError, named
from klein_mlx.porting import instead_of

MIN_SIDE, MAX_SIDE, MAX_AREA = 64, 8192, 4096 * 4096
MAX_STEPS, MAX_SEED, MAX_IMAGES, MAX_REFERENCES = 1000, 2**64 - 1, 1000, 10
MAX_PROMPT, MAX_TEXT = 100_000, 4096  # characters; tokens
OUTPUT_TYPES = ("pil", "np", "latent")
MASK_BLUR, MAX_BLUR, MAX_MARGIN = 4, 256, 8192  # pixels

P = ParamSpec("P")
S = TypeVar("S")
R = TypeVar("R")


def integer(what: str, value: Any, low: int, high: int) -> int:
    """`value`, an int or numpy's, as an int if it is in low..high; else a RequestError that names it."""
    try:
        whole = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = None
    if whole is None or not low <= whole <= high:
        raise RequestError(what, value, f"it must be a whole number from {low} to {high}")
    return whole


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int or float, or numpy's."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and abs(float(value)) < 1e300
    except OverflowError:
        return False


def flag(what: str, value: Any) -> bool:
    """`value` if it is True or False; else a RequestError."""
    if not isinstance(value, bool):
        raise RequestError(what, value, "it must be True or False")
    return value


@dataclass(frozen=True)
class Option:
    """What a field of `Options` is to its user.

    help: a phrase; other fields stand in braces. flag: on the command line, or None: in Python only. short: further
    flags; aliases: those that no help shows. kind: of one value: str, int, float, bool, Path, or list (of numbers).
    low, high: the range, both included; `over` excludes the lower end. choices: the only values. many: a list is taken,
    on the command line by repeating the flag. negatable: --no-FLAG exists, and without either the program decides.
    bare: the value of the flag alone. metavar, default: for the help. group: its heading. common: explained by a plain
    --help. per_run: of the whole run, not of one picture: no line of a prompt file sets it. typed: on the command line
    only. excludes: fields that give way where this one is set in a nearer place.
    """

    help: str
    flag: str | None = None
    short: tuple[str, ...] = ()
    kind: type = str
    low: float | None = None
    high: float | None = None
    over: bool = False
    choices: tuple[str, ...] = ()
    many: bool = False
    negatable: bool = False
    metavar: str | None = None
    default: str = ""
    group: str = "picture"
    common: bool = False
    per_run: bool = False
    typed: bool = False
    bare: Any = None
    aliases: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()

    @cached_property
    def key(self) -> str:
        """The name in a config, a line of a prompt file, a recipe: that of the flag."""
        return (self.flag or "").lstrip("-").replace("-", "_")

    @property
    def range(self) -> str:
        """The values that are right, in words; "" for any."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.low is None or self.high is None:
            return ""
        number = "a whole number" if self.kind is int else "a number"
        return (
            f"{number} over {self.low:g} and at most {self.high:g}"
            if self.over
            else f"{number} from {self.low:g} to {self.high:g}"
        )

    def check(self, name: str, value: Any) -> Any:
        """`value` if it is of the option's kind and in its range; else a RequestError."""
        if self.kind is bool:
            return flag(name, value)
        if self.choices:
            if not isinstance(value, str) or value not in self.choices:
                raise RequestError(name, value, f"it must be {self.range}")
        elif self.kind is int and self.low is not None and self.high is not None:
            return integer(name, value, int(self.low), int(self.high))
        elif self.low is not None and self.high is not None:
            above = is_number(value) and (self.low < value if self.over else self.low <= value)
            if not above or value > self.high:
                raise RequestError(name, value, f"it must be {self.range}")
            return float(value)
        return value


def option(help: str, flag: str | None = None, value: Any = None, **details: Any) -> Any:
    """A field of `Options`. value: its default. details: see `Option`."""
    return field(default=value, metadata={"option": Option(help, flag, **details)})


def option_of(field: "Field[Any]") -> Option | None:
    """What a field is to its user; None for one that is not the user's."""
    return field.metadata.get("option")


@dataclass(frozen=True)
class Options:
    """Everything that a picture can be asked. Nothing is checked yet: see `check`."""

    prompt: str | Sequence[str] | None = option(
        "what to draw, or how to change the reference image; several make several pictures",
        "--prompt",
        short=("-p",),
        metavar="TEXT",
        common=True,
    )
    _: KW_ONLY
    image: Any = option(
        f"reference image to edit or draw from; up to {MAX_REFERENCES}",
        "--image",
        short=("-i",),
        many=True,
        metavar="FILE",
        common=True,
    )
    seed: int | Sequence[int] | None = option(
        "0 to 2**64 - 1; several make several pictures, each of which depends on its own seed alone",
        "--seed",
        short=("-S",),
        kind=int,
        many=True,
        default="random",
        common=True,
    )
    num_images_per_prompt: int = option(
        "pictures per prompt, with seeds SEED, SEED + 1, ...",
        "--count",
        1,
        short=("-n",),
        kind=int,
        low=1,
        high=MAX_IMAGES,
        common=True,
    )
    width: int | None = option(
        "pixels, a multiple of 16",
        "--width",
        short=("-W",),
        kind=int,
        low=MIN_SIDE,
        high=MAX_SIDE,
        default="the first reference image's, or 1024; 128 for tiny",
        excludes=("size",),
        common=True,
    )
    height: int | None = option(
        "pixels, a multiple of 16",
        "--height",
        short=("-H",),
        kind=int,
        low=MIN_SIDE,
        high=MAX_SIDE,
        default="as for the width",
        excludes=("size",),
        common=True,
    )
    num_inference_steps: int | None = option(
        "denoising steps",
        "--steps",
        short=("-s",),
        kind=int,
        low=1,
        high=MAX_STEPS,
        default="the variant's: 4 if distilled, else 50",
        excludes=("sigmas",),
        common=True,
    )
    guidance_scale: float | None = option(
        "guidance scale; above 1 with base variants and dev only",
        "--guidance",
        kind=float,
        low=1,
        high=100,
        default="the variant's: 1 if distilled, else 4",
        common=True,
    )
    negative_prompt: str | None = option(
        "what to steer away from; needs a {guidance_scale} over 1", "--negative", metavar="TEXT", common=True
    )
    rng: str | None = option(
        "noise generator: MLX's, or torch's on the CPU, with which a seed gives diffusers' picture",
        "--rng",
        choices=("mlx", "torch"),
        metavar="RNG",
        default="mlx",
        group="sampling",
    )
    batch_guidance: bool | None = option(
        "run both guidance passes as one batch, or in turn: the same numbers to rounding",
        "--batch-guidance",
        kind=bool,
        negatable=True,
        default="one batch where memory allows",
        group="sampling",
    )
    sigmas: Sequence[float] | None = option(
        "noise levels before the shift, such as 1,0.75,0.5,0.25, instead of evenly spaced ones; with an init image the "
        "first is where it starts",
        "--sigmas",
        kind=list,
        metavar="LIST",
        excludes=("num_inference_steps", "strength"),
        group="sampling",
    )
    max_sequence_length: int | None = option(
        "text tokens, padding included",
        "--max-sequence-length",
        kind=int,
        low=1,
        high=MAX_TEXT,
        metavar="N",
        default="the checkpoint's, 512",
        group="sampling",
    )
    literal_prompt: bool = option(
        "treat special tokens in a prompt, such as <|im_end|>, as plain text",
        "--literal-prompt",
        False,
        kind=bool,
        group="sampling",
    )
    large_reference: bool = option(
        "let a single reference image have 4 megapixels instead of 1",
        "--large-reference",
        False,
        kind=bool,
        group="editing",
    )
    reuse_references: bool = option(
        "compute reference images in the first step only: faster, and an approximation for all variants but 9b-kv, "
        "which always does so",
        "--reuse-references",
        False,
        kind=bool,
        group="editing",
    )
    init_image: Any = option(
        "picture to start from, instead of from noise", "--init-image", metavar="FILE", group="editing"
    )
    strength: float | None = option(
        "how far to go from the init image; all steps run at any strength",
        "--strength",
        kind=float,
        low=0,
        high=1,
        over=True,
        metavar="S",
        default="0.6, or 1 with a mask or an extension",
        excludes=("sigmas",),
        group="editing",
    )
    mask_image: Any = option(
        "mask of the init image's size: white (128 or more of 255) is repainted, all other pixels stay as they are",
        "--mask",
        metavar="FILE",
        group="editing",
    )
    mask_blur: int | None = option(
        "width in pixels of the soft edge inside the mask",
        "--mask-blur",
        kind=int,
        low=0,
        high=MAX_BLUR,
        metavar="PX",
        default=str(MASK_BLUR),
        group="editing",
    )
    invert_mask: bool = option(
        "repaint what is black in the mask instead", "--invert-mask", False, kind=bool, group="editing"
    )
    padding_mask_crop: int | None = option(
        "repaint only the mask's surroundings, with this margin in pixels, at the full working size",
        "--mask-crop",
        kind=int,
        low=0,
        high=MAX_MARGIN,
        metavar="PX",
        group="editing",
    )
    extend: Any = option(
        "paint a border around the init image: left=256,right=256 (left, top, right, bottom), or a size, 1536x1024",
        "--extend",
        metavar="SIDES",
        group="editing",
    )
    init_reference: bool | None = option(
        "use the init image as the first reference image too",
        "--init-reference",
        kind=bool,
        negatable=True,
        default="with a mask or an extension, as in diffusers",
        group="editing",
    )
    generator: Any = option(
        "a torch.Generator, of which the initial seed counts, an int, or a list with one for each picture, instead of "
        "{seed}: the noise is torch's, as in diffusers"
    )
    callback_on_step_end: Callable[..., dict[str, Any] | None] | None = option(
        'called as in diffusers with (pipe, step from 0, timestep, {{"latents": (1, tokens, C)}}); latents that it '
        "returns in a dict replace those"
    )
    progress: bool = option("show a progress bar (tqdm)", value=False, kind=bool)
    latents: Any = option("initial noise, an array (pictures, C, h, w) as in diffusers, instead of the seeds'")
    prompt_embeds: Any = option("an array (B, L, D) instead of prompts")
    output_type: str = option(
        '"pil"; "np": (H, W, 3) in 0..1; "latent": the denormalized latents, an mx.array, of the whole painted picture',
        value="pil",
        choices=OUTPUT_TYPES,
    )


USER_OPTIONS = {one.name: own for one in fields(Options) if (own := option_of(one))}


def takes(options: Callable[P, Options]) -> Callable[[Callable[[S, Options], R]], Callable[Concatenate[S, P], R]]:
    """Give a function of (something, Options) the arguments of `Options`, written out for help(), editors and type
    checkers. An unknown argument is a TypeError that names the call and what to use instead."""
    parameters = list(inspect.signature(options).parameters.values())

    def decorate(function: Callable[[S, Options], R]) -> Callable[Concatenate[S, P], R]:
        called = function.__qualname__.removesuffix(".__call__")

        @wraps(function)
        def call(first: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
            _check_names(called, kwargs, USER_OPTIONS)
            if len(args) > 1:
                raise TypeError(f"{called}() takes the prompt alone without a name; name the others, as in image=...")
            return function(first, options(*args, **kwargs))

        own = inspect.signature(function)
        first = next(iter(own.parameters.values()))
        call.__signature__ = own.replace(parameters=[first, *parameters])  # type: ignore[attr-defined]
        call.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{described()}"
        return call

    return decorate


def with_hints(function: Callable[P, R]) -> Callable[P, R]:
    """Let a call say what to use in place of an argument that it does not know."""
    known = inspect.signature(function).parameters

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        _check_names(function.__qualname__, kwargs, known)
        return function(*args, **kwargs)

    return call


def _check_names(called: str, given: Iterable[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise TypeError(f"{called}() has no argument {name!r}{instead_of(name, known)}")


def described() -> str:
    """Every option by its name in Python, with its range and default, a line each."""
    lines = []
    for name, own in USER_OPTIONS.items():
        told = [own.help, own.range, f"default: {own.default}" if own.default else ""]
        text = named("; ".join(filter(None, told)), {}).replace("{{", "{").replace("}}", "}")
        lines.append(f"{name}: {text}.")
    return "\n".join(lines)
