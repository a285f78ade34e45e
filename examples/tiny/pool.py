"""Latents of scenes, encoded once, from which every training batch is drawn.

All single shapes (of combinations that training may show) at all places and sizes, pairs with all their variants
(sizes, lanes, across or down), and families: a pair and the pairs one edit away from it. Every picture is a target for
text-to-image; a single shape's edit, and the answer to a two-reference task, is another single shape.
"""

from __future__ import annotations

import argparse
import pickle
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from captions import caption, combine_instruction, instruction
from diffusers import AutoencoderKLFlux2
from text import Prompts
from torch import Tensor
from training import Log
from unsaid import TOKENS, impose, meant
from world import (
    COLOURS,
    EDIT_KINDS,
    GRID,
    KINDS,
    RADIUS,
    SIDE,
    Edit,
    Scene,
    Shape,
    apply_edit,
    combine,
    inverse_edit,
    is_held_out,
    is_valid,
    random_edit,
    random_scene,
    render,
    shape_mask,
)

TOKEN = 16  # pixels a side
SHAPE_WEIGHT = 4.0  # loss weight of tokens that a shape touches; 1 elsewhere
CANDIDATES = 10  # scenes at most that one piece of noise may mean


@dataclass(frozen=True)
class Family:
    """A pair and edits of it: a new background, a recolouring, a replacement and a removal of each shape."""

    scene: Scene
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class Batch:
    """What one training step needs.

    words: (B) prompts; noise: (B, 64, C); targets: (B, CANDIDATES, 64, C), any of which is right (the first is what the
    noise means); references: one (B, 64, C) for each; weights: (B, 64) of the loss.
    """

    words: list[str]
    noise: Tensor
    targets: Tensor
    references: list[Tensor]
    weights: Tensor


def singles() -> list[Scene]:
    """Every scene of one shape that training may show, and the empty backgrounds."""
    scenes = [Scene(background) for background in COLOURS]
    for kind, colour, background, size, x, y in product(KINDS, COLOURS, COLOURS, RADIUS, GRID, GRID):
        scene = Scene(background, (Shape(kind, colour, size, x, y),))
        if is_valid(scene) and not is_held_out(scene):
            scenes.append(scene)
    return scenes


def variants(scene: Scene) -> list[Scene]:
    """A pair in all sizes and lanes, across and down."""
    first, second = scene.shapes
    found = []
    for size0, size1, lane, across in product(RADIUS, RADIUS, (32, 64, 96), (True, False)):
        ends = [(32, lane), (96, lane)] if across else [(lane, 32), (lane, 96)]
        shapes = (Shape(first.kind, first.colour, size0, *ends[0]), Shape(second.kind, second.colour, size1, *ends[1]))
        found.append(replace(scene, shapes=shapes))
    return found


def family_of(scene: Scene, rng: np.random.Generator) -> Family:
    """A background edit, and for each shape one recolouring, one replacement and its removal."""
    edits = [random_edit(scene, "background", rng)]
    for index in range(len(scene.shapes)):
        for kind in ("recolour", "replace"):
            while (edit := random_edit(scene, kind, rng)).index != index:
                pass
            edits.append(edit)
        edits.append(Edit("remove", index))
    return Family(scene, tuple(edits))


