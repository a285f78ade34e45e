"""`klein-mlx again PICTURE`: make a picture again from its recipe, with whatever is given instead.

Files that the recipe names (references, masks, LoRAs) are known by their digests and looked for beside the picture,
in the current folder, and among the options given. On the same machine the pixels are the same.
"""

import argparse
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from klein_mlx.cli.generate import make
from klein_mlx.cli.options import KEYS, TABLE, Parser, RunOptions, add_request_arguments, typed_options
from klein_mlx.cli.settings import complete, option_value, read_settings
from klein_mlx.config import PARTS
from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.formats.lora_metadata import lora_folder
from klein_mlx.images.saving import read_metadata
from klein_mlx.paths import own_models
from klein_mlx.runtime.recipe import FORMAT, PIXELS
from klein_mlx.weights.hub import HUB_ID
from klein_mlx.weights.safetensors import digest_file

PICTURES = {"image", "init_image", "mask_image"}
_REVISION = re.compile(r"\w[\w.-]{0,99}", re.ASCII)
_KEPT = ("template", "original", "enhanced_by")  # what a recipe says besides, and the next one says again


def add_arguments(parser: Parser) -> None:
    """What `klein-mlx again` takes."""
    parser.usage = f"{parser.prog} PICTURE [OPTIONS]"
    parser.add_argument("picture", metavar="PICTURE", help="made by klein-mlx, with its recipe inside")
    add_request_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Make the picture again. Returns the exit code; raises KleinError."""
    recipe = read_metadata(args.picture).recipe
    if recipe is None:
        raise RequestError(f"{args.picture} has no recipe of klein-mlx inside; klein-mlx show says what it has")
    typed = typed_options(args)
    if "prompt_file" in typed:
        raise RequestError("--prompt-file does not go with again; give it to klein-mlx generate")
    asked = _options(recipe, args.picture, typed)
    new_prompt = "prompt" in typed
    if not new_prompt:
        typed["no_wildcards"] = True
    options = complete(typed, asked)
    model = recipe["model"]
    if "model" not in typed and "id" not in model:
        options = replace(options, model=_local_model(model.get("name"), options), revision=typed.get("revision"))
    extra = {name: recipe[name] for name in _KEPT if isinstance(recipe.get(name), str) and not new_prompt}
    return make(options, extra, model)


def _options(recipe: Mapping[str, Any], picture: str, typed: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe as options of `generate`, by their names; what is typed needs not be found."""
    if recipe["recipe"] > FORMAT:
        raise RequestError(f"{picture}: its recipe was written by a newer klein-mlx, {recipe.get('klein_mlx')!r:.40}")
    if given := recipe.get("given"):
        given = ", ".join(map(str, given)) if isinstance(given, list) else given
        raise RequestError(f"{picture} was made with {given} given in Python; no recipe holds it")
    model = recipe.get("model")
    if not isinstance(model, Mapping):
        raise RequestError(f"{picture}: its recipe names no model")
    parts = model.get("parts")
    if isinstance(parts, Mapping) and not any(typed.get(part) for part in PARTS):
        words = {**parts, **({"variant": model["opened_as"]} if model.get("opened_as") else {})}
        names = ", ".join(f"--{str(part).replace('_', '-')} {name}" for part, name in words.items())
        raise RequestError(f"{picture} was made with parts from files of their own; give them: {names}")
    options: dict[str, Any] = {} if "model" in typed else _model(model, picture)
    if isinstance(variant := model.get("opened_as"), str) and not {"model", "transformer", "variant"} & typed.keys():
        options["variant"] = variant
    for key, value in recipe.items():
        name = KEYS[key] if key in PIXELS else None
        if name is None or value is None or value == [] or name in typed:
            continue
        if name in PICTURES:
            entries = value if isinstance(value, list) else [value]
            found = [str(_find(entry, picture, name, typed)) for entry in entries]
            value = found if isinstance(value, list) else found[0]
        try:
            options[name] = option_value(TABLE[name], value)
        except RequestError as error:
            raise RequestError(f"{picture}: its recipe is damaged: {error}") from None
    if (loras := recipe.get("loras")) and not typed.get("lora"):
        entries = loras if isinstance(loras, list) else [loras]
        options["lora"] = [_lora(entry, picture, typed) for entry in entries]
    return options


