"""What klein 4B would cost on a Mac's GPU, as numbers that must not grow: kernels, FLOPs, bytes outside of matmuls.

The limits leave next to nothing: a change that adds a kernel to each block, or a cast to each linear layer, fails.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest

from klein_mlx.bench.cost import Cost, trace
from klein_mlx.bench.predict import klein
from klein_mlx.config import TextEncoderConfig, TransformerConfig, VAEConfig
from klein_mlx.model.layers import Gpu, place
from klein_mlx.model.sampler import image_ids, text_ids
from klein_mlx.model.text_encoder import TextEncoder
from klein_mlx.model.transformer import Modulation, Modulations, Transformer, rope_tables
from klein_mlx.model.vae import VAE, Conv, GroupNorm, strip_rows
from klein_mlx.runtime.memory import Work, encoder_bytes, step_bytes, vae_bytes
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


def encode(chains: bool = True, bits: int | None = None, device: Gpu | None = None) -> Cost:
    encoder = TextEncoder(TextEncoderConfig(151936, 2560, 9728, 36, 32, 8, 128), (9, 18, 27))
    if bits:
        prepare(encoder, "text_encoder", Quantization(bits))
    encoder.set_dtype(mx.bfloat16)
    place(encoder, device or Gpu())
    encoder.arrange()
    ids, mask = mx.zeros((1, 512), mx.int32), mx.ones((1, 512), mx.bool_)
    return trace(encoder, encoder, ids, mask, chains=chains)


@pytest.mark.parametrize(("chains", "kernels"), [(True, 386), (False, 440)])
def test_the_text_encoder(chains: bool, kernels: int) -> None:
    cost = encode(chains=chains)
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


def vae_cost(what: str, side: int, device: Gpu | None = None) -> Cost:
    """A square picture in one piece."""
    vae = VAE(VAEConfig((128, 256, 512, 512), 2, 32))
    vae.set_dtype(mx.bfloat16)
    place(vae, device or Gpu())
    vae.arrange()
    x = mx.zeros((1, side // 8, side // 8, 32) if what == "decode" else (1, side, side, 3), mx.bfloat16)
    return trace(vae, getattr(vae, what), x)


@pytest.mark.parametrize(("what", "tera", "kernels", "giga"), [("decode", 8.936, 996, 34), ("encode", 4.89, 670, 22)])
def test_the_vae(what: str, tera: float, kernels: int, giga: float) -> None:
    """1024 x 1024 in one piece. Nothing is copied but what Downsample pads."""
    cost = vae_cost(what, 1024)
    assert cost.flops == pytest.approx(tera * 1e12, rel=0.001)
    assert cost.total <= kernels, cost.counts
    assert cost.traffic <= giga * 1e9, cost.counts
    assert not cost.copies


# ---- what a GPU's memory is estimated to be, against what is alive in the graph ----


@pytest.mark.parametrize(
    ("side", "references", "bits", "device"),
    [
        (16, 0, None, Gpu()),
        (64, 0, None, Gpu()),
        (64, 1, None, Gpu()),
        (64, 0, 4, Gpu(dense_from=0)),
        (96, 0, None, Gpu(rows=4096)),
    ],
)
def test_a_step_takes_what_is_estimated(side: int, references: int, bits: int | None, device: Gpu) -> None:
    """The estimate holds the graph's inputs and the rotary tables as well, and what the block before has left."""
    alive = step(references, bits, side=side, device=device).live
    work = Work(16 * side, 16 * side, tokens=references * side**2)
    assert alive <= step_bytes(klein("4b"), work, mx.bfloat16, bool(bits), device) <= 1.4 * alive


@pytest.mark.parametrize(("bits", "device"), [(None, Gpu()), (4, Gpu(dense_from=0))])
def test_encoding_takes_what_is_estimated(bits: int | None, device: Gpu) -> None:
    alive = encode(bits=bits, device=device).live
    assert 1.1 * alive <= encoder_bytes(klein("4b"), Work(1024, 1024), mx.bfloat16, bool(bits), device) <= 1.45 * alive


@pytest.mark.parametrize("what", ["decode", "encode"])
@pytest.mark.parametrize("conv", ["direct", "matmul"])
def test_a_picture_in_one_piece_takes_what_is_estimated(what: str, conv: str) -> None:
    device = Gpu(conv=conv)
    alive = vae_cost(what, 512, device).live
    assert alive <= vae_bytes(klein("4b").vae, 512, 512, mx.bfloat16, what == "encode", device) <= 1.5 * alive


@pytest.mark.parametrize(("side", "share"), [(1024, 0.3), (2048, 0.1)])
@pytest.mark.parametrize("conv", ["direct", "matmul"])
def test_two_strips_are_alive_and_small(conv: str, side: int, share: float) -> None:
    """Beside a resnet's input of 256 channels, its middle and its result of 128: those of the decoder's last level."""
    device, whole = Gpu(conv=conv), 2 * side**2 * (256 + 128 + 128)
    rows = strip_rows(device, side, side)
    assert rows
    layer, norm = Conv(256, 128), GroupNorm(32, 256)
    layer.set_dtype(mx.bfloat16)
    layer.arrange()
    place(layer, device)
    affine = mx.zeros((1, 1, 1, 256)), mx.zeros((1, 1, 1, 256))

    def strip(x: mx.array, residual: mx.array) -> mx.array:
        norm.affine = lambda *_: affine  # type: ignore[method-assign]
        return residual + layer(norm(x, activate=True))

    place(norm, device)
    shapes = [(1, rows, side, channels) for channels in (256, 128)]
    alive = trace(layer, strip, *(mx.zeros(shape, mx.bfloat16) for shape in shapes)).live
    strips = vae_bytes(klein("4b").vae, side, side, mx.bfloat16, False, device) - whole
    assert 2 * alive <= strips <= 3 * alive
    assert strips <= (2.75 if conv == "matmul" else 1) * share * whole
