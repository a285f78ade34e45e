"""Models put together: of three parts that state no common config, as mflux saves them, kept at their bits; and of a
base, with parts from files of their own in place of the base's.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from klein_mlx.config import (
    ONE_STEP,
    PARTS,
    TIME_SHIFTS,
    VARIANTS,
    ModelConfig,
    default_taps,
    named_variant,
    settle_variant,
)
from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.formats.diffusers import SCHEDULER_FILE, read_time_shift
from klein_mlx.formats.part import PartFile, open_part
from klein_mlx.weights.checkpoint import ReadRows, Source
from klein_mlx.weights.quantize import Quantization
from klein_mlx.weights.safetensors import Weight, read_json, require_file

_RECORD = "mflux_model.json"
TOKENIZER_FILES = ("tokenizer/tokenizer.json", "tokenizer.json")


@dataclass(frozen=True)
class Assembly:
    """Three parts that are files or folders of their own and state no common config, as one Source: what mflux saves,
    PrismML's folders, a single file that holds all three. Taken to be distilled unless something says otherwise.

    tokenizer: None where there is none yet, as when a file is only described.
    """

    path: Path
    parts: Mapping[str, PartFile]
    config: ModelConfig
    tokenizer: Path | None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def quantization(self) -> dict[str, Quantization]:
        stored = {part: file.quantization(self.config) for part, file in self.parts.items()}
        return {part: quantization for part, quantization in stored.items() if quantization}

    @property
    def tokenizer_file(self) -> Path:
        if self.tokenizer is None:
            raise CheckpointError(f"{self.path}: has no tokenizer; put Qwen3's tokenizer.json beside it")
        return self.tokenizer

    def weights(self, part: str) -> dict[str, Weight]:
        return self.parts[part].weights(self.config)

    def rows(self, part: str, name: str) -> ReadRows | None:
        return self.parts[part].rows(self.config, name)

    def files(self, parts: Sequence[str] = PARTS) -> list[Path]:
        weights = dict.fromkeys(path for part in parts for path in self.parts[part].tensors.files)
        return [self.tokenizer_file, *weights]


def part_folders(folder: Path) -> dict[str, Path] | None:
    """The folders of a model's three parts, if it has them: `transformer`, or the only `transformer-...`."""
    found = {}
    for part in PARTS:
        named = [folder / part] if (folder / part).is_dir() else sorted(folder.glob(f"{part}-*/"))
        if len(named) != 1:
            return None
        found[part] = named[0]
    return found


def open_mflux(folder: Path, parts: Mapping[str, Path], name: str | None, revision: str | None) -> Assembly:
    """Open a folder of parts without a model_index.json. name, revision: as in `assemble`."""
    places = [*(folder / file for file in TOKENIZER_FILES), parts["text_encoder"] / TOKENIZER_FILES[1]]
    tokenizer = next((file for file in places if os.path.lexists(file)), places[0])
    require_file(tokenizer)
    return assemble(folder, parts, tokenizer, format="mflux", name=name, revision=revision)


def assemble(
    path: Path,
    paths: Mapping[str, Path],
    tokenizer: Path | None,
    *,
    format: str,
    name: str | None = None,
    revision: str | None = None,
) -> Assembly:
    """A model of parts: part -> the file or folder that holds it.

    path: what the user named. name, revision: where it comes from, for the record; the path's own name by default.
    Raises CheckpointError if a part is not there, or the parts do not fit together.
    """
    parts = {part: open_part(paths[part], part) for part in PARTS}
    configs = {part: file.config for part, file in parts.items()}
    taps = default_taps(configs["text_encoder"].num_hidden_layers)
    shift = read_time_shift(path / SCHEDULER_FILE) if path.is_dir() else TIME_SHIFTS[0]
    try:
        config = ModelConfig(**configs, is_distilled=True, taps=taps, time_shift=shift)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    notes: list[str] = []
    if path.is_dir() and (named := _recorded(path / _RECORD)):
        config = settle_variant(config, named)
    elif parts["transformer"].names_one_step:
        config = settle_variant(config, ONE_STEP.name)
    elif path.is_file():
        notes = _doubts(parts["transformer"], config)
    elif (said := named_variant(name or os.path.basename(os.path.realpath(path)))) and said != config.variant.name:
        notes = [f"{path.name} speaks of {said}, and runs as {config.variant.name}; --variant {said} settles it"]
    version = next(
        (f.tensors.metadata["mflux_version"] for f in parts.values() if "mflux_version" in f.tensors.metadata), None
    )
    made = {"made_by": f"mflux {version}"} if version else {}
    others = {part: file for part, file in parts.items() if path.is_file() and file.path != path}
    told = {"parts": {part: {"name": file.path.name, "format": file.format} for part, file in others.items()}}
    commit = {"revision": revision} if revision else {}
    name = name or (path.name if path.is_file() else os.path.basename(os.path.realpath(path)))
    origin = {"name": name, "format": format, **commit, **(told if others else {})}
    info = {"format": format, "source": origin, "licence": config.variant.licence, **made}
    return Assembly(path, parts, config, tokenizer, {**info, **({"notes": notes} if notes else {})})


