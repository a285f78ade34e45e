"""Where this program keeps things on the user's disk, as the environment says when it is asked.

Config, wildcards, LoRAs: `~/.config/klein-mlx` (`$XDG_CONFIG_HOME`).
Models of one's own: `$KLEIN_MLX_HOME/models`, by default `~/.local/share/klein-mlx/models` (`$XDG_DATA_HOME`). What a
session remembers: `~/.local/state/klein-mlx` (`$XDG_STATE_HOME`). What can be made again: `~/.cache/klein-mlx`
(`$XDG_CACHE_HOME`). None of them where there is no home.
"""

import json
import os
import re
import tomllib
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

TINY_FOLDER = Path(__file__).resolve().parent / "tiny"


@cache
def version(package: str = "klein-mlx") -> str:
    """An installed package's version; "unknown" where only the source lies there."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed(package)
    except PackageNotFoundError:
        return "unknown"


def exists(path: Path) -> bool:
    """Whether it is there; a name that no file can have, too long or with a zero byte, is not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def models_folder() -> Path | None:
    """The folder whose subfolders are models that can be named without a path."""
    home = os.environ.get("KLEIN_MLX_HOME")
    folder = Path(os.path.expanduser(home)) if home else _place("XDG_DATA_HOME", ".local/share")
    return folder / "models" if folder else None


def state_folder() -> Path | None:
    """For the history of prompts."""
    return _place("XDG_STATE_HOME", ".local/state")


def config_folder() -> Path | None:
    """For the config file, wildcards and LoRAs."""
    return _place("XDG_CONFIG_HOME", ".config")


def cache_folder() -> Path | None:
    """For what is only kept because it takes time to make."""
    return _place("XDG_CACHE_HOME", ".cache")


def keep_json(path: Path, values: Any) -> bool:
    """Write values beside their place, then put them there. Returns whether the folder could be written to."""
    import secrets

    beside = path.parent / f".{secrets.token_hex(8)}.part"
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("w") as file:
                json.dump(values, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
            return True
        finally:
            beside.unlink(missing_ok=True)
    return False


def _place(variable: str, default: str) -> Path | None:
    given = os.environ.get(variable, "")
    if os.path.isabs(given):
        return Path(given) / "klein-mlx"
    home = os.path.expanduser("~")
    return Path(home) / default / "klein-mlx" if os.path.isabs(home) else None


def own_names() -> dict[str, str]:
    """The user's short names of models: [models] in ~/.config/klein-mlx/config.toml (`$XDG_CONFIG_HOME`), each for a
    folder, a hub id or another short name. Of a config that cannot be read, none."""
    folder = config_folder()
    try:
        text = (folder / "config.toml").read_text() if folder else ""
        names = tomllib.loads(text).get("models", {}) if "[models" in text else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return {name: os.path.expanduser(model) for name, model in names.items() if isinstance(model, str)}


def own_model(name: str) -> Path | None:
    """The folder of that name among one's own models, if there is one."""
    folder = models_folder()
    plain = name not in ("", ".", "..") and "/" not in name and "\0" not in name
    found = folder / name if folder and plain else None
    return found if found is not None and os.path.isdir(found) else None


def own_models() -> list[Path]:
    """Every folder among one's own models, by name, without hidden ones; none where they may not be read."""
    folder = models_folder()
    try:
        names = sorted(os.listdir(folder)) if folder else []
    except OSError:
        return []
    return [folder / name for name in names if folder and name[0] != "." and os.path.isdir(folder / name)]


def cached_models() -> list[str]:
    """Repositories in the Hub's cache whose names say klein, whole or not; told by their folders' names alone."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    if not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir() if path.name.startswith("models--"))
    return [name.removeprefix("models--").replace("--", "/", 1) for name in names if "klein" in name.lower()]


PRECISIONS = ("bf16", "fp16", "fp32", "fp8")  # that diffusers and transformers put into a file's name: their `variant`


def precision_of(name: str) -> str | None:
    """The precision that a file's name states: "fp16" of model.fp16.safetensors, of its shards and of its index."""
    found = re.search(rf"\.({'|'.join(PRECISIONS)})(?:-\d+-of-\d+)?\.(?:safetensors|json)\b", name)
    return found[1] if found else None
