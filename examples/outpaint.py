"""Continue a picture beyond its border: python examples/outpaint.py [MODEL [FILE]]"""

import sys

from PIL import Image

from klein_mlx import KleinPipeline

pipe = KleinPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "tiny")
if len(sys.argv) > 2:
    before = Image.open(sys.argv[2])
else:
    before = pipe("a red circle left of a blue square", seed=7).images[0].crop((0, 0, 64, 128))  # the circle alone
after = pipe("a red circle left of a blue square", init_image=before, extend="right=64", seed=7).images[0]
after.save("wider.png")
