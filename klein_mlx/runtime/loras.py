"""LoRAs of a pipeline: found, read, applied to what is loaded and to what will be, scaled, taken off again."""

import logging
from pathlib import Path
from typing import Any

from klein_mlx.errors import RequestError
from klein_mlx.formats.lora import read_lora
from klein_mlx.formats.lora_find import find_lora
from klein_mlx.runtime.encodings import Encodings
from klein_mlx.runtime.parts import Parts
from klein_mlx.weights.lora import LoadedLora, Lora, checked_scale


class Loras:
    """What KleinPipeline's LoRA methods do."""

    def __init__(self, parts: Parts, encodings: Encodings):
        self._parts, self._encodings = parts, encodings

    def load(
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
        lora = read_lora(file, self._parts.source.config, partial)
        self._parts.check_idle(*lora.parts)
        loaded = self._parts.loras.add(lora, scale, name)
        self._log(lora, loaded)
        try:
            self._refresh(lora)
        except BaseException:
            self._parts.loras.remove(name)
            self._refresh(lora)
            raise
        return loaded

    def unload(self, name: str | None = None) -> None:
        """See KleinPipeline.unload_lora."""
        names = [name] if name is not None else [lora.name for lora in self.loaded]
        if not names:
            raise RequestError("no LoRA is loaded")
        for one in names:
            self._parts.check_idle(*self._parts.loras.get(one).parts)
        for one in names:
            self._refresh(self._parts.loras.remove(one))

    def set_scale(self, name: str, scale: float) -> None:
        """See KleinPipeline.set_lora_scale."""
        checked_scale(scale)
        self._parts.check_idle(*self._parts.loras.get(name).parts)
        self._refresh(self._parts.loras.set_scale(name, scale))

    @property
    def loaded(self) -> list[LoadedLora]:
        return self._parts.loras.loaded

    def _free_name(self, stem: str) -> str:
        taken = {lora.name for lora in self.loaded}
        names = (stem, *(f"{stem}-{number}" for number in range(2, len(taken) + 3)))
        return next(name for name in names if name not in taken)

    def _refresh(self, lora: Lora) -> None:
        if "text_encoder" in lora.parts:
            self._encodings.prompts.clear()
        self._parts.apply_loras(*lora.parts)

    def _log(self, lora: Lora, loaded: LoadedLora) -> None:
        log = logging.getLogger("klein_mlx")
        if lora.contradiction:
            log.warning("LoRA %s: %s", loaded.name, lora.contradiction)
        if lora.unused:
            log.warning("LoRA %s: %d keys are not used (%s ...)", loaded.name, len(lora.unused), lora.unused[0])


def described(lora: Lora, loaded: LoadedLora) -> str:
    """One line on a LoRA that was just loaded."""
    total = lora.modules + lora.needless
    needless = f" ({lora.needless} of encoder layers that no picture depends on)" if lora.needless else ""
    return (
        f"LoRA {loaded.name}: {lora.modules} of {total} modules{needless}, {len(lora.unused)} keys unused, "
        f"scale {loaded.scale:g}"
    )
