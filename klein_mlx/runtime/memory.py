"""How much memory a request takes, phase by phase, told before anything is loaded; and what fits in the machine's.

On a GPU nothing can catch a lack of memory: Metal ends the process. So a request that cannot fit is refused first.
Weights are counted exactly, from shapes; the arrays of a step or a layer by how many of them are alive at its fullest
moment, which differs by device: a CPU expands quantized weights to float32, has no attention in one kernel, and so on.
Those counts were measured on a CPU; on a GPU they are those of the traced graph.
How the device computes is read here too: it may have been measured on this machine.
"""

import json
import os
import resource
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import mlx.core as mx

from klein_mlx.config import PARTS, ModelConfig, VAEConfig
from klein_mlx.errors import DoesNotFit, RequestError, human_bytes
from klein_mlx.model.layers import SCORES, Device, Gpu, here
from klein_mlx.model.vae import strip_rows
from klein_mlx.paths import cache_folder, keep_json, version
from klein_mlx.weights.checkpoint import Source, part_bytes
from klein_mlx.weights.quantize import QUANTIZED_PARTS, Quantization

KEPT = {"all": PARTS, "transformer": ("transformer", "vae"), "nothing": ()}
PHASES = ("references", "encode", "steps", "decode")
_BESIDE = 5_000_000  # masks, rows of embeddings, a matrix on its way: what no formula below counts
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_LIBRARIES = 1_100_000_000  # bytes of address space that threads and libraries take once they work


@dataclass(frozen=True)
class Work:
    """What of a request decides its memory.

    height, width: in pixels. references: (height, width) of every picture that the VAE encodes. tokens: how many of
    the references' tokens the transformer sees. length: text positions. rows: 2 where guidance's two branches run in
    one pass. encodes: whether a prompt has to be encoded. memories: how many times every block's keys and values of the
    references are kept: for each branch of guidance, where they serve several steps.
    """

    height: int
    width: int
    references: tuple[tuple[int, int], ...] = ()
    tokens: int = 0
    length: int = 512
    rows: int = 1
    encodes: bool = True
    memories: int = 0


@dataclass(frozen=True)
class LoraBytes:
    """What LoRAs take beside the weights. resident: bytes of all their arrays. merging: part -> bytes that changing its
    layers takes when the part is loaded."""

    resident: int = 0
    merging: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """Bytes at the fullest moment of every phase; phases that there are not are absent.

    weights: of each part, once it is in memory. keep: as asked for or chosen. machine: what there is. loras: counted in
    the phases.
    """

    phases: Mapping[str, int]
    weights: Mapping[str, int]
    keep: str
    machine: int
    loras: LoraBytes = field(default_factory=LoraBytes)

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.machine


def machine_memory() -> int:
    """Bytes that there are for weights and arrays.

    On a GPU what Metal recommends. On a CPU, where the system ends a process that takes what others hold, what is free
    now besides what MLX holds already; at most the machine's, its container's and MLX's own limit.
    """
    if mx.default_device().type == mx.DeviceType.gpu:
        told = mx.device_info()
        for name in ("max_recommended_working_set_size", "memory_size", "total_memory"):
            if told.get(name):
                return min(int(told[name]), mx.get_memory_limit())
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    own = mx.get_active_memory() + mx.get_cache_memory()
    return min(installed, mx.get_memory_limit(), *(free + own for free in _free()))


def _free() -> Iterator[int]:
    """Bytes that a process can still take: of the machine's and of its container's memory, where the system tells."""
    with suppress(OSError, KeyError, ValueError):
        yield _table(_MEMINFO)["MemAvailable:"] * 1024
    with suppress(OSError, KeyError, ValueError):  # no container, or one without a limit ("max")
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        yield limit - used + _table(_CGROUP / "memory.stat")["file"]  # what is cached of files leaves when asked for
    with suppress(OSError, KeyError, ValueError):  # `ulimit -v`
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            yield max(0, limit - max(_table(_STATUS)["VmSize:"] * 1024, _LIBRARIES))


