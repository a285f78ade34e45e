"""Memory and speed of this machine: one synthetic step against the estimate, and how fast it multiplies and moves."""

import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from klein_mlx.bench.checks import Row, Setting
from klein_mlx.bench.cost import ATTENTION
from klein_mlx.bench.measure import device_name
from klein_mlx.bench.predict import Chip, PictureCost, find_chip, klein, picture_cost, predict
from klein_mlx.bench.shapes import draw, layer, weight
from klein_mlx.config import ModelConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from klein_mlx.model import layers, transformer, vae
from klein_mlx.model.compile import CompiledBlocks
from klein_mlx.model.transformer import in_parts
from klein_mlx.model.velocity import Tables, velocity
from klein_mlx.runtime import memory
from klein_mlx.runtime.memory import chosen_device

TOLERANCE = 0.15
MEDIUM = ModelConfig(  # 80 million parameters in the transformer, the heads of klein's size
    TransformerConfig(128, 1, 2, 128, 8, 1536, 3.0, (32, 32, 32, 32)),
    TextEncoderConfig(512, 512, 1536, 8, 8, 4, 128),
    VAEConfig((64, 128, 128, 128), 2, 32),
    True,
    (2, 4, 6),
)
SIZES = ((512, 256), (256, 128), (128, 64))  # (pixels of a side, text tokens) of the step


def check_memory(setting: Setting) -> Iterator[Row]:
    """The peak of one step of a transformer of random weights, beside them, against klein_mlx.runtime.memory."""
    side, text_tokens = next((s for s in SIZES if setting.gpu or _flops(*s) < setting.gigaflops * 1.5e9), SIZES[-1])
    work = memory.Work(side, side, length=text_tokens)
    told = memory.step_bytes(MEDIUM, work, setting.dtype, quantized=False)
    peak = _step_peak(setting.dtype, side, text_tokens)
    off = told / peak - 1
    tokens = f"a step of {text_tokens} + {(side // 16) ** 2} tokens"
    text = f"{tokens}: {peak / 1e6:.0f} MB, estimated {told / 1e6:.0f} ({off:+.0%})"
    figures = {"measured": peak, "estimated": told}
    remedy = "pictures may need more memory than estimated: use --keep nothing, and report this"
    yield Row("memory", text, abs(off) <= TOLERANCE, remedy, figures)


