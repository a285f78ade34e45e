"""What a picture takes here: seconds and peak memory of every phase; how fast this machine multiplies, and which of two
ways that are equal to rounding is the faster one."""

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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from klein_mlx.bench.predict import find_chip, klein
from klein_mlx.images.saving import save_image
from klein_mlx.model.layers import Gpu, Linear, QuantizedLinear, place, wide
from klein_mlx.model.sampler import all_ids
from klein_mlx.model.transformer import Modulation, SingleBlock, rope_tables
from klein_mlx.model.vae import Conv
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


# ---- which of two equal ways is faster here ----

LEAST_GAIN = 0.03  # by which a way must be faster than the chip's usual one: measuring again would differ by as much
BITS = (3, 4, 5, 6, 8)
ROWS = 4096

Way = Callable[[], mx.array]
Seconds = Callable[[str, Way], float]


@dataclass(frozen=True)
class Sizes:
    """At which the ways are timed, by default klein 4B's. tokens: rising. long: of 2048 x 2048 pixels with their text.
    text, side: of a block's tokens."""

    hidden: int = 3072
    tokens: tuple[int, ...] = (64, 256, 1024, 4608)
    long: int = 128 * 128 + 512
    rows: int = ROWS
    channels: int = 512
    pixels: int = 128
    text: int = 512
    side: int = 32


@dataclass(frozen=True)
class Tuned:
    """choices: as `klein_mlx.runtime.memory.with_choices` takes them. seconds: of every way, by its name."""

    choices: dict[str, Any]
    seconds: dict[str, float]


def best_of_three(name: str, way: Way) -> float:
    """The shortest of three calls after one that may compile."""
    found = []
    for _ in range(4):
        start = time.perf_counter()
        mx.eval(way())
        found.append(time.perf_counter() - start)
    return min(found[1:])


def tune(device: Gpu, seconds: Seconds = best_of_three, sizes: Sizes = Sizes()) -> Tuned:  # noqa: B008
    """Time every way in which a GPU may compute. device: how its kind does, which stays where nothing is faster."""
    told: dict[str, float] = {}

    def is_faster(other: str, usual: str, ways: dict[str, Way]) -> bool:
        told.update({name: seconds(name, way) for name, way in ways.items() if name not in told})
        return told[other] < (1 - LEAST_GAIN) * told[usual]

    choices: dict[str, Any] = {"dense": {}}
    for bits in BITS:
        least = None
        for tokens in reversed(sizes.tokens):
            ways = dense_ways(device, bits, tokens, sizes)
            direct, dense = ways
            if not is_faster(dense, direct, ways):
                break
            least = tokens
        choices["dense"][str(bits)] = least
    for name, ways, usual in (
        ("conv", convolution_ways(device, sizes), device.conv),
        ("rows", row_ways(device, sizes), device.rows),
        ("dtype", dtype_ways(device, sizes), str(device.dtype).rpartition(".")[2]),
    ):
        values = dict(zip(ways, _VALUES[name], strict=True))
        usual_way = next((way for way, value in values.items() if value == usual), next(iter(values)))
        (other,) = set(values) - {usual_way}
        choices[name] = values[other if is_faster(other, usual_way, ways) else usual_way]
    return Tuned(choices, told)


_VALUES: dict[str, tuple[Any, Any]] = {
    "conv": ("direct", "matmul"),
    "rows": (None, ROWS),
    "dtype": ("bfloat16", "float16"),
}


def _drawn(shape: tuple[int, ...], dtype: mx.Dtype, scale: float = 1.0) -> mx.array:
    array = (mx.random.normal(shape, dtype, key=mx.random.key(len(shape))) * scale).astype(dtype)
    mx.eval(array)
    return array


def dense_ways(device: Gpu, bits: int, tokens: int, sizes: Sizes) -> dict[str, Way]:
    """A quantized layer over so many tokens: its weight multiplied as it is packed, or dequantized first."""
    weight = _drawn((sizes.hidden, sizes.hidden), device.dtype, sizes.hidden**-0.5)
    names: list[str] = ["weight", "scales", "biases"]
    arrays = dict(zip(names, mx.quantize(weight, 64, bits), strict=True))
    x = _drawn((1, tokens, sizes.hidden), device.dtype)
    mx.eval(arrays)

    def way(least: int | None) -> Way:
        own = replace(device, dense_from=least, by_bits=(), rows=None)
        layer = QuantizedLinear.of(arrays, 64, bits, "affine", own)
        return lambda: layer(x)

    return {f"{bits} bits, {tokens} tokens, direct": way(None), f"{bits} bits, {tokens} tokens, dequantized": way(0)}


def row_ways(device: Gpu, sizes: Sizes) -> dict[str, Way]:
    """A layer over the tokens of a large picture, whole or in pieces of rows."""
    weight = _drawn((sizes.hidden, sizes.hidden), device.dtype, sizes.hidden**-0.5)
    x = _drawn((1, sizes.long, sizes.hidden), device.dtype)

    def way(rows: int | None) -> Way:
        layer = Linear.of(weight, device=replace(device, rows=rows))
        return lambda: layer(x)

    return {f"{sizes.long} tokens, whole": way(None), f"{sizes.long} tokens, {sizes.rows} rows": way(sizes.rows)}


def convolution_ways(device: Gpu, sizes: Sizes) -> dict[str, Way]:
    """A convolution of the VAE's by MLX's own, or by a matmul."""
    x = _drawn((1, sizes.pixels, sizes.pixels, sizes.channels), device.dtype)

    def way(kind: str) -> Way:
        conv = Conv(sizes.channels, sizes.channels)
        conv.weight = _drawn(conv.weight.shape, device.dtype, (9 * sizes.channels) ** -0.5)
        conv.bias, conv.device = _drawn((sizes.channels,), device.dtype), replace(device, conv=kind)
        conv.arrange()
        return lambda: conv(x)

    return {"convolution, direct": way("direct"), "convolution, matmul": way("matmul")}


def dtype_ways(device: Gpu, sizes: Sizes) -> dict[str, Way]:
    """A single block over the tokens of a small picture in bfloat16, or in float16 beside a float32 stream."""
    own = klein("4b").transformer
    heads = sizes.hidden // own.attention_head_dim
    config = replace(own, num_attention_heads=heads)
    ids = all_ids(sizes.text, sizes.side, sizes.side, None)
    rope = rope_tables(ids, config.axes_dims_rope, config.rope_theta, sizes.text)

    def way(dtype: mx.Dtype) -> Way:
        block: Any = SingleBlock(config)
        block.set_dtype(dtype)
        for one in (block.linear_in, block.linear_out):
            one.weight = _drawn(one.weight.shape, dtype, one.weight.shape[1] ** -0.5)
        place(block, device)
        block.arrange()
        x = _drawn((1, ids.shape[0], sizes.hidden), wide(dtype))
        vector = _drawn((sizes.hidden,), wide(dtype))
        mx.eval(block.parameters())
        return lambda: block(x, Modulation(vector, 1 + vector, vector), rope)[0]

    return {"a block, bfloat16": way(mx.bfloat16), "a block, float16": way(mx.float16)}
