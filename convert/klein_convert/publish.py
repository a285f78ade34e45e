"""The model card and the licence that lie beside converted weights, ready for an upload.

Apache-2.0, section 4: a copy of the licence, the notices of the original, and a statement that files were changed.
"""

import re
from importlib import metadata
from pathlib import Path
from typing import Any

from klein_convert.writer import flush
from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.weights.checkpoint import Source
from klein_mlx.weights.quantize import Quantization
from klein_mlx.weights.safetensors import one_line

CARD_FILE, LICENCE_FILE, NOTICE_FILE = "README.md", "LICENSE", "NOTICE"


_APACHE = "Apache-2.0"


def write_card(folder: Path, settings: dict[str, Any], source: Source) -> None:
    """Write README.md, and LICENSE and NOTICE where there are texts for them. settings: what klein.json holds."""
    _write(folder / CARD_FILE, model_card(settings))
    if licence := _text(source.path, LICENCE_FILE) or (_own_licence() if settings["licence"] == _APACHE else None):
        _write(folder / LICENCE_FILE, licence)
    if notice := _text(source.path, NOTICE_FILE):
        _write(folder / NOTICE_FILE, notice)


def model_card(settings: dict[str, Any]) -> str:
    """The README.md of a checkpoint, with the header that the Hub reads."""
    origin = settings["source"]
    name, licence = str(origin.get("name", "an unnamed model")), settings["licence"]
    revision = f" at revision {origin['revision']}" if origin.get("revision") else ""
    stored = {part: Quantization.from_dict(values) for part, values in settings["quantization"].items()}
    bits = [f"the {part.replace('_', ' ')} is {q.told()}" for part, q in stored.items()]
    changes = ["converted to MLX", *([f"quantised: {', '.join(bits)}"] if bits else [])]
    known = licence == _APACHE
    header = [
        "---",
        "library_name: mlx",
        "pipeline_tag: text-to-image",
        f"license: {'apache-2.0' if known else 'other'}",
    ]
    if "/" in name:
        header += ["base_model:", f"- {name}"]
        header += [f"base_model_relation: {'quantized' if bits else 'finetune'}"] if bits else []
    header += ["tags:", "- mlx", "- klein-mlx", "- flux.2", "---"]
    parts = origin.get("parts", {})
    mixed = [f"- {part.replace('_', ' ')}: {told['name']} ({told['format']})" for part, told in parts.items()]
    body = [
        f"# FLUX.2 [klein] for MLX, variant {settings['variant']}",
        "",
        f"Made from {name}{revision} by {settings['made_by']}: {'; '.join(changes)}.",
        "This is an unofficial conversion; its makers are not affiliated with Black Forest Labs.",
        *(["", "Parts from files of their own:", *mixed] if mixed else []),
        "",
        "```sh",
        "pip install klein-mlx",
        'klein-mlx generate --model PATH_OR_REPOSITORY "a red fox in the snow" -o fox.png',
        "```",
        "",
        "## Licence and notices",
        "",
        f"The original model's licence is {licence}.",
        *(["It applies here as well: see LICENSE, or https://www.apache.org/licenses/LICENSE-2.0."] if known else []),
        f"Changes: the weight files were modified ({'; '.join(changes)}). klein.json records the source's files and",
        "these, each with its sha256; `klein-mlx info --verify FOLDER` checks them.",
    ]
    return "\n".join([*header, "", *body, ""])


def _text(folder: Path, stem: str) -> str | None:
    """The text of a LICENSE or NOTICE file beside the source's weights, whatever its ending."""
    for path in (folder / stem, folder / f"{stem}.md", folder / f"{stem}.txt"):
        if path.is_file() and path.stat().st_size < 1 << 20:
            return path.read_text(encoding="utf-8", errors="replace")
    return None


def _own_licence() -> str | None:
    """The text of Apache-2.0, as it lies beside this package."""
    try:
        text = metadata.distribution("klein-mlx").read_text(f"licenses/{LICENCE_FILE}")
    except metadata.PackageNotFoundError:
        text = None
    return text or _text(Path(__file__).resolve().parents[2], LICENCE_FILE)


def _write(path: Path, text: str) -> None:
    with path.open("wb") as file:
        file.write(text.encode())
        flush(file)


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
