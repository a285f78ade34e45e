"""Edit a picture in words: python examples/one_reference.py [MODEL [FILE]]"""

import sys

from klein_mlx import KleinPipeline

pipe = KleinPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "tiny")
before = sys.argv[2] if len(sys.argv) > 2 else pipe("a red circle on a white background", seed=7).images[0]
after = pipe("make the circle green", image=before, seed=7).images[0]  # of the reference's size
after.save("edited.png")
