"""What a picture will take here: seconds per phase, learned from the runs that were measured."""

from collections.abc import Mapping, Sequence
from typing import Any

TEXT_TOKENS = 512
AREA_PER_TOKEN = 256  # pixels
DRAFTS = ((512, 4), (384, 4), (256, 4), (256, 2), (256, 1))  # (side, steps), the best first
BUDGET_SECONDS = 0.7  # from a key to the first sketch
PICTURE_SECONDS = 1.6  # from a key to the draft


class Timings:
    """Seconds of encoding a new prompt, of a step per token and of decoding per pixel; the latest measurement counts
    half."""

    def __init__(self) -> None:
        self.encode: float | None = None
        self.step: float | None = None  # per token, the text's counted
        self.decode: float | None = None  # per pixel

    @property
    def known(self) -> bool:
        return self.step is not None

    def start(self, predicted: Mapping[str, float] | None) -> None:
        """Take the chip's predicted seconds of a 256 x 256 picture, until something is measured."""
        if predicted and not self.known:
            self.encode, pixels = predicted["encode"], 256 * 256
            self.step, self.decode = predicted["step"] / tokens(256, 256), predicted["decode"] / pixels

    def learn(self, size: Sequence[int], steps: int, seconds: Mapping[str, float]) -> None:
        """size: width, height; steps: of all of the run's pictures together."""
        width, height = size
        if seconds.get("encode", 0) > 1e-3:  # else the prompt was known
            self.encode = _mixed(self.encode, seconds["encode"])
        if seconds.get("steps"):
            self.step = _mixed(self.step, seconds["steps"] / max(1, steps) / tokens(width, height))
        if seconds.get("decode"):
            self.decode = _mixed(self.decode, seconds["decode"] / (width * height))

    def predict(self, width: int, height: int, steps: int, count: int = 1) -> dict[str, Any] | None:
        """Seconds: encode, step, decode, sketch (to the first) and all; None before anything is known."""
        if self.step is None:
            return None
        encode, decode = self.encode or 0.0, (self.decode or 0.0) * width * height
        step = self.step * tokens(width, height)
        total = encode + count * (steps * step + decode)
        told = {"encode": encode, "step": step, "decode": decode, "sketch": encode + step, "seconds": total}
        return {name: round(value, 4) for name, value in told.items()}

    def draft(self, full_side: int, full_steps: int) -> dict[str, Any]:
        """The size and steps of a live draft: the best whose first sketch and picture come within the budget; the
        smallest before anything is known."""
        for side, steps in [(min(side, full_side), min(steps, full_steps)) for side, steps in DRAFTS]:
            found = self.predict(side, side, steps)
            if found and found["sketch"] <= BUDGET_SECONDS and found["seconds"] <= PICTURE_SECONDS:
                break
        return {"side": side, "steps": steps, "predicted": found}


def tokens(width: int, height: int) -> int:
    """That the transformer sees in a picture of this size."""
    return TEXT_TOKENS + width * height // AREA_PER_TOKEN


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else (old + new) / 2
