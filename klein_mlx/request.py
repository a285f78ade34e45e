"""What a picture can be asked: the one list of options, and the one place that checks them.

`Options` is the list. The signatures and the help of KleinPipeline's calls, the command's options, its config file, the
lines of a prompt file, recipes and shell completion are generated from its fields. Behind `check` every value is of the
right type and in range, defaults are filled in, and nothing is repaired in silence.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import wraps
from itertools import pairwise
from typing import Any, Concatenate, ParamSpec, TypeVar

from klein_mlx.config import ModelConfig
from klein_mlx.edits import MASK_BLUR, MAX_BLUR, MAX_MARGIN, Edit, check_edit
from klein_mlx.errors import RequestError, Shown, integer, named
from klein_mlx.option import option, option_of
from klein_mlx.porting import instead_of

MIN_SIDE, MAX_SIDE, MAX_AREA = 64, 8192, 4096 * 4096
MAX_STEPS, MAX_SEED, MAX_IMAGES, MAX_REFERENCES = 1000, 2**64 - 1, 1000, 10
MAX_PROMPT, MAX_TEXT = 100_000, 4096  # characters; tokens
OUTPUT_TYPES = ("pil", "np", "latent")


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
        "guidance scale; above 1 with base variants only",
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


@dataclass(frozen=True)
class Request(Options):
    """Checked options; pictures are made one by one, every prompt with every seed.

    prompts: one or more, or empty if `prompt_embeds` is given. seeds: one per picture of a prompt. images: references
    as given, not yet opened. one_stream: all pictures' noise comes from one generator, in a row. seed_of_each: seeds
    are one for each picture of all prompts instead. edit: the picture to start from and what to do with it, or None.
    notes: lines for the user, of what is not followed. The inherited fields are as asked for, and filled in: steps,
    guidance_scale, negative_prompt (""), sigmas (a tuple), rng and max_sequence_length; batch_guidance is None where
    memory decides, height and width are None where the pictures do.
    """

    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    images: tuple[Any, ...] = ()
    one_stream: bool = False
    seed_of_each: bool = False
    edit: Edit | None = None
    steps: int = 0
    guidance: float = 1.0
    sigmas: tuple[float, ...] | None = None
    negative_prompt: str = ""
    max_sequence_length: int = 0
    notes: tuple[str, ...] = ()

    @property
    def pictures(self) -> list[tuple[int, int]]:
        """(index of the prompt, seed) of every picture, in the order in which they are made."""
        count = len(self.prompts) or self.prompt_embeds.shape[0]
        if self.seed_of_each:
            return [(number * count // len(self.seeds), seed) for number, seed in enumerate(self.seeds)]
        return [(index, seed) for index in range(count) for seed in self.seeds]


P = ParamSpec("P")
S = TypeVar("S")
R = TypeVar("R")


def takes(options: Callable[P, Options]) -> Callable[[Callable[[S, Options], R]], Callable[Concatenate[S, P], R]]:
    """Give a function of (something, Options) the arguments of `Options`, written out for help(), editors and type
    checkers. An unknown argument is a TypeError that names the call and what to use instead."""
    parameters = list(inspect.signature(options).parameters.values())

    def decorate(function: Callable[[S, Options], R]) -> Callable[Concatenate[S, P], R]:
        called = function.__qualname__.removesuffix(".__call__")

        @wraps(function)
        def call(first: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name not in USER_OPTIONS:
                    raise TypeError(f"{called}() has no argument {name!r}{instead_of(name, USER_OPTIONS)}")
            if len(args) > 1:
                raise TypeError(f"{called}() takes the prompt alone without a name; name the others, as in image=...")
            return function(first, options(*args, **kwargs))

        own = inspect.signature(function)
        first = next(iter(own.parameters.values()))
        call.__signature__ = own.replace(parameters=[first, *parameters])  # type: ignore[attr-defined]
        call.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{described()}"
        return call

    return decorate


def described() -> str:
    """Every option by its name in Python, with its range and default, a line each."""
    lines = []
    for name, own in USER_OPTIONS.items():
        told = [own.help, own.range, f"default: {own.default}" if own.default else ""]
        text = named("; ".join(filter(None, told)), {}).replace("{{", "{").replace("}}", "}")
        lines.append(f"{name}: {text}.")
    return "\n".join(lines)


def check_options(config: ModelConfig, options: Options) -> Request:
    """Check everything that can be checked before a file is opened.

    Raises RequestError, whose one line says what, which value, and what would be right.
    """
    asked = {name: getattr(options, name) for name in USER_OPTIONS}
    prompts = _prompts(options.prompt, options.prompt_embeds)
    if options.prompt_embeds is not None:
        _shape("prompt_embeds", options.prompt_embeds, (None, None, config.transformer.joint_attention_dim))
    for name, own in USER_OPTIONS.items():
        if not own.many and asked[name] is not None:
            asked[name] = own.check(name, asked[name])
    steps, sigmas = _steps(config, options.num_inference_steps, options.sigmas)
    guidance, notes = _guidance(config, options.guidance_scale, options.negative_prompt)
    _check_size(config, options.height, options.width)
    length = options.max_sequence_length or config.max_sequence_length
    edit = check_edit(sigmas=sigmas, **{name: asked[name] for name in EDITS})
    asked |= {
        "negative_prompt": _text("negative_prompt", options.negative_prompt or ""),
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "batch_guidance": _batch_guidance(options.batch_guidance, guidance, options.prompt_embeds, length),
        "sigmas": sigmas,
        "max_sequence_length": length,
        "rng": options.rng or ("mlx" if options.generator is None else "torch"),
    }
    no_image = options.image is None or (isinstance(options.image, list | tuple) and not options.image)
    if (edit or not no_image) and not config.variant.edits:
        name = config.variant.name
        rule = f"is a picture, and {name} draws from text alone; variant {name[:2]!r} uses its weights as the others'"
        raise RequestError("init_image" if edit else "image", rule=rule)
    pictures = 1 if isinstance(options.generator, list | tuple) else options.num_images_per_prompt
    count = len(prompts) or asked["prompt_embeds"].shape[0]
    seeds, one_stream = _generator(options, count)
    if options.reuse_references and options.image is None and not (edit and edit.init_reference):
        raise RequestError("reuse_references", rule="needs a reference image, and none is given")
    request = Request(
        **asked,
        prompts=prompts,
        seeds=seeds if one_stream else _seeds(seeds, pictures),
        one_stream=one_stream,
        seed_of_each=isinstance(options.generator, list | tuple) and count > 1,
        images=_images(options.image, options.large_reference, edit),
        edit=edit,
        steps=steps,
        guidance=guidance,
        notes=notes,
    )
    _latents(config, request)
    return request


@takes(Options)
def check(config: ModelConfig, options: Options) -> Request:
    """`check_options` of the options given as arguments."""
    return check_options(config, options)


EDITS = tuple(inspect.signature(check_edit).parameters.keys() - {"sigmas"})


def _prompts(prompt: Any, prompt_embeds: Any) -> tuple[str, ...]:
    if (prompt is None) == (prompt_embeds is None):
        given = "neither prompt nor" if prompt is None else "both prompt and"
        raise RequestError(f"{given} prompt_embeds {'is' if prompt is None else 'are'} given; give one of them")
    if prompt is None:
        return ()
    prompts = (prompt,) if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not prompts:
        raise RequestError("prompt", prompt, "it must be a string or a list of strings")
    return tuple(_text("prompt", p) for p in prompts)


def _text(what: str, text: Any) -> str:
    if not isinstance(text, str):
        raise RequestError(what, text, "it must be a string")
    if len(text) > MAX_PROMPT:
        raise RequestError(what, rule=f"has {len(text)} characters; it must have at most {MAX_PROMPT}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        rule = f"has a lone surrogate at character {error.start}; it must be valid Unicode"
        raise RequestError(what, rule=rule) from None
    return text


def _guidance(
    config: ModelConfig, guidance: float | None, negative_prompt: str | None
) -> tuple[float, tuple[str, ...]]:
    """The guidance scale that the model takes, and notes: a distilled one always takes 1, as in diffusers."""
    variant, notes = config.variant, ()
    if guidance is None:
        guidance = variant.guidance
    if guidance > 1 and config.is_distilled:
        name = variant.name
        notes = (f"guidance {guidance:g} is ignored: {name} is distilled, guidance is built into its weights",)
        guidance = 1.0
    if negative_prompt and guidance <= 1:
        hint = "; a distilled model has none: use a base variant" if config.is_distilled else ""
        raise RequestError("negative_prompt", rule=f"needs a {{guidance_scale}} over 1, and it is {guidance:g}{hint}")
    return float(guidance), notes


def _batch_guidance(value: bool | None, guidance: float, prompt_embeds: Any, length: int) -> bool | None:
    """False where the two branches differ in length; None: as memory allows."""
    if value is not None and guidance <= 1:
        raise RequestError("batch_guidance", rule=f"needs a {{guidance_scale}} over 1, and it is {guidance:g}")
    if prompt_embeds is None or prompt_embeds.shape[1] == length:
        return value
    if value:
        rule = f"needs branches of one length: {{prompt_embeds}} has {prompt_embeds.shape[1]} positions, "
        raise RequestError("batch_guidance", rule=f"{rule}{{max_sequence_length}} is {length}")
    return False


def _check_size(config: ModelConfig, height: int | None, width: int | None) -> None:
    for name, side in (("height", height), ("width", width)):
        if side is not None:
            check_side(name, side, config.pixels_per_token)
    if height is not None and width is not None:
        check_area(width, height)


def check_area(width: int, height: int) -> None:
    """Refuse a picture of more than MAX_AREA pixels."""
    if height * width > MAX_AREA:
        raise RequestError(f"{width} x {height} are {height * width} pixels; at most {MAX_AREA} are possible")


def check_side(name: str, side: Any, multiple: int) -> int:
    """A width or height in pixels: MIN_SIDE..MAX_SIDE and a multiple of a token's side."""
    side = integer(name, side, MIN_SIDE, MAX_SIDE)
    if side % multiple:
        below = side // multiple * multiple
        raise RequestError(name, side, f"it must be a multiple of {multiple}: {below} or {below + multiple}")
    return side


