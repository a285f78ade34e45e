"""A folder that is complete or not there at all: where it may be, the hidden folder that it is made in, its renaming.

The work is done beside the destination, flushed, and renamed: a killed run leaves nothing under the final name and
nothing that loads. What it did leave is cleared away by the next one. Beside the weights lie a model card and the
license: Apache-2.0, section 4, asks for a copy, the original's notices, and a statement that files were changed.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from klein_convert.writer import flush_descriptor, write_bytes
from klein_mlx.errors import CheckpointError, RequestError, human_bytes, line_of
from klein_mlx.weights.checkpoint import CONFIG_FILE, UNFINISHED, Source
from klein_mlx.weights.hub import HUB_ID
from klein_mlx.weights.quantize import Quantization

OURS = ".klein-mlx"  # in a hidden folder: that it is ours, and may be cleared


def checked_destination(destination: Path, source: Path, force: bool, mark: str) -> Path:
    """The absolute destination, once nothing speaks against it. mark: the file that says what may be replaced."""
    try:
        os.fspath(destination).encode("utf-8")
        target, origin = Path(os.path.expanduser(destination)).resolve(), source.resolve()
        inside = _is_within(target, origin)
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, not UTF-8; a loop of links
        raise CheckpointError(f"{destination!s:.60}: cannot be created ({error!s:.80})") from None
    if inside:
        raise CheckpointError(f"{destination}: is the source itself or inside it; choose another folder")
    if _is_within(origin, target):
        raise CheckpointError(f"{destination}: holds the source; choose another folder")
    parent = target.parent
    if not parent.is_dir():
        raise CheckpointError(f"{destination}: {parent} is not a folder; create it first")
    if os.path.lexists(target):
        if not force:
            raise CheckpointError(f"{destination}: exists already; choose another name, or --force to replace it")
        if not target.is_dir() or (any(target.iterdir()) and not (target / mark).exists()):
            what = "a klein_mlx checkpoint" if mark == CONFIG_FILE else f"a folder with a {mark}"
            raise CheckpointError(f"{destination}: is not {what}, so it is not replaced; remove it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{destination}: {parent} is not writable")
    return target


def _is_within(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or below it, on a file system that may ignore case."""
    return any(p.exists() and os.path.samefile(p, folder) for p in (path, *path.parents) if folder.exists())


def require_space(parent: Path, needed: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(f"{parent}: {human_bytes(needed)} are needed, {human_bytes(free)} are free")


@contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """An empty folder beside the target, ours alone; afterwards gone, unless it was renamed."""
    folder = target.with_name(f".{target.name}{UNFINISHED}")
    handle, others = None, False
    try:
        folder.mkdir(exist_ok=True)
        try:
            handle = _lock(folder, target)
        except CheckpointError:
            others = True
            raise
        if any(folder.iterdir()) and not (folder / OURS).exists():
            raise _foreign(folder)
        (folder / OURS).touch()
        for left in folder.iterdir():  # by a conversion that was killed
            if left.name == OURS:
                continue
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield folder
    finally:
        if handle is not None and _is_same(handle, folder) and (folder / OURS).exists():
            shutil.rmtree(folder, ignore_errors=True)
        elif not others:  # interrupted before anything was in it; a folder with files stays
            with suppress(OSError):
                folder.rmdir()
        if handle is not None:
            os.close(handle)


def _lock(folder: Path, target: Path) -> int:
    """A handle of the folder, locked for this process. Raises CheckpointError if another has it, or if it is a link."""
    busy = CheckpointError(f"{target}: another conversion is writing it")
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise busy from None
    except OSError:  # a link, which may lead anywhere
        raise _foreign(folder) from None
    try:
        with suppress(OSError):  # of a file system without locks: still only a complete folder appears, by its renaming
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise busy from None
        if not _is_same(handle, folder):  # the other run has just renamed it
            raise busy
    except BaseException:
        os.close(handle)
        raise
    return handle


def _foreign(folder: Path) -> CheckpointError:
    return CheckpointError(f"{folder}: is in the way, and no conversion of ours made it; remove it first")


def _is_same(handle: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), folder.stat())
    except FileNotFoundError:
        return False


