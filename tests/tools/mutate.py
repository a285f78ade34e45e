"""Files with wrong bytes: each is refused by a KleinError or read, or there is a bug.

`python tests/tools/mutate.py --count 100000` makes seeded mutations of sound files and reads each as the command would,
in worker processes, so that an abort is seen as well as an exception or a hang. It prints how they ended, per kind of
file; the exit code is 1 if there was a bug. `--kind gguf --first 1234 --count 1` makes one of them again.
"""

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wrong_bytes import (
    cut,
    other_bytes,
    other_chunk,
    other_data,
    other_layout,
    other_line,
    other_number,
    other_structure,
    other_value,
)

sys.path.append(str(Path(__file__).parents[1] / "formats"))  # the tests there write such files

SECONDS = 10  # of a processor, for one mutation; they take milliseconds. By the wall, twelve times as long
_MEMORY = 6 << 30  # bytes of address space
_CHUNK = 2500  # mutations per process


@dataclass(frozen=True)
class Kind:
    """A kind of file. make: writes a sound model and says which file to mutate, and how much of it (None: all of it).

    read: reads the model as the command would. share: of all mutations.
    """

    make: Callable[[Path], tuple[Path, int | None]]
    read: Callable[[Path], Any]
    share: float
    ways: tuple[Callable[[bytes, random.Random, int], bytes], ...] = (other_bytes, other_number, other_value)


# ---- the files ----


def _safetensors(folder: Path) -> tuple[Path, int | None]:
    from foreign import golden, save, to_bfl

    path = save(folder / "x.safetensors", to_bfl(golden("transformer")), {"format": "pt"})
    return path, 8 + int.from_bytes(path.read_bytes()[:8], "little")


def _scaled(folder: Path) -> tuple[Path, int | None]:
    """NVFP4 with hints in the header."""
    from foreign import golden, to_bfl
    from test_float4 import Writer

    writer = Writer(to_bfl(golden("transformer")))
    path = writer.save(folder / "x.safetensors", writer.metadata())
    return path, 8 + int.from_bytes(path.read_bytes()[:8], "little")


def _lora(folder: Path) -> tuple[Path, int | None]:
    """Every kind of adapter, each on some of the golden transformer's modules."""
    from lora_kinds import KINDS as ADAPTERS
    from lora_layouts import LAYOUTS, make_twin, save

    kinds = [make()[0] for name, make in ADAPTERS.items() if name not in ("lokr diffusers", "dora peft", "norms")]
    kinds.append(LAYOUTS["comfyui alpha"](make_twin())[0])
    tensors = dict(ADAPTERS["norms"]()[0])
    for number, module in enumerate(sorted({key.rpartition(".")[0] for key in kinds[0]})):
        own = kinds[number % len(kinds)]
        tensors |= {key: array for key, array in own.items() if key.startswith(f"{module}.")}
    path = save(folder / "x.safetensors", tensors)
    return path, 8 + int.from_bytes(path.read_bytes()[:8], "little")


def _gguf(folder: Path) -> tuple[Path, int | None]:
    from foreign import golden, to_bfl
    from test_gguf import save_gguf

    path = save_gguf(folder / "x.gguf", to_bfl(golden("transformer")), "Q8_0")
    return path, 4000


def _in_folder(name: str, sharded: bool = False) -> Callable[[Path], tuple[Path, int | None]]:
    def make(folder: Path) -> tuple[Path, int | None]:
        from folders import copy_model, shard

        model = copy_model(folder / "model")
        if sharded:
            shard(model, "vae")
        return model / name, None

    return make


def _ours(name: str) -> Callable[[Path], tuple[Path, int | None]]:
    def make(folder: Path) -> tuple[Path, int | None]:
        from folders import quantizable_model

        from klein_convert.checkpoint import convert_checkpoint

        quantizable_model(folder / "source")
        return convert_checkpoint(folder / "source", folder / "model", quantize=4) / name, None

    return make


def _read_part(path: Path) -> None:
    import mlx.core as mx

    from klein_mlx.formats.describe import describe
    from klein_mlx.formats.open import open_any
    from klein_mlx.weights.safetensors import load_now

    part = open_any(path)
    describe(part)
    mx.eval([load_now(weight) for weight in part.tensors.arrays().values()])  # type: ignore[union-attr]


