"""What the transformer attends to: its order and places, and that it holds nothing that made it."""

import gc

import mlx.core as mx

from klein_mlx import KleinPipeline
from klein_mlx.model.sampler import all_ids, join_references
from klein_mlx.runtime.encodings import encode_prompt
from klein_mlx.weights.checkpoint import load_part, part_bytes


def test_embeddings_do_not_keep_the_encoder_alive() -> None:
    """A lazy result would: once the encoder is deleted, only the embeddings are left of it."""
    pipe = KleinPipeline.from_pretrained("tiny", keep="nothing")
    tokens = pipe.tokenizer(["a red circle"], pipe.config.max_sequence_length)
    mx.eval(tokens.input_ids, tokens.attention_mask)
    gc.collect()
    start = mx.get_active_memory()
    encoder = load_part("text_encoder", pipe.source, mx.float32)
    mx.eval(encoder.parameters())
    embeds = encode_prompt(encoder, tokens, 0)  # type: ignore[arg-type]
    del encoder
    gc.collect()
    held = mx.get_active_memory() - start
    assert held < embeds.nbytes + 0.1 * part_bytes("text_encoder", pipe.source, mx.float32)


def test_references_follow_the_image_at_their_own_times() -> None:
    first, second = mx.zeros((1, 2, 3, 8)), mx.ones((1, 1, 2, 8))
    references = join_references([first, second])
    assert references is not None
    assert references.tokens.shape == (1, 8, 8)
    assert references.tokens[0, :, 0].tolist() == [0.0] * 6 + [1.0] * 2
    ids = all_ids(4, 1, 2, references).tolist()
    assert [row[0] for row in ids] == [0] * 6 + [10] * 6 + [20] * 2  # type: ignore[index]
    assert ids[:4] == [[0, 0, 0, i] for i in range(4)]  # type: ignore[index]
    assert join_references([]) is None
