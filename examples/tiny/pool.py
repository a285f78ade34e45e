"""Families of scenes with their latents, encoded once, from which every training batch is drawn.

A family is a scene and the scenes one edit away from it: one of each edit of each shape. So every member is a picture
for text-to-image, every member next to the first is an edit and (but for removals) its inverse, and a background edit
of a single shape is also the answer to a two-reference task.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2
from torch import Tensor
from training import Log
from world import (
    COLOURS,
    SIDE,
    Edit,
    Scene,
    apply_edit,
    caption,
    combine_instruction,
    instruction,
    inverse_edit,
    is_captioned,
    random_edit,
    random_scene,
    render,
    shape_mask,
)

TOKEN = 16  # pixels a side
SHAPE_WEIGHT = 4.0  # loss weight of tokens that a shape touches; 1 elsewhere


@dataclass(frozen=True)
class Family:
    """A scene, edits of it, and where the latents of scene and results stand in the pool."""

    scene: Scene
    edits: tuple[Edit, ...]
    rows: tuple[int, ...]


def family_edits(scene: Scene, rng: np.random.Generator) -> tuple[Edit, ...]:
    """A background edit, and for each shape one recolouring, one replacement and its removal."""
    edits = [random_edit(scene, "background", rng)]
    for index in range(len(scene.shapes)):
        for kind in ("recolour", "replace"):
            while (edit := random_edit(scene, kind, rng)).index != index:
                pass
            edits.append(edit)
        edits.append(Edit("remove", index))
    return tuple(edits)


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
def build_chunk(vae: AutoencoderKLFlux2, seed: int, families: int) -> dict:
    """`families` new families (half of them of one shape) and their latents (rows, 64, channels) bfloat16."""
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    members: list[Family] = []
    for i in range(families):
        scene = random_scene(rng, 1 + i % 2)
        edits = family_edits(scene, rng)
        start = len(scenes)
        scenes += [scene, *(apply_edit(scene, edit) for edit in edits)]
        members.append(Family(scene, edits, tuple(range(start, len(scenes)))))
    latents = []
    for start in range(0, len(scenes), 64):
        latents.append(latent_tokens(vae, np.stack([render(s) for s in scenes[start : start + 64]])))
    return {"families": members, "latents": torch.cat(latents).to(torch.bfloat16)}


def build_pool(out: Path, chunks: int, families: int, seed: int) -> None:
    """Write out/pool/<i>.pt, skipping the chunks that are there."""
    log = Log(out, "pool")
    vae = AutoencoderKLFlux2.from_pretrained(out / "vae", torch_dtype=torch.bfloat16)
    vae.to(memory_format=torch.channels_last)
    (out / "pool").mkdir(exist_ok=True)
    for i in range(chunks):
        path = out / "pool" / f"{i}.pt"
        if path.exists():
            continue
        chunk = build_chunk(vae, 1000 + 100 * seed + i, families)
        torch.save(chunk, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        log(chunk=i, rows=len(chunk["latents"]))


class Pool:
    """All chunks in memory, and batches of the three tasks drawn from them."""

    def __init__(self, folder: Path) -> None:
        self.families: list[Family] = []
        latents, offset = [], 0
        for path in sorted(folder.glob("*.pt"), key=lambda p: int(p.stem)):
            chunk = torch.load(path, weights_only=False)
            for family in chunk["families"]:
                rows = tuple(offset + row for row in family.rows)
                self.families.append(Family(family.scene, family.edits, rows))
            latents.append(chunk["latents"])
            offset += len(chunk["latents"])
        self.latents = torch.cat(latents)
        self.by_background: dict[str, list[int]] = {name: [] for name in COLOURS}
        for family in self.families:
            for row, scene in zip(family.rows, self._scenes(family), strict=True):
                self.by_background[scene.background].append(row)

    @staticmethod
    def _scenes(family: Family) -> list[Scene]:
        return [family.scene, *(apply_edit(family.scene, edit) for edit in family.edits)]

    def _draw(self, rng: np.random.Generator, single: bool = False) -> Family:
        while True:
            family = self.families[int(rng.integers(len(self.families)))]
            if not single or len(family.scene.shapes) == 1:
                return family

    def _picture(self, rng: np.random.Generator) -> tuple[str, tuple[int, ...], Tensor]:
        family = self._draw(rng)
        while True:
            at = int(rng.integers(len(family.rows)))
            scene = family.scene if at == 0 else apply_edit(family.scene, family.edits[at - 1])
            if not is_captioned(scene):
                family = self._draw(rng)
            elif scene.shapes or rng.random() < 0.05:
                return caption(scene, rng), (family.rows[at],), token_weights([scene])

    def _edit(self, rng: np.random.Generator) -> tuple[str, tuple[int, ...], Tensor]:
        while True:
            family = self._draw(rng)
            at = int(rng.integers(len(family.edits)))
            before, edit = family.scene, family.edits[at]
            # Telling one shape from another is the hard part; a new background is learnt soon.
            easy = len(before.shapes) == 1 or edit.kind == "background"
            if not easy or rng.random() < 0.5:
                break
        after = apply_edit(before, edit)
        rows = (family.rows[at + 1], family.rows[0])
        weights = token_weights([before, after])
        back = inverse_edit(before, edit)
        if back is not None and rng.random() < 0.5:
            before, edit, rows = after, back, rows[::-1]
        return instruction(before, edit, rng), rows, weights

    def _combine(self, rng: np.random.Generator) -> tuple[str, tuple[int, ...], Tensor]:
        family = self._draw(rng, single=True)
        after = apply_edit(family.scene, family.edits[0])
        options = self.by_background[after.background]
        second = options[int(rng.integers(len(options)))]
        words = combine_instruction(family.scene, rng)
        return words, (family.rows[1], family.rows[0], second), token_weights([after])

    def batch(self, rng: np.random.Generator, count: int, references: int) -> tuple[list[str], Tensor, Tensor]:
        """Prompts, latents (B, 1 + references, 64, channels) with the target first, loss weights (B, 64)."""
        draw = (self._picture, self._edit, self._combine)[references]
        items = [draw(rng) for _ in range(count)]
        rows = torch.tensor([rows for _, rows, _ in items])
        return [words for words, _, _ in items], self.latents[rows], torch.stack([w for _, _, w in items])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Encode the pool: python examples/tiny/pool.py --out DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--families", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    import pool  # pickled families must name this module, which is now __main__

    pool.build_pool(chosen.out, chosen.chunks, chosen.families, chosen.seed)
