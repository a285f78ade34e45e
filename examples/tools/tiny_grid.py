"""Six pictures by tiny, and below each an edit of it, with seeds for which both are right: tiny_grid.py [FILE]."""

import sys

from PIL import Image

from klein_mlx import KleinPipeline

CASES = (
    ("a red circle to the left of a blue square", "make the circle green", 18),
    ("yellow star, black background", "put it on blue", 1),
    ("a pink plus sign under a green ring on white", "get rid of the cross", 20),
    ("an orange box on a turquoise background", "turn it into a star", 3),
    ("a triangle that is purple, in the top right corner, on white", "make the background black", 4),
    ("white square below a black disc, on red", "paint the circle yellow", 5),
)
GAP, SIDE = 4, 128

pipe = KleinPipeline.from_pretrained("tiny", keep="all")
sheet = Image.new("RGB", (len(CASES) * (SIDE + GAP) - GAP, 2 * SIDE + GAP), "white")
for column, (prompt, edit, seed) in enumerate(CASES):
    picture = pipe(prompt, seed=seed).images[0]
    edited = pipe(edit, image=picture, seed=seed).images[0]
    for row, image in enumerate((picture, edited)):
        sheet.paste(image, (column * (SIDE + GAP), row * (SIDE + GAP)))
sheet.save(sys.argv[1] if len(sys.argv) > 1 else "tiny.png", optimize=True)
