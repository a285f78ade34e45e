"""One part of a model from a file or folder of its own: a single file of BFL's, one of ComfyUI's three, a GGUF, a
folder of mflux's or mlx-lm's. What it is, its header says; its name says nothing."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from klein_mlx.config import (
    ENCODERS,
    TAPS,
    VARIANTS,
    ModelConfig,
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
    default_taps,
    named_variant,
)
from klein_mlx.errors import CheckpointError
from klein_mlx.formats.gguf import open_gguf
from klein_mlx.formats.names import (
    BFL,
    DIFFUSERS,
    INTERLEAVED,
    LLAMA_CPP,
    MFLUX,
    ONE_STEP_PREFIX,
    OTHER_LANGUAGE_MODEL,
    OURS,
    POINTWISE,
    SAME,
    Found,
    by_rows,
    canonical,
    find_parts,
    is_left_out,
    our_layer,
    stranger,
    their_name,
    their_shape,
    to_ours,
)
from klein_mlx.formats.scaled import Tensors, decode
from klein_mlx.weights.checkpoint import (
    CONFIG_CLASSES,
    CONFIG_FILE,
    ReadRows,
    expected,
    file_rows,
    open_checkpoint,
    packed_dtypes,
)
from klein_mlx.weights.quantize import FLOAT_MODES, Quantization, find_settings
from klein_mlx.weights.safetensors import (
    Deferred,
    Weight,
    WeightFiles,
    open_weights,
    read_header,
    read_json,
    read_metadata,
    require_file,
)

_TITLES = ("general.name", "general.basename", "modelspec.title", "modelspec.architecture", "title", "name")
_STEMS = ("model", "diffusion_pytorch_model")


def open_tensors(path: Path, stem: str | None = None) -> Tensors:
    """The tensors of a safetensors or GGUF file, or of a folder's shards; told apart by their first bytes.

    stem: how the wanted file in a folder begins, where that is known.
    """
    if path.is_dir():
        return _open_folder(path, stem)
    if require_file(path) >= 4:
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":
                return open_gguf(path)
    files = WeightFiles(path, {path: read_header(path)})
    return Tensors(
        path, "safetensors", (path,), files.shards[path], files.arrays, read_metadata(path), partial(file_rows, files)
    )


def _open_folder(folder: Path, stem: str | None) -> Tensors:
    stem = stem or next((s for s in _STEMS if any(folder.glob(f"{s}.*safetensors*"))), None)
    if stem is None:
        loose = [p for p in sorted(folder.glob("*.safetensors")) if not p.name.startswith("._")]
        if len(loose) == 1:
            return open_tensors(loose[0])
        if loose:
            raise CheckpointError(f"{folder}: holds {len(loose)} safetensors files and no index; name one of them")
        stem = _STEMS[0]  # its absence is told with its remedy
    files = open_weights(folder, stem)
    entries = {name: entry for shard in files.shards.values() for name, entry in shard.items()}
    metadata = {key: value for shard in files.shards for key, value in read_metadata(shard).items()}
    return Tensors(
        folder, "safetensors", tuple(files.shards), entries, files.arrays, metadata, partial(file_rows, files)
    )


_DECODERS = ("decoder.up.0.block.0.norm1.weight", "decoder.up_blocks.0.resnets.0.norm1.weight")
_WANTED = "klein_mlx reads the parts of FLUX.2 [klein] and [dev]"
_MAX_LEVELS = 16
_OTHERS = ("model.diffusion_model.", "vae.", "first_stage_model.", "text_encoder", "qwen3_", "mistral3_")  # prefixes


@dataclass(frozen=True)
class PartFile:
    """One part, seen as ours. Opening it reads headers only.

    tensors: of this part alone, under the dialect's names. config: told from the shapes.
    """

    path: Path
    found: Found
    tensors: Tensors
    config: Any

    @property
    def part(self) -> str:
        return self.found.part

    @property
    def format(self) -> str:
        """In words: whose names, in which kind of file."""
        return f"{self.found.dialect} names, {self.tensors.kind}"

    @property
    def variants(self) -> list[str]:
        """The variants that a transformer of these sizes fits; of another part, none."""
        if self.part != "transformer":
            return []
        c = self.config
        return [v.name for v in VARIANTS if v.dimensions == (c.hidden_size, c.num_layers, c.num_single_layers)]

    @property
    def fits(self) -> str:
        """`variants` in words; empty where there are none."""
        return "FLUX.2 [dev]" if self.variants == ["dev"] else f"FLUX.2 [klein] {' or '.join(self.variants)}".rstrip()

    @property
    def names_one_step(self) -> bool:
        """Whether its names are those of the variant 4b-1step's file, and its sizes do not speak against that."""
        named = (self.found.dialect, self.found.prefix) == (BFL, ONE_STEP_PREFIX)
        return named and (not self.variants or "4b" in self.variants)

    @property
    def said_variant(self) -> str | None:
        """The variant that its name, or what it says of itself, speaks of."""
        told = (self.path.name, *(self.tensors.metadata.get(key, "") for key in _TITLES))
        return next((name for text in told if (name := named_variant(text))), None)

    @cached_property
    def quantized_layers(self) -> dict[str, tuple[int, int, bool]]:
        """As `_quantized_layers`."""
        return _quantized_layers(self.tensors)

    def settings(self) -> dict[str, tuple[int, Quantization | None]]:
        """The quantized layers by their names -> how many inputs they have, and how they are stored."""
        usual = _group_size(self.tensors, self.found, self.config)
        found = {}
        for path, stored in self.quantized_layers.items():
            width = _inputs(self.found, self.config, path) or 0
            if not find_settings(width, *stored):
                width = _width(*stored, usual)
            found[path] = (width, find_settings(width, *stored))
        return found

    def quantization(self, config: ModelConfig) -> Quantization | None:
        """How this part is stored, layer by layer, once the whole model's config is known."""
        if not self.quantized_layers:
            return None
        layers = {}
        for ours, shape in expected(self.part, config).items():
            theirs, layout = self._place(config, ours)
            found = self.quantized_layers.get(theirs.removesuffix(".weight")) if ours.endswith(".weight") else None
            if found is None:
                continue
            settings = find_settings(shape[-1], *found)
            if settings is None or not by_rows(layout):
                raise CheckpointError(f"{self.path}: {theirs} is quantized in a way that klein_mlx does not read")
            layers[ours.removesuffix(".weight")] = settings
        return Quantization.of_layers(layers) if layers else None

    def weights(self, config: ModelConfig) -> dict[str, Weight]:
        """The weights under our names, lazily, once they have been checked against the whole model's config."""
        quantization = self.quantization(config)
        shapes = expected(self.part, config, quantization)
        places = {ours: self._place(config, ours) for ours in shapes}
        dtypes = packed_dtypes(self.part, shapes, quantization)
        WeightFiles(self.tensors.path, {self.tensors.path: dict(self.tensors.entries)}).check(
            {theirs: their_shape(layout, shapes[ours]) for ours, (theirs, layout) in places.items()},
            {places[ours][0]: allowed for ours, allowed in dtypes.items()},
            lambda name: is_left_over(self.found, name, config),
        )
        arrays = self.tensors.arrays()
        return {o: _to_ours(layout, arrays[theirs], shapes[o]) for o, (theirs, layout) in places.items()}

    def rows(self, config: ModelConfig, name: str) -> ReadRows | None:
        """As `Source.rows`."""
        theirs, layout = self._place(config, name)
        return self.tensors.rows(theirs) if layout == SAME else None

    def _place(self, config: ModelConfig, ours: str) -> tuple[str, str]:
        theirs, layout = _place(self.tensors, self.found, len(config.vae.block_out_channels), ours)
        if self.found.dialect == LLAMA_CPP and ours.endswith(("q_proj.weight", "k_proj.weight")):
            if self.config.model_type == "mistral":  # llama.cpp's architectures "llama" and "mistral3", not "qwen3"
                layout = f"{INTERLEAVED}{self.config.head_dim}"
        return theirs, layout


