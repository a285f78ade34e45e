"""A model in training: the transformer with what is trained, one update, the loss on held-out pictures, the state."""

import gc
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx

from klein_mlx.errors import CheckpointError
from klein_mlx.runtime.distributed import Group
from klein_mlx.train.adapters import Trainables, Weights, add_adapters, all_weights, put
from klein_mlx.train.blockwise import Blockwise, Sample
from klein_mlx.train.cache import Encoded
from klein_mlx.train.dataset import Item, Order
from klein_mlx.train.noise import HELD_OUT_SIGMAS, draw_sigmas, key_of, to_float, weight_of
from klein_mlx.train.optimize import Updater, averaged, clipped, norm_of
from klein_mlx.train.plan import Plan, class_caption
from klein_mlx.weights.checkpoint import load_part, read_weights


class Update(NamedTuple):
    """loss: mean over the micro-batches. norm: of the gradient before clipping. skipped: not finite, so not applied."""

    loss: float
    norm: float
    skipped: bool


class Session:
    """between: called between the stages of a pass; what it raises ends an update before it changes anything, except
    in full training, where an update is not ended once it goes back."""

    def __init__(self, plan: Plan, encoded: Encoded, group: Group, between: Callable[[], None]):
        self.plan, self.options, self.group = plan, plan.options, group
        self._encoded, self._between = encoded, between
        self._order = Order(plan.training, self.options.batch, self.options.seed)
        self.fuses = self.options.method == "full" and self.options.accumulate == 1
        self._changing = False
        self._load(None)
        self.updater = Updater(self.options, self.trainables.weights)
        weights = self.trainables.weights
        self.ema = {n: a.astype(mx.float32) for n, a in weights.items()} if self.options.ema else None

    def _load(self, trained: Trainables | None) -> None:
        """Read the transformer. trained: what stands in it, where this is not the first time."""
        plan, options = self.plan, self.options
        transformer: Any = load_part("transformer", plan.source, plan.dtype, plan.quantization.get("transformer"))
        damaged = read_weights(transformer)
        if damaged:
            raise CheckpointError(
                f"{plan.source.path}: the transformer's {damaged} holds NaN or infinity: get it again"
            )
        if options.method == "full":
            found = all_weights(transformer)
        else:
            found = add_adapters(transformer, options.targets, options.rank, options.seed, options.method == "dora")
        if trained is not None:
            trained.adapters = found.adapters
            found = trained
            put(transformer, found, found.weights, plan.dtype)
        self.trainables = found
        self.blockwise = Blockwise(transformer, found, plan.dtype, self._pause)

    def unload(self) -> None:
        """Free the frozen weights, while previews need the memory; what is trained stays."""
        self.trainables.adapters = {path: None for path in self.trainables.adapters}  # type: ignore[misc]
        del self.blockwise
        gc.collect()
        mx.clear_cache()

    def reload(self) -> None:
        self._load(self.trainables)

    @property
    def is_changing(self) -> bool:
        """Whether a full update is under way: some blocks are of the next step."""
        return self._changing

    def _pause(self) -> None:
        if not self._changing:
            self._between()

    # ---- one update ----

    def update(self, step: int) -> Update:
        """Update number `step`, from 0. Raises LostPeer."""
        options, world = self.options, self.group.size
        count = options.accumulate or 1
        total: Weights = {}
        squares: list[mx.array] = []
        loss, sound = 0.0, True

        def add(stage: str, gradients: Weights) -> None:
            for path, gradient in gradients.items():
                total[path] = total[path] + gradient if path in total else gradient
            mx.eval(total)

        def apply(stage: str, given: Weights) -> None:
            nonlocal sound
            self._changing = True
            gradients, _ = self.group.mean(given, 0.0)
            norms: Weights = {}
            for path in gradients:
                norms[path] = norm_of({path: gradients[path]})
                mx.eval(norms[path])
            finite = {path for path, norm in norms.items() if mx.isfinite(norm).item()}
            sound = sound and len(finite) == len(norms)
            squares.extend(mx.square(norms[path]) for path in finite)
            ready = {path: clipped({path: gradients[path]}, norms[path], options.clip)[path] for path in sorted(finite)}
            gradients.clear()  # each one leaves as soon as it was used
            given.clear()
            if len(ready) == len(norms):
                self.updater.update(stage, ready, step)

        for number in range(count):
            sample, captions, items, flips = self._sample(step * count * world + number * world + self.group.rank)
            loss += self.blockwise.loss_and_gradients(sample, apply if self.fuses else add)
            if options.keep:
                self.blockwise.loss_and_gradients(self._preserving(sample, captions), add)
        self._changing = False
        loss /= count
        if self.fuses:
            norm = to_float(mx.sqrt(sum(squares, mx.array(0.0))))
            _, loss = self.group.mean({}, loss)
            sound = sound and bool(squares)
        else:
            loss, norm, sound = self._apply(total, loss, count, step)
        if sound and self.ema is not None:
            self.ema = averaged(self.ema, self.trainables.weights, options.ema or 0.0)
        return Update(loss, norm, not sound)

    def _apply(self, total: Weights, loss: float, count: int, step: int) -> tuple[float, float, bool]:
        """An update by the sum of the micro-batches' gradients: loss, norm, and whether it was applied."""
        weights = self.trainables.weights
        gradients = {path: total[path] / count if path in total else mx.zeros_like(a) for path, a in weights.items()}
        gradients, loss = self.group.mean(gradients, loss)
        norm = norm_of(gradients)
        finite = bool(mx.isfinite(norm).item()) and loss == loss and abs(loss) != float("inf")
        if finite:
            self.updater.update("all", clipped(gradients, norm, self.options.clip), step)
        return loss, to_float(norm), finite

    def _sample(self, number: int) -> tuple[Sample, list[str], list[Item], list[bool]]:
        """Micro-batch `number` of the whole run: all that is drawn is decided by the seed and this number."""
        options = self.options
        items = [self.plan.training[index] for index in self._order(number)]
        draw = random.Random(f"sample/{options.seed}/{number}")
        flips = [draw.random() < 0.5 and options.flip for _ in items]
        captions = ["" if draw.random() < options.dropout else item.caption or "" for item in items]
        latents = self._encoded.latents(items, flips)
        tokens = latents.shape[1] * latents.shape[2]
        sigma = to_float(draw_sigmas(options.sigmas, key_of("sigma", options.seed, number), tokens))
        noise = mx.random.normal(latents.shape, key=key_of("noise", options.seed, number))
        references = self._encoded.references(items, flips)
        embeds, weight = self._encoded.embeds(captions), weight_of(options.sigmas, sigma)
        return Sample(latents, noise, embeds, sigma, references, weight), captions, items, flips

    def _preserving(self, sample: Sample, captions: list[str]) -> Sample:
        """The same with the class in the trigger's place: the velocity is to be what it is without the adapters."""
        embeds = self._encoded.embeds([class_caption(self.options, caption) for caption in captions])
        plain = replace(sample, prompt_embeds=embeds, weight=1.0)
        weights = self.trainables.weights
        off = {path: mx.zeros_like(a) if path.endswith(".up") else a for path, a in weights.items()}
        return replace(plain, target=self.blockwise.velocity(plain, off).astype(mx.float32))

    # ---- held out ----

    def held_out_loss(self) -> float | None:
        """The mean loss of the held-out pictures at fixed noise levels with fixed noise; None without any."""
        losses = []
        for index, item in enumerate(self.plan.held_out):
            latents = self._encoded.latents([item], [False])
            references, embeds = self._encoded.references([item], [False]), self._encoded.embeds([item.caption or ""])
            for level, sigma in enumerate(HELD_OUT_SIGMAS):
                noise = mx.random.normal(latents.shape, key=key_of("held-out", self.options.seed, index, level))
                losses.append(self.blockwise.loss(Sample(latents, noise, embeds, sigma, references)))
        return sum(losses) / len(losses) if losses else None

    # ---- state ----

    @property
    def result(self) -> Weights:
        """What is written as the result: the moving average where there is one."""
        if self.ema is None:
            return self.trainables.weights
        return {path: a.astype(self.trainables.weights[path].dtype) for path, a in self.ema.items()}

    def state(self) -> Weights:
        """All arrays that decide what comes next."""
        found = {f"weight/{path}": array for path, array in self.trainables.weights.items()}
        found |= {f"ema/{path}": array for path, array in (self.ema or {}).items()}
        return found | {f"optimizer/{name}": array for name, array in self.updater.state().items()}

    def restore(self, state: Mapping[str, mx.array]) -> None:
        """What `state` returned."""

        def of(kind: str) -> Weights:
            return {name.removeprefix(f"{kind}/"): a for name, a in state.items() if name.startswith(f"{kind}/")}

        weights = of("weight")
        if weights.keys() != self.trainables.weights.keys():
            raise CheckpointError("the run's state holds other layers than this model has; is it the same model?")
        self.trainables.weights.update(weights)
        mx.eval(self.trainables.weights)
        self.updater.restore(of("optimizer"))
        if self.ema is not None:
            self.ema = of("ema")
        put(self.blockwise.transformer, self.trainables, self.trainables.weights, self.plan.dtype)
