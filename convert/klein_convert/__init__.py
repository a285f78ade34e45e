"""Everything that knows a foreign file: PyTorch-side weights in, MLX weights out.

`open_model` finds out what a model argument is and opens it as a `klein_mlx.checkpoint.Source`, `open_any` a part
alone as well; `convert_checkpoint` writes any Source in our own format; `describe` says what one is. Nothing of a
model's folder is executed, and torch is never needed.
"""

from klein_convert.checkpoint import convert_checkpoint
from klein_mlx.formats.describe import describe, format_description
from klein_mlx.formats.open import SMALL_DECODER, find_part, open_any, open_model

__all__ = [
    "SMALL_DECODER",
    "convert_checkpoint",
    "describe",
    "find_part",
    "format_description",
    "open_any",
    "open_model",
]