def publish(folder: Path, target: Path, force: bool) -> None:
    """Give the finished folder its name."""
    flush_folder(folder)
    replaced = target.with_name(f".{target.name}.replaced")
    if not os.path.lexists(target):
        os.rename(folder, target)
    elif not force:
        raise CheckpointError(f"{target}: appeared in the meantime; nothing was written")
    else:
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(target, replaced)
        try:
            os.rename(folder, target)
        except OSError:
            os.rename(replaced, target)
            raise
    (target / OURS).unlink(missing_ok=True)
    flush_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """So that a name outlives a power cut, on a disk that can flush folders; what is in it is complete without."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            flush_descriptor(handle)
        finally:
            os.close(handle)


def write_failure(target: Path, needed: int, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{target}: the disk is full; {human_bytes(needed)} are needed. Nothing was left behind"
    return f"{target}: cannot be written ({error.strerror or error})"


CARD_FILE, LICENCE_FILE, NOTICE_FILE = "README.md", "LICENSE", "NOTICE"
_APACHE = "Apache-2.0"


def write_card(folder: Path, settings: dict[str, Any], source: Source) -> None:
    """Write README.md, and LICENSE and NOTICE where there are texts for them. settings: what klein.json holds."""
    licence = _text(source.path, LICENCE_FILE) or (_own_licence() if settings["licence"] == _APACHE else None)
    texts = {CARD_FILE: model_card(settings), LICENCE_FILE: licence, NOTICE_FILE: _text(source.path, NOTICE_FILE)}
    for name, text in texts.items():
        if text:
            write_bytes(folder / name, text.encode())


def model_card(settings: dict[str, Any]) -> str:
    """The README.md of a checkpoint, with the header that the Hub reads."""
    origin = settings["source"]
    name, licence = str(origin.get("name", "an unnamed model")), settings["licence"]
    revision = f" at revision {origin['revision']}" if origin.get("revision") else ""
    stored = {part: Quantization.from_dict(values) for part, values in settings["quantization"].items()}
    bits = [f"the {part.replace('_', ' ')} is {q.told()}" for part, q in stored.items()]
    changes = ["converted to MLX", *([f"quantized: {', '.join(bits)}"] if bits else [])]
    known = licence == _APACHE
    header = [
        "---",
        "library_name: mlx",
        "pipeline_tag: text-to-image",
        f"license: {'apache-2.0' if known else 'other'}",
    ]
    if "/" in name:
        header += ["base_model:", f"- {name}"]
        header += [f"base_model_relation: {'quantized' if bits else 'finetune'}"] if bits else []
    header += ["tags:", "- mlx", "- klein-mlx", "- flux.2", "---"]
    parts = origin.get("parts", {})
    mixed = [f"- {part.replace('_', ' ')}: {told['name']} ({told['format']})" for part, told in parts.items()]
    body = [
        f"# FLUX.2 [klein] for MLX, variant {settings['variant']}",
        "",
        f"Made from {name}{revision} by {settings['made_by']}: {'; '.join(changes)}.",
        "This is an unofficial conversion; its makers are not affiliated with Black Forest Labs.",
        *(["", "Parts from files of their own:", *mixed] if mixed else []),
        "",
        "```sh",
        "pip install klein-mlx",
        'klein-mlx generate --model PATH_OR_REPOSITORY "a red fox in the snow" -o fox.png',
        "```",
        "",
        "## Licence and notices",
        "",
        f"The original model's license is {licence}.",
        *(["It applies here as well: see LICENSE, or https://www.apache.org/licenses/LICENSE-2.0."] if known else []),
        f"Changes: the weight files were modified ({'; '.join(changes)}). klein.json records the source's files and",
        "these, each with its sha256; `klein-mlx info --verify FOLDER` checks them.",
    ]
    return "\n".join([*header, "", *body, ""])


def _text(folder: Path, stem: str) -> str | None:
    """The text of a LICENSE or NOTICE file beside the source's weights, whatever its ending."""
    for path in (folder / stem, folder / f"{stem}.md", folder / f"{stem}.txt"):
        if path.is_file() and path.stat().st_size < 1 << 20:
            return path.read_text(encoding="utf-8", errors="replace")
    return None


def _own_licence() -> str | None:
    """The text of Apache-2.0, as it lies beside this package."""
    try:
        text = metadata.distribution("klein-mlx").read_text(f"licenses/{LICENCE_FILE}")
    except metadata.PackageNotFoundError:
        text = None
    return text or _text(Path(__file__).resolve().parents[2], LICENCE_FILE)


def check_upload(repository: str, token: bool = True) -> None:
    """Raise, before any work, for a name that cannot be and, if a token is needed, for a user who is not logged in."""
    if not HUB_ID.fullmatch(repository):
        raise RequestError(f"upload is {repository[:200]!r}; it must be owner/name")
    from huggingface_hub import get_token

    if token and not get_token():
        raise RequestError("to upload, log in first: `hf auth login` (or set HF_TOKEN)")


def upload(folder: Path, repository: str) -> str:
    """Create the repository if it is not there, and upload the folder. Returns its address."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Upload with klein-mlx")
    except Exception as error:  # the library's errors have no common parent
        raise CheckpointError(f"{repository}: the upload failed ({line_of(error)}); {folder} is complete") from error
    return str(address)
