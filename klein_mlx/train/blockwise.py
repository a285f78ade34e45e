"""The loss and its gradients, block by block: only one block's activations are ever in memory.

A step has stages: the stem (embedders and modulations), every block, the tail (last layer and loss). The forward pass
keeps what each stage was given; the backward pass goes through the stages from the last, computes each again inside
mx.vjp, and evaluates its gradients before the next. A block goes back in pieces of its tokens, see
klein_mlx.train.pieces. Gradients equal those of one mx.value_and_grad.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from klein_mlx.model.sampler import References, all_ids, latents_to_tokens
from klein_mlx.model.transformer import Rope, Transformer, rope_tables
from klein_mlx.train.adapters import Trainables, Weights, put
from klein_mlx.train.memory import piece_rows
from klein_mlx.train.noise import to_float
from klein_mlx.train.pieces import BlockBack, Part, structured

ROPES = 32
OnStage = Callable[[str, Weights], None]  # (stage, its gradients), evaluated


@dataclass(frozen=True)
class Sample:
    """A micro-batch at one noise level.

    latents: (B, h, w, C), clean and normalized. noise: the same shape. prompt_embeds: (B, L, D). sigma: (0, 1].
    references: their tokens (B, N, C), or None. weight: of the loss. target: (B, h * w, C), what the velocity is to
    be; None: noise - latents.
    """

    latents: mx.array
    noise: mx.array
    prompt_embeds: mx.array
    sigma: float
    references: References | None = None
    weight: float = 1.0
    target: mx.array | None = None


@dataclass
class _Kept:
    """What a stage was given."""

    stage: str
    inputs: list[mx.array]


class Blockwise:
    """A transformer with trainable weights, and the passes of a step.

    dtype: of the computation. between: called between stages; what it raises ends the pass there.
    """

    def __init__(
        self,
        transformer: Transformer,
        trainables: Trainables,
        dtype: mx.Dtype,
        between: Callable[[], None] = lambda: None,
    ):
        self.transformer, self.trainables, self.dtype, self.between = transformer, trainables, dtype, between
        self._blocks = {f"double_blocks.{i}": block for i, block in enumerate(transformer.double_blocks)}
        self._blocks |= {f"single_blocks.{i}": block for i, block in enumerate(transformer.single_blocks)}
        self._last_block = f"single_blocks.{len(transformer.single_blocks) - 1}"
        self._ropes: dict[Any, Rope] = {}

    # ---- forward ----

    def velocity(self, sample: Sample, weights: Weights | None = None) -> mx.array:
        """The velocity of a sample, (B, h * w, C), evaluated. weights: instead of the trainables' own."""
        kept = self._forward(sample, weights, keep=False)
        x, (shift, scale) = kept[-1].inputs[0], kept[-1].inputs[1:]
        put(self.transformer, self.trainables, self._own("tail", weights), self.dtype)
        out = self._tail(sample, x, shift, scale)
        mx.eval(out)
        return out

    def loss(self, sample: Sample) -> float:
        """The loss of a sample without gradients."""
        return to_float(self._loss(sample, self.velocity(sample)))

    def loss_and_gradients(self, sample: Sample, on_stage: OnStage) -> float:
        """The loss; on_stage gets each stage's gradients of the trainables, from the last stage to the first.

        A loss that is not finite is returned without going back.
        """
        kept = self._forward(sample, None, keep=True)
        flat = kept[0].inputs
        loss, own, (change, *final) = self._last(sample, kept.pop())
        if not mx.isfinite(loss).item():
            return to_float(loss)
        self._hand(on_stage, "tail", own)
        changes: list[mx.array] = [mx.zeros_like(a) for a in flat]
        changes[-2:] = final
        first = next((i for i, one in enumerate(kept) if self.trainables.of_stage(one.stage)), len(kept))
        both = [change]
        while len(kept) > first:
            one = kept.pop()
            if one.stage == "stem":
                txt, img = both
                stem = self.trainables.of_stage("stem")
                own, both = self._back(stem, lambda: self._stem(sample)([]), [], [img, txt, *changes])
            else:
                own, both, more = self._back_block(sample, one, both, flat)
                changes = [a + b for a, b in zip(changes, more, strict=True)] if more else changes
            mx.eval(both, changes)
            for array in own.values():  # one by one: in float32 the stem's matrices would be two blocks
                mx.eval(array)
            array = None
            self._hand(on_stage, one.stage, own)
            del own  # before the next stage's are made
            self.between()
        return to_float(loss)

    def _hand(self, on_stage: OnStage, stage: str, own: Weights) -> None:
        if own:
            on_stage(stage, own)
            put(
                self.transformer, self.trainables, self.trainables.of_stage(stage), self.dtype
            )  # it may have changed them

    def _forward(self, sample: Sample, weights: Weights | None, keep: bool) -> list[_Kept]:
        """Every stage's inputs, in order; without `keep` only the last one's."""
        put(self.transformer, self.trainables, self._own("stem", weights), self.dtype)
        img, txt, *flat = self._stem(sample)([])
        mx.eval(img, txt, flat)
        kept = [_Kept("stem", flat)]
        state = [txt, img]
        for stage in self._blocks:
            if stage.startswith("single") and len(state) == 2:
                state = [mx.concatenate(state, axis=1)]
            if keep:
                kept.append(_Kept(stage, state))
            put(self.transformer, self.trainables, self._own(stage, weights), self.dtype)
            state = self._call(sample, stage, flat)(state)
            mx.eval(state)
            self.between()
        if len(state) == 2:
            state = [mx.concatenate(state, axis=1)]
        return [*kept, _Kept("tail", [state[0], *flat[-2:]])]

    def _own(self, stage: str, weights: Weights | None) -> Weights:
        own = self.trainables.of_stage(stage)
        return own if weights is None else {path: weights[path] for path in own}

    # ---- the stages as functions of lists of arrays ----

    def _stem(self, sample: Sample) -> Callable[[list[mx.array]], list[mx.array]]:
        """(nothing) -> image stream, text stream, the modulations' vectors."""

        def call(_: list[mx.array]) -> list[mx.array]:
            model, sigma = self.transformer, sample.sigma
            noisy = (1 - sigma) * sample.latents.astype(mx.float32) + sigma * sample.noise
            tokens = latents_to_tokens(noisy).astype(self.dtype)
            if sample.references is not None:
                tokens = mx.concatenate([tokens, sample.references.tokens.astype(self.dtype)], axis=1)
            modulations = model.modulations(sigma, self.dtype)
            flat: list[mx.array] = [array for _, array in tree_flatten(modulations)]  # type: ignore[misc]
            return [model.img_in(tokens), model.embed_text(sample.prompt_embeds.astype(self.dtype)), *flat]

        return call

    def _call(self, sample: Sample, stage: str, flat: list[mx.array]) -> Callable[[list[mx.array]], list[mx.array]]:
        """A block: its streams -> its streams."""
        block, rope, modulations = self._blocks[stage], self._rope(sample), structured(flat)

        def call(state: list[mx.array]) -> list[mx.array]:
            if len(state) == 2:
                return list(block(*state, modulations.txt, modulations.img, rope)[0])  # type: ignore[call-arg]
            wanted = self._image(sample) if stage == self._last_block else None
            return [block(state[0], modulations.single, rope, None, wanted)[0]]  # type: ignore[call-arg,list-item]

        return call

    def _tail(self, sample: Sample, x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
        model = self.transformer
        x = mx.fast.layer_norm(x, scale, shift, model.config.eps)
        return model.final_out(x.astype(self.dtype))

    @staticmethod
    def _image(sample: Sample) -> tuple[int, int]:
        """Where the picture's tokens are: all that the last block's result is read for."""
        length, (_, h, w, _) = sample.prompt_embeds.shape[1], sample.latents.shape
        return length, length + h * w

    def _loss(self, sample: Sample, velocity: mx.array) -> mx.array:
        target = sample.target
        if target is None:
            target = latents_to_tokens(sample.noise - sample.latents.astype(mx.float32))
        squares = mx.square(velocity.astype(mx.float32) - target)
        return sample.weight * squares.mean(axis=-1).mean()  # a CPU adds one by one: long sums would lose digits

    # ---- backward ----

    def _last(self, sample: Sample, kept: _Kept) -> tuple[mx.array, Weights, list[mx.array]]:
        """Loss, gradients of the tail's trainables, and of its inputs."""
        own = self.trainables.of_stage("tail")

        def call(*arrays: mx.array) -> list[mx.array]:
            put(self.transformer, self.trainables, dict(zip(own, arrays, strict=False)), self.dtype)
            return [self._loss(sample, self._tail(sample, *arrays[len(own) :]))]

        (loss,), gradients = mx.vjp(call, [*own.values(), *kept.inputs], [mx.array(1.0)])
        put(self.transformer, self.trainables, own, self.dtype)
        mx.eval(loss, gradients)
        return loss, dict(zip(own, gradients, strict=False)), list(gradients[len(own) :])

    def _back_block(
        self, sample: Sample, kept: _Kept, both: list[mx.array], flat: list[mx.array]
    ) -> tuple[Weights, list[mx.array], list[mx.array]]:
        """Gradients of a block's trainables, of its streams, and of the modulations where those are trained."""
        if len(both) < len(kept.inputs):  # the single blocks' one stream is the double blocks' two
            length = sample.prompt_embeds.shape[1]
            both = [both[0][:, :length], both[0][:, length:]]
        put(self.transformer, self.trainables, self.trainables.of_stage(kept.stage), self.dtype)
        needs, apart = bool(self.trainables.of_stage("stem")), not self.trainables.adapters
        back = BlockBack(self._parts(sample, kept), flat, needs, apart, self._back)
        streams = back(both)
        return back.own, streams, back.vectors

    def _parts(self, sample: Sample, kept: _Kept) -> list[Part]:
        block: Any = self._blocks[kept.stage]
        own, rope, (one, *other) = self.trainables.of_stage(kept.stage), self._rope(sample), kept.inputs
        tokens = one.shape[1] + sum(x.shape[1] for x in other)
        rows = piece_rows(self.transformer.config, tokens)
        if not other:
            wanted = self._image(sample) if kept.stage == self._last_block else (0, tokens)
            return [Part(block, "single", own, one, rope, wanted, rows)]

        def part(name: str, x: mx.array, rope: Rope) -> Part:
            some = {path: array for path, array in own.items() if path.startswith(f"{kept.stage}.{name}.")}
            return Part(getattr(block, name), name, some, x, rope, (0, x.shape[1]), rows)

        length = one.shape[1]
        return [part("txt", one, rope.rows(0, length)), part("img", other[0], rope.rows(length))]

    def _back(
        self,
        own: Weights,
        function: Callable[..., list[mx.array]],
        inputs: list[mx.array],
        outputs: Sequence[mx.array],
    ) -> tuple[Weights, list[mx.array]]:
        """Gradients of some trainables and of a function's inputs, lazily. outputs: those of its results."""

        def call(*arrays: mx.array) -> list[mx.array]:
            put(self.transformer, self.trainables, dict(zip(own, arrays, strict=False)), self.dtype)
            return function(*arrays[len(own) :])

        _, gradients = mx.vjp(call, [*own.values(), *inputs], list(outputs))
        put(self.transformer, self.trainables, own, self.dtype)  # a traced array must not stay in a module
        return dict(zip(own, gradients, strict=False)), list(gradients[len(own) :])

    def _rope(self, sample: Sample) -> Rope:
        """The rotary tables of [text, image, references]; those of the newest few sizes are kept."""
        _, h, w, _ = sample.latents.shape
        length, config = sample.prompt_embeds.shape[1], self.transformer.config
        references = sample.references
        key = (length, h, w, None if references is None else bytes(memoryview(references.ids)))  # type: ignore[arg-type]
        if key not in self._ropes:
            ids = all_ids(length, h, w, references)
            self._ropes[key] = rope_tables(ids, config.axes_dims_rope, config.rope_theta, length)
            while len(self._ropes) > ROPES:
                del self._ropes[next(iter(self._ropes))]
        return self._ropes[key]
