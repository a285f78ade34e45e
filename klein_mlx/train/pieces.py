"""How a block goes back: in pieces of its tokens, so that only one piece's activations are in memory.

All that is large in a block belongs to one token alone, but for what every token reads of all: keys and values. Those
are computed first. Then pieces of tokens attend to them and go through the rest of the block; their gradients of keys
and values are added up, and go back to the block's input in pieces too. The cost is one more projection to keys and
values: a fifth of a block's forward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import mlx.core as mx

from klein_mlx.model.transformer import Modulation, Modulations, Rope
from klein_mlx.train.adapters import Weights

_KEYS = {"to_qk", "to_k", "to_v", "norm_q", "norm_k", "norm_qk", "linear_in"}  # what keys and values are made by
_KEYS_ALONE = {"to_k", "to_v"}
# (trainables, function, its inputs, gradients of its results) -> gradients of trainables and of inputs, lazily
Back = Callable[..., tuple[Weights, list[mx.array]]]


def structured(flat: list[mx.array]) -> Modulations:
    """The inverse of tree_flatten on Modulations."""
    vectors = [Modulation(*flat[i : i + 3]) for i in range(0, len(flat) - 2, 3)]
    return Modulations((vectors[0], vectors[1]), (vectors[2], vectors[3]), vectors[4], (flat[-2], flat[-1]))


@dataclass(frozen=True)
class Part:
    """A stream of a block: all of a single block, or one of a double block's two.

    module: computes it, with `read`, `keys_values`, `attending`. kind: its field of Modulations. own: its trainables.
    x: (B, S, hidden), what it was given. wanted: its tokens that are read afterwards. rows: of a piece, at most.
    """

    module: Any
    kind: str
    own: Weights
    x: mx.array
    rope: Rope
    wanted: tuple[int, int]
    rows: int

    def pieces(self, start: int, stop: int) -> list[slice]:
        """Some of its tokens in pieces of about one size."""
        count = -(-(stop - start) // self.rows)
        edges = [start + (stop - start) * i // count for i in range(count + 1)] if count else []
        return [slice(*edge) for edge in pairwise(edges)]

    def keys_values(self, tokens: slice, flat: list[mx.array], x: mx.array) -> list[mx.array]:
        """Of some of its tokens. flat: the modulations."""
        h = self.module.read(x, self._first(flat))
        return list(self.module.keys_values(h, self.rope.rows(tokens.start, tokens.stop)))

    def attending(self, tokens: slice, flat: list[mx.array], x: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Some of its tokens behind the block. k, v: of all tokens of the block."""
        h, rope = self.module.read(x, self._first(flat)), self.rope.rows(tokens.start, tokens.stop)
        return self.module.attending(x, h, getattr(structured(flat), self.kind), rope, (k, v))

    def _first(self, flat: list[mx.array]) -> Modulation:
        found = getattr(structured(flat), self.kind)
        return found if isinstance(found, Modulation) else found[0]

    def named(self, keys: bool) -> Weights:
        """The trainables that make keys and values, or those that make what attends to them."""

        def is_one(path: str) -> bool:
            names = set(path.split("."))
            return bool(names & _KEYS) if keys else not names & _KEYS_ALONE

        return {path: array for path, array in self.own.items() if is_one(path)}


@dataclass
class BlockBack:
    """The way back through one block. flat: the modulations; needs: whether their gradients are asked for. apart:
    whether each trainable's gradient is evaluated alone, for where they are as large as the block.

    After a call `own` and `vectors` hold the gradients of trainables and modulations, evaluated.
    """

    parts: list[Part]
    flat: list[mx.array]
    needs: bool
    apart: bool
    back: Back
    own: Weights = field(default_factory=dict)
    vectors: list[mx.array] = field(default_factory=list)

    def __call__(self, outputs: Sequence[mx.array]) -> list[mx.array]:
        """Gradients of the parts' inputs. outputs: those of their wanted tokens behind the block."""
        pairs = [part.keys_values(slice(0, None), self.flat, part.x) for part in self.parts]
        keys_values = [mx.concatenate(list(arrays), axis=1) for arrays in zip(*pairs, strict=True)]
        mx.eval(keys_values)
        of_keys = [mx.zeros(array.shape) for array in keys_values]  # float32: so many are added
        changes = []
        for part, output in zip(self.parts, outputs, strict=True):
            change, of_keys = self._attending(part, output, keys_values, of_keys)
            changes.append(change)
        del keys_values
        done = 0
        for part, change in zip(self.parts, changes, strict=True):
            length = part.x.shape[1]
            self._keys(part, [a[:, done : done + length] for a in of_keys], change)
            done += length
        return [mx.concatenate([piece for _, piece in change], axis=1) for change in changes]

    def _attending(
        self, part: Part, output: mx.array, keys_values: list[mx.array], of_keys: list[mx.array]
    ) -> tuple[list[tuple[slice, mx.array]], list[mx.array]]:
        """Gradients of the input, piece by piece, and of all keys and values: those given, with this part's added."""
        length, (first, last) = part.x.shape[1], part.wanted
        unread = [slice(0, first)] * (first > 0), [slice(last, length)] * (last < length)
        zeros = [[(s, mx.zeros_like(part.x[:, s])) for s in slices] for slices in unread]
        change = []
        for tokens in part.pieces(first, last):

            def call(x: mx.array, k: mx.array, v: mx.array, *vectors: mx.array) -> list[mx.array]:
                return [part.attending(tokens, list(vectors) or self.flat, x, k, v)]  # noqa: B023

            given = output[:, tokens.start - first : tokens.stop - first]
            x, k, v = self._step(part.named(keys=False), call, [part.x[:, tokens], *keys_values], [given])
            of_keys = [of_keys[0] + k.astype(mx.float32), of_keys[1] + v.astype(mx.float32)]
            del k, v
            mx.eval(x, of_keys, self.own, self.vectors)
            change.append((tokens, x))
        return [*zeros[0], *change, *zeros[1]], of_keys

    def _keys(self, part: Part, of_keys: list[mx.array], change: list[tuple[slice, mx.array]]) -> None:
        """Add to the input's gradients, in place, what comes through keys and values."""
        for number, (tokens, sofar) in enumerate(change):
            pieces = []
            for piece in part.pieces(tokens.start, tokens.stop):

                def call(x: mx.array, *vectors: mx.array) -> list[mx.array]:
                    return part.keys_values(piece, list(vectors) or self.flat, x)  # noqa: B023

                given = [a[:, piece].astype(part.x.dtype) for a in of_keys]
                (x,) = self._step(part.named(keys=True), call, [part.x[:, piece]], given)
                mx.eval(x, self.own, self.vectors)
                pieces.append(x)
            change[number] = tokens, sofar + (pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=1))

    def _step(
        self, own: Weights, call: Callable[..., list[mx.array]], inputs: list[mx.array], outputs: list[mx.array]
    ) -> list[mx.array]:
        """Gradients of the inputs, lazily; those of trainables and modulations are added to what there is."""
        vectors = self.flat if self.needs else []
        found, gradients = self.back(own, call, [*inputs, *vectors], outputs)
        if self.apart:
            mx.eval(gradients)
        for path in list(found):
            self.own[path] = self.own[path] + found.pop(path) if path in self.own else found.pop(path)
            if self.apart:
                mx.eval(self.own[path])
        more = gradients[len(inputs) :]
        self.vectors = [a + b for a, b in zip(self.vectors, more, strict=True)] if self.vectors else more
        return gradients[: len(inputs)]
