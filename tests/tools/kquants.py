"""llama.cpp's K-quants, for comparison: gguf-py decodes these types but cannot write them.

The published method, with its searches and constants: ggml-quants.c, make_qkx2_quants (Q4_K, Q5_K) and make_qx_quants
(Q6_K), without an importance matrix, as the files on the Hub are made; vectorised over blocks of 256.
"""

import numpy as np

QK = 256
SIZES = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}  # bytes per 256 weights


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """values: (rows, columns), columns a multiple of 256. Returns (rows, bytes) uint8."""
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, QK)
    step = 1 << 14
    pieces = [_ENCODERS[kind](blocks[i : i + step]) for i in range(0, len(blocks), step)]
    return np.concatenate(pieces).reshape(len(values), -1)


def _with_minimum(x: np.ndarray, levels: int, first: float, tries: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales and (negated) minimums of groups x (n, 32), weights |x| + rms: make_qkx2_quants."""
    weights = np.sqrt((x * x).mean(-1, keepdims=True)) + np.abs(x)
    low, high = np.minimum(x.min(-1), 0), x.max(-1)
    flat = high <= low
    span = np.where(flat, 1, high - low)
    scale = span / levels
    codes = np.clip(np.rint((x - low[:, None]) / scale[:, None]), 0, levels)
    best = (weights * (scale[:, None] * codes + low[:, None] - x) ** 2).sum(-1)
    total, mean = weights.sum(-1), (weights * x).sum(-1)
    for index in range(tries + 1):
        inverse = (first + 0.1 * index + levels) / np.where(high > low, high - low, 1)
        codes = np.clip(np.rint(inverse[:, None] * (x - low[:, None])), 0, levels)
        one, two = (weights * codes).sum(-1), (weights * codes * codes).sum(-1)
        cross = (weights * codes * x).sum(-1)
        determinant = total * two - one * one
        safe = np.where(determinant > 0, determinant, 1)
        new_scale, new_low = (total * cross - mean * one) / safe, (two * mean - one * cross) / safe
        positive = new_low > 0
        new_low = np.where(positive, 0, new_low)
        new_scale = np.where(positive, cross / np.where(two > 0, two, 1), new_scale)
        error = (weights * (new_scale[:, None] * codes + new_low[:, None] - x) ** 2).sum(-1)
        better = (determinant > 0) & (error < best)
        scale, low, best = (
            np.where(better, new_scale, scale),
            np.where(better, new_low, low),
            np.where(better, error, best),
        )
    return np.where(flat, 0, scale), -low


def _super(blocks: np.ndarray, levels: int, first: float, tries: int) -> tuple[np.ndarray, ...]:
    """d, dmin (n, 1) float16; the 6-bit scales and minimums (n, 8); codes (n, 256)."""
    x = blocks.reshape(-1, 32)
    scales, minimums = (a.reshape(-1, 8) for a in _with_minimum(x, levels, first, tries))
    top, top_min = scales.max(-1, keepdims=True), minimums.max(-1, keepdims=True)
    six = np.clip(np.rint(scales * (63 / np.where(top > 0, top, 1))), 0, 63).astype(np.uint8)
    six_min = np.clip(np.rint(minimums * (63 / np.where(top_min > 0, top_min, 1))), 0, 63).astype(np.uint8)
    d, dmin = (top / 63).astype(np.float16), (top_min / 63).astype(np.float16)
    step, low = d.astype(np.float32) * six, dmin.astype(np.float32) * six_min
    grouped = blocks.reshape(-1, 8, 32)
    codes = np.rint((grouped + low[..., None]) / np.where(step > 0, step, np.inf)[..., None])
    return d, dmin, six, six_min, np.clip(codes, 0, levels).astype(np.uint8).reshape(-1, QK)


def _six_bit(scales: np.ndarray, minimums: np.ndarray) -> np.ndarray:
    """Twice eight 6-bit numbers in 12 bytes."""
    first = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    second = minimums[:, :4] | ((minimums[:, 4:] >> 4) << 6)
    third = (scales[:, 4:] & 15) | ((minimums[:, 4:] & 15) << 4)
    return np.concatenate([first, second, third], axis=1)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    pairs = codes.reshape(-1, 4, 2, 32)
    return ((pairs[:, :, 0] & 15) | ((pairs[:, :, 1] & 15) << 4)).reshape(-1, 128)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    d, dmin, scales, minimums, codes = _super(blocks, 15, -1.0, 20)
    return np.concatenate([d.view(np.uint8), dmin.view(np.uint8), _six_bit(scales, minimums), _nibbles(codes)], axis=1)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    d, dmin, scales, minimums, codes = _super(blocks, 31, -0.5, 15)
    bits = (codes >> 4).reshape(-1, 8, 32)
    high = np.zeros((len(blocks), 32), np.uint8)
    for index in range(8):
        high |= bits[:, index] << index
    arrays = [d.view(np.uint8), dmin.view(np.uint8), _six_bit(scales, minimums), high, _nibbles(codes)]
    return np.concatenate(arrays, axis=1)


def _symmetric(x: np.ndarray, levels: int) -> np.ndarray:
    """Scales of groups x (n, 16), errors weighted by x^2: make_qx_quants with rmse_type 1."""
    top = np.take_along_axis(x, np.abs(x).argmax(-1)[:, None], -1)[:, 0]
    safe = np.where(np.abs(top) > 1e-15, top, 1)
    weights = x * x

    def fit(shift: float) -> tuple[np.ndarray, np.ndarray]:
        codes = np.clip(np.rint(-(levels + shift) / safe[:, None] * x), -levels, levels - 1)
        return (weights * x * codes).sum(-1), (weights * codes * codes).sum(-1)

    cross, square = fit(0)
    scale = np.where(square > 0, cross / np.where(square > 0, square, 1), 0)
    best = scale * cross
    for index in (*range(-9, 0), *range(1, 10)):
        cross, square = fit(0.1 * index)
        better = (square > 0) & (cross * cross > best * square)
        scale = np.where(better, cross / np.where(square > 0, square, 1), scale)
        best = np.where(better, scale * cross, best)
    return np.where(np.abs(top) > 1e-15, scale, 0)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    scales = _symmetric(blocks.reshape(-1, 16), 32).reshape(-1, 16)
    top = np.take_along_axis(scales, np.abs(scales).argmax(-1)[:, None], -1)
    safe = np.where(top != 0, top, 1)
    eight = np.minimum(127, np.rint(-128 / safe * scales)).astype(np.int8)
    d = (-safe / 128).astype(np.float16)
    step = d.astype(np.float32) * eight
    grouped = blocks.reshape(-1, 16, 16)
    codes = np.rint(grouped / np.where(step != 0, step, np.inf)[..., None])
    codes = (np.clip(codes, -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = np.concatenate([(codes[:, :, i] & 15) | ((codes[:, :, i + 2] & 15) << 4) for i in (0, 1)], axis=-1)
    high = (codes[:, :, 0] >> 4) | (codes[:, :, 1] >> 4 << 2) | (codes[:, :, 2] >> 4 << 4) | (codes[:, :, 3] >> 4 << 6)
    arrays = [low.reshape(-1, 128), high.reshape(-1, 64), eight.view(np.uint8), d.view(np.uint8)]
    return np.concatenate(arrays, axis=1)


_ENCODERS = {"Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}
