"""What a picture would take on a chip that is not at hand: the model's graphs, counted, on a roofline.

A kernel takes as long as its arithmetic at the speed that MLX's matmuls reach, or as its bytes at the speed that memory
reaches, whichever is longer, and a launch. The graphs are traced at full size without weights. How much of a chip's
peak is reached is taken from published times of mflux, whose matmuls are the same (MLX's own): see EFFICIENCY.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_map

from klein_mlx.bench.cost import MATH, Cost, Kernel, trace
from klein_mlx.config import ModelConfig
from klein_mlx.errors import RequestError
from klein_mlx.formats.part import ARCHITECTURES
from klein_mlx.model.layers import Gpu, gpu, place, wide
from klein_mlx.model.sampler import image_ids, text_ids
from klein_mlx.model.transformer import Modulation, Modulations, Transformer, rope_tables
from klein_mlx.model.vae import VAE
from klein_mlx.weights.checkpoint import ENCODER_CLASSES
from klein_mlx.weights.quantize import Quantization, prepare

# M1 and M2: Apple's own figures. M3, M4: Apple states none; benchmark sites', as the Hugging Face Hub lists them
# (huggingface.js, packages/tasks/src/hardware.ts). They are float32 rates: a core of these GPUs multiplies matrices in
# half precision no faster (github.com/philipturner/metal-benchmarks, FP16/FP32 ratio 1).
APPLE = "Apple"
LISTED = "benchmark sites, by way of huggingface.js's hardware table"


# 7.5 TFLOPS measured in float16 on an A19's 5 cores, which the M5 family shares; taken per core, at the A19's clock.
SCALED = "an A19's matrix units, measured (tzakharko.github.io/apple-neural-accelerators-benchmark), times cores"


@dataclass(frozen=True)
class Chip:
    """tflops: peak of half-precision matrix multiplication. bandwidth: GB/s, as Apple states it. source: of tflops."""

    name: str
    cores: int
    tflops: float
    bandwidth: float
    source: str

    @property
    def generation(self) -> int:
        """1 of M1 Max."""
        return int(self.name[1])

    @property
    def device(self) -> Gpu:
        """How it computes where nothing was measured on it."""
        return gpu(f"applegpu_g{12 + self.generation}")

    @property
    def is_estimated(self) -> bool:
        """Whether the peak is not Apple's own figure."""
        return self.source != APPLE


CHIPS = (
    Chip("M1", 8, 2.6, 68, APPLE),
    Chip("M1 Pro", 16, 5.2, 200, APPLE),
    Chip("M1 Max", 32, 10.4, 400, APPLE),
    Chip("M1 Ultra", 64, 21.0, 800, APPLE),
    Chip("M2", 10, 3.6, 100, APPLE),
    Chip("M2 Pro", 19, 6.8, 200, APPLE),
    Chip("M2 Max", 38, 13.6, 400, APPLE),
    Chip("M2 Ultra", 76, 27.2, 800, APPLE),
    Chip("M3", 10, 4.1, 100, LISTED),
    Chip("M3 Pro", 18, 7.4, 150, LISTED),
    Chip("M3 Max", 40, 14.2, 400, LISTED),
    Chip("M3 Ultra", 80, 28.4, 819, LISTED),
    Chip("M4", 10, 4.6, 120, LISTED),
    Chip("M4 Pro", 20, 9.2, 273, LISTED),
    Chip("M4 Max", 40, 18.4, 546, LISTED),
    Chip("M5", 10, 15.0, 153, SCALED),
    Chip("M5 Pro", 20, 30.0, 307, SCALED),
    Chip("M5 Max", 40, 60.0, 614, SCALED),
)


def find_chip(name: str) -> Chip | None:
    """The chip that MLX's device_info or a user calls so ("Apple M3 Max", "m3max"); None if it is not listed."""
    words = "".join(name.lower().removeprefix("apple").split())
    return next((chip for chip in CHIPS if chip.name.lower().replace(" ", "") == words), None)


def named_chip(name: str) -> Chip:
    """As `find_chip`; RequestError if there is no such chip."""
    chip = find_chip(name)
    if chip is None:
        raise RequestError(f"--predict is {name!r}; it must be one of {', '.join(chip.name for chip in CHIPS)}")
    return chip


