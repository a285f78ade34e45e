"""Everything that knows a foreign file: PyTorch-side weights in, MLX weights out.

`open_model` finds out what a model argument is and opens it as a `klein_mlx.checkpoint.Source`; `convert_checkpoint`
writes any Source in our own format; `describe` says what one is. Nothing of a model's folder is executed, and torch is
never needed.
"""

from klein_mlx.convert.detect import open_model
from klein_mlx.convert.folder import convert_checkpoint
from klein_mlx.convert.info import describe, format_description

__all__ = ["convert_checkpoint", "describe", "format_description", "open_model"]
