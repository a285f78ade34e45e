"""A base of tiny, as klein's base models are: many steps, guidance, and what LoRAs for tiny are trained on.

    python examples/tiny/train_base.py BASE

`klein-mlx train --method full` on pictures of the world with their captions, from tiny's own weights. What a caption
leaves unsaid is drawn at random, so the few steps are lost, and guidance is gained. BASE is a checkpoint at 8 bits.
"""

import argparse
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from captions import caption
from PIL import Image
from world import is_held_out, random_scene, render

from klein_convert import convert_checkpoint
from klein_mlx.formats.open import open_model
from klein_mlx.train import TrainOptions, TrainStep, train

VARIANT = "base-4b"  # of other sizes: what is undistilled, 50 steps and guidance 4


def make(folder: Path, count: int, seed: int) -> Path:
    """A folder of pictures with text files; no combination is shown that tiny's training held out."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    number = 0
    while number < count:
        scene = random_scene(rng)
        if is_held_out(scene):
            continue
        Image.fromarray(render(scene)).save(folder / f"{number:05}.png")
        (folder / f"{number:05}.txt").write_text(caption(scene, rng).words)
        number += 1
    return folder


def main() -> None:
    """Train it: 2,200 updates are about half an hour of two cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--pictures", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=2200)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start, trained = Path(folder, "start"), Path(folder, "trained")
        convert_checkpoint(open_model("tiny"), start, variant=VARIANT)
        options = TrainOptions(
            data=str(make(Path(folder, "pictures"), chosen.pictures, 1)),
            output=str(trained),
            model=str(start),
            method="full",
            resolution=128,
            learning_rate=4e-4,
            schedule="cosine",
            batch=8,
            steps=chosen.steps,
            ema=0.995,
        )
        for event in train(options):
            if isinstance(event, TrainStep) and event.index % 100 == 0:
                print(f"update {event.index} of {event.of}: loss {event.loss:.3f}, held out {event.held_out}")
        finish(trained, Path(chosen.output))


def finish(trained: Path, output: Path) -> None:
    """What was trained as a small checkpoint: bfloat16, then 8 bits."""
    file = trained / "transformer.safetensors"
    weights = {name: array.astype(mx.bfloat16) for name, array in mx.load(str(file)).items()}
    mx.save_safetensors(str(file), weights, {"format": "mlx"})
    convert_checkpoint(open_model(trained), output, quantize={"transformer": 8, "text_encoder": 8, "mod_*": 8})


if __name__ == "__main__":
    main()
