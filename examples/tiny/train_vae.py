"""Stage 1: the autoencoder, AutoencoderKLFlux2 at toy width, on rendered scenes.

    python examples/tiny/train_vae.py --out DIR --minutes 12

First on crops of 64 pixels, then on whole pictures; at the end the BatchNorm statistics are set to those of the
patchified latents. Writes DIR/vae (diffusers layout, bfloat16) and resumes from DIR/vae.pt.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2
from torch import Tensor
from training import Log, MovingAverage, Optimisers, decayed, save_state
from world import random_scene, render

CONFIG = {
    "block_out_channels": (16, 16, 32, 64),
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 2,
    "sample_size": 128,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
LATENT_NOISE = 0.05


def pictures(rng: np.random.Generator, count: int) -> Tensor:
    """`count` random pictures: (count, 3, 128, 128) float32 in [-1, 1]."""
    stack = np.stack([render(random_scene(rng)) for _ in range(count)])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1


def crops(pixels: Tensor, side: int, rng: np.random.Generator) -> Tensor:
    """One random square of `side` pixels for the whole batch, on a multiple of 8."""
    y, x = (8 * int(rng.integers((pixels.shape[2] - side) // 8 + 1)) for _ in range(2))
    return pixels[:, :, y : y + side, x : x + side]


def new_vae(seed: int) -> AutoencoderKLFlux2:
    """A fresh autoencoder whose posterior starts narrow (log-variance -6)."""
    torch.manual_seed(seed)
    vae = AutoencoderKLFlux2(**CONFIG)
    with torch.no_grad():
        latent = CONFIG["latent_channels"]
        posterior = vae.get_submodule("quant_conv")
        posterior.weight[latent:].zero_()
        posterior.bias[latent:].fill_(-6.0)
    return vae.to(memory_format=torch.channels_last)


def reconstruction_loss(output: Tensor, pixels: Tensor) -> Tensor:
    """L1 of the pixels, of their horizontal and vertical differences, and a little L2 for rare large errors."""
    error = output - pixels
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + edges + 2 * error.square().mean()


def training_loss(vae: AutoencoderKLFlux2, pixels: Tensor) -> Tensor:
    """Reconstruct through slightly noisy latents, so that the decoder forgives small errors of the flow model."""
    with torch.autocast("cpu", torch.bfloat16):
        mean = vae._encode(pixels.contiguous(memory_format=torch.channels_last))[:, : CONFIG["latent_channels"]]
        spread = mean.detach().float().std(dim=(0, 2, 3), keepdim=True)
        noise = LATENT_NOISE * spread * torch.randn_like(mean, dtype=torch.float32)
        output = vae._decode(mean + noise.to(mean.dtype), return_dict=False)[0]
    return reconstruction_loss(output.float(), pixels)


@torch.no_grad()
def psnr(vae: AutoencoderKLFlux2, seed: int = 1, count: int = 64) -> float:
    """Mean PSNR in dB over `count` pictures, without noise."""
    pixels = pictures(np.random.default_rng(seed), count)
    with torch.autocast("cpu", torch.bfloat16):
        output = vae._decode(vae._encode(pixels)[:, : CONFIG["latent_channels"]], return_dict=False)[0]
    mse = ((output.float().clamp(-1, 1) - pixels) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * mse.log10()).mean())


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLFlux2, seed: int = 2, batches: int = 16) -> None:
    """Give the BatchNorm the mean and variance of the patchified latents (channel c * 4 + dy * 2 + dx)."""
    rng = np.random.default_rng(seed)
    z = torch.cat([F.pixel_unshuffle(vae.encode(pictures(rng, 64)).latent_dist.mean, 2) for _ in range(batches)])
    vae.bn.running_mean.copy_(z.mean(dim=(0, 2, 3)))
    vae.bn.running_var.copy_(z.var(dim=(0, 2, 3)))


def train(out: Path, minutes: float, batch: int, seed: int, muon_lr: float, adam_lr: float) -> None:
    """Train for `minutes` of wall time in all, resuming from out/vae.pt."""
    vae = new_vae(seed)
    optimisers = Optimisers(vae.named_parameters(), muon_lr, adam_lr)
    average = MovingAverage(vae, 0.998)
    step, spent, path = 0, 0.0, out / "vae.pt"
    if path.exists():
        state = torch.load(path)
        vae.load_state_dict(state["vae"])
        optimisers.load_state_dict(state["optimisers"])
        average.values, average.steps, step, spent = state["average"], state["step"], state["step"], state["minutes"]
    log = Log(out, "vae", spent)
    log(parameters=sum(p.numel() for p in vae.parameters()), step=step)
    running = 0.0
    while log.minutes < minutes:
        rng = np.random.default_rng((seed, step))
        progress = log.minutes / minutes
        small = progress < 0.3
        pixels = pictures(rng, batch * 3 if small else batch)
        loss = training_loss(vae, crops(pixels, 64, rng) if small else pixels)
        loss.backward()
        optimisers.step(min(1.0, (step + 1) / 30) * decayed(progress, 0.5))
        average.update(vae)
        step += 1
        running += (loss.item() - running) * max(0.02, 1 / step)
        if step % 25 == 0:
            log(step=step, loss=running)
        if step % 200 == 0:
            average.swap(vae)
            log(step=step, psnr=psnr(vae))
            average.swap(vae)
            parts = {"vae": vae.state_dict(), "optimisers": optimisers.state_dict(), "average": average.values}
            save_state(path, {**parts, "step": step, "minutes": log.minutes})
    average.swap(vae)
    set_latent_statistics(vae)
    log(step=step, psnr=psnr(vae))
    vae.to(torch.bfloat16).save_pretrained(out / "vae")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon-lr", type=float, default=5e-3)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train(options.out, options.minutes, options.batch, options.seed, options.muon_lr, options.adam_lr)
