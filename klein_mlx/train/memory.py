"""What a training run takes of memory, phase by phase, before anything is loaded; and what would fit instead.

Weights and the encoders' arrays are counted as for a picture (klein_mlx.runtime.memory); the arrays of a block's
backward pass were measured on a CPU in float32, and scale with the dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import mlx.core as mx

from klein_mlx.config import ModelConfig
from klein_mlx.errors import RequestError
from klein_mlx.runtime.memory import Work, encoder_bytes, gigabytes, machine_memory, vae_bytes, weight_bytes
from klein_mlx.train.adapters import BLOCKS
from klein_mlx.train.options import TrainOptions
from klein_mlx.weights.bits import parse, settle
from klein_mlx.weights.checkpoint import Source, expected
from klein_mlx.weights.quantize import Quantization

# Arrays of a single block's backward pass, in units of its stream and of its attention's scores; a double block's,
# whose streams run one after the other; and what a block's gradients and new weights take, in units of its weights.
_STREAMS, _SCORES, _DOUBLE, _CHANGED = 74, 2, 0.45, 1.5
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
        told = ", ".join(f"{phase} {gigabytes(size)}" for phase, size in self.phases.items())
        return f"memory     {told} (estimates; there are {gigabytes(self.machine)})"


def estimate_training(
    source: Source,
    options: TrainOptions,
    dtype: mx.Dtype,
    quantization: Mapping[str, Quantization],
    size: tuple[int, int],
    references: tuple[tuple[int, int], ...] = (),
) -> TrainEstimate:
    """size: (width, height) of the largest picture; references: those of the largest sample. options: checked."""
    config, weights = source.config, weight_bytes(source, dtype, quantization)
    side = config.pixels_per_token
    tokens = sum(width // side * (height // side) for width, height in (size, *references))
    work = Work(size[1], size[0], length=config.max_sequence_length)
    quantized = {part: part in quantization or part in source.quantization for part in ("text_encoder", "transformer")}
    pictures = [vae_bytes(config.vae, height, width, dtype, encodes=True) for width, height in (size, *references)]
    arrays = block_bytes(config, options, dtype, tokens + work.length)
    phases = {
        "pictures": weights["vae"] + max(pictures),
        "captions": weights["text_encoder"] + encoder_bytes(config, work, dtype, quantized["text_encoder"]),
        "training": weights["transformer"] + trained_bytes(config, options) + arrays,
    }
    return TrainEstimate(phases, machine_memory())


def block_bytes(config: ModelConfig, options: TrainOptions, dtype: mx.Dtype, tokens: int) -> int:
    """Beside weights and what is trained, while the fullest block goes back. tokens: of text, picture, references."""
    c, rows = config.transformer, options.batch
    stream = rows * tokens * c.hidden_size * dtype.size
    scores = rows * c.num_attention_heads * tokens**2 * dtype.size
    kept = (c.num_layers + c.num_single_layers) * stream
    rope = 2 * tokens * c.attention_head_dim * 4
    arrays = _STREAMS * stream + _SCORES * scores
    if options.method != "full":
        return arrays + kept + rope
    single = (4 * c.hidden_size + 3 * c.mlp_size) * c.hidden_size * dtype.size
    double = 2 * single  # of q, k, v, out and the MLP's three, for each stream
    return kept + rope + round(max(arrays + _CHANGED * single, _DOUBLE * arrays + _CHANGED * double))


def trained_bytes(config: ModelConfig, options: TrainOptions) -> int:
    """What is trained beside the frozen weights, its gradients, the optimizer's numbers, the moving average."""
    shapes = {name: shape for name, shape in expected("transformer", config).items() if len(shape) == 2}
    state = _STATE[options.optimizer or "adamw"] + (options.ema is not None)
    if options.method == "full":
        numbers = sum(a * b for a, b in shapes.values())
        kept = 1 if (options.accumulate or 1) > 1 else 0
        return 4 * numbers * (state + kept)
    paths = [name.removesuffix(".weight") for name in shapes]
    blocks = [path for path in paths if path.partition(".")[0] in BLOCKS]
    chosen = (
        blocks if options.targets in ("all", "attention") else [p for p in paths if fnmatchcase(p, options.targets)]
    )
    numbers = options.rank * sum(sum(shapes[f"{path}.weight"]) for path in chosen)
    return 4 * numbers * (1 + 2 + state)  # the sum of gradients and a new one


def check_training_fits(
    source: Source, options: TrainOptions, own: TrainEstimate, dtype: mx.Dtype, size: tuple[int, int]
) -> None:
    """Raise a RequestError with a plan that would fit, unless the run does. own: its estimate."""
    if own.fits:
        return
    told = f"this needs {gigabytes(own.peak)} of {gigabytes(own.machine)} of memory"
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
                raise RequestError(f"{told}; {plan} needs {gigabytes(found.peak)}")
    raise RequestError(f"{told}; {words}")
