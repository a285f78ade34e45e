"""The one place that checks what a picture was asked.

Behind `check` every value is of the right type and in range, defaults are filled in, and nothing is repaired in
silence.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from klein_mlx.config import ModelConfig
from klein_mlx.errors import RequestError, Shown
from klein_mlx.options import (
    MASK_BLUR,
    MAX_AREA,
    MAX_MARGIN,
    MAX_PROMPT,
    MAX_REFERENCES,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    MIN_SIDE,
    USER_OPTIONS,
    Options,
    integer,
    takes,
)

STRENGTH = 0.6  # of an init image without a mask; with one, 1: what is white is painted anew
SIDES = ("left", "top", "right", "bottom")


@dataclass(frozen=True)
class Edit:
    """A checked edit of `init_image`; pictures are as given, not yet opened.

    strength: (0, 1], or None if `sigmas` say where to start. mask_image: white is repainted, or None. mask_blur: the
    width in pixels of the soft edge, inside the mask. padding_mask_crop: pixels around the mask to which the picture is
    cropped while it is repainted, or None. margins: pixels to add at SIDES, or None. extend_to: (width, height) to
    extend to, or None. init_reference: whether the model is shown the picture as its first reference too.
    """

    init_image: Any
    strength: float | None
    mask_image: Any
    mask_blur: int
    invert_mask: bool
    padding_mask_crop: int | None
    margins: tuple[int, int, int, int] | None
    extend_to: tuple[int, int] | None
    init_reference: bool

    @property
    def extends(self) -> bool:
        return self.margins is not None or self.extend_to is not None


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
    passes: int = 1  # of the transformer in a step: 2 where guidance is classifier-free
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
    passes = 2 if guidance > 1 and not config.transformer.guidance_embeds else 1
    notes += _ignored(options, passes)
    _check_size(config, options.height, options.width)
    length = options.max_sequence_length or config.max_sequence_length
    edit = check_edit(sigmas=sigmas, **{name: asked[name] for name in EDITS})
    asked |= {
        "negative_prompt": _text("negative_prompt", options.negative_prompt or ""),
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "batch_guidance": _batch_guidance(options.batch_guidance, guidance, passes, options.prompt_embeds, length),
        "sigmas": sigmas,
        "max_sequence_length": length,
        "rng": options.rng or ("mlx" if options.generator is None else "torch"),
    }
    if options.callback_on_step_end is not None and not callable(options.callback_on_step_end):
        rule = "it must be a function of (pipe, step, timestep, kwargs)"
        raise RequestError("callback_on_step_end", options.callback_on_step_end, rule)
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
        passes=passes,
        notes=notes,
    )
    _latents(config, request)
    return request


@takes(Options)
def check(config: ModelConfig, options: Options) -> Request:
    """`check_options` of the options given as arguments."""
    return check_options(config, options)


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
    if negative_prompt and config.transformer.guidance_embeds:
        raise RequestError("negative_prompt", rule=f"has no use with {variant.name}: its guidance is embedded; drop it")
    if negative_prompt and guidance <= 1:
        hint = "; a distilled model has none: use a base variant" if config.is_distilled else ""
        raise RequestError("negative_prompt", rule=f"needs a {{guidance_scale}} over 1, and it is {guidance:g}{hint}")
    return float(guidance), notes


def _ignored(options: Options, passes: int) -> tuple[str, ...]:
    """Notes on what an array decides that stands in another's place."""
    places: dict[str, tuple[str, tuple[str, ...]]] = {"latents": ("the noise", ("seed", "generator", "rng"))}
    if passes == 1:
        places["prompt_embeds"] = "the text", ("max_sequence_length", "literal_prompt")
    return tuple(
        f"{name} is ignored: {array} are {what}"
        for array, (what, names) in places.items()
        if getattr(options, array) is not None
        for name in names
        if getattr(options, name) not in (None, False)
    )


def _batch_guidance(value: bool | None, guidance: float, passes: int, prompt_embeds: Any, length: int) -> bool | None:
    """False where the two branches differ in length; None: as memory allows."""
    if value is not None and passes == 1:
        rule = f"needs a {{guidance_scale}} over 1, and it is {guidance:g}"
        raise RequestError(
            "batch_guidance",
            rule=rule if guidance <= 1 else "needs two passes; embedded guidance takes one",
        )
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
        return tuple(_seed(s) for s in seed)
    first = _seed(seed)
    if first + count - 1 > MAX_SEED:
        raise RequestError("seed", first, f"with {count} pictures the last would be over {MAX_SEED}")
    return tuple(range(first, first + count))


