"""Prompt embeddings on disk, so that a prompt of yesterday loads no encoder.

One safetensors file per prompt, named by a digest of all that decides the embeddings: the encoder's files, how they
are loaded, the prompt, its length. The prompt itself stands in no file. A file that is damaged is not used.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.places import cache_folder
from klein_mlx.weights import is_finite, read_header, read_metadata

MAX_BYTES = 1 << 30  # of all entries; the ones that were used longest ago go first
_SAMPLES, _SAMPLE = 256, 4096  # of a file too large to be read whole
_SUFFIX = ".prompt.safetensors"


def digest_files(paths: Sequence[Path]) -> str:
    """Tells files of weights apart without reading gigabytes: by length, their first megabyte, and samples all over."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            for number in range(_SAMPLES):
                file.seek(size * number // _SAMPLES)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


class PromptCache:
    """A folder of embeddings.

    folder: made when the first entry is written; True: this program's place for what can be made again. encoder: all
    that decides the embeddings besides the prompt, as plain values.
    Raises RequestError if the folder cannot be one.
    """

    def __init__(self, folder: "Path | str | bool", encoder: Mapping[str, Any]):
        place = cache_folder() if folder is True else Path(os.path.expanduser(str(folder)))
        if place is None:
            raise RequestError("prompt_cache has no folder: there is no home; name one")
        self.folder = place / "prompts" if folder is True else place
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise RequestError(f"prompt_cache is {str(self.folder)!r}, which is not a folder; name one")
        self._encoder = json.dumps(encoder, sort_keys=True)

    def path(self, prompt: str, length: int) -> Path:
        """Where a prompt's embeddings of so many text positions are, or would be."""
        key = hashlib.sha256(json.dumps([self._encoder, prompt, length]).encode("utf-8", "surrogatepass"))
        return self.folder / f"{key.hexdigest()}{_SUFFIX}"

    def read(self, prompt: str, length: int, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array | None:
        """The embeddings, evaluated; None if they are not there. Raises CheckpointError for a damaged entry."""
        path = self.path(prompt, length)
        if not path.exists():
            return None
        entry = read_header(path).get("embeds")
        if entry is None or entry.shape != shape:
            raise CheckpointError(f"{path}: does not hold embeddings of shape {shape}")
        try:
            embeds = mx.load(str(path))["embeds"]  # type: ignore[index]
            mx.eval(embeds)
        except RuntimeError:
            raise CheckpointError(f"{path}: cannot be read") from None
        sound = embeds.dtype == dtype and is_finite(embeds).item() and _digest(embeds) == _told(path)
        if not sound:
            raise CheckpointError(f"{path}: is damaged")
        os.utime(path)  # it was used
        return embeds

    def write(self, prompt: str, length: int, embeds: mx.array) -> None:
        """Keep them: written beside, flushed, put into place; then the oldest go. Raises OSError."""
        path = self.path(prompt, length)
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{secrets.token_hex(8)}.safetensors")
        try:
            mx.save_safetensors(str(beside), {"embeds": embeds}, {"sha256": _digest(embeds)})
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
            beside.replace(path)
        except RuntimeError as error:  # MLX's, of a full disk
            raise OSError(str(error)) from None
        finally:
            beside.unlink(missing_ok=True)
        self._shrink(path)

    def _shrink(self, newest: Path) -> None:
        """Remove what was used longest ago, until the folder is within its bound."""
        entries = sorted(
            ((p.stat().st_mtime_ns, p.stat().st_size, p) for p in self.folder.glob(f"*{_SUFFIX}") if p != newest),
            reverse=True,
        )
        total = newest.stat().st_size
        for _, size, path in entries:
            total += size
            if total > MAX_BYTES:
                path.unlink(missing_ok=True)


def _digest(embeds: mx.array) -> str:
    import numpy as np

    return hashlib.sha256(np.array(embeds.reshape(-1).view(mx.uint8)).tobytes()).hexdigest()


def _told(path: Path) -> str | None:
    return read_metadata(path).get("sha256")
