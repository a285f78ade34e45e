"""The wordings of the `tiny` world: every list has what training draws from, and a few that training never shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Choice:
    """Wordings of one thing: those of training, and those held out of it."""

    seen: tuple[str, ...]
    held: tuple[str, ...] = ()

    def pick(self, rng: np.random.Generator, held: bool = False) -> str:
        """One of them at random; held: of the held-out ones, where there are any."""
        options = self.held if held and self.held else self.seen
        return options[int(rng.integers(len(options)))]


# --- names, places, backgrounds, frames, relations -------------------------------------------------------------------

KIND_WORDS = {
    "circle": Choice(
        ("circle", "circle", "disc", "disk", "dot", "ball", "round shape", "circular shape", "sphere"), ("round disc",)
    ),
    "square": Choice(("square", "square", "box", "square shape", "block", "tile"), ("square box",)),
    "triangle": Choice(("triangle", "triangle", "triangle shape", "three-sided shape"), ("triangular shape",)),
    "star": Choice(
        ("star", "star", "star shape", "five-pointed star", "five-point star", "starlet"), ("pointed star",)
    ),
    "ring": Choice(("ring", "ring", "doughnut", "donut", "hoop", "hollow circle", "circle outline"), ("hollow ring",)),
    "cross": Choice(("cross", "cross", "plus sign", "plus", "plus symbol", "plus shape"), ("cross symbol",)),
}
COLOUR_WORDS = {
    "red": Choice(("red", "red", "red", "crimson", "scarlet", "ruby", "dark red"), ("bright red",)),
    "green": Choice(("green", "green", "green", "emerald", "lime", "dark green"), ("bright green",)),
    "blue": Choice(("blue", "blue", "blue", "dark blue", "navy", "royal blue"), ("deep blue",)),
    "yellow": Choice(("yellow", "yellow", "yellow", "golden", "gold", "lemon"), ("golden yellow",)),
    "orange": Choice(("orange", "orange", "orange", "tangerine", "dark orange"), ("bright orange",)),
    "purple": Choice(("purple", "purple", "violet", "lilac", "lavender"), ("dark purple",)),
    "cyan": Choice(("cyan", "cyan", "turquoise", "light blue", "aqua", "teal", "sky blue"), ("bright turquoise",)),
    "pink": Choice(("pink", "pink", "rose", "light pink", "hot pink"), ("rose pink",)),
    "black": Choice(("black", "black", "black", "jet black", "pitch black"), ("deep black",)),
    "white": Choice(("white", "white", "white", "snow white", "pure white"), ("bright white",)),
}
SIZE_WORDS = {
    "small": Choice(("small", "little", "tiny", "small-sized", "mini", "smaller"), ("very small",)),
    "large": Choice(("large", "big", "huge", "giant", "large-sized", "bigger"), ("very big",)),
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
        *("{a} {s}{k} that's {c}", "{a} {s}{k}, {c}", "{s}{k}, {c}", "{a} {s}{k} ({c})", "some {s}{c} {k}"),
        *("{a} lone {s}{c} {k}", "{a} nice {s}{c} {k}", "{a} {s}geometric {c} {k}"),
        *("{a} {s}{k} whose colour is {c}", "{a} {s}{k} drawn in {c}", "{a} {s}{k} filled with {c}"),
        *("only one {s}{c} {k}", "exactly one {s}{c} {k}", "{a} {s}{c} coloured {k}"),
        *("{a} {s}{k}, which has the colour {c}", "{a} perfect {s}{c} {k}", "{a} {s}{k} made in {c}"),
        *("this {s}{c} {k}", "{k} ({c})", "{c} {s}{k}"),
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
        *("{w}, background: {b}", "{w} placed on {b}", "{w} lying on {b}", "{w} sitting on a {b} background"),
        *("{w} with {b} in the background", "{w} on a background that is {b}", "{w}, set on {b}"),
        *("in front of a {b} background, {w}", "a {b} scene with {w}", "a {b} backdrop with {w}"),
        *("{b} backdrop, {w}", "{w} on a {b} page", "{w} on a {b} wall", "{w} in front of a {b} wall"),
        *("{w} surrounded by {b}", "{w} floating on {b}", "{w} isolated on {b}"),
        *("{w} isolated on a {b} background", "{w} with a plain {b} background", "{w} with a solid {b} background"),
        *("{w} - {b} background", "{w} on {b} ground", "bg {b}, {w}", "{w}, {b} bg"),
        *("there is a {b} background and {w}", "the picture is {b} with {w}", "everything is {b} except {w}"),
        *("{w}, the rest is {b}", "{w} in the foreground, {b} background", "{w} atop a {b} background"),
        *("{w}, and the background is {b}", "background in {b}, {w}", "{w}, with a {b} background"),
        *("{w} against something {b}", "a {b} page showing {w}", "{w}. make the background {b}"),
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
        *("please make {w}", "please create {w}", "please generate {w}", "could you draw {w}", "can you make {w}"),
        *("i need {w}", "i need a picture of {w}", "i want to see {w}", "i'd like {w}"),
        *("i'd like a picture of {w}", "a simple picture of {w}", "a simple image of {w}", "a sketch of {w}"),
        *("a basic drawing of {w}", "vector art of {w}", "clip art of {w}", "logo: {w}", "an image with {w}"),
        *("a picture with {w}", "a picture showing {w}", "an image showing {w}", "this is {w}", "here is {w}"),
        *("we see {w}", "imagine {w}", "render {w}", "sketch {w}", "design {w}", "{w}, minimalist"),
        *("{w}, vector art", "{w}, high quality", "{w}, clean lines", "let me see {w}", "would you paint {w}"),
        *("icon: {w}", "draw me {w}", "make me {w}", "a scene with {w}", "{w} if possible", "{w}, thanks"),
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
            *(f"{{x}} sits {side} of {{y}}", f"{{x}} placed {side} of {{y}}", f"{{x}} lies to the {side} of {{y}}"),
            *(f"{{x}} located {side} of {{y}}", f"{{x}} positioned to the {side} of {{y}}"),
            *(f"{{y}}, {{x}} on its {side}", f"{{y}}, with {{x}} on the {side}"),
            *(f"{{y}}, with {{x}} to the {side}", f"{{x}} in the {side} half and {{y}} in the {far} half"),
            *(f"{side} {{x}}, {far} {{y}}", f"{{x}} ({side}) and {{y}} ({far})", f"{{x}} {side}, {{y}} {far}"),
            *(f"{{x}} directly {side} of {{y}}", f"{{x}} immediately to the {side} of {{y}}"),
            *(f"there is {{x}} {side} of {{y}}", f"{{x}} standing to the {side} of {{y}}"),
            *(f"{{y}} to the {far} of {{x}}", f"{{y}} has {{x}} on its {side}"),
            *(f"{{y}}, and to the {side} of it {{x}}", f"{{x}} in the {side} part, {{y}} in the {far} part"),
            *(f"{{x}} to the {side}, {{y}} to the {far}", f"on its {side} {{y}} has {{x}}"),
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
            *("{x} sits above {y}", "{x} lies above {y}", "{x} positioned above {y}", "{x} located above {y}"),
            *("{x} floating above {y}", "{x} hovering over {y}", "{x} stacked on {y}", "{x} resting on {y}"),
            *("{x} higher than {y}", "{y} lower than {x}", "{y}, with {x} on top", "{y} with {x} on top of it"),
            *("{x} with {y} underneath", "{x} with {y} under it", "{x}, {y} below it", "{x}, with {y} beneath it"),
            *("{x} in the upper half and {y} in the lower half", "{x} on the top and {y} on the bottom"),
            *("{x} (top) and {y} (bottom)", "{x} up top, {y} down below", "{y} sits below {x}"),
            *("{y} lies under {x}", "from top to bottom: {x}, {y}", "{x} just above {y}", "{y} directly under {x}"),
            *("{y} placed under {x}", "{x}, and beneath it {y}", "{x} and {y} under it", "{y}, and over it {x}"),
            *("above is {x}, below is {y}",),
        ),
        (
            *("{x} sits on top of {y}", "{x}, and under it {y}", "{y} just below {x}", "{x} placed above {y}"),
            "{y} at the bottom and {x} above",
        ),
    )
}
TOGETHER = Choice(
    ("{x} and {y}", "{x} and {y}", "{x} and {y}", "{x}, {y}", "{x} with {y}", "both {x} and {y}", "{x} plus {y}")
    + ("{x} along with {y}", "{x}, and {y}", "two shapes: {x} and {y}", "{x} & {y}", "{x} and also {y}"),
    ("{x} as well as {y}", "{x} together with {y}"),
)
BESIDE = Choice(
    (
        "{x} next to {y}",
        "{x} beside {y}",
        "{x} and {y} side by side",
        "{x} by {y}",
        "{x} alongside {y}",
        "{x} near {y}",
    ),
    ("{x} right next to {y}",),
)


# --- German and French -----------------------------------------------------------------------------------------------

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

# --- edits -----------------------------------------------------------------------------------------------------------

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
        *("can you make {s} {v}", "could you paint {s} {v}", "please change {s} to {v}", "i'd like {s} in {v}"),
        *("tint {s} {v}", "colour {s} in {v}", "fill {s} with {v}", "switch {s} to {v}", "{s} must be {v}"),
        *("repaint {s} {v}", "repaint {s} in {v}", "change the shade of {s} to {v}"),
        *("the colour of {s} should be {v}", "{s} needs to be {v}", "could {s} be {v}", "use {v} for {s}"),
        *("please paint {s} {v}", "let's make {s} {v}", "have {s} in {v}", "{s} -> {v}", "make {s} a {v} one"),
        *("{s} now {v}", "turn the colour of {s} into {v}", "please turn {s} {v}", "pick {v} for {s}"),
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
        *("can you make the background {v}", "could the background be {v}", "background in {v}", "background: {v}"),
        *("with a {v} background", "with a {v} backdrop", "make the backdrop {v}", "the same on {v}"),
        *("the same picture on a {v} background", "move it to a {v} background", "fill the background with {v}"),
        *("repaint the background {v}", "use {v} as the background", "let's make the background {v}"),
        *("turn the background to {v}", "i'd like a {v} background", "the background must be {v}"),
        *("change the backdrop to {v}", "put {s} in front of {v}", "please change the background to {v}"),
        *("have a {v} background", "{v} behind it", "please paint the background {v}", "the background in {v}"),
        *("move {s} onto {v}", "show it on {v}"),
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
        *("please delete {s}", "can you remove {s}", "could you erase {s}", "i'd like {s} gone"),
        *("make {s} go away", "{s} must go", "clear {s}", "leave out {s}", "take {s} off the picture"),
        *("remove {s} and leave the rest", "erase {s} completely", "{s} is not needed", "there should be no {s0}"),
        *("eliminate {s}", "throw away {s}", "discard {s}", "keep everything but {s}", "let's remove {s}"),
        *("i don't need {s}", "{s} away", "please take away {s}", "wipe {s} away", "{s} should not be there"),
        *("make {s} vanish", "have {s} removed"),
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
        *("please replace {s} with {n}", "can you turn {s} into {n}", "i want {n} instead of {s}"),
        *("{n} rather than {s}", "{n} in place of {s}", "convert {s} to {n}", "convert {s} into {n}"),
        *("morph {s} into {n}", "switch {s} for {n}", "trade {s} for {n}", "draw {n} instead of {s}"),
        *("put {n} where {s} is", "{s} should become {n}", "let's turn {s} into {n}", "use {n} instead of {s}"),
        *("i'd like {n} instead of {s}", "reshape {s} into {n}", "{s} -> {n}", "please change {s} into {n}"),
        *("have {n} instead of {s}", "replace {s}: {n}", "not {s} but {n}", "{s} must become {n}"),
        *("could {s} be {n}", "show {n} in place of {s}"),
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
        *("merge {s} of image 1 with the background of image 2", "background of image 2, {s} of image 1"),
        *("{s} from the first image, background from the second image",),
        *("use {s} of image 1 and the background of image 2", "take the background of image 2 and {s} of image 1"),
        *("{s} of the first image on the background of the second image",),
    ),
    (
        *("combine {s} of image 1 with the background of image 2", "the background of image 2 behind {s} of image 1"),
        "{s} of the first picture on the background of the second picture",
    ),
)