def _table(path: Path) -> dict[str, int]:
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def weight_bytes(source: Source, dtype: mx.Dtype, quantization: Mapping[str, Quantization]) -> dict[str, int]:
    """What each part's weights take once they are loaded; the encoder's table of tokens stays on disk."""
    sizes = {part: part_bytes(part, source, dtype, quantization.get(part)) for part in PARTS}
    encoder = source.config.text_encoder
    table = encoder.vocab_size * encoder.hidden_size
    stored = source.quantization.get("text_encoder") or quantization.get("text_encoder")
    own = stored.of("text_encoder", "embed_tokens") if stored else None
    if own is None:
        sizes["text_encoder"] -= table * dtype.size
    else:
        scales = table // own.group_size * (2 * dtype.size if own.mode == "affine" else 1)
        sizes["text_encoder"] -= table * own.bits // 8 + scales
    return sizes


def choose_keep(weights: Mapping[str, int], machine: int) -> str:
    """What stays in memory between calls: what fits in half of the machine's."""
    if sum(weights.values()) <= machine / 2:
        return "all"
    return "transformer" if weights["transformer"] + weights["vae"] <= machine / 2 else "nothing"


def estimate(
    source: Source,
    work: Work,
    dtype: mx.Dtype,
    quantization: Mapping[str, Quantization],
    keep: str | None = None,
    loaded: Sequence[str] = (),
    machine: int | None = None,
    weights: Mapping[str, int] | None = None,
    loras: LoraBytes | None = None,
    device: Device = None,
) -> Estimate:
    """Bytes per phase of one picture.

    quantization: of parts that are quantized while loading. keep: None to choose: what suits the machine, or less where
    only that fits. loaded: parts that are in memory already; those that are not kept leave before. machine: bytes that
    there are; None: this machine's. weights: from `weight_bytes`, where that is known already. loras: None for none.
    device: None: the default one.
    """
    weights = weights or weight_bytes(source, dtype, quantization)
    machine = machine_memory() if machine is None else machine
    loras = loras or LoraBytes()
    if keep is None:
        kept = [*KEPT][[*KEPT].index(choose_keep(weights, machine)) :]
        found = (estimate(source, work, dtype, quantization, k, loaded, machine, weights, loras, device) for k in kept)
        return next(one for one in found if one.fits or one.keep == kept[-1])
    quantized = {part: part in quantization or part in source.quantization for part in PARTS}
    config = source.config
    pictures = [vae_bytes(config.vae, *size, dtype, True, device) for size in work.references]
    arrays = {
        "references": max(pictures, default=0),
        "encode": encoder_bytes(config, work, dtype, quantized["text_encoder"], device) if work.encodes else 0,
        "steps": step_bytes(config, work, dtype, quantized["transformer"], device),
        "decode": vae_bytes(config.vae, work.height, work.width, dtype, False, device),
    }
    needed = {"references": "vae", "encode": "text_encoder", "steps": "transformer", "decode": "vae"}
    there, phases = {part for part in loaded if part in KEPT[keep]}, {}
    for phase in PHASES:
        if not arrays[phase]:
            continue
        part = needed[phase]
        most = arrays[phase] if part in there else max(arrays[phase], loras.merging.get(part, 0))
        there.add(part)
        phases[phase] = sum(weights[part] for part in there) + most + loras.resident
        there = {part for part in there if part in KEPT[keep]}
    return Estimate(phases, weights, keep, machine, loras)


# ---- arrays ----


def encoder_bytes(config: ModelConfig, work: Work, dtype: mx.Dtype, quantized: bool, device: Device = None) -> int:
    """Beside the encoder's weights, while a prompt runs through it. device: None: the default one."""
    device = device or here()
    c, length = config.text_encoder, work.length
    hidden, mlp = length * c.hidden_size, length * c.intermediate_size
    taps = len(config.taps) * hidden
    scores = min(c.num_attention_heads * length**2, SCORES)
    matrix = 2 * c.hidden_size * c.intermediate_size  # gate and up are joined
    if not device.widens:
        expanded = matrix if quantized and device.is_dequantized(length) else 0
        return (6 * hidden + 3 * mlp + taps + expanded) * dtype.size + length**2
    if quantized:  # each matrix is expanded after what comes before it, so the layer runs in its written order
        return 4 * (3 * max(scores, mlp) + matrix) + dtype.size * (5 * hidden + taps) + _BESIDE
    return 4 * (6 * hidden + 3 * mlp + taps + 3 * scores) + _BESIDE


