"""FLUX.2 [klein] on Apple silicon: text to image and editing, natively in MLX.

`from klein_mlx import KleinPipeline` is the whole entry point; importing the package itself loads nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from klein_mlx.errors import CheckpointError, KleinError, RequestError

if TYPE_CHECKING:
    from klein_mlx.images.saving import save_image as save
    from klein_mlx.pipeline import KleinPipeline
    from klein_mlx.runtime.run import KleinOutput, Picture, Step

    __version__: str

__all__ = [
    "CheckpointError",
    "KleinError",
    "KleinOutput",
    "KleinPipeline",
    "Picture",
    "RequestError",
    "Step",
    "__version__",
    "save",
]

_LAZY = {
    "KleinOutput": ("klein_mlx.runtime.run", "KleinOutput"),
    "KleinPipeline": ("klein_mlx.pipeline", "KleinPipeline"),
    "Picture": ("klein_mlx.runtime.run", "Picture"),
    "Step": ("klein_mlx.runtime.run", "Step"),
    "save": ("klein_mlx.images.saving", "save_image"),
}


def __getattr__(name: str) -> Any:
    """Import the pipeline, and MLX with it, only when first used."""
    if name == "__version__":
        from klein_mlx.paths import version

        return version()
    if name in _LAZY:
        module, attribute = _LAZY[name]
        return getattr(import_module(module), attribute)
    hint = "; use KleinPipeline" if name.endswith("Pipeline") else ""
    hint = "; pictures are given as paths, PIL images or arrays" if name == "load_image" else hint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted(__all__)
