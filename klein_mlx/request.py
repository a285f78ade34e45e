"""What a user may ask for, and the one place that checks it.

The command line, Python and any server pass through `check`; behind it every value is of the right type and in range,
defaults are filled in, and nothing is repaired in silence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

from klein_mlx.config import ModelConfig
from klein_mlx.edits import Edit, check_edit
from klein_mlx.errors import RequestError, flag, integer, is_number, short


class Arguments(TypedDict, total=False):
    """What KleinPipeline takes besides the prompt; every one may be left out.

    image: references for editing: a path, a PIL image, or a list of up to ten.
    large_reference: a single reference may have 2024 * 2024 pixels (4 megapixels) instead of 1024 * 1024.
    reuse_references: keep the references' keys and values of the first step for the later ones: faster, and for all
        variants but 9b-kv, which always does so, an approximation: on tiny pixels move by under 0.1 of 255 on average.
    init_image: a path or PIL image to start from, instead of from noise.
    strength: (0, 1], how much of the way from noise is walked again; all steps are run at any strength. By default 0.6,
        or 1 with a mask or an extension.
    mask_image: a path or PIL image of the init image's size; what is white (128 or more of 255) is repainted, all other
        pixels come back as they are in the file. The picture returned has the init image's size.
    mask_blur: 0..256, the width in pixels of the soft edge, which lies inside the mask (4).
    invert_mask: repaint what is black instead.
    padding_mask_crop: pixels; only the mask's surroundings, with this margin, are repainted, at the full working size.
    extend: paint a border around the init image: "left=256,right=256", {"top": 128}, or a size, "1536x1024".
    init_reference: show the model the init image as first reference too; by default with a mask or an extension.
    height, width: pixels, multiples of 16; by default the init image's, the first reference's, or 1024 (128 for tiny).
        With a mask or an extension the size at which is painted.
    num_inference_steps, guidance_scale: by default the variant's (4 and 1 for the distilled ones).
    negative_prompt: with a guidance_scale over 1, instead of the empty prompt.
    batch_guidance: guidance's two branches in one pass (True) or one after the other (False), the same numbers to
        rounding; by default in one where memory allows.
    num_images_per_prompt: pictures of each prompt, of seeds seed, seed + 1, ...
    seed: 0 .. 2**64 - 1, or a list: one picture of each prompt per seed. Each picture depends on its seed alone.
    latents: the initial noise (pictures, C, h, w), as in diffusers, instead of the seeds'.
    prompt_embeds: (B, L, D) instead of prompts.
    sigmas: noise levels before the shift, instead of evenly spaced ones; an init image is taken at the first of them.
    output_type: "pil", "np" ((H, W, 3) in 0..1) or "latent" (denormalised, an mx.array, the whole picture painted).
    max_sequence_length: text positions, padding included (512; 40 or so for tiny).
    literal_prompt: special tokens that are written in a prompt, as <|im_end|>, are text; by default they are what the
        tokenizer takes them for, as in the reference, and a note says so.
    """

    image: Any
    large_reference: bool
    reuse_references: bool
    init_image: Any
    strength: float | None
    mask_image: Any
    mask_blur: int | None
    invert_mask: bool
    padding_mask_crop: int | None
    extend: Any
    init_reference: bool | None
    height: int | None
    width: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    negative_prompt: str | None
    batch_guidance: bool | None
    num_images_per_prompt: int
    seed: int | Sequence[int] | None
    latents: Any
    prompt_embeds: Any
    sigmas: Sequence[float] | None
    output_type: str
    max_sequence_length: int | None
    literal_prompt: bool


class LoraOptions(TypedDict, total=False):
    """What `load_lora` takes besides path, scale and name.

    partial: leave out keys that belong to nothing in this model, instead of refusing the file.
    folder: where LoRAs are looked up by name; by default $KLEIN_MLX_LORAS, or ~/.config/klein-mlx/loras.
    revision, token, local_files_only: as in huggingface_hub.
    """

    partial: bool
    folder: str | Path | None
    revision: str | None
    token: str | None
    local_files_only: bool


MIN_SIDE, MAX_SIDE, MAX_AREA = 64, 8192, 4096 * 4096


MAX_STEPS, MAX_SEED, MAX_IMAGES, MAX_REFERENCES = 1000, 2**64 - 1, 1000, 10


MAX_PROMPT, MAX_TEXT = 100_000, 4096  # characters; tokens


OUTPUT_TYPES = ("pil", "np", "latent")


@dataclass(frozen=True)
class Request:
    """A checked request. Pictures are made one by one: every prompt with every seed.

    prompts: one or more, or empty if `prompt_embeds` is given. negative_prompt: for guidance; "" if none was given.
    batch_guidance: both branches in one pass, or None: as memory allows. images: references as given, not yet opened.
    large_reference: whether the only one may have up to 4 megapixels. reuse_references: whether their keys and values
    are kept from the first step. edit: the picture to start from and what to do with it, or None. height, width:
    pixels, or None: the init image's, the first reference's, or the default. seeds: one per picture of a prompt.
    latents: initial noise (pictures, C, h, w), or None. literal_prompt: special tokens in prompts are text.
    """

    prompts: tuple[str, ...]
    negative_prompt: str
    images: tuple[Any, ...]
    large_reference: bool
    reuse_references: bool
    edit: Edit | None
    height: int | None
    width: int | None
    steps: int
    guidance: float
    batch_guidance: bool | None
    seeds: tuple[int, ...]
    latents: Any
    prompt_embeds: Any
    sigmas: tuple[float, ...] | None
    output_type: str
    max_sequence_length: int
    literal_prompt: bool

    @property
    def pictures(self) -> list[tuple[int, int]]:
        """(index of the prompt, seed) of every picture, in the order in which they are made."""
        count = len(self.prompts) or self.prompt_embeds.shape[0]
        return [(index, seed) for index in range(count) for seed in self.seeds]


def check(
    config: ModelConfig,
    *,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | None = None,
    image: Any = None,
    large_reference: bool = False,
    reuse_references: bool = False,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_guidance: bool | None = None,
    num_images_per_prompt: int = 1,
    seed: int | Sequence[int] | None = None,
    latents: Any = None,
    prompt_embeds: Any = None,
    sigmas: Sequence[float] | None = None,
    output_type: str = "pil",
    max_sequence_length: int | None = None,
    literal_prompt: bool = False,
    **edit_arguments: Any,
) -> Request:
    """Check everything that can be checked before a file is opened; the arguments are `Arguments` and the prompt,
    `edit_arguments` those of `edits.check_edit`.

    Raises RequestError, whose one line says what, which value, and what would be right.
    """
    prompts = _prompts(prompt, prompt_embeds)
    if prompt_embeds is not None:
        _shape("prompt_embeds", prompt_embeds, (None, None, config.transformer.joint_attention_dim))
    steps, sigmas = _steps(config, num_inference_steps, sigmas)
    guidance = _guidance(config, guidance_scale, negative_prompt)
    height, width = _size(config, height, width)
    seeds = _seeds(seed, integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES))
    length = config.max_sequence_length if max_sequence_length is None else max_sequence_length
    edit = check_edit(sigmas=sigmas, **edit_arguments)
    request = Request(
        prompts=prompts,
        negative_prompt=_text("negative_prompt", negative_prompt or ""),
        images=_images(image, large_reference, edit),
        large_reference=large_reference,
        reuse_references=_reuse(reuse_references, image, edit),
        edit=edit,
        height=height,
        width=width,
        steps=steps,
        guidance=guidance,
        batch_guidance=_batch_guidance(batch_guidance, guidance, prompt_embeds, length),
        seeds=seeds,
        latents=latents,
        prompt_embeds=prompt_embeds,
        sigmas=sigmas,
        output_type=_output_type(output_type),
        max_sequence_length=integer("max_sequence_length", length, 1, MAX_TEXT),
        literal_prompt=flag("literal_prompt", literal_prompt),
    )
    _latents(config, request)
    return request


def _output_type(name: Any) -> str:
    if name not in OUTPUT_TYPES:
        raise RequestError(f"output_type is {name!r}; it must be one of {', '.join(OUTPUT_TYPES)}")
    return name


def _prompts(prompt: Any, prompt_embeds: Any) -> tuple[str, ...]:
    if (prompt is None) == (prompt_embeds is None):
        given = "neither" if prompt is None else "both"
        raise RequestError(f"{given} of prompt and prompt_embeds is given; give one of them")
    if prompt is None:
        return ()
    prompts = (prompt,) if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not prompts:
        raise RequestError(f"prompt is {short(prompt)}; it must be a string or a list of strings")
    return tuple(_text("prompt", p) for p in prompts)


def _text(what: str, text: Any) -> str:
    if not isinstance(text, str):
        raise RequestError(f"{what} is {short(text)}; it must be a string")
    if len(text) > MAX_PROMPT:
        raise RequestError(f"{what} has {len(text)} characters; it must have at most {MAX_PROMPT}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} has a lone surrogate at character {error.start}; it must be valid Unicode"
        ) from None
    return text


def _guidance(config: ModelConfig, guidance: Any, negative_prompt: str | None) -> float:
    variant = config.variant
    if guidance is None:
        guidance = variant.guidance
    if not is_number(guidance) or not 1 <= guidance <= 100:
        raise RequestError(f"guidance_scale is {short(guidance)}; it must be a number from 1 to 100")
    if guidance > 1 and config.is_distilled:
        raise RequestError(
            f"guidance_scale is {guidance:g}, but {variant.name} is distilled: guidance is built into its weights; "
            "leave it at 1, or use a base variant"
        )
    if negative_prompt and guidance <= 1:
        raise RequestError(
            f"negative_prompt needs a guidance_scale over 1, and it is {guidance:g}"
            + ("; a distilled model has none: use a base variant" if config.is_distilled else "")
        )
    return float(guidance)


def _batch_guidance(value: Any, guidance: float, prompt_embeds: Any, length: int) -> bool | None:
    """False where the two branches differ in length; None: as memory allows."""
    if value is not None:
        flag("batch_guidance", value)
        if guidance <= 1:
            raise RequestError(f"batch_guidance needs a guidance_scale over 1, and it is {guidance:g}")
    if prompt_embeds is None or prompt_embeds.shape[1] == length:
        return value
    if value:
        raise RequestError(
            f"batch_guidance needs branches of one length: prompt_embeds has {prompt_embeds.shape[1]} positions, "
            f"max_sequence_length is {length}"
        )
    return False


def _size(config: ModelConfig, height: int | None, width: int | None) -> tuple[int | None, int | None]:
    for name, side in (("height", height), ("width", width)):
        if side is not None:
            check_side(name, side, config.pixels_per_token)
    if height is not None and width is not None:
        check_area(width, height)
    return height, width


def check_area(width: int, height: int) -> None:
    """Refuse a picture of more than MAX_AREA pixels."""
    if height * width > MAX_AREA:
        raise RequestError(f"{width} x {height} are {height * width} pixels; at most {MAX_AREA} are possible")


def check_side(name: str, side: Any, multiple: int) -> int:
    """A width or height in pixels: MIN_SIDE..MAX_SIDE and a multiple of a token's side."""
    side = integer(name, side, MIN_SIDE, MAX_SIDE)
    if side % multiple:
        below = side // multiple * multiple
        raise RequestError(f"{name} is {side}; it must be a multiple of {multiple}: {below} or {below + multiple}")
    return side


