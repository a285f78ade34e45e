"""Linear layers with what a LoRA puts beside them: it reads the same input and is added."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from klein_mlx.model.layers import Layer, Placed


class KroneckerBranch(Placed):
    """x @ kron(left, right).T without ever making the product. left: (a, b); right: (c, d); of the product's rows those
    from `start` to `stop` are taken."""

    def __init__(self, left: mx.array, right: mx.array, start: int, stop: int):
        super().__init__()
        self.left, self.right = left, right
        self.start, self.stop = start, stop
        self.rows: mx.array | None = None  # what each output, or input, is multiplied by
        self.columns: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """x: (..., b * d). Returns (..., stop - start)."""
        if self.columns is not None:
            x = x * self.columns
        (a, b), (c, d) = self.left.shape, self.right.shape
        x = mx.unflatten(x, -1, (b, d))
        if c * b * (d + a) <= a * d * (b + c):  # the cheaper of two orders
            x = self._left(self.device.matmul(x, self.right))
        else:
            x = self.device.matmul(self._left(x), self.right)
        x = x.flatten(-2)
        if self.stop - self.start < a * c:
            x = x[..., self.start : self.stop]
        return x if self.rows is None else x * self.rows

    def _left(self, x: mx.array) -> mx.array:
        """(..., b, n) -> (..., a, n)."""
        return self.device.matmul(x.swapaxes(-1, -2), self.left).swapaxes(-1, -2)


class Branched(Layer):
    """base(x), and beside it x @ down.T @ up.T and whatever else there is.

    down: (rank, in); up: (out, rank). rows, columns: what base's outputs and inputs are multiplied by, less one.
    bias: (out,). others: modules that are added. All but base may be missing.
    """

    def __init__(self, base: Any):
        super().__init__()
        self.base, self.device = base, base.device
        self.up: Any = None
        self.down: Any = None
        self.rows: mx.array | None = None
        self.columns: mx.array | None = None
        self.bias: mx.array | None = None
        self.others: list[nn.Module] = []

    def __call__(self, x: mx.array) -> mx.array:
        out = self._gained(x)
        if self.up is not None:
            out = self.device.matmul(self.device.matmul(x, self.down), self.up, out)
        for other in self.others:
            out = out + other(x)  # type: ignore[operator]
        return out if self.bias is None else out + self.bias

    @property
    def has_bias(self) -> bool:
        return self.bias is not None

    def split(self, x: mx.array, at: int) -> tuple[mx.array, mx.array]:
        """self(x), cut at output channel `at`."""
        if not self._is_low_rank():
            whole = self(x)
            return whole[..., :at], whole[..., at:]
        first, second = self.base.split(x, at)
        narrow = self.device.matmul(x, self.down)
        return self.device.matmul(narrow, self.up[:at], first), self.device.matmul(narrow, self.up[at:], second)

    def part(self, x: mx.array, channels: slice) -> mx.array:
        """Some output channels of self(x)."""
        if not self._is_low_rank():
            return self(x)[..., channels]
        return self.device.matmul(self.device.matmul(x, self.down), self.up[channels], self.base.part(x, channels))

    def terms(self, first: mx.array, second: mx.array) -> tuple[mx.array, ...]:
        """Arrays that add up to self([first, second])."""
        if not self._is_low_rank():
            return (self(mx.concatenate([first, second], axis=-1)),)
        at = first.shape[-1]
        narrow = self.device.matmul(second, self.down[:, at:], self.device.matmul(first, self.down[:, :at]))
        one, *rest = self.base.terms(first, second)
        return self.device.matmul(narrow, self.up, one), *rest

    def _is_low_rank(self) -> bool:
        """Whether nothing but the low-rank factors stands beside the layer: then nothing needs joining or cutting."""
        return self.up is not None and not self.others and all(a is None for a in (self.rows, self.columns, self.bias))

    def _gained(self, x: mx.array) -> mx.array:
        """The layer itself, with DoRA's gains: of outputs, of inputs, or the sum of both kinds' parts."""
        if self.rows is None:
            return self.base(x if self.columns is None else x + x * self.columns)
        out = self.base(x)
        out = out + out * self.rows
        return out if self.columns is None else out + self.base(x * self.columns)
