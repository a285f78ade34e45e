"""What a user may ask of the weights' bits: words, parts, patterns of layers, presets; and what it means for a model.

A word is `4` (3, 4, 5, 6 or 8 bits in groups of 64), `4-g32` (in groups of 32; 64 and 128 as well), `mxfp4`, `mxfp8`,
`nvfp4`, or `none`. A preset is a word for a whole model. This is the one place that checks what is asked.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.weights.checkpoint import Source, expected
from klein_mlx.weights.quantize import FLOAT_MODES, QUANTIZED_PARTS, Quantization, is_quantized_path

BITS, GROUP_SIZES = (3, 4, 5, 6, 8), (32, 64, 128)
WORDS = f"{', '.join(str(b) for b in BITS)}, {', '.join(sorted(FLOAT_MODES))}"

# What a preset adds to 4 bits for all linear layers of the blocks. Chosen by measuring (tests/quality.py): what all
# blocks read at once, embedders and modulations, costs the picture most per byte.
PRESETS: dict[str, tuple[tuple[str, str], ...]] = {
    "mixed-4": (
        ("mod_*", "8"),
        ("final_mod", "8"),
        ("txt_in", "8"),
        ("img_in", "8"),
        ("time_in.*", "8"),
        ("guidance_in.*", "8"),
        ("final_out", "8"),
        ("embed_tokens", "6"),
    ),
}

Settings = Quantization | None
Word = Quantization | int | str | None


@dataclass(frozen=True)
class Asked:
    """What was asked, checked as far as it can be without a model.

    parts: the linear layers of a part's blocks, per part; a part that is absent stays as it is. layers: patterns of
    layers' paths, a later one wins, None keeps the layer. searched: whether the scales are searched for (slower, and
    closer). name: the preset's, if it is one.
    """

    parts: Mapping[str, Settings]
    layers: tuple[tuple[str, Settings], ...] = ()
    searched: bool = False
    name: str | None = None

    @property
    def given(self) -> tuple[tuple[str, Settings], ...]:
        """The patterns that are not the preset's."""
        return self.layers[len(PRESETS.get(self.name or "", ())) :]

    def left_to_preset(self, part: str, paths: Iterable[str]) -> dict[str, Quantization]:
        """The layers whose bits the preset decides, at its 4 bits, in the groups that were asked for: of a part with no
        other bits of its own, those that no pattern of the user's matches."""
        base = self.parts.get(part)
        if self.name is None or base is None or (base.bits, base.mode) != (4, "affine"):
            return {}
        free = (path for path in paths if not any(fnmatchcase(path, pattern) for pattern, _ in self.given))
        return {path: replace(base, searched=True) for path in free}


Quantize = Asked | Word | Mapping[str, Word]


def parse(value: Quantize, group_size: int | None = None) -> Asked | None:
    """What a user writes: a word for both parts, a preset, or a mapping of parts and patterns to words, in which a
    later pattern wins. None if nothing is to be quantized.

    group_size: for the words that state none. Raises RequestError for anything else.
    """
    if group_size is not None and (type(group_size) is not int or group_size not in GROUP_SIZES):
        raise RequestError("group_size", group_size, f"it must be one of {', '.join(map(str, GROUP_SIZES))}")
    if isinstance(value, Asked):
        return value
    if isinstance(value, Mapping):
        return _parse_mapping(value, group_size)
    if isinstance(value, str) and value.strip().lower() in PRESETS:
        return _preset(value.strip().lower(), group_size)
    settings = parse_word("quantize", value, group_size)
    return Asked(dict.fromkeys(QUANTIZED_PARTS, settings)) if settings else None


def parse_word(what: str, value: Word, group_size: int | None = None) -> Settings:
    """One word as settings; None for `none`. what: whose word it is, for the error."""
    if value is None or isinstance(value, Quantization):
        return value
    text = str(value).strip().lower()
    if text == "none":
        return None
    if text in FLOAT_MODES:
        bits, size = FLOAT_MODES[text]
        if group_size not in (None, size):
            raise RequestError("group_size", group_size, f"{text} has groups of {size}: leave it out")
        return Quantization(bits, size, text)
    found = re.fullmatch(r"(\d)(?:-g(\d+))?", text)
    if isinstance(value, bool) or not found or int(found[1]) not in BITS:
        known = f"{WORDS}, {', '.join(PRESETS)}" if what == "quantize" else WORDS
        raise RequestError(what, value, f"it must be {known} or none")
    size = int(found[2]) if found[2] else group_size or 64
    if size not in GROUP_SIZES:
        raise RequestError(what, value, f"the group size must be one of {', '.join(map(str, GROUP_SIZES))}")
    return Quantization(int(found[1]), size)


