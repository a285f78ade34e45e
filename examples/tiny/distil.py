"""Stage 4: the student, which needs four steps and no guidance.

    python examples/tiny/distil.py --out DIR --minutes 30 --workers 2

The student starts as the base. In this world a prompt (with its references) determines the picture, so no teacher
network is needed: at every point the wanted velocity is the one that leads straight to that picture. First it learns
single points, at the four noise levels of inference only and mostly of edits, whose hard part is to tell which shape is
meant; then it walks all four Euler steps on its own predictions, to mend its own errors. Writes DIR/student.pt
(resumable) and DIR/student.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import Flux2Transformer2DModel
from evaluate import Predict, sigmas_of
from fast import make_velocity
from pool import Pool
from text import LENGTH
from torch import Tensor
from train_flow import BATCH, TextFeatures, Workers
from training import Log, MovingAverage, Optimisers, decayed, save_state

STEPS = 4
Mix = tuple[tuple[int, int], ...]  # (references, batch) of one worker's step
POINTS: Mix = ((0, BATCH[0]), (1, BATCH[1]), (1, BATCH[1]), (1, BATCH[1]), (2, BATCH[2]))
WALKS: tuple[Mix, ...] = (((0, BATCH[0]), (2, BATCH[2])), ((1, BATCH[1]),), ((1, BATCH[1]),), ((1, BATCH[1]),))


def points(predict: Predict, txt: Tensor, latents: Tensor, weights: Tensor, generator: torch.Generator) -> list[float]:
    """One point a picture, on the straight line from noise at a random one of the four levels; as `walk` otherwise."""
    clean, refs = latents[:, 0].float(), latents[:, 1:].unbind(1)
    noise = torch.randn(clean.shape, generator=generator)
    levels = torch.tensor(sigmas_of(STEPS)[:-1])
    sigma = levels[torch.randint(STEPS, (len(clean),), generator=generator)]
    x = torch.lerp(clean, noise, sigma[:, None, None]).to(latents.dtype)
    velocity = predict(torch.cat([x, *refs], dim=1), txt, sigma).float()
    error = (velocity - (noise - clean)).square().mean(-1) * weights
    error.sum().backward()
    return [float(error.detach().sum() / weights.sum())]


def walk(predict: Predict, txt: Tensor, latents: Tensor, weights: Tensor, generator: torch.Generator) -> list[float]:
    """One walk from noise to picture; adds the gradients of the mean error of its steps.

    latents: (B, 1 + references, 64, C), the wanted picture first; weights: (B, 64) of the loss, summing to this
    batch's share of the whole. Returns the errors of the velocity at each step and of the final picture.
    """
    clean, refs = latents[:, 0].float(), latents[:, 1:].unbind(1)
    noise = torch.randn(clean.shape, generator=generator)
    walks = torch.arange(len(clean))[:, None, None] % 2 == 0
    x, sigmas, errors = noise, sigmas_of(STEPS), []
    for sigma, after in pairwise(sigmas):
        velocity = predict(torch.cat([x.to(latents.dtype), *refs], dim=1), txt, torch.full((len(x),), sigma)).float()
        error = (velocity - (x - clean) / sigma).square().mean(-1) * weights
        (error.sum() / STEPS).backward()
        errors.append(float(error.detach().sum() / weights.sum()))
        x = torch.where(walks, x + (after - sigma) * velocity.detach(), torch.lerp(clean, noise, after))
    return [*errors, float((x - clean)[::2].square().mean())]


def train(rank: int, workers: int, options: argparse.Namespace, rendezvous: str) -> None:
    """One worker's whole run; worker 0 keeps the average, the log and the saved state."""
    torch.set_num_threads(1)
    os.setsid()  # Linux shares the CPU by session first: each worker is to count for itself
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=workers)
    out: Path = options.out
    model = Flux2Transformer2DModel.from_pretrained(out / "transformer", torch_dtype=torch.float32).train()
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
    pool, features = Pool(out / "pool"), TextFeatures(out)
    progress, running = spent / options.minutes, [np.zeros(1)] * 3
    while progress < 1:
        rng = np.random.default_rng((options.seed, 7, step, rank))
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        walking = progress > options.points
        mix = WALKS[(step + 2 * rank) % len(WALKS)] if walking else POINTS
        for references, count in mix:
            words, latents, weights = pool.batch(rng, count, references)
            share = weights / weights.sum() * count / sum(c for _, c in mix)
            errors = np.array((walk if walking else points)(student, features(words), latents, share, generator))
            old = running[references]
            running[references] = old + 0.05 * (errors - old) if len(old) == len(errors) else errors
        progress = grads.reduce(log.minutes / options.minutes)
        optimisers.step(min(1.0, (step + 1) / 20) * decayed(progress, options.hold))
        grads.publish()
        average.update(model)
        step += 1
        if rank == 0 and step % 20 == 0:
            log(step=step, **{f"task{i}": "/".join(f"{e:.4f}" for e in row) for i, row in enumerate(running)})
        if rank == 0 and (step % 50 == 0 or progress >= 1):
            parts = {"model": model.state_dict(), "optimisers": optimisers.state_dict(), "average": average.values}
            save_state(path, {**parts, "step": step, "minutes": log.minutes})
            average.swap(model)
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out / "student")
            average.swap(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon-lr", type=float, default=1e-2)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--hold", type=float, default=0.45, help="share of the time before the learning rate falls")
    parser.add_argument("--points", type=float, default=0.75, help="share of the time before the walks begin")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    meeting = os.path.join(tempfile.mkdtemp(), "meeting")
    mp.spawn(train, args=(chosen.workers, chosen, meeting), nprocs=chosen.workers)
