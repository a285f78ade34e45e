"""The config file: defaults, presets, names of models, folders; and how they join what was typed.

`$XDG_CONFIG_HOME/klein-mlx/config.toml`, by default `~/.config/klein-mlx/config.toml`, or `--config FILE`:

    steps = 4                      # any option of `klein-mlx generate`, by its long name

    [presets.fast]                 # --preset fast
    steps = 2

    [models]                       # --model mine
    mine = "/path/to/klein-4bit"

    [folders]
    wildcards = "~/prompts"        # files for __names__
    loras = "~/loras"

What is typed goes before the preset, the preset before the file's defaults.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from klein_mlx.cli.options import KEYS, TABLE, RunOptions, numbers, refuse_alone
from klein_mlx.errors import RequestError, nearest
from klein_mlx.options import Option
from klein_mlx.paths import config_folder

FOLDERS = ("loras", "wildcards")
TABLES = ("presets", "models", "folders")
MAX_CONFIG = 1024 * 1024  # bytes


@dataclass(frozen=True)
class Settings:
    """A config file, checked. values: options by their fields. presets: the same, by the preset's name."""

    values: dict[str, Any] = field(default_factory=dict)
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)

    def preset(self, name: str | None) -> dict[str, Any]:
        """A preset's options; RequestError for a name that stands in no config."""
        if name is None:
            return {}
        if name not in self.presets:
            near = nearest(name, self.presets)
            known = f"; did you mean {near}?" if near else f"; there are {', '.join(self.presets) or 'none'}"
            raise RequestError(f"--preset {name} is not in the config{known}")
        return self.presets[name]


def read_settings(path: str | Path | None = None) -> Settings:
    """The config file that is named, or the one at its usual place, or empty settings where there is none.

    Raises RequestError, which names file, line and key, for a file that is damaged or says what cannot be.
    """
    if path is None:
        folder = config_folder()
        path = folder / "config.toml" if folder else None
        if path is None or not os.path.isfile(path):
            return Settings()
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise RequestError(f"config {path} is not a regular file")  # a pipe without a writer would wait for ever
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG + 1)
    except OSError as error:
        raise RequestError(f"config {path} cannot be read: {error.strerror}") from None
    if len(content) > MAX_CONFIG:
        raise RequestError(f"config {path} has over {MAX_CONFIG} bytes; it is not a klein-mlx config")
    try:
        text = content.decode()
        return _File(path, text).settings(tomllib.loads(text))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise RequestError(f"{path}:{line}: is not UTF-8; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        if at := re.search(r" \(at line (\d+), column (\d+)\)$", message):
            raise RequestError(f"{path}:{at[1]}: {message[: at.start()]} (column {at[2]})") from None
        raise RequestError(f"{path}:{text.count(chr(10)) + 1}: {message}") from None
    except RecursionError:
        raise RequestError(f"{path}: is nested too deeply") from None
    except ValueError as error:  # of a number or a date that Python cannot hold
        raise RequestError(f"{path}: holds a value that cannot be read: {error}") from None


def option_value(own: Option, value: Any) -> Any:
    """A value of TOML or JSON as the option has it; RequestError, without saying where, if it is no such."""
    if own.many:
        return [_single(own, item) for item in (value if isinstance(value, list) else [value])]
    return _single(own, value)


_KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    Path: ((str,), "a string"),
}


def _single(own: Option, value: Any) -> Any:
    shown = (own.flag or "").lstrip("-")
    if own.kind is list:
        return _numbers(shown, value)
    wanted, words = _KINDS.get(own.kind, ((str, int), "a string"))
    if own.bare is True and isinstance(value, bool):
        return value or None
    if not isinstance(value, wanted) or (isinstance(value, bool) and own.kind is not bool):
        raise RequestError(f"{shown} is {value!r:.60}; it must be {words}")
    if own.choices:
        own.check(shown, value)
    if own.kind is Path and not value:
        raise RequestError(f"{shown} is ''; it must name a file or a folder")
    kind: Any = own.kind
    try:
        return kind(value)
    except OverflowError:
        raise RequestError(f"{shown} is {value!r:.60}; it must be {own.range}") from None


def _numbers(shown: str, value: Any) -> list[float]:
    """Noise levels: a list, or a text as on the command line."""
    try:
        return [float(one) for one in value] if isinstance(value, list) else numbers(value)
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise RequestError(f"{shown} is {value!r:.60}; it must be a list of numbers") from None


