"""What the options of `klein-mlx generate` ask for, as the library takes it: which model, and which arguments."""

import argparse
import logging
import sys
from typing import TYPE_CHECKING, Any

from klein_mlx.cli.options import asked_bits, asked_loras, lora_options, parse_size
from klein_mlx.config import PARTS
from klein_mlx.errors import RequestError

if TYPE_CHECKING:
    from klein_mlx.config import ModelConfig
    from klein_mlx.pipeline import KleinPipeline


def open_pipeline(args: argparse.Namespace) -> "KleinPipeline":
    """The model that the options name, opened, and downloaded first if the user agrees. Raises KleinError."""
    from klein_mlx.cli.download import obtain, obtain_vae
    from klein_mlx.formats.open import SMALL_DECODER
    from klein_mlx.pipeline import KleinPipeline
    from klein_mlx.runtime.loras import described

    if args.small_decoder and args.vae:
        raise RequestError("--small-decoder and --vae both name a VAE; give one of them")
    if args.quiet:
        logging.getLogger("klein_mlx").setLevel(logging.ERROR)
    given = {part for part in PARTS if getattr(args, part) or (part == "vae" and args.small_decoder)}
    consent = {"offline": args.offline, "yes": args.yes, "quiet": args.quiet}
    model = obtain(args.model, revision=args.revision, parts=set(PARTS) - given, own=args.settings.models, **consent)
    vae = SMALL_DECODER if args.small_decoder else args.vae
    pipe = KleinPipeline.from_pretrained(
        model,
        quantize=asked_bits(args),
        dtype=args.dtype,
        keep=args.keep,
        prompt_cache=args.prompt_cache,
        revision=args.revision,
        local_files_only=args.offline,
        vae=obtain_vae(vae, **consent) if vae else None,
        transformer=args.transformer,
        text_encoder=args.text_encoder,
    )
    for path, scale in asked_loras(args):
        loaded = pipe.load_lora(path, scale, **lora_options(args))
        if not args.quiet:
            print(described(pipe.parts.loras.get(loaded.name), loaded), file=sys.stderr)
    return pipe


def call_arguments(args: argparse.Namespace, config: "ModelConfig") -> dict[str, Any]:
    """What `KleinPipeline.stream` takes besides the prompt. config: of the model, which decides what a size is."""
    width, height = args.width, args.height
    if args.size is not None:
        if width is not None or height is not None:
            raise RequestError("--size and --width or --height are given; give one of them")
        width, height = parse_size(args.size, config.pixels_per_token, config.default_size)
    return {
        "image": args.image,
        "large_reference": args.large_reference,
        "reuse_references": args.reuse_references,
        "init_image": args.init_image,
        "strength": args.strength,
        "mask_image": args.mask,
        "mask_blur": args.mask_blur,
        "invert_mask": args.invert_mask,
        "padding_mask_crop": args.mask_crop,
        "extend": args.extend,
        "init_reference": args.init_reference,
        "width": width,
        "height": height,
        "num_inference_steps": args.steps,
        "sigmas": _sigmas(args.sigmas),
        "guidance_scale": args.guidance,
        "negative_prompt": args.negative,
        "batch_guidance": args.batch_guidance,
        "num_images_per_prompt": args.count,
        "seed": args.seed[0] if args.seed and len(args.seed) == 1 else args.seed,
        "max_sequence_length": args.max_sequence_length,
        "literal_prompt": args.literal_prompt,
    }


def _sigmas(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise RequestError(f"--sigmas is {text[:60]!r}; it must be numbers and commas, as 1,0.75,0.5,0.25") from None
