"""A foreign file or folder, opened: safetensors or GGUF, told apart by their first bytes."""

from functools import partial
from pathlib import Path

from klein_mlx.convert.gguf import open_gguf
from klein_mlx.convert.tensors import Tensors
from klein_mlx.errors import CheckpointError
from klein_mlx.rows import file_rows
from klein_mlx.weights import WeightFiles, open_weights, read_header, read_metadata, require_file

_STEMS = ("model", "diffusion_pytorch_model")


def open_tensors(path: Path, stem: str | None = None) -> Tensors:
    """The tensors of a safetensors or GGUF file, or of a folder's shards; told apart by their first bytes.

    stem: how the wanted file in a folder begins, where that is known.
    """
    if path.is_dir():
        return _open_folder(path, stem)
    if require_file(path) >= 4:
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":
                return open_gguf(path)
    files = WeightFiles(path, {path: read_header(path)})
    return Tensors(
        path, "safetensors", (path,), files.shards[path], files.arrays, read_metadata(path), partial(file_rows, files)
    )


def _open_folder(folder: Path, stem: str | None) -> Tensors:
    stem = stem or next((s for s in _STEMS if any(folder.glob(f"{s}.safetensors*"))), None)
    if stem is None:
        loose = [p for p in sorted(folder.glob("*.safetensors")) if not p.name.startswith("._")]
        if len(loose) == 1:
            return open_tensors(loose[0])
        if loose:
            raise CheckpointError(f"{folder}: holds {len(loose)} safetensors files and no index; name one of them")
        stem = _STEMS[0]  # its absence is told with its remedy
    files = open_weights(folder, stem)
    entries = {name: entry for shard in files.shards.values() for name, entry in shard.items()}
    metadata = {key: value for shard in files.shards for key, value in read_metadata(shard).items()}
    return Tensors(
        folder, "safetensors", tuple(files.shards), entries, files.arrays, metadata, partial(file_rows, files)
    )
