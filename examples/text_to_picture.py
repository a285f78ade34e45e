"""Text to picture: python examples/text_to_picture.py [MODEL]"""

import sys

from klein_mlx import KleinPipeline

pipe = KleinPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "tiny")
picture = pipe("a red circle left of a blue square", seed=7).images[0]
picture.save("picture.png")
