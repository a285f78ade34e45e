"""What is this model? A word, a folder (ours, diffusers', mflux's), a file, or a repository of the Hub.

Models are put together here too: of parts that state no common config, and of a base with parts in place of its own.
"""

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

from klein_mlx.config import (
    BASES,
    ONE_STEP,
    PARTS,
    TIME_SHIFTS,
    TRANSFORMER_FILE,
    VARIANTS,
    ModelConfig,
    default_taps,
    named_variant,
    refuse_address,
    resolve,
    settle_variant,
    suggestion,
)
from klein_mlx.errors import CheckpointError, RequestError, short
from klein_mlx.formats.diffusers import INDEX_FILE, SCHEDULER_FILE, STEMS, is_encoded, open_diffusers, read_time_shift
from klein_mlx.formats.gguf import pieces_of
from klein_mlx.formats.names import find_parts
from klein_mlx.formats.part import PartFile, open_part, open_tensors
from klein_mlx.paths import TINY_FOLDER, exists, own_model
from klein_mlx.weights.checkpoint import CONFIG_FILE, UNFINISHED, ReadRows, Source, open_checkpoint
from klein_mlx.weights.hub import (
    HUB_FILE,
    HUB_ID,
    NO_NETWORK,
    WEIGHTS,
    cache_folder,
    download,
    list_files,
    wanted,
    without_copies,
)
from klein_mlx.weights.quantize import Quantization
from klein_mlx.weights.safetensors import Weight, read_json, require_file

_RECORD = "mflux_model.json"
TOKENIZER_FILES = ("tokenizer/tokenizer.json", "tokenizer.json")

SMALL_DECODER = "black-forest-labs/FLUX.2-small-decoder"  # Apache-2.0: the full encoder, a decoder of fewer channels
_FULL_DECODER = "full_encoder_small_decoder.safetensors"  # of its files the one that is a whole VAE


def hub_part(value: str | Path) -> tuple[str, str | None] | None:
    """(Hub id, name of a file in it) if this names a part of a model on the Hub; None: it is a path.

    Raises CheckpointError for a web address.
    """
    text = str(value)
    if isinstance(value, Path) or exists(Path(os.path.expanduser(text))) or text.startswith((".", "/", "~")):
        return None
    refuse_address(text)
    found = HUB_FILE.fullmatch(resolve(text))
    if found is None or found[1].endswith(WEIGHTS) or (found[2] and not found[2].endswith(WEIGHTS)):
        return None  # a file or folder that is not there
    return found[1], found[2]