def _recorded(path: Path) -> str | None:
    """The variant that mflux (0.24 and newer) records beside what it saves: the key of the model it began with."""
    if not os.path.lexists(path):
        return None
    values = read_json(path)
    key = values.get("base_model") or values.get("model_name")
    names = {f"flux2-klein-{row.name}": row.name for row in VARIANTS}
    names |= {str(row.hub_id).lower(): row.name for row in VARIANTS}
    return names.get(str(key).lower())


@dataclass(frozen=True)
class Mixed:
    """A Source whose parts come from several. The tokenizer and what no part states are the base's.

    folder: the model's, where that is not the base's.
    """

    base: Source
    parts: Mapping[str, PartFile]
    config: ModelConfig
    quantization: Mapping[str, Quantization]
    info: Mapping[str, Any]
    folder: Path | None = None

    @property
    def path(self) -> Path:
        return self.folder or self.base.path

    @property
    def tokenizer_file(self) -> Path:
        return self.base.tokenizer_file

    def weights(self, part: str) -> Mapping[str, Weight]:
        return self.parts[part].weights(self.config) if part in self.parts else self.base.weights(part)

    def rows(self, part: str, name: str) -> ReadRows | None:
        return self.parts[part].rows(self.config, name) if part in self.parts else self.base.rows(part, name)

    def files(self, parts: Sequence[str] = PARTS) -> list[Path]:
        own = [path for part in parts if part in self.parts for path in self.parts[part].tensors.files]
        return [*self.base.files([part for part in parts if part not in self.parts]), *own]


def mix(base: Source, paths: Mapping[str, str | Path | None]) -> Source:
    """Put parts in place of the base's.

    paths: part -> a file, or a folder of such files. A part that is None or absent stays the base's.
    Raises CheckpointError if a file is not that part of a FLUX.2 [klein], or if the parts do not fit together.
    """
    unknown = sorted(set(paths) - set(PARTS))
    if unknown:
        raise RequestError(f"part is {unknown[0]!r}; it must be one of {', '.join(PARTS)}")
    chosen = {part: Path(os.path.expanduser(path)) for part, path in paths.items() if path is not None}
    if not chosen:
        return base
    for part, path in chosen.items():
        if not os.path.lexists(path):
            raise CheckpointError(f"no file or folder {str(path)!r} to take the {part} from; name one that is there")
    parts = {part: open_part(path, part, getattr(base.config, part)) for part, path in chosen.items()}
    try:
        config = replace(base.config, **{part: file.config for part, file in parts.items()})
    except CheckpointError as error:
        told = ", ".join(f"{file.path}{_known(file)}" for file in parts.values())
        raise CheckpointError(f"{told}, in {base.path} ({base.config.variant.name}): {error}") from None
    if "transformer" in parts:
        if parts["transformer"].names_one_step:
            config = settle_variant(config, ONE_STEP.name)
        elif config.variant == ONE_STEP:  # the base's
            config = settle_variant(config, "4b")
    notes = _doubts(parts.get("transformer"), config)
    own = {part: file.quantization(config) for part, file in parts.items()}
    quantization = {part: q for part, q in base.quantization.items() if part not in parts}
    quantization |= {part: q for part, q in own.items() if q}
    told = {part: {"name": file.path.name, "format": file.format} for part, file in parts.items()}
    origin = {**base.info.get("source", {}), "parts": told}
    format = "mixed" if base.info.get("format") != "klein_mlx" else "klein_mlx"
    info = {**base.info, "format": format, "source": origin, **({"notes": notes} if notes else {})}
    if "transformer" in parts and config.variant.licence != base.config.variant.licence:
        info["licence"] = config.variant.licence
    return Mixed(base, parts, config, quantization, info)


def with_variant(source: Source, name: str) -> Source:
    """The same model as a variant that its files do not tell. Raises CheckpointError if it has other sizes."""
    config = settle_variant(source.config, name)
    info = {key: value for key, value in source.info.items() if key != "notes"}
    return replace(source, config=config, info={**info, "licence": config.variant.licence})  # type: ignore[type-var]


def _doubts(transformer: PartFile | None, config: ModelConfig) -> list[str]:
    """A note where a transformer's name says that it is another variant than it is taken for."""
    said = transformer.said_variant if transformer else None
    taken = config.variant
    if (
        transformer is None
        or said is None
        or said == taken.name
        or said.removesuffix("-1step") not in transformer.variants
    ):
        return []
    return [
        f"{transformer.path.name} speaks of {said}, and runs as {taken.name} ({taken.steps} steps, guidance "
        f"{taken.guidance:g}); --variant {said} or --variant {taken.name} settles it"
    ]


def _known(file: PartFile) -> str:
    return f" (of FLUX.2 [klein] {' or '.join(file.variants)})" if file.variants else ""
