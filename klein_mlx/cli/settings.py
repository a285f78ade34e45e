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

import argparse
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from klein_mlx.cli.options import DEFAULT_MODEL, Parser, add_generate_arguments, refuse_group_size_alone
from klein_mlx.errors import RequestError, nearest

FOLDERS = ("loras", "wildcards")
TABLES = ("presets", "models", "folders")
MAX_CONFIG = 1024 * 1024  # bytes
DEFAULTS = {"model": DEFAULT_MODEL, "count": 1, "progress": "bar"}
# Of the whole run, not of one picture: these stand on the command line, in a preset or in the config, not in a recipe.
PER_RUN = {
    *("model", "revision", "quantize", "dtype", "keep", "transformer", "text_encoder", "vae", "small_decoder"),
    *("offline", "yes", "json", "progress", "quiet", "force", "grid", "no_metadata", "enhance", "enhance_model"),
    *("group_size", "transformer_bits", "text_encoder_bits", "quantize_layer"),
    *("lora", "lora_partial", "lora_folder", "show", "show_steps", "format", "no_wildcards"),
}
_NOWHERE = {"help", "config", "prompt_file"}  # make sense when typed alone
# An option that is given takes the place of what stands further below for these.
_REPLACES = {
    "size": ("width", "height"),
    "width": ("size",),
    "height": ("size",),
    "vae": ("small_decoder",),
    "small_decoder": ("vae",),
    "sigmas": ("steps", "strength"),
    "strength": ("sigmas",),
    "steps": ("sigmas",),
}


@dataclass(frozen=True)
class Settings:
    """A config file, checked. values: options by their names in Python. presets: the same, by the preset's name."""

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


def config_folder() -> Path | None:
    """Where the config is looked for; None where there is no home."""
    folder = os.environ.get("XDG_CONFIG_HOME")
    if folder and os.path.isabs(folder):
        return Path(folder) / "klein-mlx"
    home = os.path.expanduser("~")
    return None if home == "~" else Path(home) / ".config" / "klein-mlx"


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
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG + 1)
    except OSError as error:
        raise RequestError(f"config {path} cannot be read: {error.strerror}") from None
    if len(content) > MAX_CONFIG:
        raise RequestError(f"config {path} has over {MAX_CONFIG} bytes; it is no config of klein-mlx")
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


def options_table() -> dict[str, argparse.Action]:
    """Every option of `generate` by its name in Python, as the parser has it."""
    parser = Parser()
    add_generate_arguments(parser)
    return {action.dest: action for action in parser._actions if action.dest not in _NOWHERE}


def option_value(name: str, action: argparse.Action, value: Any) -> Any:
    """A value of TOML or JSON as the option would have it; RequestError, without saying where, if it is no such."""
    shown = action.option_strings[-1].lstrip("-") if action.option_strings else name
    if isinstance(action, argparse.BooleanOptionalAction | argparse._StoreTrueAction):
        if not isinstance(value, bool):
            raise RequestError(f"{shown.removeprefix('no-')} is {value!r:.60}; it must be true or false")
        return value
    if isinstance(action, argparse._AppendAction):
        return [_single(shown, action, item) for item in (value if isinstance(value, list) else [value])]
    return _single(shown, action, value)


def _single(shown: str, action: argparse.Action, value: Any) -> Any:
    kinds: dict[Any, tuple[tuple[type, ...], str]] = {
        int: ((int,), "a whole number"),
        float: ((int, float), "a number"),
    }
    wanted, words = kinds.get(action.type, ((str, int), "a text"))
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise RequestError(f"{shown} is {value!r:.60}; it must be {words}")
    if action.choices is not None and value not in action.choices:
        raise RequestError(f"{shown} is {value!r:.60}; it must be one of {', '.join(map(str, action.choices))}")
    if action.type is None or isinstance(action.type, str):
        return str(value)
    try:
        return action.type(value if action.type in kinds else str(value))
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise RequestError(f"{shown} is {value!r:.60}: {error}") from None


class _File:
    """A config file's text, for errors that name the line."""

    def __init__(self, path: Path, text: str):
        self.path, self.text = path, text
        self.options = options_table()

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
                    raise self.error(table, name, f"{name} is {value!r:.60}; it must be a text in quotes")
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
            name = key.replace("-", "_")
            if name not in self.options or name == "prompt" or (table and name == "preset"):
                known = [option.replace("_", "-") for option in self.options if option != "prompt"]
                near = nearest(key.replace("_", "-"), [*known, *(TABLES if not table else ())])
                raise self.error(table, key, f"{key} is unknown" + (f"; did you mean {near}?" if near else ""))
            try:
                read[name] = option_value(name, self.options[name], value)
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
    """Options of which the first that are given win; None counts as not given."""
    joined: dict[str, Any] = {}
    for layer in layers:
        blocked = {other for name in joined for other in _REPLACES.get(name, ())}
        for name, value in layer.items():
            if value is not None and name not in joined and name not in blocked:
                joined[name] = value
    return joined


def complete(args: argparse.Namespace, recipe: Mapping[str, Any] | None = None) -> argparse.Namespace:
    """What was typed, filled up: from the preset, a recipe that is made again, the config's defaults, our own.

    Adds `settings`, the config itself. Raises RequestError.
    """
    settings = read_settings(getattr(args, "config", None))
    typed = vars(args)
    values = settings.values
    if recipe is not None:  # it says everything of its picture
        values = {name: value for name, value in values.items() if name in PER_RUN}
    preset = settings.preset(typed.get("preset") or (values.get("preset") if recipe is None else None))
    joined = join(typed, preset, recipe or {}, values, DEFAULTS)
    refuse_group_size_alone(typed, joined)
    if typed.get("enhance_model") is not None and not joined.get("enhance"):
        raise RequestError(f"--enhance-model is {typed['enhance_model']}, but no prompt is rewritten; add --enhance")
    if "loras" in settings.folders:
        joined.setdefault("lora_folder", str(settings.folders["loras"]))
    options = {
        name: False if isinstance(action, argparse._StoreTrueAction) else None
        for name, action in options_table().items()
    }
    return argparse.Namespace(**{**typed, **options, **joined, "settings": settings})
