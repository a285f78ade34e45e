"""`klein-mlx models`: which models are on disk, their sizes and last use; fetch one, delete one, print its path."""

import argparse
import os
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klein_mlx.cli.output import ask, note, printable, say, say_json
from klein_mlx.config import ALIASES, BASES, resolve, suggestion
from klein_mlx.errors import CheckpointError, RequestError, human_bytes
from klein_mlx.paths import models_folder, own_model, own_models, own_names

if TYPE_CHECKING:
    from klein_mlx.weights.checkpoint import Source

OTHER_NAMES = {"ls": "list", "download": "pull", "remove": "rm", "delete": "rm"}
ACTIONS = ("list", "pull", "rm", "path")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `klein-mlx models` takes."""
    add = parser.add_argument
    known = {"type": lambda word: OTHER_NAMES.get(word.lower(), word.lower()), "choices": ACTIONS, "default": "list"}
    add("action", nargs="?", help="list (default), pull, rm or path", **known)
    add("name", nargs="*", metavar="MODEL", help="a Hub id, a short name, or a folder of your own models")
    add("--revision", help="with pull and path: the model's revision on the Hub")
    add("-y", "--yes", action="store_true", help="with rm: delete without asking")
    add("--json", action="store_true", help="one JSON object per line on stdout")
    add("--quiet", action="store_true", help="no progress and no notes on stderr")


def run(args: argparse.Namespace) -> int:
    """Do what is asked of the models. Returns the exit code; raises KleinError."""
    if args.revision is not None and args.action in ("list", "rm"):
        all_of_them = "; rm deletes a model with all of its revisions" * (args.action == "rm")
        raise RequestError(f"--revision is for pull and path{all_of_them}")
    if args.action == "list":
        if args.name:
            raise RequestError(f"list takes no model; for one of them: klein-mlx info {args.name[0]}")
        _list(args)
        return 0
    if not args.name:
        raise RequestError(f"{args.action} needs a model; for example: klein-mlx models {args.action} 4b")
    act = {"pull": _pull, "rm": _remove, "path": _path}[args.action]
    for name in args.name:
        report = act(args, name)
        say_json(report) if args.json else say(report.get("path", ""))
    return 0


# ---- what is on disk ----


@dataclass(frozen=True)
class OnDisk:
    """A model on disk. where: "hub", "folder" or "package". bits: of its quantized parts. last_used: seconds since
    1970 as the file system tells it. whole: every file that is needed is there."""

    name: str
    where: str
    path: str
    bytes: int
    variant: str | None
    bits: list[int]
    last_used: float | None
    whole: bool


def on_disk() -> list[OnDisk]:
    """The embedded checkpoint, one's own models, and klein models of the Hub's cache, in this order."""
    from klein_mlx.formats.open import open_model

    tiny = open_model("tiny")
    found = [_entry("tiny", "package", tiny.path, tiny, None)]
    for folder in own_models():
        found.append(_entry(folder.name, "folder", folder, _opened(folder), None))
    known = {alias.hub_id for alias in ALIASES.values()}
    for repo in sorted(_scanned(), key=lambda repo: repo.repo_id):
        for revision in sorted(repo.revisions, key=lambda revision: -revision.last_modified)[:1]:
            source = _opened(repo.repo_id if repo.repo_id in BASES else revision.snapshot_path)
            if source or repo.repo_id in known:
                used = max(repo.last_accessed, repo.last_modified)
                found.append(_entry(repo.repo_id, "hub", revision.snapshot_path, source, used, repo.size_on_disk))
    return found


def _scanned() -> list[Any]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return [repo for repo in scan_cache_dir(constants.HF_HUB_CACHE).repos if repo.repo_type == "model"]
    except (CacheNotFound, OSError, ValueError, RuntimeError):  # RuntimeError: a loop of links
        return []


def _opened(model: str | Path) -> "Source | None":
    from klein_mlx.formats.open import open_model

    try:
        source = open_model(model, local_files_only=True)
        source.files()
        return source
    except (CheckpointError, OSError):
        return None


def _files(folder: Path) -> list[os.stat_result]:
    """Of every file below a folder; what may not be read is left out, and links to other folders."""
    found = []
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                found.append(os.stat(os.path.join(where, name)))
    return found


def _entry(
    name: str, where: str, path: Path, source: "Source | None", used: float | None, size: int | None = None
) -> OnDisk:
    files = [] if source is None and path.is_symlink() else _files(path)  # a link may point at the whole disk
    bits = sorted({bits for q in source.quantization.values() for bits in _bits(q)}) if source else []
    return OnDisk(
        name,
        where,
        str(path),
        size if size is not None else sum(file.st_size for file in files),
        source.config.variant.name if source else None,
        bits,
        used or max((max(file.st_atime, file.st_mtime) for file in files), default=None),
        source is not None,
    )


def _bits(quantization: Any) -> set[int]:
    layers = quantization.layers
    return {own.bits for own in layers.values()} if layers else {quantization.bits}


def _list(args: argparse.Namespace) -> None:
    found = on_disk()
    if args.json:
        for model in found:
            say_json(asdict(model))
        return
    short = {alias.hub_id: name for name, alias in ALIASES.items()}
    rows = [("NAME", "SHORT", "VARIANT", "BITS", "SIZE", "LAST USE")]
    for model in found:
        bits = "+".join(map(str, model.bits)) or ("-" if model.whole else "?")
        told = model.variant or "incomplete"
        used = "-" if model.where == "package" or not model.last_used else _ago(time.time() - model.last_used)
        rows.append((printable(model.name), short.get(model.name, "-"), told, bits, human_bytes(model.bytes), used))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    here = {model.name for model in found}
    others = [f"{name} ({alias.hub_id})" for name, alias in ALIASES.items() if alias.hub_id not in here]
    if others and not args.quiet:
        note("available to download (klein-mlx models pull NAME):", *(f"  {other}" for other in others))
        note(f"your own models, by name: the folders in {models_folder()}")


def _ago(seconds: float) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


# ---- one of them ----


def _hub_id(name: str) -> str:
    from klein_mlx.formats.open import hub_id_of

    if name == "tiny":
        raise RequestError("tiny is built in; there is nothing to download")
    own = own_names()
    hub_id = hub_id_of(resolve(name, own))
    if hub_id is None:
        hint = suggestion(name, own) or "; use owner/name or a short name"
        raise RequestError(f"{name!r} is not a model on the Hub{hint}")
    return hub_id


def _pull(args: argparse.Namespace, name: str) -> dict[str, Any]:
    from klein_mlx.cli.download import Consent, bring_model
    from klein_mlx.formats.open import open_cached

    hub_id = _hub_id(name)
    try:
        source = open_cached(hub_id, args.revision)
    except CheckpointError:
        bring_model(hub_id, consent=Consent(yes=True, quiet=args.quiet), revision=args.revision, short=name)
        source = open_cached(hub_id, args.revision)
    return {"name": hub_id, "path": str(source.path)}


def _path(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Where a model is; CheckpointError if it is not on disk, or not whole."""
    from klein_mlx.formats.open import open_cached, open_model

    name = own_names().get(name, name)
    folder = own_model(name)
    if folder or name == "tiny" or os.path.isdir(name):
        source = open_model(folder or name, revision=args.revision, local_files_only=True)
    else:
        hub_id = _hub_id(name)
        try:
            source = open_cached(hub_id, args.revision)
        except CheckpointError:
            raise CheckpointError(f"{hub_id} is not (fully) downloaded; run: klein-mlx models pull {name}") from None
    return {"name": resolve(name), "path": str(source.path)}


