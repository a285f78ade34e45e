"""Where a LoRA's name leads: a file, a folder that holds one, a name in the LoRA folder, a repository of the Hub."""

import os
import re
from difflib import get_close_matches
from pathlib import Path

from klein_mlx.errors import CheckpointError
from klein_mlx.formats.lora_metadata import ADAPTER_CONFIG
from klein_mlx.paths import config_folder
from klein_mlx.weights.hub import download, list_files

FOLDER_VARIABLE = "KLEIN_MLX_LORAS"
_USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_SUFFIX = ".safetensors"
_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(.+))?", re.ASCII)


def lora_folder(folder: str | Path | None = None) -> Path:
    """The folder in which LoRAs are looked up by name: as given, or $KLEIN_MLX_LORAS, or `loras` beside the config."""
    config = config_folder()
    return Path(os.path.expanduser(folder or os.environ.get(FOLDER_VARIABLE) or (config or Path()) / "loras"))


def find_lora(
    name: str | Path,
    *,
    folder: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The file that a LoRA argument means.

    name: a file; a folder with one LoRA in it; a name in the LoRA folder, with or without .safetensors; a Hub id, or
    one with a file behind it (owner/name/file.safetensors). The first that exists counts, in this order.
    folder: see `lora_folder`. The others as in huggingface_hub. Raises CheckpointError.
    """
    text, path = str(name), Path(os.path.expanduser(name))
    if not text or "\0" in text or len(text) > 4096:
        raise CheckpointError(f"LoRA is {text[:60]!r}; it must be a file, a name in the LoRA folder, or a Hub id")
    if _exists(path):
        return _in_folder(path) if path.is_dir() else path
    if isinstance(name, Path) or text.startswith((".", "/", "~")):
        raise CheckpointError(f"{path}: no such file")
    found = _named(text, lora_folder(folder))
    if found is not None:
        return found
    hub = _HUB.fullmatch(text)
    if hub is None:
        raise CheckpointError(_not_found(text, lora_folder(folder)))
    return _from_hub(hub[1], hub[2], revision, token, local_files_only)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _in_folder(folder: Path, where: str | None = None) -> Path:
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob(f"*{_SUFFIX}")) if _is_shown(path)}
    return files[_choose(list(files), where or str(folder))]


def _is_shown(path: Path) -> bool:
    return not path.name.startswith(".")  # nor what macOS leaves on foreign disks


def _choose(names: list[str], where: str) -> str:
    """The one LoRA among the files of a folder or a repository."""
    names = [name for name in names if name.endswith(_SUFFIX) and not Path(name).name.startswith(".")]
    usual = [name for name in names if name in _USUAL]
    if len(names) == 1 or len(usual) == 1:
        return (usual or names)[0]
    if not names:
        raise CheckpointError(f"{where}: holds no {_SUFFIX} file")
    shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
    raise CheckpointError(f"{where}: holds {len(names)} safetensors files; name one of them: {shown}")


def _named(name: str, folder: Path) -> Path | None:
    """A file of the LoRA folder, or of a folder in it, by its name; None if there is none."""
    if not folder.is_dir() or ".." in Path(name).parts:
        return None
    wanted = {name, f"{name}{_SUFFIX}"}
    files = [path for path in sorted(folder.rglob(f"*{_SUFFIX}")) if _is_shown(path) and path.is_file()]
    near = [path for path in files if str(path.relative_to(folder)) in wanted]
    found = near or [path for path in files if path.name in wanted]
    if not found and (folder / name).is_dir():
        return _in_folder(folder / name)
    if len(found) > 1:
        shown = ", ".join(str(path.relative_to(folder)) for path in found[:5])
        raise CheckpointError(f"LoRA {name!r} is ambiguous in {folder}: {shown}; give its folder too")
    return found[0] if found else None


def _not_found(name: str, folder: Path) -> str:
    if not folder.is_dir():
        return f"LoRA {name[:100]!r} is no file, and there is no LoRA folder {folder} to look it up in"
    known = sorted({path.stem for path in folder.rglob(f"*{_SUFFIX}") if _is_shown(path)})
    near = get_close_matches(name, known, 3, 0.5) or known[:5]
    holds = f"it holds {', '.join(near)}{' ...' if len(known) > len(near) else ''}" if known else "it is empty"
    return f"LoRA {name[:100]!r} is no file, and is not in {folder} ({holds})"


def _from_hub(hub_id: str, file: str | None, revision: str | None, token: str | None, local_files_only: bool) -> Path:
    """The file in the local cache, fetched first if need be, with the adapter_config.json beside it."""
    if file is None and not local_files_only:
        try:
            file = _choose(list_files(hub_id, revision=revision, token=token), f"{hub_id} on the Hub")
        except CheckpointError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            local_files_only = True  # not reached; perhaps it is here already
    if file is None:
        return _in_folder(download(hub_id, revision=revision, local_files_only=True), hub_id)
    if ".." in Path(file).parts or not file.endswith(_SUFFIX):
        raise CheckpointError(f"{hub_id}: {file[:200]!r} is no {_SUFFIX} file of a repository")
    patterns = [file, str(Path(file).with_name(ADAPTER_CONFIG))]
    for offline in (True, False) if not local_files_only else (True,):
        try:
            folder = download(hub_id, revision=revision, token=token, local_files_only=offline, patterns=patterns)
        except CheckpointError:
            if offline and not local_files_only:
                continue
            raise
        if (folder / file).exists():
            return folder / file
    raise CheckpointError(f"{hub_id}: has no file {file[:200]!r}")
