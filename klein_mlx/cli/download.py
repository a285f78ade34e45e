"""Before the first use of a model: what would be downloaded, a question, and one bar over all of its files.

The command's side of `hub` and `fetch`: it prints and asks. What is whole on disk is used without a network call.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from klein_mlx.cli.output import ask, byte_bar, note
from klein_mlx.config import ALIASES, BASES, PARTS, VARIANTS, resolve
from klein_mlx.errors import CheckpointError, Declined, RequestError, human_bytes
from klein_mlx.paths import cached_models, own_model, own_models, own_names
from klein_mlx.weights.hub import (
    Choice,
    Plan,
    cache_folder,
    download,
    endpoint,
    is_offline,
    plan_download,
    wanted,
    wanted_files,
)

_INTERVAL = 0.1  # seconds between two reports of progress
_PATIENCE = 2.0  # seconds for a child that was told to end
_CHILD = "import sys; sys.path[:] = sys.argv[1:]; from klein_mlx.cli.download import serve; serve()"


def fetch(plan: Plan, *, patterns: Sequence[str], show: Callable[[int], None]) -> Path:
    """Bring what a plan lacks; `show` is called with the bytes that have come so far.

    Returns the folder in the cache. Raises CheckpointError; KeyboardInterrupt passes through, once the child is gone.
    Files that came whole stay in the cache, of the others nothing does.
    """
    request = {"hub_id": plan.hub_id, "revision": plan.revision, "patterns": list(patterns)}
    command = [sys.executable, "-P", "-c", _CHILD, *sys.path]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    result: dict[str, Any] = {}
    with subprocess.Popen(command, text=True, start_new_session=True, **pipes) as child:
        assert child.stdin
        assert child.stdout
        try:
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
            for line in child.stdout:
                result = json.loads(line)
                if "done" in result:
                    show(result["done"])
        except BrokenPipeError:
            pass  # the child is gone: its exit code is told below
        finally:
            _end(child)
    if "folder" in result:
        return Path(result["folder"])
    raise CheckpointError(
        result.get("error") or f"{plan.hub_id}: the download ended by itself (exit code {child.returncode}); try again"
    )


def _end(child: "subprocess.Popen[str]") -> None:
    """Close its stdin, which tells it to end; kill it if it does not."""
    assert child.stdin
    try:
        child.stdin.close()
    except BrokenPipeError:
        pass
    try:
        child.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()


def serve() -> None:
    """Read a request from stdin, download, print what happens; the process ends here."""
    request = json.loads(sys.stdin.readline())
    started = _unfinished(request["hub_id"])
    threading.Thread(target=_end_with_parent, args=(request["hub_id"], started), daemon=True).start()
    try:
        patterns, report = request["patterns"], _Report()
        folder = download(request["hub_id"], revision=request["revision"], patterns=patterns, advance=report)
        _tell({"folder": str(folder)})
    except CheckpointError as error:
        _tell({"error": str(error)})
    sys.stdout.flush()
    os._exit(0)  # no thread is waited for


class _Report:
    """Print the bytes that have come, not too often."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self.last > _INTERVAL:
            self.last = now
            _tell({"done": done})


def _tell(message: dict[str, Any]) -> None:
    try:
        print(json.dumps(message), flush=True)
    except BrokenPipeError:  # the parent is gone: the thread that waits for that deletes the pieces, and ends all
        time.sleep(_PATIENCE)
        os._exit(1)


def _end_with_parent(hub_id: str, started: set[Path]) -> None:
    """Wait until stdin ends; then delete what is unfinished and was not there at the start, and leave."""
    while sys.stdin.read(1):
        pass
    for _ in range(6):  # other threads may just be beginning another file
        for path in _unfinished(hub_id) - started:
            path.unlink(missing_ok=True)
        time.sleep(0.05)
    os._exit(1)


def _unfinished(hub_id: str) -> set[Path]:
    folder = cache_folder() / f"models--{hub_id.replace('/', '--')}" / "blobs"
    return set(folder.glob("*.incomplete"))