def latent_tokens(vae: AutoencoderKLFlux2, pixels: np.ndarray) -> Tensor:
    """Normalised latent tokens (B, 64, channels) float32 of pictures (B, 128, 128, 3) uint8.

    The posterior's mean, patchified (channel c * 4 + dy * 2 + dx), normalised by the BatchNorm statistics, row by row.
    """
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1
    z = F.pixel_unshuffle(vae.encode(x).latent_dist.mode().float(), 2)
    spread = (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt()
    z = (z - vae.bn.running_mean.float()[:, None, None]) / spread[:, None, None]
    return z.flatten(2).transpose(1, 2)


def latent_pictures(vae: AutoencoderKLFlux2, tokens: Tensor) -> np.ndarray:
    """The inverse of `latent_tokens`: pictures (B, 128, 128, 3) uint8."""
    side = SIDE // TOKEN
    z = tokens.float().transpose(1, 2).unflatten(2, (side, side))
    spread = (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt()
    z = z * spread[:, None, None] + vae.bn.running_mean.float()[:, None, None]
    x = vae.decode(F.pixel_shuffle(z, 2).to(vae.dtype), return_dict=False)[0].float()
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def token_weights(scenes: list[Scene]) -> Tensor:
    """Loss weights (64,) of the tokens: SHAPE_WEIGHT where any of the scenes has a shape."""
    touched = np.zeros((SIDE // TOKEN, SIDE // TOKEN), bool)
    for scene in scenes:
        for shape in scene.shapes:
            touched |= shape_mask(shape).reshape(8, TOKEN, 8, TOKEN).max(axis=(1, 3)) > 0
    return torch.from_numpy(1 + (SHAPE_WEIGHT - 1) * touched.astype(np.float32)).flatten()


@torch.no_grad()
def build_pool(out: Path, groups: int, families: int, seed: int) -> None:
    """Write out/pool.pkl (scenes and families) and out/pool.pt (their latents, bfloat16)."""
    log, rng = Log(out, "pool"), np.random.default_rng((seed, 3))
    vae = AutoencoderKLFlux2.from_pretrained(out / "vae", torch_dtype=torch.bfloat16)
    vae.to(memory_format=torch.channels_last)
    scenes = dict.fromkeys(singles())
    for _ in range(groups):
        scenes |= dict.fromkeys(variants(random_scene(rng, 2)))
    members = [family_of(random_scene(rng, 2), rng) for _ in range(families)]
    for family in members:
        scenes |= dict.fromkeys([family.scene, *(apply_edit(family.scene, edit) for edit in family.edits)])
    ordered = list(scenes)
    latents = torch.empty(len(ordered), TOKENS, 64, dtype=torch.bfloat16)
    for start in range(0, len(ordered), 64):
        part = slice(start, start + 64)
        latents[part] = latent_tokens(vae, np.stack([render(s) for s in ordered[part]])).to(torch.bfloat16)
        if start % 6400 == 0:
            log(pictures=start, of=len(ordered))
    torch.save(latents, out / "pool.part")
    (out / "pool.pkl").write_bytes(pickle.dumps((ordered, members)))
    (out / "pool.part").rename(out / "pool.pt")


class Pool:
    """All pictures in memory, and batches of the three tasks drawn from them."""

    def __init__(self, out: Path) -> None:
        self.scenes, self.families = pickle.loads((out / "pool.pkl").read_bytes())
        self.latents = torch.load(out / "pool.pt", mmap=True)
        self.prompts = Prompts(out / "tokenizer")
        self.rows: dict[Scene, int] = {scene: row for row, scene in enumerate(self.scenes)}
        self.singles = [scene for scene in self.scenes if len(scene.shapes) == 1]
        self.pairs = [scene for scene in self.scenes if len(scene.shapes) == 2]
        self.by_background: dict[str, list[Scene]] = {name: [] for name in COLOURS}
        for scene in self.scenes:
            self.by_background[scene.background].append(scene)

    @staticmethod
    def _one(rng: np.random.Generator, options: list) -> Any:
        return options[int(rng.integers(len(options)))]

    def _picture(self, rng: np.random.Generator, noise: np.ndarray) -> tuple[str, tuple[Scene, ...], tuple[Scene, ...]]:
        chance = rng.random()
        if chance < 0.02:
            scene = Scene(tuple(COLOURS)[int(rng.integers(len(COLOURS)))])
        else:
            scene = self._one(rng, self.singles if chance < 0.52 else self.pairs)
        while True:
            wording = caption(scene, rng)
            impose(scene, wording.free, noise, rng)
            right = meant(scene, wording.free, noise)
            there = [s for s in right if s in self.rows]
            # Held-out scenes are never there; other gaps are avoided, by noise that lies further from the border.
            if all(s in self.rows or is_held_out(s) for s in right) or rng.random() < 0.05:
                return wording.words, tuple(there[:CANDIDATES]), ()
            noise[:] = rng.standard_normal(noise.shape)

    def _edit(self, rng: np.random.Generator, noise: np.ndarray) -> tuple[str, tuple[Scene, ...], tuple[Scene, ...]]:
        while True:
            if rng.random() < 0.3:
                before = self._one(rng, self.singles)
                edit = random_edit(before, EDIT_KINDS[int(rng.integers(4))], rng)
            else:
                family = self._one(rng, self.families)
                before, edit = family.scene, self._one(rng, list(family.edits))
                if edit.kind == "background" and rng.random() < 0.3:
                    continue
            after = apply_edit(before, edit)
            if after in self.rows:
                break
        back = inverse_edit(before, edit)
        if back is not None and rng.random() < 0.5:
            before, edit, after = after, back, before
        return instruction(before, edit, rng).words, (after,), (before,)

    def _combine(self, rng: np.random.Generator, noise: np.ndarray) -> tuple[str, tuple[Scene, ...], tuple[Scene, ...]]:
        while True:
            first = self._one(rng, self.singles)
            second = self._one(rng, self.by_background[tuple(COLOURS)[int(rng.integers(len(COLOURS)))]])
            after = combine(first, second)
            if second.background != first.background and after in self.rows:
                return combine_instruction(first, rng).words, (after,), (first, second)

    def batch(self, rng: np.random.Generator, count: int, references: int) -> Batch:
        """`count` cases of one task: pictures, edits or combinations by the number of references."""
        make = (self._picture, self._edit, self._combine)[references]
        noise = rng.standard_normal((count, TOKENS, 64), np.float32)
        items = []
        while len(items) < count:
            item = make(rng, noise[len(items)])
            if self.prompts.fits(item[0]):
                items.append(item)
        targets = [[self.rows[s] for s in (*right, *(right[:1] * CANDIDATES))[:CANDIDATES]] for _, right, _ in items]
        sources = [[self.rows[s] for s in before] for _, _, before in items]
        return Batch(
            words=[words for words, _, _ in items],
            noise=torch.from_numpy(noise),
            targets=self.latents[torch.tensor(targets)],
            references=[self.latents[torch.tensor([row[i] for row in sources])] for i in range(references)],
            weights=torch.stack([token_weights([*right, *before[:1]]) for _, right, before in items]),
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Encode the pool: python examples/tiny/pool.py --out DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--groups", type=int, default=900)
    parser.add_argument("--families", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    import pool  # pickled families must name this module, which is now __main__

    pool.build_pool(chosen.out, chosen.groups, chosen.families, chosen.seed)
