"""The memory plan: which part's weights are in memory, with which LoRAs, and when they leave it."""

import gc
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any
from weakref import WeakSet

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from klein_mlx.config import PARTS
from klein_mlx.errors import CheckpointError, DoesNotFit, RequestError, human_bytes, of_device
from klein_mlx.formats.lora import shapes_of
from klein_mlx.model.layers import Cut, Device, Linear, empty, layer_at, place
from klein_mlx.runtime.memory import (
    KEPT,
    Estimate,
    LoraBytes,
    Work,
    choose_keep,
    chosen_device,
    estimate,
    fits_twice,
    machine_memory,
    vae_bytes,
    weight_bytes,
)
from klein_mlx.runtime.run import Run
from klein_mlx.weights.checkpoint import Source, TokenRows, load_part, read_weights, token_rows
from klein_mlx.weights.lora import (
    Change,
    LoadedLora,
    Lora,
    Scaled,
    Weigh,
    branch,
    branch_bytes,
    checked_scale,
    merge,
    merge_bytes,
    merged_bias,
)
from klein_mlx.weights.quantize import Quantization
from klein_mlx.weights.safetensors import Pinned, is_finite, load_now, require_file


class Parts:
    """What of a model is in memory, and with which LoRAs: its three modules, loaded when first asked for and released
    as `keep` says.

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
        self.loaded: dict[str, Resident] = {}
        self.loras = LoraStack()
        self.forget: Callable[[], object] = lambda: None
        self._holders: dict[str, WeakSet[Run]] = {part: WeakSet() for part in PARTS}
        self.working: WeakSet[Run] = WeakSet()  # runs that have begun and have not ended, whatever they hold just now
        for part in PARTS:
            source.weights(part)  # maps, reads nothing: a damaged file is told now, not after the steps

    def dtype_of(self, name: str) -> mx.Dtype:
        """What a part computes in. Only the transformer is made for float16, with a wider residual stream; the others
        would leave its range, and take bfloat16 beside it."""
        return mx.bfloat16 if self.dtype == mx.float16 and name != "transformer" else self.dtype

    def estimate(self, work: Work, chosen: bool = True) -> Estimate:
        """What a request would take now, given what is loaded. chosen: whether it must keep what `keep` says."""
        added, merging = zip(*(self._lora_bytes(part) for part in PARTS), strict=True)
        weights = {part: self.weights[part] + size for part, size in zip(PARTS, added, strict=True)}
        loras = LoraBytes(self.loras.nbytes, dict(zip(PARTS, merging, strict=True)))
        return estimate(
            self.source,
            work,
            self.dtype,
            self.quantization,
            self.keep if chosen else None,
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

    def make_room(self, work: Work) -> Estimate:
        """Unless the user chose what to keep, keep as much as leaves room for a request, and return what it takes then.
        Parts that are kept no longer leave at once if no run has them."""
        if self._chosen:
            self.keep = self.estimate(work, chosen=False).keep
            self._let_go(*self.loaded)
        return self.estimate(work)

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
        return self.loaded[name].module

    def _load(self, name: str) -> "Resident":
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
        resident = Resident(module, partial(self._original, name), dtype)
        with self._reading(name):
            place(module, self.device)
            module.arrange()
            if damaged := read_weights(module):
                weights = self.source.weights(name).items()  # under the file's own names: arranged, others are there
                damaged = next((key for key, weight in weights if not is_finite(load_now(weight)).item()), damaged)
                raise CheckpointError(f"{self.source.path}: the {name}'s {damaged} holds NaN or infinity: get it again")
            resident.update(self.loras.changes(name))
        self.pinned.check()
        return resident

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Tell of a file that changed after its header was checked, or whose disk is gone."""
        try:
            yield
        except RuntimeError as error:
            unread = CheckpointError(f"{self.source.path}: the {name} cannot be read ({error})")
            raise of_device(error) or unread from None

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
            del self.loaded[name]
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
                with self._reading(name):
                    self.loaded[name].update(self.loras.changes(name))
        mx.clear_cache()

    # ---- LoRAs: applied to what is loaded and to what will be, scaled, taken off again ----

    def load_lora(self, lora: Lora, scale: float, name: str | None) -> LoadedLora:
        """See KleinPipeline.load_lora."""
        name = self._free_name(Path(lora.file).stem) if name is None else name
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

    def merge_peak(self, *names: str) -> int:
        """Bytes at the peak of applying the LoRAs to these parts, as far as they are loaded; 0 where none is."""
        changed = [name for name in names if name in self.loaded]
        if not changed:
            return 0
        held = sum(self.weights[name] + self._lora_bytes(name)[0] for name in self.loaded)
        return held + self.loras.nbytes + max(self._lora_bytes(name)[1] for name in changed)

    def preview_peak(self, work: Work) -> int:
        """Bytes at the peak of decoding a picture beside all that is in memory now."""
        arrays = vae_bytes(self.source.config.vae, work.height, work.width, self.dtype, False, self.device)
        return mx.get_active_memory() + arrays + (0 if "vae" in self.loaded else self.weights["vae"])

    def _check_merge(self, *names: str) -> None:
        """DoesNotFit where changing the layers of these parts, as far as they are loaded, takes too much memory. Unless
        the user chose what to keep, all parts leave instead, and change when they are loaded again.

        What is not loaded is counted in the estimate of the request that loads it.
        """
        needed, machine = self.merge_peak(*names), machine_memory()
        if needed > machine and self._chosen:
            self.keep = "nothing"
            self._let_go(*self.loaded)
        elif needed > machine:
            changed = next(name for name in names if name in self.loaded)
            raise DoesNotFit(
                f"applying a LoRA to the loaded {changed} needs {human_bytes(needed)} of {human_bytes(machine)} of"
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


# ---- LoRAs of a pipeline ----


@dataclass
class LoraStack:
    """The LoRAs in use, by name, in the order in which they were loaded. The order does not matter for the result."""

    loras: dict[str, tuple[Lora, float]] = field(default_factory=dict)

    def add(self, lora: Lora, scale: float, name: str) -> LoadedLora:
        """Raises RequestError for a scale that is none, or a name that is taken."""
        if name in self.loras:
            raise RequestError(f"name is {name!r}, and a LoRA of that name is loaded; unload it or give another name")
        self.loras[name] = (lora, checked_scale(scale))
        return self.loaded[-1]

    def get(self, name: str) -> Lora:
        """Raises RequestError if none of that name is loaded; so do the others."""
        return self._entry(name)[0]

    def remove(self, name: str) -> Lora:
        lora, _ = self._entry(name)
        del self.loras[name]
        return lora

    def set_scale(self, name: str, scale: float) -> Lora:
        lora, _ = self._entry(name)
        self.loras[name] = (lora, checked_scale(scale))
        return lora

    @property
    def loaded(self) -> list[LoadedLora]:
        return [LoadedLora(name, lora.file, lora.sha256, scale) for name, (lora, scale) in self.loras.items()]

    @property
    def nbytes(self) -> int:
        return sum(lora.nbytes for lora, _ in self.loras.values())

    def changes(self, part: str) -> dict[str, list[tuple[float, Change]]]:
        """Module path -> all changes with their scales; a LoRA of scale 0 changes nothing."""
        found: dict[str, list[tuple[float, Change]]] = {}
        for lora, scale in self.loras.values():
            for path, changes in lora.changes.get(part, {}).items() if scale else ():
                found.setdefault(path, []).extend((scale, change) for change in changes)
        return found

    def _entry(self, name: str) -> tuple[Lora, float]:
        if name not in self.loras:
            known = f"loaded: {', '.join(self.loras)}" if self.loras else "none is loaded"
            raise RequestError(f"name is {name!r}; no LoRA of that name is loaded ({known})")
        return self.loras[name]


class Resident:
    """A part in memory: its module, and what LoRAs have made of it.

    original: the weight of a path as it was loaded, read anew. dtype: that of the computation. The module may be in the
    layout of its checkpoint, or arranged (Transformer.arrange): what is changed is separated before and arranged after.
    """

    def __init__(self, module: nn.Module, original: Weigh, dtype: mx.Dtype):
        self.module, self.original, self.dtype = module, original, dtype
        self.touched: set[str] = set()
        self._known: set[str] = set()  # what the last update found touched: only these are read again
        self.replaced: dict[str, nn.Module] = {}  # quantized layers for which another module stands in

    def update(self, wanted: Mapping[str, Scaled]) -> None:
        """Make the module what it was loaded as, with just these changes, evaluated."""
        self._known = self.touched
        paths = self.touched | set(wanted)
        self.touched = paths  # if this is broken off, the next update mends all of it
        names = sorted(path.rpartition(".") for path in paths)
        for above, group in groupby(names, key=lambda name: name[0]):
            parent = layer_at(self.module, above)
            with _separated(parent):
                for name in group:
                    self._change(parent, path := "".join(name), wanted.get(path, ()))
        self.touched = set(wanted)

    def _change(self, parent: Any, path: str, changes: Scaled) -> None:
        """Make one of the parent's layers what it was loaded as, with these changes, evaluated."""
        name = path.rpartition(".")[2]
        layer = self._changed(path, self.replaced.pop(path, getattr(parent, name)), changes)
        setattr(parent, name, layer)
        arrays = {} if isinstance(layer, TokenRows) else dict(tree_flatten(layer.parameters()))
        mx.eval(arrays)
        if changes and not is_finite(*arrays.values()).item():
            dtype = str(self.dtype).removeprefix("mlx.core.")
            wrong = f"{path}: with these LoRAs it holds numbers beyond what {dtype} can"
            raise RequestError(f"{wrong}; use a smaller scale, or dtype bfloat16")

    def _changed(self, path: str, layer: nn.Module, changes: Scaled) -> nn.Module:
        """layer: as it was loaded, or of the right kind. Returns what is to stand in its place."""
        if isinstance(layer, TokenRows):
            if not changes:
                return layer
            self.replaced[path] = layer
        if not _is_quantized(layer):
            untouched = path not in self._known and not isinstance(layer, Cut | TokenRows)
            present: Any = layer.weight if untouched else self.original(path)
            return self._plain(layer, present, changes)
        if not changes:
            return layer
        self.replaced[path] = layer
        weight = expanded(layer)
        if not isinstance(layer, nn.QuantizedEmbedding):
            beside = branch(layer, weight, changes, self._weigh, self.dtype)
            if beside is not None:
                return beside
        return self._plain(layer, weight, changes)

    def _plain(self, layer: nn.Module, weight: mx.array, changes: Scaled) -> nn.Module:
        """A layer like this one, unquantized, with the changes merged into this weight."""
        weight = merge(weight, changes, self._weigh).astype(self.dtype)
        if isinstance(layer, nn.QuantizedEmbedding | TokenRows):
            layer = empty(nn.Embedding)
        elif isinstance(layer, nn.Linear | nn.QuantizedLinear | Cut):
            # None of klein's layers has a bias of its own.
            return Linear.of(weight, merged_bias(changes, self.dtype), getattr(layer, "device", None))
        layer.weight = weight
        return layer

    def _weigh(self, path: str) -> mx.array:
        above, _, name = path.rpartition(".")
        layer = self.replaced.get(path) or getattr(layer_at(self.module, above), name, None)
        return expanded(layer) if layer is not None and _is_quantized(layer) else self.original(path)


def _is_quantized(layer: nn.Module) -> bool:
    if isinstance(layer, Cut):
        return _is_quantized(layer.first)
    return isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding)


