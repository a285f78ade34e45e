"""From gradients to new weights: MLX's optimizers, the learning rate's course, clipping, rounding to bfloat16."""

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from klein_mlx.train.adapters import Weights
from klein_mlx.train.noise import key_of
from klein_mlx.train.options import TrainOptions


def make_optimizer(options: TrainOptions) -> optim.Optimizer:
    """The optimizer that was asked for, with the settings that torch's have."""
    rate, decay = options.learning_rate or 0.0, options.weight_decay
    if options.optimizer == "adafactor":
        return optim.Adafactor(rate, relative_step=False, scale_parameter=False, beta_1=None)
    if options.optimizer == "lion":
        return optim.Lion(rate, weight_decay=decay)
    if options.optimizer == "muon":
        return optim.Muon(rate, weight_decay=decay)
    return optim.AdamW(rate, betas=[0.9, 0.999], weight_decay=decay, bias_correction=True)


def rate_at(options: TrainOptions, step: int) -> float:
    """The learning rate of update `step`, from 0."""
    rate = options.learning_rate or 0.0
    if step < options.warmup:
        return rate * (step + 1) / options.warmup
    if options.schedule == "constant":
        return rate
    progress = (step - options.warmup) / max(1, options.steps - options.warmup)
    return rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def norm_of(gradients: Mapping[str, mx.array]) -> mx.array:
    """Of all gradients together, float32."""
    return mx.sqrt(sum((mx.square(g.astype(mx.float32)).sum() for g in gradients.values()), mx.array(0.0)))


def clipped(gradients: Weights, norm: mx.array, most: float) -> Weights:
    """Scaled down so that their norm is at most `most`, as torch.nn.utils.clip_grad_norm_ does."""
    factor = mx.minimum(1.0, most / (norm + 1e-6))
    return {path: g * factor.astype(g.dtype) for path, g in gradients.items()}


class Updater:
    """The optimizers' state: one for all adapters; in full training, where updates happen stage by stage, one each.

    weights: the arrays that are trained; replaced by new ones, never changed in place.
    """

    def __init__(self, options: TrainOptions, weights: Weights):
        self._options, self._weights = options, weights
        self._optimizers: dict[str, optim.Optimizer] = {}
        self._lost: Weights = {}  # Kahan's: what rounding took from each weight

    def update(self, stage: str, gradients: Weights, step: int) -> None:
        """One update of what `gradients` name, each evaluated before the next; they are used up. stage: whose state."""
        if stage not in self._optimizers:
            self._optimizers[stage] = make_optimizer(self._options)
            self._optimizers[stage].init(_flat_names({path: self._weights[path] for path in gradients}))
        optimizer = self._optimizers[stage]
        optimizer.learning_rate = mx.array(rate_at(self._options, step))  # type: ignore[assignment]
        optimizer.state["step"] = optimizer.step + 1
        for path in list(gradients):
            before = self._weights[path].astype(mx.float32)
            if path in self._lost:
                before = before + self._lost[path]
            state: Any = optimizer.state[path.replace(".", "/")]
            after = optimizer.apply_single(gradients.pop(path).astype(mx.float32), before, state)
            del before
            mx.eval(after, state)
            self._weights[path] = self._rounded(path, after, step)
            del after
            mx.eval(self._weights[path], self._lost.get(path))
        mx.eval(optimizer.state)

    def _rounded(self, path: str, array: mx.array, step: int) -> mx.array:
        """In the dtype that the weight has."""
        dtype = self._weights[path].dtype
        if dtype == mx.float32 or self._options.rounding == "nearest":
            return array.astype(dtype)
        if self._options.rounding == "kahan":
            narrow = array.astype(dtype)
            self._lost[path] = (array - narrow.astype(mx.float32)).astype(dtype)
            return narrow
        return stochastic(array, key_of("rounding", self._options.seed, step, path))

    def state(self) -> Weights:
        """All that a checkpoint must hold besides the weights."""
        found: Weights = {f"lost/{path}": array for path, array in self._lost.items()}
        for stage, optimizer in self._optimizers.items():
            found |= {f"{stage}:{name}": array for name, array in tree_flatten(optimizer.state)}  # type: ignore[misc]
        return found

    def restore(self, state: Mapping[str, mx.array]) -> None:
        """What `state` returned."""
        self._lost = {name.removeprefix("lost/"): a for name, a in state.items() if name.startswith("lost/")}
        by_stage: dict[str, list[tuple[str, Any]]] = {}
        for name, array in state.items():
            stage, colon, rest = name.partition(":")
            if colon:
                by_stage.setdefault(stage, []).append((rest, array))
        for stage, entries in by_stage.items():
            self._optimizers[stage] = make_optimizer(self._options)
            self._optimizers[stage].state = tree_unflatten(entries)  # type: ignore[assignment]


def _flat_names(weights: Mapping[str, mx.array]) -> Weights:
    """Without dots, which would be levels of the optimizer's state."""
    return {path.replace(".", "/"): array for path, array in weights.items()}


def stochastic(array: mx.array, key: mx.array) -> mx.array:
    """float32 rounded to bfloat16, up or down by chance, so that the mean is right: small updates are not lost."""
    bits = mx.view(array, mx.uint32) + mx.random.randint(0, 65536, array.shape, dtype=mx.uint32, key=key)
    return mx.view(bits & 0xFFFF0000, mx.float32).astype(mx.bfloat16)


def averaged(old: Mapping[str, mx.array], new: Mapping[str, mx.array], decay: float) -> Weights:
    """The exponential moving average, float32, evaluated."""
    found = {path: decay * old[path] + (1 - decay) * array.astype(mx.float32) for path, array in new.items()}
    mx.eval(found)
    return found
