"""The memory plan: which part's weights are in memory, with which LoRAs, and when they leave it.

A model's files are pinned while it is open, and digested for recipes and for what is kept on disk.
"""

import gc
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import mlx.core as mx
import mlx.nn as nn

from klein_mlx.config import PARTS
from klein_mlx.errors import CheckpointError, DoesNotFit, RequestError, human_bytes, of_device
from klein_mlx.formats.lora import read_lora, shapes_of
from klein_mlx.formats.lora_metadata import find_lora
from klein_mlx.model.layers import Device, Gpu, here, place
from klein_mlx.paths import cache_folder, keep_json, version
from klein_mlx.runtime.memory import (
    KEPT,
    Estimate,
    LoraBytes,
    Work,
    choose_keep,
    estimate,
    fits_twice,
    machine_memory,
    weight_bytes,
)
from klein_mlx.runtime.run import Run
from klein_mlx.weights.checkpoint import Source, load_part, read_weights, token_rows
from klein_mlx.weights.lora import Applied, LoadedLora, Lora, LoraStack, branch_bytes, checked_scale, merge_bytes
from klein_mlx.weights.quantize import Quantization
from klein_mlx.weights.safetensors import Identity, identity, is_finite, load_now, require_file

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


class Parts:
    """A model's three modules, loaded when first asked for and released as `keep` says.

    Runs share them: a part leaves when the last run that took it has released it.

    forget: called where an encoder's LoRAs change: embeddings made before are another's.
    quantization: of the parts that are quantized while they are loaded (klein_mlx.weights.bits.settle).
    keep: "all", "transformer" (and the small VAE) or "nothing"; None: what fits in half of the machine's memory.
    Raises RequestError for another `keep`.
    """

    def __init__(self, source: Source, dtype: mx.Dtype, quantization: Mapping[str, Quantization], keep: str | None):
        if keep is not None and keep not in KEPT:
            raise RequestError("keep", keep, f"it must be one of {', '.join(KEPT)}")
        self.source, self.dtype, self.quantization = source, dtype, quantization
        self.pinned = Pinned.of(source.files())
        self.weights = weight_bytes(source, dtype, quantization)
        self.device: Device = chosen_device()  # how what is loaded computes
        self.keep = keep or choose_keep(self.weights, machine_memory())
        self._chosen = keep is None
        self.loaded: dict[str, nn.Module] = {}
        self.loras = LoraStack()
        self.forget: Callable[[], object] = lambda: None
        self._applied: dict[str, Applied] = {}
        self._holders: dict[str, WeakSet[Run]] = {part: WeakSet() for part in PARTS}
        self.working: WeakSet[Run] = WeakSet()  # runs that have begun and have not ended, whatever they hold just now
        for part in PARTS:
            source.weights(part)  # maps, reads nothing: a damaged file is told now, not after the steps

    def dtype_of(self, name: str) -> mx.Dtype:
        """What a part computes in. Only the transformer is made for float16, with a wider residual stream; the others
        would leave its range, and take bfloat16 beside it."""
        return mx.bfloat16 if self.dtype == mx.float16 and name != "transformer" else self.dtype

    def estimate(self, work: Work) -> Estimate:
        """What a request would take now, given what is loaded."""
        return self._estimate(work, self.keep)

    def _estimate(self, work: Work, keep: str | None) -> Estimate:
        added, merging = zip(*(self._lora_bytes(part) for part in PARTS), strict=True)
        weights = {part: self.weights[part] + size for part, size in zip(PARTS, added, strict=True)}
        loras = LoraBytes(self.loras.nbytes, dict(zip(PARTS, merging, strict=True)))
        return estimate(
            self.source,
            work,
            self.dtype,
            self.quantization,
            keep,
            [*self.loaded],
            weights=weights,
            loras=loras,
            device=self.device,
        )

    def _lora_bytes(self, part: str) -> tuple[int, int]:
        """Bytes that LoRAs add to a part's weights, and those that changing its layers takes, one after the other.

        Plain layers take LoRAs in; only the table of tokens, which is read row by row, has to be in memory then.
        """
        kind = self.source.quantization.get(part) or self.quantization.get(part)
        dtype, added, merging = self.dtype_of(part), 0, 0
        for path, changes in self.loras.changes(part).items():
            shape = shapes_of(self.source.config, part)[path]
            quantized = kind is not None and kind.of(part, path) is not None
            if path == "embed_tokens":
                added += math.prod(shape) * dtype.size
            elif quantized:
                added += branch_bytes(changes, shape, dtype)
            merging = max(merging, merge_bytes(changes, shape, dtype, quantized))
        return added, merging

    def make_room(self, work: Work) -> None:
        """Unless the user chose what to keep, keep as much as leaves room for a request. Parts that are kept no longer
        leave at once if no run has them."""
        if self._chosen:
            self.keep = self._estimate(work, None).keep
            self._let_go(*self.loaded)

    def fits_twice(self, work: Work) -> bool:
        """Whether memory allows both branches of guidance in one pass."""
        quantized = "transformer" in self.quantization or "transformer" in self.source.quantization
        return fits_twice(self.source.config, work, self.dtype, quantized, self.estimate(work), self.device)

    def files_ahead(self, encoding: int) -> list[Path]:
        """What can be read while the prompt is encoded: the transformer's files, unless it is loaded, or they would
        crowd the encoder out of memory. encoding: bytes that the encoder takes."""
        if "transformer" in self.loaded:
            return []
        files = self.source.files(["transformer"])
        needed = sum(require_file(path) for path in files) + encoding
        return files if needed <= machine_memory() * 0.9 else []

    def get(self, name: str, run: Run) -> Any:
        """A part with its weights in memory, held for this run until it is released; reading it counts as `load`."""
        self._holders[name].add(run)
        if name not in self.loaded:
            with run.timed("load"):
                self.loaded[name] = self._load(name)
        return self.loaded[name]

    def _load(self, name: str) -> nn.Module:
        self.pinned.check()
        dtype, quantize, rows = self.dtype_of(name), self.quantization.get(name), None
        if name == "text_encoder":
            table = quantize.of(name, "embed_tokens") if quantize else None
            rows = token_rows(self.source, table, dtype)
            if rows and table and quantize:  # the table is quantized where its rows are read
                quantize = quantize.without("embed_tokens")
        module: Any = load_part(name, self.source, dtype, quantize)
        if rows:
            module.embed_tokens = rows
        applied = Applied(module, partial(self._original, name), self.dtype_of(name))
        try:
            place(module, self.device)
            module.arrange()
            if damaged := read_weights(module):
                weights = self.source.weights(name).items()  # under the file's own names: arranged, others are there
                damaged = next((key for key, weight in weights if not is_finite(load_now(weight)).item()), damaged)
                raise CheckpointError(f"{self.source.path}: the {name}'s {damaged} holds NaN or infinity: get it again")
            applied.update(self.loras.changes(name))
        except RuntimeError as error:  # the file changed after its header was checked, or its disk is gone
            unread = CheckpointError(f"{self.source.path}: the {name} cannot be read ({error})")
            raise of_device(error) or unread from None
        self.pinned.check()
        self._applied[name] = applied
        return module

    def release(self, run: Run, *names: str) -> None:
        """Free these parts' weights, except those that are kept or held by another run. Nothing else of this run may
        still refer to them."""
        for name in names:
            self._holders[name].discard(run)
        self._let_go(*names)

    def _let_go(self, *names: str) -> None:
        """Free those of these parts that are neither kept nor held."""
        leaving = [n for n in names if n in self.loaded and n not in KEPT[self.keep] and not self._holders[n]]
        for name in leaving:
            del self.loaded[name], self._applied[name]
        if leaving:
            gc.collect()
        mx.clear_cache()

    def check_idle(self, *names: str) -> None:
        """Raise RequestError while a run works, or holds one of these parts: its pictures would change half-way."""
        busy = [f"using the {name}" for name in names if self._holders[name]] + ["working"] * bool(self.working)
        if busy:
            raise RequestError(f"a run is {busy[0]}; LoRAs can change when it has finished or is closed")

    def apply_loras(self, *names: str) -> None:
        """Make these parts, as far as they are loaded, what `loras` says."""
        for name in names:
            if name in self.loaded:
                self.pinned.check()  # what was merged is undone by reading the original again
                try:
                    self._applied[name].update(self.loras.changes(name))
                except RuntimeError as error:
                    unread = CheckpointError(f"{self.source.path}: the {name} cannot be read ({error})")
                    raise of_device(error) or unread from None
        mx.clear_cache()

    # ---- LoRAs: found, read, applied to what is loaded and to what will be, scaled, taken off again ----

    def load_lora(
        self,
        path: str | Path,
        scale: float = 1.0,
        name: str | None = None,
        *,
        partial: bool = False,
        **where: Any,
    ) -> LoadedLora:
        """See KleinPipeline.load_lora. where: as in find_lora."""
        checked_scale(scale)
        file = find_lora(path, **where)
        if name is None:
            name = self._free_name(file.stem)
        lora = read_lora(file, self.source.config, partial)
        self.check_idle(*lora.parts)
        loaded = self.loras.add(lora, scale, name)
        self._tell(lora, loaded)
        self._apply(lora, undo=lambda: self.loras.remove(name))
        return loaded

    def unload_lora(self, name: str | None = None) -> None:
        """See KleinPipeline.unload_lora."""
        names = [name] if name is not None else [lora.name for lora in self.loras.loaded]
        if not names:
            raise RequestError("no LoRA is loaded")
        for one in names:
            self.check_idle(*self.loras.get(one).parts)
        for one in names:
            self._refresh(self.loras.remove(one))

    def set_lora_scale(self, name: str, scale: float) -> None:
        """See KleinPipeline.set_lora_scale."""
        checked_scale(scale)
        self.check_idle(*self.loras.get(name).parts)
        before = next(lora.scale for lora in self.loras.loaded if lora.name == name)
        self._apply(self.loras.set_scale(name, scale), undo=lambda: self.loras.set_scale(name, before))

    def _apply(self, lora: Lora, undo: Callable[[], object]) -> None:
        """Change the loaded layers as the LoRAs now say; where that fails, as they say after `undo`."""
        try:
            self._check_merge(*lora.parts)
            self._refresh(lora)
        except BaseException:
            undo()
            self._refresh(lora)
            raise

    def _free_name(self, stem: str) -> str:
        taken = {lora.name for lora in self.loras.loaded}
        names = (stem, *(f"{stem}-{number}" for number in range(2, len(taken) + 3)))
        return next(name for name in names if name not in taken)

    def _check_merge(self, *names: str) -> None:
        """DoesNotFit where changing the layers of these parts, as far as they are loaded, takes too much memory. Unless
        the user chose what to keep, all parts leave instead, and change when they are loaded again."""
        changed = [name for name in names if name in self.loaded]
        if not changed:
            return  # it is counted in the estimate of the request that loads the part
        merging = max(self._lora_bytes(name)[1] for name in changed)
        held = sum(self.weights[name] + self._lora_bytes(name)[0] for name in self.loaded)
        needed, machine = held + self.loras.nbytes + merging, machine_memory()
        if needed > machine and self._chosen:
            self.keep = "nothing"
            self._let_go(*self.loaded)
        elif needed > machine:
            raise DoesNotFit(
                f"applying a LoRA to the loaded {changed[0]} needs {human_bytes(needed)} of {human_bytes(machine)} of"
                " memory; load the LoRA before the first picture, or keep less (keep='nothing')"
            )

    def _refresh(self, lora: Lora) -> None:
        if "text_encoder" in lora.parts:
            self.forget()
        self.apply_loras(*lora.parts)

    @staticmethod
    def _tell(lora: Lora, loaded: LoadedLora) -> None:
        log = logging.getLogger("klein_mlx")
        if lora.contradiction:
            log.warning("LoRA %s: %s", loaded.name, lora.contradiction)
        if lora.unused:
            log.warning("LoRA %s: %d keys are not used (%s ...)", loaded.name, len(lora.unused), lora.unused[0])

    def _original(self, part: str, path: str) -> mx.array:
        """A module's weight as it was loaded, from its file."""
        weights, stored = self.source.weights(part), self.source.quantization.get(part)
        weight = load_now(weights[f"{path}.weight"])
        if stored and (own := stored.of(part, path)):
            kinds = (weights.get(f"{path}.{kind}") for kind in ("scales", "biases"))
            scales, biases = (None if kind is None else load_now(kind) for kind in kinds)
            assert scales is not None
            weight = mx.dequantize(weight, scales, biases, own.group_size, own.bits, own.mode)
        return weight.astype(self.dtype_of(part))


