"""The transformer's own properties, without a reference at hand; the goldens compare it with diffusers."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from klein_mlx.config import TransformerConfig
from klein_mlx.model.branched import Branched
from klein_mlx.model.layers import here, swiglu
from klein_mlx.model.sampler import image_ids, text_ids
from klein_mlx.model.transformer import (
    Modulation,
    Rope,
    Transformer,
    attend,
    normed_and_rotated,
    rope_tables,
    timestep_embedding,
)
from klein_mlx.weights.quantize import Quantization, prepare

CONFIG = TransformerConfig(16, 1, 2, 32, 2, 48, 3.0, (8, 8, 8, 8))


def model(seed: int = 0) -> Transformer:
    mx.random.seed(seed)
    transformer = Transformer(CONFIG)
    mx.eval(transformer.parameters())
    return transformer


def velocity(transformer: Transformer, tokens: mx.array, txt: mx.array, ids: mx.array, sigma: float = 0.7) -> mx.array:
    rope = rope_tables(ids, CONFIG.axes_dims_rope, CONFIG.rope_theta, 5)
    modulations = transformer.modulations(sigma, tokens.dtype)
    return transformer(tokens, transformer.embed_text(txt), modulations, rope, tokens.shape[1])


def unit(x: mx.array) -> mx.array:
    """With a mean square of one: RMSNorm leaves it as it is."""
    return x * mx.rsqrt(mx.square(x).mean(-1, keepdims=True))


def turned(x: mx.array, rope: Rope) -> mx.array:
    """x: (1, 1, 1, 32), a `unit` head of one token."""
    return normed_and_rotated(here(), mx.stack([x, x], axis=2), mx.ones((2, 32)), rope, 0.0)[:, :, 1]


def test_rope_turns_neighbouring_pairs_by_position_times_frequency() -> None:
    """Against complex numbers, one token and one pair at a time."""
    ids = mx.array([[3, 5, 7, 11]])
    x = unit(mx.random.normal((1, 1, 1, 32)))
    found = np.array(turned(x, rope_tables(ids, (8, 8, 8, 8), 2000.0, 0)))[0, 0, 0]
    plain = np.array(x, dtype=np.float64)[0, 0, 0]
    for pair in range(16):
        axis, k = divmod(pair, 4)
        angle = ids[0, axis].item() * 2000.0 ** (-2 * k / 8)
        wanted = (plain[2 * pair] + 1j * plain[2 * pair + 1]) * np.exp(1j * angle)
        assert found[2 * pair] == pytest.approx(wanted.real, abs=1e-6)
        assert found[2 * pair + 1] == pytest.approx(wanted.imag, abs=1e-6)


def test_rope_keeps_lengths_and_only_sees_differences() -> None:
    q, k = unit(mx.random.normal((2, 1, 1, 1, 32)))
    near = rope_tables(mx.array([[0, 2, 3, 0]]), (8, 8, 8, 8), 2000.0, 0)
    far = rope_tables(mx.array([[0, 12, 23, 0]]), (8, 8, 8, 8), 2000.0, 0)
    base = rope_tables(mx.array([[0, 10, 20, 0]]), (8, 8, 8, 8), 2000.0, 0)
    zero = rope_tables(mx.array([[0, 0, 0, 0]]), (8, 8, 8, 8), 2000.0, 0)
    first = (turned(q, near) * turned(k, zero)).sum().item()
    second = (turned(q, far) * turned(k, base)).sum().item()
    assert first == pytest.approx(second, abs=1e-4)
    assert mx.abs(mx.linalg.norm(turned(q, far)) - mx.linalg.norm(q)).item() < 1e-5


def test_long_attention_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few queries at a time: the same numbers, to the order of sums."""
    q, k, v = mx.random.normal((3, 2, 10, 3, 8))
    whole = attend(here(), q, k, v)
    monkeypatch.setattr("klein_mlx.model.transformer.LONGEST_ATTENTION", 4 * (4 * 2 * 3 * 10 * 8))
    calls, real = [], mx.fast.scaled_dot_product_attention

    def counted(q: mx.array, *args: mx.array, **named: Any) -> mx.array:
        calls.append(q.shape[2])
        return real(q, *args, **named)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", counted)
    assert mx.allclose(attend(here(), q, k, v), whole, atol=1e-6)
    assert calls == [4, 4, 2]


