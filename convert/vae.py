"""A VAE in place of a model's own: FLUX.2's small decoder from the Hub, or any file or folder."""

import os
from pathlib import Path

from klein_mlx.checkpoint import download
from klein_mlx.errors import CheckpointError

SMALL_DECODER = "black-forest-labs/FLUX.2-small-decoder"  # Apache-2.0: the full encoder, a decoder of fewer channels

_DIFFUSERS = ("config.json", "diffusion_pytorch_model.safetensors")
_SINGLE_FILE = "full_encoder_small_decoder.safetensors"


def find_vae(vae: str | Path, *, token: str | None = None, local_files_only: bool = False) -> Path:
    """The path of a VAE's file or folder; a Hub id that is no path is fetched first.

    Raises CheckpointError if the Hub has no such repository, or no VAE in it.
    """
    path = Path(os.path.expanduser(vae))
    if isinstance(vae, Path) or path.exists() or str(vae).startswith((".", "/", "~")) or str(vae).count("/") != 1:
        return path
    for patterns in (_DIFFUSERS, (_SINGLE_FILE,)):
        folder = download(vae, token=token, local_files_only=local_files_only, patterns=patterns)
        if (folder / patterns[-1]).exists():
            return folder if patterns == _DIFFUSERS else folder / _SINGLE_FILE
    raise CheckpointError(f"{vae}: holds no {_DIFFUSERS[-1]}; give a repository that is a VAE, as {SMALL_DECODER}")