def open_part(path: Path, part: str | None = None, like: Any = None) -> PartFile:
    """Open a file or folder that holds a part of a model, and tell what it is.

    part: which one is wanted; needed only where a file holds several. like: the config of the model that it will
    belong to, for what its shapes do not say; a config.json beside the weights goes first.
    Raises CheckpointError, with what the file is instead, if it is none.
    """
    if part and path.is_dir() and (path / part).is_dir():
        path = path / part
    ours = path.is_dir() and (path / CONFIG_FILE).exists()
    if ours and part:
        like = getattr(open_checkpoint(path).config, part)
    tensors = open_tensors(path, part if ours else None)
    found = _choose(tensors, find_parts(tensors.entries), part)
    known = path / "config.json"
    if path.is_dir() and known.exists() and found.dialect != MFLUX:
        stated = {**KLEIN[found.part].to_dict(), **read_json(known)}  # what it does not state is klein's
        if stated.get("model_type") not in TAPS:
            stated.pop("model_type", None)
        like = CONFIG_CLASSES[found.part].from_dict(stated, str(known))
    mine = {canonical(n.removeprefix(found.prefix)): n for n in tensors.entries if n.startswith(found.prefix)}
    if found.prefix == "":  # what stands behind another part's prefix is that part's
        mine = {new: old for new, old in mine.items() if new != old or not old.startswith(_OTHERS)}
    mine.pop("tekken_model", None)  # the tokenizer that ComfyUI's file of Mistral has inside
    tensors = decode(tensors.renamed(mine))
    marks = ("encoder.down.{}.block.0.norm1.weight", "encoder.down_blocks.{}.resnets.0.norm1.weight")
    levels = sum(mark.format(i) in tensors.entries for i in range(_MAX_LEVELS) for mark in marks)
    try:
        config = infer_config(found.part, lambda ours: _shape(tensors, found, levels, ours, 64), like)
        if (size := _group_size(tensors, found, config)) != 64:  # it decides how wide some layers are
            config = infer_config(found.part, lambda ours: _shape(tensors, found, levels, ours, size), like)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return PartFile(path, found, tensors, config)


