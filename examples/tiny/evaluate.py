"""Measures a trained folder on held-out prompts and edits, with the geometric checker of tests/checker.py.

    python examples/tiny/evaluate.py --folder DIR/v2 --prompts 200 --edits 50

`sample` is the same loop as diffusers' Flux2KleinPipeline (same sigmas, same positions), batched over prompts;
--pipeline runs diffusers' own pipeline on the first prompts and reports how far the two differ.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from fast import GRID, make_velocity
from pool import latent_pictures, latent_tokens
from text import LENGTH
from torch import Tensor
from train_flow import TextFeatures
from train_text_encoder import TAPS
from training import write_json
from world import (
    EDIT_KINDS,
    KINDS,
    SIZE_WORDS,
    Scene,
    apply_edit,
    caption,
    combine,
    combine_instruction,
    held_out_prompts,
    instruction,
    is_captioned,
    random_edit,
    random_scene,
    render,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "tools"))
from checker import judge_edit, judge_scene, match, read  # noqa: E402

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


def sigmas_of(steps: int) -> list[float]:
    """The noise levels of FLUX.2 for 64 tokens: linear from 1 to 1 / steps, shifted by the empirical mu, then 0."""
    shift = np.exp(compute_empirical_mu(GRID * GRID, steps))
    linear = np.linspace(1, 1 / steps, steps)
    return [*(float(shift / (shift + 1 / s - 1)) for s in linear), 0.0]


def guided(predict: Predict, tokens: Tensor, txt: Tensor, empty: Tensor, sigma: Tensor, guidance: float) -> Tensor:
    """Velocity with classifier-free guidance; one pass when guidance is 1."""
    if guidance == 1:
        return predict(tokens, txt, sigma).float()
    both = predict(tokens.repeat(2, 1, 1), torch.cat([txt, empty.expand_as(txt)]), sigma.repeat(2)).float()
    with_text, without = both.chunk(2)
    return without + guidance * (with_text - without)


@torch.no_grad()
def sample(
    predict: Predict, txt: Tensor, empty: Tensor, noise: Tensor, refs: Tensor | None, steps: int, guidance: float
) -> Tensor:
    """Euler steps from noise (B, 64, C) to latent tokens, with reference tokens (B, 64 * n, C) after the image's."""
    latents = noise.to(txt.dtype)
    sigmas = sigmas_of(steps)
    for sigma, after in pairwise(sigmas):
        tokens = latents if refs is None else torch.cat([latents, refs], dim=1)
        level = torch.full((len(latents),), sigma)
        velocity = guided(predict, tokens, txt, empty, level, guidance)
        latents = (latents.float() + (after - sigma) * velocity).to(txt.dtype)
    return latents


class Judge:
    """Everything needed to turn prompts into judged pictures: encoder, sampler, VAE."""

    def __init__(self, out: Path, predict: Predict, steps: int, guidance: float, batch: int = 50) -> None:
        self.vae = AutoencoderKLFlux2.from_pretrained(out / "vae", torch_dtype=torch.bfloat16)
        self.vae.to(memory_format=torch.channels_last)
        self.features = TextFeatures(out)
        self.predict, self.steps, self.guidance, self.batch = predict, steps, guidance, batch
        self.empty = self.features([""])

    @torch.no_grad()
    def pictures(self, words: list[str], seed: int, refs: list[np.ndarray] | None = None) -> np.ndarray:
        """Generate one picture a prompt; refs: one array (B, 128, 128, 3) per reference position."""
        noise = torch.randn(len(words), GRID * GRID, 64, generator=torch.Generator().manual_seed(seed))
        results = []
        for at in range(0, len(words), self.batch):
            part = slice(at, at + self.batch)
            tokens = None
            if refs is not None:
                tokens = torch.cat([latent_tokens(self.vae, r[part]) for r in refs], dim=1).to(torch.bfloat16)
            txt = self.features(words[part])
            latents = sample(self.predict, txt, self.empty, noise[part], tokens, self.steps, self.guidance)
            results.append(latent_pictures(self.vae, latents))
        return np.concatenate(results)

    def prompts(self, cases: list[tuple[str, Scene]], seed: int) -> dict:
        """Accuracies over (prompt, scene) pairs."""
        pictures = self.pictures([words for words, _ in cases], seed)
        tally: dict[str, list[bool]] = defaultdict(list)
        for (words, scene), picture in zip(cases, pictures, strict=True):
            verdict = judge_scene(picture, scene)
            arity = "single" if len(scene.shapes) == 1 else "pair"
            tally["background"].append(verdict["background"])
            tally[f"{arity}_colour"] += verdict["colours"]
            tally[f"{arity}_shape"] += verdict["kinds"]
            tally[f"{arity}_all"].append(verdict["all"])
            if arity == "pair":
                tally["relation"].append(verdict["relation"])
            for shape, right in zip(scene.shapes, verdict["kinds"], strict=True):
                tally[f"shape_{shape.kind}"].append(right)
            tally["size_when_said"] += sizes_right(words, scene, picture)
        return summary(tally)

    def edits(self, count: int, seed: int) -> dict:
        """Accuracies of `count` edits of every kind, towards held-out results, and of `count` combinations."""
        result = {}
        for kind in (*EDIT_KINDS, "combine"):
            rng = np.random.default_rng((seed, (*EDIT_KINDS, "combine").index(kind)))
            cases = [edit_case(kind, i, rng) for i in range(count)]
            befores = [np.stack([render(c[1][k]) for c in cases]) for k in range(len(cases[0][1]))]
            pictures = self.pictures([words for words, _, _ in cases], seed, befores)
            tally: dict[str, list[bool]] = defaultdict(list)
            for i, ((_, _, after), picture) in enumerate(zip(cases, pictures, strict=True)):
                for name, right in judge_edit(picture, befores[0][i], render(after), after).items():
                    tally[name].append(right)
            result[kind] = summary(tally)
        return result