def fits_twice(
    config: ModelConfig, work: Work, dtype: mx.Dtype, quantized: bool, known: Estimate, device: Device = None
) -> bool:
    """Whether guidance's two branches may run in one pass: it fits beside the weights, and its arrays in a quarter of
    the machine's memory. work, known: of one branch at a time."""
    one, both = (step_bytes(config, replace(work, rows=rows), dtype, quantized, device) for rows in (1, 2))
    return known.phases["steps"] + both - one <= known.machine and both <= known.machine / 4


def step_bytes(config: ModelConfig, work: Work, dtype: mx.Dtype, quantized: bool, device: Device = None) -> int:
    """Beside the transformer's weights, while a single block runs: the longest moment and the fullest. device: None:
    the default one."""
    device = device or here()
    c, side = config.transformer, config.pixels_per_token
    tokens = work.length + work.height // side * (work.width // side) + work.tokens
    stream = work.rows * tokens * c.hidden_size
    rope = 2 * tokens * c.attention_head_dim * 4
    given = (work.rows * work.length * c.joint_attention_dim + stream) * dtype.size
    blocks = c.num_layers + c.num_single_layers
    given += work.memories * blocks * 2 * work.tokens * c.hidden_size * dtype.size
    if not device.widens:
        dequantized = quantized and device.is_dequantized(work.rows * tokens)
        expanded = (c.hidden_size + 2 * c.mlp_size) * c.hidden_size if dequantized else 0
        streams = 18 if device.rows and work.rows * tokens >= 2 * device.rows else 16  # pieces, and what they become
        return (streams * stream + expanded) * dtype.size + rope + given
    scores = work.rows * c.num_attention_heads * tokens**2
    streams, expanded = 32, 0  # the end of a block and the start of the next one are in memory together
    if dtype != mx.float32 or quantized:  # each layer is evaluated when it is called, and pieces of attention
        whole = 30 if dtype == mx.float32 else 37  # 16 bits are widened for it
        streams, expanded = whole if scores <= SCORES else 24, 5 * c.hidden_size**2
    return 4 * (streams * stream + min(scores, SCORES) + expanded) + rope + given


def vae_bytes(
    config: VAEConfig, height: int, width: int, dtype: mx.Dtype, encodes: bool = False, device: Device = None
) -> int:
    """Beside the VAE's weights: a resnet's input, middle and result, the pixels that are encoded, and what strips are
    made of, two of them, since one is started before the one before it is done: on a CPU their inputs in float32, and
    the sums over a kernel's places, of which several wait. device: None: the default one."""
    device = device or here()
    channels = config.block_out_channels
    if not encodes:
        channels = config.decoder_block_out_channels or channels
    rows = strip_rows(device, height, width)
    share = 1.0 if rows is None else min(1.0, rows / height)
    strip = dtype.size * share
    if device.widens:  # in float32 whatever the dtype
        strip = 4 * share * (1.4 if dtype == mx.float32 else 1.8)
    most = 0.0
    neighbours = (channels[0], *channels) if encodes else (*channels[1:], channels[-1])
    for level, (own, neighbour) in enumerate(zip(channels, neighbours, strict=False)):
        pixels = (height >> level) * (width >> level)
        whole, made = dtype.size * (neighbour + 2 * own), strip * 3 * (neighbour + own)
        if device.widens and rows:
            whole += dtype.size * config.in_channels * 4**level if encodes else 0
            made = 4 * share * (2 * neighbour + (11 if dtype == mx.float32 else 13) * own)
        elif not device.widens:
            one = 5 * neighbour + own if device.conv == "matmul" else neighbour + 2 * own
            whole, made = (dtype.size * neighbour, strip * one) if rows is None else (whole, 2 * strip * one)
        most = max(most, pixels * (whole + made))
    return round(max(most, _attention_bytes(config, height, width, dtype, channels[-1], device)))


