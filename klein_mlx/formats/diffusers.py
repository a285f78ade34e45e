"""A folder in diffusers' layout, read as a Source: mapped lazily, translated name by name, never executed.

Reads model_index.json, the parts' config.json, their safetensors and tokenizer/tokenizer.json. diffusers itself is
not needed.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from klein_mlx.config import MAX_SHIFT, PARTS, TIME_SHIFTS, ModelConfig, default_taps
from klein_mlx.errors import CheckpointError
from klein_mlx.formats.names import DIFFUSERS, SAME, Found, find_parts, their_name, their_shape, to_ours
from klein_mlx.formats.part import is_left_over
from klein_mlx.weights.checkpoint import CONFIG_CLASSES, ReadRows, expected, file_rows, model_config
from klein_mlx.weights.quantize import Quantization
from klein_mlx.weights.safetensors import WeightFiles, open_weights, read_json, require_file

INDEX_FILE = "model_index.json"
KV_PIPELINE = "Flux2KleinKVPipeline"  # 9b-kv's: nothing else in its files says that it keeps the references' keys
TOKENIZER_FILE = "tokenizer/tokenizer.json"

SCHEDULER_FILE = "scheduler/scheduler_config.json"
_TAPS = "text_encoder_out_layers"

STEMS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}
# The field of a part's config.json that says what it is, and klein's value.
_KINDS = {
    "transformer": ("_class_name", "Flux2Transformer2DModel"),
    "text_encoder": ("model_type", "qwen3"),
    "vae": ("_class_name", "AutoencoderKLFlux2"),
}
_MISTRAL = "mistral3"  # the same of dev: a language model with a vision tower beside it
# Settings that klein always has, and that are computed so whatever a file says: another value would be another model.
_FIXED: dict[str, dict[str, Any]] = {
    "transformer": {"patch_size": 1},
    "text_encoder": {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "rope_scaling": None},
    _MISTRAL: {"model_type": "mistral", "hidden_act": "silu", "sliding_window": None},
    "vae": {"act_fn": "silu", "patch_size": [2, 2]},
}
# Of the scheduler: what is followed, with diffusers' defaults, and what every schedule of klein's has.
_SHIFTS = {"use_dynamic_shifting": False, "shift": 1.0, "time_shift_type": "exponential"}
_SCHEDULE: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift_terminal": None,
    "invert_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,  # the pipeline's own: it drops its levels for the scheduler's
    "stochastic_sampling": False,
}


@dataclass(frozen=True)
class DiffusersFolder:
    """What `Flux2KleinPipeline.save_pretrained` writes."""

    path: Path
    config: ModelConfig
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def quantization(self) -> Mapping[str, Quantization]:
        return {}

    @property
    def tokenizer_file(self) -> Path:
        return self.path / TOKENIZER_FILE

    def weights(self, part: str) -> dict[str, mx.array]:
        files, renames = self._open(part), self._renames(part)
        arrays = files.arrays()
        return {ours: to_ours(layout, arrays[theirs]) for ours, (theirs, layout, _) in renames.items()}

    def rows(self, part: str, name: str) -> ReadRows | None:
        theirs, layout, _ = self._renames(part)[name]
        return file_rows(self._open(part), theirs) if layout == SAME else None

    def files(self, parts: Sequence[str] = PARTS) -> list[Path]:
        configs = [self.path / part / "config.json" for part in PARTS]
        weights = [path for part in parts for path in self._open(part).shards]
        schedule = [path for path in (self.path / SCHEDULER_FILE,) if path.exists()]
        return [self.path / INDEX_FILE, *configs, *schedule, self.tokenizer_file, *weights]

    def _renames(self, part: str) -> dict[str, tuple[str, str, tuple[int, ...]]]:
        """Our name -> diffusers' name, its layout there, and its shape here."""
        found, shapes = self._found(part), expected(part, self.config)
        places = {ours: their_name(part, found.dialect, ours) for ours in shapes}
        return {ours: (found.prefix + theirs, layout, shapes[ours]) for ours, (theirs, layout) in places.items()}

    def _found(self, part: str) -> Found:
        """In whose names a part is. Mistral's language model is behind another prefix by transformers' age."""
        usual = Found(part, DIFFUSERS, "")
        if part != "text_encoder" or self.config.text_encoder.model_type != "mistral":
            return usual
        shards = open_weights(self.path / part, STEMS[part]).shards.values()
        found = find_parts({name for entries in shards for name in entries})
        return next((one for one in found if one.part == part), usual)

    def _open(self, part: str) -> WeightFiles:
        """The part's files, checked: what must be in them is, as it must be, and nothing else is."""
        files, found = open_weights(self.path / part, STEMS[part]), self._found(part)
        shapes = {theirs: their_shape(layout, shape) for theirs, layout, shape in self._renames(part).values()}
        files.check(shapes, left_out=lambda name: is_left_over(found, name.removeprefix(found.prefix), self.config))
        return files


