"""Any Source -> a folder in diffusers' layout, unquantized; and a Source with LoRAs merged into its weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from klein_convert.destination import checked_destination, publish, require_space, workspace, write_failure
from klein_convert.writer import Counter, write_bytes, write_json, write_weights
from klein_mlx.config import KLEIN_TAPS, PARTS, ModelConfig
from klein_mlx.errors import CheckpointError
from klein_mlx.formats.diffusers import INDEX_FILE, KV_PIPELINE, STEMS, TOKENIZER_FILE, open_diffusers
from klein_mlx.formats.lora import read_lora
from klein_mlx.formats.lora_metadata import find_lora
from klein_mlx.formats.names import diffusers_name, to_theirs
from klein_mlx.runtime.parts import LoraStack
from klein_mlx.weights.checkpoint import Derived, ReadRows, Source
from klein_mlx.weights.lora import merge
from klein_mlx.weights.quantize import Quantization
from klein_mlx.weights.safetensors import Deferred, Weight, load_now, read_json

_MARGIN = 16 << 20
_VERSION = "0.42.0"  # of diffusers, whose layout this is
_CLASSES = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "Qwen3ForCausalLM"),
    "tokenizer": ("transformers", "Qwen2Tokenizer"),
    "transformer": ("diffusers", "Flux2Transformer2DModel"),
    "vae": ("diffusers", "AutoencoderKLFlux2"),
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)


def export_diffusers(
    source: Source,
    destination: str | Path,
    *,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a folder that diffusers loads; quantized weights are dequantized, to the dtype of their scales.

    The encoder ends one layer behind the last tap, and that layer adds nothing: transformers normalizes the output of
    an encoder's last layer, and the tapped one must stay as it is. Returns the destination.
    Raises CheckpointError, and leaves nothing behind, if anything is wrong.
    """
    if source.config.transformer.guidance_embeds:  # transformers' class of its encoder has a vision tower, never read
        raise CheckpointError(f"{source.path}: FLUX.2 [dev] is written in klein_mlx's own format only")
    target = checked_destination(Path(destination), source.path, force, INDEX_FILE)
    parts = {part: _their_weights(source, part) for part in PARTS}
    total = sum(array.nbytes for weights in parts.values() for array in weights.values())
    require_space(target.parent, total + _MARGIN)
    counter = Counter(total, progress)
    try:
        with workspace(target) as folder:
            for part in PARTS:
                (folder / part).mkdir()
                write_weights(folder / part, STEMS[part], parts.pop(part), counter)
                write_json(folder / part / "config.json", _config(source.config, part))
            _write_rest(folder, source)
            finished = open_diffusers(folder)
            for part in PARTS:
                finished.weights(part)
            publish(folder, target, force)
    except OSError as error:
        raise CheckpointError(write_failure(target, total, error)) from error
    return Path(destination)


def _their_weights(source: Source, part: str) -> dict[str, Weight]:
    ours = _dequantized(dict(source.weights(part)), part, source.quantization.get(part))
    weights: dict[str, Weight] = {}
    for name, weight in ours.items():
        theirs, layout = diffusers_name(part, name)
        if isinstance(weight, Deferred):  # those are matrices and vectors, which no layout reshapes
            weights[theirs] = replace(weight, load=lambda layout=layout, own=weight: to_theirs(layout, own.load()))
        else:
            weights[theirs] = to_theirs(layout, weight)
    if part == "text_encoder":
        weights |= _silent_layer(source.config, weights)
    elif part == "vae":
        weights["bn.num_batches_tracked"] = mx.zeros((), mx.int64)
    return weights


def _dequantized(weights: dict[str, Weight], part: str, stored: Quantization | None) -> dict[str, Weight]:
    if stored is None:
        return weights
    whole: dict[str, Weight] = {}
    for name, weight in weights.items():
        path, _, kind = name.rpartition(".")
        own = stored.of(part, path)
        if own is None or kind == "bias":
            whole[name] = weight
        elif kind == "weight":
            scales, biases = (weights.get(f"{path}.{k}") for k in ("scales", "biases"))
            arrays = [load_now(a) if a is not None else None for a in (weight, scales, biases)]
            dtype = mx.bfloat16 if own.mode != "affine" else arrays[1].dtype  # type: ignore[union-attr]
            if own.mode == "affine":  # expanded in float32 and rounded once
                arrays[1:] = [a.astype(mx.float32) for a in arrays[1:]]  # type: ignore[union-attr]
            settings = {"group_size": own.group_size, "bits": own.bits, "mode": own.mode}
            whole[name] = mx.dequantize(*arrays, **settings).astype(dtype)  # type: ignore[arg-type]
    return whole


def _silent_layer(config: ModelConfig, weights: dict[str, Weight]) -> dict[str, Weight]:
    """A last layer whose projections are zero, and the final norm."""
    last = config.taps[-1]
    layer: dict[str, Weight] = {}
    for name, weight in weights.items():
        if name.startswith("model.layers.0."):
            fill = mx.ones if len(weight.shape) == 1 else mx.zeros
            layer[name.replace(".0.", f".{last}.", 1)] = fill(weight.shape, weight.dtype)
    norm = weights["model.layers.0.input_layernorm.weight"]
    return {**layer, "model.norm.weight": mx.ones(norm.shape, norm.dtype)}


