"""Where a LoRA's name leads, and what the file says of itself: strengths (alpha, rank patterns, rsLoRA) and words."""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from klein_mlx.config import refuse_address
from klein_mlx.errors import CheckpointError
from klein_mlx.formats.lora_factors import Stated
from klein_mlx.options import is_number
from klein_mlx.paths import config_folder, exists
from klein_mlx.weights.hub import HUB_FILE, download, list_files
from klein_mlx.weights.safetensors import read_json

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, beside its weights
_MAX_PATTERN = 200
_MAX_RANK = 1 << 20
# PEFT's init_lora_weights that leave the base as it is, and those that change it.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "true", "false")
_CHANGED_BASES = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}
_METHODS = {
    "alora_invocation_tokens": "an activated LoRA (aLoRA)",
    "use_qalora": "a QALoRA",
    "use_bdlora": "a block-diagonal LoRA",
    "arrow_config": "an Arrow router of LoRAs",
    "kasa_config": "a KaSA",
    "monteclora_config": "a MonteCLoRA",
    "layer_replication": "a LoRA of replicated layers",
    "target_parameters": "a LoRA of single parameters",
}
_MAX_WORDS = 8


class Strengths:
    """alpha by module, as diffusers' `lora_adapter_metadata` or PEFT's adapter_config.json state it."""

    def __init__(self, where: str, config: Mapping[str, Any]):
        self._where, self._config = where, config
        for own in config.values():
            _check_method(where, own)

    @property
    def any(self) -> bool:
        return bool(self._config)

    def of(self, part: str, name: str) -> Stated:
        """name: the module's, in the file's words, without the prefix."""
        own = self._config.get(part, {})
        alpha = _match(own.get("alpha_pattern"), name, self._where)
        alpha = own.get("lora_alpha", own.get("alpha")) if alpha is None else alpha
        rank = _match(own.get("rank_pattern"), name, self._where)
        rank = own.get("r") if rank is None else rank
        if alpha is not None and not (is_number(alpha) and alpha > 0):
            raise CheckpointError(f"{self._where}: lora_alpha of {name[:100]} is {alpha!r:.40}; it must be over 0")
        is_rank = type(rank) is int and 0 < rank <= _MAX_RANK
        return Stated(alpha, rank if is_rank else None, own.get("use_rslora") is True)


def _check_method(where: str, config: Mapping[str, Any]) -> None:
    """Refuse what PEFT's config says that factors alone do not: a base that the adapter belongs to and no other has,
    or another way of adding."""
    kind = config.get("peft_type")
    if kind is not None and kind not in ("LORA", "LOHA", "LOKR"):
        raise CheckpointError(f"{where}: peft_type is {kind!r:.40}; klein_mlx applies PEFT's LORA, LOHA and LOKR")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_STARTS:
        name = next((word for start, word in _CHANGED_BASES.items() if init.lower().startswith(start)), None)
        what = f"is {name}" if name else f"has init_lora_weights {init!r:.40}, which klein_mlx does not know"
        raise CheckpointError(
            f"{where}: {what}: its factors belong to the base that training changed; save it as a plain LoRA (PEFT's "
            "save_pretrained with path_initial_model_for_weight_conversion)"
        )
    method = next((word for field, word in _METHODS.items() if config.get(field)), None)
    if method:
        raise CheckpointError(f"{where}: is {method}, which klein_mlx does not apply")


def read_strengths(path: Path, metadata: Mapping[str, str]) -> Strengths:
    """From the file's own metadata, or from the adapter_config.json in its folder if that is PEFT's file."""
    text = metadata.get("lora_adapter_metadata")
    if text is not None:
        values = _json(text)
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: its lora_adapter_metadata is not a JSON object")
        config: dict[str, dict[str, Any]] = {"transformer": {}, "text_encoder": {}}
        for key, value in values.items():
            part, dot, name = key.partition(".")
            for one in (part,) if dot and part in config else tuple(config):
                config[one][name if dot and part in config else key] = value
        return Strengths(str(path), config)
    beside = path.with_name(ADAPTER_CONFIG)
    if path.name.startswith("adapter_model") and beside.exists():
        values = read_json(beside)
        return Strengths(str(beside), {"transformer": values, "text_encoder": values})
    if "lora_alpha" in metadata:  # flux-2-swift-mlx and its kin: one for all modules, as text
        values: dict[str, Any] = {"lora_alpha": metadata["lora_alpha"]}
        with suppress(ValueError):
            values["lora_alpha"] = float(values["lora_alpha"])
        return Strengths(str(path), {"transformer": values, "text_encoder": values})
    return Strengths(str(path), {})


