"""Apple's chips as data: GPU cores, peak of matrix multiplication, memory bandwidth, and where the numbers come from.

Each row is the largest GPU that is sold under its name; smaller ones have proportionally less.
"""

from dataclasses import dataclass

from klein_mlx.errors import RequestError

# M1 and M2: Apple's own figures. M3, M4: Apple states none; benchmark sites', as the Hugging Face Hub lists them
# (huggingface.js, packages/tasks/src/hardware.ts). They are float32 rates: a core of these GPUs multiplies matrices in
# half precision no faster (github.com/philipturner/metal-benchmarks, FP16/FP32 ratio 1).
APPLE = "Apple"
LISTED = "benchmark sites, by way of huggingface.js's hardware table"
# 7.5 TFLOPS measured in float16 on an A19's 5 cores, which the M5 family shares; taken per core, at the A19's clock.
SCALED = "an A19's matrix units, measured (tzakharko.github.io/apple-neural-accelerators-benchmark), times cores"


@dataclass(frozen=True)
class Chip:
    """tflops: peak of half-precision matrix multiplication. bandwidth: GB/s, as Apple states it. source: of tflops."""

    name: str
    cores: int
    tflops: float
    bandwidth: float
    source: str

    @property
    def generation(self) -> int:
        """1 of M1 Max."""
        return int(self.name[1])

    @property
    def is_estimated(self) -> bool:
        """Whether the peak is not Apple's own figure."""
        return self.source != APPLE


CHIPS = (
    Chip("M1", 8, 2.6, 68, APPLE),
    Chip("M1 Pro", 16, 5.2, 200, APPLE),
    Chip("M1 Max", 32, 10.4, 400, APPLE),
    Chip("M1 Ultra", 64, 21.0, 800, APPLE),
    Chip("M2", 10, 3.6, 100, APPLE),
    Chip("M2 Pro", 19, 6.8, 200, APPLE),
    Chip("M2 Max", 38, 13.6, 400, APPLE),
    Chip("M2 Ultra", 76, 27.2, 800, APPLE),
    Chip("M3", 10, 4.1, 100, LISTED),
    Chip("M3 Pro", 18, 7.4, 150, LISTED),
    Chip("M3 Max", 40, 14.2, 400, LISTED),
    Chip("M3 Ultra", 80, 28.4, 819, LISTED),
    Chip("M4", 10, 4.6, 120, LISTED),
    Chip("M4 Pro", 20, 9.2, 273, LISTED),
    Chip("M4 Max", 40, 18.4, 546, LISTED),
    Chip("M5", 10, 15.0, 153, SCALED),
    Chip("M5 Pro", 20, 30.0, 307, SCALED),
    Chip("M5 Max", 40, 60.0, 614, SCALED),
)


def find_chip(name: str) -> Chip | None:
    """The chip that MLX's device_info or a user calls so ("Apple M3 Max", "m3 max"); None if it is not listed."""
    words = " ".join(name.lower().removeprefix("apple").split())
    return next((chip for chip in CHIPS if chip.name.lower() == words), None)


def named_chip(name: str) -> Chip:
    """As `find_chip`; RequestError if there is no such chip."""
    chip = find_chip(name)
    if chip is None:
        raise RequestError(f"--predict is {name!r}; it must be one of {', '.join(chip.name for chip in CHIPS)}")
    return chip
