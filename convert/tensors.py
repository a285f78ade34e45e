"""The tensors of a foreign file or folder, whatever their encoding: entries to check, arrays to use.

Encodings (float8 with scales, GGUF's blocks) are undone here and in the readers, so that whoever comes after sees
plain weights. Nothing here knows which model they belong to.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from klein_mlx.weights import Entry, Weight, WeightFiles


@dataclass(frozen=True)
class Tensors:
    """Named tensors: what each is (`entries`), and all of them, lazily (`arrays`).

    kind: the files' format. metadata: what the file says of itself, as text.
    """

    path: Path
    kind: str
    files: tuple[Path, ...]
    entries: Mapping[str, Entry]
    arrays: Callable[[], Mapping[str, Weight]]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def renamed(self, names: Mapping[str, str]) -> "Tensors":
        """Only the tensors that are values of `names`, under its keys."""
        entries = {new: self.entries[old] for new, old in names.items()}

        def arrays() -> dict[str, Weight]:
            found = self.arrays()
            return {new: found[old] for new, old in names.items()}

        return replace(self, entries=entries, arrays=arrays)

    def check(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, tuple[str, ...]],
        left_out: Callable[[str], bool],
    ) -> None:
        """As `WeightFiles.check`."""
        WeightFiles(self.path, {self.path: dict(self.entries)}).check(shapes, dtypes, left_out)
