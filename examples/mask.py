"""Repaint one place and leave the rest as it is: python examples/mask.py [MODEL [FILE]]"""

import sys

from PIL import Image, ImageChops, ImageDraw

from klein_mlx import KleinPipeline

pipe = KleinPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "tiny")
if len(sys.argv) > 2:
    before = Image.open(sys.argv[2]).convert("RGB")
else:
    before = pipe("a red circle left of a blue square", seed=7).images[0]

mask = Image.new("L", before.size, 0)  # white is repainted: here the right half
ImageDraw.Draw(mask).rectangle((before.width // 2, 0, before.width, before.height), fill="white")

# The prompt describes the whole picture. For one that says what to change ("make the square green") leave
# init_reference out: the model is then shown the picture.
prompt = "a red circle left of a green star"
after = pipe(prompt, init_image=before, mask_image=mask, init_reference=False, seed=7).images[0]
after.save("repainted.png")

left_half = (0, 0, before.width // 2, before.height)
same = ImageChops.difference(before.crop(left_half), after.crop(left_half)).getbbox() is None
print("outside the mask every pixel is as it was:", same)