# The share of the peak that matmuls, convolutions and attention reach on generation 1, 2, ...: (least, likely, most).
# Likely: what makes mflux's own graph (compiled: 962 kernels, 53.8 GB a step; eager on M1 and M2: 1418, 84.3 GB) take
# the published time of a 1024 x 1024 picture in 4 steps:
#   M2 Pro, 44 to 47 s in bfloat16 (github.com/raullenchai/Rapid-MLX, issue 3058) -> 0.53, 19 GPU cores assumed; with
#     16 it would be 0.63, the most. M1 taken as M2: neither multiplies bfloat16 natively.
#   M4 Pro, 27 s -> 0.65. Most: what MLX's own matmuls reach on an M3.
#   M3: MLX's own bfloat16 matmuls reach 17.5 to 18.9 TFLOPS of an M3 Ultra's 21.3 with 60 cores (mlx issue 3196): 0.82
#     to 0.89; attention 0.92 of that (Rapid-MLX, pull request 258), convolutions less -> 0.80. Least: an M4's likely.
#   M5: Apple states 3.8 times an M4's speed for FLUX at 4 bits with MLX -> 0.65 x 4.6 x 3.8 / 15.0 = 0.76.
EFFICIENCY = {1: (0.45, 0.53, 0.63), 2: (0.45, 0.53, 0.63), 3: (0.65, 0.80, 0.89), 4: (0.55, 0.65, 0.82)}


EFFICIENCY |= {5: (0.55, 0.75, 0.85)}


# On an M5 MLX's own convolutions do not use the matrix units (mlx's conv.cpp, pull request 4214): what one GPU core's
# other units reach, of 15 TFLOPS on an M5 Max (ComfyUI-AppleSilicon-FP8, pull request 1). A matmul in their place does.
CONVOLUTION_TFLOPS_PER_CORE = 15 / 40
FLOAT16_GAIN = 1.34  # on M1 and M2: prefill in float16 over bfloat16, measured on an M2 Max (Rapid-MLX, issue 3154)
QUANTIZED = {1: 0.87, 2: 0.87, 3: 0.93, 4: 0.93, 5: 0.93}  # of that: 52 s at 4 bits on the M2 Pro; 7 % on later ones
REACHED_BANDWIDTH = 0.8  # of what Apple states
LAUNCH_SECONDS = 5e-6


def klein(size: str) -> ModelConfig:
    """The published architecture of "4b", "9b" or "dev"; no file is needed."""
    return ARCHITECTURES["FLUX.2 [dev]" if size == "dev" else f"FLUX.2 [klein] {size.upper()}"]


@dataclass(frozen=True)
class PictureCost:
    """What a picture launches: the prompt encoded once, `steps` times a step, the picture decoded once.

    What is done once per picture beside that, embedding the text and the modulations, is under 0.2 % and left out.
    """

    encode: Cost
    step: Cost
    decode: Cost
    steps: int

    @property
    def flops(self) -> int:
        return self.encode.flops + self.steps * self.step.flops + self.decode.flops


def picture_cost(
    config: ModelConfig,
    width: int,
    height: int,
    steps: int,
    dtype: mx.Dtype = mx.bfloat16,
    quantization: Mapping[str, Quantization] | None = None,
    passes: int = 1,
    device: Gpu = Gpu(),  # noqa: B008
) -> PictureCost:
    """Trace a picture's three graphs at full size, as on a GPU; nothing is evaluated but the rotary tables.

    width, height: pixels. quantization: per part. passes: through the transformer per step, 2 with guidance. device:
    with a chip's own choices. The decoder is counted in one piece: strips launch more kernels, but do the same
    arithmetic.
    """
    side = config.pixels_per_token
    h, w, length = height // side, width // side, config.max_sequence_length
    bits = quantization or {}
    encode = _encode(config, length, dtype, bits.get("text_encoder"), device)
    step = _step(config, (h, w), dtype, bits.get("transformer"), passes, device)
    decode = _decode(config, (h, w), dtype, device)
    return PictureCost(encode, step, decode, steps)


def _encode(config: ModelConfig, length: int, dtype: mx.Dtype, quantization: Quantization | None, device: Gpu) -> Cost:
    encoder = ENCODER_CLASSES[config.text_encoder.model_type](config.text_encoder, config.taps)
    if quantization:
        prepare(encoder, "text_encoder", quantization)
    encoder.set_dtype(dtype)
    place(encoder, device)
    encoder.arrange()
    return trace(encoder, encoder, mx.zeros((1, length), mx.int32), mx.ones((1, length), mx.bool_))


