"""`klein-mlx show PICTURE`: how a picture was made, as its file says."""

import argparse
import json
import sys
from typing import Any

from klein_mlx.cli.options import in_options
from klein_mlx.errors import RequestError
from klein_mlx.images.metadata import Found, parse_parameters, read_metadata


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", metavar="PICTURE", nargs="+", help="PNG, JPEG or WebP")
    parser.add_argument("--json", action="store_true", help="one JSON object a picture")


def run(args: argparse.Namespace) -> int:
    """Print each picture's recipe; one that says nothing is told, and the others go on. Returns the exit code."""
    code = 0
    for picture in args.picture:
        try:
            found = _read(picture)
        except RequestError as error:
            print(f"error: {in_options(error)}", file=sys.stderr, flush=True)
            code = 2
            continue
        if args.json:
            print(json.dumps(_object(picture, found), ensure_ascii=False), flush=True)
        else:
            heading = [f"{picture}:"] if len(args.picture) > 1 else []
            print("\n".join([*heading, *_lines(found)]), flush=True)
    return code


def _read(picture: str) -> Found:
    """What the picture says. Raises RequestError if that is nothing, or if it cannot be read."""
    found = read_metadata(picture)
    if found.recipe is None and found.parameters is None:
        raise RequestError(f"{picture} says nothing of how it was made; programs that pass pictures on remove it")
    return found


def _object(picture: str, found: Found) -> dict[str, Any]:
    if found.recipe is not None:
        return {"file": picture, **found.recipe}
    return {"file": picture, "parameters": parse_parameters(found.parameters or "")}


def _lines(found: Found) -> list[str]:
    if found.recipe is None:
        told = parse_parameters(found.parameters or "")
        pairs = {"prompt": told["prompt"], "negative": told.get("negative"), **told["settings"]}
        return ["no recipe of klein-mlx; what another program wrote:", *_table(pairs)]
    recipe = dict(found.recipe)
    model = recipe.pop("model", None)
    first = {name: recipe.pop(name, None) for name in ("prompt", "template", "original", "negative", "seed", "size")}
    named = {"klein_mlx", "mlx", "device", "recipe", "schedule"}
    rest = {name: value for name, value in recipe.items() if name not in named}
    told = {"model": _model(model), "schedule": recipe.get("schedule")}
    made = f"klein_mlx {recipe.get('klein_mlx')}, mlx {recipe.get('mlx')}, {recipe.get('device')}"
    return _table({**first, **rest, **told, "made by": made})


def _model(model: Any) -> str | None:
    if not isinstance(model, dict):
        return None
    words = [str(model.get("id") or model.get("name") or "unnamed")]
    if model.get("revision"):
        words.append(f"at {model['revision']}")
    words.append(f"({model.get('variant')}, fingerprint {str(model.get('fingerprint'))[:16]})")
    return " ".join(words)


def _table(pairs: dict[str, Any]) -> list[str]:
    """What is said, name by name; what is empty or off is left out."""
    shown = {name: value for name, value in pairs.items() if value not in (None, "", False, [], {})}
    width = max(map(len, shown), default=0)
    return [f"{name:<{width}}  {_value(value)}" for name, value in shown.items()]


def _value(value: Any) -> str:
    """In one line, without what a terminal would take for a command."""
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    if isinstance(value, dict):
        value = " ".join(_entry(name, item) for name, item in value.items() if name != "bytes")
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(char if char.isprintable() else " " if char in "\n\t" else "\ufffd" for char in text)


def _entry(name: str, item: Any) -> str:
    if name in ("sha256", "pixels"):
        return f"{name} {str(item)[:16]}"
    return str(item) if name in ("name", "file") else f"{name} {item}"
