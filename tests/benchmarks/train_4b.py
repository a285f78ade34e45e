"""Training of a true 4B of random weights, by the command: seconds of an update and the process's peak memory.

`python tests/benchmarks/train_4b.py FOLDER [--method lora --bits 4] [--resolution 256]` writes the model into FOLDER
(16 GB) unless it is there, and runs one update in a process of its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.medium import KLEIN_4B, make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resolution", type=int, default=256)
    options, rest = parser.parse_known_args()
    model = options.folder / "klein-base-4b-random"
    if not (model / "klein.json").exists():
        options.folder.mkdir(parents=True, exist_ok=True)
        make(model, KLEIN_4B, 1024, 512)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        data, side = Path(scratch) / "data", options.resolution
        data.mkdir()
        for number in range(2):
            pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
            Image.fromarray(pixels).save(data / f"{number}.png")
            (data / f"{number}.txt").write_text(f"picture {number}")
        command = [sys.executable, "-m", "klein_mlx", "train", str(data), "--model", str(model)]
        command += ["-o", f"{scratch}/out.safetensors", "--run", f"{scratch}/run", "--steps", "1", "--accumulate", "1"]
        command += ["--resolution", str(side), "--hold-out", "0", *rest]
        done = subprocess.run(command)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        log = Path(scratch) / "run" / "log.jsonl"
        row = json.loads(log.read_text().splitlines()[-1]) if log.exists() else {}
    print(json.dumps({"options": rest, "side": side, "peak_rss_gb": round(peak / 1e9, 2), **row}))
    sys.exit(done.returncode)


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "2")
    main()