def sizes_right(words: str, scene: Scene, picture: np.ndarray) -> list[bool]:
    """For a single shape whose size the prompt names: whether its box is nearer to that size than to the other."""
    shape = scene.shapes[0]
    if len(scene.shapes) != 1 or not any(word in words.split() for word in SIZE_WORDS[shape.size]):
        return []
    region = match(read(picture).regions, scene.shapes)[0]
    return [region is not None and (region.width + region.height > 84) == (shape.size == "large")]


def edit_case(kind: str, index: int, rng: np.random.Generator) -> tuple[str, tuple[Scene, ...], Scene]:
    """Instruction, reference scenes and the wanted scene; scenes of one and two shapes take turns."""
    if kind == "combine":
        while True:
            first, second = random_scene(rng, 1), random_scene(rng)
            if second.background not in (first.background, first.shapes[0].colour):
                return combine_instruction(first, rng), (first, second), combine(first, second)
    scene = random_scene(rng, 2 if kind == "remove" else 1 + index % 2)
    edit = random_edit(scene, kind, rng, held=True)
    return instruction(scene, edit, rng), (scene,), apply_edit(scene, edit)


def summary(tally: dict[str, list[bool]]) -> dict:
    """Share and number of every tally."""
    return {name: {"share": round(float(np.mean(v)), 4), "n": len(v)} for name, v in tally.items() if v}


def load_predict(folder: Path, compiled: bool = False) -> Predict:
    """The velocity function of a saved transformer, in bfloat16."""
    model = Flux2Transformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    return make_velocity(model, LENGTH, compiled)


def seen_prompts(count: int, seed: int) -> list[tuple[str, Scene]]:
    """As held_out_prompts, but of combinations that occur in training."""
    rng = np.random.default_rng((seed, 1))
    cases: list[tuple[str, Scene]] = []
    while len(cases) < count:
        scene = random_scene(rng, 1 + len(cases) % 2)
        if is_captioned(scene):
            cases.append((caption(scene, rng), scene))
    return cases


def against_pipeline(folder: Path, judge: Judge, count: int, seed: int) -> float:
    """Largest share of pixels (over `count` prompts) that differ by over 24 of 255 from diffusers' own pipeline."""
    pipe = Flux2KleinPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    cases = held_out_prompts(count, seed)
    ours = judge.pictures([words for words, _ in cases], seed)
    noise = torch.randn(count, GRID * GRID, 64, generator=torch.Generator().manual_seed(seed))
    worst = 0.0
    for i, (words, _) in enumerate(cases):
        latents = noise[i].T.reshape(1, 64, GRID, GRID).to(torch.bfloat16)
        theirs = pipe(
            prompt=words,
            height=128,
            width=128,
            num_inference_steps=judge.steps,
            guidance_scale=1.0,
            latents=latents,
            max_sequence_length=LENGTH,
            text_encoder_out_layers=TAPS,
            output_type="np",
        ).images[0]
        apart = np.abs(np.round(theirs * 255) - ours[i].astype(np.float32)).max(-1) > 24
        worst = max(worst, float(apart.mean()))
    return worst


def evaluate(judge: Judge, prompts: int, edits: int, seeds: list[int]) -> dict:
    """All figures, one entry per noise-and-prompt seed."""
    figures: dict = {"steps": judge.steps, "guidance": judge.guidance, "kinds": list(KINDS), "seeds": {}}
    for seed in seeds:
        figures["seeds"][str(seed)] = {
            "held_out_prompts": judge.prompts(held_out_prompts(prompts, seed), seed),
            "seen_prompts": judge.prompts(seen_prompts(prompts // 2, seed), seed),
            "edits": judge.edits(edits, seed),
        }
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a diffusers folder, or the training folder")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--pipeline", type=int, default=0, help="compare so many prompts with diffusers' pipeline")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    judging = Judge(chosen.folder, load_predict(chosen.folder / "transformer"), chosen.steps, chosen.guidance)
    results = evaluate(judging, chosen.prompts, chosen.edits, chosen.seeds)
    if chosen.pipeline:
        results["pixels_apart_from_diffusers"] = against_pipeline(chosen.folder, judging, chosen.pipeline, 0)
    write_json(chosen.folder / "evaluation.json", results)
    print((chosen.folder / "evaluation.json").read_text())