def _seeds(seed: Any, count: int) -> tuple[int, ...]:
    if seed is None:
        import secrets

        seed = secrets.randbits(32)
    if isinstance(seed, list | tuple):
        if not seed:
            raise RequestError("seed", Shown("an empty list"), "it must have one seed or more")
        if count != 1:
            rule = f"is {count}, but {len(seed)} seeds are given; each seed makes one picture"
            raise RequestError("num_images_per_prompt", rule=rule)
        return tuple(integer("seed", s, 0, MAX_SEED) for s in seed)
    first = integer("seed", seed, 0, MAX_SEED)
    if first + count - 1 > MAX_SEED:
        raise RequestError("seed", first, f"with {count} pictures the last would be over {MAX_SEED}")
    return tuple(range(first, first + count))


def _generator(options: Options, prompts: int) -> tuple[Any, bool]:
    """(seeds, whether all pictures draw from one generator in a row): of `seed`, or of diffusers' `generator`."""
    generator, count = options.generator, options.num_images_per_prompt
    if generator is None:
        return options.seed, False
    if options.seed is not None:
        raise RequestError("generator", rule="and {seed} both say which noise; give one of them")
    if isinstance(generator, list | tuple):
        if len(generator) != prompts * count > 1:
            rule = f"has {len(generator)} entries for {prompts * count} pictures"
            raise RequestError("generator", rule=f"{rule}; it must have one for each")
        return [_initial_seed(one) for one in generator], False
    seed = _initial_seed(generator)
    return ((seed,) * count, True) if prompts * count > 1 else (seed, False)