def _attention_bytes(
    config: VAEConfig, height: int, width: int, dtype: mx.Dtype, channels: int, device: Device
) -> float:
    """Of the VAE's attention in the middle: its arrays, and on a CPU two pieces of scores in float32."""
    if not config.mid_block_add_attention:
        return 0.0
    tokens = (height // config.scale_factor) * (width // config.scale_factor)
    if not device.widens:
        return 6.0 * tokens * channels * dtype.size
    return 4.0 * (6 * tokens * channels + min(tokens**2, 2 * SCORES))


# ---- refusal ----


def check_fits(
    source: Source,
    work: Work,
    dtype: mx.Dtype,
    quantization: Mapping[str, Quantization],
    own: Estimate,
    device: Device = None,
) -> None:
    """Raise a RequestError with a plan that would fit, unless the request does. own: its estimate, as it stands.
    device: as in `estimate`."""
    if own.fits:
        return
    plans = _plans(source, work, quantization)
    given = {"machine": own.machine, "loras": own.loras, "device": device}
    estimates = [(p, estimate(source, p.work, dtype, p.quantization, "nothing", **given)) for p in plans]
    told = f"this needs {human_bytes(own.peak)} of memory, and {human_bytes(own.machine)} can be used"
    plan, found = next(((p, e) for p, e in estimates if e.fits), estimates[-1])
    outlook = "needs" if found.fits else "is the least that it can be, and needs"
    raise DoesNotFit(f"{told}; {plan.words} {outlook} {human_bytes(found.peak)}")


@dataclass(frozen=True)
class _Plan:
    """A way to need less. words: in options of the command line."""

    words: str
    quantization: Mapping[str, Quantization]
    work: Work


def _plans(source: Source, work: Work, quantization: Mapping[str, Quantization]) -> list[_Plan]:
    """The least loss first: keep less, quantize, make a smaller picture."""
    found = [_Plan("--keep nothing", quantization, work)]
    free = [part for part in QUANTIZED_PARTS if part not in source.quantization]
    if free and not quantization:
        found += [
            _Plan(f"-q {bits} --keep nothing", {part: Quantization(bits) for part in free}, work) for bits in (8, 4)
        ]
    least = found[-1]
    for side in (1024, 768, 512, 256):
        if side**2 < work.height * work.width:
            words = f"{least.words} --width {side} --height {side}"
            found.append(_Plan(words, least.quantization, replace(work, height=side, width=side)))
    return found


# ---- how the device computes, as was measured on it ----

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}

CHOICES = "KLEIN_MLX_CHOICES"  # choices as JSON, or "default" for those of the chip's kind
_MOST = 1 << 20  # tokens, rows