def _seed(seed: Any) -> int:
    """-1 is other programs' word for a random one."""
    try:
        return integer("seed", seed, 0, MAX_SEED)
    except RequestError as error:
        if type(seed) is not int or seed != -1:
            raise
        raise RequestError("seed", seed, f"{error.rule}; leave it out for a random one") from None


def _generator(options: Options, prompts: int) -> tuple[Any, bool]:
    """(seeds, whether all pictures draw from one generator in a row): of `seed`, or of diffusers' `generator`."""
    generator, count = options.generator, options.num_images_per_prompt
    if generator is None:
        return options.seed, False
    if options.seed is not None:
        raise RequestError("generator", rule="and {seed} both say which noise; give one of them")
    if isinstance(generator, list | tuple):
        if not generator or len(generator) != prompts * count > 1:
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
    if large_reference and not images and edit and not edit.extends:
        raise RequestError("large_reference", rule="is for an {image}: the init image is a reference as it is painted")
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


# ---- a picture to start from ----


def check_edit(
    *,
    sigmas: Any,
    init_image: Any = None,
    strength: float | None = None,
    mask_image: Any = None,
    mask_blur: int | None = None,
    invert_mask: bool = False,
    padding_mask_crop: int | None = None,
    extend: Any = None,
    init_reference: bool | None = None,
) -> Edit | None:
    """None if there is no init image; else the edit. The arguments are in range, and are fields of `Options`.

    Raises RequestError for what does not go together.
    """
    asked = {"strength": strength, "mask_image": mask_image, "extend": extend, "init_reference": init_reference}
    if init_image is None:
        for name, value in asked.items():
            if value is not None:
                raise RequestError(name, rule="needs an {init_image}: the picture to start from")
    if mask_image is None:
        if invert_mask:
            raise RequestError("invert_mask", rule="needs a {mask_image}")
        if padding_mask_crop is not None:
            raise RequestError("padding_mask_crop", rule="needs a {mask_image}: it crops the picture around the mask")
        if mask_blur is not None and extend is None:
            rule = "needs a {mask_image} or {extend}: without them nothing has an edge"
            raise RequestError("mask_blur", rule=rule)
    if init_image is None:
        return None
    if padding_mask_crop is not None and extend is not None:
        raise RequestError("padding_mask_crop", rule="does not go with {extend}: the new area surrounds the picture")
    margins, extend_to = _extension(extend)
    painted_over = mask_image is not None or extend is not None
    return Edit(
        init_image=init_image,
        strength=_strength(strength, sigmas, 1.0 if painted_over else STRENGTH),
        mask_image=mask_image,
        mask_blur=MASK_BLUR if mask_blur is None else mask_blur,
        invert_mask=invert_mask,
        padding_mask_crop=padding_mask_crop,
        margins=margins,
        extend_to=extend_to,
        init_reference=painted_over if init_reference is None else init_reference,
    )


EDITS = tuple(inspect.signature(check_edit).parameters.keys() - {"sigmas"})


def _strength(strength: float | None, sigmas: Any, default: float) -> float | None:
    if strength is None:
        return default if sigmas is None else None
    if sigmas is not None:
        raise RequestError("strength", rule="and {sigmas} both say where to start; give one of them")
    return strength


def _extension(extend: Any) -> tuple[tuple[int, int, int, int] | None, tuple[int, int] | None]:
    """(margins at SIDES, None) or (None, size) of "left=256,right=256", {"left": 256}, "1536x1024" or (1536, 1024)."""
    if extend is None:
        return None, None
    rule = (
        "it must be pixels to add, such as left=256,right=256 (left, top, right, bottom), or a size, such as 1536x1024"
    )
    wrong = RequestError("extend", extend, rule)
    if isinstance(extend, str):
        size = re.fullmatch(r"(\d{1,5})\s*[xX]\s*(\d{1,5})", extend.strip())
        extend = (int(size[1]), int(size[2])) if size else _pairs(extend, wrong)
    if isinstance(extend, tuple | list):
        if len(extend) != 2:
            raise wrong
        return None, (integer("extend's width", extend[0], 1, MAX_MARGIN), integer("height", extend[1], 1, MAX_MARGIN))
    if not isinstance(extend, Mapping) or not extend or set(extend) - set(SIDES):
        raise wrong
    left, top, right, bottom = (integer(f"extend's {side}", extend.get(side, 0), 0, MAX_MARGIN) for side in SIDES)
    if not left + top + right + bottom:
        raise wrong
    return (left, top, right, bottom), None


def _pairs(text: str, wrong: RequestError) -> dict[str, int]:
    pairs: dict[str, int] = {}
    for item in text.split(","):
        name, equals, number = (part.strip() for part in item.partition("="))
        if not equals or name in pairs or not re.fullmatch(r"\d{1,5}", number):
            raise wrong
        pairs[name] = int(number)
    return pairs
