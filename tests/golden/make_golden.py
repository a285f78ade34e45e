"""Make the golden files again: `python tests/golden/make_golden.py` (needs torch, diffusers and transformers).

Writes next to itself `model/`, a tiny random-weight pipeline in diffusers' layout, and one .safetensors per stage with
the tensors that diffusers makes from it in float32 on the CPU. All of it follows from seeds.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tools"))

import parity_reference as reference  # noqa: E402
import random_models  # noqa: E402


def main() -> None:
    shutil.rmtree(HERE / "model", ignore_errors=True)
    random_models.make(HERE / "model", random_models.TINY)
    for name, tensors in reference.everything(HERE / "model").items():
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, HERE / f"{name}.safetensors")
    for path in sorted(HERE.rglob("*")):
        if path.suffix in (".safetensors", ".json"):
            print(f"{path.stat().st_size:>9,} {path.relative_to(HERE)}")


if __name__ == "__main__":
    main()