def _seeds(seed: Any, count: int) -> tuple[int, ...]:
    if seed is None:
        import secrets

        seed = secrets.randbits(32)
    if isinstance(seed, list | tuple):
        if not seed:
            raise RequestError("seed is an empty list; it must have one seed or more")
        if count != 1:
            raise RequestError(
                f"num_images_per_prompt is {count}, but {len(seed)} seeds are given; each seed makes one picture"
            )
        return tuple(integer("seed", s, 0, MAX_SEED) for s in seed)
    first = integer("seed", seed, 0, MAX_SEED)
    if first + count - 1 > MAX_SEED:
        raise RequestError(f"seed is {first}; with {count} pictures the last would be over {MAX_SEED}")
    return tuple(range(first, first + count))


def _steps(config: ModelConfig, steps: Any, sigmas: Any) -> tuple[int, tuple[float, ...] | None]:
    """The number of steps: as asked, that of the sigmas, or the variant's."""
    if sigmas is not None:
        sigmas = _sigmas(sigmas, steps)
        steps = len(sigmas)
    return integer("num_inference_steps", config.variant.steps if steps is None else steps, 1, MAX_STEPS), sigmas


def _sigmas(sigmas: Any, steps: int | None) -> tuple[float, ...]:
    try:
        values = tuple(float(s) for s in sigmas)
    except (TypeError, ValueError, OverflowError):
        raise RequestError(f"sigmas is {short(sigmas)}; it must be a list of numbers") from None
    falling = all(a > b for a, b in pairwise(values))
    if not 0 < len(values) <= MAX_STEPS or not falling or not all(0 < s <= 1 for s in values):
        raise RequestError(f"sigmas is {short(sigmas)}; it must fall strictly, with every value in (0, 1]")
    if steps is not None and steps != len(values):
        raise RequestError(f"num_inference_steps is {steps}, but sigmas has {len(values)}; leave one of them out")
    return values


def _images(image: Any, large_reference: Any, edit: Edit | None) -> tuple[Any, ...]:
    """The references, no more of them than fit, the init image counted where it is one."""
    large = flag("large_reference", large_reference)
    images = tuple(image) if isinstance(image, list | tuple) else () if image is None else (image,)
    count = len(images) + (edit is not None and edit.init_reference)
    if (image is not None and not images) or count > MAX_REFERENCES:
        counted = ", the init image counted" if count > len(images) else ""
        raise RequestError(f"{count} reference images are given{counted}; it must be 1 to {MAX_REFERENCES}")
    if large and count != 1:
        raise RequestError(f"large_reference needs a single reference, and {count} are given")
    return images


def _reuse(value: Any, image: Any, edit: Edit | None) -> bool:
    if flag("reuse_references", value) and image is None and not (edit and edit.init_reference):
        raise RequestError("reuse_references needs a reference image, and none is given")
    return value


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
        raise RequestError(f"{what} has shape {shape}; it must be an array of shape ({text})")
