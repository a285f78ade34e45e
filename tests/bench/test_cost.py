"""What klein 4B would cost on a Mac's GPU, as numbers that must not grow: kernels, FLOPs, bytes outside of matmuls.

The limits leave next to nothing: a change that adds a kernel to each block, or a cast to each linear layer, fails.
"""

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import pytest

from klein_mlx.bench.cost import Cost, trace
from klein_mlx.config import TextEncoderConfig, TransformerConfig, VAEConfig
from klein_mlx.model.latents import image_ids, text_ids
from klein_mlx.model.layers import matmul_policy
from klein_mlx.model.rope import rope_tables
from klein_mlx.model.text_encoder import TextEncoder
from klein_mlx.model.transformer import Modulation, Modulations, Transformer
from klein_mlx.model.vae import VAE
from klein_mlx.weights.quantize import Quantization, prepare

CONFIG = TransformerConfig(128, 5, 20, 128, 24, 7680, 3.0, (32, 32, 32, 32))


@pytest.fixture(autouse=True)
def _as_on_a_gpu() -> Iterator[None]:
    with matmul_policy("direct"):
        yield


def modulations() -> Modulations:
    def vector() -> mx.array:
        return mx.zeros((CONFIG.hidden_size,), mx.bfloat16)

    def modulation() -> Modulation:
        return Modulation(vector(), vector(), vector())

    pairs = [(modulation(), modulation()) for _ in range(2)]
    return Modulations(pairs[0], pairs[1], modulation(), (vector(), vector()))


def step(references: int = 0, bits: int | None = None, chains: bool = True) -> Cost:
    """One denoising step at 1024 x 1024, with references of the same size."""
    model = Transformer(CONFIG)
    if bits:
        prepare(model, "transformer", Quantization(bits))
    model.set_dtype(mx.bfloat16)
    model.arrange()
    ids = [text_ids(512), *(image_ids(64, 64, 10 * k) for k in range(references + 1))]
    rope = rope_tables(mx.concatenate(ids), CONFIG.axes_dims_rope, CONFIG.rope_theta, 512)
    mods = modulations()
    mx.eval(rope, mods)

    def velocity(tokens: mx.array, txt: mx.array) -> mx.array:
        return model(tokens, txt, mods, rope, 4096)

    tokens = mx.zeros((1, 4096 * (references + 1), 128), mx.bfloat16)
    return trace(model, velocity, tokens, mx.zeros((1, 512, CONFIG.hidden_size), mx.bfloat16), chains=chains)


def test_the_step() -> None:
    cost = step()
    assert cost.flops == pytest.approx(34.82e12, rel=0.005)
    assert cost.total <= 345, cost.counts
    assert cost.traffic <= 17.5e9, cost.counts


def test_the_step_with_a_reference() -> None:
    cost = step(references=1)
    assert cost.flops == pytest.approx(76.70e12, rel=0.01)
    assert cost.total <= 345, cost.counts
    assert cost.traffic <= 17.5e9 * (512 + 8192) / (512 + 4096), cost.counts


def test_the_4_bit_step() -> None:
    """Quantised matmuls in place of matmuls, and nothing else: one more array is read per single block, where a matmul
    would have added to another's result."""
    cost, plain = step(bits=4), step()
    assert cost.flops == plain.flops
    assert cost.total == plain.total
    assert cost.traffic <= 18.1e9, cost.counts


@pytest.mark.parametrize(("bits", "kernels"), [(None, 620), (4, 640)])
def test_the_step_without_fused_chains(bits: int | None, kernels: int) -> None:
    """At 4 bits 20 more: there is no quantised matmul that adds to another's result."""
    cost = step(bits=bits, chains=False)
    assert cost.total <= kernels, cost.counts
    assert cost.traffic <= 65e9, cost.counts


@pytest.mark.parametrize(("chains", "kernels"), [(True, 386), (False, 440)])
def test_the_text_encoder(chains: bool, kernels: int) -> None:
    encoder = TextEncoder(TextEncoderConfig(151936, 2560, 9728, 36, 32, 8, 128), (9, 18, 27))
    encoder.set_dtype(mx.bfloat16)
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


def test_convolutions_and_attention_with_wide_heads() -> None:
    conv = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    cost = trace(conv, conv, mx.zeros((1, 10, 12, 8), mx.float16))
    assert cost.flops == 2 * 10 * 12 * 16 * 9 * 8
    q = mx.zeros((1, 1, 64, 512), mx.float16)
    cost = trace(nn.Module(), lambda q: mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0), q)
    assert cost.flops == 4 * 64 * 64 * 512
    assert cost.traffic == 2 * 2 * 64 * 64  # the softmax reads and writes the scores


@pytest.mark.parametrize(("what", "tera", "kernels", "giga"), [("decode", 10.48, 900, 34), ("encode", 4.89, 670, 22)])
def test_the_vae(what: str, tera: float, kernels: int, giga: float) -> None:
    """1024 x 1024 in one piece. The decoder's three enlargements are written out, once each."""
    vae = VAE(VAEConfig((128, 256, 512, 512), 2, 32))
    vae.set_dtype(mx.bfloat16)
    vae.arrange()
    x = mx.zeros((1, 128, 128, 32) if what == "decode" else (1, 1024, 1024, 3), mx.bfloat16)
    cost = trace(vae, getattr(vae, what), x)
    assert cost.flops == pytest.approx(tera * 1e12, rel=0.005)
    assert cost.total <= kernels, cost.counts
    assert cost.traffic <= giga * 1e9, cost.counts