def _model(model: Mapping[str, Any], picture: str) -> dict[str, Any]:
    """A model of the Hub, or tiny, as options; nothing for a folder, which is looked for by its name."""
    name, revision = model.get("id"), model.get("revision")
    if name is None:
        return {}
    if name != "tiny" and not (isinstance(name, str) and HUB_ID.fullmatch(name)):
        raise RequestError(f"{picture}: its recipe names the model {name!r:.60}; give one with --model")
    if revision is None:
        return {"model": name}
    if not isinstance(revision, str) or not _REVISION.fullmatch(revision):
        raise RequestError(f"{picture}: its recipe names the revision {revision!r:.60}; give one with --revision")
    return {"model": name, "revision": revision}


def _find(entry: Any, picture: str, option: str, typed: Mapping[str, Any]) -> Path:
    """The file that an entry describes, by its digest. RequestError that names both if it is nowhere."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("sha256"), str):
        raise RequestError(f"{picture} was made with a picture that was not a file; give it with {TABLE[option].flag}")
    name, digest = str(entry.get("name"))[:100], entry["sha256"]
    for path in _candidates(Path(picture).parent, typed):
        try:
            if path.stat().st_size == entry.get("bytes") and digest_file(path) == digest:
                return path
        except (OSError, CheckpointError):
            continue
    raise RequestError(
        f"{picture} was made with {name!r} (sha256 {digest[:16]}), which was found neither beside the picture nor in "
        f"the current folder; give it with {TABLE[option].flag}"
    )


def _candidates(folder: Path, typed: Mapping[str, Any]) -> Iterator[Path]:
    """Files that may be the one that is looked for; only those of its size are read."""
    for where in dict.fromkeys((folder, Path())):
        try:
            yield from (path for path in sorted(where.iterdir()) if os.path.isfile(path))
        except OSError:
            continue
    for name in PICTURES:
        value = typed.get(name)
        yield from map(Path, value if isinstance(value, list) else [value] if value else [])


def _lora(entry: Any, picture: str, typed: Mapping[str, Any]) -> str:
    """PATH:SCALE of a LoRA in the picture's folder, the current one or the LoRA folder."""
    if not isinstance(entry, Mapping):
        raise RequestError(f"{picture}: its recipe is damaged: a LoRA is {entry!r:.60}")
    own = typed.get("lora_folder") or read_settings(typed.get("config")).folders.get("loras")
    for folder in (Path(picture).parent, Path(), lora_folder(own)):
        path = folder / Path(str(entry.get("file"))).name
        try:
            if os.path.isfile(path) and digest_file(path) == entry.get("sha256"):
                return f"{path}:{entry.get('scale')}"
        except (OSError, CheckpointError):
            continue
    raise RequestError(
        f"{picture} was made with the LoRA {str(entry.get('file'))[:100]!r} (sha256 {str(entry.get('sha256'))[:16]}), "
        "which was not found beside the picture, in the current folder, or in the LoRA folder; give it with --lora"
    )


def _local_model(name: Any, options: RunOptions) -> str:
    """A folder of this name: of the config's models, in the current folder, or of one's own models."""
    known = [*options.models.values(), name, *map(str, own_models())]
    if isinstance(name, str) and name not in ("", "..") and Path(name).name == name and "\0" not in name:
        for path in known:
            if Path(path).name == name and os.path.isdir(path):
                return path
    raise RequestError(f"the picture was made with the model in a folder {name!r:.100}; give it with --model")
