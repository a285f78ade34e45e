"""klein_mlx, mflux and diffusers on one model, turn by turn in one run: CPU seconds of each phase, with their spread.

    python tests/benchmarks/pair.py MODEL --mflux PYTHON [--diffusers PYTHON] [--dtype float32] [--pictures 5]
    python tests/benchmarks/pair.py --make FOLDER

MODEL: a folder in diffusers' layout, whole; --make writes one of a quarter of a billion parameters with random weights
that all three can read. Each program is a process of its own, in the Python that has it, with the model loaded; each
makes one picture that does not count. Processor seconds, not the clock's, since others may use the machine; and turn by
turn, since it may be slower an hour later. In a child nothing of klein_mlx is imported but for klein_mlx itself.
"""

import argparse
import importlib
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PHASES = ("encode", "steps", "decode")
PROMPT = "a red fox in the snow"

Picture = Callable[[dict[str, Any]], None]


class Clock:
    """Processor seconds of all threads, by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = 0.0

    @contextmanager
    def phase(self, name: str) -> Any:
        start = time.process_time()
        yield
        self.seconds[name] += time.process_time() - start

    def start(self) -> None:
        self.last = time.process_time()

    def lap(self, name: str) -> None:
        """What passed since the last lap, or since `start`, is this phase's."""
        now = time.process_time()
        self.seconds[name] += now - self.last
        self.last = now

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose calls are this phase's."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return call


# ---- each program, in its own process ----


def open_klein_mlx(asked: dict[str, Any], clock: Clock) -> Picture:
    """The pipeline, with everything kept in memory."""
    pipe = importlib.import_module("klein_mlx").KleinPipeline.from_pretrained(
        asked["model"], dtype=asked["dtype"], keep="all"
    )

    def picture(line: dict[str, Any]) -> None:
        run = pipe.stream(line.pop("prompt"), num_inference_steps=line.pop("steps"), **line)
        run.watch = clock.phase
        for _ in run:
            pass

    return picture


def open_mflux(asked: dict[str, Any], clock: Clock) -> Picture:
    """mflux's klein with the folder's own dimensions; on a CPU its matmuls of 16 bits go through float32, as ours do,
    for they would take many times as long."""
    import mlx.core as mx

    config = importlib.import_module("mflux.models.common.config.model_config").ModelConfig
    if asked["dtype"] == "float32":
        config.precision = mx.float32
    module = importlib.import_module("mflux.models.flux2.variants.txt2img.flux2_klein")
    parts = importlib.import_module("mflux.models.flux2.flux2_initializer")
    if mx.default_device().type != mx.DeviceType.gpu:
        widen_matmuls()
    own = config.flux2_klein_4b()
    own.transformer_overrides |= _dimensions(asked["model"], "transformer", parts.Flux2Transformer)
    own.text_encoder_overrides |= _dimensions(asked["model"], "text_encoder", parts.Qwen3TextEncoder)
    model = module.Flux2Klein(model_config=own, model_path=asked["model"])
    encode = model._encode_prompt_pair

    def encoded(**arguments: Any) -> Any:
        clock.start()
        out = encode(**arguments)
        mx.eval([array for array in out if array is not None])
        clock.lap("encode")
        return out

    object.__setattr__(model, "_encode_prompt_pair", encoded)

    class Laps:
        def call_before_loop(self, latents: Any, **_: Any) -> None:
            clock.start()

        def call_in_loop(self, t: int, latents: Any, **_: Any) -> None:
            mx.eval(latents)
            clock.lap("steps")

    model.callbacks.register(Laps())

    def picture(line: dict[str, Any]) -> None:
        model.prompt_cache = {}
        model.generate_image(num_inference_steps=line.pop("steps"), guidance=1.0, **line)
        clock.lap("decode")

    return picture


def _dimensions(model: str, part: str, kind: Any) -> dict[str, Any]:
    """What a part's config.json states, as far as a class takes it."""
    stated = json.loads((Path(model) / part / "config.json").read_text())
    return {name: stated[name] for name in inspect.signature(kind.__init__).parameters if name in stated}


def widen_matmuls() -> None:
    """Linear layers, attention and convolutions of MLX through float32, wherever they were imported to by name."""
    import mlx.core as mx
    import mlx.nn as nn

    attention, convolution = mx.fast.scaled_dot_product_attention, mx.conv2d

    def linear(self: Any, x: Any) -> Any:
        out = (x.astype(mx.float32) @ self.weight.astype(mx.float32).T).astype(x.dtype)
        return out + self.bias if "bias" in self else out

    def attend(q: Any, k: Any, v: Any, *, mask: Any = None, **rest: Any) -> Any:
        if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
            mask = mask.astype(mx.float32)
        return attention(*(a.astype(mx.float32) for a in (q, k, v)), mask=mask, **rest).astype(q.dtype)

    def convolve(x: Any, weight: Any, *rest: Any, **more: Any) -> Any:
        return convolution(x.astype(mx.float32), weight.astype(mx.float32), *rest, **more).astype(x.dtype)

    setattr(nn.Linear, "__call__", linear)  # noqa: B010
    replaced = {id(attention): attend, id(convolution): convolve}
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in replaced and getattr(module, "__name__", "") != __name__:
                setattr(module, name, replaced[id(value)])


