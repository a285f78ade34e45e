"""A LoRA file as a table of our modules: every layout that is out there, applied in full or refused with the reason.

Every key is used, or it is an error that names the first one that is not. What the names mean is
`klein_mlx.formats.lora_keys`' business, what the factors mean `lora_factors`'. For which model it was made is told by
names and shapes, and by its metadata where several models have those.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import mlx.core as mx

from klein_mlx.config import ModelConfig
from klein_mlx.errors import CheckpointError
from klein_mlx.formats.lora_factors import (
    Group,
    check_group,
    from_float8,
    make_changes,
    piece_rows,
    rank_of,
    weight_shape,
)
from klein_mlx.formats.lora_keys import PIECES, Place, find_module, read_key, refused_kind
from klein_mlx.formats.lora_metadata import Strengths, read_strengths
from klein_mlx.formats.names import BFL, THIRDS, find_parts
from klein_mlx.formats.part import ARCHITECTURES
from klein_mlx.weights.checkpoint import expected
from klein_mlx.weights.lora import Change, Lora
from klein_mlx.weights.safetensors import Entry, WeightFiles, digest_file, is_finite, read_header, read_metadata

_KLEIN_4B = ARCHITECTURES["FLUX.2 [klein] 4B"].transformer
_HIDDEN = {config.transformer.hidden_size: name for name, config in ARCHITECTURES.items()}
_ENCODERS = {
    1024: "Qwen3-0.6B (the encoder of Anima)",
    2560: "Qwen3-4B",
    4096: "Qwen3-8B",
    5120: "Mistral-Small (the encoder of FLUX.2 [dev])",
}
_FLUX1, _HUNYUAN, _QWEN, _SD = "FLUX.1", "HunyuanVideo", "Qwen-Image", "Stable Diffusion or SDXL"
_SDXL, _ANIMA, _DEV = "Stable Diffusion XL", "Anima or Cosmos-Predict2", "FLUX.2 [dev]"
_ZIMAGE = "Z-Image or Lumina"
# By names of modules that FLUX.2 does not have; dots written as underscores. The first match counts.
_FAMILIES = (
    (r"_blocks_\d+_processor_", "FLUX.1 (in XLabs' layout)"),
    (r"(^|_)(down|up|mid|input|output|middle)_blocks?_", _SD),
    (
        r"(img|txt)_mod_linear|_blocks_\d+_modulation_linear|(img|txt)_mlp_fc[12]|token_refiner"
        r"|(?<!single_)transformer_blocks_19_|single_transformer_blocks_3[89]_",
        _HUNYUAN,
    ),
    (r"distilled_guidance_layer", "Chroma"),
    (
        r"(img|txt)_mod_lin\b|single_blocks_\d+_modulation_lin\b|transformer_blocks_\d+_(ff_(context_)?net_|norm1)"
        r"|single_transformer_blocks_\d+_(attn_to_[qkv]\b|proj_|norm)|vector_in|time_text_embed",
        _FLUX1,
    ),
    (r"transformer_blocks_\d+_(img|txt)_(mod|mlp)_", _QWEN),
    (r"blocks_\d+_(cross|self)_attn_(q|k|v|output)_proj|adaln_modulation_(self|cross)_attn|llm_adapter", _ANIMA),
    (r"blocks_\d+_(cross|self)_attn_(q|k|v|o|k_img|v_img)\b|blocks_\d+_ffn_(\d\b|net_)", "Wan"),
    (r"blocks_\d+_attn_(wq|wk|wv|wo|gate)\b|txtfusion_", "Krea 2"),
    (r"(visual|text)_transformer_blocks_\d+", "Kandinsky 5"),
    (r"(double|single)_stream_blocks_\d+_block", "HiDream"),
    (r"joint_transformer_blocks_\d+|(double|single)_layers_\d+", "AuraFlow"),
    (r"joint_blocks_\d+", "Stable Diffusion 3"),
    (r"transformer_blocks_\d+_attn[12]_to_", "a model with cross-attention (LTX-Video, PixArt, Sana)"),
    (r"noise_refiner|context_refiner|(^|_)layers_\d+_(attention_|feed_forward)", _ZIMAGE),
    (r"text_model_encoder_layers|te\d?_text_model", "a CLIP text encoder (FLUX.1, SDXL, SD)"),
    (r"encoder_block_\d+_layer_\d+", "a T5 text encoder"),
)
# What metadata states, its letters and digits only. None: of FLUX.2, without saying which.
_STATED = (
    (r"klein.*4b", "FLUX.2 [klein] 4B"),
    (r"klein.*9b", "FLUX.2 [klein] 9B"),
    (r"flux2.*dev", _DEV),
    (r"flux2|klein", None),
    (r"chroma", "Chroma"),
    (r"flux", _FLUX1),
    (r"qwen.*image", _QWEN),
    (r"zimage|lumina", _ZIMAGE),
    (r"hunyuan.?video|framepack", _HUNYUAN),
    (r"^wan|wan\d", "Wan"),
    (r"anima$|^anima|cosmos", _ANIMA),
    (r"krea2", "Krea 2"),
    (r"kandinsky", "Kandinsky 5"),
    (r"hidream", "HiDream"),
    (r"auraflow", "AuraFlow"),
    (r"ltx", "LTX-Video"),
    (r"sdxl|stablediffusionxl|pony|illustrious", _SDXL),
    (r"sd3|stablediffusion(v?3)", "Stable Diffusion 3"),
    (r"^sd(v?[12]|15)|stablediffusion", "Stable Diffusion"),
)
_STATEMENTS = ("modelspec.architecture", "model_spec.architecture", "ss_base_model_version", "base_model", "model")
# Modules that FLUX.1, HunyuanVideo and Qwen-Image have too, by the same names and, in the 4B, of the same shapes.
_SHARED = re.compile(r"double_blocks\.\d+\.(img|txt)\.(to_[qkv]|to_out|norm_[qk])|time_in\.linear_[12]")


@dataclass(frozen=True)
class Base:
    """name: the model, in words, or None if no known one fits. hidden: the transformer's hidden size, or None."""

    name: str | None
    hidden: int | None

    def words(self) -> str:
        """Fit to follow "is a LoRA for"."""
        size = f"hidden size {self.hidden}" if self.hidden else ""
        if self.name is None:
            return f"a model of {size}" if size else "a model that klein_mlx does not know"
        return f"{self.name} ({size})" if size else self.name


