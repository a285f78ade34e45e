"""The words of the `tiny` world: a grammar of captions and edit instructions, with wordings held out of training.

Every list of wordings is a `Choice`: what training draws from, and a few that training never shows (`held`). A caption
also says which attributes of its scene it leaves open (`Wording.free`): other noise then gives other pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from unsaid import OPEN_BACKGROUND, OPEN_COLOURS
from world import COLOURS, PLACES, Edit, Scene, Shape, is_held_out, random_scene


@dataclass(frozen=True)
class Choice:
    """Wordings of one thing: those of training, and those held out of it."""

    seen: tuple[str, ...]
    held: tuple[str, ...] = ()

    def pick(self, rng: np.random.Generator, held: bool = False) -> str:
        """One of them at random; held: of the held-out ones, where there are any."""
        options = self.held if held and self.held else self.seen
        return options[int(rng.integers(len(options)))]


@dataclass(frozen=True)
class Wording:
    """A prompt, and what it leaves open: of "place", "size0", "size1" (in the scene's order), "axis", "lane",
    "background" (it is white then), "colour" (of a single shape)."""

    words: str
    free: frozenset[str] = frozenset()


# --- names ----------------------------------------------------------------------------------------------------------

KIND_WORDS = {
    "circle": Choice(("circle", "circle", "disc", "disk", "dot", "ball", "round shape"), ("round disc",)),
    "square": Choice(("square", "square", "box", "square shape"), ("square box",)),
    "triangle": Choice(("triangle", "triangle", "triangle shape"), ("triangular shape",)),
    "star": Choice(("star", "star", "star shape", "five-pointed star"), ("pointed star",)),
    "ring": Choice(("ring", "ring", "doughnut", "donut", "hoop", "hollow circle"), ("hollow ring",)),
    "cross": Choice(("cross", "cross", "plus sign", "plus", "plus symbol"), ("cross symbol",)),
}
COLOUR_WORDS = {
    "red": Choice(("red", "red", "red", "crimson", "scarlet"), ("bright red",)),
    "green": Choice(("green", "green", "green", "emerald"), ("bright green",)),
    "blue": Choice(("blue", "blue", "blue", "dark blue", "navy"), ("deep blue",)),
    "yellow": Choice(("yellow", "yellow", "yellow", "golden", "gold"), ("golden yellow",)),
    "orange": Choice(("orange", "orange", "orange", "tangerine"), ("bright orange",)),
    "purple": Choice(("purple", "purple", "violet", "lilac"), ("dark purple",)),
    "cyan": Choice(("cyan", "cyan", "turquoise", "light blue", "aqua", "teal"), ("bright turquoise",)),
    "pink": Choice(("pink", "pink", "rose", "light pink"), ("rose pink",)),
    "black": Choice(("black", "black", "black", "jet black"), ("deep black",)),
    "white": Choice(("white", "white", "white", "snow white"), ("bright white",)),
}
SIZE_WORDS = {
    "small": Choice(("small", "little", "tiny", "small-sized", "mini"), ("very small",)),
    "large": Choice(("large", "big", "huge", "giant", "large-sized"), ("very big",)),
}
# {a} article, {s} size and a space or nothing, {c} colour, {k} kind
NOUN = Choice(
    (
        *("{a} {s}{c} {k}",) * 12,
        *("{s}{c} {k}",) * 3,
        *("the {s}{c} {k}", "one {s}{c} {k}", "a single {s}{c} {k}", "{a} {c} {s}{k}"),
        *("{a} {s}{k} that is {c}", "{a} {s}{k} in {c}", "{a} {s}{k} coloured {c}", "{a} {s}{c}-coloured {k}"),
        *("{a} {s}{c} colored {k}", "{a} {s}{k} of {c} colour", "{s}{k} in {c}", "{a} {s}{k}, {c} in colour"),
        *("{a} {s}solid {c} {k}", "{a} {s}plain {c} {k}", "{a} simple {s}{c} {k}", "{a} {s}bright {c} {k}"),
        *("{a} {s}filled {c} {k}", "{a} {s}{k} with the colour {c}", "{a} {s}{k} colored in {c}"),
    ),
    ("{a} {s}{k} which is {c}", "{a} {s}flat {c} {k}", "{a} {s}{k} painted {c}", "just one {s}{c} {k}"),
)
UNCOLOURED = Choice(("{a} {s}{k}", "{a} {s}{k}", "{s}{k}", "the {s}{k}", "one {s}{k}", "a simple {s}{k}"))
PLACE_WORDS = {
    "centre": Choice(
        (
            *("in the centre", "in the center", "in the middle", "at the centre", "at the center", "centered"),
            *("centred", "in the middle of the picture", "in the center of the image", "right in the middle"),
        ),
        ("placed in the middle", "exactly in the centre"),
    ),
    **{
        side: Choice(
            (
                *(f"on the {side}", f"at the {side}", f"to the {side}", f"on the {side} side", f"at the {side} edge"),
                *(f"in the {side} half", f"on the {side}-hand side", f"on the {side} of the picture"),
            ),
            (f"placed on the {side}", f"over on the {side} side"),
        )
        for side in ("left", "right")
    },
    **{
        end: Choice(
            (
                *(f"at the {end}", f"in the {end}", f"at the {end} of the picture", f"near the {end}", f"on the {end}"),
                *(f"at the very {end}", f"at the {end} of the image", f"in the {part} part", f"in the {part} half"),
            ),
            (f"towards the {end}", f"placed at the {end}"),
        )
        for end, part in (("top", "upper"), ("bottom", "lower"))
    },
    **{
        f"{end} {side}": Choice(
            (
                *(
                    f"in the {end} {side}",
                    f"at the {end} {side}",
                    f"on the {end} {side}",
                    f"in the {end}-{side} corner",
                ),
                *(f"in the {end} {side} corner", f"in the {part} {side} corner", f"at the {part} {side}"),
                *(f"in the {part} {side}", f"in the {end} {side} of the picture", f"{end} {side}", f"{part} {side}"),
                f"in the {side} {part} corner",
            ),
            (f"placed in the {end} {side}", f"right in the {end} {side} corner"),
        )
        for end, part in (("top", "upper"), ("bottom", "lower"))
        for side in ("left", "right")
    },
}
# {w} what there is, {b} the background's colour
BACKGROUND = Choice(
    (
        *("{w} on a {b} background", "{w} on {b}", "{w}, {b} background") * 3,
        *("{w} against a {b} background", "{w} with a {b} background", "a {b} background with {w}") * 2,
        *("on a {b} background, {w}", "a {b} picture with {w}", "{w} in front of a {b} backdrop", "{w} against {b}"),
        *("{w} over a {b} background", "{w} with a {b} backdrop", "{w} over {b}", "{b} background, {w}"),
        *("{b} background with {w}", "{w} on a {b} canvas", "{w} on top of a {b} background", "{w}. {b} background"),
        *("{w}, background {b}", "{w}, the background is {b}", "{w}, on {b}", "{w}. the background is {b}"),
        *("{w} (background: {b})", "background: {b}. {w}", "{w} on a solid {b} background", "{w} on {b} paper"),
        *("{w} on a plain {b} background", "{w} in front of {b}", "on {b}: {w}", "{w} on a {b} ground"),
        *("{w} against a {b} backdrop", "{w} on a {b} surface", "{w} and a {b} background", "{w}; background {b}"),
        *("{w} with {b} behind it", "a {b} canvas with {w}", "{w} with {b} background", "on {b}, {w}"),
        *("{w}, in front of a {b} background", "{w}, {b} backdrop", "the background is {b}, {w}", "{w} on the {b}"),
    ),
    (
        *("{w} set against a {b} backdrop", "{w}, {b} behind it", "a {b} canvas showing {w}", "{w} upon {b}"),
        *("against a {b} background, {w}", "{w} before a {b} background", "{w} on a background of {b}"),
    ),
)
EMPTY = Choice(
    (
        *("a plain {b} background", "an empty {b} picture", "nothing on a {b} background", "just {b}"),
        *("only a {b} background", "an empty {b} canvas", "{b} background", "a {b} picture with nothing on it"),
    ),
    ("nothing but {b}", "a blank {b} canvas"),
)
FRAME = Choice(
    (
        *("{w}",) * 24,
        *("a picture of {w}", "an image of {w}", "draw {w}", "a drawing of {w}", "please draw {w}", "show me {w}"),
        *("there is {w}", "i want {w}", "generate {w}", "paint {w}", "make {w}", "create {w}", "a photo of {w}"),
        *("an illustration of {w}", "give me {w}", "{w}, nothing else", "{w}, simple", "{w}, flat design"),
        *("generate an image of {w}", "i would like {w}", "can you draw {w}", "an icon of {w}", "a painting of {w}"),
        *("minimalist picture of {w}", "picture of {w}", "{w}, please", "only {w}", "just {w}", "{w} and nothing else"),
    ),
    ("please paint {w}", "i want a picture of {w}", "could you make {w}", "a simple drawing of {w}"),
)
# {x} is what lies on the relation's own side of {y}
RELATION = {
    side: Choice(
        (
            *(f"{{x}} {side} of {{y}}", f"{{x}} to the {side} of {{y}}", f"{{x}} on the {side} of {{y}}") * 2,
            *(f"{{x}} is {side} of {{y}}", f"{{x}} is to the {side} of {{y}}", f"{{x}}, {side} of {{y}}"),
            *(f"{{x}} on the {side} and {{y}} on the {far}", f"{{x}} on the {side}, {{y}} on the {far}"),
            *(f"{{y}} on the {far}, {{x}} on the {side}", f"{{y}} on the {far} and {{x}} on the {side}"),
            *(f"{{x}} on the {side} side of {{y}}", f"{{y}} with {{x}} on its {side}", f"{side}: {{x}}, {far}: {{y}}"),
            *(f"{{y}} and to its {side} {{x}}", f"{{y}} with {{x}} to its {side}", f"{{y}} and {{x}} {side} of it"),
            *(f"to the {side} of {{y}} is {{x}}", f"{{y}} with {{x}} to the {side} of it"),
            *(f"{{x}} at the {side}, {{y}} at the {far}", f"on the {side} {{x}}, on the {far} {{y}}"),
        ),
        (
            *(f"{{x}} sits to the {side} of {{y}}", f"{{y}}, and on its {side} {{x}}", f"{{x}} just {side} of {{y}}"),
            f"{{y}} to the {far}, {{x}} to the {side}",
        ),
    )
    for side, far in (("left", "right"), ("right", "left"))
} | {
    "above": Choice(
        (
            *("{x} above {y}", "{x} over {y}", "{x} on top of {y}", "{y} below {x}", "{y} under {x}") * 2,
            *("{y} beneath {x}", "{y} underneath {x}", "{x} is above {y}", "{x} is on top of {y}", "{x}, above {y}"),
            *("{x} at the top and {y} at the bottom", "{x} at the top, {y} at the bottom", "{x} with {y} below it"),
            *("{x} on top and {y} at the bottom", "{y} with {x} above it", "{y} is below {x}", "{y} is under {x}"),
            *(
                "{y} at the bottom, {x} at the top",
                "{x} on top, {y} below",
                "{x} and below it {y}",
                "top: {x}, bottom: {y}",
            ),
            *("{y} and above it {x}", "above {y} is {x}", "below {x} is {y}", "{x} directly above {y}"),
        ),
        (
            *("{x} sits on top of {y}", "{x}, and under it {y}", "{y} just below {x}", "{x} placed above {y}"),
            "{y} at the bottom and {x} above",
        ),
    )
}
TOGETHER = Choice(
    ("{x} and {y}", "{x} and {y}", "{x} and {y}", "{x}, {y}", "{x} with {y}", "both {x} and {y}", "{x} plus {y}"),
    ("{x} as well as {y}", "{x} together with {y}"),
)
BESIDE = Choice(
    ("{x} next to {y}", "{x} beside {y}", "{x} and {y} side by side", "{x} by {y}"), ("{x} right next to {y}",)
)


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
    return words + ("." if rng.random() < 0.2 else "!" if rng.random() < 0.02 else "")


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
    if not held and not synonyms and len(scene.shapes) == 1 and rng.random() < 0.03:
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


GERMAN = {
    **{"circle": ("Kreis", "er"), "square": ("Quadrat", "es"), "triangle": ("Dreieck", "es")},
    **{"star": ("Stern", "er"), "ring": ("Ring", "er"), "cross": ("Kreuz", "es")},
}
GERMAN_COLOURS = {
    **{"red": "rot", "green": "grün", "blue": "blau", "yellow": "gelb", "cyan": "türkis", "black": "schwarz"},
    **{"white": "weiß", "orange": "orange", "purple": "lila", "pink": "rosa"},
}
FRENCH = {
    **{"circle": "un cercle", "square": "un carré", "triangle": "un triangle"},
    **{"star": "une étoile", "ring": "un anneau", "cross": "une croix"},
}
FRENCH_COLOURS = {
    **{"red": "rouge", "green": "vert", "blue": "bleu", "yellow": "jaune", "cyan": "cyan", "black": "noir"},
    **{"white": "blanc", "orange": "orange", "purple": "violet", "pink": "rose"},
}


def _foreign(scene: Scene, rng: np.random.Generator) -> Wording:
    """German or French, of one shape: its colour, its kind, the background."""
    shape = scene.shapes[0]

    def bent(colour: str, ending: str) -> str:
        word = GERMAN_COLOURS[colour]
        return word if colour in ("orange", "purple", "pink") else word + ending

    if rng.random() < 0.6:
        noun, ending = GERMAN[shape.kind]
        words = f"ein {bent(shape.colour, ending)} {noun}"
        ground = ("auf {}em Hintergrund", "auf {}em Grund", "vor {}em Hintergrund")[int(rng.integers(3))]
        words += " " + ground.replace("{}em", bent(scene.background, "em"))
    else:
        ground = ("sur fond {}", "sur un fond {}")[int(rng.integers(2))]
        words = f"{FRENCH[shape.kind]} {FRENCH_COLOURS[shape.colour]} {ground.format(FRENCH_COLOURS[scene.background])}"
    return Wording(words, frozenset({"place", "size0"}))


# --- edits ----------------------------------------------------------------------------------------------------------

# {s} the shape, {v} the new colour, {n} the new kind
RECOLOUR = Choice(
    (
        *("make {s} {v}", "turn {s} {v}", "change {s} to {v}", "paint {s} {v}", "recolour {s} {v}", "recolor {s} {v}"),
        *("change the colour of {s} to {v}", "make the colour of {s} {v}", "color {s} {v}", "colour {s} {v}"),
        *(
            "change the color of {s} to {v}",
            "{s} should be {v}",
            "recolor {s} to {v}",
            "{s} in {v}",
            "make {s} look {v}",
        ),
        *("paint {s} in {v}", "i want {s} to be {v}", "turn {s} to {v}", "give {s} a {v} colour", "{v} for {s}"),
    ),
    ("dye {s} {v}", "please make {s} {v}", "let {s} be {v}", "set the colour of {s} to {v}", "paint {s} with {v}"),
)
REGROUND = Choice(
    (
        *("change the background to {v}", "make the background {v}", "change the background colour to {v}"),
        *("put it on a {v} background", "turn the background {v}", "paint the background {v}", "put it on {v}"),
        *("{v} background", "a {v} background", "set the background to {v}", "background {v}", "use a {v} background"),
        *("replace the background with {v}", "recolor the background {v}", "i want a {v} background", "on {v}"),
        *(
            "give it a {v} background",
            "color the background {v}",
            "the background should be {v}",
            "on a {v} background",
        ),
        *(
            "change the background color to {v}",
            "put {s} on a {v} background",
            "put {s} on {v}",
            "make it {v} behind {s}",
        ),
    ),
    (
        "switch the background to {v}",
        "please make the background {v}",
        "place it on {v}",
        "give the picture a {v} background",
    ),
)
REMOVE = Choice(
    (
        *("remove {s}", "delete {s}", "erase {s}", "take away {s}", "remove {s} from the picture", "get rid of {s}"),
        *("take {s} away", "take out {s}", "drop {s}", "without {s}", "no {s0}", "remove {s} please", "hide {s}"),
        *("make {s} disappear", "{s} should go", "cut {s}", "erase {s} from the image", "i do not want {s}"),
    ),
    ("please remove {s}", "wipe out {s}", "take {s} out of the picture", "lose {s}", "{s} should disappear"),
)
REPLACE = Choice(
    (
        *("turn {s} into {n}", "replace {s} with {n}", "change {s} into {n}", "make {s} {n}", "swap {s} for {n}"),
        *("change {s} to {n}", "replace {s} by {n}", "exchange {s} for {n}", "{n} instead of {s}"),
        "swap {s} with {n}",
        *(
            "make {s} into {n}",
            "{s} should be {n}",
            "transform {s} into {n}",
            "put {n} in place of {s}",
            "turn {s} to {n}",
        ),
    ),
    ("{s} becomes {n}", "substitute {n} for {s}", "let {s} be {n}", "instead of {s}, {n}", "please turn {s} into {n}"),
)
ONLY = Choice(("the shape", "it", "the object", "the shape"))
COMBINE = Choice(
    (
        *("put {s} of image 1 on the background of image 2", "put {s} from image 1 on the background of image 2"),
        *("place {s} of image 1 on the background of image 2", "{s} of image 1 on the background of image 2"),
        *("put {s} of image 1 into image 2, without its shape", "{s} from image 1 with the background of image 2"),
        *("use the background of image 2 for {s} of image 1", "{s} from image 1, background from image 2"),
        *("put {s} of the first image on the background of the second", "image 1 with the background of image 2"),
        *("give image 1 the background of image 2", "take {s} from image 1 and the background from image 2"),
        *("put {s} from the first picture on the background of the second picture", "use the background of image 2"),
        *("take {s} from image 1 and put it on the background of image 2", "put image 1 on the background of image 2"),
    ),
    (
        *("combine {s} of image 1 with the background of image 2", "the background of image 2 behind {s} of image 1"),
        "{s} of the first picture on the background of the second picture",
    ),
)


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