def _read_lora(path: Path) -> None:
    """As `lora info` and the merging into a transformer would."""
    import mlx.core as mx
    from folders import GOLDEN

    from klein_mlx.errors import KleinError
    from klein_mlx.formats.describe import describe_lora, format_lora
    from klein_mlx.formats.lora import read_lora, shapes_of
    from klein_mlx.formats.open import open_model
    from klein_mlx.weights.lora import merge, merged_bias

    try:
        assert format_lora(describe_lora(path)).replace("\n", "").isprintable()
    except KleinError:
        pass
    config = open_model(GOLDEN).config
    shapes = shapes_of(config, "transformer")
    for module, changes in read_lora(path, config, partial=True).changes["transformer"].items():
        scaled = [(1.0, change) for change in changes]
        weight = merge(mx.ones(shapes[module]), scaled, lambda path: mx.ones(shapes[path]))
        assert weight.shape == shapes[module]
        mx.eval(weight, merged_bias(scaled, mx.float32))


def _read_model(path: Path) -> None:
    from klein_mlx.config import PARTS
    from klein_mlx.formats.describe import describe
    from klein_mlx.formats.open import open_model

    folder = next(parent for parent in path.parents if parent.name == "model")
    source = open_model(folder)
    for part in PARTS:
        source.weights(part)
    describe(source)


def _read_tokenizer(path: Path) -> None:

    from klein_mlx.weights.checkpoint import read_tokenizer

    read_tokenizer(path, 512)(["a red fox", "café 🦊"], 32)


def _picture(suffix: str, **options: Any) -> Callable[[Path], tuple[Path, int | None]]:
    """Noise of which every byte counts, with what writers put beside the pixels."""

    def make(folder: Path) -> tuple[Path, int | None]:
        import numpy as np
        from PIL import Image, ImageCms

        pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        path = folder / f"x{suffix}"
        with_words = {} if suffix == ".gif" else {"exif": exif, "icc_profile": profile}
        Image.fromarray(pixels).save(path, **with_words, **options)
        return path, None

    return make


def _read_picture(path: Path) -> None:
    from klein_mlx.images.reading import load_image
    from klein_mlx.images.saving import read_metadata

    image, _ = load_image(path)
    assert image.mode == "RGB"
    if path.suffix in (".png", ".jpg", ".webp"):
        read_metadata(path)


_RECIPE = {
    **{"recipe": 1, "klein_mlx": "1.0", "mlx": "0.32", "device": "cpu", "prompt": "a {red|blue} fox", "seed": 7},
    **{"size": [64, 48], "steps": 4, "guidance": 1.0, "dtype": "bfloat16", "sigmas": [1.0, 0.5], "strength": 0.6},
    "model": {"name": "tiny", "id": "tiny", "variant": "tiny", "fingerprint": "0123", "sampled": True},
    "images": [{"name": "x.png", "sha256": "00", "bytes": 12, "pixels": "11"}],
    "loras": [{"file": "x.safetensors", "sha256": "00", "scale": 0.8}],
    "schedule": [1.0, 0.9, 0.0],
}


def _recipe(folder: Path) -> tuple[Path, int | None]:
    path = folder / "recipe.json"
    path.write_text(json.dumps(_RECIPE))
    return path, None


def _read_recipe(path: Path) -> None:
    """As `show` and `again` would, from inside of each kind of picture."""
    from PIL import Image, PngImagePlugin

    from klein_mlx.cli import again, show
    from klein_mlx.errors import KleinError
    from klein_mlx.images.saving import KEY, read_metadata

    words = PngImagePlugin.PngInfo()
    words.add_itxt(KEY, path.read_text("utf-8", "replace"))
    picture = path.with_suffix(".png")
    Image.new("RGB", (16, 16)).save(picture, pnginfo=words)
    found = read_metadata(picture)
    if found.recipe is None:
        raise KleinError("no recipe")
    show._lines(found)
    json.dumps(show._object(str(picture), found))
    with_files = {"image": ["x.png"], "lora": ["x.safetensors"]}
    for typed in ({}, with_files):
        try:
            again._options(found.recipe, str(picture), typed)
        except KleinError:
            if typed:
                raise


_LINES = (
    '{"prompt": "a fox", "seed": 3, "size": "64x64", "steps": 2, "guidance": 1.5, "output": "a/{seed}.png"}',
    '{"prompt": "a {red|blue} {a|{b|c}} star", "seed": [1, 2], "width": 64, "height": 80, "sigmas": [1, 0.5]}',
    '{"prompt": "x", "image": ["a.png"], "count": 2, "max-sequence-length": 64}',
    "a plain line {",
)


