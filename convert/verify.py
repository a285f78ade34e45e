"""Whether a checkpoint's files are still what was written: each sha256 against klein.json's record."""

from klein_mlx.checkpoint import CONFIG_FILE, Checkpoint, Source
from klein_mlx.convert.behind import digest_file
from klein_mlx.convert.part import PartFile
from klein_mlx.errors import CheckpointError
from klein_mlx.weights import read_json


def verify(source: Source | PartFile) -> list[str]:
    """Read every file of a checkpoint of ours, and compare. Returns the names that were compared.

    Raises CheckpointError for a file that has changed, is missing from the record, or for a model without a record.
    """
    record = read_json(source.path / CONFIG_FILE).get("sha256") if isinstance(source, Checkpoint) else None
    if not isinstance(source, Checkpoint) or not isinstance(record, dict) or not record:
        raise CheckpointError(f"{source.path}: holds no record of its files; convert it to have one")
    files = {path.name: path for path in source.files() if path.name != CONFIG_FILE}
    if odd := sorted(files.keys() - record.keys()):
        raise CheckpointError(f"{files[odd[0]]}: is not in the record of {CONFIG_FILE}; convert again")
    for name in record:
        path = source.path / str(name)
        if path.name != name:
            raise CheckpointError(f"{source.path / CONFIG_FILE}: records {name!r}; it must be a file beside it")
        if digest_file(path) != record[name]:
            raise CheckpointError(f"{path}: has changed since it was written; convert or download it again")
    return sorted(record)
