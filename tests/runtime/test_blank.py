"""A picture that is none is refused in the stage in which it went wrong."""

from pathlib import Path

import mlx.core as mx
import pytest
from folders import copy_model, edit_weights, refusal

from klein_mlx import KleinPipeline
from klein_mlx.formats.open import open_model


@pytest.mark.parametrize(
    ("part", "name", "factor", "words"),
    [
        ("vae", "decoder.conv_out.weight", 0.0, "all of the picture's numbers are"),
        ("vae", "decoder.conv_out.weight", 3e38, "the picture was decoded to NaN or infinity"),
        ("text_encoder", "model.layers.0.self_attn.o_proj.weight", 3e38, "the prompt was encoded to NaN or infinity"),
    ],
)
def test_weights_that_make_no_picture(tmp_path: Path, part: str, name: str, factor: float, words: str) -> None:
    folder = copy_model(tmp_path / "model")

    def damage(weights: dict[str, mx.array]) -> None:
        for each in (name, name.replace("weight", "bias")):
            if each in weights:
                weights[each] = mx.full(weights[each].shape, factor, weights[each].dtype)

    edit_weights(folder, part, damage)
    pipe = KleinPipeline(open_model(folder), dtype="float32")
    arguments = {"seed": 1, "num_inference_steps": 1, "width": 64, "height": 64, "max_sequence_length": 16}
    assert words in refusal(lambda: pipe("a fox", **arguments))