class Consent(NamedTuple):
    """How a download may be. offline: there is none. yes: nobody is asked. quiet: nothing is printed, no bar."""

    offline: bool = False
    yes: bool = False
    quiet: bool = False


def obtain(
    model: str,
    *,
    consent: Consent = Consent(),  # noqa: B008
    revision: str | None = None,
    parts: Collection[str] = PARTS,
    own: Mapping[str, str] | None = None,
    tokenizer: bool = True,
) -> str:
    """See to it that a model is on disk, as far as it is on the Hub; returns what `open_model` is to be given.

    parts: those whose weights are needed. own: short names of the user's; None: the config's. tokenizer: whether a
    model that is one file needs one.
    Raises RequestError if the user does not want it, or cannot be asked; CheckpointError if it cannot be had.
    """
    from klein_mlx.formats.open import (
        TOKENIZERS,
        held_parts,
        hub_id_of,
        hub_part,
        on_disk,
        open_cached,
        single_file,
        tokenizer_beside,
        tokenizer_kind,
    )

    own = own_names() if own is None else own
    if here := on_disk(model, own, revision):
        return here
    name = model if os.path.lexists(model) else resolve(model, own)
    if (hub := hub_part(name)) and hub[1]:
        name = str(_obtain_file(hub[0], hub[1], revision, consent) or name)
    hub_id = hub_id_of(name)
    file = single_file(name) if tokenizer and not consent.offline else None
    if file and set(parts) <= set(held_parts(file)) and tokenizer_beside(file) is None:
        who, repository = TOKENIZERS[tokenizer_kind(file)]
        told = f"put {who}'s tokenizer.json beside {file}"
        try:
            bring(repository, ["tokenizer/tokenizer.json"], consent=consent, instead=told)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: has no tokenizer; {told} ({error})") from None
    if hub_id is None or consent.offline:
        return hub_id or name
    try:
        open_cached(hub_id, revision, needed=parts)
    except CheckpointError:
        bring_model(hub_id, parts, consent=consent, revision=revision, short=model)
    return hub_id


def _obtain_file(hub_id: str, file: str, revision: str | None, consent: Consent) -> Path | None:
    """A model that is one file of a repository; None where it is not in the cache, and no network is to be used."""
    from klein_mlx.formats.open import cached_part, choose_part

    if not (found := cached_part("model", hub_id, file, revision)) and not consent.offline:
        told = {"revision": revision, "instead": "download it yourself, and give its path"}
        bring(hub_id, lambda names: choose_part("model", names, hub_id, file)[0], consent=consent, **told)
        found = cached_part("model", hub_id, file, revision)
    return found


def bring_model(
    hub_id: str,
    parts: Collection[str] = PARTS,
    *,
    consent: Consent,
    revision: str | None = None,
    short: str | None = None,
) -> None:
    """What `bring` does for a model's files, and for those of another repository that it is built on."""
    from klein_mlx.formats.open import open_cached

    if base := BASES.get(hub_id):
        others = [part for part in parts if part != "transformer"]
        try:
            open_cached(base, needed=others)
        except CheckpointError:
            bring(base, partial(wanted_files, parts=others), consent=consent, short=short)
    choice = wanted(parts, hub_id) if base else partial(wanted_files, parts=parts)
    bring(hub_id, choice, consent=consent, revision=revision, short=short)


def obtain_part(
    part: str,
    value: str,
    *,
    consent: Consent = Consent(),  # noqa: B008
    own: Mapping[str, str] | None = None,
) -> str:
    """The same for a part from a place of its own; returns what `find_part` is to be given."""
    from klein_mlx.formats.open import cached_part, choose_part, hub_part

    if os.path.lexists(value):
        return value
    value = resolve(value, own_names() if own is None else own)
    if folder := own_model(value):
        return str(folder)
    hub = hub_part(value)
    if hub is None or consent.offline or cached_part(part, *hub):
        return value
    hub_id, file = hub
    bring(hub_id, lambda names: choose_part(part, names, hub_id, file)[0], consent=consent, short=value)
    return value


