"""What klein 4B would cost on a Mac's GPU, as numbers that must not grow: kernels, FLOPs, bytes outside of matmuls.

The limits leave next to nothing: a change that adds a kernel to each block, or a cast to each linear layer, fails.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest

from klein_mlx.bench.cost import Cost, trace
from klein_mlx.config import TextEncoderConfig, TransformerConfig, VAEConfig
from klein_mlx.model.layers import Gpu, place
from klein_mlx.model.rope import rope_tables
from klein_mlx.model.sampler import image_ids, text_ids
from klein_mlx.model.text_encoder import TextEncoder
from klein_mlx.model.transformer import Modulation, Modulations, Transformer
from klein_mlx.model.vae import VAE
from klein_mlx.weights.quantize import Quantization, prepare

CONFIG = TransformerConfig(128, 5, 20, 128, 24, 7680, 3.0, (32, 32, 32, 32))


def modulations() -> Modulations:
    def vector() -> mx.array:
        return mx.zeros((CONFIG.hidden_size,), mx.bfloat16)

    def modulation() -> Modulation:
        return Modulation(vector(), vector(), vector())

    pairs = [(modulation(), modulation()) for _ in range(2)]
    return Modulations(pairs[0], pairs[1], modulation(), (vector(), vector()))


def step(
    references: int = 0, bits: int | None = None, chains: bool = True, side: int = 64, device: Gpu | None = None
) -> Cost:
    """One denoising step at 1024 x 1024, or `side` tokens a side, with references of the same size."""
    model = Transformer(CONFIG)
    if bits:
        prepare(model, "transformer", Quantization(bits))
    model.set_dtype(mx.bfloat16)
    place(model, device or Gpu())
    model.arrange()
    ids = [text_ids(512), *(image_ids(side, side, 10 * k) for k in range(references + 1))]
    rope = rope_tables(mx.concatenate(ids), CONFIG.axes_dims_rope, CONFIG.rope_theta, 512)
    mods = modulations()
    mx.eval(rope, mods)

    def velocity(tokens: mx.array, txt: mx.array) -> mx.array:
        return model(tokens, txt, mods, rope, side**2)

    tokens = mx.zeros((1, side**2 * (references + 1), 128), mx.bfloat16)
    return trace(model, velocity, tokens, mx.zeros((1, 512, CONFIG.hidden_size), mx.bfloat16), chains=chains)


# What runs in all blocks over all tokens, less what nobody reads of the last one: queries, MLP and projection of text
# and references. Attention of more than about 10^12 FLOP goes in pieces: one attention and one copy more for each.
@pytest.mark.parametrize(
    ("side", "references", "tera", "kernels", "giga"),
    [
        (16, 0, 4.79, 344, 2.9),
        (64, 0, 34.67, 344, 17.4),
        (64, 1, 75.3, 344, 32.5),
        (64, 2, 125.8, 464, 51.3),
        (96, 0, 88.7, 419, 39.8),
        (128, 0, 191.3, 519, 69.1),
    ],
)
def test_the_step(side: int, references: int, tera: float, kernels: int, giga: float) -> None:
    cost = step(references, side=side)
    assert 0.998 * tera * 1e12 < cost.flops <= tera * 1e12
    assert cost.total <= kernels, cost.counts
    assert cost.traffic <= giga * 1e9, cost.counts
    assert not cost.copies


def test_the_4_bit_step() -> None:
    """Quantised matmuls in place of matmuls, and nothing else: one more array is read per single block, where a matmul
    would have added to another's result."""
    cost, plain = step(bits=4), step()
    assert cost.flops == plain.flops
    assert cost.total == plain.total
    assert cost.traffic <= 18.1e9, cost.counts


@pytest.mark.parametrize(("bits", "kernels"), [(None, 636), (4, 656)])
def test_the_step_without_fused_chains(bits: int | None, kernels: int) -> None:
    """At 4 bits 20 more: there is no quantised matmul that adds to another's result."""
    cost = step(bits=bits, chains=False)
    assert cost.total <= kernels, cost.counts
    assert cost.traffic <= 65e9, cost.counts


@pytest.mark.parametrize(("chains", "kernels"), [(True, 386), (False, 440)])
def test_the_text_encoder(chains: bool, kernels: int) -> None:
    encoder = TextEncoder(TextEncoderConfig(151936, 2560, 9728, 36, 32, 8, 128), (9, 18, 27))
    encoder.set_dtype(mx.bfloat16)
    place(encoder, Gpu())
    encoder.arrange()
    ids, mask = mx.zeros((1, 512), mx.int32), mx.ones((1, 512), mx.bool_)
    cost = trace(encoder, encoder, ids, mask, chains=chains)
    assert cost.flops == pytest.approx(2.85e12, rel=0.02)
    assert cost.total <= kernels, cost.counts


