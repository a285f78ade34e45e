"""The Hugging Face Hub: what of a repository is wanted, what of it is on disk, and every failure as a line.

It knows repositories, files and bytes, not models; nothing is printed or asked here. The library `huggingface_hub` is
imported when it is first needed.
"""

import errno
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klein_mlx.config import BASES, PARTS, TRANSFORMER_FILE, gated_notice
from klein_mlx.errors import CheckpointError, human_bytes, short
from klein_mlx.paths import precision_of

WEIGHTS = (".safetensors", ".gguf")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
HUB_FILE = re.compile(rf"({HUB_ID.pattern})(?:/(.+))?", re.ASCII)  # a file of a repository
MARGIN = 256 << 20  # bytes that stay free on the disk: for the file system, and for what else is written meanwhile
NO_NETWORK = (
    "the network is not to be used: drop --offline (or HF_HUB_OFFLINE), or copy it here from a machine that has it"
)


Choice = Sequence[str] | Callable[[Sequence[str]], Sequence[str]]  # patterns, or a function of all names to some


def wanted(parts: Collection[str] = PARTS, hub_id: str = "") -> list[str]:
    """Patterns of the files that a model is read from, in diffusers' layout or ours; of the weights, these parts' only.

    Anchored to the tree: a second copy of the weights in a single file at the root stays where it is. hub_id: a
    repository of BASES has that file only.
    """
    if hub_id in BASES:
        return ["LICENSE*", "NOTICE*", *([TRANSFORMER_FILE] if "transformer" in parts else [])]
    weights = [f"{part}{end}/*.safetensors" for part in PARTS if part in parts for end in ("", "-*")]
    ours = [f"{part}{end}" for part in PARTS if part in parts for end in (".safetensors*", "-*-of-*.safetensors")]
    configs = [f"{folder}/*.json" for folder in ("scheduler", "tokenizer", *PARTS, *(f"{part}-*" for part in PARTS))]
    return ["model_index.json", "LICENSE*", "NOTICE*", *configs, *weights, "klein.json", "tokenizer.json", *ours]


def wanted_files(names: Sequence[str], parts: Collection[str] = PARTS) -> list[str]:
    """Of a repository's files those that a model is read from: as `wanted`, without what would come twice."""
    from huggingface_hub.utils import filter_repo_objects

    found = list(filter_repo_objects(names, allow_patterns=wanted(parts)))
    whole = [part for part in PARTS if any(name.startswith(f"{part}/") for name in found)]
    found = [name for name in found if not ("/" in name and name.startswith(tuple(f"{part}-" for part in whole)))]
    return without_copies(found)


def without_copies(names: Sequence[str]) -> list[str]:
    """Without the files that state their precision (`variant="fp16"`) in folders that have the plain ones as well."""
    plain = {Path(name).parent for name in names if name.endswith(".safetensors") and not precision_of(name)}
    return [name for name in names if not (precision_of(name) and Path(name).parent in plain)]


