"""Estimated against measured peaks of memory, phase by phase, at sizes that no test has the time for.

`python tests/benchmarks/memory_estimate.py [--size 2048x2048 ...] [--model tiny|medium|FOLDER] [--dtype bfloat16]`

"medium" is a random model with klein's heads and few blocks. Each phase runs alone, one step, its weights loaded
before; `edit` is the steps with a reference of 1024 x 1024, `merge` a LoRA for the loaded transformer, `preview`
decoding beside it. A phase of more than --most GB is left out. Peaks are `mx.get_peak_memory`.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from PIL import Image

from klein_mlx import KleinPipeline
from klein_mlx.model.sampler import noise
from klein_mlx.runtime.memory import Work
from klein_mlx.runtime.pictures import decode
from klein_mlx.runtime.run import Run, Step

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import medium  # noqa: E402

PHASES = ("merge", "encode", "references", "decode", "steps", "edit", "preview")
SIZES = ("2048x2048", "3072x3072", "4096x1024", "1024x4096", "4096x4096")
REFERENCE = 1024
SMALL = 20_000_000  # bytes below which a peak is not judged: there the estimate's constants count


def phases(
    pipe: KleinPipeline, width: int, height: int, folder: Path
) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(name, estimated bytes, work) of each phase; its weights are loaded when the work is asked for. folder: for
    a LoRA."""
    config, side = pipe.config, pipe.config.pixels_per_token
    words = {"width": width, "height": height, "num_inference_steps": 1, "seed": 1}
    planned = pipe.stream("a red circle", **words)
    request = planned.request
    embeds = mx.zeros((1, request.max_sequence_length, config.transformer.joint_attention_dim), pipe.dtype)
    work = Work(height, width, ((height, width),), length=request.max_sequence_length)
    edit = replace(work, references=((REFERENCE, REFERENCE),), tokens=(REFERENCE // side) ** 2)
    run, grid = Run(request), (height // side, width // side)

    def loaded(part: str, call: Callable[[], object]) -> Callable[[], object]:
        pipe.parts.get(part, run)
        return call

    def step(**images: object) -> Callable[[], object]:
        events = pipe.stream(prompt_embeds=embeds, **words, **images)
        if images:  # encoded before it is measured
            pipe.encodings.of_reference(run, events.plan.opened.references[0])
        return loaded("transformer", lambda: (isinstance(next(events), Step), events.close()))

    def estimated(phase: str, work: Work) -> int:
        return pipe.parts.estimate(work).phases[phase]

    picture = Image.linear_gradient("L").convert("RGB").resize((width, height))
    latents = noise(mx.random.key(1), *grid, config.transformer.in_channels)
    vae = pipe.parts.dtype_of("vae")
    yield merging(pipe, run, folder)
    if pipe.loras:
        pipe.unload_lora()
    pipe.parts.keep = "nothing"
    pipe.parts.release(run, "transformer")
    yield "encode", estimated("encode", work), lambda: pipe.encodings.of_request(run)
    pipe.parts.release(run, "text_encoder")
    yield "references", estimated("references", work), lambda: pipe.encodings.of_reference(run, picture)
    yield (
        "decode",
        estimated("decode", work),
        loaded("vae", lambda: decode(pipe.parts.get("vae", run), latents.astype(vae), "pil")),
    )
    pipe.parts.release(run, "vae")
    yield "steps", estimated("steps", replace(work, encodes=False)), step()
    small = Image.new("RGB", (REFERENCE, REFERENCE))
    yield "edit", estimated("steps", replace(edit, encodes=False)), step(image=[small])
    run.plan = planned.plan
    yield "preview", pipe.parts.preview_peak(work), pipe._preview(run, latents, None)
    pipe.parts.release(run, "transformer")


def merging(pipe: KleinPipeline, run: Run, folder: Path) -> tuple[str, int, Callable[[], object]]:
    """As `phases`; the transformer stays loaded, and its LoRA has been there once."""
    lora = medium.adapter(folder / "lora.safetensors", "LoRA", "transformer", pipe.config)
    pipe.parts.keep = "transformer"
    pipe.parts.get("transformer", run)
    pipe.parts.release(run, "transformer")  # a run that holds it would have to end before a LoRA is loaded
    pipe.load_lora(lora)
    peak = pipe.parts.merge_peak("transformer")
    pipe.unload_lora()
    return "merge", peak, lambda: pipe.load_lora(lora)


def measured(call: Callable[[], object]) -> int:
    """Bytes at the work's fullest moment, its weights among them."""
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    call()
    return mx.get_peak_memory()


def small_medium(folder: Path) -> Path:
    """A block of each kind, and one more: the last single block is another."""
    few = replace(medium.CONFIG.transformer, num_layers=1, num_single_layers=2)
    return medium.make(folder, replace(medium.CONFIG, transformer=few))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", metavar="WIDTHxHEIGHT")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype")
    parser.add_argument("--quantize", "-q")
    parser.add_argument("--phase", action="append", choices=PHASES)
    parser.add_argument("--most", type=float, default=8.0, help="GB that a phase may be estimated at")
    args = parser.parse_args()
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        model = small_medium(Path(folder, "medium")) if args.model == "medium" else args.model
        print(f"{'size':<12}{'phase':<12}{'estimate':>10}{'peak':>10}{'ratio':>8}{'seconds':>9}")
        for size in args.size or SIZES:
            width, height = map(int, size.split("x"))
            pipe = KleinPipeline.from_pretrained(model, dtype=args.dtype, quantize=args.quantize, keep="nothing")
            for name, expected, call in phases(pipe, width, height, Path(folder)):
                if (args.phase and name not in args.phase) or expected > args.most * 1e9:
                    print(f"{size:<12}{name:<12}{expected / 1e6:>7.0f} MB   left out")
                    continue
                start = time.perf_counter()
                peak = measured(call)
                seconds, ratio = time.perf_counter() - start, expected / peak
                worst = max(worst, abs(ratio - 1) if peak > SMALL else 0)
                print(f"{size:<12}{name:<12}{expected / 1e6:>7.0f} MB{peak / 1e6:>7.0f} MB{ratio:>8.2f}{seconds:>9.1f}")
                sys.stdout.flush()
    print(f"farthest from 1: {worst:.2f}")
    return int(worst > 0.15)


if __name__ == "__main__":
    sys.exit(main())
