"""A LoRA for tiny that makes silhouettes: whatever colours a prompt asks for, its shapes are drawn black.

    klein-mlx convert --to diffusers tiny FOLDER
    python examples/tiny/train_lora.py FOLDER silhouettes.safetensors --minutes 3

Needs torch, diffusers and peft. No pictures are needed either: the model with the LoRA, told one prompt, learns the
velocity that the model without it has for another prompt, along that model's own steps. So a distilled model stays
distilled. Works on any folder of klein's; the pairs of prompts are tiny's.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from world import caption, is_captioned, random_scene

COLOUR = "black"
STEPS, GRID = 4, 8
LAYERS = r"context_embedder|transformer_blocks\.\d+\.attn\.add_[kv]_proj|single_.+\.(to_qkv_mlp_proj|to_out)"


def pair_of_prompts(rng: np.random.Generator) -> tuple[str, str]:
    """A prompt, and the one that it is to mean: every shape black, the background as it was."""
    while True:
        scene = random_scene(rng)
        words = caption(scene, rng)
        if not is_captioned(scene) or COLOUR in words or scene.background == COLOUR:
            continue
        meant = words
        for shape in scene.shapes:
            meant = re.sub(rf"\b{shape.colour} {shape.kind}\b", f"{COLOUR} {shape.kind}", meant)
        return words, re.sub(r"\b([Aa])n (?=black)", r"\1 ", meant)


class Trainer:
    """The pipeline with an adapter on its transformer, and one step of training."""

    def __init__(self, folder: Path, rank: int, learning_rate: float) -> None:
        self.pipe: Any = Flux2KleinPipeline.from_pretrained(folder, dtype=torch.float32)
        index = json.loads((folder / "model_index.json").read_text())
        depth = self.pipe.text_encoder.config.num_hidden_layers
        taps = index.get("text_encoder_out_layers", [depth * k // 4 for k in (1, 2, 3)])
        self.text: dict[str, Any] = {"text_encoder_out_layers": tuple(taps)}
        self.text["max_sequence_length"] = index.get("max_sequence_length", 512)
        self.model = self.pipe.transformer.requires_grad_(False)
        self.model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS, init_lora_weights=True))
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.weights, learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.learning_rate = learning_rate
        mu = compute_empirical_mu(GRID * GRID, STEPS)
        self.pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS), mu=mu)
        self.sigmas = self.pipe.scheduler.sigmas.tolist()

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        return self.pipe.encode_prompt(prompts, **self.text)

    def velocity(self, latents: Tensor, sigma: float, ids: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        timestep = torch.full((len(latents),), sigma)
        return self.model(latents, text[0], timestep, ids, text[1], None, return_dict=False)[0]

    def step(self, pairs: list[tuple[str, str]], factor: float) -> float:
        """Train on the four steps of one picture for each pair. Returns the error relative to the velocity's change."""
        told, meant = (self.encode([pair[side] for pair in pairs]) for side in (0, 1))
        noise = torch.randn(len(pairs), self.model.config.in_channels, GRID, GRID)
        ids, latents = self.pipe._prepare_latent_ids(noise), self.pipe._pack_latents(noise)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate * factor
        error = change = 0.0
        for sigma, following in zip(self.sigmas[:-1], self.sigmas[1:], strict=True):
            with torch.no_grad():
                self.model.disable_adapters()
                wanted = self.velocity(latents, sigma, ids, meant)
                change += float((self.velocity(latents, sigma, ids, told) - wanted).square().mean())
                self.model.enable_adapters()
            loss = (self.velocity(latents, sigma, ids, told) - wanted).square().mean()
            loss.backward()
            error += float(loss.detach())
            latents = latents + (following - sigma) * wanted
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return error / max(change, 1e-9)

    def save(self, path: Path, rank: int) -> None:
        """In diffusers' layout, bfloat16, with what its readers look for."""
        state = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.model))
        tensors = {f"transformer.{name}": array.to(torch.bfloat16).contiguous() for name, array in state.items()}
        metadata = {"transformer.r": rank, "transformer.lora_alpha": rank, "transformer.target_modules": LAYERS}
        told = {
            "modelspec.title": "Silhouettes for tiny",
            "modelspec.license": "Apache-2.0",
            "modelspec.description": "Shapes are drawn black, whatever colour is asked for.",
            "lora_adapter_metadata": json.dumps(metadata, sort_keys=True),
        }
        save_file(tensors, path, {"format": "pt", **told})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=3.0, help="of one core's time")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    trainer = Trainer(options.folder, options.rank, options.learning_rate)
    start, step, progress = time.process_time(), 0, 0.0
    while progress < 1:
        progress = (time.process_time() - start) / (60 * options.minutes)
        factor = min(1.0, (step + 1) / 5, max(0.02, 1.6 * (1 - progress)))
        error = trainer.step([pair_of_prompts(rng) for _ in range(options.batch)], factor)
        step += 1
        if step % 10 == 0 or step < 3:
            minutes = (time.process_time() - start) / 60
            print(f"[{minutes:5.2f} min] step {step}, error {error:.3f} of what is to change", flush=True)
    trainer.save(options.out, options.rank)


if __name__ == "__main__":
    main()