def cache_folder() -> Path:
    """Where `huggingface_hub` keeps what it downloads (HF_HOME, HF_HUB_CACHE)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_offline() -> bool:
    """Whether the environment forbids the network (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def download(
    hub_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    patterns: Sequence[str] | None = None,
    advance: Callable[[int], None] | None = None,
) -> Path:
    """The folder of a Hub repository in the local cache, fetched first unless `local_files_only`.

    patterns: only files that match are fetched; by default those of `wanted`. advance: called with the bytes that have
    come so far, from several threads; the library's own progress bars are not shown then. Before a gated,
    non-commercial model is fetched, that is said in a warning of the logger `klein_mlx`, with the way to give a token.
    Every failure is a CheckpointError that names the remedy.
    """
    if not local_files_only and not advance and (notice := gated_notice(hub_id)):
        logging.getLogger("klein_mlx").warning(notice)
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silenced = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if silenced:
        disable_progress_bars()
    bars: dict[str, Any] = {"tqdm_class": _counter(advance)} if advance else {}
    try:
        folder = snapshot_download(
            hub_id,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=list(patterns or wanted()),
            **bars,
        )
    except Exception as error:  # the library's errors have no common parent
        raise CheckpointError(f"{hub_id}: {reason(error, revision)}") from error
    finally:
        if silenced:
            enable_progress_bars()
    return Path(folder)


def list_files(hub_id: str, *, revision: str | None = None, token: str | None = None) -> list[str]:
    """The names of a repository's files, as the Hub says. Errors as in `download`."""
    from huggingface_hub import HfApi

    try:
        names = list(HfApi(token=token).list_repo_files(hub_id, revision=revision))
    except Exception as error:  # as above
        raise CheckpointError(f"{hub_id}: {reason(error, revision)}") from error
    return [checked_name(hub_id, name) for name in names]


def checked_name(hub_id: str, name: object) -> str:
    """A file's name as the Hub states it, if it stays inside of the repository; else a CheckpointError."""
    parts = name.replace("\\", "/").split("/") if isinstance(name, str) else [".."]
    if not all(parts) or {".", ".."} & set(parts) or ":" in parts[0] or "\0" in str(name):
        raise CheckpointError(f"{hub_id}: lists a file named {short(name)}, which is not a path inside of it")
    return str(name)


@dataclass(frozen=True)
class Plan:
    """What a download would bring. sizes: bytes of every wanted file. missing: those that are not on disk yet.
    folder: the cache that they go into. free: bytes on its disk. licence: as the repository states it, or None.
    """

    hub_id: str
    revision: str | None
    sizes: dict[str, int]
    missing: tuple[str, ...]
    folder: Path
    free: int
    licence: str | None

    @property
    def bytes(self) -> int:
        """What is still to come."""
        return sum(self.sizes[name] for name in self.missing)

    def check_disk(self) -> None:
        """CheckpointError if the folder cannot be written to, or its disk is too small; `huggingface_hub` itself would
        tell the one late, and only warn of the other."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise CheckpointError(
                f"{self.hub_id}: {self.folder} is not writable for you ({error.strerror}); set HF_HOME to a folder of "
                "your own"
            ) from None
        if self.bytes + MARGIN > self.free:
            raise CheckpointError(
                f"{self.hub_id}: {human_bytes(self.bytes + MARGIN)} are needed in {self.folder}, and "
                f"{human_bytes(self.free)} are free: free some (klein-mlx models rm), or set HF_HOME to a larger disk"
            )


def plan_download(
    hub_id: str, *, revision: str | None = None, token: str | None = None, choice: Choice = wanted_files
) -> Plan:
    """Ask the Hub what a repository holds; nothing is fetched. choice: which of its files are wanted, a model's by
    default. CheckpointError with the remedy for every failure.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects

    try:
        api = HfApi(token=token)
        info = api.model_info(hub_id, revision=revision, files_metadata=True)
        if info.gated:
            api.auth_check(hub_id)
    except Exception as error:  # as above
        raise CheckpointError(f"{hub_id}: {reason(error, revision)}") from error
    listed = {checked_name(hub_id, file.rfilename): file.size for file in info.siblings or ()}
    found = {name: size if isinstance(size, int) and size > 0 else 0 for name, size in listed.items()}
    names = list(choice(list(found)) if callable(choice) else filter_repo_objects(found, allow_patterns=list(choice)))
    if callable(choice) and not any(name.endswith(WEIGHTS) for name in names):
        raise CheckpointError(
            f"{hub_id}: has no weights in diffusers' layout or ours; give it as --transformer, --text-encoder or "
            f"--vae, or a file of it as --model {hub_id}/FILE"
        )
    here = {name for name in names if isinstance(try_to_load_from_cache(hub_id, name, revision=info.sha), str)}
    missing = tuple(name for name in names if name not in here)
    card = info.card_data
    licence = (card.get("license_name") or card.get("license")) if card else None
    folder = cache_folder()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    sizes = {name: found[name] for name in names}
    return Plan(hub_id, revision, sizes, missing, folder, free, str(licence) if licence else None)


def _counter(advance: Callable[[int], None]) -> type:
    """A stand-in for the library's progress bars that shows nothing and hands on the bytes.

    The library counts bytes twice, as they come over the network and as they are written; the larger count is told.
    """
    from tqdm import tqdm

    class Counter(tqdm):  # type: ignore[type-arg]
        counts: dict[int, float] = {}

        def __init__(self, *args: Any, **options: Any):
            self.counted = options.get("unit") == "B"
            super().__init__(*args, **{**options, "disable": True})
            self.total = options.get("total") or 0
            self.update(options.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            if self.counted:
                self.counts[id(self)] = self.counts.get(id(self), 0) + (n or 0)
                advance(int(max(self.counts.values())))

        def set_postfix_str(self, *args: Any, **options: Any) -> None: ...

    Counter.counts = {}
    return Counter


def reason(error: BaseException, revision: str | None = None) -> str:
    """What went wrong and what would help, in one line. error: anything that `huggingface_hub` may raise."""
    from huggingface_hub import errors

    cause = error.__cause__ or error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    text = f"{error} {cause}"
    if isinstance(error, errors.GatedRepoError) or (status == 403 and "storage" not in text):
        return "is gated: accept its license on huggingface.co, then `hf auth login` (or set HF_TOKEN)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or your token may not see it: check the spelling, or `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision!r}; give one that its page lists, or none"
    if isinstance(error, errors.HFValidationError):
        return "is not a repository's name; it must be owner/name"
    if status is not None:
        return _status_reason(status)
    if isinstance(error, errors.LocalEntryNotFoundError) and (cause is error or "Offline" in type(cause).__name__):
        return f"is not (fully) in {cache_folder()}, and {NO_NETWORK}"
    return _disk_reason(cause) or _network_reason(cause, text)


def _status_reason(status: int) -> str:
    if status == 401:
        from huggingface_hub import get_token

        if get_token() is None:
            return "is not there, or not for everybody: check the spelling, or `hf auth login`"
        return "the Hub refused your token: `hf auth login` with a new one (or unset HF_TOKEN)"
    if status == 429:
        return "too many requests (the Hub answered 429): wait some minutes, or `hf auth login` for a higher limit"
    if status >= 500:
        return f"the Hub has a problem (it answered {status}): try again later"
    return f"the Hub answered {status}: check HF_ENDPOINT and the proxy, if you have set them"


def _disk_reason(cause: BaseException) -> str | None:
    code = cause.errno if isinstance(cause, OSError) else None
    if code == errno.ENOSPC:
        return f"the disk of {cache_folder()} is full; free some space, or set HF_HOME to a larger disk"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return f"{cache_folder()} is not writable for you; set HF_HOME to a folder of your own"
    return None


def endpoint() -> str:
    """The Hub's address (HF_ENDPOINT)."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def _network_reason(cause: BaseException, text: str) -> str:
    kinds = {kind.__name__ for kind in type(cause).__mro__}
    told = " ".join(str(cause).split())[:120]
    if "ProxyError" in kinds:
        return f"the proxy refused ({told}): check HTTPS_PROXY"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return "the connection is not what it says (TLS certificate): check the clock, the proxy, SSL_CERT_FILE"
    if kinds & {"ConnectError", "TimeoutException", "ConnectionError", "ConnectTimeout", "ReadTimeout"}:
        proxy = next((name for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY") if os.environ.get(name)), None)
        also = f" and {proxy}" if proxy else ""
        host = endpoint().partition("://")[2] or endpoint()
        reason = told or type(cause).__name__
        return f"cannot reach {host} ({reason}): check your connection{also}, or use --model FOLDER"
    if kinds & {"UnsupportedProtocol", "InvalidURL"}:
        return f"HF_ENDPOINT is {endpoint()!r}; it must be a URL such as https://huggingface.co"
    if "Consistency check failed" in text or kinds & {"RemoteProtocolError", "ReadError", "IncompleteRead"}:
        return "the connection broke in the middle of a file: run it again (files that are whole are kept)"
    if kinds & {"JSONDecodeError", "FileMetadataError"} or "X-Repo-Commit" in text:
        return "what answered is not the Hub (a network's login page?): open a web page first, or check HF_ENDPOINT"
    return f"the download failed ({type(cause).__name__}: {told}); check the network and try again"
