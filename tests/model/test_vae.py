"""The VAE's own properties; the goldens compare it with diffusers."""

import math

import mlx.core as mx
import mlx.nn as nn
import pytest

from klein_mlx.config import VAEConfig
from klein_mlx.model.vae import EPS, VAE, Attention, GroupNorm

CONFIG = VAEConfig((16, 16, 32, 32), 1, 8, norm_num_groups=4)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_group_norm_equals_mlx(offset: float) -> None:
    """Against mlx.nn's, also where the mean is much larger than the spread."""
    x = mx.random.normal((2, 5, 7, 16)) * 3 + offset
    ours, theirs = GroupNorm(4, 16), nn.GroupNorm(4, 16, eps=EPS, pytorch_compatible=True)
    ours.weight = theirs.weight = mx.random.normal((16,))
    ours.bias = theirs.bias = mx.random.normal((16,))
    assert mx.allclose(ours(x), theirs(x), atol=1e-4)
    assert mx.allclose(ours(x, activate=True), nn.silu(theirs(x)), atol=1e-4)


def test_attention_in_rows_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking the queries a few at a time changes nothing."""
    attention = Attention(16, 4)
    x = mx.random.normal((1, 6, 5, 16))
    whole = attention(x)
    monkeypatch.setattr("klein_mlx.model.vae.SCORES", 30 * 7)
    assert mx.allclose(attention(x), whole, atol=1e-6)


def test_shapes() -> None:
    vae = VAE(CONFIG)
    z = vae.encode(mx.zeros((2, 48, 80, 3)))
    assert z.shape == (2, 6, 10, 8)
    assert vae.decode(z).shape == (2, 48, 80, 3)


def test_latent_statistics_with_their_own_eps() -> None:
    vae = VAE(CONFIG)
    vae.latent_mean = mx.arange(32, dtype=mx.float32)
    vae.latent_var = mx.zeros((32,))
    latents = mx.random.normal((1, 2, 3, 32))
    assert mx.allclose(vae.denormalize(latents), latents * 0.01 + vae.latent_mean, atol=1e-5)  # sqrt(1e-4)
    assert mx.allclose(vae.normalize(vae.denormalize(latents)), latents, atol=1e-2)
    assert vae.normalize(latents.astype(mx.bfloat16)).dtype == mx.bfloat16


def test_parts_that_a_config_leaves_out() -> None:
    bare = VAE(
        VAEConfig((16, 32), 1, 4, 4, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False)
    )
    assert "attention" not in bare.encoder.mid
    assert bare.decode(bare.encode(mx.zeros((1, 16, 16, 3)))).shape == (1, 16, 16, 3)


def test_a_smaller_decoder_has_its_own_channels() -> None:
    small = VAE(VAEConfig((16, 16, 32, 32), 1, 8, 4, decoder_block_out_channels=(8, 8, 16, 16)))
    assert small.decoder.conv_in.weight.shape[0] == 16
    assert small.encoder.conv_out.weight.shape[-1] == 32
    assert small.decode(mx.zeros((1, 2, 2, 8))).shape == (1, 16, 16, 3)


@pytest.mark.parametrize("rows", [1, 5, 16, 1000])
def test_strips_change_nothing(rows: int) -> None:
    """Every height of strip, also ones that do not divide the picture, gives the picture of one piece."""
    mx.random.seed(0)
    vae = VAE(CONFIG)
    z, pixels = mx.random.normal((1, 6, 5, 8)), mx.random.normal((2, 48, 32, 3))
    assert mx.allclose(vae.decode(z, rows=rows), vae.decode(z), atol=1e-5)
    assert mx.allclose(vae.encode(pixels, rows=rows), vae.encode(pixels), atol=1e-5)


def test_statistics_in_bfloat16_are_those_of_float32() -> None:
    """Of a picture whose mean is ten times its spread: sums of rounded values would be off by much more."""
    norm = GroupNorm(4, 16)
    x = (mx.random.normal((1, 64, 64, 16), key=mx.random.key(0)) + 10).astype(mx.bfloat16)
    for rounded, exact in zip(norm.affine(x), norm.affine(x.astype(mx.float32)), strict=True):
        assert mx.allclose(rounded, exact, rtol=1e-2)


def test_strips_in_bfloat16() -> None:
    """Within 50 dB of one piece, though each strip is rounded apart from its neighbours."""
    mx.random.seed(0)
    vae = VAE(CONFIG)
    vae.set_dtype(mx.bfloat16)
    z, pixels = (mx.random.normal(shape).astype(mx.bfloat16) for shape in ((1, 16, 12, 8), (1, 128, 96, 3)))
    for whole, strips in ((vae.decode(z), vae.decode(z, 16)), (vae.encode(pixels), vae.encode(pixels, 16))):
        whole, strips = whole.astype(mx.float32), strips.astype(mx.float32)
        error = mx.square(whole - strips).mean().item()
        peak = (whole.max() - whole.min()).item()
        assert 10 * math.log10(peak**2 / max(error, 1e-20)) > 50  # type: ignore[operator]


@pytest.mark.parametrize("what", ["decode", "encode"])
def test_strips_need_less_memory(what: str) -> None:
    """At a size that a CPU can run; what is alive at once is then some layers' pictures and one strip."""
    vae = VAE(VAEConfig((32, 32, 32, 32), 1, 8, norm_num_groups=4))
    side = 256
    x = mx.random.normal((1, side // 8, side // 8, 8) if what == "decode" else (1, side, side, 3))
    mx.eval(vae.parameters(), x)
    peaks = []
    for rows in (None, 16):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(getattr(vae, what)(x, rows))
        peaks.append(mx.get_peak_memory() - before)
    picture = side * side * 32 * 4  # bytes of one layer's output at full size
    # A block's input, its middle and its output, the layer before where it is not quite done, and a strip.
    assert peaks[1] < 4.8 * picture, peaks
    assert peaks[1] < 0.6 * peaks[0], peaks


def test_a_layer_at_a_time_is_done() -> None:
    """What is told between layers is finite and grows towards the picture; raising there stops the work."""
    vae = VAE(CONFIG)
    for rows in (None, 16):
        heights: list[mx.array] = []
        mx.eval(vae.decode(mx.zeros((1, 4, 4, 8)), rows, heights.append))
        seen = [x.shape[1] for x in heights]
        assert seen == sorted(seen)
        assert (seen[0], seen[-1]) == (4, 32)
        assert len(seen) >= 12

    def stop(x: mx.array) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        vae.encode(mx.zeros((1, 16, 16, 3)), None, stop)
