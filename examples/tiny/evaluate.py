"""Measures a trained folder on held-out prompts and edits, with the geometric checker of tests/tools/checker.py.

    python examples/tiny/evaluate.py --folder DIR/tiny --prompts 200 --edits 50

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
from typing import Any

import numpy as np
import torch
from captions import combine_instruction, everyday, instruction, judged_captions
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from fast import GRID, make_velocity
from pool import latent_pictures, latent_tokens
from text import LENGTH, Prompts
from torch import Tensor
from train_text_encoder import TAPS, taps_of
from training import write_json
from transformers import Qwen3ForCausalLM
from world import (
    EDIT_KINDS,
    KINDS,
    Scene,
    apply_edit,
    combine,
    random_edit,
    random_scene,
    render,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "tools"))
from checker import clearly_different, judge_edit, judge_scene, read  # noqa: E402

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


class TextFeatures:
    """The frozen encoder: prompts to prompt_embeds (B, LENGTH, 3 * HIDDEN) bfloat16."""

    def __init__(self, out: Path) -> None:
        self.prompts = Prompts(out / "tokenizer")
        self.encoder = Qwen3ForCausalLM.from_pretrained(
            out / "text_encoder", dtype=torch.bfloat16, attn_implementation="eager"
        )

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        ids, mask = self.prompts(prompts)
        return taps_of(self.encoder, torch.from_numpy(ids), torch.from_numpy(mask))[0]


def sigmas_of(steps: int) -> list[float]:
    """The noise levels of FLUX.2 for 64 tokens: linear from 1 to 1 / steps, shifted by the empirical mu, then 0."""
    shift = np.exp(compute_empirical_mu(GRID * GRID, steps))
    linear = np.linspace(1, 1 / steps, steps)
    return [*(min(1.0, float(shift / (shift + 1 / s - 1))) for s in linear), 0.0]


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

    def prompts(self, cases: list[tuple[str, Scene]], seed: int, open_: frozenset[int] = frozenset()) -> dict:
        """Accuracies over (prompt, scene) pairs, and the prompts of which something is wrong.

        open_: cases whose background or relation is not said; "background" and "relation" leave them out.
        """
        pictures = self.pictures([words for words, _ in cases], seed)
        tally: dict[str, list[bool]] = defaultdict(list)
        wrong = []
        for i, ((words, scene), picture) in enumerate(zip(cases, pictures, strict=True)):
            verdict: dict[str, Any] = judge_scene(picture, scene)
            tally["colour"] += verdict["colours"]
            tally["shape"] += verdict["kinds"]
            right = [verdict["count"], *verdict["colours"], *verdict["kinds"]]
            if i not in open_:
                tally["background"].append(verdict["background"])
                tally["relation"] += [verdict["relation"]] if len(scene.shapes) == 2 else []
                right.append(verdict["all"])
            tally["all"].append(all(right))
            if not all(right):
                wrong.append(words)
        return {**summary(tally), "wrong": wrong[:20]}

    def variety(self, prompts: list[str], seeds: int = 16) -> dict:
        """Of `seeds` pictures of each prompt "a COLOUR KIND": how many have the colour and kind, and how many of
        them clearly differ."""
        rows = {}
        for words in prompts:
            colour, kind = words.split()[-2:]
            pictures = self.pictures([words] * seeds, 7)
            regions = [read(picture).regions for picture in pictures]
            rows[words] = {
                "colour": sum(bool(f) and f[0].colour == colour for f in regions),
                "kind": sum(bool(f) and f[0].kind == kind and len(f) == 1 for f in regions),
                "different": clearly_different([f[0] for f in regions if f]),
            }
        return rows

    def edits(self, count: int, seed: int, held: bool) -> dict:
        """Accuracies of `count` edits of every kind, towards held-out results, and of `count` combinations."""
        result = {}
        for kind in (*EDIT_KINDS, "combine"):
            rng = np.random.default_rng((seed, (*EDIT_KINDS, "combine").index(kind)))
            cases = [edit_case(kind, i, rng, held) for i in range(count)]
            befores = [np.stack([render(c[1][k]) for c in cases]) for k in range(len(cases[0][1]))]
            pictures = self.pictures([words for words, _, _ in cases], seed, befores)
            tally: dict[str, list[bool]] = defaultdict(list)
            wrong = []
            for i, ((words, _, after), picture) in enumerate(zip(cases, pictures, strict=True)):
                verdict = judge_edit(picture, befores[0][i], render(after), after)
                for name, right in verdict.items():
                    tally[name].append(right)
                wrong += [] if verdict["all"] else [words]
            result[kind] = {**summary(tally), "wrong": wrong[:6]}
        return result


def edit_case(kind: str, index: int, rng: np.random.Generator, held: bool) -> tuple[str, tuple[Scene, ...], Scene]:
    """Instruction, reference scenes and the wanted scene; scenes of one and two shapes take turns."""
    if kind == "combine":
        while True:
            first, second = random_scene(rng, 1), random_scene(rng)
            if second.background not in (first.background, first.shapes[0].colour):
                return combine_instruction(first, rng, held).words, (first, second), combine(first, second)
    scene = random_scene(rng, 2 if kind == "remove" else 1 + index % 2)
    edit = random_edit(scene, kind, rng, held=True)
    return instruction(scene, edit, rng, held).words, (scene,), apply_edit(scene, edit)


def summary(tally: dict[str, list[bool]]) -> dict:
    """Share and number of every tally."""
    return {name: {"share": round(float(np.mean(v)), 4), "n": len(v)} for name, v in tally.items() if v}


def load_predict(folder: Path, compiled: bool = False) -> Predict:
    """The velocity function of a saved transformer, in bfloat16."""
    model = Flux2Transformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    return make_velocity(model, LENGTH, compiled)


def against_pipeline(folder: Path, judge: Judge, count: int, seed: int) -> float:
    """Largest share of pixels (over `count` prompts) that differ by over 24 of 255 from diffusers' own pipeline."""
    pipe = Flux2KleinPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    cases = judged_captions(count, seed)
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
    """All figures: of combinations held out of training unless it says otherwise, one entry per seed."""
    figures: dict = {"steps": judge.steps, "guidance": judge.guidance, "kinds": list(KINDS), "seeds": {}}
    cases, open_ = everyday()
    figures["everyday"] = judge.prompts(cases, 5, open_)
    figures["variety"] = judge.variety(["a red circle", "a blue star", "a green square", "black ring"])
    for seed in seeds:
        figures["seeds"][str(seed)] = {
            "own_wordings": judge.prompts(judged_captions(prompts, seed), seed),
            "seen_combinations": judge.prompts(judged_captions(prompts // 2, seed, combinations=False), seed),
            "held_out_wordings": judge.prompts(judged_captions(prompts, seed, held=True), seed),
            "held_out_synonyms": judge.prompts(judged_captions(prompts // 2, seed, synonyms=True), seed),
            "edits": judge.edits(edits, seed, held=False),
            "edits_held_out_wordings": judge.edits(edits, seed, held=True),
        }
    return figures


def in_lines(figures: dict, indent: str = "") -> None:
    """Print shares and counts, a line each."""
    for name, value in figures.items():
        if isinstance(value, dict) and "share" in value:
            print(f"{indent}{name}: {value['share']:.3f} of {value['n']}")
        elif isinstance(value, dict):
            print(f"{indent}{name}")
            in_lines(value, indent + "  ")
        else:
            print(f"{indent}{name}: {value}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a diffusers folder, or the training folder")
    parser.add_argument("--transformer", default="transformer", help="which folder in it has the transformer")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--pipeline", type=int, default=0, help="compare so many prompts with diffusers' pipeline")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    judging = Judge(chosen.folder, load_predict(chosen.folder / chosen.transformer), chosen.steps, chosen.guidance)
    results = evaluate(judging, chosen.prompts, chosen.edits, chosen.seeds)
    if chosen.pipeline:
        results["pixels_apart_from_diffusers"] = against_pipeline(chosen.folder, judging, chosen.pipeline, 0)
    write_json(chosen.folder / "evaluation.json", results)
    in_lines(results)
