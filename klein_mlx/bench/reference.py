"""The embedded model `tiny` on this device against the tensors that diffusers makes of the same weights.

`reference.safetensors` holds those (written by tests/golden/make_reference.py): whole weights, and 4-bit weights that
were dequantized for diffusers. Every stage gets the reference's inputs, so that an error shows where it is made; only
the runs of several steps go from prompt to latents.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from klein_mlx.bench.checks import Row, Setting, error
from klein_mlx.model import sampler as grids
from klein_mlx.model.layers import Device, Gpu, here, place, wide
from klein_mlx.model.transformer import rope_tables
from klein_mlx.pipeline import KleinPipeline
from klein_mlx.runtime.memory import chosen_device
from klein_mlx.runtime.run import Step
from klein_mlx.weights.bits import parse, settle
from klein_mlx.weights.checkpoint import load_part

FILE = Path(__file__).with_name("reference.safetensors")
PROMPTS = ("a red circle left of a blue square", "ein grünes Dreieck, 绿色 🟩")
LENGTH, GRID, STEPS = 48, (6, 8), 4
SIGMA, GUIDANCE = 0.8125, 3.0  # a multiple of 2^-4: exact in every dtype
STAGES: tuple[str, ...] = ("ids", "embeddings", "velocity", "latents", "encoded latents", "pixels", "edit", "guidance")

# (name, dtype, bits)
KINDS = (
    ("float32", mx.float32, None),
    ("bfloat16", mx.bfloat16, None),
    ("float16", mx.float16, None),
    ("4-bit", None, 4),
)

# The largest relative error of a stage, by dtype. Three times what a CPU shows, as other devices round elsewhere and
# add up in another order; float32 more, as Metal's own exp and rsqrt are off by a few last bits. Runs of some steps,
# edits with three times the tokens, and guidance, which triples a difference, have the larger ones. Beside float16
# layers the encoder and the VAE take bfloat16, so what they make has its bounds. Float32 in TF32 (M5) keeps a factor's
# bits like float16: it gets float16's.
_FLOAT32: dict[str, float] = dict.fromkeys(STAGES, 1e-4)
_BFLOAT16: dict[str, float] = dict(zip(STAGES, (0.0, 2.5e-2, 9e-2, 6e-2, 3e-2, 6e-2, 8e-2, 1e-1), strict=True))
_FLOAT16 = _BFLOAT16 | {"velocity": 5e-3, "latents": 8e-3, "edit": 1.8e-2, "guidance": 3e-2}
BOUNDS: dict[mx.Dtype, dict[str, float]] = {mx.float32: _FLOAT32, mx.bfloat16: _BFLOAT16, mx.float16: _FLOAT16}
# A number in the middle between two 4-bit codes may get the other one elsewhere: a fifteenth of its group's range.
FLIPPED = 1e-2


def check_reference(setting: Setting) -> Iterator[Row]:
    """Every kind of weights, compiled and not; ids exactly, all else within `BOUNDS`."""
    for name, dtype, bits in KINDS:
        dtype = dtype or setting.dtype
        for when in ("always", "never"):
            label = f"{name}, {'compiled' if when == 'always' else 'not compiled'}"
            if when == "always" and not setting.gpu and (name != "float32" or not shutil.which("g++")):
                continue  # on Linux a C++ compiler does that, for many seconds
            found = stages(dtype, bits, _device(setting, when))
            yield _row(label, found, bounds(setting, dtype, bits))


def _device(setting: Setting, compiled: str) -> Device:
    own = chosen_device() if setting.gpu else here()
    if compiled == "always":
        return own if setting.gpu else Gpu()
    return replace(own, compiles=False) if setting.gpu else own


def bounds(setting: Setting, dtype: mx.Dtype, bits: int | None) -> dict[str, float]:
    """The largest error of each stage here."""
    short = dtype == mx.float32 and setting.rounding(mx.float32) > 2.0**-20
    found = BOUNDS[mx.float16 if short else dtype]
    more = FLIPPED if bits and setting.gpu else 0.0
    return {stage: 0.0 if stage == "ids" else bound + more for stage, bound in found.items()}


def _row(label: str, found: dict[str, float], bound: dict[str, float]) -> Row:
    """The stage that is nearest to its bound, or all that are beyond."""
    beyond = [stage for stage in STAGES if found[stage] > bound[stage]]
    told = beyond or [max(STAGES[1:], key=lambda stage: found[stage] / bound[stage])]
    text = ", ".join(f"{stage} {found[stage]:.1e}, at most {bound[stage]:.1e}" for stage in told)
    remedy = "upgrade mlx; try --dtype float32 or, if only the compiled rows fail, MLX_DISABLE_COMPILE=1"
    return Row("reference", f"{label}: {text}", not beyond, remedy, {"kind": label, "errors": found, "bounds": bound})


def stages(dtype: mx.Dtype, bits: int | None, device: Device = None) -> dict[str, float]:
    """The error of every stage against diffusers'. device: None: the default one."""
    tensors = _tensors()
    kind = "4-bit" if bits else "whole"
    pipe = KleinPipeline.from_pretrained("tiny", quantize=bits, dtype=dtype, keep="all")
    pipe.parts.device = device or pipe.parts.device
    ours = {name: make(pipe, tensors, kind) for name, make in _STAGES.items()}
    return {name: error(value, tensors[f"{kind}.{name}"]) for name, value in ours.items()}


