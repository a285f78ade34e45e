"""Short names of models: those of the variants, of repositories that others have quantised, and the user's own."""

from collections.abc import Mapping
from typing import NamedTuple

from klein_mlx.config import VARIANTS
from klein_mlx.errors import nearest


class Alias(NamedTuple):
    """A repository of the Hub. note: one line for lists and before a download."""

    hub_id: str
    note: str


# Quantised with mflux and uploaded by others; their names are known from public pages, their files were not tried here.
_UNVERIFIED = "quantised and uploaded by others; not verified by klein-mlx"

ALIASES = {
    **{row.name: Alias(row.hub_id, f"Black Forest Labs, {row.licence}") for row in VARIANTS if row.hub_id},
    "4b-q4": Alias("mlx-community/flux2-klein-4b-4bit", _UNVERIFIED),
    "4b-q8": Alias("mlx-community/flux2-klein-4b-8bit", _UNVERIFIED),
}


def resolve(model: str, own: Mapping[str, str] | None = None) -> str:
    """The model that a name stands for; a name that is no alias comes back as it is.

    own: the user's aliases, which come before those of the package and may stand for one of them, a hub id or a folder.
    """
    model = (own or {}).get(model, model)
    return ALIASES[model].hub_id if model in ALIASES else model


def suggestion(model: str, own: Mapping[str, str] | None = None) -> str:
    """ "; did you mean ...?" for a word that is nearly an alias, else nothing."""
    near = nearest(model, ["tiny", *ALIASES, *(own or {})])
    return f"; did you mean {near}?" if near else ""
