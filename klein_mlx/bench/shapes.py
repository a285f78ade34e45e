"""Every kind of kernel at klein 4B's shapes, on random numbers: this device in its compute dtype against its own CPU.

The code under test is the model's own (klein_mlx.model); the reference is klein_mlx.bench.naive. A GPU computes the
whole shape and the CPU as many rows of it as time allows; where the device is the CPU itself, the shape has fewer rows.
Inputs of norms have two scales, 1 and 1e-3, so that a wrong epsilon shows.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from klein_mlx.bench import naive
from klein_mlx.bench.checks import Row, Setting, compared, error
from klein_mlx.bench.predict import klein
from klein_mlx.config import ModelConfig
from klein_mlx.model import layers, transformer, vae
from klein_mlx.model import sampler as grids
from klein_mlx.model.branched import Branched
from klein_mlx.model.layers import Cpu
from klein_mlx.model.text_encoder import Layer
from klein_mlx.model.vae import UpBlock

TOKENS, TEXT, GRID = 4608, 512, 64  # of a picture of 1024 x 1024
SAMPLE = 256  # rows of a large result that are compared
UPGRADE = "upgrade mlx (pip install -U mlx)"
DTYPE = "or take another --dtype (float16, float32)"
WINOGRAD = 2.0**-14  # Metal's way in float32, where it is exact enough: emulated, its error is 1.6e-5


@cache
def _pool() -> Any:
    """Normal numbers from which all inputs are cut. Their count is a prime, so that no two rows are alike."""
    from numpy.random import default_rng

    return default_rng(7).standard_normal(4_000_037, dtype="float32")


def draw(shape: tuple[int, ...], size: float = 1.0, dtype: mx.Dtype = mx.float32, start: int = 0) -> mx.array:
    """Normal numbers times `size`, rounded to `dtype`. start: which of them; equal calls give equal numbers."""
    from numpy import roll

    count = math.prod(shape)
    values = (mx.array(roll(_pool(), -start)[:count]) * size).astype(dtype)
    if count > values.size:
        values = mx.concatenate([values] * -(-count // values.size))
    return values[:count].reshape(shape)


def weight(outputs: int, inputs: int, dtype: mx.Dtype, start: int = 0) -> mx.array:
    """(outputs, inputs), such that a layer keeps the size of what it reads."""
    return draw((outputs, inputs), inputs**-0.5, dtype, start)


def layer(values: mx.array, **packing: Any) -> Any:
    """A linear layer of this weight, quantized if `packing` (bits, group_size, mode) says so."""
    plain = layers.Linear.of(values)
    return plain.to_quantized(**packing) if packing else plain


def _sampled(x: mx.array) -> mx.array:
    """Rows (axis 0) from the beginning to the end, at most SAMPLE."""
    return x[mx.array(_indices(x.shape[0]))]


def _indices(count: int) -> list[int]:
    last = min(count, SAMPLE) - 1
    return [i * (count - 1) // max(last, 1) for i in range(last + 1)]


def _bound(setting: Setting, roundings: int, inputs: int = 1, dtype: mx.Dtype | None = None) -> float:
    """Of a chain that rounds so often; a sum of n numbers rounds like a random walk, by sqrt(n) / 2 of float32's."""
    dtype = dtype or setting.dtype
    return roundings * max(setting.rounding(dtype), math.sqrt(inputs) / 2 * 2.0**-23)


def _config() -> ModelConfig:
    return klein("4b")


# ---- matmuls ----

MATMULS = (  # (what, inputs, outputs)
    ("to_out, 3072 -> 3072", 3072, 3072),
    ("q, k and v, 3072 -> 9216", 3072, 9216),
    ("MLP in, 3072 -> 18432", 3072, 18432),
    ("MLP out, 9216 -> 3072", 9216, 3072),
    ("single block out, 12288 -> 3072", 12288, 3072),
)