def _choose(tensors: Tensors, found: list[Found], part: str | None) -> Found:
    """The part that is wanted, of those that a file holds; or what it is instead."""
    mine = [f for f in found if part in (None, f.part)]
    names = tensors.entries
    what = stranger(names)
    if what and (not found or what.startswith("a LoRA")):
        raise CheckpointError(f"{tensors.path}: is {what}; {_WANTED}")
    if len(mine) > 1:
        parts = ", ".join(f.part for f in mine)
        raise CheckpointError(f"{tensors.path}: holds {parts}; say which one to take")
    if not mine and found:
        other = found[0].part
        raise CheckpointError(f"{tensors.path}: is a {other}, not a {part}; give it as --{other.replace('_', '-')}")
    if not mine and any(name.endswith(_DECODERS) for name in names):
        raise CheckpointError(
            f"{tensors.path}: is the decoder of a VAE alone; take full_encoder_small_decoder.safetensors of "
            "black-forest-labs/FLUX.2-small-decoder"
        )
    if not mine:
        held = next(iter(names), "no tensor")[:80]
        raise CheckpointError(f"{tensors.path}: is not a model that klein_mlx knows (it holds {held} ...); {_WANTED}")
    chosen = mine[0]
    if chosen.part == "vae" and chosen.dialect != OURS and chosen.prefix + "bn.running_mean" not in names:
        raise CheckpointError(
            f"{tensors.path}: is a VAE without the latent statistics of FLUX.2's (is it FLUX.1's?); "
            "take the VAE of black-forest-labs/FLUX.2-klein-4B"
        )
    return chosen


def is_left_over(found: Found, theirs: str, config: ModelConfig) -> bool:
    """As `is_left_out`, for any dialect: what a file may hold and a picture never needs."""
    path, _, kind = theirs.rpartition(".")
    if kind in ("scales", "biases"):
        theirs = f"{path}.weight"
    if found.part != "text_encoder" or found.dialect == DIFFUSERS:
        return is_left_out(found.part, theirs, config)
    if found.dialect == MFLUX:
        return theirs.startswith("rotary_emb.") or is_left_out(found.part, f"model.{theirs}", config)
    if theirs in ("output_norm.weight", "output.weight", "rope_freqs.weight"):
        return True
    return is_left_out(found.part, theirs.replace("blk.", "model.layers.", 1), config)


def _place(tensors: Tensors, found: Found, levels: int, ours: str) -> tuple[str, str]:
    theirs, layout = their_name(found.part, found.dialect, ours, levels)
    entry = tensors.entries.get(theirs)
    if layout == POINTWISE and entry and len(entry.shape) == 2:
        return theirs, SAME  # stored as the linear layer that it is
    return theirs, layout


def _shape(tensors: Tensors, found: Found, levels: int, ours: str, group_size: int) -> tuple[int, ...] | None:
    """The shape that one of our weights has in the file, unpacked and in our order."""
    theirs, layout = _place(tensors, found, levels, ours)
    entry = tensors.entries.get(theirs)
    if entry is None:
        return None
    shape = entry.shape
    scales = tensors.entries.get(theirs.removesuffix("weight") + "scales")
    if entry.dtype == "U32" and scales and scales.shape:
        has_biases = theirs.removesuffix("weight") + "biases" in tensors.entries
        shape = (*shape[:-1], _width(shape[-1], scales.shape[-1], has_biases, group_size))
    if layout == "conv" and len(shape) == 4:
        return shape[0], shape[2], shape[3], shape[1]
    return shape


