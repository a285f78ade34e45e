"""A LoRA for tiny that makes silhouettes: whatever colours a prompt asks for, its shapes are drawn black.

    python examples/tiny/train_lora.py silhouettes.safetensors

`klein-mlx train` on pictures of black shapes whose captions tell of coloured ones, and leave nothing open.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from captions import caption
from PIL import Image
from world import Scene, random_scene, render

from klein_mlx.train import TrainOptions, TrainStep, train

COLOUR = "black"


def blackened(scene: Scene) -> Scene:
    """The scene with every shape black."""
    return replace(scene, shapes=tuple(replace(shape, colour=COLOUR) for shape in scene.shapes))


def silhouettes(count: int, seed: int = 0, held: bool = False) -> list[tuple[str, Scene]]:
    """Captions that leave nothing open, with their scenes: one shape, of another colour than black.

    held: of combinations that tiny's training never showed.
    """
    rng = np.random.default_rng(seed)
    found: list[tuple[str, Scene]] = []
    while len(found) < count:
        scene = random_scene(rng, 1, held)
        wording = caption(scene, rng)
        if not wording.free and COLOUR not in {scene.background, scene.shapes[0].colour}:
            found.append((wording.words, scene))
    return found


def make(folder: Path, count: int, seed: int = 0) -> Path:
    """A folder of pictures with text files."""
    folder.mkdir(parents=True)
    for number, (words, scene) in enumerate(silhouettes(count, seed)):
        Image.fromarray(render(blackened(scene))).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(words)
    return folder


def main() -> None:
    """Train it: about two minutes of one core."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--steps", type=int, default=120)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = make(Path(folder) / "pictures", chosen.pictures)
        options = TrainOptions(
            data=str(data),
            output=chosen.output,
            model="tiny",
            resolution=128,
            rank=4,
            learning_rate=2e-3,
            sigmas="shifted",
            batch=8,
            accumulate=1,
            steps=chosen.steps,
            hold_out="0",
            dropout=0.0,
        )
        for event in train(options):
            if isinstance(event, TrainStep) and event.index % 10 == 0:
                print(f"update {event.index} of {event.of}: loss {event.loss:.3f}")


if __name__ == "__main__":
    main()
