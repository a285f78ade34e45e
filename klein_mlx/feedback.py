"""Rounding with error feedback: each column of a weight makes up for the rounding errors of those before it.

A layer's error on its inputs X is tr(E H E^T), with E the weight's error and H = X X^T. With H = M D M^T, M unit upper
triangular, it is the sum over columns k of D_k |(E M)_k|^2, and column k of E M is its own error plus a mixture of
those before it: rounding w_k + (mixture) leaves just the rounding error there. Inputs that go together (H far from
diagonal) make D small against H's diagonal, so the layer's error falls.
Source: Frantar et al., GPTQ (arXiv 2210.17323); Chee et al., QuIP, section 3 (arXiv 2307.13304), whose form this is.
"""

import mlx.core as mx
import numpy as np

from klein_mlx.rounding import Arrays, fit_groups, pack

# What is added to H's diagonal, in shares of its mean: inputs that were never seen count a little. Chosen on prompts
# that calibration had not seen; `aim` moves the weights themselves, so it is damped more.
DAMPING, _AIM_DAMPING = 0.05, 0.1


def damped(moments: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """H with a little of its mean diagonal added. Dead inputs get the mean alone."""
    return moments + np.eye(len(moments), dtype=moments.dtype) * (damping * moments.diagonal().mean() + 1e-12)


def feedback(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """M without its diagonal, and D, of a positive definite H (n, n): (n, n) and (n,)."""
    factor = np.linalg.cholesky(moments[::-1, ::-1])[::-1, ::-1]  # upper triangular: H = factor factor^T
    diagonal = factor.diagonal().copy()
    mixture = factor / diagonal[None, :]
    np.fill_diagonal(mixture, 0)
    return mixture, diagonal**2


def aim(weight: np.ndarray, moments: np.ndarray, drift: np.ndarray) -> np.ndarray:
    """The weight that does best on inputs that have drifted: W + W drift H^-1.

    weight: (rows, n). moments: H of the inputs as they now are. drift: (n, n), sum of (x - x_now) x_now^T, with x the
    inputs as they should be.
    """
    return weight + np.linalg.solve(damped(moments, _AIM_DAMPING), drift.T @ weight.T).T


def round_with_feedback(
    weight: np.ndarray, mixture: np.ndarray, importance: np.ndarray, group_size: int, bits: int, dtype: mx.Dtype
) -> Arrays:
    """Quantise to MLX's affine format.

    weight: (rows, columns) float32. mixture, importance: of `feedback`. dtype: of scales and biases.
    """
    rows, columns = weight.shape
    exact = np.ascontiguousarray(weight.T)  # a column is whole in memory
    importance = np.maximum(importance / importance.mean(), 1e-6)
    errors = np.empty((columns, rows), np.float32)
    codes = np.empty((columns, rows), np.float32)
    scales, biases = [], []
    for start in range(0, columns, group_size):
        group = slice(start, start + group_size)
        block = exact[group] + mixture[:start, group].T @ errors[:start]
        scale, bias = fit_groups(mx.array(block).T, mx.array(importance[group])[None], bits, dtype)
        mx.eval(scale, bias)
        step, low = np.array(scale), np.array(bias)
        inverse = 1 / np.where(np.abs(step) < 1e-12, 1, step)
        inner = mixture[group, group]
        for k in range(group_size):
            code = np.clip(np.rint((block[k] - low) * inverse), 0, 2**bits - 1)
            codes[start + k] = code
            errors[start + k] = exact[start + k] - (step * code + low)
            block[k + 1 :] += np.outer(inner[k, k + 1 :], errors[start + k])
        scales.append(scale)
        biases.append(bias)
    packed = pack(mx.array(codes).T, bits)
    result = packed, mx.stack(scales, axis=1).astype(dtype), mx.stack(biases, axis=1).astype(dtype)
    mx.eval(result)
    return result
