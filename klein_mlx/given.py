"""Arrays that a caller gives or gets: MLX's, numpy's or torch's."""

from typing import TYPE_CHECKING, Any

import mlx.core as mx

from klein_mlx.errors import RequestError

if TYPE_CHECKING:
    import numpy as np


def to_array(what: str, values: Any) -> mx.array:
    """An MLX, numpy or torch array of finite real numbers as an mx.array; RequestError for any other."""
    try:
        if hasattr(values, "detach"):  # torch, whose bfloat16 numpy does not know
            values = values.detach().float().cpu().numpy()
        array = values if isinstance(values, mx.array) else mx.array(to_numpy(values))
    except (TypeError, ValueError, RuntimeError):
        array = mx.array(True)
    if not mx.issubdtype(array.dtype, mx.floating) or not mx.isfinite(array).all().item():
        raise RequestError(f"{what} holds something else than finite real numbers; it must be an array of floats")
    return array


def to_numpy(values: Any) -> "np.ndarray":
    import numpy as np

    return np.array(values)
