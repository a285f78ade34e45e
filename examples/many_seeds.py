"""One prompt, many seeds, saved as they are made: python examples/many_seeds.py [MODEL]"""

import sys

from klein_mlx import KleinPipeline, Picture

pipe = KleinPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "tiny", keep="all")
for event in pipe.stream("a green star above a yellow circle", seed=[1, 2, 3, 4]):
    if isinstance(event, Picture):
        event.image.save(f"star-{event.seed}.png")
        print(f"star-{event.seed}.png")