def bring(
    hub_id: str,
    choice: Choice,
    *,
    consent: Consent,
    revision: str | None = None,
    short: str | None = None,
    instead: str | None = None,
) -> None:
    """Say what a download would bring, ask, and fetch it. short: what the user called the model; instead: what to do
    where it is not to be downloaded, if that is not to pull the model first."""
    if is_offline():
        raise CheckpointError(
            f"{hub_id}: is not (fully) on this machine, and HF_HUB_OFFLINE forbids the network: unset it once, or "
            "copy the model here from a machine that has it"
        )
    plan = plan_download(hub_id, revision=revision, choice=choice)
    if not plan.missing:
        return
    plan.check_disk()
    asked = sys.stdin.isatty() and sys.stderr.isatty()
    if not consent.yes and not asked:
        instead = instead or f"first: klein-mlx models pull {short or hub_id} (--model tiny needs no download)"
        raise RequestError(
            f"{hub_id} is not on this machine: {human_bytes(plan.bytes)} from {endpoint()}; "
            f"add --yes to download it, or {instead}"
        )
    if not consent.quiet or not consent.yes:
        note(*facts(plan))
    answer = "yes" if consent.yes else ask("Download it? [Y/n]")  # nothing at all at stdin's end
    if not answer or answer.strip().lower() not in ("", "y", "yes"):
        raise Declined(f"{hub_id} was not downloaded; nothing else was done")
    with byte_bar(plan.hub_id.split("/")[-1], consent.quiet, plan.bytes) as show:
        fetch(plan, patterns=[escape(name) for name in plan.sizes], show=lambda done: show(done, plan.bytes))


def facts(plan: Plan) -> list[str]:
    """What a person wants to know before a download, a line each."""
    total = sum(plan.sizes.values())
    size = f"{human_bytes(plan.bytes)} in {len(plan.missing)} files"
    if plan.bytes < total:
        size += f"; {human_bytes(total - plan.bytes)} are here already"
    row = next((row for row in VARIANTS if row.hub_id == plan.hub_id), None)
    note = next((alias.note for alias in ALIASES.values() if alias.hub_id == plan.hub_id and row is None), None)
    lines = [
        f"{plan.hub_id} is not on this machine yet.",
        f"  from     {endpoint()}/{plan.hub_id}{f' ({note})' if note else ''}",
        f"  size     {size}",
        f"  into     {plan.folder} ({human_bytes(plan.free)} free)",
        f"  license  {plan.licence or 'not stated'}{f' ({row.licence})' if row else ''}",
    ]
    if memory := _memory(plan):
        lines.append(f"  memory   {memory}")
    if here := _here():
        lines.append(here)
    return lines


def _memory(plan: Plan) -> str | None:
    """What the weights will take, told from the parts' files, and what there is."""
    sizes = {part: sum(size for name, size in plan.sizes.items() if name.startswith(part)) for part in PARTS}
    told = ", ".join(f"{part.replace('_', ' ')} {human_bytes(size)}" for part, size in sizes.items() if size)
    if not sizes["transformer"] or not sizes["text_encoder"]:
        return None
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    most = human_bytes(max(sizes.values()))
    less = "; with -q 4 about a third of it" if any(row.hub_id == plan.hub_id for row in VARIANTS) else ""
    return f"needs about {most} of {human_bytes(here)} at a time ({told}){less}"


def _here() -> str | None:
    """Other models that are on this machine already, and whole."""
    from klein_mlx.formats.open import open_cached, open_model

    names = []
    for name in (*own_models(), *cached_models()):
        with suppress(CheckpointError):
            (open_model(name, local_files_only=True) if isinstance(name, Path) else open_cached(name)).files()
            names.append(name.name if isinstance(name, Path) else name)
    return f"  or take  --model {' or --model '.join(names[:3])}: on this machine already" if names else None