def _prompts(folder: Path) -> tuple[Path, int | None]:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(_LINES))
    return path, None


def _read_prompts(path: Path) -> None:
    """As `generate --prompt-file` would, up to each request."""
    from folders import GOLDEN

    from klein_mlx.cli.options import RunOptions, call_arguments
    from klein_mlx.cli.prompts import Failure, read_jobs
    from klein_mlx.errors import KleinError
    from klein_mlx.formats.open import open_model
    from klein_mlx.request import check

    config, refused = open_model(GOLDEN).config, None
    for job in read_jobs(RunOptions(prompt_file=str(path), model="tiny")):
        if isinstance(job, Failure):
            refused = job.error
            continue
        try:
            check(config, prompt=job.prompt, **call_arguments(job.options, config))
        except KleinError as error:
            refused = error
    if refused:
        raise refused


KINDS = {
    "safetensors": Kind(
        _safetensors,
        _read_part,
        0.25,
        (other_bytes, other_bytes, other_number, cut, other_data, other_layout, other_layout),
    ),
    "scaled": Kind(_scaled, _read_part, 0.1, (other_bytes, other_bytes, other_number, cut, other_data, other_layout)),
    "gguf": Kind(_gguf, _read_part, 0.25, (other_bytes, other_bytes, cut, other_data)),
    "lora": Kind(
        _lora, _read_lora, 0.1, (other_bytes, other_number, cut, other_data, other_layout, *(other_structure,) * 6)
    ),
    "index.json": Kind(_in_folder("vae/diffusion_pytorch_model.safetensors.index.json", True), _read_model, 0.04),
    "model_index.json": Kind(_in_folder("model_index.json"), _read_model, 0.04),
    "transformer/config.json": Kind(_in_folder("transformer/config.json"), _read_model, 0.04),
    "text_encoder/config.json": Kind(_in_folder("text_encoder/config.json"), _read_model, 0.04),
    "vae/config.json": Kind(_in_folder("vae/config.json"), _read_model, 0.04),
    "klein.json": Kind(_ours("klein.json"), _read_model, 0.06),
    "tokenizer.json": Kind(_ours("tokenizer.json"), _read_tokenizer, 0.04),
    "scheduler_config.json": Kind(_in_folder("scheduler/scheduler_config.json"), _read_model, 0.04),
    "picture.png": Kind(_picture(".png"), _read_picture, 0.04, (other_bytes, *(other_chunk,) * 5)),
    "picture.jpg": Kind(_picture(".jpg"), _read_picture, 0.04, (other_bytes,)),
    "picture.webp": Kind(_picture(".webp"), _read_picture, 0.04, (other_bytes,)),
    "picture.gif": Kind(_picture(".gif"), _read_picture, 0.04, (other_bytes,)),
    "picture.tif": Kind(_picture(".tif", compression="tiff_lzw"), _read_picture, 0.04, (other_bytes,)),
    "recipe": Kind(_recipe, _read_recipe, 0.06, (other_bytes, other_number, *(other_value,) * 3)),
    "prompts.jsonl": Kind(_prompts, _read_prompts, 0.06, (other_bytes, other_number, *(other_line,) * 3)),
}


# ---- one process ----


def work(name: str, first: int, count: int, mark: Path | None = None) -> dict[str, Any]:
    """Make `count` mutations of one kind, beginning with the seed `first`. mark: a file that holds the seed in work.

    Returns how many were "read" and "refused", and the "bugs", each as seed and exception.
    """
    from klein_mlx.errors import KleinError

    def hang(*_: object) -> None:
        raise TimeoutError(f"took over {SECONDS} s")

    before = [(number, signal.signal(number, hang)) for number in (signal.SIGPROF, signal.SIGALRM)]
    kind, told = KINDS[name], Counter()
    bugs: list[tuple[int, str]] = []
    place = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        path, limit = kind.make(Path(folder))
        sound = path.read_bytes()
        kind.read(path)  # or all would be refused for another reason
        for seed in range(first, first + count):
            if mark:
                mark.write_text(str(seed))
            rng = random.Random(f"{name} {seed}")
            changed = path.with_name(f"{path.name}.new")
            changed.write_bytes(rng.choice(kind.ways)(sound, rng, limit or len(sound)))
            os.replace(changed, path)  # what is mapped still is what it was
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(12 * SECONDS)
            try:
                kind.read(path)
                told["read"] += 1
            except KleinError as error:
                told["refused"] += 1
                if "\n" in str(error) or not str(error).isprintable() or len(str(error)) > 2000:
                    bugs.append((seed, f"a message that is no line: {str(error)[:200]!r}"))
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                bugs.append((seed, f"{type(error).__name__}: {str(error)[:200]}"))
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.alarm(0)
    for number, handler in before:
        signal.signal(number, handler)
    return {"kind": name, "read": told["read"], "refused": told["refused"], "bugs": bugs}