def choose_part(part: str, names: Sequence[str], hub_id: str, file: str | None = None) -> tuple[list[str], str]:
    """Of a repository's files: those that hold a part, and the file or folder ("" for the root) to open it from.

    file: its name, or its end, where the repository holds several. Raises CheckpointError, with names to choose from.
    """
    names = [name for name in names if not Path(name).name.startswith(".")]
    weights = [name for name in names if name.endswith(WEIGHTS)]
    shown = ", ".join(f"{hub_id}/{name}" for name in weights[:5]) + (" ..." if len(weights) > 5 else "")
    if file is not None:
        found = [name for name in names if name == file] or [name for name in weights if name.endswith(f"/{file}")]
        if len(found) != 1 or ".." in Path(file).parts:
            held = f"it holds {shown}" if weights else "it holds no weights"
            raise CheckpointError(f"{hub_id}: has {len(found) or 'no'} files {file[:200]!r}; {held}")
        return pieces_of(found[0]), found[0]
    for folder in (part, *sorted({name.partition("/")[0] for name in names if name.startswith(f"{part}-")})):
        inside = [name for name in names if re.fullmatch(rf"{re.escape(folder)}/[^/]*\.(safetensors|json)", name)]
        if any(name in weights for name in inside):
            return without_copies(inside), folder
    ours = [name for name in names if re.fullmatch(rf"{part}(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name)]
    if CONFIG_FILE in names and ours:
        return [CONFIG_FILE, "tokenizer.json", *ours], ""
    for stem in dict.fromkeys((STEMS[part], *STEMS.values())):
        root = [name for name in names if re.fullmatch(rf"{stem}[.-][^/]*(safetensors|\.json)", name)]
        if any(name in weights for name in root):
            return without_copies([*(["config.json"] if "config.json" in names else []), *root]), ""
    if part == "vae" and _FULL_DECODER in names:
        return [_FULL_DECODER], _FULL_DECODER
    if weights and set(weights) == set(pieces_of(weights[0])):
        return weights, weights[0]
    if not weights:
        raise CheckpointError(f"{hub_id}: holds no weights; give a repository, or a file of one, that is a {part}")
    raise CheckpointError(f"{hub_id}: holds {len(weights)} files of weights; name the {part} among them: {shown}")


def cached_part(part: str, hub_id: str, file: str | None = None, revision: str | None = None) -> Path | None:
    """A part from the local cache, if it is whole there; no network call is made."""
    try:
        folder = download(hub_id, revision=revision, local_files_only=True, patterns=["//"])  # whatever there is of it
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        path = folder / choose_part(part, names, hub_id, file)[1]
        open_tensors(path, part if path.is_dir() and (path / CONFIG_FILE).exists() else None)
    except CheckpointError:
        return None
    return path


def find_part(
    part: str,
    value: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The file or folder that a part's argument means; what is on the Hub is fetched, unless it is in the cache.

    value: a path, "tiny", a Hub id, a short name of one, or a Hub id with a file behind it (owner/name/file.gguf).
    Raises CheckpointError if the Hub has no such repository or file, or the part is not in it.
    """
    if str(value) == "tiny" and not exists(Path(value)):
        return TINY_FOLDER
    hub = hub_part(value)
    if hub is None:
        return Path(os.path.expanduser(value))
    if found := cached_part(part, *hub, revision):
        return found
    hub_id, file = hub
    if local_files_only:
        raise CheckpointError(f"{hub_id}: its {part} is not (fully) in {cache_folder()}, and {NO_NETWORK}")
    files, opened = choose_part(part, list_files(hub_id, revision=revision, token=token), hub_id, file)
    return download(hub_id, revision=revision, token=token, patterns=[escape(name) for name in files]) / opened


_CHOICES = "'tiny', a folder, a Hub id such as black-forest-labs/FLUX.2-klein-4B, or a short name such as 4b"


def open_model(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    parts: Mapping[str, str | Path | None] | None = None,
    variant: str | None = None,
) -> Source:
    """Open a model, reading its configs: no weight is read.

    model: "tiny" (the embedded checkpoint), a folder in our format, in diffusers' layout or saved by mflux, a file that
    holds all parts, a Hub id or a short name of one (klein_mlx.config), a file of a repository (owner/name/file).
    A Hub id is looked up in the local cache first, and fetched only if something is missing there.
    revision, token, local_files_only: for Hub ids, as in huggingface_hub.
    parts: "transformer", "text_encoder" or "vae" -> what takes the place of the model's own: see `find_part`.
    variant: which of the variants of these sizes it is, where the files do not tell, or tell it wrongly.
    Raises CheckpointError, in one line, for anything that is not a complete model.
    """
    for what, name in {
        "model": model,
        **{part: path for part, path in (parts or {}).items() if path is not None},
    }.items():
        if not isinstance(name, str | Path) or not str(name):  # an empty one would be the current folder
            raise CheckpointError(f"{what} is {short(name)}; it must name a model, a file or a folder")
    check_revision(model, revision)
    given = {
        part: find_part(part, path, token=token, local_files_only=local_files_only)
        for part, path in (parts or {}).items()
        if path is not None
    }
    if (hub := hub_part(model)) and hub[1]:  # a file of a repository
        model = find_part("model", model, revision=revision, token=token, local_files_only=local_files_only)
    if file := single_file(model):
        source: Source = _open_file(file, given, lambda: find_tokenizer(file, token, local_files_only))
    else:
        base = _open_base(model, revision, token, local_files_only, {part for part in PARTS if part not in given})
        source = mix(base, given)
    return with_variant(source, variant, record=True) if variant else source


def open_any(model: str | Path, **options: Any) -> Source | PartFile:
    """As `open_model`; a file or folder that holds one part is opened as that part, and no tokenizer is needed."""
    path = Path(os.path.expanduser(model))
    if (file := single_file(model)) and len(held_parts(file)) > 1:
        source = _open_file(file, {}, lambda: tokenizer_beside(file))
        return with_variant(source, variant) if (variant := options.get("variant")) else source
    if str(model) != "tiny" and exists(path) and (path.is_file() or _is_part(path)):
        return open_part(path)
    return open_model(model, **options)


def single_file(model: str | Path) -> Path | None:
    """The file that a model argument names: itself, or the only one of its folder if it holds more than one part."""
    path = Path(os.path.expanduser(model))
    if str(model) == "tiny" or not exists(path):
        return None
    if not path.is_dir():
        return path
    loose = [file for file in path.glob("*.safetensors") if not file.name.startswith("._")]
    return loose[0] if len(loose) == 1 and _is_part(path) and len(held_parts(loose[0])) > 1 else None


def held_parts(file: Path) -> list[str]:
    """The parts that a file holds, told from the names in its header."""
    return [found.part for found in find_parts(open_tensors(file).entries)]


def _open_file(path: Path, given: Mapping[str, str | Path], tokenizer: Callable[[], Path | None]) -> Source:
    """A model that is one file, and perhaps parts in place of its own. Raises CheckpointError for what it lacks."""
    held = held_parts(path)
    others = {part: Path(os.path.expanduser(other)) for part, other in given.items()}
    missing = [part for part in PARTS if part not in held and part not in others]
    options = ["--" + part.replace("_", "-") for part in PARTS]
    if missing and len(held) == 1:
        alone = options[PARTS.index(open_part(path).part)]  # or what it is instead
        raise CheckpointError(f"{path}: is a {alone[2:]} alone; give a whole model, and this file as {alone}")
    if not held:
        open_part(path)  # tells what it is
    if missing:
        lacking = " and ".join(options[PARTS.index(part)] for part in missing)
        raise CheckpointError(f"{path}: holds {' and '.join(held)}, and no {' and no '.join(missing)}; add {lacking}")
    return assemble(path, {part: path for part in held} | others, tokenizer(), format="single file")


TOKENIZER_REPOSITORY = "black-forest-labs/FLUX.2-klein-4B"  # Qwen3's, of all sizes; its license asks for nothing
TOKENIZERS = {  # by the text encoder's kind; dev's repository is gated
    "qwen3": ("Qwen3", TOKENIZER_REPOSITORY),
    "mistral": ("Mistral-Small", "black-forest-labs/FLUX.2-dev"),
}


def tokenizer_kind(file: Path) -> str:
    """Which of TOKENIZERS a model needs whose transformer, or all of it, is this file."""
    is_dev = any(re.search(r"guidance_in\.|guidance_embedder\.", name) for name in open_tensors(file).entries)
    return "mistral" if is_dev else "qwen3"


def tokenizer_beside(file: Path) -> Path | None:
    """The tokenizer of a model that is one file: beside it, or, from a repository that has it, in the local cache."""
    folders = [file.parent]
    with suppress(CheckpointError):
        repository = TOKENIZERS[tokenizer_kind(file)][1]
        folders.append(download(repository, local_files_only=True, patterns=TOKENIZER_FILES[:1]))
    return next((path for folder in folders for name in TOKENIZER_FILES if (path := folder / name).is_file()), None)


def find_tokenizer(file: Path, token: str | None = None, local_files_only: bool = False) -> Path:
    """As `tokenizer_beside`, fetched if need be. Raises CheckpointError if it cannot be had."""
    if found := tokenizer_beside(file):
        return found
    who, repository = TOKENIZERS[tokenizer_kind(file)]
    try:
        folder = download(repository, token=token, local_files_only=local_files_only, patterns=TOKENIZER_FILES[:1])
    except CheckpointError as error:
        raise CheckpointError(f"{file}: has no tokenizer; put {who}'s tokenizer.json beside it ({error})") from None
    return folder / TOKENIZER_FILES[0]


def _is_part(folder: Path) -> bool:
    whole = (CONFIG_FILE, INDEX_FILE, *PARTS)
    return any(folder.glob("*.safetensors")) and not any((folder / name).exists() for name in whole)


def _open_base(
    model: str | Path, revision: str | None, token: str | None, local_files_only: bool, needed: Collection[str]
) -> Source:
    if isinstance(model, str) and resolve(model) == "tiny":
        if not (TINY_FOLDER / CONFIG_FILE).exists():
            raise CheckpointError(f"{TINY_FOLDER}: the embedded checkpoint is not in this installation: reinstall it")
        return open_checkpoint(TINY_FOLDER)
    text, path = str(model), Path(os.path.expanduser(model))
    if text and exists(path):
        return _open_folder(path)
    if isinstance(model, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith("/"):
        raise CheckpointError(f"{path}: no such file or folder; use {_CHOICES}")
    if text.endswith((*WEIGHTS, ".png", ".jpg", ".jpeg", ".webp")):
        raise CheckpointError(f"{path}: no such file")
    text = resolve(text)
    if not HUB_ID.fullmatch(text):
        raise CheckpointError(f"unknown model {text[:200]!r}{suggestion(text)}; use {_CHOICES}")
    return _open_hub(text, revision, token, local_files_only, needed)


def _open_folder(path: Path, name: str | None = None) -> Source:
    """name: the Hub id whose snapshot this is, for the record."""
    if path.name.endswith(UNFINISHED):
        raise CheckpointError(f"{path}: is left over from an interrupted conversion; convert again")
    if (path / CONFIG_FILE).exists():
        return open_checkpoint(path)
    parts = part_folders(path)
    if (path / INDEX_FILE).exists() and (parts is None or all(parts[part].name == part for part in PARTS)):
        source = open_diffusers(path, name, revision=path.name if name else None)
        return mix(source, {part: path / part for part in PARTS if is_encoded(path, part)})
    if path.name in ("transformer", "text_encoder", "vae") and (path.parent / INDEX_FILE).exists():
        raise CheckpointError(f"{path}: is one part of a model; give {path.parent}")
    if parts:
        return open_mflux(path, parts, name, revision=path.name if name else None)
    if _is_part(path):
        part = open_part(path).part
        raise CheckpointError(
            f"{path}: is a {part} alone; give a whole model, and this folder as --{part.replace('_', '-')}"
        )
    if inner := sorted(
        p.name for p in path.glob("*") if any((p / name).exists() for name in (CONFIG_FILE, INDEX_FILE))
    ):
        raise CheckpointError(f"{path}: holds the models {', '.join(inner[:5])}; give one of these folders")
    raise CheckpointError(f"{path}: has neither {CONFIG_FILE} nor {INDEX_FILE}, so it is not a model; use {_CHOICES}")


def check_revision(model: str | Path, revision: str | None) -> None:
    """Raises CheckpointError for a revision of a model that has none, as it is on this disk."""
    if revision is not None and (resolve(str(model)) == "tiny" or exists(Path(os.path.expanduser(model)))):
        raise CheckpointError(f"revision is {revision!r:.60}; {model} is on this disk: only models on the Hub have one")


def on_disk(model: str, own: Mapping[str, str], revision: str | None = None) -> str | None:
    """What `open_model` takes for a model that lacks nothing on this disk: "tiny", a folder or one of the user's own
    models; None for what is on the Hub, or nowhere, and for a file, whose tokenizer may be. own: the user's names.

    Raises CheckpointError as `check_revision` does.
    """
    name = model
    if not os.path.lexists(model):
        name = resolve(model, own)
        name = str(own_model(name) or name)
    check_revision(name, revision)
    is_here = name == "tiny" or (os.path.isdir(name) and single_file(name) is None)
    return name if is_here else None


def hub_id_of(model: str) -> str | None:
    """The Hub id that `open_model` would take this for, or None: it is a folder, "tiny", or wrong."""
    if model == "tiny" or not model or exists(Path(os.path.expanduser(model))):
        return None
    name = resolve(model)
    return name if HUB_ID.fullmatch(name) and not model.startswith(("/", "~", ".")) else None


def open_cached(
    hub_id: str, revision: str | None = None, token: str | None = None, needed: Collection[str] = PARTS
) -> Source:
    """A repository from the local cache alone; CheckpointError if a file of a needed part is not there."""
    folder = download(hub_id, revision=revision, token=token, local_files_only=True, patterns=wanted(needed, hub_id))
    if hub_id in BASES:
        base = open_cached(BASES[hub_id], None, token, [part for part in needed if part != "transformer"])
        return _on_base(hub_id, base, folder) if "transformer" in needed else base
    source = _open_folder(folder, hub_id)
    source.files([part for part in PARTS if part in needed])
    return source


def _on_base(hub_id: str, base: Source, folder: Path) -> Source:
    """A repository that is a transformer alone, with the base's other parts."""
    mixed = with_variant(mix(base, {"transformer": folder / TRANSFORMER_FILE}), ONE_STEP.name)
    origin = {"name": hub_id, "format": "transformer", "revision": folder.name, "base": BASES[hub_id]}
    return replace(mixed, path=folder, info={**mixed.info, "source": origin})  # type: ignore[type-var]


def _open_hub(
    hub_id: str, revision: str | None, token: str | None, local_files_only: bool, needed: Collection[str]
) -> Source:
    """From the local cache if all that is needed is there, else over the network."""
    try:
        return open_cached(hub_id, revision, token, needed)
    except CheckpointError:
        if local_files_only:
            raise
    folder = download(hub_id, revision=revision, token=token, patterns=wanted(needed, hub_id))
    if hub_id in BASES:
        _open_hub(BASES[hub_id], None, token, local_files_only, [part for part in needed if part != "transformer"])
        return open_cached(hub_id, revision, token, needed)
    return _open_folder(folder, hub_id)


# ---- models put together ----


@dataclass(frozen=True)
class Assembly:
    """A Source whose parts are files or folders of their own: all three, as mflux saves them and a single file holds
    them, or those that take the place of a base's.

    path: what the user named. base: of the parts that are absent. tokenizer: None where there is none yet, as when a
    file is only described.
    """

    path: Path
    parts: Mapping[str, PartFile]
    config: ModelConfig
    quantization: Mapping[str, Quantization]
    info: Mapping[str, Any]
    tokenizer: Path | None = None
    base: Source | None = None

    @property
    def tokenizer_file(self) -> Path:
        if self.base is not None:
            return self.base.tokenizer_file
        if self.tokenizer is None:
            who, _ = TOKENIZERS[self.config.text_encoder.model_type]
            raise CheckpointError(f"{self.path}: has no tokenizer; put {who}'s tokenizer.json beside it")
        return self.tokenizer

    def weights(self, part: str) -> Mapping[str, Weight]:
        return self.parts[part].weights(self.config) if part in self.parts else self._base.weights(part)

    def rows(self, part: str, name: str) -> ReadRows | None:
        return self.parts[part].rows(self.config, name) if part in self.parts else self._base.rows(part, name)

    def files(self, parts: Sequence[str] = PARTS) -> list[Path]:
        own = [path for part in parts if part in self.parts for path in self.parts[part].tensors.files]
        if self.base is not None:
            return [*self.base.files([part for part in parts if part not in self.parts]), *own]
        return [self.tokenizer_file, *dict.fromkeys(own)]

    @property
    def _base(self) -> Source:
        assert self.base is not None
        return self.base


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
    encoder, distilled = configs["text_encoder"], not configs["transformer"].guidance_embeds
    taps = default_taps(encoder.num_hidden_layers, encoder.model_type)
    shift = read_time_shift(path / SCHEDULER_FILE) if path.is_dir() else TIME_SHIFTS[0]
    try:
        config = ModelConfig(**configs, is_distilled=distilled, taps=taps, time_shift=shift)
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
    info |= {"notes": notes} if notes else {}
    return Assembly(path, parts, config, _quantization(parts, config), info, tokenizer)


def _recorded(path: Path) -> str | None:
    """The variant that mflux (0.24 and newer) records beside what it saves: the key of the model it began with."""
    if not os.path.lexists(path):
        return None
    values = read_json(path)
    key = values.get("base_model") or values.get("model_name")
    names = {f"flux2-klein-{row.name}": row.name for row in VARIANTS}
    names |= {str(row.hub_id).lower(): row.name for row in VARIANTS}
    return names.get(str(key).lower())


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
    own = parts["text_encoder"].config.model_type if "text_encoder" in parts else base.config.text_encoder.model_type
    if own != base.config.text_encoder.model_type:  # so are the transformer, taps and the tokenizer
        raise CheckpointError(f"{chosen['text_encoder']}: is a {own}, the encoder of another model than {base.path}")
    try:
        config = replace(base.config, **{part: file.config for part, file in parts.items()})
    except CheckpointError as error:
        told = ", ".join(f"{file.path}{f' (of {file.fits})' * bool(file.variants)}" for file in parts.values())
        raise CheckpointError(f"{told}, in {base.path} ({base.config.variant.name}): {error}") from None
    if "transformer" in parts:
        if parts["transformer"].names_one_step:
            config = settle_variant(config, ONE_STEP.name)
        elif config.variant == ONE_STEP:  # the base's
            config = settle_variant(config, "4b")
    notes = _doubts(parts.get("transformer"), config)
    quantization = {part: q for part, q in base.quantization.items() if part not in parts}
    quantization |= _quantization(parts, config)
    told = {part: {"name": file.path.name, "format": file.format} for part, file in parts.items()}
    origin = {**base.info.get("source", {}), "parts": told}
    format = "mixed" if base.info.get("format") != "klein_mlx" else "klein_mlx"
    info = {**base.info, "format": format, "source": origin, **({"notes": notes} if notes else {})}
    if "transformer" in parts and config.variant.licence != base.config.variant.licence:
        info["licence"] = config.variant.licence
    return Assembly(base.path, parts, config, quantization, info, base=base)


def _quantization(parts: Mapping[str, PartFile], config: ModelConfig) -> dict[str, Quantization]:
    return {part: q for part, file in parts.items() if (q := file.quantization(config))}


def with_variant(source: Source, name: str, record: bool = False) -> Source:
    """The same model as a variant that its files do not tell. Raises CheckpointError if it has other sizes.

    record: whether the user's choice goes into recipes, as "opened_as": the files alone open as another variant.
    """
    config = settle_variant(source.config, name)
    info = {key: value for key, value in source.info.items() if key != "notes"}
    if config.variant.hub_id is not None:
        info["licence"] = config.variant.licence
    if record:
        info["opened_as"] = name
    return replace(source, config=config, info=info)  # type: ignore[type-var]


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