def compute_dtype(dtype: mx.Dtype | str | None) -> mx.Dtype:
    """A dtype or its name; None: the device's, bfloat16 on a GPU unless another was measured to be faster, float32 on a
    CPU. Raises RequestError for any other."""
    if dtype is None:
        return chosen_device().dtype
    name = str(dtype).removeprefix("mlx.core.").removeprefix("torch.")
    if name not in DTYPES:
        raise RequestError("dtype", dtype, f"it must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def chosen_device() -> Device:
    """How the default device computes: as its kind does, or as was measured on it (`klein-mlx bench --tune`), or as
    the environment says. Raises RequestError for what is no choice there."""
    device = here(at_once=True)
    if not isinstance(device, Gpu):
        return device
    said = os.environ.get(CHOICES, "")
    try:
        return with_choices(device, json.loads(said)) if said not in ("", "default") else measured(device, said == "")
    except (ValueError, RecursionError):
        rule = 'it must be "default", or JSON such as {"conv": "matmul", "rows": 4096, "dense": {"4": 1024}}'
        raise RequestError(f"${CHOICES}", said, rule) from None


def measured(device: Gpu, wanted: bool = True) -> Gpu:
    """A device with what was kept of measuring it, with this MLX; itself where nothing was, or nothing is wanted."""
    path = choices_file()
    try:
        if not wanted or path is None or path.stat().st_size > _MOST:
            return device
        return with_choices(device, json.loads(path.read_text())[device_key()])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return device  # nothing was measured here, or the file is damaged


def with_choices(device: Gpu, choices: Any) -> Gpu:
    """A device that computes so. choices: any of "conv", "rows", "dtype", and "dense": for bits of weights, from how
    many tokens on they are dequantized first, or None. Raises ValueError for anything else."""
    known = {"conv": device.conv, "rows": device.rows, "dtype": "", "dense": {}}
    if not isinstance(choices, dict) or choices.keys() - known:
        raise ValueError("no choices")
    values = known | choices
    dense, numbers = values["dense"], [values["rows"]]
    if not isinstance(dense, dict) or not all(bits in ("2", "3", "4", "5", "6", "8") for bits in dense):
        raise ValueError("no bits")
    for number in (*numbers, *dense.values()):
        if number is not None and (type(number) is not int or not 0 <= number <= _MOST):
            raise ValueError("no number of tokens")
    if (
        values["rows"] == 0
        or values["conv"] not in ("direct", "matmul")
        or values["dtype"] not in ("", "bfloat16", "float16")
    ):
        raise ValueError("no way to compute")
    return replace(
        device,
        by_bits=tuple(sorted((int(bits), tokens) for bits, tokens in dense.items())) or device.by_bits,
        rows=values["rows"],
        conv=values["conv"],
        dtype=DTYPES.get(values["dtype"], device.dtype),
    )


def choices_told(device: Device) -> str:
    """How a device computes, as a line for people: of its own, or as it was measured or chosen."""
    if not isinstance(device, Gpu):
        return "a CPU's ways"
    least = {**{f"{bits}-bit": tokens for bits, tokens in device.by_bits}, "packed": device.dense_from}
    if device.by_bits:
        del least["packed"]
    dense = (
        f"{kind} weights {'as they are' if n is None else f'dequantized from {n} tokens on'}"
        for kind, n in least.items()
    )
    rows = "matmuls whole" if device.rows is None else f"matmuls of {device.rows} rows"
    usual = replace(here(), compiles=device.compiles) if isinstance(here(), Gpu) else device
    grounds = "this chip's defaults" if device == usual else "measured here" if not os.environ.get(CHOICES) else CHOICES
    dtype = str(device.dtype).rpartition(".")[2]
    return f"convolutions {device.conv}, {rows}, {', '.join(dense)}, {dtype} ({grounds})"


def keep_choices(choices: Mapping[str, Any]) -> bool:
    """Keep what was measured, in place of what this chip and this MLX had. Returns whether it could be written."""
    path = choices_file()
    if path is None:
        return False
    try:
        known = json.loads(path.read_text()) if path.stat().st_size <= _MOST else {}
    except (OSError, ValueError, RecursionError):
        known = {}
    return keep_json(path, {**(known if isinstance(known, dict) else {}), device_key(): dict(choices)})


def choices_file() -> Path | None:
    """Where choices are kept, by `device_key`."""
    folder = cache_folder()
    return folder / "choices.json" if folder else None


def device_key() -> str:
    """Of which chip and which MLX measured choices are."""
    told = mx.device_info()
    return f"{told.get('device_name', '')} ({told.get('architecture', '')}), mlx {version('mlx')}"


# ---- MLX's own limits while a run works, and files read ahead ----

CACHE_SHARE = 16  # MLX keeps freed buffers up to this part of the machine's memory, instead of without bound
_BLOCK = 8 << 20


_peaks: list[int] = []  # of each run that works just now; MLX's limits are the process's, so this is too
_before: dict[str, int] = {}  # the caller's own limits, put back by the last


@contextmanager
def memory_limits(peak: int, machine: int) -> Iterator[None]:
    """Inside, MLX's cache of freed buffers is bounded, and on Metal as much memory is wired as the run needs.

    peak: bytes of the run's fullest moment. machine: bytes that there are. A tighter limit of the caller's stays. One
    may be entered inside of another: as much is wired as both need, and the last that is left puts all back.
    """
    if not _peaks:
        _before["cache"] = mx.set_cache_limit(machine // CACHE_SHARE)
        mx.set_cache_limit(min(_before["cache"], machine // CACHE_SHARE))
    if mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu:
        _before.setdefault("wired", mx.set_wired_limit(min(sum(_peaks) + peak, machine)))
    _peaks.append(peak)
    try:
        yield
    finally:
        _peaks.remove(peak)
        if not _peaks:
            mx.set_cache_limit(_before.pop("cache"))
            if "wired" in _before:
                mx.set_wired_limit(_before.pop("wired"))


class ReadAhead:
    """Inside of a `with`, reads files in a thread of its own, for the system to keep them in its cache.

    paths: one after the other; none: nothing is started. done: bytes read so far.
    """

    def __init__(self, paths: Sequence[Path]):
        self.done = 0
        self._paths, self._stopped = paths, threading.Event()
        self._thread = threading.Thread(target=self._read, name="klein_mlx reads ahead", daemon=True)

    def __enter__(self) -> Self:
        if self._paths:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self.wait()

    def wait(self) -> None:
        """Return once the thread has ended."""
        if self._paths:
            self._thread.join()

    def _read(self) -> None:
        block = bytearray(_BLOCK)
        for path in self._paths:
            try:
                with path.open("rb", buffering=0) as file:
                    while not self._stopped.is_set() and (count := file.readinto(block)):
                        self.done += count
            except OSError:  # whoever needs the file will tell
                pass