def check_matmul(setting: Setting) -> Iterator[Row]:
    """The blocks' projections; 12288 -> 3072 is where MLX before 0.32 split its sums wrongly on an M5."""
    for index, (what, inputs, outputs) in enumerate(MATMULS):
        x, w = _rows(setting, inputs, outputs), weight(outputs, inputs, setting.dtype, index)
        ours = layer(w)(x)
        found = error(_sampled(ours), naive.matmul(_sampled(x), w))
        yield compared("matmul", f"{len(x)} rows, {what}", found, _bound(setting, 1, inputs), f"{UPGRADE}, {DTYPE}")


def _rows(setting: Setting, inputs: int, outputs: int, seconds: float = 0.15) -> mx.array:
    """Inputs of a layer: all of a step's tokens on a GPU, fewer on a CPU. (rows, inputs)."""
    rows = TOKENS if setting.gpu else setting.rows(TOKENS, 2 * inputs * outputs, seconds)
    return draw((rows, inputs), 1.0, setting.dtype, start=11)


QUANTIZED: tuple[tuple[str, dict[str, Any]], ...] = (
    *((f"{bits} bits", {"bits": bits, "group_size": 64, "mode": "affine"}) for bits in (3, 4, 5, 6, 8)),
    ("mxfp4", {"bits": 4, "group_size": 32, "mode": "mxfp4"}),
    ("nvfp4", {"bits": 4, "group_size": 16, "mode": "nvfp4"}),
    ("mxfp8", {"bits": 8, "group_size": 32, "mode": "mxfp8"}),
)


def check_quantized(setting: Setting) -> Iterator[Row]:
    """MLX's own quantized matmul against the CPU's dequantized weight."""
    yield from _packed_matmuls(setting, "quantized", layers.Gpu())


def check_dequantized(setting: Setting) -> Iterator[Row]:
    """The weight dequantized whole, then a matmul: how a CPU, M1 and M2 do it."""
    yield from _packed_matmuls(setting, "dequantized", layers.Gpu(dense_from=0) if setting.gpu else Cpu())


def _packed_matmuls(setting: Setting, name: str, device: layers.Device) -> Iterator[Row]:
    outputs = 3072 if setting.gpu else 256  # on a CPU packing takes longer than multiplying
    if device == layers.Gpu() and not setting.gpu:
        setting = replace(setting, dtype=mx.float32)  # MLX's CPU kernel adds up in 16 bits: nothing here uses it so
    x = _rows(setting, 3072, 3072, 0.005 if device == layers.Gpu() else 0.02)
    w = weight(outputs, 3072, setting.dtype, start=3)
    for what, packing in QUANTIZED:
        packed: Any = layer(w, **packing)
        layers.place(packed, device)
        ours = packed(x)
        arrays = [packed[key].astype(mx.float32) if packing["mode"] == "affine" else packed[key] for key in ("scales",)]
        arrays += [packed["biases"].astype(mx.float32)] if "biases" in packed else []
        with mx.stream(mx.cpu):
            whole = mx.dequantize(packed["weight"], *arrays, **packing).astype(mx.float32)
        # A weight that is rounded to the compute dtype once, and the result.
        found, bound = error(_sampled(ours), naive.matmul(_sampled(x), whole)), _bound(setting, 2, 3072)
        yield compared(name, f"{len(x)} rows, {what}", found, bound, f"{UPGRADE}, or use other bits (-q 8)")