class _File:
    """A config file's text, for errors that name the line."""

    def __init__(self, path: Path, text: str):
        self.path, self.text = path, text

    def settings(self, values: Mapping[str, Any]) -> Settings:
        for table in TABLES:
            if not isinstance(values.get(table, {}), dict):
                raise self.error("", table, f"{table} is {values[table]!r:.60}; it must be a table: [{table}]")
        presets = {}
        for name, preset in values.get("presets", {}).items():
            if not isinstance(preset, dict):
                raise self.error("presets", name, f"{name} is {preset!r:.60}; it must be a table: [presets.{name}]")
            presets[name] = self.read_options(f"presets.{name}", preset)
        top = {name: value for name, value in values.items() if name not in TABLES}
        models, folders = values.get("models", {}), values.get("folders", {})
        for table, entries in (("models", models), ("folders", folders)):
            for name, value in entries.items():
                if not isinstance(value, str):
                    raise self.error(table, name, f"{name} is {value!r:.60}; it must be a string in quotes")
        for name in folders:
            if name not in FOLDERS:
                raise self.error("folders", name, f"{name} is unknown; there are {', '.join(FOLDERS)}")
        own = self.read_options("", top)
        if own.get("preset") is not None and own["preset"] not in presets:
            raise self.error("", "preset", f"preset is {own['preset']!r}; there are {', '.join(presets) or 'none'}")
        paths = {name: Path(os.path.expanduser(value)) for name, value in folders.items()}
        return Settings(own, presets, {name: os.path.expanduser(value) for name, value in models.items()}, paths)

    def read_options(self, table: str, values: Mapping[str, Any]) -> dict[str, Any]:
        read = {}
        for key, value in values.items():
            name = KEYS.get(key.replace("-", "_"))
            if name in (None, "prompt") or TABLE[name].typed or (table and name == "preset"):
                known = [own.key.replace("_", "-") for own in TABLE.values() if own.key != "prompt" and not own.typed]
                near = nearest(key.replace("_", "-"), [*known, *(TABLES if not table else ())])
                raise self.error(table, key, f"{key} is unknown" + (f"; did you mean {near}?" if near else ""))
            try:
                read[name] = option_value(TABLE[name], value)
            except RequestError as error:
                raise self.error(table, key, str(error)) from None
        return read

    def error(self, table: str, key: str, message: str) -> RequestError:
        line = self._line(table, key)
        return RequestError(f"{self.path}{f':{line}' if line else ''}: {message}")

    def _line(self, table: str, key: str) -> int | None:
        """Where a key stands: below its table's header, or the header itself."""
        current = ""
        for number, line in enumerate(self.text.splitlines(), 1):
            if header := re.fullmatch(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(#.*)?", line):
                current = re.sub(r"[\"'\s]", "", header[1])
                if current == ".".join(filter(None, (table, key))):
                    return number
            found = re.match(r"\s*[\"']?([\w.-]+?)[\"']?\s*=", line)
            if found and ".".join(filter(None, (current, found[1]))) == ".".join(filter(None, (table, key))):
                return number
        return None


def join(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge layers of options; earlier layers take precedence, None means unset."""
    joined: dict[str, Any] = {}
    for layer in layers:
        blocked = {other for name in joined if name in TABLE for other in TABLE[name].excludes}
        for name, value in layer.items():
            if value is not None and name not in joined and name not in blocked:
                joined[name] = value
    return joined


def complete(
    typed: Mapping[str, Any],
    recipe: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
    session: bool = False,
) -> RunOptions:
    """What was typed, filled up: from the preset, a recipe that is made again, the config's defaults, our own.

    typed: see `typed_options`. settings: the config, if it was read already. session: whether prompts and LoRAs come
    later. Raises RequestError.
    """
    settings = settings or read_settings(typed.get("config"))
    values = settings.values
    if recipe is not None:  # it says everything of its picture
        values = {name: value for name, value in values.items() if TABLE[name].per_run}
    preset = settings.preset(typed.get("preset") or (values.get("preset") if recipe is None else None))
    joined = join(typed, preset, recipe or {}, values)
    refuse_alone(typed, joined, session)
    if typed.get("enhance_model") is not None and not joined.get("enhance"):
        raise RequestError(f"--enhance-model is {typed['enhance_model']}, but no prompt is rewritten; add --enhance")
    if "loras" in settings.folders:
        joined.setdefault("lora_folder", str(settings.folders["loras"]))
    own = config_folder()
    wildcards = [Path("wildcards"), settings.folders.get("wildcards"), own / "wildcards" if own else None]
    return RunOptions(**joined, models=settings.models, wildcards=tuple(filter(None, wildcards)))
