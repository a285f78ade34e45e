"""Encoders of other depths: the pipeline's own choice of layers, through transformers' classes."""

from pathlib import Path

import mlx.core as mx
import pytest
from folders import copy_model, deepen
from lora_runs import difference

from klein_mlx.formats.open import open_model
from klein_mlx.pipeline import KleinPipeline

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("layers", [28, 30, 32, 36])
def test_the_embeddings_of_an_encoder_of_another_depth(layers: int, tmp_path: Path) -> None:
    """diffusers is asked without naming layers. Float32 on both sides, some 30 layers: rounding alone."""
    import torch
    from parity_reference import load

    folder = copy_model(tmp_path / "model")
    deepen(folder, layers)
    with torch.no_grad():
        right, _ = load(folder).encode_prompt("a fox", max_sequence_length=20)
    pipe = KleinPipeline(open_model(folder), dtype="float32")
    found = pipe.encodings.of_prompt(pipe.stream("a fox", seed=0, max_sequence_length=20), "a fox")
    assert difference(found, mx.array(right.numpy())) < 1e-4
