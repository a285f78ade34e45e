"""Runs mflux for `klein-mlx bench --compare mflux`: a program of its own, in any Python that has mflux.

It imports nothing of klein_mlx. The only argument is a JSON object: model, variant, quantize, one_picture, float32. It
writes a JSON line when the model is loaded, then one for each JSON line (prompt, seed, width, height, steps) that it
reads: seconds per phase and the peaks of memory.
"""

import importlib
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

KLEIN = "mflux.models.flux2.variants.txt2img.flux2_klein"
CONFIG = "mflux.models.common.config.model_config"
NAMES = {"4b": "flux2_klein_4b", "9b": "flux2_klein_9b", "base-4b": "flux2_klein_base_4b"}
NAMES |= {"base-9b": "flux2_klein_base_9b"}


def peak_rss() -> int:
    """Bytes, since the program began."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def widen_matmuls() -> None:
    """On a CPU, MLX multiplies bfloat16 and quantised matrices many times slower than float32 ones, and mflux always
    does: let its linear layers, attention and convolutions go through float32."""
    attention, convolution = mx.fast.scaled_dot_product_attention, mx.conv2d

    def linear(self: nn.Linear, x: mx.array) -> mx.array:
        out = (x.astype(mx.float32) @ self.weight.astype(mx.float32).T).astype(x.dtype)
        return out + self.bias if "bias" in self else out

    def quantized(self: nn.QuantizedLinear, x: mx.array) -> mx.array:
        weight = mx.dequantize(self.weight, self.scales, self.biases, self.group_size, self.bits)
        out = (x.astype(mx.float32) @ weight.astype(mx.float32).T).astype(x.dtype)
        return out + self.bias if "bias" in self else out

    def attend(q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, **rest: Any) -> mx.array:
        if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
            mask = mask.astype(mx.float32)
        wide = (a.astype(mx.float32) for a in (q, k, v))
        return attention(*wide, mask=mask, **rest).astype(q.dtype)

    def convolve(x: mx.array, weight: mx.array, *rest: Any, **more: Any) -> mx.array:
        return convolution(x.astype(mx.float32), weight.astype(mx.float32), *rest, **more).astype(x.dtype)

    setattr(nn.Linear, "__call__", linear)  # noqa: B010
    setattr(nn.QuantizedLinear, "__call__", quantized)  # noqa: B010
    replaced = {id(attention): attend, id(convolution): convolve}
    for module in list(sys.modules.values()):  # wherever they were imported to by name
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in replaced and getattr(module, "__name__", "") != __name__:
                setattr(module, name, replaced[id(value)])


class Clock:
    """mflux's callbacks: the time between them, everything evaluated."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str, *arrays: mx.array) -> None:
        mx.eval(*arrays)
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.last = now

    def call_before_loop(self, latents: mx.array, **_: Any) -> None:
        self.last = time.perf_counter()

    def call_in_loop(self, t: int, latents: mx.array, **_: Any) -> None:
        self.lap(f"step {t + 1}", latents)

    def call_after_loop(self, latents: mx.array, **_: Any) -> None:
        self.lap("rest", latents)


def _config(asked: dict[str, Any]) -> Any:
    """mflux's own config of the variant, with the depths that the model's files state."""
    classes = importlib.import_module(CONFIG)
    config = getattr(classes.ModelConfig, NAMES[asked["variant"]])()
    path = Path(asked["model"]) / "transformer" / "config.json"
    if path.is_file():
        stated = json.loads(path.read_text())
        config.transformer_overrides |= {name: stated[name] for name in ("num_layers", "num_single_layers")}
    return config


def _open(asked: dict[str, Any], clock: Clock) -> Any:
    model = importlib.import_module(KLEIN).Flux2Klein(
        model_config=_config(asked), model_path=asked["model"], quantize=asked["quantize"]
    )
    encode, saver = model._encode_prompt_pair, None
    if asked["one_picture"]:  # as its --low-ram: the encoder is freed before the steps, the transformer after them
        savers = importlib.import_module("mflux.callbacks.instances.memory_saver")
        saver = savers.MemorySaver(model, keep_transformer=False)

    def timed_encode(**arguments: Any) -> Any:
        clock.last = time.perf_counter()
        out = encode(**arguments)
        clock.lap("encode", *(a for a in out if a is not None))
        return out

    object.__setattr__(model, "_encode_prompt_pair", timed_encode)
    model.callbacks.register(clock)
    if saver is not None:
        model.callbacks.register(saver)
    return model


def _picture(model: Any, clock: Clock, line: dict[str, Any], load: float) -> dict[str, Any]:
    clock.seconds, start = {}, time.process_time()
    mx.reset_peak_memory()
    image = model.generate_image(
        seed=line["seed"],
        prompt=line["prompt"],
        num_inference_steps=line["steps"],
        height=line["height"],
        width=line["width"],
        guidance=line["guidance"],
    )
    clock.lap("decode")
    with tempfile.TemporaryDirectory() as folder:
        image.save(path=str(Path(folder) / "picture.png"))
    clock.lap("save")
    clock.seconds.pop("rest", None)
    return {
        "seconds": {"load": load, **clock.seconds},
        "cpu_seconds": time.process_time() - start,
        "peak_memory": mx.get_peak_memory(),
        "peak_rss": peak_rss(),
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # what mflux prints goes to stderr
    os.dup2(2, 1)
    asked, clock = json.loads(sys.argv[1]), Clock()
    start = time.perf_counter()
    importlib.import_module(KLEIN)
    imported = time.perf_counter() - start
    if asked["float32"]:
        widen_matmuls()
    start = time.perf_counter()
    model = _open(asked, clock)
    load = time.perf_counter() - start
    version = importlib.import_module("importlib.metadata").version("mflux")
    print(json.dumps({"version": version, "import": imported}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_picture(model, clock, json.loads(line), load)), file=answers, flush=True)
        load = 0.0


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder, whose names would hide other packages'
    main()
