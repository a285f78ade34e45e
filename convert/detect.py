"""What is this model? A word, a folder in our format or in diffusers' layout, or a repository of the Hub."""

import os
import re
from pathlib import Path

import klein_mlx
from klein_mlx.checkpoint import CONFIG_FILE, Source, download, open_checkpoint
from klein_mlx.convert.diffusers import INDEX_FILE, open_diffusers
from klein_mlx.errors import CheckpointError

TINY_FOLDER = Path(klein_mlx.__file__).parent / "tiny"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_CHOICES = "'tiny', a folder, or a Hub id such as black-forest-labs/FLUX.2-klein-4B"


def open_model(
    model: str | Path, *, revision: str | None = None, token: str | None = None, local_files_only: bool = False
) -> Source:
    """Open a model, reading its configs: no weight is read.

    model: "tiny" (the embedded checkpoint), a folder in our format or in diffusers' layout, or a Hub id. A Hub id is
    looked up in the local cache first, and fetched only if something is missing there.
    revision, token, local_files_only: for Hub ids, as in huggingface_hub.
    Raises CheckpointError, in one line, for anything that is not a complete model.
    """
    if model == "tiny":
        if not (TINY_FOLDER / CONFIG_FILE).exists():
            raise CheckpointError(f"{TINY_FOLDER}: the embedded checkpoint is not in this installation: reinstall it")
        return open_checkpoint(TINY_FOLDER)
    text, path = str(model), Path(os.path.expanduser(model))
    if text and _exists(path):
        return _open_folder(path)
    if isinstance(model, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith("/"):
        raise CheckpointError(f"{path}: no such folder")
    if not _HUB_ID.fullmatch(text):
        raise CheckpointError(f"model is {text[:200]!r}; it must be {_CHOICES}")
    return _open_hub(text, revision, token, local_files_only)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False


def _open_folder(path: Path, name: str | None = None) -> Source:
    """name: the Hub id whose snapshot this is, for the record."""
    if path.is_file():
        raise CheckpointError(f"{path}: is a file; klein_mlx opens a folder, in its own format or in diffusers' layout")
    if (path / CONFIG_FILE).exists():
        return open_checkpoint(path)
    if (path / INDEX_FILE).exists():
        return open_diffusers(path, name, revision=path.name if name else None)
    if path.name in ("transformer", "text_encoder", "vae") and (path.parent / INDEX_FILE).exists():
        raise CheckpointError(f"{path}: is one part of a model; give {path.parent}")
    raise CheckpointError(f"{path}: has neither {CONFIG_FILE} nor {INDEX_FILE}; it must be {_CHOICES}")


def _open_hub(hub_id: str, revision: str | None, token: str | None, local_files_only: bool) -> Source:
    """From the local cache if all of it is there, else over the network."""
    try:
        source = _open_folder(download(hub_id, revision=revision, token=token, local_files_only=True), hub_id)
        source.files()
        return source
    except CheckpointError:
        if local_files_only:
            raise
    return _open_folder(download(hub_id, revision=revision, token=token), hub_id)
