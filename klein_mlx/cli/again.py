"""`klein-mlx again PICTURE`: make a picture again from its recipe, with whatever is given instead.

Files that the recipe names (references, masks, LoRAs) are known by their digests and looked for beside the picture,
in the current folder, and among the options given. On the same machine the pixels are the same.
"""

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from klein_mlx.cli.generate import make
from klein_mlx.cli.options import KEYS, TABLE, Parser, RunOptions, add_request_arguments, typed_options
from klein_mlx.cli.settings import complete, option_value, read_settings
from klein_mlx.errors import RequestError
from klein_mlx.images.metadata import read_metadata
from klein_mlx.runtime.recipe import FORMAT, digest_file

PICTURES = {"image", "init_image", "mask_image"}
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
    if "model" not in typed and recipe["model"].get("name"):
        options = replace(options, model=_local_model(recipe["model"]["name"], options))
    extra = {name: recipe[name] for name in _KEPT if name in recipe and not new_prompt}
    return make(options, extra, recipe["model"].get("fingerprint"))


def _options(recipe: Mapping[str, Any], picture: str, typed: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe as options of `generate`, by their names; what is typed needs not be found."""
    if recipe["recipe"] > FORMAT:
        raise RequestError(f"{picture}: its recipe is of a newer klein-mlx, {recipe.get('klein_mlx')!r:.40}")
    if given := recipe.get("given"):
        raise RequestError(f"{picture} was made with {', '.join(map(str, given))} given in Python; no recipe holds it")
    model = recipe.get("model")
    if not isinstance(model, Mapping):
        raise RequestError(f"{picture}: its recipe names no model")
    if model.get("parts") and not any(typed.get(part) for part in ("transformer", "text_encoder", "vae")):
        names = ", ".join(f"--{part.replace('_', '-')} {name}" for part, name in dict(model["parts"]).items())
        raise RequestError(f"{picture} was made with parts from files of their own; give them: {names}")
    options = {}
    values = {**recipe, "model": model.get("id"), "revision": model.get("revision")}
    for key, value in values.items():
        name = KEYS.get(key)
        if name is None or key in ("size", "mlx") or value is None or value == [] or name in typed:
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
        options["lora"] = [_lora(entry, picture, typed) for entry in loras]
    return _allowed(options, picture)


def _allowed(options: dict[str, Any], picture: str) -> dict[str, Any]:
    """A picture may come from anyone: its recipe names a model of the Hub or tiny, and no file to write."""
    model = options.get("model")
    if model is not None and model != "tiny" and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model):
        raise RequestError(f"{picture}: its recipe names the model {model!r:.60}; give one with --model")
    harmless = {"model", "revision", "dtype", "lora", "quantize", "group_size", "transformer_bits"}
    harmless |= {"text_encoder_bits", "quantize_layer"}
    of_a_picture = {name for name in TABLE if not TABLE[name].per_run and name != "output"}
    return {name: value for name, value in options.items() if name in of_a_picture | harmless}


def _find(entry: Any, picture: str, option: str, typed: Mapping[str, Any]) -> Path:
    """The file that an entry describes, by its digest. RequestError that names both if it is nowhere."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("sha256"), str):
        raise RequestError(f"{picture} was made with a picture that was no file; give it with {TABLE[option].flag}")
    name, digest = str(entry.get("name"))[:100], entry["sha256"]
    for path in _candidates(Path(picture).parent, typed):
        try:
            if path.stat().st_size == entry.get("bytes") and digest_file(path) == digest:
                return path
        except OSError:
            continue
    raise RequestError(
        f"{picture} was made with {name!r} (sha256 {digest[:16]}), which is neither beside it nor in the current "
        f"folder; give it with {TABLE[option].flag}"
    )


def _candidates(folder: Path, typed: Mapping[str, Any]) -> Iterator[Path]:
    """Files that may be the one that is looked for; only those of its size are read."""
    for where in dict.fromkeys((folder, Path())):
        try:
            yield from (path for path in sorted(where.iterdir()) if path.is_file())
        except OSError:
            continue
    for name in PICTURES:
        value = typed.get(name)
        yield from map(Path, value if isinstance(value, list) else [value] if value else [])


def _lora(entry: Any, picture: str, typed: Mapping[str, Any]) -> str:
    """PATH:SCALE of a LoRA in the picture's folder, the current one or the config's."""
    if not isinstance(entry, Mapping):
        raise RequestError(f"{picture}: its recipe is damaged: a LoRA is {entry!r:.60}")
    folders = [Path(picture).parent, Path()]
    if own := read_settings(typed.get("config")).folders.get("loras"):
        folders.append(own)
    for folder in folders:
        path = folder / Path(str(entry.get("file"))).name
        try:
            if path.is_file() and digest_file(path) == entry.get("sha256"):
                return f"{path}:{entry.get('scale')}"
        except OSError:
            continue
    raise RequestError(
        f"{picture} was made with the LoRA {str(entry.get('file'))[:100]!r} (sha256 {str(entry.get('sha256'))[:16]}), "
        "which is not beside it, in the current folder or the config's; give it with --lora"
    )


def _local_model(name: str, options: RunOptions) -> str:
    """A folder of this name: of the config's models, or in the current folder."""
    known = [*options.models.values(), name]
    for path in known:
        if Path(path).name == Path(name).name and Path(path).is_dir():
            return path
    raise RequestError(f"the picture was made with the model in a folder {name[:100]!r}; give it with --model")
