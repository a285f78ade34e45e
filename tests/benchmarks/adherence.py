"""How well the port draws what it is told with the embedded checkpoint, by the geometric checker.

    python tests/benchmarks/adherence.py --prompts 200 --edits 50

Prompts and edits are of combinations of shape, colour and background that training never saw.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from checker import clearly_different, judge_edit, judge_scene, read
from PIL import Image

from klein_mlx import KleinPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "tiny"))
import captions  # noqa: E402
import world  # noqa: E402

KINDS = (*world.EDIT_KINDS, "combine")


def prompts(
    pipe: KleinPipeline, count: int, seed: int = 0, held_wordings: bool = False, **arguments: Any
) -> dict[str, float]:
    """Shares of `count` held-out prompts, alternately of one and two shapes, that are right in each respect.

    held_wordings: in wordings that training never showed either; arguments: of the pipeline's call, such as
    guidance_scale.
    """
    tally: dict[str, list[bool]] = defaultdict(list)
    for number, (words, scene) in enumerate(captions.judged_captions(count, seed, held=held_wordings)):
        picture = np.asarray(pipe(words, seed=1000 * seed + number, **arguments).images[0])
        verdict: dict[str, Any] = judge_scene(picture, scene)
        arity = "single" if len(scene.shapes) == 1 else "pair"
        tally["background"].append(verdict["background"])
        tally[f"{arity} colour"] += verdict["colours"]
        tally[f"{arity} shape"] += verdict["kinds"]
        if arity == "pair":
            tally["relation"].append(verdict["relation"])
        tally["all"].append(verdict["all"])
    return {name: float(np.mean(right)) for name, right in tally.items()}


def everyday(pipe: KleinPipeline, count: int | None = None, **arguments: Any) -> dict[str, float]:
    """Shares of the hand-written prompts of examples/tiny/everyday.txt that are right in each respect, background and
    relation where they are said; count: of so many of them."""
    cases, open_ = captions.everyday()
    tally: dict[str, list[bool]] = defaultdict(list)
    for number in range(0, len(cases), max(1, len(cases) // (count or len(cases)))):
        words, scene = cases[number]
        verdict: dict[str, Any] = judge_scene(np.asarray(pipe(words, seed=number, **arguments).images[0]), scene)
        tally["colour"] += verdict["colours"]
        tally["shape"] += verdict["kinds"]
        if number not in open_:
            tally["background"].append(verdict["background"])
            tally["relation"] += [verdict["relation"]] if "relation" in verdict else []
    return {name: float(np.mean(right)) for name, right in tally.items()}


def variety(pipe: KleinPipeline, colour: str, kind: str, seeds: int = 16) -> tuple[int, int]:
    """Of "a COLOUR KIND" with the seeds 0, 1, ...: how many have the colour, how many clearly differ."""
    pictures = [np.asarray(pipe(f"a {colour} {kind}", seed=seed).images[0]) for seed in range(seeds)]
    regions = [found[0] for picture in pictures if (found := read(picture).regions)]
    return sum(region.colour == colour for region in regions), clearly_different(regions)


def edits(pipe: KleinPipeline, kind: str, count: int, seed: int = 0, **arguments: Any) -> float:
    """The share of `count` edits of a kind that are right, the rest of the picture unchanged (as `prompts`)."""
    rng = np.random.default_rng((seed, KINDS.index(kind)))
    right = []
    for number in range(count):
        words, before, after = edit_case(kind, number, rng)
        references = [Image.fromarray(world.render(scene)) for scene in before]
        picture = np.asarray(pipe(words, image=references, seed=1000 * seed + number, **arguments).images[0])
        verdict = judge_edit(picture, world.render(before[0]), world.render(after), after)
        right.append(verdict["all"])
    return float(np.mean(right))


def edit_case(kind: str, number: int, rng: np.random.Generator) -> tuple[str, tuple[world.Scene, ...], world.Scene]:
    """Instruction, the references' scenes, the wanted scene; scenes of one and two shapes take turns."""
    if kind != "combine":
        # What a removal leaves is the rest of its reference, so there the reference is of unseen combinations.
        removes = kind == "remove"
        scene = world.random_scene(rng, 2 if removes else 1 + number % 2, held=removes)
        edit = world.random_edit(scene, kind, rng, held=True)
        return captions.instruction(scene, edit, rng).words, (scene,), world.apply_edit(scene, edit)
    first = second = world.random_scene(rng, 1)
    while not world.is_valid(world.combine(first, second)) or not world.is_held_out(world.combine(first, second)):
        first, second = world.random_scene(rng, 1), world.random_scene(rng)
    return captions.combine_instruction(first, rng).words, (first, second), world.combine(first, second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--edits", type=int, default=50, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float, help="for a base checkpoint")
    options = parser.parse_args()
    run: dict[str, Any] = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
    pipe = KleinPipeline.from_pretrained(options.model, keep="all")
    figures = prompts(pipe, options.prompts, options.seed, **run)
    figures |= {
        f"other words: {name}": share
        for name, share in prompts(pipe, options.prompts, options.seed, held_wordings=True, **run).items()
    }
    figures |= {f"edit: {kind}": edits(pipe, kind, options.edits, options.seed, **run) for kind in KINDS}
    figures |= {f"everyday: {name}": share for name, share in everyday(pipe, **run).items()}
    print(json.dumps({name: round(share, 3) for name, share in figures.items()}, indent=2))
    for colour, kind in (("red", "circle"), ("blue", "star"), ("green", "square"), ("black", "ring")):
        right, different = variety(pipe, colour, kind)
        print(f"a {colour} {kind}, 16 seeds: {right} {colour}, {different} clearly different")


if __name__ == "__main__":
    main()
