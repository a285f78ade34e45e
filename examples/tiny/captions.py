"""The words of the `tiny` world: a grammar of captions and edit instructions, with wordings held out of training.

The lists are in wordings.py. A caption also says which attributes of its scene it leaves open (`Wording.free`): other
noise then gives other pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from unsaid import OPEN_BACKGROUND, OPEN_COLOURS
from wordings import (
    BACKGROUND,
    BESIDE,
    COLOUR_WORDS,
    COMBINE,
    EMPTY,
    FRAME,
    FRENCH,
    FRENCH_COLOURS,
    GERMAN,
    GERMAN_COLOURS,
    KIND_WORDS,
    NOUN,
    ONLY,
    PLACE_WORDS,
    RECOLOUR,
    REGROUND,
    RELATION,
    REMOVE,
    REPLACE,
    SIZE_WORDS,
    TOGETHER,
    UNCOLOURED,
)
from world import COLOURS, PLACES, Edit, Scene, Shape, is_held_out, random_scene


@dataclass(frozen=True)
class Wording:
    """A prompt, and what it leaves open: of "place", "size0", "size1" (in the scene's order), "axis", "lane",
    "background" (it is white then), "colour" (of a single shape)."""

    words: str
    free: frozenset[str] = frozenset()


def place_of(shape: Shape) -> str | None:
    """The name of a shape's place, or None where it has none."""
    return next((name for name, centre in PLACES.items() if centre == (shape.x, shape.y)), None)


def relation(scene: Scene) -> str:
    """Where the first of two shapes lies from the second: "left of", "right of", "above" or "below"."""
    a, b = scene.shapes
    if a.y == b.y:
        return "left of" if a.x < b.x else "right of"
    return "above" if a.y < b.y else "below"


def _tidy(words: str) -> str:
    """Articles before vowels, single spaces."""
    parts = " ".join(words.split()).split(" ")
    for i, (word, after) in enumerate(pairwise(parts)):
        if word == "a" and after[:1] in "aeiou" and not after.startswith("one"):
            parts[i] = "an"
    return " ".join(parts)


def _typo(words: str, rng: np.random.Generator) -> str:
    """One letter lost, doubled, exchanged with the next or replaced, inside a word of at least four letters."""
    spots = [i for i in range(1, len(words) - 2) if words[i - 1 : i + 3].isalpha()]
    if not spots:
        return words
    i = spots[int(rng.integers(len(spots)))]
    return (
        words[:i] + words[i + 1 :],
        words[:i] + words[i] + words[i:],
        words[:i] + words[i + 1] + words[i] + words[i + 2 :],
        words[:i] + chr(97 + int(rng.integers(26))) + words[i + 1 :],
    )[int(rng.integers(4))]


def finish(words: str, rng: np.random.Generator, typos: float = 0.04) -> str:
    """Capitals, full stops, now and then a typo."""
    words = _tidy(words)
    if rng.random() < typos:
        words = _typo(words, rng)
    draw = rng.random()
    if draw < 0.3:
        words = words[0].upper() + words[1:]
    elif draw < 0.32 and len(words) <= 40:  # capitals take more tokens
        words = words.upper()
    elif draw < 0.34 and len(words) <= 60:
        words = words.title()
    return words + ("." if rng.random() < 0.2 else "!?"[int(rng.integers(2))] if rng.random() < 0.03 else "")


# --- captions -------------------------------------------------------------------------------------------------------


def _kind(kind: str, rng: np.random.Generator, synonym: bool, held: bool = False) -> str:
    return KIND_WORDS[kind].pick(rng, held) if synonym or held else kind


def _names(kind: str, colour: str, rng: np.random.Generator, held: bool) -> tuple[str, str]:
    """Words for a kind and a colour: mostly the plain ones; held: one of the two by a held-out synonym."""
    odd = int(rng.integers(3)) if held else 2
    k = _kind(kind, rng, rng.random() < 0.4, odd == 0)
    c = COLOUR_WORDS[colour].pick(rng, odd == 1) if odd == 1 or rng.random() < 0.3 else colour
    return k, c


def _noun(shape: Shape, size: bool, rng: np.random.Generator, held: bool, synonyms: bool, bare: bool) -> str:
    k, c = _names(shape.kind, shape.colour, rng, synonyms)
    s = SIZE_WORDS[shape.size].pick(rng, synonyms and rng.random() < 0.3) + " " if size else ""
    return (UNCOLOURED if bare else NOUN).pick(rng, held).format(a="a", s=s, c=c, k=k)


def caption(scene: Scene, rng: np.random.Generator, held: bool = False, synonyms: bool = False) -> Wording:
    """One of many wordings for a scene.

    held: by wordings (order, background, relation, frame) that training never shows; synonyms: by such synonyms. A
    scene whose place or relation is said must be one that has a name; what is unsaid is in `free`.
    """
    b = COLOUR_WORDS[scene.background].pick(rng) if rng.random() < 0.2 else scene.background
    if not scene.shapes:
        return Wording(finish(EMPTY.pick(rng, held).format(b=b), rng))
    if not held and not synonyms and len(scene.shapes) == 1 and rng.random() < 0.04:
        return _foreign(scene, rng)
    free: set[str] = set()
    where = int(rng.integers(4)) if held else -1  # which part is held out; the others too, half of the time

    def odd(part: int) -> bool:
        return held and (part == where or rng.random() < 0.3)

    nouns = []
    for i, shape in enumerate(scene.shapes):
        said = rng.random() < 0.4
        bare = len(scene.shapes) == 1 and not held and shape.colour in OPEN_COLOURS and rng.random() < 0.15
        nouns.append(_noun(shape, said, rng, odd(0), synonyms, bare))
        if bare:
            free.add("colour")
        if not said:
            free.add(f"size{i}")
    if len(scene.shapes) == 1:
        words, place = nouns[0], place_of(scene.shapes[0])
        if place is None or rng.random() < 0.4:
            free.add("place")
        elif rng.random() < 0.1:
            words = f"{PLACE_WORDS[place].pick(rng, odd(1))}, {words}"
        else:
            words += f"{',' if rng.random() < 0.15 else ''} {PLACE_WORDS[place].pick(rng, odd(1))}"
    else:
        words = _pair(scene, nouns, rng, odd(1), free)
    if scene.background == OPEN_BACKGROUND and rng.random() < 0.4:
        free.add("background")
    else:
        words = BACKGROUND.pick(rng, odd(2)).format(w=words, b=b)
    return Wording(
        finish(FRAME.pick(rng, odd(3)).format(w=words), rng, 0.0 if held or synonyms else 0.04), frozenset(free)
    )


def _pair(scene: Scene, nouns: list[str], rng: np.random.Generator, held: bool, free: set[str]) -> str:
    """Words for two shapes; `nouns` in the scene's order, which is the reading order."""
    first, second = nouns
    free.add("lane")
    beside = scene.shapes[0].y == scene.shapes[1].y
    draw = rng.random()
    if draw < 0.2:
        free.add("axis")
        return TOGETHER.pick(rng, held).format(x=first, y=second)
    if draw < 0.27 and beside:
        return BESIDE.pick(rng, held).format(x=first, y=second)
    if not beside:
        return RELATION["above"].pick(rng, held).format(x=first, y=second)
    if rng.random() < 0.5:
        return RELATION["left"].pick(rng, held).format(x=first, y=second)
    return RELATION["right"].pick(rng, held).format(x=second, y=first)


def _foreign(scene: Scene, rng: np.random.Generator) -> Wording:
    """German or French, of one shape: its colour, its kind, mostly the background."""
    shape = scene.shapes[0]

    def bent(colour: str, ending: str) -> str:
        word = GERMAN_COLOURS[colour]
        return word if colour in ("orange", "purple", "pink") else word + ending

    if rng.random() < 0.6:
        noun, ending = GERMAN[shape.kind]
        words = f"ein {bent(shape.colour, ending)} {noun}"
        grounds = ("auf {}em Hintergrund", "auf {}em Grund", "vor {}em Hintergrund", "mit {}em Hintergrund")
        ground = grounds[int(rng.integers(4))].replace("{}em", bent(scene.background, "em"))
    else:
        words = f"{FRENCH[shape.kind]} {FRENCH_COLOURS[shape.colour]}"
        ground = ("sur fond {}", "sur un fond {}", "avec un fond {}")[int(rng.integers(3))]
        ground = ground.format(FRENCH_COLOURS[scene.background])
    unsaid = {"background"} if scene.background == OPEN_BACKGROUND and rng.random() < 0.4 else set()
    return Wording(finish(words if unsaid else f"{words} {ground}", rng), frozenset({"place", "size0"} | unsaid))


# --- edits -----------------------------------------------------------------------------------------------------------


def _refer(scene: Scene, index: int, rng: np.random.Generator, held: bool) -> str:
    """Name a shape so that it is told apart: by kind, by colour, by both, or (alone) as "the shape"."""
    shape = scene.shapes[index]
    twins = sum(other.kind == shape.kind for other in scene.shapes) > 1
    k, c = _names(shape.kind, shape.colour, rng, False)
    draw = rng.random()
    if len(scene.shapes) == 1 and draw < 0.3:
        return ONLY.pick(rng)
    if draw < 0.4:
        return f"the {c} {('shape', 'one', 'object')[int(rng.integers(3))]}"
    return f"the {c} {k}" if twins or draw < 0.75 else f"the {k}"


def instruction(scene: Scene, edit: Edit, rng: np.random.Generator, held: bool = False) -> Wording:
    """One of many wordings of an edit with one reference picture (the picture of `scene`); held: of those held out."""
    s = _refer(scene, edit.index, rng, held) if scene.shapes else "it"
    v = n = ""
    if edit.kind in ("background", "recolour"):
        v = COLOUR_WORDS[edit.value].pick(rng) if rng.random() < 0.2 else edit.value
    if edit.kind == "replace":
        n = "a " + (KIND_WORDS[edit.value].pick(rng) if rng.random() < 0.3 else edit.value).replace(
            "round", "circle", 1
        )
        n = n.replace("circle shape", "round shape")
    if edit.kind == "background":
        s = ONLY.pick(rng) if len(scene.shapes) == 1 else ("the shapes", "everything")[int(rng.integers(2))]
    choice = {"background": REGROUND, "recolour": RECOLOUR, "remove": REMOVE, "replace": REPLACE}[edit.kind]
    words = choice.pick(rng, held).format(s=s, s0=s.removeprefix("the "), v=v, n=n)
    return Wording(finish(words, rng, 0.0 if held else 0.03))


def combine_instruction(scene: Scene, rng: np.random.Generator, held: bool = False) -> Wording:
    """A wording for two references: the one shape of image 1 (the picture of `scene`) on the background of image 2."""
    s = ("the shape", "the shape", "the " + scene.shapes[0].kind, "the object")[int(rng.integers(4))]
    return Wording(finish(COMBINE.pick(rng, held).format(s=s), rng, 0.0 if held else 0.02))


# --- cases to judge by ----------------------------------------------------------------------------------------------


def judged_captions(
    count: int, seed: int, held: bool = False, synonyms: bool = False, combinations: bool = True
) -> list[tuple[str, Scene]]:
    """`count` (words, scene) pairs, alternately of one and two shapes, that name the background and the relation.

    held, synonyms: as `caption`; combinations: the first shape is a combination held out of training.
    """
    rng = np.random.default_rng((seed, held, synonyms, combinations))
    cases: list[tuple[str, Scene]] = []
    while len(cases) < count:
        scene = random_scene(rng, count=1 + len(cases) % 2, held=combinations)
        wording = caption(scene, rng, held, synonyms)
        if len(wording.words) > 90:  # longer ones may not fit in the text's positions
            continue
        if not wording.free & {"background", "axis", "colour"} and (combinations or not is_held_out(scene)):
            cases.append((wording.words, scene))
    return cases


def everyday() -> tuple[list[tuple[str, Scene]], frozenset[int]]:
    """The prompts of everyday.txt with the scenes that they name, and those that leave background or relation open."""
    cases, open_ = [], set()
    for line in (Path(__file__).parent / "everyday.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        words, background, *rest = (part.strip() for part in line.split("|"))
        places = {"left of": ((32, 64), (96, 64)), "right of": ((96, 64), (32, 64)), "above": ((64, 32), (64, 96))}
        places |= {"below": ((64, 96), (64, 32)), "-": ((32, 64), (96, 64))}
        centres = places[rest[1]] if len(rest) > 1 else ((64, 64),)
        named = (rest[0], rest[2]) if len(rest) > 1 else (rest[0],)
        shapes = tuple(
            Shape(kind, colour, "large", x, y)
            for (colour, kind), (x, y) in zip((name.split() for name in named), centres, strict=True)
        )
        if background == "-" or "-" in rest:
            open_.add(len(cases))
        cases.append((words, Scene("white" if background == "-" else background, shapes)))
    return cases, frozenset(open_)


assert set(COLOUR_WORDS) == set(COLOURS) == set(GERMAN_COLOURS) == set(FRENCH_COLOURS)
