"""LoRA, DoRA and full training of klein's transformer: `train(options)` is a generator of steps, checkpoints, previews.

Nothing heavy is imported until a name is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from klein_mlx.train.loop import Checkpoint, Preview, TrainStep, train
    from klein_mlx.train.options import TrainOptions

__all__ = ["Checkpoint", "Preview", "TrainOptions", "TrainStep", "train"]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "options" if name == "TrainOptions" else "loop"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