def compute_dtype(dtype: mx.Dtype | str | None) -> mx.Dtype:
    """A dtype or its name; None: the device's, bfloat16 on a GPU unless another was measured to be faster, float32 on a
    CPU. Raises RequestError for any other."""
    if dtype is None:
        return chosen_device().dtype
    name = str(dtype).removeprefix("mlx.core.").removeprefix("torch.")
    if name not in DTYPES:
        raise RequestError("dtype", dtype, f"it must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


# ---- what was measured on this device ----

CHOICES = "KLEIN_MLX_CHOICES"  # choices as JSON, or "default" for those of the chip's kind
_MOST = 1 << 20  # tokens, rows


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


# ---- LoRAs of a pipeline ----


def described(lora: Lora, loaded: LoadedLora) -> str:
    """One line on a LoRA that was just loaded."""
    total = lora.modules + lora.needless
    needless = f" ({lora.needless} of encoder layers that no picture depends on)" if lora.needless else ""
    return (
        f"LoRA {loaded.name}: {lora.modules} of {total} modules{needless}, {len(lora.unused)} keys unused, "
        f"scale {loaded.scale:g}"
    )


# ---- files that stay what they were ----

WHOLE = 1_000_000_000  # bytes: a larger file is known by samples, for reading it would take seconds
SAMPLES, SAMPLE = 4096, 4096  # of a large file: how many, and the bytes of each


@dataclass(frozen=True)
class Pinned:
    """A model's files as they were when it was opened: a part that is read later must come from the same."""

    files: Mapping[Path, Identity]

    @classmethod
    def of(cls, paths: Iterable[Path]) -> "Pinned":
        """Raises CheckpointError for a file that is missing."""
        return cls({path: identity(path) for path in paths})

    def check(self) -> None:
        """Raise CheckpointError if a file has been changed or replaced. To be called behind whatever was read."""
        for path, known in self.files.items():
            if identity(path) != known:
                raise CheckpointError(f"{path}: has changed since the model was opened; open the model again")


def is_sampled(path: Path) -> bool:
    """Whether `digest` knows a file by samples only."""
    return identity(path)[2] > WHOLE


def digest(paths: Sequence[Path], local: bool = False) -> str:
    """SHA-256 of files: of all bytes of those up to WHOLE; of the size and samples all over of larger ones.

    local: for this machine alone; a large file's identity counts too, so that no change between its samples is missed.
    """
    told = hashlib.sha256()
    for path in paths:
        size = identity(path)[2]
        told.update(f"{path.name} {size}\n".encode())
        try:
            with path.open("rb") as file:
                if size <= WHOLE:
                    told.update(hashlib.file_digest(file, "sha256").digest())
                    continue
                for number in range(SAMPLES):
                    told.update(os.pread(file.fileno(), SAMPLE, (size - SAMPLE) * number // (SAMPLES - 1)))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        if local:
            told.update(repr(identity(path)).encode())
    return told.hexdigest()
