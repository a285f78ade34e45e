"""Model folders for tests: copies of the small diffusers folder in golden/, whole, reshaped, sharded or damaged."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from klein_mlx.config import PARTS
from klein_mlx.errors import CheckpointError
from klein_mlx.formats.open import open_model
from klein_mlx.weights.checkpoint import load_part
from klein_mlx.weights.quantize import Quantization

GOLDEN = Path(__file__).parents[1] / "golden" / "model"
STEMS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}


def copy_model(folder: Path) -> Path:
    """The golden folder as diffusers wrote it, to be damaged."""
    shutil.copytree(GOLDEN, folder)
    return folder


def quantizable_model(folder: Path) -> Path:
    """As `copy_model`, with the encoder's MLP cut from 160 to 128: every input width is a multiple of 64."""
    copy_model(folder)
    edit_json(folder / "text_encoder" / "config.json", lambda values: values.update(intermediate_size=128))

    def cut(weights: dict[str, mx.array]) -> None:
        for name, array in weights.items():
            if "gate_proj" in name or "up_proj" in name:
                weights[name] = array[:128]
            elif "down_proj" in name:
                weights[name] = array[:, :128]

    edit_weights(folder, "text_encoder", cut)
    return folder


def deepen(folder: Path, layers: int) -> None:
    """Give the encoder this many layers, copies of its own in turn."""
    edit_json(folder / "text_encoder" / "config.json", lambda values: values.update(num_hidden_layers=layers))
    edit_json(folder / "text_encoder" / "config.json", lambda values: values.pop("layer_types", None))

    def repeat(weights: dict[str, mx.array]) -> None:
        own = {name: array for name, array in weights.items() if name.startswith("model.layers.")}
        depth = 1 + max(int(name.split(".")[2]) for name in own)
        for name, array in own.items():
            _, _, index, rest = name.split(".", 3)
            copies = range(int(index) + depth, layers, depth)
            weights.update({f"model.layers.{copy}.{rest}": array for copy in copies})

    edit_weights(folder, "text_encoder", repeat)


def weight_file(folder: Path, part: str) -> Path:
    return folder / part / f"{STEMS[part]}.safetensors"


def parameters(module: nn.Module) -> dict[str, mx.array]:
    """A module's weights by their dotted names."""
    return dict(tree_flatten(module.parameters()))  # type: ignore[arg-type]


def read_weights(path: Path) -> dict[str, mx.array]:
    weights = mx.load(str(path))
    assert isinstance(weights, dict)
    mx.eval(weights)
    return weights


def edit_weights(folder: Path, part: str, edit: Callable[[dict[str, mx.array]], Any]) -> None:
    """Rewrite a part's weights after `edit` has changed them in place."""
    path = weight_file(folder, part)
    weights = read_weights(path)
    edit(weights)
    path.unlink()
    mx.save_safetensors(str(path), weights, {"format": "pt"})


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def shard(folder: Path, part: str, count: int = 2) -> Path:
    """Split a part's file into shards with an index, as transformers writes them. Returns the index."""
    path = weight_file(folder, part)
    weights = read_weights(path)
    path.unlink()
    weight_map = {}
    for number in range(count):
        name = f"{path.stem}-{number + 1:05d}-of-{count:05d}.safetensors"
        mine = sorted(weights)[number::count]
        mx.save_safetensors(str(path.with_name(name)), {key: weights[key] for key in mine}, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, name)
    index = path.with_name(f"{path.name}.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


def raw_safetensors(header: Any, payload: bytes = b"") -> bytes:
    """A file from a header (an object, or its text) and the bytes behind it, right or wrong."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + payload


def refusal(action: Callable[[], Any]) -> str:
    """The one line with which an action is refused."""
    with pytest.raises(CheckpointError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def loaded(model: Path, dtype: mx.Dtype, bits: int | None = None) -> dict[str, mx.array]:
    """Every weight of all parts, as loading gives them."""
    source = open_model(model)
    quantization = Quantization(bits) if bits else None
    modules = {part: load_part(part, source, dtype, quantization) for part in PARTS}
    return {f"{part}.{name}": a for part, module in modules.items() for name, a in parameters(module).items()}


def assert_equal(left: dict[str, mx.array], right: dict[str, mx.array]) -> None:
    """The same names, dtypes and bits."""
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert mx.array_equal(left[name], right[name]).item(), name


def nothing_but(parent: Path, *names: str) -> bool:
    """Whether a folder holds just these entries."""
    return {path.name for path in parent.iterdir()} == set(names)


@contextmanager
def file_system(folder: Path, megabytes: int) -> Iterator[Path]:
    """A small disk of its own, mounted at a new folder; skips the test where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() or not shutil.which("mount"):
        pytest.skip("only Linux' root mounts a tmpfs")
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
