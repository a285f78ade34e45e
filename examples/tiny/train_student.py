"""Stage 4: the student, a Flux2Transformer2DModel that needs four steps and no guidance.

    python examples/tiny/train_student.py --out DIR --start FOLDER --workers 2

A prompt with its references and its noise determines the picture (unsaid.py), so neither a base nor a teacher is
needed: at every point the wanted velocity is the one that leads straight to that picture. First the student learns
single points, at the noise levels of inference only; then it walks the four Euler steps on its own predictions, to mend
its own errors. Each worker is one process with one thread; gradients are averaged. Weights and optimiser are float32,
the compute copy is bfloat16. Starts from the transformer in FOLDER, if one is given. Writes DIR/student.pt (resumable)
and the moving average as DIR/student.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import Flux2Transformer2DModel
from evaluate import TextFeatures, sigmas_of
from fast import make_velocity
from pool import Batch, Pool
from text import LENGTH
from torch import Tensor
from train_text_encoder import HIDDEN, TAPS
from training import Log, MovingAverage, Optimisers, decayed, save_state

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
STEPS = 4
LEVELS = (0.45, 0.25, 0.2, 0.1)  # shares of the noise levels among the points: nearly all is decided at the first
Mix = tuple[tuple[int, int], ...]  # (references, batch) of one worker's step
POINTS: tuple[Mix, ...] = (((0, 48),), ((0, 48),), ((0, 48), (1, 20)), ((0, 48), (1, 20), (2, 4)))
WALKS: tuple[Mix, ...] = (((0, 48),), ((0, 48),), ((1, 20), (2, 4)))
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


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


@torch.no_grad()
def nearest(guess: Tensor, batch: Batch, among: Tensor) -> Tensor:
    """The target (B, 64, C) float32 nearest to a guessed picture; the first one where `among` (B,) is False."""
    targets = batch.targets.float()
    apart = ((guess[:, None] - targets).square().mean(-1) * batch.weights[:, None]).sum(-1)
    index = torch.where(among, apart.argmin(1), 0)
    return targets[torch.arange(len(index)), index]


def points(predict: Predict, txt: Tensor, batch: Batch, share: float, rng: np.random.Generator) -> list[float]:
    """One point a picture, on the line from noise at one of the four levels, most of them at the first.

    Adds the gradients of `share` times the mean error of the velocity; returns it, for the first level and the others.
    """
    clean, noise = batch.targets[:, 0].float(), batch.noise
    levels = torch.tensor(sigmas_of(STEPS)[:-1])
    index = torch.from_numpy(rng.choice(STEPS, size=len(noise), p=LEVELS))
    sigma = levels[index]
    x = torch.lerp(clean, noise, sigma[:, None, None])
    tokens = torch.cat([x.to(torch.bfloat16), *batch.references], dim=1)
    velocity = predict(tokens, txt, sigma).float()
    wanted = nearest(x - sigma[:, None, None] * velocity.detach(), batch, index == 0)
    error = ((velocity - (x - wanted) / sigma[:, None, None]).square().mean(-1) * batch.weights).sum(1)
    (error.sum() * share / batch.weights.sum()).backward()
    mean = (error.detach() / batch.weights.sum(1)).numpy()
    first = index.numpy() == 0
    return [float(mean[chosen].mean()) if chosen.any() else np.nan for chosen in (first, ~first)]


def walk(predict: Predict, txt: Tensor, batch: Batch, share: float, rng: np.random.Generator) -> list[float]:
    """One walk from noise to picture, three in four on the student's own predictions; as `points` otherwise.

    Returns the errors of the velocity at each step and of the final pictures.
    """
    noise = x = batch.noise
    own = torch.from_numpy(rng.random(len(noise)) < 0.75)[:, None, None]
    clean, errors = batch.targets[:, 0].float(), []
    for step, (sigma, after) in enumerate(pairwise(sigmas_of(STEPS))):
        tokens = torch.cat([x.to(torch.bfloat16), *batch.references], dim=1)
        velocity = predict(tokens, txt, torch.full((len(x),), sigma)).float()
        if step == 0:
            clean = nearest(x - sigma * velocity, batch, torch.ones(len(x), dtype=torch.bool))
        error = ((velocity - (x - clean) / sigma).square().mean(-1) * batch.weights).sum() / batch.weights.sum()
        (error * share / STEPS).backward()
        errors.append(float(error))
        x = torch.where(own, x + (after - sigma) * velocity.detach(), torch.lerp(clean, noise, after))
    return [*errors, float((x - clean)[own[:, 0, 0]].square().mean())]


class Workers:
    """Gradients from the bfloat16 copy, averaged over the processes, to the float32 weights and back."""

    def __init__(self, master: torch.nn.Module, compute: torch.nn.Module) -> None:
        self.master, self.compute = list(master.parameters()), list(compute.parameters())

    @torch.no_grad()
    def reduce(self) -> None:
        """Average gradients into the masters' `.grad`."""
        flat = torch.cat([p.grad.float().flatten() for p in self.compute])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        at = 0
        for p, q in zip(self.master, self.compute, strict=True):
            p.grad = flat[at : at + p.numel()].view_as(p)
            q.grad = None
            at += p.numel()

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
    if options.start is not None:
        model = Flux2Transformer2DModel.from_pretrained(options.start, torch_dtype=torch.float32).train()
    optimisers = Optimisers(model.named_parameters(), options.muon_lr, options.adam_lr)
    average = MovingAverage(model, 0.995)
    step, spent, path = 0, 0.0, out / "student.pt"
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        optimisers.load_state_dict(state["optimisers"])
        average.values, average.steps, step, spent = state["average"], state["step"], state["step"], state["minutes"]
    log = Log(out, "student", spent)
    compute = copy.deepcopy(model).to(torch.bfloat16)
    student, grads = make_velocity(compute, LENGTH), Workers(model, compute)
    pool, features = Pool(out), TextFeatures(out)
    running = {}
    while step < options.steps:
        rng = np.random.default_rng((options.seed, 7, step, rank))
        walking = step >= options.points * options.steps
        mixes = WALKS if walking else POINTS
        mix = mixes[(step + rank) % len(mixes)]
        for references, count in mix:
            batch = pool.batch(rng, count, references)
            share = count / sum(c for _, c in mix)
            errors = np.array((walk if walking else points)(student, features(batch.words), batch, share, rng))
            old = running.get((walking, references), errors)
            old = np.where(np.isnan(old), errors, old)
            running[walking, references] = old + 0.05 * np.nan_to_num(errors - old)
        grads.reduce()
        optimisers.step(min(1.0, (step + 1) / 20) * decayed(step / options.steps, options.hold))
        grads.publish()
        average.update(model)
        step += 1
        if rank == 0 and (step % 20 == 0 or step < 4):
            log(
                step=step,
                **{f"task{i}": "/".join(f"{e:.4f}" for e in row) for (w, i), row in running.items() if w == walking},
            )
        if rank == 0 and (step % 100 == 0 or step == options.steps):
            parts = {"model": model.state_dict(), "optimisers": optimisers.state_dict(), "average": average.values}
            save_state(path, {**parts, "step": step, "minutes": log.minutes})
            average.swap(model)
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out / "student")
            average.swap(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="folder of a transformer to start from")
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon-lr", type=float, default=6e-3, help="from nothing 1e-2")
    parser.add_argument("--adam-lr", type=float, default=1.2e-3, help="from nothing 2e-3")
    parser.add_argument("--hold", type=float, default=0.6, help="share of the steps before the learning rate falls")
    parser.add_argument("--points", type=float, default=0.316, help="share of the steps before the walks begin")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    meeting = os.path.join(tempfile.mkdtemp(), "meeting")
    mp.spawn(train, args=(chosen.workers, chosen, meeting), nprocs=chosen.workers)
