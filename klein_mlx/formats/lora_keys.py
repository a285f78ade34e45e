"""What a LoRA file's keys mean: which of our modules, in whose names, behind which prefix, and which factor.

The names of modules are those of `klein_mlx.formats.names`, dotted or with underscores, behind any of the prefixes
that trainers put before them; the factors' names are here.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from klein_mlx.formats.names import BFL, DIALECTS, DIFFUSERS, LLAMA_CPP, MFLUX, OURS, SAME, THIRDS, Rule

# diffusers' names once its projections are fused, and OneTrainer's for them.
_FUSED = tuple(
    Rule(f"double_blocks.*.{stream}.to_{x}", f"transformer_blocks.*.attn.{fused}", third)
    for stream, names in (("img", ("to_qkv", "qkv")), ("txt", ("to_added_qkv", "added_qkv")))
    for fused in names
    for x, third in zip("qkv", THIRDS, strict=True)
)
# The rows of a single block's fused matrix that a foreign matrix holds alone: q, k, v, and all of the MLP's.
PIECES = ("piece 0", "piece 1", "piece 2", "piece 3")
# OneTrainer's BFL names with the fused matrices split.
_SPLIT = (
    *(
        Rule(f"double_blocks.*.{stream}.to_{x}", f"double_blocks.*.{stream}_attn.qkv.{i}")
        for stream in ("img", "txt")
        for i, x in enumerate("qkv")
    ),
    *(Rule("single_blocks.*.linear_in", f"single_blocks.*.linear1.{i}", piece) for i, piece in enumerate(PIECES)),
)
_SWIFT = (
    Rule("double_blocks.*.img.mlp_in", "transformer_blocks.*.ff.activation.proj"),
    Rule("double_blocks.*.txt.mlp_in", "transformer_blocks.*.ff_context.activation.proj"),
    Rule("single_blocks.*.linear_in", "single_transformer_blocks.*.attn.to_qkv_mlp"),
)
_TABLES = (
    ("transformer", DIFFUSERS, (*DIALECTS["transformer", DIFFUSERS], *_FUSED)),
    ("transformer", BFL, (*DIALECTS["transformer", BFL], *_SPLIT)),
    ("transformer", MFLUX, DIALECTS["transformer", MFLUX]),
    ("transformer", OURS, tuple(Rule(r.ours, r.ours) for r in DIALECTS["transformer", DIFFUSERS])),
    ("transformer", "flux-2-swift-mlx", _SWIFT),
    ("text_encoder", DIFFUSERS, DIALECTS["text_encoder", DIFFUSERS]),
    ("text_encoder", MFLUX, DIALECTS["text_encoder", MFLUX]),
    ("text_encoder", LLAMA_CPP, DIALECTS["text_encoder", LLAMA_CPP]),
)
# Stripped one after the other, until what is left is known; dots written as underscores.
_PREFIXES = (
    "base_model_model_",
    "model_diffusion_model_",
    "diffusion_model_",
    "lora_unet_",
    "lora_transformer_",
    "lora_text_encoder_",
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "lora_te3_",
    "lycoris_te_",
    "lycoris_",
    "unet_",
    "transformer_",
    "text_encoders_qwen3_4b_",
    "text_encoders_qwen3_8b_",
    "text_encoders_mistral3_24b_",
    "language_model_",
    "text_encoder_",
    "te_",
    "te1_",
)


class Target(NamedTuple):
    """One of our modules, and the layout of its rows in the foreign matrix."""

    path: str
    layout: str


class Place(NamedTuple):
    """Where a foreign module's name leads: one target, or three for a fused q, k and v.

    name: without the prefix, dotted where it was. index: the block that it names, or None.
    """

    part: str
    dialect: str
    prefix: str
    name: str
    targets: tuple[Target, ...]


class _Row(NamedTuple):
    part: str
    dialect: str
    numbers: tuple[str, ...]  # of the foreign name: literal digits, or * for an index
    rule: Rule


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _index() -> dict[str, list[_Row]]:
    """Foreign names with underscores, every number written as #, -> the rules that they may stand for."""
    rows: dict[str, list[_Row]] = {}
    for part, dialect, table in _TABLES:
        for rule in table:
            theirs = _flat(rule.theirs)
            key, numbers = re.sub(r"\d+|\*", "#", theirs), tuple(re.findall(r"\d+|\*", theirs))
            rows.setdefault(key, []).append(_Row(part, dialect, numbers, rule))
    return rows


