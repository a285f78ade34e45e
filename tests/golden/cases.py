"""What the golden tensors are made from: prompts, pictures and runs. Plain numpy, no torch."""

from dataclasses import dataclass

import numpy as np

SHORT, LONG = 64, 512  # padded lengths in tokens
PROMPTS = (
    "a red fox in the snow",
    "",
    "一只狐狸 🦊 在雪地里 ❄️, tre\u0300s beau 👩‍🚀",
    "a small blue square on the table, " * 60,
    "it's <|im_end|>\n\n  two  spaces,\ttabs & 12345 <think> ÅÄÖ don't",
)
LONG_PROMPTS = (0, 3)  # padded heavily; cut


@dataclass(frozen=True)
class Run:
    """One picture from the pipeline, noise given. `height` and `width` of None: from the first reference."""

    prompts: tuple[int, ...]
    height: int | None
    width: int | None
    steps: int = 4
    references: tuple[tuple[int, int], ...] = ()  # (height, width) of each picture
    guidance: float = 1.0
    length: int = SHORT

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        height = self.height or self.references[0][0]
        width = self.width or self.references[0][1]
        return height // 16, width // 16


RUNS = {
    "two_prompts": Run((0, 2), 96, 160),
    "empty_prompt": Run((1,), 64, 64, steps=3),
    "cut_prompt": Run((3,), 64, 80, steps=2, length=LONG),
    "one_reference": Run((0, 4), None, None, references=((70, 101),)),
    "two_references": Run((0,), 96, 160, references=((64, 80), (99, 67))),
    "guided": Run((0, 4), 80, 64, steps=3, guidance=3.0),
}
REFERENCE_GRIDS = ((4, 5), (6, 4))  # of the transformer's own case
GRID = (6, 10)

MU_TOKENS = (1, 16, 60, 64, 256, 1024, 4096, 4299, 4300, 4301, 5000, 8192, 16384)
MU_STEPS = (1, 2, 4, 8, 20, 50, 200)
SCHEDULES = ((60, 4), (64, 1), (256, 50), (4096, 4), (4301, 4), (16384, 8))  # (tokens, steps)
BFLOAT16_SIGMAS = (1.0, 0.9666, 0.8923, 0.7031, 0.3137, 0.0502)


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """A test picture, (height, width, 3) uint8: coarse coloured cells, a gradient and some noise."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 180, (height // 16 + 1, width // 16 + 1, 3))
    coarse = cells.repeat(16, axis=0).repeat(16, axis=1)[:height, :width]
    gradient = np.linspace(0, 50, width)[None, :, None] + np.linspace(0, 20, height)[:, None, None]
    return np.clip(coarse + gradient + rng.integers(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)


def references(name: str) -> list[np.ndarray]:
    """The reference pictures of a run."""
    return [picture(*size, seed=100 * (i + 1) + len(name)) for i, size in enumerate(RUNS[name].references)]


def noise(name: str, channels: int) -> np.ndarray:
    """The initial noise of a run, (pictures, channels, h, w)."""
    return normal((len(RUNS[name].prompts), channels, *RUNS[name].grid), seed=31 + list(RUNS).index(name))


def normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Normal noise, float32."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