def _match(patterns: Any, name: str, where: str) -> Any:
    """The first pattern's value that fits the end of a name, as PEFT matches: a name, or a simple expression."""
    if not isinstance(patterns, Mapping):
        return None
    for pattern, value in patterns.items():
        if name == pattern or name.endswith(f".{pattern}"):
            return value
        if re.fullmatch(r"[\w.-]+", pattern):
            continue
        if len(pattern) > _MAX_PATTERN or re.search(r"[+*}]\)[+*{]", pattern):  # could take forever
            raise CheckpointError(f"{where}: klein_mlx does not read the pattern {pattern[:60]!r}")
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error:
            raise CheckpointError(f"{where}: {pattern[:60]!r} is not a regular expression") from None
    return None


def told(metadata: Mapping[str, str]) -> dict[str, Any]:
    """title, author, licence, description, trained_on, trigger_words: what is stated, cut to a line each."""

    def first(*names: str) -> str | None:
        found = next((metadata[name] for name in names if metadata.get(name, "").strip()), None)
        return None if found is None else _line(found)

    result: dict[str, Any] = {
        "title": first("modelspec.title", "ss_output_name", "name"),
        "author": first("modelspec.author"),
        "licence": first("modelspec.license", "license", "licence"),
        "description": first("modelspec.description", "description"),
        "trained_on": first("ss_base_model_version", "modelspec.architecture", "base_model", "ss_sd_model_name"),
        "trigger_words": _trigger_words(metadata),
    }
    return {name: value for name, value in result.items() if value}


def _line(text: str) -> str:
    text = " ".join(text.split())
    return "".join(c for c in text if c.isprintable())[:200]


def _trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """As stated; else the most frequent tags of the training captions."""
    for name in ("modelspec.trigger_phrase", "trigger", "trigger_word", "trigger_words", "ss_trigger_words"):
        text = metadata.get(name, "").strip()
        if text:
            values = _json(text)
            words = [str(word) for word in values] if isinstance(values, list) else text.split(",")
            return [_line(word)[:60] for word in words if word.strip()][:_MAX_WORDS]
    folders = _json(metadata.get("ss_tag_frequency", ""))
    counts: dict[str, int] = {}
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int):
                counts[str(tag).strip()] = counts.get(str(tag).strip(), 0) + count
    ordered = sorted(counts, key=lambda tag: (-counts[tag], tag))
    return [_line(tag)[:60] for tag in ordered[:_MAX_WORDS]]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


FOLDER_VARIABLE = "KLEIN_MLX_LORAS"
_MODEL_S = ("klein.json", "config.json")
_USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_SUFFIX = ".safetensors"


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
    is_path = exists(path)
    if not is_path and (isinstance(name, Path) or text.startswith((".", "/", "~"))):
        raise CheckpointError(f"{path}: no such file")
    found = path if is_path else _named(text, lora_folder(folder))
    if found is not None and revision is not None:
        raise CheckpointError(f"revision is {revision!r:.60}; {found} is on this disk: only LoRAs on the Hub have one")
    if found is not None:
        return _in_folder(found) if found.is_dir() else found
    refuse_address(text)
    hub = HUB_FILE.fullmatch(text)
    if hub is None:
        raise CheckpointError(_not_found(text, lora_folder(folder)))
    return _from_hub(hub[1], hub[2], revision, token, local_files_only)


def _in_folder(folder: Path, where: str | None = None) -> Path:
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob(f"*{_SUFFIX}")) if _is_shown(path)}
    return files[_choose(list(files), where or str(folder))]


def _is_shown(path: Path) -> bool:
    return not path.name.startswith(".")  # nor what macOS leaves on foreign disks


def files_in(folder: Path) -> list[Path]:
    """The files in a folder of LoRAs, and in those inside of it, that may be one: not a model's, beside its config."""
    files = (path for path in sorted(folder.rglob(f"*{_SUFFIX}")) if _is_shown(path) and path.is_file())
    return [path for path in files if not any((path.parent / name).exists() for name in _MODEL_S)]


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
    files = files_in(folder)
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
        return f"LoRA {name[:100]!r} is not a file, and there is no LoRA folder {folder} to look it up in"
    known = sorted({path.stem for path in files_in(folder)})
    near = get_close_matches(name, known, 3, 0.5) or known[:5]
    holds = f"it holds {', '.join(near)}{' ...' if len(known) > len(near) else ''}" if known else "it is empty"
    return f"LoRA {name[:100]!r} is not a file, and is not in {folder} ({holds})"


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
        raise CheckpointError(f"{hub_id}: {file[:200]!r} is not a {_SUFFIX} file in a repository")
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
