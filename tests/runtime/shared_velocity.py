"""Run by `test_shared.py`: one of several processes; prints how far the shared velocities are from its own alone.

On the CPU, as the test's bound is of float32, which an M5's GPU shortens.
"""

import json
from typing import Any

import mlx.core as mx

from klein_mlx.config import TransformerConfig
from klein_mlx.model.compile import CompiledBlocks
from klein_mlx.model.layers import Gpu, place
from klein_mlx.model.sampler import join_references
from klein_mlx.model.transformer import Transformer, call_block, in_parts
from klein_mlx.model.velocity import Peers, Tables, guided_velocity, velocity

CONFIG = TransformerConfig(16, 2, 3, 32, 2, 64, 3.0, (8, 8, 8, 8))
SIGMAS = (0.9, 0.5)


def normal(shape: tuple[int, ...], seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def main() -> None:
    mx.set_default_device(mx.cpu)
    group = mx.distributed.init(strict=True, backend="ring")
    mx.random.seed(0)
    model = Transformer(CONFIG)
    model.arrange()
    mx.eval(model.parameters())
    blocks = CompiledBlocks()
    references = join_references([normal((1, 2, 3, 16), 1)])
    embeds, negative = normal((1, 7, 64), 2), normal((1, 7, 64), 3)

    def latents(peers: Peers, kind: str) -> mx.array:
        with_references = None if kind in ("plain", "guided") else references
        tables = Tables(model, with_references, (3, 5), SIGMAS, mx.float32, still=kind == "alone")
        if kind in ("guided", "batched"):
            predict = guided_velocity(model, embeds, negative, tables, 3.0, kind == "batched", peers=peers)
        else:
            reuse: Any = kind if kind in ("alone", "first step") else None
            run = in_parts(blocks, mx.async_eval) if kind == "compiled" else call_block
            predict = velocity(model, embeds, tables, reuse, run, peers)
        x = normal((1, 3, 5, 16), 4)
        for sigma in SIGMAS:
            x = x - 0.4 * predict(x, sigma)
        mx.eval(x)
        return x

    found = {}

    def compare(kind: str) -> None:
        ours, alone = latents(Peers(group.rank(), group.size()), kind), latents(Peers(), kind)
        found[kind] = float(mx.abs(ours - alone).max().item() / mx.abs(alone).max().item())  # type: ignore[operator]

    for kind in ("plain", "references", "alone", "first step", "guided", "batched"):
        compare(kind)
    mx.disable_compile()  # compiled functions run as Python: what reaches them is the same, and no compiler is needed
    place(model, Gpu())
    compare("compiled")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
