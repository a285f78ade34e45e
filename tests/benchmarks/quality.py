"""What each way of quantising costs: size, velocity, pictures, adherence, colours. Prints a table; not a test.

    python tests/benchmarks/quality.py                      # the embedded checkpoint with its real weights: everything
    python tests/benchmarks/quality.py --model FOLDER       # another model: sizes and velocity only

The velocity error is |v - v_whole| / |v_whole| over held-out prompts and all steps, at the latents that the
unquantised model passes through, with encoder and transformer both quantised. Pictures: of held-out prompts, each
with its own seed, against the unquantised model's.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import kquants
import mlx.core as mx
import numpy as np
from checker import judge_scene

from klein_convert.calibrate import calibrate, looks, predict
from klein_mlx import KleinPipeline
from klein_mlx.formats.open import open_model
from klein_mlx.runtime.encodings import encode_prompt
from klein_mlx.weights.bits import Quantize, parse, settle
from klein_mlx.weights.checkpoint import Source, load_part, read_tokenizer
from klein_mlx.weights.quantize import quantize_weights
from klein_mlx.weights.safetensors import Weight, load_now

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "tiny"))
import world  # noqa: E402
from captions import caption, judged_captions  # noqa: E402

# As mflux does it: every linear layer and embedding of both models, by the ends of each group.
EVERYTHING = ("mod_*", "final_*", "txt_in", "img_in", "time_in.*", "embed_tokens")
PLAIN_4 = {"transformer": 4, "text_encoder": 4, **dict.fromkeys(EVERYTHING, 4)}
UNSEEN = (
    "macro photo of a dew drop on a leaf",
    "a robot reading a newspaper in a cafe, cinematic",
    "two dogs playing on the beach",
    "black and white photo of a train station",
)


@dataclass(frozen=True)
class KQuants:
    """A Source whose matrices went through Q4_K_M, as llama.cpp writes it for image models and Qwen3."""

    original: Source

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def weights(self, part: str) -> dict[str, Weight]:
        found = dict(self.original.weights(part))
        return {name: decoded(part, name, load_now(w))[0] for name, w in found.items()}

    def bytes(self, part: str) -> int:
        return sum(decoded(part, n, load_now(w))[1] for n, w in self.original.weights(part).items())


def decoded(part: str, name: str, weight: mx.array) -> tuple[mx.array, int]:
    """A weight as Q4_K_M gives it back, in bfloat16, and its bytes."""
    import gguf

    kind = kquant_of(part, name) if weight.ndim == 2 and part != "vae" else None
    if kind is None:
        return weight, weight.nbytes
    if weight.shape[1] % kquants.QK:
        kind = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}[kind]  # llama.cpp's own fallback
    values = np.array(weight.astype(mx.float32))
    number = gguf.GGMLQuantizationType[kind]
    data = kquants.encode(values, kind) if kind in kquants.SIZES else gguf.quants.quantize(values, number)
    return mx.array(gguf.quants.dequantize(data, number)).astype(mx.bfloat16), data.nbytes


def kquant_of(part: str, name: str, layers: int = 0) -> str | None:
    """The type that Q4_K_M gives a matrix; None: it is kept.

    Source: llama.cpp, llama_tensor_get_type; for image models as in ComfyUI-GGUF's patch of it: embedders, the time
    embedding and the final layer are kept, the double blocks' fused q, k, v get Q5_K.
    """
    path = name.removesuffix(".weight")
    if part == "transformer":
        if path.startswith(("img_in", "txt_in", "time_in", "final_")):
            return None
        return "Q5_K" if path.rpartition(".")[2] in ("to_q", "to_k", "to_v") else "Q4_K"
    if path == "embed_tokens":
        return "Q6_K"  # tied to the output
    index, count = int(path.split(".")[1]), layers or 36
    more = index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2
    return "Q6_K" if more and path.endswith(("v_proj", "down_proj")) else "Q4_K"


class Reference:
    """The unquantised model on held-out prompts."""

    def __init__(self, source: Source, prompts: Sequence[str], seed: int):
        self.source = source
        tokenizer = read_tokenizer(source.tokenizer_file, source.config.text_encoder.vocab_size)
        self.tokens = [tokenizer([prompt], source.config.max_sequence_length) for prompt in prompts]
        encoder: Any = load_part("text_encoder", source, mx.float32)
        self.embeds = [encode_prompt(encoder, tokens, 0) for tokens in self.tokens]
        transformer: Any = load_part("transformer", source, mx.float32)
        self.looks = looks(source.config, transformer, self.embeds, 4, seed)
        self.velocities = [
            [predict(transformer, e, look)(look.latents, look.sigma) for look in run]
            for e, run in zip(self.embeds, self.looks, strict=True)
        ]
        mx.eval(self.velocities)

    def errors(self, source: Source, quantize: Quantize) -> dict[str, float]:
        """Relative errors: of the velocity, and of the latents at the end of a whole run."""
        settled = settle(parse(quantize), source)
        encoder: Any = load_part("text_encoder", source, mx.float32, settled.get("text_encoder"))
        transformer: Any = load_part("transformer", source, mx.float32, settled.get("transformer"))
        off = size = end_off = end_size = 0.0
        for tokens, run, right in zip(self.tokens, self.looks, self.velocities, strict=True):
            velocity = predict(transformer, encode_prompt(encoder, tokens, 0), run[0])
            sigmas = [look.sigma for look in run] + [0.0]
            latents = end = run[0].latents
            for index, (look, wanted) in enumerate(zip(run, right, strict=True)):
                step = sigmas[index + 1] - sigmas[index]
                off += ((velocity(look.latents, look.sigma) - wanted) ** 2).sum().item()
                size += (wanted**2).sum().item()
                latents = latents + step * velocity(latents, look.sigma)
                end = look.latents + step * wanted
            end_off, end_size = end_off + ((latents - end) ** 2).sum().item(), end_size + (end**2).sum().item()
        return {"velocity": math.sqrt(off / size), "latents": math.sqrt(end_off / end_size)}


def stored_bytes(source: Source, quantize: Quantize) -> int:
    """Of the transformer and the text encoder, as a checkpoint holds them."""
    settled = settle(parse(quantize), source)
    total = 0
    for part in ("transformer", "text_encoder"):
        weights = source.weights(part)
        total += sum(
            w.nbytes for w in (quantize_weights(part, weights, settled[part]) if part in settled else weights).values()
        )
    return total


@dataclass(frozen=True)
class Drawn:
    """The pictures of one way of quantising."""

    pictures: list[np.ndarray]
    scenes: list[np.ndarray]  # plain backgrounds, one for each colour


def draw(source: Source, quantize: Quantize, prompts: Sequence[str]) -> Drawn:
    pipe = KleinPipeline(source, quantize=quantize, dtype="float32", keep="all")
    pictures = [np.asarray(pipe(words, seed=number).images[0]) for number, words in enumerate(prompts)]
    plain = [np.asarray(pipe(_on(colour), seed=7).images[0]) for colour in world.COLOURS]
    return Drawn(pictures, plain)


def _on(colour: str) -> str:
    other = "white" if colour == "red" else "red"
    return f"a {other} circle on a {colour} background"


def psnr(pictures: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> tuple[float, float]:
    """Mean and least, in dB, of 8-bit pictures."""
    values = []
    for one, two in zip(pictures, right, strict=True):
        error = ((one.astype(np.float64) - two) ** 2).mean()
        values.append(10 * np.log10(255**2 / max(error, 1e-2)))
    return float(np.mean(values)), float(np.min(values))


def corner_colour(picture: np.ndarray) -> np.ndarray:
    """Mean colour of the four corners, which are background."""
    size = len(picture) // 8
    corners = [picture[y, x] for y in (slice(size), slice(-size, None)) for x in (slice(size), slice(-size, None))]
    return np.mean([corner.reshape(-1, 3).mean(0) for corner in corners], axis=0)


def ways(source: Source, calibration: Sequence[str]) -> dict[str, Callable[[], tuple[Source, Quantize]]]:
    """Each way of quantising by its name, as a source and what to ask of it."""
    return {
        "8": lambda: (source, 8),
        "plain 4": lambda: (source, PLAIN_4),
        "4": lambda: (source, 4),
        "mixed-4": lambda: (source, "mixed-4"),
        "mixed-4 --calibrate": lambda: (calibrate(source, "mixed-4", prompts=calibration), None),
        "plain 4 --calibrate": lambda: (calibrate(source, PLAIN_4, prompts=calibration), None),
        "Q4_K_M": lambda: (KQuants(source), None),  # type: ignore[return-value]
        "mxfp4": lambda: (source, "mxfp4"),
        "nvfp4": lambda: (source, "nvfp4"),
        "3": lambda: (source, 3),
        "5": lambda: (source, 5),
        "6": lambda: (source, 6),
    }


def measure(options: argparse.Namespace) -> None:
    source: Any = open_model(options.model)
    if options.side:  # of the model's own pictures, which calibration halves
        size = {"default_size": 2 * options.side, "max_sequence_length": options.text_positions}
        source = replace(source, config=replace(source.config, **size))
    tiny = options.model == "tiny"
    drawn_prompts = judged_captions(options.prompts, 3)
    unseen = [words for words, _ in judged_captions(8, 11)] if tiny else list(UNSEEN)[: options.unseen]
    calibration = captions(options.calibration) if tiny else None
    if calibration is None:
        from klein_convert.calibrate import PROMPTS

        calibration = list(PROMPTS)[: options.calibration]
    reference = Reference(source, unseen, seed=5000)
    right = draw(source, None, [words for words, _ in drawn_prompts]) if tiny else None
    if right:
        print(json.dumps({"way": "bf16", "bytes": stored_bytes(source, None), **_judged(right, right, drawn_prompts)}))
    for name, make in ways(source, calibration).items():
        if options.only and name not in options.only:
            continue
        quantised, quantize = make()
        if isinstance(quantised, KQuants):
            size = sum(quantised.bytes(part) for part in ("transformer", "text_encoder"))
        else:
            size = stored_bytes(quantised, quantize)
        row: dict[str, Any] = {"way": name, "bytes": size, **reference.errors(quantised, quantize)}
        if right:
            drawn = draw(quantised, quantize, [words for words, _ in drawn_prompts])
            row |= _judged(drawn, right, drawn_prompts)
        print(json.dumps(row), flush=True)


def _judged(drawn: Drawn, right: Drawn, prompts: Sequence[tuple[str, world.Scene]]) -> dict[str, Any]:
    mean, least = psnr(drawn.pictures, right.pictures)
    verdicts = [judge_scene(p, scene)["all"] for p, (_, scene) in zip(drawn.pictures, prompts, strict=True)]
    shifts = [
        np.abs(corner_colour(one) - corner_colour(two)).mean()
        for one, two in zip(drawn.scenes, right.scenes, strict=True)
    ]
    truth = [
        np.abs(corner_colour(picture) - np.asarray(colour)).mean()
        for picture, colour in zip(drawn.scenes, world.COLOURS.values(), strict=True)
    ]
    return {
        "psnr": round(mean, 2),
        "psnr_least": round(least, 2),
        "adherence": round(float(np.mean(verdicts)), 3),
        "colour_shift": round(float(np.mean(shifts)), 2),
        "colour_shift_most": round(float(np.max(shifts)), 2),
        "colour_error": round(float(np.mean(truth)), 2),
    }


def captions(count: int) -> list[str]:
    """Captions such as training saw, none of the held-out combinations."""
    rng = np.random.default_rng(99)
    found = []
    while len(found) < count:
        found.append(caption(world.random_scene(rng), rng).words)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", type=int, default=50, help="pictures of each way")
    parser.add_argument("--calibration", type=int, default=32, help="prompts to calibrate on")
    parser.add_argument("--unseen", type=int, default=4, help="prompts for the velocity of another model than tiny")
    parser.add_argument("--side", type=int, help="pixels; with --text-positions, makes another model's runs shorter")
    parser.add_argument("--text-positions", type=int, default=64)
    parser.add_argument("--only", action="append", help="a way to measure; repeat for more")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