@cache
def shapes_of(config: ModelConfig, part: str) -> Mapping[str, tuple[int, ...]]:
    """Every weight's shape by its module's path, before quantization."""
    return {name.removesuffix(".weight"): shape for name, shape in expected(part, config).items()}


def foreign_base(unknown: Collection[str]) -> str | None:
    """What a LoRA is for if some of its modules' names belong to another family of models."""
    flat = [name.replace(".", "_") for name in unknown]
    return next((what for pattern, what in _FAMILIES if any(re.search(pattern, name) for name in flat)), None)


def stated_base(metadata: Mapping[str, str]) -> str | None:
    """The model that a LoRA's metadata states, in the words of this file; None if it states none that is known."""
    for key in _STATEMENTS:
        text = re.sub(r"[^a-z0-9]", "", metadata.get(key, "")[:200].lower())
        for pattern, what in _STATED:
            if re.search(pattern, text):
                return what
    return None


def is_ambiguous(shapes: Collection[str], base: Base) -> bool:
    """Whether other families have all of these modules by the same names, and no shape tells which family it is."""
    return base.name in (None, "FLUX.2 [klein] 4B") and all(_SHARED.fullmatch(path) for path in shapes)


def tell_base(shapes: Mapping[str, tuple[int, ...]]) -> Base:
    """Of a LoRA for FLUX.2's transformer, or one that shares its names.

    shapes: our module path -> the shape that the LoRA's weight has for it.
    """
    hidden = _hidden(shapes)
    other = _lookalike(shapes) if hidden == _KLEIN_4B.hidden_size else None
    if other:
        return Base(other, hidden)
    fitting = [
        name
        for name, config in ARCHITECTURES.items()
        if all(shapes_of(config, "transformer").get(path) == s for path, s in shapes.items())
    ]
    if fitting and shapes:
        return Base(fitting[0], hidden)
    return Base(_HIDDEN.get(hidden or 0), hidden)