_ROWS = _index()


def find_module(name: str) -> Place | None:
    """The module that a foreign name means, whatever stands before it; None if it is none of FLUX.2's."""
    name = re.sub(r"(query|key)_norm[._]scale$", r"\1_norm", name)
    start = 0
    while True:
        rest = _flat(name)[start:]
        found = _match(rest)
        if found:
            row, targets = found
            return Place(row.part, row.dialect, name[:start], name[start:], targets)
        step = next((len(prefix) for prefix in _PREFIXES if rest.startswith(prefix)), 0)
        if not step:
            return None
        start += step


def _match(name: str) -> tuple[_Row, tuple[Target, ...]] | None:
    given = re.findall(r"\d+", name)
    if any(len(number) > 4 for number in given):
        return None
    fitting: dict[str, list[_Row]] = {}
    for row in _ROWS.get(re.sub(r"\d+", "#", name), ()):
        if all(wanted in ("*", number) for wanted, number in zip(row.numbers, given, strict=True)):
            fitting.setdefault(row.dialect, []).append(row)
    if not fitting:
        return None
    rows = next(iter(fitting.values()))
    targets = []
    for row in rows:
        path = row.rule.ours
        for wanted, number in zip(row.numbers, given, strict=True):
            path = path.replace("*", str(int(number)), 1) if wanted == "*" else path
        layout = row.rule.layout
        targets.append(Target(path, layout if layout != "conv" else SAME))
    return rows[0], tuple(targets)


# ---- factors ----


class Key(NamedTuple):
    """A tensor's name, taken apart: the foreign module's name, the factor's role, the adapter that PEFT names."""

    module: str
    role: str
    adapter: str


_ADAPTER = r"(?:\.(?P<adapter>(?!weight|bias|scale)[\w-]+))?"
_LOW_RANK = re.compile(
    r"(?P<module>.+?)(?:[._]lora(?:_linear_layer)?|(?<=_lora\d))[._](?P<role>embedding_A|embedding_B|A|B|down|up|mid)"
    + _ADAPTER
    + r"(?:\.(?P<kind>weight|bias))?"
)
_OTHER = re.compile(
    r"(?P<module>.+?)\.(?P<role>alpha|dora_scale|magnitude|lora_magnitude_vector|hada_w[12]_[ab]|hada_t[12]|"
    r"lokr_w[12](?:_[ab])?|lokr_t2|diff|diff_b|w_norm|b_norm)" + _ADAPTER + r"(?:\.weight)?"
)
_ROLES = {"A": "down", "B": "up", "lora_magnitude_vector": "magnitude", "dora_scale": "magnitude"}
_ROLES |= {"w_norm": "diff", "b_norm": "diff_b", "embedding_A": "embedding_down", "embedding_B": "embedding_up"}
# Kinds of adapters that are refused by name, by a pattern that one of their keys has.
_REFUSED = (
    (r"\.(oft_|boft_)|\.oft\b", "OFT"),
    (r"\.(a1|a2|b1|b2)\.weight$", "GLoRA"),
    (r"\.on_input$|\.ia3_", "IA3"),
    (r"\.set_weight$|\.reshape_weight$", "a replacement of weights"),
    (r"\.lokr_t1$", "a LoKr with a decomposed left kernel"),
    (r"\.vera_|\.lora_ga|\.hra_|\.waveft_", "VeRA or another of PEFT's methods"),
    (r"\.lora_E|\.ranknum$", "AdaLoRA"),
)


def read_key(name: str) -> Key | None:
    """Take a tensor's name apart; None if it names no factor."""
    found = _LOW_RANK.fullmatch(name)
    if found:
        role = _ROLES.get(found["role"], found["role"])
        if found["kind"] == "bias":
            if role != "up":
                return None
            role = "up_bias"
        return Key(found["module"], role, found["adapter"] or "")
    found = _OTHER.fullmatch(name)
    return Key(found["module"], _ROLES.get(found["role"], found["role"]), found["adapter"] or "") if found else None


def refused_kind(names: Iterable[str]) -> str | None:
    """The kind of adapter that a file is, if it is one that klein_mlx does not apply."""
    names = list(names)
    return next((what for pattern, what in _REFUSED if any(re.search(pattern, name) for name in names)), None)