def open_diffusers(folder: Path, name: str | None = None, revision: str | None = None) -> DiffusersFolder:
    """Open a folder that has a model_index.json.

    name, revision: where it comes from, for the record (a Hub id, a commit); the folder's own name by default.
    model_index.json may also state `text_encoder_out_layers`, `max_sequence_length` and `default_size`, which
    diffusers keeps as default arguments.
    """
    index = folder / INDEX_FILE
    values = read_json(index)
    parts = {part: _read_config(folder / part / "config.json", part) for part in PARTS}
    taps = stated_taps(index, folder / "text_encoder" / "config.json")
    depth = parts["text_encoder"].num_hidden_layers
    cached = values.get("_class_name") == KV_PIPELINE  # whose own default is a distilled model
    defaults = {
        "caches_references": cached,
        "taps": default_taps(depth, parts["text_encoder"].model_type),
        "max_sequence_length": 512,
        "default_size": 1024,
        "is_distilled": cached,
    }
    stated = {
        **values,
        **({} if taps is None else {"taps": taps}),
        "time_shift": read_time_shift(folder / SCHEDULER_FILE),
    }
    config = model_config(parts, stated, where=index, defaults=defaults)
    if config.taps[-1] == depth:
        raise CheckpointError(
            f"{folder}: layer {depth} is tapped, and the text encoder has {depth}: in this layout the last layer's "
            "output is normalized; it needs one layer more"
        )
    require_file(folder / TOKENIZER_FILE)
    origin = {
        "name": name or os.path.basename(os.path.realpath(folder)),
        "format": "diffusers",
        **({"revision": revision} if revision else {}),
    }
    info = {"format": "diffusers", "source": origin, "licence": config.variant.licence}
    return DiffusersFolder(folder, config, info)


def stated_taps(*configs: Path) -> Any:
    """The `text_encoder_out_layers` of whichever of these JSON files states them, None where none does."""
    stated = {path: values[_TAPS] for path in configs if path.exists() and _TAPS in (values := read_json(path))}
    (first, taps), *others = stated.items() if stated else [(None, None)]
    for path, other in others:
        if other != taps:
            raise CheckpointError(f"{path}: {_TAPS} is {other!r:.60}, and {taps!r:.60} in {first}; make them agree")
    return taps


def read_time_shift(path: Path) -> str | float:
    """`ModelConfig.time_shift` as scheduler_config.json states it; klein's where there is no such file.

    Keys that are absent have diffusers' defaults. Raises CheckpointError for a schedule that klein_mlx does not follow.
    Source: diffusers, FlowMatchEulerDiscreteScheduler.
    """
    if not os.path.lexists(path):
        return TIME_SHIFTS[0]
    values = read_json(path)
    for key, right in _SCHEDULE.items():
        value = values.get(key, right)
        if value != right and (value or right):  # None, false and 0 all mean none
            raise CheckpointError(f"{path}: {key} is {value!r:.60}; FLUX.2 [klein] has {right!r}")
    dynamic, shift, kind = (values.get(key, value) for key, value in _SHIFTS.items())
    if kind not in TIME_SHIFTS:
        raise CheckpointError(f"{path}: time_shift_type is {kind!r:.60}; it must be {' or '.join(TIME_SHIFTS)}")
    if not isinstance(dynamic, bool):
        raise CheckpointError(f"{path}: use_dynamic_shifting is {dynamic!r:.60}; it must be true or false")
    if type(shift) not in (int, float) or not 0 < shift < MAX_SHIFT:
        raise CheckpointError(f"{path}: shift is {shift!r:.60}; it must be a number over 0")
    return kind if dynamic else shift


def is_encoded(folder: Path, part: str) -> bool:
    """Whether a part is quantized: by MLX, with its own names beside each weight, or as floats of few bits with scales.
    What cannot be opened is not: it is told when it is needed.
    """
    try:
        shards = open_weights(folder / part, STEMS[part]).shards.values()
    except CheckpointError:
        return False
    stored = [(name, entry.dtype) for entries in shards for name, entry in entries.items()]
    return any(name.endswith((".scales", ".weight_scale")) or dtype.startswith("F8") for name, dtype in stored)


def _read_config(path: Path, part: str) -> Any:
    """A part's config.json as a dataclass, once it has said that it is klein's kind of part."""
    values = read_json(path)
    name, right = _KINDS[part]
    if part == "transformer":
        values = {"guidance_embeds": True, **values}  # as diffusers: the first releases, dev's, had no choice
    fixed, inner, family = _FIXED[part], values.get("text_config"), "FLUX.2 [klein]"
    if part == "text_encoder" and values.get(name) == _MISTRAL and isinstance(inner, Mapping):
        fixed, values, family = _FIXED[_MISTRAL], {"model_type": "mistral", **inner}, "FLUX.2 [dev]"
    elif values.get(name) != right:
        raise CheckpointError(f"{path}: {name} is {values.get(name)!r}; FLUX.2 [klein] has {right!r}")
    for name, right in fixed.items():
        if values.get(name, right) != right:
            raise CheckpointError(f"{path}: {name} is {values[name]!r}; {family} has {right!r}")
    rope = values.get("rope_parameters")
    if isinstance(rope, Mapping) and rope.get("rope_type", "default") != "default":
        raise CheckpointError(f"{path}: rope_type is {rope['rope_type']!r}; {family} has 'default'")
    return CONFIG_CLASSES[part].from_dict(values, str(path))
