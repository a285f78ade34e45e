"""FLUX.2 [klein] on Apple silicon: text to picture and editing, natively in MLX.

`from klein_mlx import KleinPipeline` is the whole entry point; importing the package itself loads nothing heavy.
"""

from typing import TYPE_CHECKING, Any

from klein_mlx.errors import CheckpointError, KleinError, RequestError

if TYPE_CHECKING:
    from klein_mlx.pipeline import KleinPipeline
    from klein_mlx.saving import save_image as save

__version__ = "0.1.0"
__all__ = ["CheckpointError", "KleinError", "KleinPipeline", "RequestError", "__version__", "save"]


def __getattr__(name: str) -> Any:
    """Import the pipeline, and MLX with it, only when it is first asked for."""
    if name == "KleinPipeline":
        from klein_mlx.pipeline import KleinPipeline

        return KleinPipeline
    if name == "save":
        from klein_mlx.saving import save_image

        return save_image
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
