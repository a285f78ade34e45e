"""From gradients to new weights: MLX's optimizers, the learning rate's course, clipping, rounding to bfloat16."""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from klein_mlx.train.adapters import Weights
from klein_mlx.train.noise import key_of
from klein_mlx.train.options import TrainOptions

# A matrix that Adafactor changes, some rows at a time: in how many pieces at most, of how many numbers at least.
_PIECES, _LEAST = 16, 1 << 16


def make_optimizer(options: TrainOptions) -> optim.Optimizer:
    """The optimizer that was asked for, with the settings that torch's have."""
    rate, decay = options.learning_rate or 0.0, options.weight_decay
    if options.optimizer == "adafactor":
        return Adafactor(rate, relative_step=False, scale_parameter=False, beta_1=None)
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
    return mx.sqrt(sum((mx.square(g.astype(mx.float32)).sum(axis=-1).sum() for g in gradients.values()), mx.array(0.0)))


def clipped(gradients: Weights, norm: mx.array, most: float) -> Weights:
    """Scaled down so that their norm is at most `most`, as torch.nn.utils.clip_grad_norm_ does."""
    factor = mx.minimum(1.0, most / (norm + 1e-6))
    return {path: g * factor.astype(g.dtype) for path, g in gradients.items()}


class Adafactor(optim.Adafactor):
    """MLX's, with updates of a matrix that are computed for some rows at a time: no float32 array is of its size."""

    def by_rows(self, gradient: mx.array, state: dict[str, Any]) -> Callable[[slice], mx.array]:
        """Update the state of a matrix. Returns what is to be subtracted from some of its rows, float32."""
        pieces, means, column = pieces_of(gradient), [], mx.array(0.0)
        for rows in pieces:
            squares = mx.square(gradient[rows].astype(mx.float32)) + self.eps[0]
            means.append(squares.mean(axis=-1))
            column = column + squares.sum(axis=-2)
            del squares
            mx.eval(means, column)
        new = (self.step**self.decay_rate).astype(mx.float32)
        row = (1 - new) * state["exp_avg_sq_row"] + new * mx.concatenate(means)
        column = (1 - new) * state["exp_avg_sq_col"] + new * column / gradient.shape[0]
        state["exp_avg_sq_row"], state["exp_avg_sq_col"] = row, column
        left, right = mx.rsqrt(row / row.mean())[:, None], mx.rsqrt(column)

        def step(rows: slice) -> mx.array:
            return left[rows] * right * gradient[rows].astype(mx.float32)

        total = mx.array(0.0)
        for rows in pieces:
            total = total + mx.square(step(rows)).sum(axis=-1).sum()
            mx.eval(total)
        rate = self.learning_rate / mx.maximum(1.0, mx.sqrt(total / gradient.size) / self.clip_threshold)
        return lambda rows: rate * step(rows)


def pieces_of(matrix: mx.array) -> list[slice]:
    """Its rows, some at a time."""
    count, length = min(_PIECES, max(1, matrix.size // _LEAST)), matrix.shape[0]
    return [slice(*edge) for edge in pairwise(length * i // count for i in range(count + 1))]


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
            mx.eval(gradients[path])  # what it was made of leaves
            self._change(optimizer, path, gradients.pop(path), step)
        mx.eval(optimizer.state)

    def _change(self, optimizer: optim.Optimizer, path: str, gradient: mx.array, step: int) -> None:
        """One weight."""
        weight, lost = self._weights[path], self._lost.get(path)
        state: Any = optimizer.state[path.replace(".", "/")]
        by_rows = optimizer.by_rows if isinstance(optimizer, Adafactor) and gradient.ndim == 2 else None
        change = by_rows(gradient, state) if by_rows else None
        done: list[list[mx.array]] = []
        for rows in pieces_of(gradient) if change else [slice(0, None)]:
            old = weight[rows].astype(mx.float32)
            if lost is not None:
                old = old + lost[rows]
            new = old - change(rows) if change else optimizer.apply_single(gradient.astype(mx.float32), old, state)
            key = key_of("rounding", self._options.seed, step, path, rows.start)
            done.append(self._rounded(new, weight.dtype, key))
            del old, new
            mx.eval(done[-1], state)
        for kept, parts in zip((self._weights, self._lost), zip(*done, strict=True), strict=False):
            kept[path] = mx.concatenate(list(parts))
            mx.eval(kept[path])

    def _rounded(self, array: mx.array, dtype: mx.Dtype, key: mx.array) -> list[mx.array]:
        """In the dtype that the weight has; by Kahan also what that took."""
        rounding = self._options.rounding
        if dtype == mx.float32 or rounding == "nearest":
            return [array.astype(dtype)]
        if rounding == "stochastic":
            return [stochastic(array, key)]
        # By chance here too: the model computes with the weight alone, which to nearest would not show small changes.
        first, second = mx.random.split(key)
        weight = stochastic(array, first)
        return [weight, stochastic(array - weight.astype(mx.float32), second)]

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
