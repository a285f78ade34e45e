"""A model with LoRAs merged into its weights, as a Source: what `convert --lora` writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from klein_mlx.config import PARTS, ModelConfig
from klein_mlx.errors import CheckpointError
from klein_mlx.formats.lora import read_lora
from klein_mlx.formats.lora_find import find_lora
from klein_mlx.weights.checkpoint import Source
from klein_mlx.weights.lora import LoraStack, merge
from klein_mlx.weights.quantize import Quantization
from klein_mlx.weights.rows import ReadRows
from klein_mlx.weights.safetensors import Deferred, Weight, load_now


@dataclass(frozen=True)
class WithLoras:
    """The base's weights with all LoRAs in them: summed in float32, rounded once to each weight's dtype."""

    base: Source
    loras: LoraStack
    paths: tuple[Path, ...]

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def config(self) -> ModelConfig:
        return self.base.config

    @property
    def quantization(self) -> Mapping[str, Quantization]:
        return self.base.quantization

    @property
    def tokenizer_file(self) -> Path:
        return self.base.tokenizer_file

    @property
    def info(self) -> Mapping[str, Any]:
        told = [{"name": one.file, "sha256": one.sha256, "scale": one.scale} for one in self.loras.loaded]
        source = self.base.info.get("source", {})
        return {**self.base.info, "source": {**source, "loras": [*source.get("loras", ()), *told]}}

    def weights(self, part: str) -> Mapping[str, Weight]:
        weights = dict(self.base.weights(part))
        for path in self.loras.changes(part):
            name = f"{path}.weight"
            weight = weights[name]
            # Made anew whenever it is loaded: at most one weight with its float32 copies is in memory.
            weights[name] = Deferred(tuple(weight.shape), weight.dtype, partial(self._merged, part, path))
        return weights

    def files(self, parts: Sequence[str] = PARTS) -> list[Path]:
        return [*self.base.files(parts), *self.paths]

    def rows(self, part: str, name: str) -> ReadRows | None:
        """The base's, of what no LoRA changes; None: the whole table of an embedding has to be made."""
        changed = name.removesuffix(".weight") in self.loras.changes(part)
        return None if changed else self.base.rows(part, name)

    def _merged(self, part: str, path: str) -> mx.array:
        weights = self.base.weights(part)

        def weigh(other: str) -> mx.array:
            return load_now(weights[f"{other}.weight"])

        merged = merge(weigh(path), self.loras.changes(part)[path], weigh)
        mx.eval(merged)
        return merged


def merge_loras(base: Source, loras: Sequence[tuple[str | Path, float]], partial: bool = False, **where: Any) -> Source:
    """The base with LoRAs in its weights. loras: what `find_lora` takes (`where` is handed to it), and a scale.

    Raises CheckpointError for a LoRA that cannot be applied in full, and for weights that are quantised already: they
    would lose most of it.
    """
    stack, paths = LoraStack(), []
    for number, (name, scale) in enumerate(loras):
        path = find_lora(name, **where)
        lora = read_lora(path, base.config, partial)
        for part, changes in lora.changes.items():
            stored = base.quantization.get(part)
            packed = next((one for one in changes if stored and stored.of(part, one)), None)
            if packed:
                raise CheckpointError(
                    f"{base.path}: the {part} is quantised, and merging {path.name} into it would lose what it adds: "
                    "start from the original, or use the LoRA beside it (generate --lora)"
                )
            if any(change.bias is not None for own in changes.values() for change in own):
                raise CheckpointError(f"{path}: adds biases, which no checkpoint of klein's has; use generate --lora")
        stack.add(lora, scale, f"{number}")
        paths.append(path)
    return WithLoras(base, stack, tuple(paths)) if paths else base
