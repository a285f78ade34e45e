"""What a picture takes here: seconds and peak memory of every phase, and the fastest that this machine multiplies."""

import math
import platform
import resource
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from klein_mlx.bench.predict import find_chip
from klein_mlx.images.saving import save_image
from klein_mlx.pipeline import KleinPipeline
from klein_mlx.runtime.run import Picture, Step


def reset_peak_rss() -> bool:
    """Let the peak of the process's memory start anew. Linux can; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss() -> int:
    """The most bytes of memory that the process had since `reset_peak_rss`, or since it began where there is none."""
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


@dataclass
class _Open:
    """A phase that is going on. inner: seconds of the phases inside of it."""

    name: str
    inner: float = 0.0
    memory: int = 0
    rss: int = 0


@dataclass
class Phases:
    """Seconds and peak bytes per phase; a phase inside of another counts for itself alone.

    memory: of MLX's own buffers. rss: of the whole process. A phase that comes again adds up.
    """

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    memory: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    rss: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _stack: list[_Open] = field(default_factory=list)
    _thread: int = field(default_factory=threading.get_ident)

    @contextmanager
    def watch(self, name: str) -> Iterator[None]:
        """Measure what happens inside. What another thread does beside it is not counted as a phase."""
        if threading.get_ident() != self._thread:
            yield
            return
        self._note()
        phase = _Open(name)
        self._stack.append(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self._note()
            self._stack.pop()
            if self._stack:
                self._stack[-1].inner += elapsed
            self.seconds[name] += elapsed - phase.inner
            self.memory[name] = max(self.memory[name], phase.memory)
            self.rss[name] = max(self.rss[name], phase.rss)

    def _note(self) -> None:
        """The peaks so far are those of the innermost phase."""
        if self._stack:
            now = self._stack[-1]
            now.memory, now.rss = max(now.memory, mx.get_peak_memory()), max(now.rss, peak_rss())
        mx.reset_peak_memory()
        reset_peak_rss()


@dataclass(frozen=True)
class Measured:
    """One picture's phases, in the order load, encode, step 1, ..., decode, save. cpu: seconds of all threads."""

    steps: int
    cpu: float
    seconds: dict[str, float]
    memory: dict[str, int]
    rss: dict[str, int]


class Bench:
    """Makes the same picture again and again, the number of each in its prompt and its seed."""

    def __init__(self, open_pipeline: Callable[[], KleinPipeline], prompt: str, steps: int | None, cold: bool):
        """open_pipeline: called once, or for every picture if `cold`. prompt: the picture's number is appended."""
        self.open_pipeline, self.prompt, self.steps, self.cold = open_pipeline, prompt, steps, cold
        self.pipe = open_pipeline()

    def _prompt(self, number: int) -> str:
        return f"{self.prompt} {number}"

    def line(self, width: int, height: int, number: int, steps: int) -> dict[str, Any]:
        """The same picture as another program is asked for it."""
        size = {"width": width, "height": height}
        guidance = self.pipe.config.variant.guidance
        return {"prompt": self._prompt(number), "seed": number, "steps": steps, "guidance": guidance, **size}

    def picture(self, width: int, height: int, number: int) -> Measured:
        """Make picture `number` and measure it. If `cold`, everything is loaded for it."""
        if self.cold and number > 1:
            self.pipe = self.open_pipeline()
        phases = Phases()
        run = self.pipe.stream(
            self._prompt(number),
            width=width,
            height=height,
            num_inference_steps=self.steps,
            seed=number,
        )
        step, start = 1, time.process_time()

        def watch(name: str) -> AbstractContextManager[None]:
            return phases.watch(f"step {step}" if name == "steps" else name)

        run.watch = watch
        for event in run:
            if isinstance(event, Step):
                step += 1
            elif isinstance(event, Picture):
                with phases.watch("save"), tempfile.TemporaryDirectory() as folder:
                    save_image(event.image, Path(folder) / "picture.png")
        steps = run.request.steps
        order = ["load", "encode", *(f"step {i}" for i in range(1, steps + 1)), "decode", "save"]
        return Measured(
            steps,
            time.process_time() - start,
            {name: phases.seconds[name] for name in order if name in phases.seconds},
            {name: phases.memory[name] for name in order if name in phases.seconds},
            {name: phases.rss[name] for name in order if name in phases.seconds},
        )


def device_name() -> str:
    """The chip, as MLX or the system calls it."""
    if mx.default_device().type == mx.DeviceType.gpu:
        return str(mx.device_info().get("device_name", "a GPU"))
    return f"{platform.processor() or platform.machine()} CPU ({platform.system()})"


def limit(dtype: mx.Dtype) -> tuple[float, str]:
    """(TFLOPS, where from): a known chip's peak, or what a large matrix multiplication reaches here."""
    if mx.default_device().type == mx.DeviceType.gpu and (chip := find_chip(device_name())):
        kind = "estimated" if chip.is_estimated else "stated"
        return chip.tflops, f"the peak of {chip.name} with {chip.cores} GPU cores, {kind} ({chip.source})"
    if mx.default_device().type != mx.DeviceType.gpu:
        dtype = mx.float32  # what the matmuls go through on a CPU, whatever the dtype
    size, reached = 256, 0.0
    while size <= 8192:
        a, b = mx.ones((size, size), dtype), mx.ones((size, size), dtype)
        mx.eval(a, b, a @ b)
        elapsed = math.inf
        for _ in range(3):
            start = time.perf_counter()
            mx.eval(a @ b)
            elapsed = min(elapsed, time.perf_counter() - start)
        reached = max(reached, 2 * size**3 / elapsed / 1e12)
        if elapsed > 0.1:
            break
        size *= 2
    return reached, f"a matrix multiplication in {str(dtype).removeprefix('mlx.core.')}, measured here"