def check_lora(setting: Setting) -> Iterator[Row]:
    """A LoRA of rank 16 beside a plain and beside a 4-bit layer."""
    dtype, rank = setting.dtype, 16
    x, w = _rows(setting, 3072, 3072, 0.05), weight(3072, 3072, setting.dtype, start=3)
    down, up = weight(rank, 3072, dtype, 5), weight(3072, rank, dtype, 6)
    for what, packing in (("plain", {}), ("4 bits", QUANTIZED[1][1])):
        branched = Branched(layer(w, **packing))
        branched.down, branched.up = down, up
        base: Any = branched.base
        whole = w
        if packing:
            with mx.stream(mx.cpu):
                arrays = [base[key].astype(mx.float32) for key in ("scales", "biases")]
                whole = mx.dequantize(base["weight"], *arrays, **packing)
        rows = _sampled(x)
        truth = naive.add(naive.matmul(rows, whole), mx.array(1.0), naive.matmul(naive.matmul(rows, down), up))
        found = error(_sampled(branched(x)), truth)
        yield compared("lora", f"rank {rank} beside {what}", found, _bound(setting, 3, 3072), f"{UPGRADE}, {DTYPE}")


# ---- what is between matmuls ----


def check_attention(setting: Setting) -> Iterator[Row]:
    """24 heads of 128: all queries at once, and in pieces that no tile divides."""
    keys = TOKENS if setting.gpu else math.isqrt(setting.rows(TOKENS**2, 4 * 3072, 0.1)) // 8 * 8
    q, k, v = (draw((1, keys, 24, 128), 1.0, setting.dtype, start) for start in (1, 2, 3))
    whole = transformer.attend(layers.here(), q, k, v)[0]
    heads = [a.transpose(0, 2, 1, 3) for a in (q, k, v)]
    step = max(keys // 4 - 3, 1)
    parts = [layers.here().attention(heads[0][:, :, i : i + step], heads[1], heads[2]) for i in range(0, keys, step)]
    pieces = mx.concatenate(parts, axis=2).transpose(0, 2, 1, 3).flatten(2)[0]
    truth = naive.attention(q[:, mx.array(_indices(keys))], k, v)[0]
    # Probabilities and the result are rounded; the scores' own rounding is a change of each weight by as much.
    bound, remedy = _bound(setting, 4, keys), f"{UPGRADE}, {DTYPE}"
    yield compared("attention", f"24 x {keys} x 128 whole", error(_sampled(whole), truth), bound, remedy)
    yield compared("attention", f"24 x {keys} x 128, {step} queries", error(_sampled(pieces), truth), bound, remedy)


def _two_scales(rows: int, channels: int, dtype: mx.Dtype, start: int) -> mx.array:
    """(rows, channels), every second row 1e-3 times as large: there 1e-6 is as much as the mean square."""
    sizes = mx.where(mx.arange(rows) % 2 == 0, 1.0, 1e-3)[:, None]
    return (draw((rows, channels), 1.0, mx.float32, start) * sizes).astype(dtype)


def check_norm_rotation(setting: Setting) -> Iterator[Row]:
    """RMSNorm of q and k with the rotation by position, as one chain."""
    grid = GRID if setting.gpu else 8
    ids = grids.all_ids(TEXT if setting.gpu else 16, grid, grid, None)
    config, tokens = _config().transformer, len(ids)
    qk = _two_scales(tokens * 2 * 24, 128, setting.dtype, 4).reshape(1, tokens, 2, 24, 128)
    scale = 1 + 0.2 * draw((2, 128), start=5)
    tables = transformer.rope_tables(ids, config.axes_dims_rope, config.rope_theta, TEXT)
    ours = transformer.normed_and_rotated(layers.here(), qk, scale, tables, config.eps)
    rows = mx.array(_indices(tokens))
    for index, what in enumerate(("q", "k")):
        normed = naive.rms_norm(qk[:, rows][:, :, index], scale[index], config.eps)
        truth = naive.rotate(normed, ids[rows], config.axes_dims_rope, config.rope_theta)
        # Float32 angles of positions up to 511 are off by 2^-15; the model's tables come from float64.
        bound = _bound(setting, 2) + 2.0**-14
        found = error(ours[:, rows][:, :, index], truth)
        yield compared("norm-rotation", f"{tokens} tokens, {what}", found, bound, f"{UPGRADE}, {DTYPE}")


def check_layer_norm(setting: Setting) -> Iterator[Row]:
    """LayerNorm with shift and scale."""
    rows = TOKENS if setting.gpu else 256
    eps, stream = _config().transformer.eps, layers.wide(setting.dtype)
    x = _two_scales(rows, 3072, stream, 8)
    shift, scale = draw((3072,), 0.5, stream, 9), (1 + 0.3 * draw((3072,), start=10)).astype(stream)
    ours = transformer.modulated(x, shift, scale, eps, setting.dtype)
    truth = naive.modulated(_sampled(x), shift, scale, eps)
    yield compared(
        "layer-norm", f"{rows} x 3072", error(_sampled(ours), truth), _bound(setting, 2, 3072), f"{UPGRADE}, {DTYPE}"
    )


def check_swiglu(setting: Setting) -> Iterator[Row]:
    """silu(gate) * value."""
    rows = TOKENS if setting.gpu else 128
    gate, value = (draw((rows, 9216), 1.5, setting.dtype, start) for start in (1, 2))
    truth = naive.swiglu(_sampled(gate), _sampled(value))
    found = error(_sampled(layers.here().form(layers.swiglu)(gate, value)), truth)
    yield compared("swiglu", f"{rows} x 9216", found, _bound(setting, 3), f"MLX_DISABLE_COMPILE=1; {UPGRADE}")


def check_gated_sum(setting: Setting) -> Iterator[Row]:
    """x + gate * layer(attention): a branch added to the stream."""
    x, w = _rows(setting, 3072, 3072, 0.05), weight(3072, 3072, setting.dtype, start=3)
    stream = layers.wide(setting.dtype)
    into, gate = draw(x.shape, 1.0, stream, 21), draw((3072,), 1.0, stream, 22)
    ours = transformer.add_branch(into, gate, layer(w), x)
    truth = naive.add(_sampled(into), gate, naive.matmul(_sampled(x), w))
    found = error(_sampled(ours), truth)
    yield compared(
        "gated-sum", f"{len(x)} x 3072", found, _bound(setting, 3, 3072), f"MLX_DISABLE_COMPILE=1; {UPGRADE}"
    )


# ---- the VAE ----


def _side(setting: Setting, flops: float, full: int, seconds: float) -> int:
    """Pixels of a square that the CPU computes in so many seconds, a multiple of 8. flops: of one pixel."""
    return min(full, max(8, math.isqrt(setting.rows(full * full, flops, seconds)) // 8 * 8))


def _vae_dtype(setting: Setting) -> mx.Dtype:
    """The VAE takes bfloat16 beside float16 layers."""
    return mx.bfloat16 if setting.dtype == mx.float16 else setting.dtype


def check_convolution(setting: Setting) -> Iterator[Row]:
    """3 x 3 of 512 and of 128 channels, whole and in strips, by each way that the device may take."""
    dtype, here = _vae_dtype(setting), layers.here()
    ways = [replace(here, conv=conv) for conv in ("direct", "matmul")] if setting.gpu else [here]
    remedy = f"MLX_CONV_WINOGRAD=0, or {UPGRADE}"
    for channels in (512, 128):
        side = _side(setting, 18 * channels**2, 16384 // channels * 2 if channels == 128 else 96, 0.2)
        conv = _convolution(channels, dtype)
        x = draw((1, side, side, channels), 1.0, dtype, 3)
        truth = naive.convolve(x, draw(conv.weight.shape, (9 * channels) ** -0.5, dtype, 1), conv.bias)
        bound, what = _bound(setting, 2, 9 * channels, dtype), f"{side} x {side}, {channels} channels"
        if setting.gpu and dtype == mx.float32:
            bound = max(bound, WINOGRAD)
        for conv.device in ways:
            way = f", {conv.device.conv}" if setting.gpu else ""
            yield compared("convolution", f"{what}{way}, whole", error(conv(x), truth), bound, remedy)
            strips = conv.strips(x, max(side // 4 - 1, 1))
            yield compared("convolution", f"{what}{way}, in strips", error(strips, truth), bound, remedy)


def _convolution(channels: int, dtype: mx.Dtype) -> vae.Conv:
    conv = vae.Conv(channels, channels)
    conv.weight = draw(conv.weight.shape, (9 * channels) ** -0.5, dtype, 1)
    conv.bias = draw((channels,), 0.2, dtype, 2)
    conv.arrange()
    return conv


def check_group_norm(setting: Setting) -> Iterator[Row]:
    """GroupNorm with SiLU, of a picture whose numbers are about 1e-3."""
    dtype, side = _vae_dtype(setting), 128 if setting.gpu else 32
    norm = vae.GroupNorm(32, 256)
    norm.weight, norm.bias = draw((256,), 1.0, dtype, 1), draw((256,), 1.0, dtype, 2)
    x = draw((1, side, side, 256), 1e-3, dtype, 3)
    truth = naive.silu(naive.group_norm(x, norm.weight, norm.bias, 32, 1e-6))
    found = error(norm(x, activate=True), truth)
    # The rows' sums are rounded to the dtype, and so is the result.
    yield compared("group-norm", f"{side} x {side} x 256", found, _bound(setting, 3, side, dtype), UPGRADE)


# ---- blocks ----


def _load(module: nn.Module, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Fill a module with random weights and fuse them as a step does; returns them by the checkpoint's names."""
    from mlx.utils import tree_flatten

    weights: dict[str, mx.array] = {}
    for index, (name, array) in enumerate(tree_flatten(module.parameters())):
        shape = tuple(array.shape)  # type: ignore[union-attr]
        if name.endswith("bias"):
            weights[name] = draw(shape, 0.2, dtype, index)
        elif len(shape) == 1:
            weights[name] = (1 + 0.2 * draw(shape, start=index)).astype(dtype)
        else:
            weights[name] = draw(shape, math.prod(shape[1:]) ** -0.5, dtype, index)
    module.load_weights(list(weights.items()))
    for part in module.modules():
        if hasattr(part, "arrange"):
            part.arrange()  # type: ignore[operator]
    return weights


def _modulation(dtype: mx.Dtype, start: int) -> transformer.Modulation:
    vectors = [draw((3072,), 0.3, mx.float32, start + i) for i in range(3)]
    return transformer.Modulation(vectors[0].astype(dtype), (1 + vectors[1]).astype(dtype), vectors[2].astype(dtype))


def _sizes(setting: Setting, flops: float) -> tuple[int, int]:
    """(text tokens, side of the picture's grid) that the CPU computes in a second and a half. flops: of one token."""
    tokens = setting.rows(TOKENS, flops, 1.5 if setting.gpu else 0.2)
    return (TEXT, GRID) if tokens == TOKENS else (8, max(2, math.isqrt(max(tokens - 8, 4))))


def check_double_block(setting: Setting) -> Iterator[Row]:
    """A double block: both streams, at klein 4B's widths."""
    config = replace(_config().transformer, num_layers=1, num_single_layers=1)
    text, side = _sizes(setting, 2 * 122.7e6 + 4 * 3072 * TOKENS)
    stream, block = layers.wide(setting.dtype), transformer.DoubleBlock(config)
    weights = _load(block, setting.dtype)
    inputs = {"txt": draw((1, text, 3072), 1.0, stream, 1), "img": draw((1, side * side, 3072), 1.0, stream, 2)}
    mods = {name: (_modulation(stream, j), _modulation(stream, 3 + j)) for j, name in enumerate(inputs)}
    ids = grids.all_ids(text, side, side, None)
    tables = transformer.rope_tables(ids, config.axes_dims_rope, config.rope_theta, text)
    ours = mx.concatenate([*block(inputs["txt"], inputs["img"], mods["txt"], mods["img"], tables)[0]], axis=1)

    def turn(x: mx.array) -> mx.array:
        return naive.rotate(x, ids, config.axes_dims_rope, config.rope_theta)

    truth = naive.double_block(weights, inputs, mods, turn, config.eps)
    yield _of_block(setting, "double-block", f"{text} + {side * side} tokens", ours, truth)


def check_single_block(setting: Setting) -> Iterator[Row]:
    """A single block, at klein 4B's widths."""
    config = replace(_config().transformer, num_layers=1, num_single_layers=1)
    text, side = _sizes(setting, 2 * 122.7e6 + 4 * 3072 * TOKENS)
    stream, block = layers.wide(setting.dtype), transformer.SingleBlock(config)
    weights = _load(block, setting.dtype)
    x, mod = draw((1, text + side * side, 3072), 1.0, stream, 1), _modulation(stream, 2)
    ids = grids.all_ids(text, side, side, None)
    tables = transformer.rope_tables(ids, config.axes_dims_rope, config.rope_theta, text)
    ours, _ = block(x, mod, tables)

    def turn(a: mx.array) -> mx.array:
        return naive.rotate(a, ids, config.axes_dims_rope, config.rope_theta)

    truth = naive.single_block(weights, x, mod, turn, config.eps)
    yield _of_block(setting, "single-block", f"{x.shape[1]} tokens", ours, truth)
    last, _ = block(x, mod, tables, None, (text, x.shape[1]))  # as the last one: the picture's tokens only
    yield _of_block(setting, "single-block", f"{side * side} of them", last, truth[:, text:])


def check_encoder_layer(setting: Setting) -> Iterator[Row]:
    """A layer of the text encoder."""
    config, dtype = _config().text_encoder, _vae_dtype(setting)
    length = setting.rows(TEXT, 2 * 100.9e6, 0.2)
    block = Layer(config)
    weights = _load(block, dtype)
    x = draw((1, length, config.hidden_size), 1.0, dtype, 1)
    ours = block(x, mx.tri(length, dtype=mx.bool_)[None, None])
    truth = naive.encoder_layer(weights, x, config.head_dim, config.rope_theta, config.rms_norm_eps)
    yield _of_block(setting, "encoder-layer", f"{length} tokens", ours, truth, dtype)


def check_decoder_level(setting: Setting) -> Iterator[Row]:
    """The decoder's third level, 512 -> 256 channels: three resnets, then twice the size."""
    config, dtype = _config().vae, _vae_dtype(setting)
    side = _side(setting, 2 * 6.65e6, 64, 0.3)
    block = UpBlock(512, 256, config.layers_per_block + 1, config.norm_num_groups, upsample=True)
    weights = _load(block, dtype)
    x: mx.array = draw((1, side, side, 512), 1.0, dtype, 1)
    truth = naive.decoder_level(weights, x, config.layers_per_block + 1, config.norm_num_groups, 1e-6)
    for part in block.layers():
        x = part(x, None)
    yield _of_block(setting, "decoder-level", f"{side} x {side} -> {2 * side} x {2 * side}", x, truth, dtype)


def _of_block(
    setting: Setting, name: str, what: str, ours: mx.array, truth: mx.array, dtype: mx.Dtype | None = None
) -> Row:
    """About ten roundings lie one after the other; a residual stream forgets none."""
    remedy = f"see which kernel above fails; {UPGRADE}"
    return compared(name, what, error(ours, truth), _bound(setting, 6, 12288, dtype) + 2.0**-14, remedy)


def names() -> Mapping[str, Any]:
    """Every check of this section by its name."""
    return {
        "matmul": check_matmul,
        "attention": check_attention,
        "norm-rotation": check_norm_rotation,
        "layer-norm": check_layer_norm,
        "swiglu": check_swiglu,
        "gated-sum": check_gated_sum,
        "quantized": check_quantized,
        "dequantized": check_dequantized,
        "lora": check_lora,
        "convolution": check_convolution,
        "group-norm": check_group_norm,
        "double-block": check_double_block,
        "single-block": check_single_block,
        "encoder-layer": check_encoder_layer,
        "decoder-level": check_decoder_level,
    }
