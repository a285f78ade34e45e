"""The committed golden files, as numpy arrays."""

from functools import cache
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).parent
MODEL = HERE / "model"  # a tiny random-weight pipeline in diffusers' layout
FILES = ("text", "transformer", "vae", "runs", "schedule", "bfloat16")


@cache
def load_all(name: str) -> dict[str, np.ndarray]:
    return load_file(HERE / f"{name}.safetensors")


def load(name: str, prefix: str = "") -> dict[str, np.ndarray]:
    """The tensors of one file; with a prefix, those that start with it and a dot, without it."""
    start = f"{prefix}." if prefix else ""
    return {key.removeprefix(start): value for key, value in load_all(name).items() if key.startswith(start)}
