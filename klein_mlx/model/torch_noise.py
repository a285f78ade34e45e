"""Normal noise bit-equal to torch's generator on a CPU, so that a seed of diffusers gives the picture of diffusers.

Source: torch, aten/src/ATen/native/cpu/DistributionTemplates.h (normal_fill, normal_fill_AVX2) and
aten/src/ATen/native/cpu/avx_mathfun.h (Cephes' logarithm, sine and cosine), as on x86 with AVX2. On a Mac torch itself
takes the system's log, sin and cos: its noise differs from this in the last bit of some values.
"""

import math

import mlx.core as mx
import numpy as np

F = np.float32
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_PI_4 = (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)  # -pi / 4 in three parts


def torch_noise(seed: int, shape: tuple[int, ...], dtype: mx.Dtype = mx.float32) -> mx.array:
    """What torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) returns.

    seed: 0 .. 2**64 - 1; torch's generator uses its lower 32 bits. shape: 16 values or more,
    in bfloat16 a multiple of 16. dtype: float32 or bfloat16.
    """
    count = math.prod(shape)
    twister = np.random.MT19937()
    twister._legacy_seeding(seed & 0xFFFFFFFF)  # type: ignore[attr-defined]
    values = _uniform(twister.random_raw(count))
    whole = count // 16 * 16
    normal = _normal(values[:whole])
    if whole < count:  # torch draws the last 16 values anew
        normal = np.concatenate([normal[: count - 16], _normal(_uniform(twister.random_raw(16)))])
    return mx.array(normal).reshape(shape).astype(dtype)


def _uniform(raw: np.ndarray) -> np.ndarray:
    """[0, 1) in steps of 2**-24."""
    return (raw & 0xFFFFFF).astype(F) * F(2**-24)


def _pairs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(u1 in (0, 1], u2) of Box and Muller: 8 and 8 of every 16 values."""
    blocks = values.reshape(-1, 2, 8)
    return F(1) - blocks[:, 0], blocks[:, 1]


def _normal(values: np.ndarray) -> np.ndarray:
    u1, u2 = _pairs(values)
    radius = np.sqrt(F(-2) * _log(u1))
    sine, cosine = _sincos(F(2 * math.pi) * u2)
    return np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)


def _fma(a: np.ndarray, b: "np.ndarray | F", c: "np.ndarray | F") -> np.ndarray:
    """a * b + c, rounded once: the product of two float32 is exact in float64."""
    return (a.astype(np.float64) * np.asarray(b, np.float64) + c).astype(F)


def _polynomial(x: np.ndarray, terms: tuple[float, ...]) -> np.ndarray:
    y = np.full_like(x, F(terms[0]))
    for term in terms[1:]:
        y = _fma(y, x, F(term))
    return y


def _log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of (0, 1]."""
    bits = np.ascontiguousarray(x).view(np.int32)
    e = (bits >> 23) - 0x7F + 1
    x = ((bits & 0x007FFFFF) | 0x3F000000).view(F)
    small = x < F(0.707106781186547524)
    e = (e - small).astype(F)
    x = np.where(small, (x - F(1)) + x, x - F(1))
    z = x * x
    y = _fma(_polynomial(x, _LOG) * x, z, e * F(-2.12194440e-4))
    y = _fma(z, F(-0.5), y)
    return _fma(e, F(0.693359375), x + y)


def _sincos(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sine and cosine of [0, 2 pi)."""
    octant = ((x * F(1.27323954473516)).astype(np.int32) + 1) & ~1
    y = octant.astype(F)
    for part in _PI_4:
        x = _fma(y, F(part), x)
    z = x * x
    cosine = _fma(_polynomial(z, _COS) * z, z, z * F(-0.5)) + F(1)
    sine = _fma(_polynomial(z, _SIN) * z, x, x)
    swap = (octant & 2) != 0
    sine, cosine = np.where(swap, cosine, sine), np.where(swap, sine, cosine)
    sine = np.where((octant & 4) != 0, -sine, sine)
    return sine, np.where(((octant - 2) & 4) == 0, -cosine, cosine)
