"""A finished folder -> a repository of the Hugging Face Hub."""

import re
from pathlib import Path

from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.weights import one_line

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def check_upload(repository: str, token: bool = True) -> None:
    """Raise, before any work, for a name that cannot be and, if a token is needed, for a user who is not logged in."""
    if not _NAME.fullmatch(repository):
        raise RequestError(f"upload is {repository[:200]!r}; it must be owner/name")
    from huggingface_hub import get_token

    if token and not get_token():
        raise RequestError("to upload, log in first: `hf auth login` (or set HF_TOKEN)")


def upload(folder: Path, repository: str) -> str:
    """Create the repository if it is not there, and upload the folder. Returns its address."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Upload with klein-mlx")
    except Exception as error:  # the library's errors have no common parent
        raise CheckpointError(f"{repository}: the upload failed ({one_line(error)}); {folder} is complete") from error
    return str(address)