def _initial_seed(generator: Any) -> int:
    """Of a torch.Generator or an int; torch itself is not needed."""
    seed = getattr(generator, "initial_seed", None)
    if callable(seed):
        if getattr(getattr(generator, "device", None), "type", "cpu") != "cpu":
            raise RequestError("generator", generator, 'it must be of the CPU: torch.Generator("cpu")')
        return integer("generator", seed(), 0, MAX_SEED)
    try:
        return integer("generator", generator, 0, MAX_SEED)
    except RequestError:
        rule = "it must be a torch.Generator, a whole number from 0 to 2**64 - 1, or a list of these"
        raise RequestError("generator", generator, rule) from None


def _steps(config: ModelConfig, steps: int | None, sigmas: Any) -> tuple[int, tuple[float, ...] | None]:
    """The number of steps: as asked, that of the sigmas, or the variant's."""
    if sigmas is not None:
        sigmas = _sigmas(sigmas, steps)
        steps = len(sigmas)
    return steps or config.variant.steps, sigmas


def _sigmas(sigmas: Any, steps: int | None) -> tuple[float, ...]:
    try:
        values = tuple(float(s) for s in sigmas)
    except (TypeError, ValueError, OverflowError):
        raise RequestError("sigmas", sigmas, "it must be a list of numbers") from None
    falling = all(a > b for a, b in pairwise(values))
    if not 0 < len(values) <= MAX_STEPS or not falling or not all(0 < s <= 1 for s in values):
        raise RequestError("sigmas", sigmas, "it must be strictly decreasing, with every value in (0, 1]")
    if steps is not None and steps != len(values):
        rule = f"is {steps}, but {{sigmas}} has {len(values)}; leave one of them out"
        raise RequestError("num_inference_steps", rule=rule)
    return values


def _images(image: Any, large_reference: bool, edit: Edit | None) -> tuple[Any, ...]:
    """The references, no more of them than fit, the init image counted where it is one."""
    images = tuple(image) if isinstance(image, list | tuple) else () if image is None else (image,)
    count = len(images) + (edit is not None and edit.init_reference)
    if (image is not None and not images) or count > MAX_REFERENCES:
        counted = ", the init image counted" if count > len(images) else ""
        raise RequestError(f"{count} reference images are given{counted}; it must be 1 to {MAX_REFERENCES}")
    if large_reference and count != 1:
        raise RequestError("large_reference", rule=f"needs a single reference, and {count} are given")
    return images


def _latents(config: ModelConfig, request: Request) -> None:
    if request.latents is None:
        return
    side = config.pixels_per_token
    h = request.height // side if request.height else None
    w = request.width // side if request.width else None
    _shape("latents", request.latents, (len(request.pictures), config.transformer.in_channels, h, w))


def _shape(what: str, array: Any, wanted: tuple[int | None, ...]) -> None:
    shape = tuple(getattr(array, "shape", ()))
    fits = len(shape) == len(wanted) and all(w is None or s == w for s, w in zip(shape, wanted, strict=True))
    if not fits or 0 in shape:
        text = ", ".join("any" if w is None else str(w) for w in wanted)
        raise RequestError(what, rule=f"has shape {shape}; it must be an array of shape ({text})")