def _config(config: ModelConfig, part: str) -> dict[str, Any]:
    values = getattr(config, part).to_dict()
    kind = _CLASSES[part][1]
    if part == "text_encoder":
        rope = {"rope_theta": values["rope_theta"], "rope_type": "default"}
        values |= {"num_hidden_layers": config.taps[-1] + 1, "tie_word_embeddings": True, "attention_bias": False}
        return {"architectures": [kind], "model_type": "qwen3", "hidden_act": "silu", "rope_parameters": rope, **values}
    if part == "vae":
        levels = len(values["block_out_channels"])
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
        values |= {**blocks, "act_fn": "silu", "patch_size": [2, 2]}
    else:
        values |= {"patch_size": 1, "out_channels": None}
    return {"_class_name": kind, "_diffusers_version": _VERSION, **values}


def _write_rest(folder: Path, source: Source) -> None:
    """The tokenizer, the scheduler, and the index that names them all."""
    config = source.config
    for name in ("scheduler", "tokenizer"):
        (folder / name).mkdir()
    read_json(source.tokenizer_file)
    write_bytes(folder / TOKENIZER_FILE, source.tokenizer_file.read_bytes())
    tokenizer = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "extra_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "chat_template": _CHAT_TEMPLATE,
        "model_max_length": 131072,
    }
    write_json(folder / "tokenizer" / "tokenizer_config.json", tokenizer)
    scheduler: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True}
    if isinstance(config.time_shift, str):
        scheduler["time_shift_type"] = config.time_shift
    else:
        scheduler |= {"shift": config.time_shift, "use_dynamic_shifting": False}
    head = {"_class_name": _CLASSES["scheduler"][1], "_diffusers_version": _VERSION}
    write_json(folder / "scheduler" / "scheduler_config.json", {**head, **scheduler})
    kind = KV_PIPELINE if config.caches_references else "Flux2KleinPipeline"
    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": _VERSION}
    index |= {"is_distilled": config.is_distilled, **{name: list(kind) for name, kind in _CLASSES.items()}}
    if config.taps != KLEIN_TAPS:
        index["text_encoder_out_layers"] = list(config.taps)
    if config.max_sequence_length != 512:
        index["max_sequence_length"] = config.max_sequence_length
    if config.default_size != 1024:
        index["default_size"] = config.default_size
    write_json(folder / INDEX_FILE, index)


@dataclass(frozen=True)
class WithLoras(Derived):
    """The base's weights with all LoRAs in them: summed in float32, rounded once to each weight's dtype."""

    loras: LoraStack
    paths: tuple[Path, ...]

    def weights(self, part: str) -> Mapping[str, Weight]:
        weights = dict(self.base.weights(part))
        for path in self.loras.changes(part):
            name = f"{path}.weight"
            weight = weights[name]
            # Made anew whenever it is loaded: at most one weight with its float32 copies is in memory.
            weights[name] = Deferred(tuple(weight.shape), weight.dtype, partial(self._merged, part, path))
        return weights

    def files(self, parts: Sequence[str] = PARTS) -> list[Path]:
        return [*super().files(parts), *self.paths]

    def rows(self, part: str, name: str) -> ReadRows | None:
        """The base's, of what no LoRA changes; None: the whole table of an embedding has to be made."""
        changed = name.removesuffix(".weight") in self.loras.changes(part)
        return None if changed else self.base.rows(part, name)

    def _merged(self, part: str, path: str) -> mx.array:
        weights = self.base.weights(part)

        def weigh(other: str) -> mx.array:
            return load_now(weights[f"{other}.weight"])

        merged = merge(weigh(path), self.loras.changes(part)[path], weigh)
        mx.eval(merged)
        return merged


def merge_loras(base: Source, loras: Sequence[tuple[str | Path, float]], partial: bool = False, **where: Any) -> Source:
    """The base with LoRAs in its weights. loras: what `find_lora` takes (`where` is handed to it), and a scale.

    Raises CheckpointError for a LoRA that cannot be applied in full, and for weights that are quantized already: they
    would lose most of it.
    """
    stack, paths = LoraStack(), []
    for number, (name, scale) in enumerate(loras):
        path = find_lora(name, **where)
        lora = read_lora(path, base.config, partial)
        for part, changes in lora.changes.items():
            stored = base.quantization.get(part)
            packed = next((one for one in changes if stored and stored.of(part, one)), None)
            if packed:
                raise CheckpointError(
                    f"{base.path}: the {part} is quantized, and merging {path.name} into it would lose what it adds: "
                    "start from the original, or use the LoRA beside it (generate --lora)"
                )
            if any(change.bias is not None for own in changes.values() for change in own):
                raise CheckpointError(f"{path}: adds biases, which no checkpoint of klein's has; use generate --lora")
        stack.add(lora, scale, f"{number}")
        paths.append(path)
    if not paths:
        return base
    told = [{"name": one.file, "sha256": one.sha256, "scale": one.scale} for one in stack.loaded]
    source = base.info.get("source", {})
    info = {**base.info, "source": {**source, "loras": [*source.get("loras", ()), *told]}}
    return WithLoras(base, base.config, base.quantization, info, stack, tuple(paths))