def from_options(
    quantize: str | None,
    group_size: int | None = None,
    transformer_bits: str | None = None,
    text_encoder_bits: str | None = None,
    layers: Iterable[str] = (),
) -> Asked | None:
    """The options of a command line: --quantize, then what --transformer-bits, --text-encoder-bits and
    --quantize-layer PATTERN=WORD change of it."""
    asked = parse(quantize, group_size) or Asked({})
    parts = dict(asked.parts)
    for part, word in (("transformer", transformer_bits), ("text_encoder", text_encoder_bits)):
        if word is not None:
            parts[part] = parse_word(f"{part}_bits", word, group_size)
    patterns = list(asked.layers)
    for text in layers:
        pattern, equals, word = text.rpartition("=")
        if not equals or not pattern:
            raise RequestError("quantize_layer", text, "it must be PATTERN=BITS, as in double_blocks.*.to_v=8")
        patterns.append((pattern, parse_word(f"quantize_layer {pattern}", word, group_size)))
    if not patterns and not any(parts.values()):
        return None
    return replace(asked, parts=parts, layers=tuple(patterns))


def _parse_mapping(value: Mapping[str, Word], group_size: int | None) -> Asked | None:
    parts: dict[str, Settings] = {}
    layers: list[tuple[str, Settings]] = []
    for name, word in value.items():
        if not isinstance(name, str):
            raise RequestError("quantize", rule=f"has the key {name!r}; it must be a part or a pattern of layers")
        if name == "vae":
            rule = "names the vae, which is never quantized; it may name transformer, text_encoder"
            raise RequestError("quantize", rule=rule)
        settings = parse_word(f"quantize {name}", word, group_size)
        if name in QUANTIZED_PARTS:
            parts[name] = settings
        else:
            layers.append((name, settings))
    return Asked(parts, tuple(layers)) if layers or any(parts.values()) else None


def _preset(name: str, group_size: int | None) -> Asked:
    base = Quantization(4, group_size or 64)
    layers = tuple((pattern, parse_word(name, word)) for pattern, word in PRESETS[name])
    return Asked(dict.fromkeys(QUANTIZED_PARTS, base), layers, searched=True, name=name)


def settle(asked: Asked | None, source: Source) -> dict[str, Quantization]:
    """What was asked, for this model: per part, every layer that is to be quantized with its settings.

    A part that is stored quantized keeps its bits, and is absent here. Raises RequestError if a pattern of the user's
    matches no layer, CheckpointError for one that matches stored layers, or stored bits other than those asked for.
    """
    if asked is None:
        return {}
    found: dict[str, Quantization] = {}
    given = [pattern for pattern, _ in asked.given]
    unmatched = list(given)
    for part in QUANTIZED_PARTS:
        shapes = expected(part, source.config)
        paths = [name.removesuffix(".weight") for name, s in shapes.items() if name.endswith(".weight") and len(s) == 2]
        stored, wanted = source.quantization.get(part), asked.parts.get(part)
        touched = [path for path in paths if any(fnmatchcase(path, pattern) for pattern in given)]
        if stored and touched:
            raise CheckpointError(
                f"{source.path}: {touched[0]} is quantized already; for other bits start from the original"
            )
        if stored and wanted and (other := _other(stored, wanted, asked, part, paths)):
            raise CheckpointError(
                f"{source.path}: the {part} is {stored.bits}-bit already; for {other} start from the original"
            )
        unmatched = [pattern for pattern in unmatched if not any(fnmatchcase(path, pattern) for path in paths)]
        layers = {path: own for path in paths if (own := _settings(asked, part, path))}
        if layers and not stored:
            found[part] = Quantization.of_layers(layers)
    if unmatched:
        rule = f"{unmatched[0]!r} matches no layer; a path is like double_blocks.0.img.to_v"
        raise RequestError("quantize_layer", rule=rule)
    return found


def _other(stored: Quantization, wanted: Quantization, asked: Asked, part: str, paths: Iterable[str]) -> str:
    """What of the bits that are wanted the stored ones are not; "" for nothing. Their groups count unless usual."""
    if (stored.bits, stored.mode) != (wanted.bits, wanted.mode):
        return f"{wanted.bits} bits"
    if wanted.mode == "affine" and wanted.group_size not in (64, stored.group_size):
        return f"groups of {wanted.group_size}"
    pairs = ((stored.of(part, path), _settings(asked, part, path)) for path in paths) if asked.name else ()
    return str(asked.name) if any(own and (s is None or s.bits != own.bits) for s, own in pairs) else ""


def _settings(asked: Asked, part: str, path: str) -> Settings:
    """Of one layer: the last pattern that matches decides, else the part if the layer is of its blocks."""
    own = asked.parts.get(part) if is_quantized_path(part, path) else None
    for pattern, settings in asked.layers:
        own = settings if fnmatchcase(path, pattern) else own
    return replace(own, searched=asked.searched and own.mode == "affine") if own else None
