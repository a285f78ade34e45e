"""What KleinPipeline's calls take: the one list of names, types, ranges and defaults."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict


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
