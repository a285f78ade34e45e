"""Combine two pictures: python examples/two_references.py [MODEL]"""

import sys

from klein_mlx import KleinPipeline

pipe = KleinPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "tiny")
star = pipe("a green star on a white background", seed=7).images[0]
yellow = pipe("a plain yellow background", seed=8).images[0]
both = pipe("put the green star from image 1 on the background of image 2", image=[star, yellow], seed=7)
both.images[0].save("combined.png")
