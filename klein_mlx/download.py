"""Before the first use of a model: what would be downloaded, a question, and one bar over all of its files.

The command's side of `hub` and `fetch`: it prints and asks. What is whole on disk is used without a network call.
"""

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from klein_mlx.aliases import ALIASES, resolve
from klein_mlx.config import PARTS, VARIANTS
from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.places import cached_models, own_model, own_models, own_names
from klein_mlx.terminal import has_bar

if TYPE_CHECKING:
    from klein_mlx.hub import Plan


def obtain(
    model: str,
    *,
    revision: str | None = None,
    parts: Collection[str] = PARTS,
    own: Mapping[str, str] | None = None,
    offline: bool = False,
    yes: bool = False,
    quiet: bool = False,
) -> str:
    """See to it that a model is on disk, as far as it is on the Hub; returns what `open_model` is to be given.

    parts: those whose weights are needed. own: short names of the user's; None: the config's. yes: do not ask.
    quiet: print nothing, no bar.
    Raises RequestError if the user does not want it, or cannot be asked; CheckpointError if it cannot be had.
    """
    from klein_mlx.convert.detect import hub_id_of, open_cached
    from klein_mlx.hub import wanted

    name = model
    if not os.path.lexists(model):
        name = resolve(model, own_names() if own is None else own)
        if folder := own_model(name):
            return str(folder)
    hub_id = hub_id_of(name)
    if hub_id is None or offline:
        return hub_id or name
    try:
        open_cached(hub_id, revision, needed=parts)
    except CheckpointError:
        bring(hub_id, wanted(parts), revision=revision, short=model, yes=yes, quiet=quiet)
    return hub_id


def obtain_vae(vae: str, *, offline: bool = False, yes: bool = False, quiet: bool = False) -> str:
    """The same for a VAE from a repository of its own; anything else comes back as it is."""
    from klein_mlx.convert.vae import VAE_FILES, cached_vae, is_hub_vae

    if is_hub_vae(vae) and not offline and cached_vae(vae) is None:
        bring(vae, [name for names in VAE_FILES[:1] for name in names], short=vae, yes=yes, quiet=quiet)
    return vae


def bring(
    hub_id: str,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    short: str | None = None,
    yes: bool = False,
    quiet: bool = False,
) -> None:
    """Say what a download would bring, ask, and fetch it. short: what the user called the model."""
    from klein_mlx.fetch import fetch
    from klein_mlx.hub import is_offline, plan_download

    if is_offline():
        raise CheckpointError(
            f"{hub_id}: is not complete on this machine, and HF_HUB_OFFLINE forbids the network: unset it once, or "
            "copy the model here from a machine that has it"
        )
    plan = plan_download(hub_id, revision=revision, patterns=patterns)
    if not plan.missing:
        return
    plan.check_disk()
    asked = sys.stdin.isatty() and sys.stderr.isatty()
    if not yes and not asked:
        raise RequestError(
            f"{hub_id} is not on this machine: {_gb(plan.bytes)} from {_host()}; add --yes to download it, or first: "
            f"klein-mlx models pull {short or hub_id} (--model tiny needs no download)"
        )
    if not quiet or not yes:
        print("\n".join(facts(plan)), file=sys.stderr)
    if not yes and not _agreed("Download it? [Y/n] "):
        raise RequestError(f"{hub_id} was not downloaded; nothing else was done")
    with_bar(plan, quiet, lambda show: fetch(plan, patterns=patterns, show=show))


def facts(plan: "Plan") -> list[str]:
    """What a person wants to know before a download, a line each."""
    total = sum(plan.sizes.values())
    size = f"{_gb(plan.bytes)} in {len(plan.missing)} files"
    if plan.bytes < total:
        size += f"; {_gb(total - plan.bytes)} are here already"
    row = next((row for row in VARIANTS if row.hub_id == plan.hub_id), None)
    note = next((alias.note for alias in ALIASES.values() if alias.hub_id == plan.hub_id and row is None), None)
    lines = [
        f"{plan.hub_id} is not on this machine yet.",
        f"  from     {_host()}/{plan.hub_id}{f' ({note})' if note else ''}",
        f"  size     {size}",
        f"  into     {plan.folder} ({_gb(plan.free)} free)",
        f"  licence  {plan.licence or 'not stated'}{f' ({row.licence})' if row else ''}",
    ]
    if memory := _memory(plan):
        lines.append(f"  memory   {memory}")
    if here := _here():
        lines.append(here)
    return lines


def _memory(plan: "Plan") -> str | None:
    """What the weights will take, told from the parts' files, and what there is."""
    sizes = {part: sum(size for name, size in plan.sizes.items() if name.startswith(part)) for part in PARTS}
    told = ", ".join(f"{part.replace('_', ' ')} {_gb(size)}" for part, size in sizes.items() if size)
    if not sizes["transformer"] or not sizes["text_encoder"]:
        return None
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"up to {_gb(max(sizes.values()))} of weights at a time ({told}), of {_gb(here)} here; -q 4 takes a third"


def _here() -> str | None:
    """Other models that are on this machine already, and whole."""
    from klein_mlx.convert.detect import open_cached, open_model

    names = []
    for name in (*own_models(), *cached_models()):
        with suppress(CheckpointError):
            (open_model(name) if isinstance(name, Path) else open_cached(name)).files()
            names.append(name.name if isinstance(name, Path) else name)
    return f"  or take  --model {' or --model '.join(names[:3])}: on this machine already" if names else None


def with_bar(plan: "Plan", quiet: bool, work: Callable[[Callable[[int], None]], object]) -> None:
    """Run `work` with a function that shows the bytes that have come, as one bar over all files."""
    from tqdm import tqdm

    options = {"unit": "B", "unit_scale": True, "desc": plan.hub_id.split("/")[-1], "leave": False}
    hidden = quiet or not has_bar(sys.stderr)
    with tqdm(total=plan.bytes, file=sys.stderr, disable=hidden, dynamic_ncols=True, **options) as bar:

        def show(done: int) -> None:
            bar.update(min(done, plan.bytes) - bar.n)

        work(show)


def _agreed(question: str) -> bool:
    print(question, end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    return bool(answer) and answer.strip().lower() in ("", "y", "yes")


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _host() -> str:
    from klein_mlx.hub import endpoint

    return endpoint()