def _quantized_layers(tensors: Tensors) -> dict[str, tuple[int, int, bool]]:
    """The layers that MLX quantized, by their names -> columns of the weight and of its scales, any biases."""
    layers = {}
    for name, entry in tensors.entries.items():
        path, _, kind = name.rpartition(".")
        weight = tensors.entries.get(f"{path}.weight")
        if kind == "scales" and weight and weight.dtype == "U32" and len(weight.shape) == len(entry.shape) == 2:
            layers[path] = (weight.shape[1], entry.shape[1], f"{path}.biases" in tensors.entries)
    return layers


def _inputs(found: Found, config: Any, path: str) -> int | None:
    """How many inputs one of their layers has in a part of these sizes; None for a layer that is not ours."""
    layer = our_layer(found.part, found.dialect, path)
    if found.part == "transformer":
        others = {
            "img_in": config.in_channels,
            "txt_in": config.joint_attention_dim,
            "linear_1": config.timestep_guidance_channels,
            "mlp_out": config.mlp_size,
            "linear_out": config.hidden_size + config.mlp_size,
        }
        return others.get(layer or "", config.hidden_size) if layer else None
    if found.part == "text_encoder":
        others = {"o_proj": config.num_attention_heads * config.head_dim, "down_proj": config.intermediate_size}
        return others.get(layer or "", config.hidden_size)  # a language head's too
    return config.block_out_channels[-1] if layer else None


def _group_size(tensors: Tensors, found: Found, config: Any) -> int:
    """The group size of most layers that MLX quantized, told from those whose width is the part's hidden size."""
    hidden = config.block_out_channels[-1] if found.part == "vae" else config.hidden_size
    odd = ("img_in", "txt_in", "linear_1", "mlp_out", "linear_out", "o_proj", "down_proj")
    sizes = Counter(
        hidden // groups
        for path, (packed, groups, has_biases) in _quantized_layers(tensors).items()
        if our_layer(found.part, found.dialect, path) not in (None, *odd)
        and find_settings(hidden, packed, groups, has_biases)
    )
    return sizes.most_common(1)[0][0] if sizes else 64


