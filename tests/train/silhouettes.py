"""Training sets of tiny's world: black shapes under coloured captions, and recoloured pairs; and who judges a LoRA."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from adherence import captions, world
from checker import judge_scene, read
from PIL import Image

from klein_mlx import KleinPipeline

COLOUR = "black"


def scenes(count: int, seed: int = 0) -> list[tuple[str, world.Scene]]:
    """Captions with colours in them, and the scenes that they are to mean: every shape black."""
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        scene = world.random_scene(rng)
        words = captions.caption(scene, rng).words
        if COLOUR not in words and scene.background != COLOUR:
            found.append((words, blackened(scene)))
    return found


def make(folder: Path, count: int, seed: int = 0) -> Path:
    """A folder of pictures with text files."""
    folder.mkdir(parents=True)
    for number, (words, scene) in enumerate(scenes(count, seed)):
        Image.fromarray(world.render(scene)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(words)
    return folder


INSTRUCTION = "make every shape black"


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


def blackened(scene: world.Scene) -> world.Scene:
    return replace(scene, shapes=tuple(replace(shape, colour=COLOUR) for shape in scene.shapes))


def right(pipe: KleinPipeline, count: int, edits: bool = False) -> int:
    """Of pictures of so many unseen prompts: how many show every shape as it was asked for, but black. edits: the
    scenes are not told but shown, and the prompt is the instruction."""
    prompts = []
    for words, scene in captions.judged_captions(4 * count, seed=3):
        if COLOUR not in {scene.background, *(shape.colour for shape in scene.shapes)}:
            prompts.append((words, scene))
    good = 0
    for seed, (words, scene) in enumerate(prompts[:count]):
        shown = Image.fromarray(world.render(scene)) if edits else None
        output = pipe(INSTRUCTION, image=shown, seed=seed) if edits else pipe(words, seed=seed)
        picture, meant = np.asarray(output.images[0]), blackened(scene)
        verdict, regions = judge_scene(picture, meant), read(picture).regions
        black = len(regions) == len(scene.shapes) and all(region.colour == COLOUR for region in regions)
        good += bool(black and verdict["background"] and all(verdict["kinds"]))  # type: ignore[arg-type]
    return good
