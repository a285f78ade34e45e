"""A VAE in place of a model's own: FLUX.2's small decoder from the Hub, or any file or folder."""

import os
from pathlib import Path

from klein_mlx.errors import CheckpointError
from klein_mlx.hub import download

SMALL_DECODER = "black-forest-labs/FLUX.2-small-decoder"  # Apache-2.0: the full encoder, a decoder of fewer channels

_DIFFUSERS = ("config.json", "diffusion_pytorch_model.safetensors")
VAE_FILES = (_DIFFUSERS, ("full_encoder_small_decoder.safetensors",))  # the layouts of a VAE's repository, best first


def find_vae(vae: str | Path, *, token: str | None = None, local_files_only: bool = False) -> Path:
    """The path of a VAE's file or folder; a Hub id that is no path is fetched first, unless it is in the cache.

    Raises CheckpointError if the Hub has no such repository, or no VAE in it.
    """
    if not is_hub_vae(vae):
        return Path(os.path.expanduser(vae))
    if found := cached_vae(str(vae)):
        return found
    for patterns in VAE_FILES:
        folder = download(str(vae), token=token, local_files_only=local_files_only, patterns=patterns)
        if (folder / patterns[-1]).exists():
            return _found(folder, patterns)
    raise CheckpointError(f"{vae}: holds no {_DIFFUSERS[-1]}; give a repository that is a VAE, as {SMALL_DECODER}")


def is_hub_vae(vae: str | Path) -> bool:
    """Whether this names a repository of the Hub, and no path."""
    text, path = str(vae), Path(os.path.expanduser(vae))
    return not (isinstance(vae, Path) or path.exists() or text.startswith((".", "/", "~")) or text.count("/") != 1)


def cached_vae(hub_id: str) -> Path | None:
    """A repository's VAE, if it is whole in the local cache; no network call is made."""
    for patterns in VAE_FILES:
        try:
            folder = download(hub_id, local_files_only=True, patterns=patterns)
        except CheckpointError:
            continue
        if (folder / patterns[-1]).exists():
            return _found(folder, patterns)
    return None


def _found(folder: Path, patterns: tuple[str, ...]) -> Path:
    return folder if patterns == _DIFFUSERS else folder / patterns[-1]