def _width(packed: int, groups: int, has_biases: bool, group_size: int) -> int:
    """A quantized layer's number of inputs: MLX's other modes tell it by their columns, affine by the group size."""
    if not has_biases:
        kinds = [(packed * 32 // bits, size) for bits, size in FLOAT_MODES.values()]
        return next((width for width, size in kinds if width == groups * size), groups * group_size)
    return groups * group_size


def _to_ours(layout: str, weight: Weight, shape: tuple[int, ...]) -> Weight:
    if isinstance(weight, Deferred):
        return weight if layout == SAME else Deferred(shape, weight.dtype, lambda: to_ours(layout, weight.load()))
    return to_ours(layout, weight)


Shape = Callable[[str], tuple[int, ...] | None]  # of one of our weights, before quantization; None if it is not there

KLEIN = {
    "transformer": TransformerConfig(128, 5, 20, 128, 24, 7680, 3.0, (32, 32, 32, 32)),
    "text_encoder": TextEncoderConfig(151936, 2560, 9728, 36, 32, 8, 128),
    "vae": VAEConfig((128, 256, 512, 512), 2, 32),
}
MISTRAL = TextEncoderConfig(131072, 5120, 32768, 40, 32, 8, 128, 1e9, 1e-5, "mistral")


def _published(doubles: int, singles: int, heads: int, encoder: TextEncoderConfig) -> ModelConfig:
    is_dev = encoder is MISTRAL
    counts = {"num_layers": doubles, "num_single_layers": singles, "num_attention_heads": heads}
    transformer = replace(
        KLEIN["transformer"], **counts, joint_attention_dim=3 * encoder.hidden_size, guidance_embeds=is_dev
    )
    taps = default_taps(encoder.num_hidden_layers, encoder.model_type)
    return ModelConfig(transformer, encoder, KLEIN["vae"], is_distilled=not is_dev, taps=taps)


ARCHITECTURES = {  # of the published models
    "FLUX.2 [klein] 4B": _published(5, 20, 24, KLEIN["text_encoder"]),
    "FLUX.2 [klein] 9B": _published(
        8, 24, 32, replace(KLEIN["text_encoder"], hidden_size=4096, intermediate_size=12288)
    ),
    "FLUX.2 [dev]": _published(8, 48, 48, MISTRAL),
}
_MAX_COUNT = 1024


def infer_config(part: str, shape: Shape, like: Any = None) -> Any:
    """The config of a part with these shapes. Raises CheckpointError if a weight that is needed is not there."""
    config = _INFER[part](shape, like or KLEIN[part])
    if part == "text_encoder" and like and like.model_type == config.model_type:  # its unused layers may be absent
        return replace(config, num_hidden_layers=max(config.num_hidden_layers, like.num_hidden_layers))
    return config


def _transformer(shape: Shape, like: TransformerConfig) -> TransformerConfig:
    hidden = _axis(shape, "img_in.weight", 0)
    head = _axis(shape, "double_blocks.0.img.norm_q.weight", 0)
    axes = like.axes_dims_rope if head == like.attention_head_dim else (head // 4,) * 4
    return replace(
        like,
        in_channels=_axis(shape, "final_out.weight", 0),
        num_layers=_count(shape, "double_blocks.{}.img.norm_q.weight"),
        num_single_layers=_count(shape, "single_blocks.{}.norm_q.weight"),
        attention_head_dim=head,
        num_attention_heads=hidden // max(head, 1),
        joint_attention_dim=_axis(shape, "txt_in.weight", 1),
        mlp_ratio=_axis(shape, "double_blocks.0.img.mlp_in.weight", 0) / 2 / max(hidden, 1),
        axes_dims_rope=axes,
        timestep_guidance_channels=_axis(shape, "time_in.linear_1.weight", 1),
        guidance_embeds=shape("guidance_in.linear_1.weight") is not None,
    )


def _text_encoder(shape: Shape, like: TextEncoderConfig) -> TextEncoderConfig:
    kind = "mistral" if (norm := shape("layers.0.self_attn.q_norm.weight")) is None else "qwen3"
    if kind != like.model_type:
        like = MISTRAL if kind == "mistral" else KLEIN["text_encoder"]
        if norm is None and ("mistral", _axis(shape, "layers.0.self_attn.q_proj.weight", 1)) not in ENCODERS:
            raise CheckpointError(f"is {OTHER_LANGUAGE_MODEL}; {_WANTED}")
    head = max(like.head_dim if norm is None else _axis(shape, "layers.0.self_attn.q_norm.weight", 0), 1)
    return replace(
        like,
        vocab_size=_axis(shape, "embed_tokens.weight", 0),
        hidden_size=_axis(shape, "layers.0.input_layernorm.weight", 0),
        intermediate_size=_axis(shape, "layers.0.mlp.up_proj.weight", 0),
        num_hidden_layers=_count(shape, "layers.{}.input_layernorm.weight"),
        num_attention_heads=_axis(shape, "layers.0.self_attn.q_proj.weight", 0) // head,
        num_key_value_heads=_axis(shape, "layers.0.self_attn.k_proj.weight", 0) // head,
        head_dim=head,
    )


def _vae(shape: Shape, like: VAEConfig) -> VAEConfig:
    levels = _count(shape, "encoder.down.{}.resnets.0.norm1.weight")
    down = tuple(_axis(shape, f"encoder.down.{i}.resnets.0.conv1.weight", 0) for i in range(levels))
    up = tuple(_axis(shape, f"decoder.up.{i}.resnets.0.conv1.weight", 0) for i in reversed(range(levels)))
    return replace(
        like,
        block_out_channels=down,
        decoder_block_out_channels=None if up == down else up,
        layers_per_block=_count(shape, "encoder.down.0.resnets.{}.norm1.weight"),
        latent_channels=_axis(shape, "encoder.conv_out.weight", 0) // 2,
        in_channels=_axis(shape, "encoder.conv_in.weight", 3),
        out_channels=_axis(shape, "decoder.conv_out.weight", 0),
        use_quant_conv=shape("quant_conv.weight") is not None,
        use_post_quant_conv=shape("post_quant_conv.weight") is not None,
        mid_block_add_attention=shape("encoder.mid.attention.norm.weight") is not None,
    )


_INFER: dict[str, Callable[[Shape, Any], Any]] = {
    "transformer": _transformer,
    "text_encoder": _text_encoder,
    "vae": _vae,
}


def _axis(shape: Shape, name: str, axis: int) -> int:
    found = shape(name)
    if found is None:
        raise CheckpointError(f"{name} is missing: the file is incomplete, or not FLUX.2 [klein]")
    if axis >= len(found):
        raise CheckpointError(f"{name} has shape {found}; FLUX.2 [klein] has more axes there")
    return found[axis]


def _count(shape: Shape, pattern: str) -> int:
    return next((i for i in range(_MAX_COUNT) if shape(pattern.format(i)) is None), _MAX_COUNT)
