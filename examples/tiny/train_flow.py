"""Stage 3: the base model, a Flux2Transformer2DModel trained as a rectified flow on all three tasks at once.

    python examples/tiny/train_flow.py --out DIR --minutes 32 --workers 2

Each worker is one process with one thread; their gradients are averaged. Weights and optimiser are float32, the
compute copy is bfloat16. Writes DIR/flow.pt (resumable) and the moving average as DIR/transformer.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import Flux2Transformer2DModel
from fast import make_velocity
from pool import Pool
from text import LENGTH, Prompts
from torch import Tensor
from train_text_encoder import HIDDEN, TAPS, taps_of
from training import Log, MovingAverage, Optimisers, decayed, save_state
from transformers import Qwen3ForCausalLM

CONFIG = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 4,
    "attention_head_dim": 64,
    "num_attention_heads": 3,
    "joint_attention_dim": len(TAPS) * HIDDEN,
    "mlp_ratio": 3.0,
    "axes_dims_rope": (16, 16, 16, 16),
    "rope_theta": 2000,
    "guidance_embeds": False,
    "eps": 1e-6,
}
BATCH = (26, 18, 4)  # per worker: pictures, edits with one reference, combinations of two references
DROPPED = 0.1  # share of prompts replaced by the empty one, for guidance


def new_transformer(seed: int) -> Flux2Transformer2DModel:
    """A fresh transformer whose output and gates start at zero."""
    torch.manual_seed(seed)
    model = Flux2Transformer2DModel(**CONFIG)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
        if name.startswith(("proj_out", "norm_out")) or "modulation" in name:
            torch.nn.init.zeros_(p)
    return model


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


def draw_sigma(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels (count,): three in four logit-normal towards noise, one in four uniform."""
    normal = torch.sigmoid(1.1 + 1.2 * torch.randn(count, generator=generator))
    uniform = torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.75, normal, uniform)


def flow_loss(
    predict: Callable[..., Tensor],
    features: TextFeatures,
    batch: tuple[list[str], Tensor, Tensor],
    generator: torch.Generator,
) -> Tensor:
    """Weighted mean square error of the velocity (noise - target) for one task's batch."""
    words, latents, weights = batch
    keep = torch.rand(len(words), generator=generator) >= DROPPED
    txt = features([w if k else "" for w, k in zip(words, keep.tolist(), strict=True)])
    clean = latents[:, 0].float()
    noise = torch.randn(clean.shape, generator=generator)
    sigma = draw_sigma(len(words), generator)
    noisy = torch.lerp(clean, noise, sigma[:, None, None]).to(latents.dtype)
    output = predict(torch.cat([noisy, *latents[:, 1:].unbind(1)], dim=1), txt, sigma)
    error = (output.float() - (noise - clean)).square().mean(-1)
    return (error * weights).sum() / weights.sum()


class Workers:
    """Gradients from the bfloat16 copy, averaged over the processes, to the float32 weights and back."""

    def __init__(self, master: torch.nn.Module, compute: torch.nn.Module) -> None:
        self.master, self.compute = list(master.parameters()), list(compute.parameters())

    @torch.no_grad()
    def reduce(self, extra: float) -> float:
        """Average gradients into the masters' `.grad`; returns worker 0's `extra`."""
        size = dist.get_world_size()
        parts = [p.grad.float().flatten() for p in self.compute]
        flat = torch.cat([*parts, torch.tensor([extra * size if dist.get_rank() == 0 else 0.0])])
        dist.all_reduce(flat)
        flat /= size
        at = 0
        for p, q in zip(self.master, self.compute, strict=True):
            p.grad = flat[at : at + p.numel()].view_as(p)
            q.grad = None
            at += p.numel()
        return float(flat[-1])

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the float32 weights into the compute copy."""
        torch._foreach_copy_(self.compute, self.master)


def train(rank: int, workers: int, options: argparse.Namespace, rendezvous: str) -> None:
    """One worker's whole run; worker 0 keeps the average, the log and the saved state."""
    torch.set_num_threads(1)
    os.setsid()  # Linux shares the CPU by session first: each worker is to count for itself
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=workers)
    out: Path = options.out
    model = new_transformer(options.seed)
    optimisers = Optimisers(model.named_parameters(), options.muon_lr, options.adam_lr)
    average = MovingAverage(model, 0.998)
    step, spent, path = 0, 0.0, out / "flow.pt"
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        optimisers.load_state_dict(state["optimisers"])
        average.values, average.steps, step, spent = state["average"], state["step"], state["step"], state["minutes"]
    log = Log(out, "flow", spent)
    compute = copy.deepcopy(model).to(torch.bfloat16)
    predict, grads = make_velocity(compute, LENGTH), Workers(model, compute)
    pool, features = Pool(out / "pool"), TextFeatures(out)
    if rank == 0:
        log(parameters=sum(p.numel() for p in model.parameters()), pictures=len(pool.latents), step=step)
    progress, running, resumed = spent / options.minutes, [0.0] * 3, step
    while progress < 1:
        rng = np.random.default_rng((options.seed, step, rank))
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        for references, count in enumerate(BATCH):
            loss = flow_loss(predict, features, pool.batch(rng, count, references), generator)
            (loss * count / sum(BATCH)).backward()
            running[references] += (loss.item() - running[references]) * max(0.02, 1 / (step - resumed + 1))
        progress = grads.reduce(log.minutes / options.minutes)
        optimisers.step(min(1.0, (step + 1) / 50) * decayed(progress, options.hold))
        grads.publish()
        average.update(model)
        step += 1
        if rank == 0 and (step % 50 == 0 or step in (1, 2, 5, 10, 20)):
            log(step=step, picture=running[0], edit=running[1], combine=running[2])
        if rank == 0 and (step % 250 == 0 or progress >= 1):
            parts = {"model": model.state_dict(), "optimisers": optimisers.state_dict(), "average": average.values}
            save_state(path, {**parts, "step": step, "minutes": log.minutes})
            average.swap(model)
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out / "transformer")
            average.swap(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=32.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon-lr", type=float, default=1e-2)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--hold", type=float, default=0.55, help="share of the time before the learning rate falls")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    meeting = os.path.join(tempfile.mkdtemp(), "meeting")
    mp.spawn(train, args=(chosen.workers, chosen, meeting), nprocs=chosen.workers)
