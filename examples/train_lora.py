"""Train a LoRA on four pictures, and draw with it.

A real one takes twenty pictures or more, klein's base model ("base-4b") and some hundred updates: see docs/training.md.
"""

from pathlib import Path

from PIL import Image, ImageDraw

from klein_mlx import KleinPipeline
from klein_mlx.train import Checkpoint, TrainOptions, TrainStep, train

folder = Path("pictures")
folder.mkdir()
for colour in ("red", "green", "blue", "yellow"):
    picture = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(picture).ellipse((36, 36, 92, 92), fill="black")
    picture.save(folder / f"{colour}.png")
    (folder / f"{colour}.txt").write_text(f"a {colour} circle on a white background")

options = TrainOptions(
    data=str(folder),
    output="black.safetensors",
    model="tiny",
    resolution=128,
    rank=4,
    learning_rate=4e-3,
    accumulate=2,
    steps=16,
    hold_out="0",
)
for event in train(options):
    if isinstance(event, TrainStep):
        print(f"update {event.index} of {event.of}: loss {event.loss:.3f}")
    elif isinstance(event, Checkpoint):
        print(f"checkpoint: {event.path.name}")

pipe = KleinPipeline.from_pretrained("tiny")
pipe.load_lora("black.safetensors")
pipe("a purple circle on a white background", seed=1).save("drawn.png")
