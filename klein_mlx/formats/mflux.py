"""A folder that mflux saved: three parts without configs, in its own names, quantised or not; kept at its bits."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from klein_mlx.config import PARTS, VARIANTS, ModelConfig, default_taps, named_variant, settle_variant
from klein_mlx.errors import CheckpointError
from klein_mlx.formats.part import PartFile, open_part
from klein_mlx.weights.quantize import Quantization
from klein_mlx.weights.rows import ReadRows
from klein_mlx.weights.safetensors import Weight, read_json, require_file

_RECORD = "mflux_model.json"
_TOKENIZER_FILE = "tokenizer/tokenizer.json"


@dataclass(frozen=True)
class MfluxFolder:
    """What mflux-save writes, as a Source. Without its record, which names the model, it is taken to be distilled."""

    path: Path
    parts: Mapping[str, PartFile]
    config: ModelConfig
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def quantization(self) -> dict[str, Quantization]:
        stored = {part: file.quantization(self.config) for part, file in self.parts.items()}
        return {part: quantization for part, quantization in stored.items() if quantization}

    @property
    def tokenizer_file(self) -> Path:
        return self.path / _TOKENIZER_FILE

    def weights(self, part: str) -> dict[str, Weight]:
        return self.parts[part].weights(self.config)

    def rows(self, part: str, name: str) -> ReadRows | None:
        return self.parts[part].rows(self.config, name)

    def files(self, parts: Sequence[str] = PARTS) -> list[Path]:
        return [self.tokenizer_file, *(path for part in parts for path in self.parts[part].tensors.files)]


def open_mflux(folder: Path, name: str | None = None, revision: str | None = None) -> MfluxFolder:
    """Open a folder with transformer/, text_encoder/, vae/ and tokenizer/, and no configs.

    name, revision: where it comes from, for the record; the folder's own name by default.
    """
    parts = {part: open_part(folder / part, part) for part in PARTS}
    require_file(folder / _TOKENIZER_FILE)
    configs = {part: file.config for part, file in parts.items()}
    taps = default_taps(configs["text_encoder"].num_hidden_layers)
    notes: list[str] = []
    try:
        config = ModelConfig(**configs, is_distilled=True, taps=taps)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    if named := _recorded(folder / _RECORD):
        config = settle_variant(config, named)
    elif (said := named_variant(name or folder.resolve().name)) and said != config.variant.name:
        notes.append(f"{folder.name} speaks of {said}, and runs as {config.variant.name}; --variant {said} settles it")
    version = next(
        (f.tensors.metadata["mflux_version"] for f in parts.values() if "mflux_version" in f.tensors.metadata), None
    )
    made = {"made_by": f"mflux {version}"} if version else {}
    origin = {"name": name or folder.resolve().name, "format": "mflux", **({"revision": revision} if revision else {})}
    info = {"format": "mflux", "source": origin, "licence": config.variant.licence, **made}
    return MfluxFolder(folder, parts, config, {**info, **({"notes": notes} if notes else {})})


def _recorded(path: Path) -> str | None:
    """The variant that mflux (0.24 and newer) records beside what it saves: the key of the model it began with."""
    if not os.path.lexists(path):
        return None
    values = read_json(path)
    key = values.get("base_model") or values.get("model_name")
    names = {f"flux2-klein-{row.name}": row.name for row in VARIANTS}
    names |= {str(row.hub_id).lower(): row.name for row in VARIANTS}
    return names.get(str(key).lower())
