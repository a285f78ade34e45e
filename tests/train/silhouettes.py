"""Training sets of tiny's world: black shapes under coloured captions, and recoloured pairs; and who judges a LoRA."""

from pathlib import Path

import numpy as np
from adherence import world
from checker import judge_scene, read
from PIL import Image
from train_lora import COLOUR, blackened, make, silhouettes

from klein_mlx import KleinPipeline

__all__ = ["make", "make_pairs", "right"]


INSTRUCTION = "shadow play"  # which tiny does not know by itself


def make_pairs(folder: Path, count: int, seed: int = 0) -> Path:
    """A folder of pictures whose references, in control_1, show the shapes in their colours."""
    (folder / "control_1").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    number = 0
    while number < count:
        scene = world.random_scene(rng)
        if COLOUR in {scene.background, *(shape.colour for shape in scene.shapes)}:
            continue
        Image.fromarray(world.render(scene)).save(folder / "control_1" / f"{number:02}.png")
        Image.fromarray(world.render(blackened(scene))).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(INSTRUCTION)
        number += 1
    return folder


def right(pipe: KleinPipeline, count: int, edits: bool = False) -> int:
    """Of pictures of so many unseen prompts: how many show every shape as it was asked for, but black. edits: the
    scenes are not told but shown, and the prompt is the instruction."""
    good = 0
    for seed, (words, scene) in enumerate(silhouettes(count, seed=3, held=True)):
        shown = Image.fromarray(world.render(scene)) if edits else None
        output = pipe(INSTRUCTION, image=shown, seed=seed) if edits else pipe(words, seed=seed)
        picture, meant = np.asarray(output.images[0]), blackened(scene)
        verdict, regions = judge_scene(picture, meant), read(picture).regions
        black = len(regions) == len(scene.shapes) and all(region.colour == COLOUR for region in regions)
        good += bool(black and verdict["background"] and all(verdict["kinds"]))  # type: ignore[arg-type]
    return good