def tell_encoder(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The text encoder that a LoRA is for, by its hidden size."""
    for path, (_, inputs) in ((p, s) for p, s in shapes.items() if len(s) == 2):
        if path.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            return _ENCODERS.get(inputs, f"an encoder of hidden size {inputs}")
    return None


# Which axis of a weight, by the last word of its path, is as long as the hidden size.
_HIDDEN_AXIS: dict[str, int] = dict.fromkeys(("to_q", "to_k", "to_v", "to_out", "mlp_in", "linear_in"), 1)
_HIDDEN_AXIS |= dict.fromkeys(("mod_img", "mod_txt", "mod_single", "final_mod", "final_out"), 1)
_HIDDEN_AXIS |= dict.fromkeys(("mlp_out", "linear_out", "img_in", "txt_in", "linear_1", "linear_2"), 0)


def _hidden(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """What two of three shapes say, or more."""
    kinds = ((path.rpartition(".")[2], shape) for path, shape in shapes.items() if len(shape) == 2)
    said = Counter(shape[_HIDDEN_AXIS[kind]] for kind, shape in kinds if kind in _HIDDEN_AXIS)
    most = max(said, key=said.__getitem__, default=0)
    return most if said[most] * 3 >= 2 * said.total() > 0 else None


def _lookalike(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Families with klein 4B's hidden size and many of its names: their MLPs are narrower, and they have more double
    blocks: FLUX.1 19, HunyuanVideo 20, Qwen-Image 60 and no single ones."""
    doubles = max((int(path.split(".")[1]) for path in shapes if path.startswith("double_blocks.")), default=0)
    singles = max((int(path.split(".")[1]) for path in shapes if path.startswith("single_blocks.")), default=-1)
    hidden = _KLEIN_4B.hidden_size
    wrong = {"mlp_in": (4 * hidden, hidden), "mlp_out": (hidden, 4 * hidden)}
    wrong |= {"linear_in": (7 * hidden, hidden), "linear_out": (hidden, 5 * hidden)}
    narrower = any(shape == wrong.get(path.rpartition(".")[2]) for path, shape in shapes.items())
    if doubles > 19 and singles < 0:
        return _QWEN
    if doubles == 19 or (narrower and singles > 37):
        return _HUNYUAN
    return _FLUX1 if narrower or doubles >= _KLEIN_4B.num_layers else None


_PARTS = ("transformer", "text_encoder")


@dataclass(frozen=True)
class LoraFile:
    """A file, its header read: which of its tensors belong to which module. Nothing is evaluated.

    groups: module's name in the file -> role -> tensor's name. unknown: keys that name no factor of anything.
    """

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    groups: Mapping[str, Mapping[str, str]]
    places: Mapping[str, Place]
    unknown: tuple[str, ...]

    @cached_property
    def homeless(self) -> tuple[str, ...]:
        """Modules that are none of FLUX.2's, in the file's words."""
        return tuple(name for name in self.groups if name not in self.places)

    @cached_property
    def strengths(self) -> Strengths:
        return read_strengths(self.path, self.metadata)

    def arrays(self) -> dict[str, mx.array]:
        """Every tensor, mapped; 8-bit floats as bfloat16."""
        arrays = WeightFiles(self.path, {self.path: dict(self.entries)}).arrays()
        return {name: from_float8(array, self.entries[name].dtype) for name, array in arrays.items()}

    def group(self, name: str, arrays: Mapping[str, mx.array] | None = None) -> Group:
        roles = self.groups[name]
        entries = {role: self.entries[key] for role, key in roles.items()}
        return Group(str(self.path), name, entries, {r: arrays[key] for r, key in roles.items()} if arrays else {})

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Our module path -> the shape that this file's change has there; fused ones divided by three."""
        found = {}
        for name, place in self.places.items():
            shape = weight_shape(self.group(name)) if place.part == part else None
            for target in place.targets if shape else ():
                assert shape is not None
                if target.layout not in PIECES:
                    found[target.path] = (shape[0] // 3, *shape[1:]) if target.layout in THIRDS else shape
        return found

    @cached_property
    def _told(self) -> Base:
        foreign = foreign_base(self.homeless)
        if foreign:
            return Base(foreign, None)
        base = tell_base(self.shapes("transformer"))
        if base.name or base.hidden or not any(place.dialect == BFL for place in self.places.values()):
            return base
        return Base("FLUX.1, or another model with its names", None)

    @cached_property
    def stated(self) -> str | None:
        """The model that the metadata states."""
        return stated_base(self.metadata)

    @cached_property
    def foreign(self) -> str | None:
        """The family of models that this is for, if it is not FLUX.2."""
        known = foreign_base(self.homeless)
        is_foreign = self.stated is not None and not self.stated.startswith("FLUX.2")
        if known or not is_foreign or not is_ambiguous(self.shapes("transformer"), self._told):
            return known
        return f"{self.stated}, as its metadata states"

    @cached_property
    def base(self) -> Base:
        return Base(self.foreign, None) if self.foreign else self._told

    @property
    def contradiction(self) -> str | None:
        """What to tell of metadata that states another model than names and shapes do; None where they agree."""
        told = self._told.name
        if self.stated is None or self.foreign or told == self.stated or (told is None and self._told.hidden is None):
            return None
        if told is None and self.stated.startswith("FLUX.2"):
            return None
        return f"its metadata states {self.stated}; its shapes are those of {self._told.words()}"

    @property
    def kinds(self) -> tuple[str, ...]:
        """LoRA, LoHa, LoKr, full difference; with DoRA where there are magnitudes."""
        roles = {role for group in self.groups.values() for role in group}
        marks = (("LoRA", "down"), ("LoRA of an embedding", "embedding_down"), ("LoHa", "hada_w1_a"))
        found = [word for word, mark in marks if mark in roles]
        found += ["LoKr"] if {"lokr_w1", "lokr_w1_a"} & roles else []
        found += ["full difference"] if {"diff", "diff_b"} & roles else []
        return (*found, "DoRA") if "magnitude" in roles else tuple(found)

    @property
    def layout(self) -> str:
        """Whose names, in words."""
        if not self.places:
            return "unknown names"
        ordered = sorted(self.places.items(), key=lambda item: item[1].part != _PARTS[0])
        name, place = ordered[0]
        dialects = " and ".join(dict.fromkeys(place.dialect for _, place in ordered))
        flat = all("." not in other.name for other in self.places.values())
        spelled = next(key for role, key in self.groups[name].items() if role != "alpha").removeprefix(name)
        prefix = f" behind {place.prefix}" if place.prefix else ""
        words = " with underscores" if flat and any("_blocks_" in n or "layers_" in n for n in self.places) else ""
        return f"{dialects} names{words}{prefix}, as in {spelled.lstrip('._')}"

    @property
    def ranks(self) -> dict[int, int]:
        """rank -> how many modules have it."""
        ranks = (rank_of(self.group(name).entries) for name in self.groups)
        return dict(sorted(Counter(rank for rank in ranks if rank is not None).items()))


def open_lora(path: Path) -> LoraFile:
    """Read a LoRA's header, and refuse what is none, or is malformed. Raises CheckpointError."""
    entries = read_header(path)
    groups: dict[str, dict[str, str]] = {}
    unknown, adapters = [], {}
    for name in entries:
        key = read_key(name)
        if key is None:
            unknown.append(name)
            continue
        adapters.setdefault(key.adapter, name)
        roles = groups.setdefault(key.module, {})
        if key.role in roles:
            raise CheckpointError(f"{path}: {key.module[:100]}: both {roles[key.role]} and {name} are present")
        roles[key.role] = name
    kind = refused_kind(entries)
    if kind:
        raise CheckpointError(f"{path}: is {kind}; klein_mlx applies LoRA, DoRA, LoHa, LoKr and full differences")
    if not groups:
        raise CheckpointError(f"{path}: is not a LoRA: {_what(entries)}")
    named = [adapter for adapter in adapters if adapter]
    if len(named) > 1:
        raise CheckpointError(
            f"{path}: holds {len(named)} adapters ({', '.join(named[:5])}); klein_mlx reads one per file"
        )
    places = {name: place for name in groups if (place := find_module(name)) is not None}
    file = LoraFile(path, entries, read_metadata(path), groups, places, tuple(unknown))
    for name in groups:
        check_group(file.group(name))
        weight_shape(file.group(name))
    return file


def _what(entries: Mapping[str, Entry]) -> str:
    found = find_parts(entries)
    if found:
        option = found[0].part.replace("_", "-")
        return f"it is a {found[0].part.replace('_', ' ')}; give it as --{option}"
    return f"it holds {next(iter(entries), 'nothing')[:80]} ..."


def read_lora(path: Path, config: ModelConfig, partial: bool = False) -> Lora:
    """A LoRA as changes of a model's modules, read and checked.

    config: the model's. partial: leave out what belongs to nothing, instead of refusing the file.
    Raises CheckpointError: for another model (told by what it is), for keys that are not used, for damaged ones.
    """
    file = open_lora(path)
    left_out, needless = _fit(file, config)
    used = [name for name in file.places if name not in left_out and name not in needless]
    unused = [*file.unknown, *(key for name in (*file.homeless, *left_out) for key in file.groups[name].values())]
    unused.sort(key=list(file.entries).index)
    if not used:
        raise CheckpointError(
            f"{path}: none of its {len(file.groups)} modules is one of this model's ({unused[0]} ...)"
        )
    if needed := _part_of(used, file.unknown):
        raise CheckpointError(
            f"{path}: klein_mlx does not know {needed[:100]}, without which its module would be applied wrongly"
        )
    if unused and not partial:
        count = f"{len(unused)} of {len(file.entries)} keys are not used"
        raise CheckpointError(f"{path}: {count}: {_some(unused)}; --lora-partial leaves them out")
    arrays = file.arrays()
    _refuse_damaged(file, used, arrays)
    changes: dict[str, dict[str, tuple[Change, ...]]] = {part: {} for part in _PARTS}
    for name in used:
        place, group = file.places[name], file.group(name, arrays)
        stated = file.strengths.of(place.part, place.name)
        ours = shapes_of(config, place.part)[place.targets[0].path]
        for target, change in make_changes(group, place.targets, _their_shape(place, ours)[0], ours, stated).items():
            own = changes[place.part]
            own[target] = (*own.get(target, ()), change)
    mx.eval([a for group in changes.values() for own in group.values() for change in own for a in change.arrays])
    return Lora(
        path.name,
        digest_file(path),
        file.layout,
        changes,
        len(used),
        tuple(unused),
        len(needless),
        file.contradiction,
    )


def _fit(file: LoraFile, config: ModelConfig) -> tuple[list[str], list[str]]:
    """The modules that this model has not, and those of encoder layers that no picture depends on; a CheckpointError
    if the others do not fit it."""
    if file.foreign:
        raise _other_model(file, file.foreign, config)
    absent, needless, wrong = [], [], []
    for name, place in file.places.items():
        shapes = shapes_of(config, place.part)
        if place.targets[0].path not in shapes:
            (needless if _is_needless(place, config) else absent).append(name)
            continue
        shape, right = weight_shape(file.group(name)), _their_shape(place, shapes[place.targets[0].path])
        entries = file.group(name).entries
        biases = [entries[role].shape for role in ("diff_b", "up_bias") if role in entries]
        bias = next((found for found in biases if found != right[:1]), None)
        if (shape is not None and shape != right) or bias is not None:
            wrong.append((name, place, shape if shape not in (None, right) else bias, right))
        elif (role := _homeless_role(file.groups[name], place, right)) is not None:
            raise CheckpointError(f"{file.path}: {role} has no use: {place.targets[0].path} is not a linear layer")
    mine = tell_base({path: s for path, s in shapes_of(config, "transformer").items() if len(s) == 2})
    if wrong and all(place.part == "text_encoder" for _, place, _, _ in wrong):
        encoder = tell_encoder(file.shapes("text_encoder"))
        raise _other_model(file, f"the text encoder {encoder}", config)
    if (wrong or absent) and file.base != mine and (file.base.hidden or file.base.name):
        raise _other_model(file, file.base.words(), config)
    if wrong:
        name, _, shape, right = wrong[0]
        raise CheckpointError(f"{file.path}: {name[:100]} is made for a weight of shape {shape}; here it is {right}")
    return absent, needless


def _other_model(file: LoraFile, what: str, config: ModelConfig) -> CheckpointError:
    variant, hidden = config.variant, config.transformer.hidden_size
    name = variant.family if variant.embeds_guidance else f"klein {variant.name}"
    return CheckpointError(f"{file.path}: is a LoRA for {what}; this model is {name} (hidden size {hidden})")


def _homeless_role(roles: Mapping[str, str], place: Place, shape: tuple[int, ...]) -> str | None:
    """The key of a bias that is no linear layer's, or of DoRA's magnitude of what is no matrix."""
    is_matrix, is_embedding = len(shape) == 2, place.targets[0].path == "embed_tokens"
    barred = ("diff_b", "up_bias") if is_embedding else () if is_matrix else ("diff_b", "up_bias", "magnitude")
    return next((roles[role] for role in barred if role in roles), None)


def _is_needless(place: Place, config: ModelConfig) -> bool:
    """Whether a module is of an encoder layer above the last tap."""
    if place.part != "text_encoder" or not place.targets[0].path.startswith("layers."):
        return False
    return config.taps[-1] <= int(place.targets[0].path.split(".")[1]) < config.text_encoder.num_hidden_layers


def _their_shape(place: Place, ours: tuple[int, ...]) -> tuple[int, ...]:
    layout = place.targets[0].layout
    if layout in PIECES:
        start, stop = piece_rows(layout, ours)
        return stop - start, *ours[1:]
    return (3 * ours[0], *ours[1:]) if layout in THIRDS else ours


def _part_of(used: Iterable[str], unknown: Iterable[str]) -> str | None:
    """The first unknown key that says something of a module that is used: a magnitude, a scale, a third factor."""
    modules = {re.sub(r"[._]", ".", name) for name in used}
    for key in unknown:
        words = re.sub(r"[._]", ".", key).split(".")
        if any(".".join(words[:count]) in modules for count in range(1, len(words))):
            return key
    return None


def _refuse_damaged(file: LoraFile, used: Iterable[str], arrays: Mapping[str, mx.array]) -> None:
    keys = [key for name in used for role, key in file.groups[name].items() if role != "alpha"]
    checks = [is_finite(arrays[key]) for key in keys]
    mx.eval(checks)
    for key, check in zip(keys, checks, strict=True):
        if not check.item():
            raise CheckpointError(f"{file.path}: {key[:100]} holds NaN or infinity: the file is damaged; get it again")


def _some(names: list[str]) -> str:
    shown = ", ".join(name[:100] if name.isprintable() else ascii(name)[:100] for name in names[:3])
    return f"{shown} ..." if len(names) > 3 else shown
