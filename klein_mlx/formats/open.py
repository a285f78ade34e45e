"""What is this model? A word, a folder in our format or in diffusers' layout, or a repository of the Hub."""

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

from klein_mlx.config import ONE_STEP, PARTS
from klein_mlx.errors import CheckpointError, short
from klein_mlx.formats.diffusers import INDEX_FILE, STEMS, is_encoded, open_diffusers
from klein_mlx.formats.gguf import pieces_of
from klein_mlx.formats.mflux import TOKENIZER_FILES, assemble, mix, open_mflux, part_folders, with_variant
from klein_mlx.formats.names import find_parts
from klein_mlx.formats.part import PartFile, open_part, open_tensors
from klein_mlx.paths import TINY_FOLDER
from klein_mlx.weights.checkpoint import CONFIG_FILE, UNFINISHED, Source, open_checkpoint
from klein_mlx.weights.hub import (
    BASES,
    NO_NETWORK,
    TRANSFORMER_FILE,
    WEIGHTS,
    cache_folder,
    download,
    list_files,
    resolve,
    suggestion,
    wanted,
    without_copies,
)

SMALL_DECODER = "black-forest-labs/FLUX.2-small-decoder"  # Apache-2.0: the full encoder, a decoder of fewer channels
_FULL_DECODER = "full_encoder_small_decoder.safetensors"  # of its files the one that is a whole VAE
_HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(.+))?", re.ASCII)


def hub_part(value: str | Path) -> tuple[str, str | None] | None:
    """(Hub id, name of a file in it) if this names a part of a model on the Hub; None: it is a path."""
    text = str(value)
    if isinstance(value, Path) or _exists(Path(os.path.expanduser(text))) or text.startswith((".", "/", "~")):
        return None
    found = _HUB_FILE.fullmatch(resolve(text))
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
    if str(value) == "tiny" and not _exists(Path(value)):
        return TINY_FOLDER
    hub = hub_part(value)
    if hub is None:
        return Path(os.path.expanduser(value))
    if found := cached_part(part, *hub, revision):
        return found
    hub_id, file = hub
    if local_files_only:
        raise CheckpointError(f"{hub_id}: its {part} is incomplete in {cache_folder()}, and {NO_NETWORK}")
    files, opened = choose_part(part, list_files(hub_id, revision=revision, token=token), hub_id, file)
    return download(hub_id, revision=revision, token=token, patterns=[escape(name) for name in files]) / opened


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


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
    holds all parts, a Hub id or a short name of one (klein_mlx.weights.hub), a file of a repository (owner/name/file).
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
    return with_variant(source, variant) if variant else source


def open_any(model: str | Path, **options: Any) -> Source | PartFile:
    """As `open_model`; a file or folder that holds one part is opened as that part, and no tokenizer is needed."""
    path = Path(os.path.expanduser(model))
    if (file := single_file(model)) and len(held_parts(file)) > 1:
        source = _open_file(file, {}, lambda: tokenizer_beside(file))
        return with_variant(source, variant) if (variant := options.get("variant")) else source
    if str(model) != "tiny" and _exists(path) and (path.is_file() or _is_part(path)):
        return open_part(path)
    return open_model(model, **options)


def single_file(model: str | Path) -> Path | None:
    """The file that a model argument names: itself, or the only one of its folder if it holds more than one part."""
    path = Path(os.path.expanduser(model))
    if str(model) == "tiny" or not _exists(path):
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


def tokenizer_beside(file: Path) -> Path | None:
    """The tokenizer of a model that is one file: beside it, or, from a repository that has it, in the local cache."""
    folders = [file.parent]
    with suppress(CheckpointError):
        folders.append(download(TOKENIZER_REPOSITORY, local_files_only=True, patterns=TOKENIZER_FILES[:1]))
    return next((path for folder in folders for name in TOKENIZER_FILES if (path := folder / name).is_file()), None)


def find_tokenizer(file: Path, token: str | None = None, local_files_only: bool = False) -> Path:
    """As `tokenizer_beside`, fetched if need be. Raises CheckpointError if it cannot be had."""
    if found := tokenizer_beside(file):
        return found
    try:
        folder = download(
            TOKENIZER_REPOSITORY, token=token, local_files_only=local_files_only, patterns=TOKENIZER_FILES[:1]
        )
    except CheckpointError as error:
        raise CheckpointError(f"{file}: has no tokenizer; put Qwen3's tokenizer.json beside it ({error})") from None
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
    if text and _exists(path):
        return _open_folder(path)
    if isinstance(model, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith("/"):
        raise CheckpointError(f"{path}: no such file or folder; use {_CHOICES}")
    if text.endswith((*WEIGHTS, ".png", ".jpg", ".jpeg", ".webp")):
        raise CheckpointError(f"{path}: no such file")
    text = resolve(text)
    if not _HUB_ID.fullmatch(text):
        raise CheckpointError(f"unknown model {text[:200]!r}{suggestion(text)}; use {_CHOICES}")
    return _open_hub(text, revision, token, local_files_only, needed)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False


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
    if revision is not None and (resolve(str(model)) == "tiny" or _exists(Path(os.path.expanduser(model)))):
        raise CheckpointError(f"revision is {revision!r:.60}; {model} is on this disk: only models on the Hub have one")


def hub_id_of(model: str) -> str | None:
    """The Hub id that `open_model` would take this for, or None: it is a folder, "tiny", or wrong."""
    if model == "tiny" or not model or _exists(Path(os.path.expanduser(model))):
        return None
    name = resolve(model)
    return name if _HUB_ID.fullmatch(name) and not model.startswith(("/", "~", ".")) else None


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
    return replace(mixed, folder=folder, info={**mixed.info, "source": origin})  # type: ignore[type-var]


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
