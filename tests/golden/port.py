"""The port's side of the comparisons: the same tensors as `parity_reference`, by the same names, from klein_mlx.

Stages get the reference's inputs, so that an error shows where it is made. Only `run` goes from prompt to picture.
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from golden import cases
from mlx.utils import tree_flatten
from PIL import Image

from klein_mlx.formats.open import open_model
from klein_mlx.model import sampler
from klein_mlx.model import sampler as grids
from klein_mlx.model.transformer import Transformer, rope_tables
from klein_mlx.pipeline import KleinPipeline
from klein_mlx.runtime.run import Picture, Step
from klein_mlx.weights.checkpoint import load_part, read_tokenizer

Tensors = dict[str, np.ndarray]


class Port:
    """The parts of the folder in one dtype, each loaded when first asked for."""

    def __init__(self, folder: Path, dtype: mx.Dtype = mx.float32):
        self.folder, self.dtype = folder, dtype
        self.source = open_model(folder)
        self.config = self.source.config
        self._parts: dict[str, Any] = {}

    def part(self, name: str) -> Any:
        if name not in self._parts:
            self._parts[name] = load_part(name, self.source, self.dtype)
        return self._parts[name]

    @cached_property
    def pipeline(self) -> KleinPipeline:
        return KleinPipeline(self.source, dtype=self.dtype, keep="all")


def text(port: Port, prompts: tuple[str, ...], length: int) -> Tensors:
    """Token ids, mask, prompt_embeds and position ids of `prompts`, padded or cut to `length`."""
    tokens = read_tokenizer(port.source.tokenizer_file, port.source.config.text_encoder.vocab_size)(
        list(prompts), length
    )
    embeds = port.part("text_encoder")(tokens.input_ids, tokens.attention_mask)
    return {
        "input_ids": to_numpy(tokens.input_ids),
        "attention_mask": to_numpy(tokens.attention_mask).astype(np.int32),
        "prompt_embeds": to_numpy(embeds),
        "txt_ids": to_numpy(grids.text_ids(length)),
    }


def position_ids(grid: tuple[int, int], references: tuple[tuple[int, int], ...] = ()) -> mx.array:
    """The ids of a picture's tokens, then its references'."""
    ids = [grids.image_ids(*grid)] + [grids.image_ids(*g, t=10 + 10 * k) for k, g in enumerate(references)]
    return mx.concatenate(ids)


def transformer(port: Port, inputs: Tensors, num_img: int, guidance: float = 1.0) -> Tensors:
    """Every block's outputs and the velocity of the picture's tokens.

    inputs: tokens, prompt_embeds, txt_ids, img_ids, sigma, as the reference had them. guidance: where it is embedded.
    """
    model = port.part("transformer")
    tokens, embeds = (mx.array(inputs[key]).astype(port.dtype) for key in ("tokens", "prompt_embeds"))
    rope = rope_of(port, inputs["txt_ids"], inputs["img_ids"])
    mods = model.modulations(float(inputs["sigma"][0]), port.dtype, guidance)
    out: dict[str, mx.array] = {}
    txt, img = model.txt_in(embeds), model.img_in(tokens)
    for i, block in enumerate(model.double_blocks):
        (txt, img), _ = block(txt, img, mods.txt, mods.img, rope)
        out[f"double.{i}.txt"], out[f"double.{i}.img"] = txt, img
    x = mx.concatenate([txt, img], axis=1)
    for i, block in enumerate(model.single_blocks):
        x, _ = block(x, mods.single, rope)
        out[f"single.{i}"] = x
    out["velocity"] = model(tokens, model.embed_text(embeds), mods, rope, num_img)
    return {key: to_numpy(value) for key, value in out.items()}


def small_inputs(port: Port, inputs: Tensors) -> Tensors:
    """The first block of each kind, and the last layer alone, as the reference had them."""
    model = port.part("transformer")
    rope = rope_of(port, inputs["txt_ids"], inputs["img_ids"])
    mods = model.modulations(float(inputs["sigma"][0]), port.dtype)
    txt, img = mx.array(inputs["txt"]), mx.array(inputs["img"])
    out = dict(
        zip(("double.txt", "double.img"), model.double_blocks[0](txt, img, mods.txt, mods.img, rope)[0], strict=True)
    )
    out["single"] = model.single_blocks[0](mx.concatenate([txt, img], axis=1), mods.single, rope)[0]
    bare = Transformer(replace(port.config.transformer, num_layers=0, num_single_layers=0))
    names = {name for name, _ in tree_flatten(bare.parameters())}
    bare.load_weights([(name, value) for name, value in tree_flatten(model.parameters()) if name in names])
    tokens = mx.array(inputs["tokens"])
    embeds = mx.zeros((1, 5, port.config.transformer.joint_attention_dim))
    out["final"] = bare(tokens, bare.embed_text(embeds), mods, rope, tokens.shape[1])
    return {key: to_numpy(value) for key, value in out.items()}


def rope_of(port: Port, txt_ids: np.ndarray, img_ids: np.ndarray):
    """The rotary tables over [text, image, references]."""
    config = port.config.transformer
    ids = mx.array(np.concatenate([txt_ids, img_ids]))
    return rope_tables(ids, config.axes_dims_rope, config.rope_theta, len(txt_ids))


def vae(port: Port, pixels: np.ndarray, latents: np.ndarray) -> Tensors:
    """`pixels` (B, H, W, 3) uint8 encoded and normalised; `latents` (B, 4C, h, w) denormalised and decoded."""
    model = port.part("vae")
    z = model.encode(mx.array(pixels).astype(port.dtype) / 127.5 - 1)
    normal = model.normalize(grids.patchify(z))
    denormal = grids.unpatchify(model.denormalize(mx.array(latents).astype(port.dtype).transpose(0, 2, 3, 1)))
    decoded = to_numpy(model.decode(denormal))
    tensors = {"z": to_numpy(z), "normalised": to_numpy(normal), "denormalised": to_numpy(denormal)}
    tensors["decoded"] = decoded
    out = {key: value.transpose(0, 3, 1, 2) for key, value in tensors.items()}
    return out | {"decoded_8bit": np.round(np.clip(decoded * 0.5 + 0.5, 0, 1) * 255).astype(np.uint8)}


def run(port: Port, name: str, noise: np.ndarray) -> Tensors:
    """One of `cases.RUNS` through KleinPipeline: the latents after every step and the pictures in 8 bits."""
    case = cases.RUNS[name]
    pipe = port.pipeline
    pipe.config = replace(port.config, is_distilled=case.guidance == 1.0)
    events = pipe.stream(
        [cases.PROMPTS[i] for i in case.prompts],
        image=[Image.fromarray(picture) for picture in cases.references(name)] or None,
        height=case.height,
        width=case.width,
        num_inference_steps=case.steps,
        guidance_scale=case.guidance,
        latents=noise,
        max_sequence_length=case.length,
    )
    steps: list[list[mx.array]] = [[] for _ in range(case.steps)]
    images = []
    for event in events:
        if isinstance(event, Step):
            assert event.latents.dtype == port.dtype
            steps[event.index - 1].append(grids.latents_to_tokens(event.latents))
        elif isinstance(event, Picture):
            images.append(np.asarray(event.image))
    latents = mx.stack([mx.concatenate(step) for step in steps])
    return {"latents": to_numpy(latents), "images": np.stack(images)}


def schedule() -> Tensors:
    """mu and sigmas over the reference's table."""
    out = {"mu": np.array([[sampler.empirical_mu(t, n) for n in cases.MU_STEPS] for t in cases.MU_TOKENS])}
    for tokens, steps in cases.SCHEDULES:
        out[f"sigmas.{tokens}.{steps}"] = np.array(sampler.make_sigmas(tokens, steps))
    return out


def modulations(port: Port, sigma: float) -> Tensors:
    """The three modulation vectors as the reference lays them out (shift, scale, gate; scale without its 1)."""
    mods = port.part("transformer").modulations(sigma, port.dtype)
    flat = {"img": mods.img, "txt": mods.txt, "single": (mods.single,)}
    out = {}
    for key, sets in flat.items():
        parts = [to_numpy(v) for m in sets for v in (m.shift, m.scale - 1, m.gate)]
        out[key] = np.concatenate(parts, axis=-1).reshape(-1)
    return out


def to_numpy(x: mx.array) -> np.ndarray:
    """Any dtype of MLX; bfloat16 as float32."""
    return np.array(x.astype(mx.float32)) if x.dtype == mx.bfloat16 else np.array(x)


def error(ours: np.ndarray, reference: np.ndarray) -> float:
    """The largest difference over the largest absolute reference value."""
    assert ours.shape == reference.shape, f"{ours.shape} instead of {reference.shape}"
    return float(np.abs(ours.astype(np.float64) - reference).max() / np.abs(reference).max())
