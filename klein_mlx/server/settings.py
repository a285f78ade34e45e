"""What a server is started with. It knows no HTTP and no MLX."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_BODY = 64 * 1024 * 1024  # bytes of a request
MAX_PIXELS = 50_000_000  # of a picture, read from its header before it is decoded
MAX_PROMPT = 32_000  # characters
MAX_IMAGES = 10  # per request
MAX_REFERENCES = 10


@dataclass(frozen=True)
class Settings:
    """A server's settings.

    model: as `KleinPipeline.from_pretrained` takes it. pipeline: its other arguments, JSON values; "bits" in place of
    "quantize": the arguments of `klein_mlx.weights.bits.from_options`. aliases: other names for the model in
    requests. token: what clients must present, or None. hosts, origins: accepted besides its own. save: folder in
    which every finished picture is kept, or None. queue: jobs that may wait. idle_seconds: after so long without a
    job the worker ends; 0: never. read_seconds: for the header of a request, and for its body beside a second per
    megabyte. any_model: accept any name of a model in requests, such as "gpt-image-1". loras: the LoRA folder; None:
    the usual one.
    """

    model: str
    pipeline: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    save: Path | None = None
    queue: int = 16
    idle_seconds: float = 600.0
    read_seconds: float = 30.0
    any_model: bool = False
    log_prompts: bool = False
    loras: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine can connect."""
        return self.host in LOOPBACK

    @property
    def name(self) -> str:
        """The model's name in replies: no folder of the user's disk is told."""
        return Path(self.model).name if _is_path(self.model) else self.model

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the model in requests, the one of replies first."""
        from klein_mlx.config import NAMED, VARIANTS

        known = [row.name for row in (*VARIANTS, *NAMED.values()) if row.hub_id == self.model]
        aliases = [alias for alias in self.aliases if not _is_path(alias)]
        return tuple(dict.fromkeys([self.name, *aliases, *known, *(f"klein-{name}" for name in known)]))


def _is_path(model: str) -> bool:
    return model.startswith((".", "/", "~"))