# ---- all of them ----


@dataclass
class Tally:
    """Of one kind of file. bugs: seed and what happened."""

    read: int = 0
    refused: int = 0
    bugs: list[tuple[int, str]] = field(default_factory=list)


Job = tuple[str, int, int]  # kind, first seed, how many


def run(count: int, first: int = 0, kinds: tuple[str, ...] = tuple(KINDS), processes: int = 2) -> dict[str, Tally]:
    """Share `count` mutations among the kinds and processes, and collect how they ended."""
    tallies = {name: Tally() for name in kinds}
    waiting = _bundles(count, first, kinds, processes)
    running: list[tuple[subprocess.Popen[str], list[Job], Path, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < processes:
                jobs = waiting.pop(0)
                mark = Path(folder, f"{jobs[0][0].replace('/', '-')}-{jobs[0][1]}")
                words = [sys.executable, __file__, "--work", json.dumps(jobs), str(mark)]
                process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
                running.append((process, jobs, mark, time.monotonic()))
            for each in list(running):
                process, jobs, mark, begun = each
                try:
                    out, _ = process.communicate(timeout=0.1)
                except subprocess.TimeoutExpired:
                    if time.monotonic() - begun < SECONDS * 30 + sum(number for *_, number in jobs):
                        continue
                    process.kill()
                    out, _ = process.communicate()
                running.remove(each)
                if rest := _collect(tallies, out, process.returncode, mark, jobs):
                    waiting.insert(0, rest)
    return tallies


def _bundles(count: int, first: int, kinds: tuple[str, ...], processes: int) -> list[list[Job]]:
    """What each process does: some mutations of one kind, or all of several kinds."""
    whole = sum(KINDS[name].share for name in kinds)
    room = min(_CHUNK, -(-count // processes))
    bundles: list[list[Job]] = [[]]
    for name in kinds:
        start, end = first, first + max(1, round(count * KINDS[name].share / whole))
        while start < end:
            free = room - sum(number for *_, number in bundles[-1])
            if free <= 0:
                bundles.append([])
                continue
            bundles[-1].append((name, start, min(free, end - start)))
            start += free
    return bundles


def _collect(tallies: dict[str, Tally], out: str, code: int, mark: Path, jobs: list[Job]) -> list[Job]:
    """Add what a process found. Returns what it has left undone: all behind the mutation that ended it."""
    done = [json.loads(line) for line in out.splitlines()]
    for told in done:
        tally = tallies[told["kind"]]
        tally.read, tally.refused = tally.read + told["read"], tally.refused + told["refused"]
        tally.bugs += [(seed, what) for seed, what in told["bugs"]]
    if code == 0:
        return []
    name, start, number = jobs[len(done)]
    seed = int(mark.read_text()) if mark.exists() else start
    tallies[name].bugs.append((seed, f"the process ended with {code}"))
    left = start + number - seed - 1  # what the job found before is lost, and counts as nothing
    return [*([(name, seed + 1, left)] if left > 0 else []), *jobs[len(done) + 1 :]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=tuple(KINDS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        for name, first, count in json.loads(args.work[0]):
            Path(args.work[1]).write_text(str(first))
            print(json.dumps(work(name, first, count, Path(args.work[1]))), flush=True)
        return 0
    tallies = run(args.count, args.first, tuple(args.kind or KINDS), args.processes)
    print(f"{'':<26}{'read':>8}{'refused':>9}{'bugs':>6}")
    for name, tally in tallies.items():
        print(f"{name:<26}{tally.read:>8}{tally.refused:>9}{len(tally.bugs):>6}")
        for seed, what in tally.bugs[:10]:
            print(f"    seed {seed}: {what}")
    return 1 if any(tally.bugs for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