def expanded(layer: nn.Module) -> mx.array:
    """A quantized layer's weight in float32, exactly as its bits say."""
    if isinstance(layer, Cut):
        return mx.concatenate([expanded(layer.first), expanded(layer.second)], axis=1)
    assert isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding)
    scales = layer.scales.astype(mx.float32) if layer.mode == "affine" else layer.scales
    biases = layer["biases"].astype(mx.float32) if "biases" in layer else None
    kind = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return mx.dequantize(layer.weight, scales, biases, **kind).astype(mx.float32)


@contextmanager
def _separated(parent: Any) -> Iterator[None]:
    """Inside, an arranged module has the layers of its checkpoint; behind it, it is arranged again, and evaluated, so
    that of one module's joined weights only there is a second copy."""
    if not hasattr(parent, "separate"):
        yield
        return
    parent.separate()
    try:
        yield
    finally:
        parent.arrange()
    mx.eval(parent.parameters())


def described(lora: Lora, loaded: LoadedLora) -> str:
    """One line on a LoRA that was just loaded."""
    total = lora.modules + lora.needless
    needless = f" ({lora.needless} of encoder layers that no picture depends on)" if lora.needless else ""
    return (
        f"LoRA {loaded.name}: {lora.modules} of {total} modules{needless}, {len(lora.unused)} keys unused, "
        f"scale {loaded.scale:g}"
    )