def test_nothing_is_left_replaced() -> None:
    """After a trace, also one that fails, the operations are the real ones and the module has its weights."""
    real = mx.fast.rms_norm, mx.fast.layer_norm
    layer = nn.Linear(4, 4, bias=False)
    weight = layer.weight

    def fail(x: mx.array) -> mx.array:
        raise RuntimeError("inside")

    cost = trace(layer, lambda x: mx.fast.rms_norm(layer(x), None, 1e-6), mx.zeros((3, 4)))
    with pytest.raises(RuntimeError, match="inside"):
        trace(layer, fail, mx.zeros((3, 4)))
    assert (mx.fast.rms_norm, mx.fast.layer_norm) == real
    assert layer.weight is weight
    assert cost.counts == {"Matmul": 1, "rms_norm": 1}
    assert cost.flops == 2 * 3 * 4 * 4


def test_copies_that_strides_force() -> None:
    """Each where Metal's kernels need their input otherwise than it lies, and none where they do not."""

    def copies(function: Callable[[mx.array], mx.array], *shape: int) -> dict[str, int]:
        return dict(trace(nn.Module(), function, mx.zeros(shape)).copies)

    weight = mx.zeros((8, 3, 3, 16))
    assert copies(lambda x: x.transpose(0, 2, 1, 3).reshape(2, 6, 20) + 1, 2, 5, 6, 4) == {"reshape": 1}
    assert copies(lambda x: x.reshape(2, 30, 4) + 1, 2, 5, 6, 4) == {}
    assert copies(lambda x: mx.fast.rms_norm(x[..., :4], None, 1e-6), 3, 8) == {"norm": 1}
    assert copies(lambda x: mx.fast.rms_norm(x[:2], None, 1e-6), 3, 8) == {}
    assert copies(lambda x: mx.conv2d(x[:, :, 1:-1], weight), 1, 6, 6, 16) == {"convolution": 1}
    assert copies(lambda x: mx.conv2d(x[:, 1:-1], weight), 1, 6, 6, 16) == {}
    assert copies(lambda x: x[:, ::2] @ mx.zeros((4, 3)), 5, 8) == {"matmul": 1}
    assert copies(lambda x: x[:, :4] @ mx.zeros((4, 3)), 5, 8) == {}
    assert copies(lambda x: mx.as_strided(x, (4, 6), (2, 1)) @ mx.zeros((6, 3)), 12) == {}  # rows that overlap


def test_what_is_alive_at_once() -> None:
    """In the order in which a graph is evaluated; elementwise kernels write over what nobody reads later."""
    size = 4 * 10 * 10
    product = lambda x: x @ x  # noqa: E731
    for function, arrays in (
        (product, 1),
        (lambda x: (x @ x) + 1, 1),
        (lambda x: product(product(x)), 2),
        (lambda x: mx.concatenate([x @ x, x @ x.T], axis=0)[:10], 4),
        (lambda x: (y := x @ x) + y.T @ y, 2),
    ):
        assert trace(nn.Module(), function, mx.zeros((10, 10))).live == arrays * size


def test_convolutions_and_attention_with_wide_heads() -> None:
    conv = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    cost = trace(conv, conv, mx.zeros((1, 10, 12, 8), mx.float16))
    assert cost.flops == 2 * 10 * 12 * 16 * 9 * 8
    q = mx.zeros((1, 1, 64, 512), mx.float16)
    cost = trace(nn.Module(), lambda q: mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0), q)
    assert cost.flops == 4 * 64 * 64 * 512
    assert cost.traffic == 2 * 2 * 64 * 64  # the softmax reads and writes the scores


@pytest.mark.parametrize(("what", "tera", "kernels", "giga"), [("decode", 8.936, 996, 34), ("encode", 4.89, 670, 22)])
def test_the_vae(what: str, tera: float, kernels: int, giga: float) -> None:
    """1024 x 1024 in one piece. Nothing is copied but what Downsample pads."""
    vae = VAE(VAEConfig((128, 256, 512, 512), 2, 32))
    vae.set_dtype(mx.bfloat16)
    place(vae, Gpu())
    vae.arrange()
    x = mx.zeros((1, 128, 128, 32) if what == "decode" else (1, 1024, 1024, 3), mx.bfloat16)
    cost = trace(vae, getattr(vae, what), x)
    assert cost.flops == pytest.approx(tera * 1e12, rel=0.001)
    assert cost.total <= kernels, cost.counts
    assert cost.traffic <= giga * 1e9, cost.counts
    assert not cost.copies