def _remove(args: argparse.Namespace, name: str) -> dict[str, Any]:
    if name == "tiny":
        raise RequestError("tiny is built in and cannot be removed")
    folder = own_model(name)
    if folder is None:
        return _remove_cached(args, _hub_id(name))
    if folder.is_symlink():
        raise RequestError(f"{folder} is a link; delete it yourself, what it points to is not among your models")
    if not any(
        os.path.exists(folder / file)
        for file in ("klein.json", "model_index.json", "transformer", "transformer-packed-mflux")
    ):
        raise RequestError(f"{folder} is not a model; delete it yourself")
    size = sum(file.st_size for file in _files(folder))
    _ask(args, name, size, folder)
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise RequestError(f"{folder} cannot be deleted: {error.strerror}") from None
    return {"name": name, "path": str(folder), "freed": size}


def _remove_cached(args: argparse.Namespace, hub_id: str) -> dict[str, Any]:
    from huggingface_hub import constants, scan_cache_dir

    folder = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    if not os.path.isdir(folder):
        raise RequestError(f"{hub_id} is not on this machine; klein-mlx models lists what is")
    size = sum(file.st_size for file in _files(folder / "blobs")) or sum(file.st_size for file in _files(folder))
    _ask(args, hub_id, size, folder)
    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
        commits = [r.commit_hash for repo in cache.repos if repo.repo_path == folder for r in repo.revisions]
        if commits:
            cache.delete_revisions(*commits).execute()
        if os.path.isdir(folder):  # pieces of a download alone: no revision of the cache
            shutil.rmtree(folder)
    except OSError as error:
        raise RequestError(f"{folder} cannot be deleted: {error.strerror}") from None
    return {"name": hub_id, "path": str(folder), "freed": size}


def _ask(args: argparse.Namespace, name: str, size: int, folder: Path) -> None:
    if args.yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise RequestError(
            f"not a terminal, so cannot ask; add --yes to delete {name} ({human_bytes(size)} in {folder})"
        )
    if ask(f"Delete {name}, {human_bytes(size)} in {folder}? [y/N]").strip().lower() not in ("y", "yes"):
        raise RequestError(f"{name} was not deleted")