def open_diffusers(asked: dict[str, Any], clock: Clock) -> Picture:
    """diffusers' pipeline; what its calls of the three parts take."""
    torch = importlib.import_module("torch")
    kind = importlib.import_module("diffusers.pipelines.flux2.pipeline_flux2_klein").Flux2KleinPipeline
    pipe = kind.from_pretrained(asked["model"], dtype=getattr(torch, asked["dtype"]))
    pipe.set_progress_bar_config(disable=True)
    pipe.encode_prompt = clock.timed("encode", pipe.encode_prompt)
    pipe.transformer.forward = clock.timed("steps", pipe.transformer.forward)
    pipe.vae.decode = clock.timed("decode", pipe.vae.decode)

    def picture(line: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(line.pop("seed"))
        pipe(num_inference_steps=line.pop("steps"), guidance_scale=1.0, generator=generator, **line)

    return picture


PROGRAMS = {"klein_mlx": open_klein_mlx, "mflux": open_mflux, "diffusers": open_diffusers}


def serve(asked: dict[str, Any]) -> None:
    """A JSON line of CPU seconds by phase for each JSON line (prompt, seed, width, height, steps) that comes."""
    answers = os.fdopen(os.dup(1), "w")  # what the program prints goes to stderr
    os.dup2(2, 1)
    clock = Clock()
    picture = PROGRAMS[asked["program"]](asked, clock)
    version = importlib.import_module("importlib.metadata").version(asked["program"].replace("_", "-"))
    print(json.dumps({"version": version}), file=answers, flush=True)
    for line in sys.stdin:
        clock.seconds.clear()
        picture(json.loads(line))
        print(json.dumps({name: clock.seconds[name] for name in PHASES}), file=answers, flush=True)


# ---- all of them, turn by turn ----


class Program:
    """A process that makes pictures with one program."""

    def __init__(self, python: str, asked: dict[str, Any]):
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.name = asked["program"]
        self._process = subprocess.Popen([python, __file__, "--serve", json.dumps(asked)], text=True, **pipes)
        self.version = self._answer()["version"]
        self.pictures: list[dict[str, float]] = []

    def picture(self, line: dict[str, Any]) -> dict[str, float]:
        """CPU seconds by phase. Raises RuntimeError where the program cannot do it."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        assert self._process.stderr
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        told = self._process.stderr.read().strip().splitlines()
        raise RuntimeError(f"{self.name} cannot run this: {told[-1][:300] if told else 'it ended without a word'}")

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def compare(programs: list[Program], line: dict[str, Any], pictures: int) -> dict[str, Any]:
    """Each program's spread of every phase and of the sum, and ours over theirs at the fastest."""
    for number in range(pictures + 1):
        for program in programs:
            seconds = program.picture({**line, "seed": number, "prompt": f"{PROMPT} {number}"})
            if number:
                program.pictures.append({**seconds, "all": sum(seconds.values())})
    found: dict[str, Any] = {}
    for program in programs:
        columns = {name: [one[name] for one in program.pictures] for name in (*PHASES, "all")}
        found[program.name] = {
            name: {"min": min(values), "median": statistics.median(values), "max": max(values)}
            for name, values in columns.items()
        } | {"version": program.version}
    ours = found[programs[0].name]
    for program in programs[1:]:
        theirs = found[program.name]
        theirs["ratio"] = {name: ours[name]["min"] / theirs[name]["min"] for name in (*PHASES, "all")}
    return found


def table(found: dict[str, Any]) -> str:
    """For a person."""
    lines = [f"{'CPU seconds':<12}{'phase':<9}{'min':>9}{'median':>9}{'max':>9}{'klein_mlx / it':>16}"]
    for name, own in found.items():
        for phase in (*PHASES, "all"):
            times = "".join(f"{own[phase][kind]:>9.2f}" for kind in ("min", "median", "max"))
            ratio = f"{own['ratio'][phase]:>16.2f}" if "ratio" in own else ""
            lines.append(f"{name:<12}{phase:<9}{times}{ratio}")
    return "\n".join(lines)


def make_model(folder: Path) -> None:
    """A quarter of a billion parameters: an encoder of 36 layers and the VAE's own channels, as mflux has them."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    models = importlib.import_module("random_models")
    models.make(folder, models.Size(8, 128, 2, 4, 256, 768, 36, 8, 128, (128, 256, 512, 512), 2, 32, 32))


def main() -> None:
    parser = argparse.ArgumentParser(description="klein_mlx, mflux and diffusers, turn by turn")
    add = parser.add_argument
    add("model", nargs="?")
    add("--make", type=Path, metavar="FOLDER")
    add("--mflux", metavar="PYTHON", help="a Python that has mflux")
    add("--diffusers", metavar="PYTHON", nargs="?", const=sys.executable, help="a Python that has diffusers")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--size", type=int, default=256)
    add("--steps", type=int, default=4)
    add("--pictures", type=int, default=5)
    add("--json", action="store_true")
    add("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(json.loads(args.serve))
    elif args.make:
        make_model(args.make)
    else:
        pythons = {"klein_mlx": sys.executable, "mflux": args.mflux, "diffusers": args.diffusers}
        asked = {"model": args.model, "dtype": args.dtype}
        programs = [Program(python, {**asked, "program": name}) for name, python in pythons.items() if python]
        line = {"width": args.size, "height": args.size, "steps": args.steps}
        found = compare(programs, line, args.pictures)
        for program in programs:
            program.close()
        print(json.dumps(found) if args.json else table(found))


if __name__ == "__main__":
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).parent]
    main()
