"""What a LoRA file says of itself: strengths (alpha, rank patterns, rsLoRA) and words for people."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from klein_mlx.errors import CheckpointError
from klein_mlx.formats.lora_factors import Stated
from klein_mlx.weights.safetensors import read_json

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, beside its weights
_MAX_PATTERN = 200
_MAX_WORDS = 8


class Strengths:
    """alpha by module, as diffusers' `lora_adapter_metadata` or PEFT's adapter_config.json state it."""

    def __init__(self, where: str, config: Mapping[str, Any]):
        self._where, self._config = where, config

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
        if alpha is not None and not _is_positive(alpha):
            raise CheckpointError(f"{self._where}: lora_alpha of {name[:100]} is {alpha!r:.40}; it must be over 0")
        return Stated(alpha, rank if type(rank) is int and rank > 0 else None, own.get("use_rslora") is True)


def read_strengths(path: Path, metadata: Mapping[str, str]) -> Strengths:
    """From the file's own metadata, or from the adapter_config.json in its folder if that is PEFT's file."""
    text = metadata.get("lora_adapter_metadata")
    if text is not None:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            values = None
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
    return Strengths(str(path), {})


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


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
