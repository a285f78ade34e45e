"""The package that writes: `convert_checkpoint` writes any `klein_mlx.weights.checkpoint.Source` in our own format.

The other names are the reader's (klein_mlx.formats): `open_model` opens a whole model, `open_any` a part alone as well,
`describe` says what one is. Nothing of a model's folder is executed, and torch is never needed.
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