def _step(
    config: ModelConfig,
    grid: tuple[int, int],
    dtype: mx.Dtype,
    quantization: Quantization | None,
    passes: int,
    device: Gpu,
) -> Cost:
    t, (h, w) = config.transformer, grid
    transformer = Transformer(t)
    if quantization:
        prepare(transformer, "transformer", quantization)
    transformer.set_dtype(dtype)
    place(transformer, device)
    transformer.arrange()
    length = config.max_sequence_length
    rope = rope_tables(mx.concatenate([text_ids(length), image_ids(h, w)]), t.axes_dims_rope, t.rope_theta, length)
    modulations = _modulations(t.hidden_size, wide(dtype))
    mx.eval(rope, modulations)

    def velocity(tokens: mx.array, txt: mx.array) -> mx.array:
        return transformer(tokens, txt, modulations, rope, h * w)

    tokens = mx.zeros((passes, h * w, t.in_channels), dtype)
    return trace(transformer, velocity, tokens, mx.zeros((passes, length, t.hidden_size), wide(dtype)))


def _modulations(hidden: int, dtype: mx.Dtype) -> Modulations:
    """Placeholders: they are computed once per picture, for next to nothing."""

    def vector() -> mx.array:
        return mx.zeros((hidden,), dtype)

    def modulation() -> Modulation:
        return Modulation(vector(), vector(), vector())

    return Modulations((modulation(), modulation()), (modulation(), modulation()), modulation(), (vector(), vector()))


def _decode(config: ModelConfig, grid: tuple[int, int], dtype: mx.Dtype, device: Gpu) -> Cost:
    vae, (h, w) = VAE(config.vae), grid
    place(vae, device)
    vae.update(tree_map(lambda array: array.astype(dtype), vae.parameters()))
    return trace(vae, vae.decode, mx.zeros((1, 2 * h, 2 * w, config.vae.latent_channels), dtype))


@dataclass(frozen=True)
class Prediction:
    """Seconds, likely ones but for `fastest` and `slowest`, which are a picture's at the ends of the efficiency."""

    chip: Chip
    encode: float
    step: float
    decode: float
    picture: float
    fastest: float
    slowest: float
    floor: float


def predict(cost: PictureCost, chip: Chip, dtype: mx.Dtype = mx.bfloat16) -> Prediction:
    """A picture's seconds on a chip, the weights loaded. floor: all its arithmetic at the chip's peak."""
    slow, likely, fast = (_efficiency(chip, dtype, share) for share in EFFICIENCY[chip.generation])

    def picture(efficiency: float) -> float:
        parts = [seconds(part.kernels, chip, efficiency) for part in (cost.encode, cost.step, cost.decode)]
        return parts[0] + cost.steps * parts[1] + parts[2]

    return Prediction(
        chip=chip,
        encode=seconds(cost.encode.kernels, chip, likely),
        step=seconds(cost.step.kernels, chip, likely),
        decode=seconds(cost.decode.kernels, chip, likely),
        picture=picture(likely),
        fastest=picture(fast),
        slowest=picture(slow),
        floor=cost.flops / (chip.tflops * 1e12),
    )


def _efficiency(chip: Chip, dtype: mx.Dtype, share: float) -> float:
    if dtype == mx.float16 and chip.generation <= 2:
        return share * FLOAT16_GAIN
    return share


def seconds(kernels: Iterable[Kernel], chip: Chip, efficiency: float) -> float:
    """A graph's time on the roofline. efficiency: the share of the peak that a matmul of many rows reaches."""
    total = 0.0
    for kernel in kernels:
        reached = efficiency if kernel.name in MATH else 1.0
        if kernel.name == "QuantizedMatmul":
            reached *= QUANTIZED[chip.generation]
        tflops = reached * chip.tflops
        if kernel.name == "Convolution" and chip.generation >= 5:
            tflops = min(tflops, chip.cores * CONVOLUTION_TFLOPS_PER_CORE)
        arithmetic = kernel.flops / (tflops * 1e12)
        moving = kernel.moved / (REACHED_BANDWIDTH * chip.bandwidth * 1e9)
        total += max(arithmetic, moving) + LAUNCH_SECONDS
    return total
