"""What a conversion costs beside what it cannot do without.

`python tests/benchmarks/convert_speed.py FOLDER [--share 0.25]`

Not a test. In one run, on a model in diffusers' layout with random bfloat16 weights of the 4B's sizes (16.1 GB; --share
takes so much of its layers), made in FOLDER and removed afterwards:

  copy       the source's files, each flushed to the disk
  quantise   the tensors that `convert -q 4` quantises, each already in memory
  convert    the command `klein-mlx convert SOURCE DESTINATION -q 4`

Files are dropped from the page cache before they are read, where the system allows it. Each phase is a process of its
own, and its peak resident memory is the kernel's figure. Prints one JSON object: seconds, peaks, and the ratio
convert / (copy + quantise).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

TINY = Path(__file__).parents[2] / "klein_mlx" / "tiny"
_SHARD = 5 * 10**9


def make(folder: Path, share: float) -> None:
    """The model's folder, written tensor by tensor."""
    import mlx.core as mx
    import numpy as np

    from klein_mlx.config import ModelConfig
    from klein_mlx.formats.diffusers import STEMS
    from klein_mlx.formats.names import diffusers_name, their_shape
    from klein_mlx.formats.part import KLEIN
    from klein_mlx.weights.checkpoint import expected

    rng = np.random.default_rng(0)
    transformer, encoder = KLEIN["transformer"], KLEIN["text_encoder"]
    singles = max(1, round(transformer.num_single_layers * share))
    transformer = replace(transformer, num_layers=max(1, round(5 * share)), num_single_layers=singles)
    encoder = replace(encoder, num_hidden_layers=max(4, round(36 * share)))
    layers = encoder.num_hidden_layers
    config = ModelConfig(transformer, encoder, KLEIN["vae"], True, (layers // 4, layers // 2, layers * 3 // 4))
    deeper = replace(encoder, num_hidden_layers=layers + 1)
    whole = replace(config, text_encoder=deeper, taps=(1, 2, layers))  # the files hold layers that are never used
    kinds = {"transformer": "Flux2Transformer2DModel", "vae": "AutoencoderKLFlux2"}
    for part, settings in (("transformer", transformer), ("text_encoder", encoder), ("vae", config.vae)):
        shapes = {}
        for ours, shape in expected(part, whole).items():
            theirs, layout = diffusers_name(part, ours)
            shapes[theirs] = their_shape(layout, shape)
        (folder / part).mkdir(parents=True)
        weight_map, number, shard, size = {}, 1, {}, 0
        for name in [*sorted(shapes), None]:
            if name is None or size > _SHARD:
                path = folder / part / f"{STEMS[part]}-{number:05d}.safetensors"
                mx.save_safetensors(str(path), shard, {"format": "pt"})
                weight_map |= dict.fromkeys(shard, path.name)
                number, shard, size = number + 1, {}, 0
                mx.clear_cache()
            if name is not None:
                shard[name] = _random(rng, shapes[name])
                size += shard[name].nbytes
        index = folder / part / f"{STEMS[part]}.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        values = {**settings.to_dict(), "_class_name": kinds.get(part), "model_type": "qwen3"}
        (folder / part / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer").mkdir()
    shutil.copy(TINY / "tokenizer.json", folder / "tokenizer" / "tokenizer.json")
    told = {"is_distilled": True, "text_encoder_out_layers": list(config.taps)}
    (folder / "model_index.json").write_text(json.dumps(told))


def _random(rng: Any, shape: tuple[int, ...]) -> Any:
    """bfloat16 numbers with random signs and mantissas, and exponents from 2^-9 to 2^-2 (all positive in vectors)."""
    import mlx.core as mx
    import numpy as np

    bits = np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16).reshape(shape)
    bits = bits & (0x807F if len(shape) > 1 else 0x7F) | (118 + (bits >> 7 & 7)) << 7
    return mx.array(bits.astype(np.uint16)).view(mx.bfloat16)


def copy(folder: Path, target: Path) -> float:
    """Seconds to copy every file and flush it."""
    begin = time.perf_counter()
    for path in sorted(folder.rglob("*.*")):
        if path.is_file():
            copied = target / path.relative_to(folder)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
            with copied.open("rb") as file:
                os.fsync(file.fileno())
    return time.perf_counter() - begin


def quantise(folder: Path) -> float:
    """Seconds in mx.quantize alone, of every layer that the 4-bit preset quantises."""
    import mlx.core as mx

    from klein_mlx.formats.open import open_model
    from klein_mlx.weights.quantize import QUANTIZED_PARTS, Quantization

    quantization, taken = Quantization(4), 0.0
    source = open_model(folder)
    for part in QUANTIZED_PARTS:
        weights = source.weights(part)
        for name in list(weights):
            array, own = weights.pop(name), quantization.of(part, name) if name.endswith(".weight") else None  # type: ignore[attr-defined]
            if own is not None:
                mx.eval(array)
                begin = time.perf_counter()
                mx.eval(*mx.quantize(array, own.group_size, own.bits, own.mode))
                taken += time.perf_counter() - begin
            del array
            mx.clear_cache()
    return taken


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is None:
        return
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            advise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(*words: object) -> tuple[str, float, float, float]:
    """A process' last line, its seconds, those of its processors, and its peak resident memory in GB. This one stays
    small, so that the child's figure, which begins with its parent's, is its own."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    told = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{words} failed")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    used = usage.ru_utime + usage.ru_stime
    return (told.splitlines() or [""])[-1], time.perf_counter() - begin, used, peak / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where 36 GB are free (less with --share)")
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--phase", choices=("make", "copy", "quantise"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = args.folder / "model"
    if args.phase == "make":
        make(model, args.share)
    elif args.phase:
        print(copy(model, args.folder / "copy") if args.phase == "copy" else quantise(model))
    if args.phase:
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    own = (Path(__file__), args.folder, "--share", args.share, "--phase")
    try:
        run(*own, "make")
        told: dict[str, float] = {
            "source_gb": sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) / 1e9
        }
        forget(model)
        told["copy_s"] = float(run(*own, "copy")[0])
        shutil.rmtree(args.folder / "copy")
        forget(model)
        told["quantise_s"] = float(run(*own, "quantise")[0])
        forget(model)
        words = ("-m", "klein_mlx", "convert", model, args.folder / "ours", "-q", "4", "--quiet")
        _, told["convert_s"], told["convert_cpu_s"], told["convert_peak_gb"] = run(*words)
        told["written_gb"] = sum(path.stat().st_size for path in (args.folder / "ours").iterdir()) / 1e9
    finally:
        for name in ("model", "copy", "ours"):
            shutil.rmtree(args.folder / name, ignore_errors=True)
    told["ratio"] = told["convert_s"] / (told["copy_s"] + told["quantise_s"])
    print(json.dumps({name: round(value, 3) for name, value in told.items()}))


if __name__ == "__main__":
    main()
