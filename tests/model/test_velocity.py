"""What all steps, and all pictures of a run, share is computed once; one by one it would be the same."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from klein_mlx import KleinPipeline
from klein_mlx.config import TransformerConfig
from klein_mlx.model import velocity as module
from klein_mlx.model.transformer import Transformer
from klein_mlx.model.velocity import Tables

CONFIG = TransformerConfig(16, 1, 1, 32, 2, 48, 3.0, (8, 8, 8, 8))


def counted(calls: list[str], name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        calls.append(name)
        return original(*args)

    return call


def test_tables_are_made_once_per_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pictures of two steps each: one set of modulations, one rotary table, a text per picture."""
    calls: list[str] = []
    for name in ("all_modulations", "embed_text"):
        monkeypatch.setattr(Transformer, name, counted(calls, name, getattr(Transformer, name)))
    monkeypatch.setattr(module, "rope_tables", counted(calls, "rope_tables", module.rope_tables))
    pipe = KleinPipeline.from_pretrained("tiny", keep="nothing")
    pipe(["a red circle", "a blue square"], seed=1, num_inference_steps=2, output_type="latent")
    assert sorted(calls) == ["all_modulations", "embed_text", "embed_text", "rope_tables"]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_modulations_of_all_steps_are_those_of_each(dtype: mx.Dtype) -> None:
    """To the rounding of sums: a matmul of several rows may add in another order."""
    mx.random.seed(0)
    transformer = Transformer(CONFIG)
    transformer.set_dtype(dtype)
    sigmas = (1.0, 0.9, 0.31)
    tables = Tables(transformer, None, (2, 2), sigmas, dtype, still=True)
    for sigma in (*sigmas, 0.0):
        alone, shared = transformer.modulations(sigma, dtype), tables.modulations(sigma)
        pairs: list[tuple[Any, Any]] = list(zip(tree_flatten(alone), tree_flatten(shared), strict=True))
        for (_, one), (_, other) in pairs:
            assert one.dtype == other.dtype == dtype
            assert mx.allclose(one, other, rtol=0, atol=1e-5 if dtype == mx.float32 else 2**-7)


def test_tables_hold_no_weights() -> None:
    transformer = Transformer(CONFIG)
    mx.eval(transformer.parameters())
    tables = Tables(transformer, None, (2, 2), (0.9,), mx.float32)
    weights = sum(array.nbytes for _, array in tree_flatten(transformer.parameters()))  # type: ignore[union-attr]
    before = mx.get_active_memory()
    del transformer
    assert before - mx.get_active_memory() > 0.99 * weights
    assert tables.modulations(0.9).single.shift.shape == (CONFIG.hidden_size,)