@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_the_last_block_only_makes_what_is_read(bits: int | None, branch: bool) -> None:
    """Text and references have no queries, MLP and projection there; nobody reads them. To 1e-5: BLAS orders sums by
    the size of a matmul.
    """
    mx.random.seed(0)
    config = TransformerConfig(16, 1, 1, 64, 2, 48, 3.0, (16, 16, 16, 16))
    transformer = Transformer(config)
    if bits:
        prepare(transformer, "transformer", Quantization(bits))
    transformer.arrange()
    block: Any = transformer.single_blocks[0]
    if branch:
        beside = Branched(block.linear_in)
        beside.up, beside.down = 0.1 * mx.random.normal((9 * 128, 4)), 0.1 * mx.random.normal((4, 128))
        block.linear_in = beside
    ids = mx.concatenate([text_ids(16), image_ids(8, 4), image_ids(4, 4, 10)])
    rope = rope_tables(ids, config.axes_dims_rope, config.rope_theta, 16)
    x, mod = mx.random.normal((1, 64, 128)), Modulation(*mx.random.normal((3, 128)))
    extra = tuple(mx.random.normal((2, 1, 16, 2, 64)))
    for more in (None, extra):
        whole, keys_values = block(x, mod, rope, more)
        part, others = block(x, mod, rope, more, (16, 48))
        assert mx.abs(part - whole[:, 16:48]).max() < 1e-5 * mx.abs(whole).max()
        assert all(mx.allclose(*pair, rtol=1e-5, atol=1e-5) for pair in zip(keys_values, others, strict=True))


def test_timestep_embedding_has_cosines_first() -> None:
    embedded = timestep_embedding(mx.array([700.0]), 8)[0].tolist()
    frequencies = [10000 ** (-i / 4) for i in range(4)]
    assert embedded[:4] == pytest.approx([math.cos(700 * f) for f in frequencies], abs=1e-4)
    assert embedded[4:] == pytest.approx([math.sin(700 * f) for f in frequencies], abs=1e-4)


def test_the_gate_is_the_first_half() -> None:
    assert swiglu.plain(mx.array(2.0), mx.array(3.0)).item() == pytest.approx(3 * 2 / (1 + math.exp(-2)))


def test_image_tokens_may_come_in_any_order_with_their_ids() -> None:
    """Only ids say where a token is: a permutation of tokens and ids permutes the velocity."""
    transformer = model()
    tokens, txt = mx.random.normal((1, 12, 16)), mx.random.normal((1, 5, 48))
    order = mx.array(np.random.default_rng(0).permutation(12))
    ids = image_ids(3, 4)
    straight = velocity(transformer, tokens, txt, mx.concatenate([text_ids(5), ids]))
    mixed = velocity(transformer, tokens[:, order], txt, mx.concatenate([text_ids(5), ids[order]]))
    assert mx.abs(straight[:, order] - mixed).max().item() < 1e-5 * mx.abs(straight).max().item()


def test_references_change_the_velocity_but_have_none() -> None:
    transformer = model()
    tokens, txt, ref = mx.random.normal((1, 12, 16)), mx.random.normal((1, 5, 48)), mx.random.normal((1, 6, 16))
    ids = mx.concatenate([text_ids(5), image_ids(3, 4), image_ids(2, 3, t=10)])
    rope = rope_tables(ids, CONFIG.axes_dims_rope, CONFIG.rope_theta, 5)
    modulations = transformer.modulations(0.7, mx.float32)
    edited = transformer(mx.concatenate([tokens, ref], axis=1), transformer.embed_text(txt), modulations, rope, 12)
    assert edited.shape == (1, 12, 16)
    alone = velocity(transformer, tokens, txt, ids[:17])
    assert mx.abs(edited - alone).max().item() > 1e-3 * mx.abs(alone).max().item()


def test_a_batch_is_its_rows() -> None:
    transformer = model()
    tokens, txt = mx.random.normal((2, 12, 16)), mx.random.normal((2, 5, 48))
    ids = mx.concatenate([text_ids(5), image_ids(3, 4)])
    both = velocity(transformer, tokens, txt, ids)
    for row in range(2):
        alone = velocity(transformer, tokens[row : row + 1], txt[row : row + 1], ids)
        assert mx.abs(both[row] - alone[0]).max().item() < 1e-5 * mx.abs(alone).max().item()


def test_the_timestep_is_rounded_in_bfloat16_as_in_the_reference() -> None:
    """701.4 is 700 in bfloat16 (steps of 4): both noise levels give the same modulations there, and not in float32."""
    transformer = model()
    for dtype, same in ((mx.bfloat16, True), (mx.float32, False)):
        transformer.set_dtype(dtype)
        first, second = (transformer.modulations(sigma, dtype).single.shift for sigma in (0.7014, 0.7))
        assert mx.array_equal(first, second).item() is same
        assert first.dtype == dtype


def test_bfloat16_stays_bfloat16() -> None:
    transformer = model()
    transformer.set_dtype(mx.bfloat16)
    tokens, txt = mx.zeros((1, 12, 16), mx.bfloat16), mx.zeros((1, 5, 48), mx.bfloat16)
    ids = mx.concatenate([text_ids(5), image_ids(3, 4)])
    assert velocity(transformer, tokens, txt, ids).dtype == mx.bfloat16
