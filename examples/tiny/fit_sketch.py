"""Fits the colours of the embedded checkpoint's sketches, klein_mlx/tiny/sketch.json."""

import json
from itertools import product

from klein_mlx import KleinPipeline
from klein_mlx.runtime.pictures import PACKAGED, fit, vae_digest
from klein_mlx.runtime.run import Picture

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "purple", "orange")
SHAPES = ("circle", "square", "star", "triangle", "cross")


def main() -> None:
    """A picture of each colour and shape, and the map that comes closest to them all."""
    pipe = KleinPipeline.from_pretrained("tiny", keep="all")
    pairs = []
    for seed, (colour, shape) in enumerate(product(COLOURS, SHAPES)):
        latents = None
        for event in pipe.stream(f"a {colour} {shape}", seed=seed):
            if isinstance(event, Picture):
                pairs.append((latents, event.image))
            else:
                latents = event.latents
    stored = {"vae": vae_digest(pipe.source), "colours": fit(pairs)}
    PACKAGED.write_text(json.dumps(stored) + "\n")


if __name__ == "__main__":
    main()
