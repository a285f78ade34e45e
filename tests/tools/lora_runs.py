"""The golden model's velocity, with whatever LoRAs a pipeline has."""

from pathlib import Path

import mlx.core as mx
import numpy as np
from folders import GOLDEN

from klein_mlx import KleinPipeline
from klein_mlx.model.sampler import image_ids, text_ids
from klein_mlx.model.transformer import rope_tables

TEXT, SIDE = 6, 4


def pipeline(model: Path | str = GOLDEN, **options: object) -> KleinPipeline:
    """A pipeline in float32 that keeps what it has loaded."""
    return KleinPipeline.from_pretrained(model, keep="all", **{"dtype": "float32", **options})  # type: ignore[arg-type]


def velocity(pipe: KleinPipeline, sigma: float = 0.7) -> mx.array:
    """The transformer's output for fixed random tokens and embeddings."""
    run = pipe.stream("x", seed=0)
    config, rng = pipe.config.transformer, np.random.default_rng(5)
    transformer = pipe.parts.get("transformer", run)
    dtype = pipe.dtype
    tokens = mx.array(rng.standard_normal((1, SIDE * SIDE, config.in_channels), np.float32)).astype(dtype)
    embeds = mx.array(rng.standard_normal((1, TEXT, config.joint_attention_dim), np.float32)).astype(dtype)
    ids = mx.concatenate([text_ids(TEXT), image_ids(SIDE, SIDE)])
    rope = rope_tables(ids, config.axes_dims_rope, config.rope_theta, TEXT)
    txt = transformer.embed_text(embeds)
    out = transformer(tokens, txt, transformer.modulations(sigma, dtype), rope, SIDE * SIDE)
    mx.eval(out)
    pipe.parts.release(run, "transformer")
    return out


def difference(left: mx.array, right: mx.array) -> float:
    """Largest difference, relative to the largest value."""
    left, right = left.astype(mx.float32), right.astype(mx.float32)
    return float((mx.abs(left - right).max() / mx.abs(right).max()).item())  # type: ignore[arg-type]
