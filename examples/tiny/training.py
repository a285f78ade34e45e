"""What every training stage shares: the optimiser, the moving average of the weights, resumable state, the log."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn


def orthogonalise(batch: Tensor) -> Tensor:
    """Push the singular values of matrices (n, rows, cols) to about 1 by five Newton-Schulz steps.

    Source: the quintic iteration of Muon (Jordan et al., 2024), in bfloat16.
    """
    x = batch.to(torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return (x.transpose(1, 2) if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum on weights of two or more axes (convolutions count as matrices).

    Weights of one shape are orthogonalised together. One step moves a weight by `lr` in spectral norm, times
    sqrt(rows / cols) when it is tall.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.0) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update from the gradients in `.grad`; parameters without one stay."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                direction = torch.lerp(p.grad, state["momentum"], group["momentum"])
                by_shape[(p.shape[0], p[0].numel())].append((p, direction.reshape(p.shape[0], -1)))
            for (rows, cols), members in by_shape.items():
                updates = orthogonalise(torch.stack([direction for _, direction in members]))
                scale = group["lr"] * max(1.0, rows / cols) ** 0.5
                for (p, _), update in zip(members, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["decay"])
                    p.add_(update.view_as(p), alpha=-scale)


class Optimisers:
    """Muon for matrices, Adam for the rest, with one learning-rate factor for both."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], muon_lr: float, adam_lr: float) -> None:
        matrices, rest = [], []
        for name, p in named:
            (matrices if p.ndim >= 2 and "embed_tokens" not in name else rest).append(p)
        self.members = [Muon(matrices, muon_lr), torch.optim.Adam(rest, adam_lr, betas=(0.9, 0.98), eps=1e-10)]
        self.base = [muon_lr, adam_lr]

    def step(self, factor: float) -> None:
        """Update with `factor` times the base learning rates, then drop the gradients."""
        for member, lr in zip(self.members, self.base, strict=True):
            for group in member.param_groups:
                group["lr"] = lr * factor
            member.step()
            member.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        """The states of both optimisers."""
        return [member.state_dict() for member in self.members]

    def load_state_dict(self, states: list[dict]) -> None:
        """Restore what `state_dict` gave."""
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)


class MovingAverage:
    """Exponential moving average of a module's parameters, kept in float32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = [p.detach().clone() for p in module.parameters()]
        self.steps = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take the module's present parameters in; early steps count more."""
        self.steps += 1
        rate = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.values, [p.detach() for p in module.parameters()], rate)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the average and the module's parameters; a second call undoes it."""
        for value, p in zip(self.values, module.parameters(), strict=True):
            kept = p.detach().clone()
            p.copy_(value)
            value.copy_(kept)


def decayed(progress: float, hold: float = 0.6, floor: float = 0.02) -> float:
    """Learning-rate factor at `progress` in 0..1: constant until `hold`, then linear down to `floor`."""
    return 1.0 if progress < hold else max(floor, (1 - progress) / (1 - hold))


def save_state(path: Path, state: dict) -> None:
    """Write a training state so that a killed run leaves the old one or the new one, never half."""
    scratch = path.with_suffix(".part")
    torch.save(state, scratch)
    os.replace(scratch, path)


class Log:
    """Lines of a training stage: to the screen and to `<name>.log`, each with the minutes since the start."""

    def __init__(self, folder: Path, name: str, minutes_before: float = 0.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.log"
        self.start = time.monotonic() - 60 * minutes_before

    @property
    def minutes(self) -> float:
        """Minutes of this stage so far, over all its runs."""
        return (time.monotonic() - self.start) / 60

    def __call__(self, **values: object) -> None:
        words = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
        line = f"[{self.minutes:6.2f} min] {words}"
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def write_json(path: Path, values: object) -> None:
    """Write `values` as indented JSON."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
