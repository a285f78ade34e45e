"""float16 layers beside a float32 residual stream: finite where float16 is not, and close to float32."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adherence import prompts
from mlx.utils import tree_flatten
from PIL import Image

from klein_mlx import KleinPipeline
from klein_mlx.config import TransformerConfig
from klein_mlx.model.sampler import image_ids, text_ids
from klein_mlx.model.transformer import Modulation, Transformer, rope_tables

CONFIG = TransformerConfig(16, 1, 1, 32, 4, 48, 3.0, (8, 8, 8, 8))
HIDDEN, TEXT, IMAGE = 128, 5, 12
FLOAT16_MAX = 65504.0

# What is rounded to float16 on a branch's way: norm, projection, q/k norm, rotation, attention, SwiGLU, its result.
# Each rounding is at most 2**-11 of a value and they are independent: seven of them stay within four times one.
TOLERANCE = 4 * 2**-11


def twins(strength: float) -> tuple[Transformer, Transformer]:
    """The same model in float16 and in float32; the last layer of each branch is `strength` times as large."""
    mx.random.seed(0)
    narrow = Transformer(CONFIG)
    weights: dict[str, Any] = dict(tree_flatten(narrow.parameters()))
    for name, weight in weights.items():
        if weight.ndim == 2:
            weight = mx.random.normal(weight.shape) * weight.shape[1] ** -0.5
            weights[name] = weight * strength if name.split(".")[-2] in ("to_out", "mlp_out", "linear_out") else weight
    weights = {name: weight.astype(mx.float16) for name, weight in weights.items()}
    exact = Transformer(CONFIG)
    narrow.load_weights(list(weights.items()))
    exact.load_weights([(name, weight.astype(mx.float32)) for name, weight in weights.items()])
    for model in (narrow, exact):
        model.arrange()
        mx.eval(model.parameters())
    return narrow, exact


def stream(tokens: int, seed: int) -> mx.array:
    """A residual stream with a few channels at 1e5, as trained models have them."""
    x = np.random.default_rng(seed).standard_normal((1, tokens, HIDDEN)).astype(np.float32)
    x[..., ::32] *= 1e5
    return mx.array(x)


def modulation() -> Modulation:
    return Modulation(mx.full((HIDDEN,), 0.25), mx.full((HIDDEN,), 1.5), mx.full((HIDDEN,), 0.5))


def rope() -> Any:
    ids = mx.concatenate([text_ids(TEXT), image_ids(3, 4)])
    return rope_tables(ids, CONFIG.axes_dims_rope, CONFIG.rope_theta, TEXT)


def check(narrow: list[mx.array], exact: list[mx.array], before: list[mx.array]) -> float:
    """Compare what the blocks added to the stream; returns the largest value that a branch came to."""
    largest = 0.0
    for ours, wanted, x in zip(narrow, exact, before, strict=True):
        assert ours.dtype == mx.float32
        assert mx.isfinite(ours).all()
        added = wanted - x
        assert mx.linalg.norm(ours - wanted) <= TOLERANCE * mx.linalg.norm(added)
        largest = max(largest, mx.abs(added).max().item() / 0.5)
    return largest


@pytest.mark.parametrize("strength", [1.0, 3e4])
def test_blocks_at_residuals_of_1e5(strength: float) -> None:
    """Also where a branch alone exceeds float16's range twice: without care, that would be infinite."""
    narrow, exact = twins(strength)
    txt, img = stream(TEXT, 1), stream(IMAGE, 2)
    mods = modulation(), modulation()
    double = [m.double_blocks[0](txt, img, mods, mods, rope())[0] for m in (narrow, exact)]
    largest = check([*double[0]], [*double[1]], [txt, img])
    x = mx.concatenate([txt, img], axis=1)
    single = [m.single_blocks[0](x, modulation(), rope())[0] for m in (narrow, exact)]
    largest = min(largest, check([single[0]], [single[1]], [x]))
    assert (largest > 2 * FLOAT16_MAX) == (strength > 1)


def test_large_embeddings_of_the_text() -> None:
    """An encoder's hidden states have channels beyond float16's range; the stream starts with them."""
    narrow, exact = twins(1.0)
    tokens = mx.random.normal((1, IMAGE, 16), key=mx.random.key(1))
    embeds = mx.random.normal((1, TEXT, 48), key=mx.random.key(2))
    embeds = mx.where(mx.arange(48) == 7, 1e5, embeds)
    out = []
    for model, dtype in ((narrow, mx.float16), (exact, mx.float32)):
        txt, mods = model.embed_text(embeds), model.modulations(0.7, dtype)
        assert txt.dtype == mods.single.shift.dtype == mx.float32
        assert mx.abs(txt).max() > FLOAT16_MAX / 2
        out.append(model(tokens.astype(dtype), txt, mods, rope(), IMAGE))
    assert out[0].dtype == mx.float16
    assert mx.linalg.norm(out[0] - out[1]) <= 2 * TOLERANCE * mx.linalg.norm(out[1])


@pytest.mark.slow
def test_tiny_in_float16() -> None:
    """Pictures and edits are float32's but for a rounding of pixels here and there, and show what was asked for."""
    narrow, exact = (KleinPipeline.from_pretrained("tiny", dtype=dtype, keep="all") for dtype in ("float16", "float32"))
    first = exact("a red circle left of a blue square", seed=7).images[0]
    asked: dict[str, Any]
    for asked in (
        {"prompt": "a red circle left of a blue square"},
        {"prompt": "make the circle green", "image": first},
        {"prompt": "make the circle green", "image": first, "reuse_references": True},
    ):
        ours, wanted = (np.asarray(pipe(**asked, seed=7).images[0], np.float64) for pipe in (narrow, exact))
        assert np.abs(ours - wanted).mean() < 0.5
    assert narrow.parts.dtype_of("transformer") == mx.float16
    assert narrow.parts.dtype_of("text_encoder") == narrow.parts.dtype_of("vae") == mx.bfloat16
    assert prompts(narrow, 8)["all"] >= prompts(exact, 8)["all"] - 1 / 8


def test_previews_and_latents_in_float16() -> None:
    pipe = KleinPipeline.from_pretrained("tiny", dtype="float16", keep="all")
    step = next(iter(pipe.stream("a red circle", seed=7)))
    assert step.latents.dtype == mx.float16  # type: ignore[union-attr]
    assert isinstance(step.preview(), Image.Image)  # type: ignore[union-attr]
