"""What is this model? A word, a folder in our format or in diffusers' layout, or a repository of the Hub."""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from klein_mlx.config import PARTS
from klein_mlx.errors import CheckpointError
from klein_mlx.formats.diffusers import INDEX_FILE, is_encoded, open_diffusers
from klein_mlx.formats.mflux import mix, open_mflux, with_variant
from klein_mlx.formats.part import PartFile, open_part
from klein_mlx.paths import TINY_FOLDER
from klein_mlx.weights.checkpoint import CONFIG_FILE, UNFINISHED, Source, open_checkpoint
from klein_mlx.weights.hub import download, resolve, suggestion, wanted

SMALL_DECODER = "black-forest-labs/FLUX.2-small-decoder"  # Apache-2.0: the full encoder, a decoder of fewer channels


_DIFFUSERS = ("config.json", "diffusion_pytorch_model.safetensors")


VAE_FILES = (_DIFFUSERS, ("full_encoder_small_decoder.safetensors",))  # the layouts of a VAE's repository, best first


def find_vae(vae: str | Path, *, token: str | None = None, local_files_only: bool = False) -> Path:
    """The path of a VAE's file or folder; a Hub id that is no path is fetched first, unless it is in the cache.

    Raises CheckpointError if the Hub has no such repository, or no VAE in it.
    """
    if not is_hub_vae(vae):
        return Path(os.path.expanduser(vae))
    if found := cached_vae(str(vae)):
        return found
    for patterns in VAE_FILES:
        folder = download(str(vae), token=token, local_files_only=local_files_only, patterns=patterns)
        if (folder / patterns[-1]).exists():
            return _found(folder, patterns)
    raise CheckpointError(f"{vae}: holds no {_DIFFUSERS[-1]}; give a repository that is a VAE, as {SMALL_DECODER}")


def is_hub_vae(vae: str | Path) -> bool:
    """Whether this names a repository of the Hub, and no path."""
    text, path = str(vae), Path(os.path.expanduser(vae))
    return not (isinstance(vae, Path) or path.exists() or text.startswith((".", "/", "~")) or text.count("/") != 1)


def cached_vae(hub_id: str) -> Path | None:
    """A repository's VAE, if it is whole in the local cache; no network call is made."""
    for patterns in VAE_FILES:
        try:
            folder = download(hub_id, local_files_only=True, patterns=patterns)
        except CheckpointError:
            continue
        if (folder / patterns[-1]).exists():
            return _found(folder, patterns)
    return None


def _found(folder: Path, patterns: tuple[str, ...]) -> Path:
    return folder if patterns == _DIFFUSERS else folder / patterns[-1]


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

    model: "tiny" (the embedded checkpoint), a folder in our format, in diffusers' layout or saved by mflux, a Hub id or
    a short name of one (klein_mlx.weights.hub). A Hub id is looked up in the local cache first, and fetched only if
    something is missing there.
    revision, token, local_files_only: for Hub ids, as in huggingface_hub.
    parts: "transformer", "text_encoder" or "vae" -> a file or folder that takes the place of the model's own.
    variant: which of the variants of these sizes it is, where the files do not tell, or tell it wrongly.
    Raises CheckpointError, in one line, for anything that is not a complete model.
    """
    given = {part: path for part, path in (parts or {}).items() if path is not None}
    base = _open_base(model, revision, token, local_files_only, {part for part in PARTS if part not in given})
    source = mix(base, given)
    return with_variant(source, variant) if variant else source


def open_any(model: str | Path, **options: Any) -> Source | PartFile:
    """As `open_model`; a single file, or a folder that holds one part, is opened as that part."""
    path = Path(os.path.expanduser(model))
    if str(model) != "tiny" and _exists(path) and (path.is_file() or _is_part(path)):
        return open_part(path)
    return open_model(model, **options)


def _is_part(folder: Path) -> bool:
    whole = (CONFIG_FILE, INDEX_FILE, *PARTS)
    return any(folder.glob("*.safetensors")) and not any((folder / name).exists() for name in whole)


def _open_base(
    model: str | Path, revision: str | None, token: str | None, local_files_only: bool, needed: Collection[str]
) -> Source:
    if model == "tiny":
        if not (TINY_FOLDER / CONFIG_FILE).exists():
            raise CheckpointError(f"{TINY_FOLDER}: the embedded checkpoint is not in this installation: reinstall it")
        return open_checkpoint(TINY_FOLDER)
    text, path = str(model), Path(os.path.expanduser(model))
    if text and _exists(path):
        return _open_folder(path)
    if isinstance(model, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith("/"):
        raise CheckpointError(f"{path}: no such folder; a model must be {_CHOICES}")
    text = resolve(text)
    if not _HUB_ID.fullmatch(text):
        raise CheckpointError(f"model is {text[:200]!r}{suggestion(text)}; it must be {_CHOICES}")
    return _open_hub(text, revision, token, local_files_only, needed)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False


def _open_folder(path: Path, name: str | None = None) -> Source:
    """name: the Hub id whose snapshot this is, for the record."""
    if path.is_file():
        part = open_part(path)  # or what it is instead
        option = part.part.replace("_", "-")
        raise CheckpointError(f"{path}: is a {option} alone; give a whole model, and this file as --{option}")
    if path.name.endswith(UNFINISHED):
        raise CheckpointError(f"{path}: is what a conversion that was stopped has left; convert again")
    if (path / CONFIG_FILE).exists():
        return open_checkpoint(path)
    if (path / INDEX_FILE).exists():
        source = open_diffusers(path, name, revision=path.name if name else None)
        return mix(source, {part: path / part for part in PARTS if is_encoded(path, part)})
    if path.name in ("transformer", "text_encoder", "vae") and (path.parent / INDEX_FILE).exists():
        raise CheckpointError(f"{path}: is one part of a model; give {path.parent}")
    if all((path / part).is_dir() for part in PARTS):
        return open_mflux(path, name, revision=path.name if name else None)
    if _is_part(path):
        part = open_part(path).part
        raise CheckpointError(
            f"{path}: is a {part} alone; give a whole model, and this folder as --{part.replace('_', '-')}"
        )
    if inner := sorted(
        p.name for p in path.glob("*") if any((p / name).exists() for name in (CONFIG_FILE, INDEX_FILE))
    ):
        raise CheckpointError(f"{path}: holds the models {', '.join(inner[:5])}; give one of these folders")
    raise CheckpointError(f"{path}: has neither {CONFIG_FILE} nor {INDEX_FILE}; it must be {_CHOICES}")


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
    folder = download(hub_id, revision=revision, token=token, local_files_only=True, patterns=wanted(needed))
    source = _open_folder(folder, hub_id)
    source.files([part for part in PARTS if part in needed])
    return source


def _open_hub(
    hub_id: str, revision: str | None, token: str | None, local_files_only: bool, needed: Collection[str]
) -> Source:
    """From the local cache if all that is needed is there, else over the network."""
    try:
        return open_cached(hub_id, revision, token, needed)
    except CheckpointError:
        if local_files_only:
            raise
    return _open_folder(download(hub_id, revision=revision, token=token, patterns=wanted(needed)), hub_id)