def _flops(side: int, text_tokens: int) -> float:
    """Of a step, nearly."""
    return 2 * 80e6 * (text_tokens + (side // 16) ** 2)


def _step_peak(dtype: mx.Dtype, side: int, text_tokens: int) -> int:
    """Bytes that a step takes beside the transformer's weights, at its fullest."""
    module, grid = transformer.Transformer(MEDIUM.transformer), (side // 16, side // 16)
    shapes = [(name, tuple(array.shape)) for name, array in tree_flatten(module.parameters())]  # type: ignore[union-attr]
    module.load_weights([(name, draw(shape, math.prod(shape[1:]) ** -0.5, dtype)) for name, shape in shapes])
    layers.place(module, layers.here(at_once=True))
    module.arrange()
    mx.eval(module.parameters())
    gc.collect()
    mx.clear_cache()
    base = mx.get_active_memory()
    mx.reset_peak_memory()
    embeds = draw((1, text_tokens, MEDIUM.transformer.joint_attention_dim), 1.0, dtype, 1)
    latents = draw((1, *grid, MEDIUM.transformer.in_channels), 1.0, dtype, 2)
    tables = Tables(module, None, grid, [0.5], dtype)
    step = velocity(module, embeds, tables, None, in_parts(CompiledBlocks(), mx.eval))
    mx.eval(step(latents, 0.5))
    return mx.get_peak_memory() - base


# ---- speed ----


# The least share of a chip's peak. Whatever is below is not slow but wrong: half of what the slowest case reaches, an
# M1 Max with 24 of 32 cores in bfloat16 (0.75 x EFFICIENCY's 0.45), or an M5's units without its matrix units (0.25).
LEAST_SHARE = {"matmul": 0.15, "attention": 0.1, "convolution": 0.1, "bandwidth": 0.25}
LEAST_OF_CPU = 0.1  # of what the CPU multiplies: of a GPU whose peak nobody has stated
LEAST_TFLOPS = 5e-4  # of any CPU: reference BLAS on one old core reaches 1e-3, an emulator or a debug build does not
SLOW_BLAS = 1e-2

ON_GPU = "end what else uses the GPU and low power mode, let it cool; if that changes nothing, upgrade mlx, report this"
ON_MAC_CPU = (
    "MLX does not see this Mac's GPU: install a native (arm64) Python and mlx without [cpu], not in a virtual machine"
)
ON_CPU = "a debug build or an emulator: install mlx's own wheel, and a Python made for this processor"


def check_speed(setting: Setting) -> Iterator[Row]:
    """TFLOPS and GB/s, and the seconds of a picture that follow from them. A rate that no sound installation has fails:
    a GPU drawn in software, a CPU in a GPU's place, a debug build."""
    chip = find_chip(device_name()) if setting.gpu else None
    rates = measure(setting)
    for name, (rate, unit) in rates.items():
        yield _speed(setting, chip, name, rate, unit)
    own = chosen_device()
    device = own if isinstance(own, layers.Gpu) else layers.Gpu()
    for side in (512, 1024):
        cost = picture_cost(klein("4b"), side, side, 4, setting.dtype, device=device)
        seconds = picture_seconds(cost, {name: rate for name, (rate, _) in rates.items()})
        beside = f"; bench --predict says {predict(cost, chip, setting.dtype).picture:.1f} s" if chip else ""
        text = f"klein 4B, {side} x {side}, 4 steps: about {seconds:.3g} s by these rates{beside}"
        yield Row("speed", text, None, "", {f"seconds_{side}": round(seconds, 2)})


def _speed(setting: Setting, chip: Chip | None, name: str, rate: float, unit: str) -> Row:
    """A rate beside the least one that can be right."""
    text, figures = f"{name}: {rate:.3g} {unit}", {name: round(rate, 4)}
    if chip:
        peak = chip.bandwidth if name == "bandwidth" else chip.tflops
        text += f", {rate / peak:.0%} of the {peak:g} of {chip.name}, at least {LEAST_SHARE[name]:.0%}"
        return Row("speed", text, rate >= LEAST_SHARE[name] * peak, ON_GPU, figures)
    if name != "matmul":
        return Row("speed", text, None, "", figures)
    if setting.gpu:
        least = LEAST_OF_CPU * setting.gigaflops / 1e3
        text += f"; the CPU's {setting.gigaflops / 1e3:.3g} in float32, at least {LEAST_OF_CPU:.0%} of that"
        return Row("speed", text, rate >= least, ON_GPU, figures)
    if sys.platform == "darwin":
        return Row("speed", f"{text}, by the CPU", False, ON_MAC_CPU, figures)
    if rate < SLOW_BLAS and "blas" not in os.environ.get("LD_PRELOAD", ""):
        text += "; by MLX's own BLAS: with OpenBLAS preloaded it is up to 100 times as fast"
    return Row("speed", f"{text}, at least {LEAST_TFLOPS:g}", rate >= LEAST_TFLOPS, ON_CPU, figures)


def measure(setting: Setting, seconds: float = 0.3) -> dict[str, tuple[float, str]]:
    """(rate, unit) of matmul, attention, convolution and memory."""
    dtype, gpu = setting.dtype, setting.gpu
    tokens = 4608 if gpu else 512
    x, w = draw((tokens if gpu else 128, 3072), 1.0, dtype), weight(3072, 3072, dtype)
    plain: Any = layer(w)
    heads = [draw((1, 24, tokens, 128), 1.0, dtype, start) for start in (1, 2, 3)]
    side, conv = 96 if gpu else 24, vae.Conv(512, 512)
    conv.weight, conv.bias = draw(conv.weight.shape, 0.015, dtype), draw((512,), 1.0, dtype)
    conv.arrange()
    picture = draw((1, side, side, 512), 1.0, dtype)
    large = draw((1 << (28 if gpu else 24),), 1.0, dtype)
    work: dict[str, tuple[Callable[[], mx.array], float, str]] = {
        "matmul": (lambda: plain(x), 2 * x.size * 3072 / 1e12, "TFLOPS"),
        "attention": (lambda: layers.here().attention(*heads), 4 * 24 * tokens**2 * 128 / 1e12, "TFLOPS"),
        "convolution": (lambda: conv(picture), 18 * picture.size * 512 / 1e12, "TFLOPS"),
        "bandwidth": (lambda: large + 1, 2 * large.nbytes / 1e9, "GB/s"),
    }
    mx.eval(x, w, heads, conv.parameters(), picture, large)
    return {name: (amount / _best(call, seconds), unit) for name, (call, amount, unit) in work.items()}


def _best(call: Callable[[], mx.array], seconds: float) -> float:
    """The shortest of as many calls as fit into so many seconds, at least two: the first one may compile."""
    best, spent = math.inf, 0.0
    while spent < seconds or best == math.inf:
        start = time.perf_counter()
        mx.eval(call())
        elapsed = time.perf_counter() - start
        best, spent = min(best, elapsed) if spent else best, spent + elapsed
    return best


def picture_seconds(cost: PictureCost, rates: dict[str, float]) -> float:
    """A picture's seconds where each kernel takes its FLOPs, or its bytes, at the measured rate (TFLOPS, GB/s)."""
    kinds = {"Convolution": "convolution", ATTENTION: "attention"}
    total = 0.0
    for part, times in ((cost.encode, 1), (cost.step, cost.steps), (cost.decode, 1)):
        for kernel in part.kernels:
            rate = rates[kinds.get(kernel.name, "matmul")]
            total += times * max(kernel.flops / (rate * 1e12), kernel.moved / (rates["bandwidth"] * 1e9))
    return total
