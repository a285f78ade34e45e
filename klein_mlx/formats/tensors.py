"""The tensors of a foreign file or folder, whatever their encoding: entries to check, arrays to use.

Encodings (floats of 8 and 4 bits with scales, GGUF's blocks) are undone in the readers, so that whoever comes after
sees plain weights. Nothing here knows which model they belong to.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx

from klein_mlx.weights.rows import ReadRows
from klein_mlx.weights.safetensors import Entry, Weight, WeightFiles, load_now

REMEDY = "take the bf16, the FP8 (e4m3), the NVFP4 of BFL's or ComfyUI's, or a GGUF file of this model"


@dataclass(frozen=True)
class Scaled:
    """A weight that has to be decoded with the tensors beside it, which are named in the order that `decode` takes.

    shape: of the decoded weight, which is bfloat16.
    """

    kind: str
    shape: tuple[int, ...]
    beside: tuple[str, ...]
    decode: Callable[..., mx.array]

    def array(self, name: str, found: Mapping[str, Weight]) -> mx.array:
        """The weight, lazily."""
        return self.decode(*(load_now(found[each]) for each in (name, *self.beside)))


@dataclass(frozen=True)
class Tensors:
    """Named tensors: what each is (`entries`), and all of them, lazily (`arrays`).

    kind: the files' format. metadata: what the file says of itself, as text. rows: a reader of some rows of a matrix,
    or None.
    """

    path: Path
    kind: str
    files: tuple[Path, ...]
    entries: Mapping[str, Entry]
    arrays: Callable[[], Mapping[str, Weight]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    rows: Callable[[str], ReadRows | None] = lambda name: None

    def renamed(self, names: Mapping[str, str]) -> "Tensors":
        """Only the tensors that are values of `names`, under its keys."""
        entries = {new: self.entries[old] for new, old in names.items()}

        def arrays() -> dict[str, Weight]:
            found = self.arrays()
            return {new: found[old] for new, old in names.items()}

        return replace(self, entries=entries, arrays=arrays, rows=lambda name: self.rows(names.get(name, name)))

    def check(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, tuple[str, ...]],
        left_out: Callable[[str], bool],
    ) -> None:
        """As `WeightFiles.check`."""
        WeightFiles(self.path, {self.path: dict(self.entries)}).check(shapes, dtypes, left_out)
