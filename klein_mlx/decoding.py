"""Latents -> what a caller gets: a PIL picture, an array of pixels, or the VAE's own latents."""

from typing import Any

import mlx.core as mx

from klein_mlx import images
from klein_mlx.errors import CheckpointError
from klein_mlx.given import to_numpy
from klein_mlx.latents import to_channels_first, unpatchify
from klein_mlx.masks import Canvas
from klein_mlx.strips import Done
from klein_mlx.vae import VAE, strip_rows


def decode(
    vae: VAE, latents: mx.array, output_type: str, canvas: Canvas | None = None, done: Done | None = None
) -> Any:
    """One picture of its latents (1, h, w, C).

    output_type: "pil", "np" ((H, W, 3) float32 in 0..1) or "latent" (denormalised, (latent channels, H/8, W/8)).
    canvas: of an edit; what it keeps of the init image is pasted back. done: called after each layer.
    Raises CheckpointError if the latents are not finite.
    """
    if not mx.isfinite(latents).all().item():
        raise CheckpointError("the picture came out as NaN or infinity: the model's weights are damaged")
    z = unpatchify(vae.denormalize(latents))
    if output_type == "latent":
        z = to_channels_first(z)[0]
        mx.eval(z)
        return z
    side = vae.config.scale_factor
    pixels = vae.decode(z, strip_rows(side * z.shape[1], side * z.shape[2]), done)[0]
    mx.eval(pixels)
    if canvas is None or canvas.opacity is None:
        return images.to_image(pixels) if output_type == "pil" else to_numpy(images.to_unit(pixels))
    image = canvas.paste(images.to_image(pixels))
    return image if output_type == "pil" else to_numpy(image).astype("float32") / 255