def _tensors() -> dict[str, mx.array]:
    found = mx.load(str(FILE))
    assert isinstance(found, dict)
    return found


Tensors = dict[str, mx.array]


def _part(pipe: KleinPipeline, name: str) -> tuple[Any, mx.Dtype]:
    """A part as the pipeline would load it, and its dtype."""
    dtype = mx.bfloat16 if pipe.dtype == mx.float16 and name != "transformer" else pipe.dtype
    bits = 4 if pipe.parts.quantization else None
    module: Any = load_part(name, pipe.source, dtype, settle(parse(bits), pipe.source).get(name))
    place(module, pipe.parts.device)
    module.arrange()
    return module, dtype


def _ids(pipe: KleinPipeline, tensors: Tensors, kind: str) -> mx.array:
    return pipe.tokenizer(list(PROMPTS), LENGTH).input_ids


def _embeddings(pipe: KleinPipeline, tensors: Tensors, kind: str) -> mx.array:
    tokens = pipe.tokenizer(list(PROMPTS), LENGTH)
    return _part(pipe, "text_encoder")[0](tokens.input_ids, tokens.attention_mask)


def _velocity(pipe: KleinPipeline, tensors: Tensors, kind: str) -> mx.array:
    model, dtype = _part(pipe, "transformer")
    config, (h, w) = pipe.config.transformer, GRID
    tokens = grids.latents_to_tokens(grids.from_channels_first(tensors["noise"])).astype(dtype)
    embeds = tensors[f"{kind}.embeddings"][:1].astype(wide(dtype))
    ids = grids.all_ids(LENGTH, h, w, None)
    rope = rope_tables(ids, config.axes_dims_rope, config.rope_theta, LENGTH)
    return model(tokens, model.embed_text(embeds), model.modulations(SIGMA, dtype), rope, h * w)


def _run(pipe: KleinPipeline, tensors: Tensors, **options: Any) -> mx.array:
    """The latents after the steps, (1, tokens, channels)."""
    from numpy import array

    h, w = GRID
    latents = mx.array(0.0)
    for event in pipe.stream(
        PROMPTS[0],
        height=16 * h,
        width=16 * w,
        num_inference_steps=STEPS,
        latents=array(tensors["noise"]),
        max_sequence_length=LENGTH,
        output_type="latent",
        **options,
    ):
        latents = event.latents if isinstance(event, Step) else latents
    return grids.latents_to_tokens(latents)


def _encoded(pipe: KleinPipeline, tensors: Tensors, kind: str) -> mx.array:
    vae, dtype = _part(pipe, "vae")
    pixels = (tensors["picture.0"][None].astype(mx.float32) / 127.5 - 1).astype(dtype)
    return vae.normalize(grids.patchify(vae.encode(pixels)))


def _pixels(pipe: KleinPipeline, tensors: Tensors, kind: str) -> mx.array:
    vae, dtype = _part(pipe, "vae")
    latents = grids.tokens_to_latents(tensors[f"{kind}.latents"], *GRID).astype(dtype)
    return vae.decode(grids.unpatchify(vae.denormalize(latents)))


def _edit(pipe: KleinPipeline, tensors: Tensors, kind: str) -> mx.array:
    from numpy import array
    from PIL import Image

    return _run(pipe, tensors, image=[Image.fromarray(array(tensors[f"picture.{i}"])) for i in range(2)])


def _guidance(pipe: KleinPipeline, tensors: Tensors, kind: str) -> mx.array:
    other = KleinPipeline(pipe.source, quantize=4 if kind == "4-bit" else None, dtype=pipe.dtype, keep="all")
    other.config = replace(other.config, is_distilled=False, variant_name=None)
    other.parts.device = pipe.parts.device
    return _run(other, tensors, guidance_scale=GUIDANCE)


_STAGES: dict[str, Callable[[KleinPipeline, Tensors, str], mx.array]] = {
    "ids": _ids,
    "embeddings": _embeddings,
    "velocity": _velocity,
    "latents": lambda pipe, tensors, kind: _run(pipe, tensors),
    "encoded latents": _encoded,
    "pixels": _pixels,
    "edit": _edit,
    "guidance": _guidance,
}
