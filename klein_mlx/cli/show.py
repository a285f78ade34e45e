"""`klein-mlx show PICTURE`: how a picture was made, as its file says."""

import argparse
from itertools import islice
from typing import Any

from klein_mlx.cli.options import in_options
from klein_mlx.cli.output import note, say, say_json
from klein_mlx.errors import RequestError
from klein_mlx.images.saving import Found, parse_parameters, read_metadata

MAX_LINES, MAX_NAME, MAX_LINE, MAX_TEXT = 100, 40, 2000, 100_000  # lines; characters: of a name, a value, a prompt
TEXTS = ("prompt", "template", "original", "negative")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", metavar="PICTURE", nargs="+", help="PNG, JPEG or WebP")
    parser.add_argument("--json", action="store_true", help="one JSON object per picture")


def run(args: argparse.Namespace) -> int:
    """Print each picture's recipe; one that says nothing is told, and the others go on. Returns the exit code."""
    code = 0
    for picture in args.picture:
        try:
            found = _read(picture)
        except RequestError as error:
            note(f"error: {in_options(error)}")
            code = 2
            continue
        if args.json:
            say_json(_object(picture, found))
        else:
            heading = [f"{picture}:"] if len(args.picture) > 1 else []
            say(*heading, *_lines(found))
    return code


def _read(picture: str) -> Found:
    found = read_metadata(picture)
    if found.recipe is None and found.parameters is None:
        raise RequestError(f"{picture} has no recipe; apps that re-save pictures often strip it")
    return found


def _object(picture: str, found: Found) -> dict[str, Any]:
    if found.recipe is not None:
        return {"file": picture, **{name: value for name, value in found.recipe.items() if name != "file"}}
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
    fingerprint = f"fingerprint {str(model.get('fingerprint'))[:16]}{' of samples' if model.get('sampled') else ''}"
    words.append(f"({model.get('variant')}, {fingerprint})")
    return " ".join(words)


def _table(pairs: dict[str, Any]) -> list[str]:
    """What is said, name by name, within bounds; what is empty or off is left out."""
    shown = {_cut(name, MAX_NAME): value for name, value in pairs.items() if value not in (None, "", False, [], {})}
    first = dict(islice(shown.items(), MAX_LINES))
    width = max(map(len, first), default=0)
    lines = [
        f"{name:<{width}}  {_cut(_value(value), MAX_TEXT if name in TEXTS else MAX_LINE)}"
        for name, value in first.items()
    ]
    return lines + [f"... and {len(shown) - len(first)} more"] * (len(shown) > len(first))


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, islice(value, MAX_LINE)))
    if isinstance(value, dict):
        value = " ".join(_entry(name, item) for name, item in islice(value.items(), MAX_LINE) if name != "bytes")
    return f"{value:g}" if isinstance(value, float) else str(value).replace("\n", " ")


def _entry(name: str, item: Any) -> str:
    if name in ("sha256", "pixels"):
        return f"{name} {str(item)[:16]}"
    return str(item) if name in ("name", "file") else f"{name} {item}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 4]} ..."
