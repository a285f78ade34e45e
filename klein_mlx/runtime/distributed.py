"""Several processes, each on a machine of its own, that make one picture or train one LoRA.

Started by mlx.launch, which tells each process its rank. A group of one does nothing, by the same code.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from klein_mlx.errors import KleinError, line_of
from klein_mlx.model.velocity import Peers

Weights = dict[str, mx.array]

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
        if "MLX_RANK" not in os.environ or _launched_alone():
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
                raise LostPeer(f"{host}: the machines cannot find each other ({line_of(error)})") from None
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
        return found, float(flat[-1].item())  # type: ignore[arg-type]

    def agree(self, flag: bool) -> bool:
        """Whether any process says so."""
        return flag if self.size == 1 else bool((self._sum(mx.array(float(flag))) > 0).item())

    def share(self, value: Any) -> Any:
        """The first process's JSON value, for all of them."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.rank == 0 else b""
        count = int(self._sum(mx.array(len(text))).item())  # type: ignore[arg-type]
        signs = self._sum(mx.array([*text] or [0] * count, mx.int32))
        return json.loads(bytes(signs.tolist()))  # type: ignore[arg-type]

    @property
    def peers(self) -> Peers:
        """The processes, as those that share a picture's tokens."""
        return Peers(self.rank, self.size)

    def _sum(self, array: mx.array) -> mx.array:
        try:
            total = mx.distributed.all_sum(array, group=self._group)  # type: ignore[arg-type]
            mx.eval(total)
        except RuntimeError as error:
            raise lost(error) from None
        return total


def _launched_alone() -> bool:
    """Whether mlx.launch started one process only: its list of hosts is blank then."""
    try:
        return not Path(os.environ["MLX_HOSTFILE"]).read_text().strip()
    except (KeyError, OSError, UnicodeDecodeError):
        return False


def lost(error: RuntimeError) -> LostPeer:
    """What an exchange that failed means."""
    return LostPeer(f"{socket.gethostname()}: another machine is gone ({line_of(error)})")
