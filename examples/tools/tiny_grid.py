"""Six pictures by tiny, and below each an edit of it: tiny_grid.py [FILE]."""

import sys

from PIL import Image

from klein_mlx import KleinPipeline

CASES = (
    ("a red circle to the left of a blue square", "make the circle green"),
    ("yellow star, black background", "put it on blue"),
    ("a pink plus sign under a green ring on white", "get rid of the cross"),
    ("an orange box on a turquoise background", "turn it into a star"),
    ("a triangle that is purple, in the top right corner, on white", "make the background black"),
    ("white square below a black disc, on red", "paint the circle yellow"),
)
GAP, SIDE = 4, 128

pipe = KleinPipeline.from_pretrained("tiny", keep="all")
sheet = Image.new("RGB", (len(CASES) * (SIDE + GAP) - GAP, 2 * SIDE + GAP), "white")
for column, (prompt, edit) in enumerate(CASES):
    picture = pipe(prompt, seed=column).images[0]
    edited = pipe(edit, image=picture, seed=column).images[0]
    for row, image in enumerate((picture, edited)):
        sheet.paste(image, (column * (SIDE + GAP), row * (SIDE + GAP)))
sheet.save(sys.argv[1] if len(sys.argv) > 1 else "tiny.png", optimize=True)
