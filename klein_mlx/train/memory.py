"""What a training run takes of memory, phase by phase, before anything is loaded; and what would fit instead.

Weights and the encoders' arrays are counted as for a picture (klein_mlx.runtime.memory); the arrays of a block were
measured on a CPU in float32, and scale with the dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import mlx.core as mx

from klein_mlx.config import ModelConfig, TransformerConfig
from klein_mlx.errors import RequestError, human_bytes
from klein_mlx.model.layers import Device, here
from klein_mlx.runtime.memory import Work, encoder_bytes, machine_memory, vae_bytes, weight_bytes
from klein_mlx.train.adapters import check_rank, find_targets
from klein_mlx.train.options import TrainOptions
from klein_mlx.weights.bits import parse, settle
from klein_mlx.weights.checkpoint import Source, expected
from klein_mlx.weights.quantize import Quantization

# What a block's forward pass has of arrays: in units of its stream and, where attention is not one kernel, of its
# scores. In full training the way back has fewer, but new gradients or weights too: in units of a double block's.
_STREAMS, _SCORES, _BACK, _CHANGED = 27, 1.2, 14, 1.5
# Of pieces: arrays of a token, in units of its channels and of its attention's scores; how many streams they may take.
_ROW, _ROW_SCORES, _PIECE, _LEAST_ROWS = 64, 4, 24, 32
MACS = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)  # GB of memory
_STATE = {"adamw": 2, "lion": 1, "muon": 1, "adafactor": 0}  # float32 numbers for each that is trained


@dataclass(frozen=True)
class TrainEstimate:
    """Bytes at the fullest moment of every phase; machine: what there is."""

    phases: Mapping[str, int]
    machine: int

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.machine

    def line(self) -> str:
        """For a person."""
        told = ", ".join(f"{phase} {human_bytes(size)}" for phase, size in self.phases.items())
        return f"memory     {told} (estimates; there are {human_bytes(self.machine)})"


def estimate_training(
    source: Source,
    options: TrainOptions,
    dtype: mx.Dtype,
    quantization: Mapping[str, Quantization],
    size: tuple[int, int],
    references: tuple[tuple[int, int], ...] = (),
    device: Device = None,
) -> TrainEstimate:
    """size: (width, height) of the largest picture; references: those of the largest sample. options: checked. device:
    None: the default one."""
    config, weights = source.config, weight_bytes(source, dtype, quantization)
    side = config.pixels_per_token
    tokens = sum(width // side * (height // side) for width, height in (size, *references))
    work = Work(size[1], size[0], length=config.max_sequence_length)
    quantized = {part: part in quantization or part in source.quantization for part in ("text_encoder", "transformer")}
    pictures = [vae_bytes(config.vae, height, width, dtype, True, device) for width, height in (size, *references)]
    arrays = block_bytes(config, options, dtype, tokens + work.length, quantized["transformer"], device)
    phases = {
        "pictures": weights["vae"] + max(pictures),
        "captions": weights["text_encoder"] + encoder_bytes(config, work, dtype, quantized["text_encoder"], device),
        "training": weights["transformer"] + trained_bytes(config, options, dtype) + arrays,
    }
    return TrainEstimate(phases, machine_memory())


def block_bytes(
    config: ModelConfig,
    options: TrainOptions,
    dtype: mx.Dtype,
    tokens: int,
    quantized: bool = False,
    device: Device = None,
) -> int:
    """Beside weights and what is trained, in the fullest block. tokens: of text, picture, references. quantized: the
    weights that stay. device: None: the default one."""
    c, rows, device = config.transformer, options.batch, device or here()
    width = mx.float32.size if device.widens else dtype.size
    stream = rows * tokens * c.hidden_size
    scores = rows * c.num_attention_heads * tokens**2 if device.widens else 0
    kept = (c.num_layers + c.num_single_layers) * stream * dtype.size
    rope = 2 * tokens * c.attention_head_dim * 4
    matrices = (4 * c.hidden_size + 3 * c.mlp_size) * c.hidden_size  # of a single block, or of one stream of a double
    plain = device.is_dequantized(rows * tokens) if quantized else device.widens and dtype != mx.float32
    arrays = width * (_STREAMS * stream + round(_SCORES * scores) + plain * matrices)
    if options.method == "full":
        widened = plain * matrices // 2  # a gradient
        arrays = max(arrays, width * (_BACK * stream + widened) + round(_CHANGED * 2 * matrices) * dtype.size)
    return kept + rope + arrays


def piece_rows(config: TransformerConfig, tokens: int) -> int:
    """How many of a block's tokens go back at a time: as many as have arrays of _PIECE streams. See train.pieces."""
    stream = tokens * config.hidden_size
    row = _ROW * config.hidden_size + _ROW_SCORES * config.num_attention_heads * tokens
    return max(_LEAST_ROWS, _PIECE * stream // row)


def trained_bytes(config: ModelConfig, options: TrainOptions, dtype: mx.Dtype) -> int:
    """What is trained beside the frozen weights, its gradients, the optimizer's numbers, the moving average. Raises
    RequestError for targets that are not there, and for a rank over their width."""
    shapes = {name: shape for name, shape in expected("transformer", config).items() if len(shape) == 2}
    state = _STATE[options.optimizer or "adamw"] + (options.ema is not None)
    if options.method == "full":
        numbers = sum(a * b for a, b in shapes.values())
        kept = 1 if (options.accumulate or 1) > 1 else 0
        lost = dtype.size if options.rounding == "kahan" and dtype != mx.float32 else 0
        return numbers * (4 * (state + kept) + lost)
    layers = {name.removesuffix(".weight"): shape for name, shape in shapes.items()}
    numbers = 0
    for path in find_targets(layers, options.targets):
        check_rank(options.rank, path, layers[path])
        numbers += options.rank * sum(layers[path])
    return 4 * numbers * (1 + 2 + state)  # the sum of gradients and a new one


def mac_for(needed: int) -> int | None:
    """GB of the smallest Mac whose GPU may use so many bytes; None: no Mac's may."""
    return next((size for size in MACS if needed <= (size << 30) * (3 / 4 if size > 36 else 2 / 3)), None)


def check_training_fits(
    source: Source, options: TrainOptions, own: TrainEstimate, dtype: mx.Dtype, size: tuple[int, int]
) -> None:
    """Raise a RequestError with a plan that would fit, unless the run does. own: its estimate."""
    if own.fits:
        return
    told = f"this needs {human_bytes(own.peak)} of memory, and {human_bytes(own.machine)} can be used"
    words = "nothing smaller is left: train on a machine with more"
    free = options.method != "full" and not options.bits and "transformer" not in source.quantization
    for bits in [None, "8", "4"] if free else [options.bits]:
        for side in sorted({options.resolution, 768, 512, 256}, reverse=True):
            if side > options.resolution or (bits == options.bits and side == options.resolution):
                continue
            scale = side / options.resolution
            smaller = (int(size[0] * scale), int(size[1] * scale))
            less = replace(options, bits=bits, resolution=side, batch=1)
            found = estimate_training(source, less, dtype, settle(parse(bits), source), smaller)
            if found.peak <= own.machine:
                plan = " ".join(
                    [f"--bits {bits}"] * (bits != options.bits)
                    + [f"--resolution {side}"] * (side != options.resolution)
                    + ["--batch 1"] * (options.batch > 1)
                )
                raise RequestError(f"{told}; {plan} needs {human_bytes(found.peak)}")
    raise RequestError(f"{told}; {words}")
