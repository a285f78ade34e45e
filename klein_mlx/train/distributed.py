"""Several processes that train together: every one computes its own micro-batches, gradients are averaged.

Started by mlx.launch, which tells each process its rank. A group of one does nothing, by the same code.
"""

import os
import socket
import subprocess
import sys
from typing import Any

import mlx.core as mx

from klein_mlx.errors import KleinError
from klein_mlx.train.adapters import Weights
from klein_mlx.train.noise import to_float

TIMEOUT = 60  # seconds until every peer must be there
# In a process of its own: what joins the group holds Python's lock until all are there.
_WATCH = (
    "import os, sys, time\n"
    "time.sleep(float(sys.argv[1]))\n"
    "if os.getppid() == int(sys.argv[2]):\n"
    "    sys.stderr.write(sys.argv[3]); sys.stderr.flush(); os.kill(int(sys.argv[2]), 9)\n"
)


class LostPeer(KleinError):
    """Another process of a distributed run is gone."""


class Group:
    """This process among all: rank, size."""

    def __init__(self, backend: str):
        self.rank, self.size, self._group = 0, 1, None
        if "MLX_RANK" not in os.environ:
            return
        host = socket.gethostname()
        line = f"error: {host} (rank {os.environ['MLX_RANK']}) waited {TIMEOUT} s for the other machines; are all up?\n"
        command = [sys.executable, "-c", _WATCH, str(TIMEOUT), str(os.getpid()), line]
        with subprocess.Popen(command) as watch:
            try:
                self._group = mx.distributed.init(strict=True, backend=backend)
                self.rank, self.size = self._group.rank(), self._group.size()
                self._sum(mx.array(1.0))  # the first exchange: only now is everyone known to be there
            except RuntimeError as error:
                raise LostPeer(f"{host}: the machines do not find each other ({_line(error)})") from None
            finally:
                watch.kill()

    def mean(self, gradients: Weights, loss: float) -> tuple[Weights, float]:
        """The mean over all processes, by one exchange. Raises LostPeer."""
        if self.size == 1:
            return gradients, loss
        flat = mx.concatenate([*(g.astype(mx.float32).reshape(-1) for g in gradients.values()), mx.array([loss])])
        flat = self._sum(flat) / self.size
        found, start = {}, 0
        for path, gradient in gradients.items():
            found[path] = flat[start : start + gradient.size].reshape(gradient.shape)
            start += gradient.size
        mx.eval(found)
        return found, to_float(flat[-1])

    def agree(self, flag: bool) -> bool:
        """Whether any process says so."""
        return flag if self.size == 1 else to_float(self._sum(mx.array(float(flag)))) > 0

    def _sum(self, array: mx.array) -> mx.array:
        try:
            total = mx.distributed.all_sum(array, group=self._group)  # type: ignore[arg-type]
            mx.eval(total)
        except RuntimeError as error:
            raise LostPeer(f"{socket.gethostname()}: another machine is gone ({_line(error)})") from None
        return total


def _line(error: Any) -> str:
    return " ".join(str(error).split())[:200]
