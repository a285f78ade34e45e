"""Gradients block by block equal those of one value_and_grad; memory stays that of a block."""

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from medium import CONFIG as MEDIUM
from mlx.utils import tree_flatten, tree_map

from klein_mlx.config import ModelConfig, TransformerConfig
from klein_mlx.errors import RequestError
from klein_mlx.model.layers import Cpu, Gpu, layer_at, place
from klein_mlx.model.sampler import join_references
from klein_mlx.paths import TINY_FOLDER
from klein_mlx.train.adapters import (
    Trainables,
    Weights,
    add_adapters,
    all_weights,
    dense,
    find_targets,
    is_linear,
    put,
)
from klein_mlx.train.blockwise import Blockwise, Sample
from klein_mlx.train.noise import key_of
from klein_mlx.weights.bits import parse, settle
from klein_mlx.weights.checkpoint import build, load_part, open_checkpoint


def tiny(method: str, targets: str = "all") -> tuple[Blockwise, ModelConfig]:
    """tiny with adapters whose factors are not zero, or all of its weights."""
    source = open_checkpoint(TINY_FOLDER)
    transformer: Any = load_part("transformer", source, mx.float32)
    return Blockwise(transformer, trainables_of(transformer, method, targets), mx.float32), source.config


def trainables_of(transformer: Any, method: str, targets: str = "all") -> Trainables:
    if method == "full":
        return all_weights(transformer)
    trainables = add_adapters(transformer, targets, 4, 0, method == "dora")
    for path, array in trainables.weights.items():
        if path.endswith(".up"):
            trainables.weights[path] = 0.02 * mx.random.normal(array.shape, key=key_of("up", path))
    return trainables


def sample(config: ModelConfig, references: bool = False, batch: int = 1) -> Sample:
    c = config.transformer
    latents, noise = (mx.random.normal((batch, 8, 6, c.in_channels), key=mx.random.key(k)) for k in (1, 2))
    shape = (batch, 24, c.joint_attention_dim)
    embeds = mx.random.normal(shape, key=mx.random.key(3))
    grids = [mx.random.normal((batch, 4, 6, c.in_channels), key=mx.random.key(k)) for k in (4, 5)]
    return Sample(latents, noise, embeds, 0.6, join_references(grids) if references else None)


def gradients_of(blockwise: Blockwise, one: Sample) -> tuple[float, Weights]:
    found: Weights = {}
    return blockwise.loss_and_gradients(one, lambda stage, own: found.update(own)), found


def at_once(blockwise: Blockwise, one: Sample) -> Callable[[Weights], mx.array]:
    """The loss as one function of all trainable weights, by the transformer's own call."""
    model, trainables = blockwise.transformer, blockwise.trainables
    _, h, w, _ = one.latents.shape

    def loss(weights: Weights) -> mx.array:
        put(model, trainables, weights, mx.float32)
        noisy = ((1 - one.sigma) * one.latents + one.sigma * one.noise).flatten(1, 2)
        if one.references is not None:
            noisy = mx.concatenate([noisy, one.references.tokens], axis=1)
        modulations = model.modulations(one.sigma, mx.float32)
        out = model(noisy, model.embed_text(one.prompt_embeds), modulations, blockwise._rope(one), h * w)
        return mx.square(out - (one.noise - one.latents).flatten(1, 2)).mean(axis=-1).mean()

    return loss


def worst(found: Weights, right: Weights) -> float:
    """The largest relative error of a gradient."""
    assert found.keys() == right.keys()
    errors = [mx.linalg.norm(found[p] - right[p]) / mx.maximum(mx.linalg.norm(right[p]), 1e-12) for p in right]
    return max(float(error.item()) for error in errors)


def of_all(found: Weights, right: Weights) -> float:
    """The relative error of the gradients as one vector."""
    return math.sqrt(
        sum(mx.square(found[p] - right[p]).sum().item() for p in right)
        / sum(mx.square(right[p]).sum().item() for p in right)
    )


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_gradients_equal_those_of_one_pass(method: str, references: bool) -> None:
    """The same operations in the same order: the error is that of adding the modulations' gradients differently."""
    blockwise, config = tiny(method)
    one = sample(config, references, batch=2)
    loss, found = gradients_of(blockwise, one)
    right_loss, right = mx.value_and_grad(at_once(blockwise, one))(dict(blockwise.trainables.weights))
    assert loss == pytest.approx(right_loss.item(), rel=1e-6)
    assert of_all(found, right) < 1e-6
    assert worst(found, right) < 5e-6  # float32
    assert all(mx.abs(array).max().item() > 0 for array in found.values())


@pytest.mark.parametrize("targets", ["single_blocks.1.*", "txt_in", "final_out", "*.to_v"])
def test_some_targets_alone(targets: str) -> None:
    blockwise, config = tiny("lora", targets)
    one = sample(config)
    _, found = gradients_of(blockwise, one)
    _, right = mx.value_and_grad(at_once(blockwise, one))(dict(blockwise.trainables.weights))
    assert of_all(found, right) < 1e-6
    assert worst(found, right) < 5e-6


def test_adapters_change_nothing_at_first() -> None:
    source = open_checkpoint(TINY_FOLDER)
    one = sample(source.config)
    plain: Any = load_part("transformer", source, mx.float32)
    velocities = [Blockwise(plain, all_weights(plain), mx.float32).velocity(one)]
    for dora in (False, True):
        model: Any = load_part("transformer", source, mx.float32)
        trainables = add_adapters(model, "all", 4, 0, dora)
        velocities.append(Blockwise(model, trainables, mx.float32).velocity(one))
    assert mx.array_equal(velocities[0], velocities[1])
    assert mx.abs(velocities[0] - velocities[2]).max().item() < 1e-4  # DoRA's gain is a quotient of equal norms


def test_doras_norm_is_a_constant() -> None:
    """The gradient is that with the norm held, not that through it: against a dense computation of both."""
    blockwise, config = tiny("dora", "single_blocks.0.linear_out")
    one, path = sample(config), "single_blocks.0.linear_out"
    _, found = gradients_of(blockwise, one)
    weights, branch = dict(blockwise.trainables.weights), blockwise.trainables.adapters[path]
    base: mx.array = branch.base.weight  # type: ignore[assignment]
    up, down, magnitude = (weights[f"{path}.{name}"] for name in ("up", "down", "magnitude"))
    norm = mx.linalg.norm(base + up @ down, axis=1)
    model = blockwise.transformer

    def loss(up: mx.array, down: mx.array, magnitude: mx.array) -> mx.array:
        weight = (magnitude / norm)[:, None] * (base + up @ down)
        branch.base.weight, branch.rows, branch.up = weight, None, mx.zeros_like(up)
        streams = [(1 - one.sigma) * one.latents + one.sigma * one.noise]
        modulations = model.modulations(one.sigma, mx.float32)
        out = model(
            *(streams[0].flatten(1, 2), model.embed_text(one.prompt_embeds), modulations, blockwise._rope(one), 48)
        )
        return mx.square(out - (one.noise - one.latents).flatten(1, 2)).mean(axis=-1).mean()

    right = mx.grad(loss, argnums=(0, 1, 2))(up, down, magnitude)
    pairs = dict(zip((f"{path}.{name}" for name in ("up", "down", "magnitude")), right, strict=True))
    assert worst(found, pairs) < 1e-5  # float32, other order of operations


@pytest.mark.parametrize("bits", ["4-g32", "8-g32", "mxfp4", "mxfp8", "nvfp4"])
def test_a_quantized_base(bits: str) -> None:
    """Factors beside packed layers get the gradients that they get beside the same numbers, unpacked: where the packed
    ones are multiplied as they are, where they are unpacked first, and as a CPU does it."""
    source = open_checkpoint(TINY_FOLDER)
    settings = settle(parse(bits), source)["transformer"]
    packed: Any = load_part("transformer", source, mx.float32, settings)
    plain: Any = load_part("transformer", source, mx.float32)
    for path, layer in packed.named_modules():
        if isinstance(layer, nn.QuantizedLinear):
            layer_at(plain, path).weight = dense(layer)
    one = sample(source.config)
    _, right = gradients_of(Blockwise(plain, trainables_of(plain, "lora"), mx.float32), one)
    blockwise = Blockwise(packed, trainables_of(packed, "lora"), mx.float32)
    for device in (Gpu(compiles=False), Gpu(dense_from=0, compiles=False), Cpu()):
        place(packed, device)
        assert worst(gradients_of(blockwise, one)[1], right) < 1e-3  # MLX's packed matmul adds in another order


def test_targets() -> None:
    model: Any = load_part("transformer", open_checkpoint(TINY_FOLDER), mx.float32)
    layers = [path for path, module in model.named_modules() if is_linear(module)]
    everything = find_targets(layers, "all")
    assert all(path.startswith(("double_blocks", "single_blocks")) for path in everything)
    attention = find_targets(layers, "attention")
    assert 0 < len(attention) < len(everything)
    assert find_targets(layers, "txt_in") == ["txt_in"]
    with pytest.raises(RequestError, match="'to_z', which matches no layer"):
        find_targets(layers, "to_z")
    with pytest.raises(RequestError, match="rank is 5000; .* so at most"):
        add_adapters(model, "all", 5000, 0)


NARROW = replace(MEDIUM, transformer=TransformerConfig(128, 2, 8, 128, 2, 1536, 3.0, (32, 32, 32, 32)))
KLEIN = replace(NARROW, transformer=replace(NARROW.transformer, num_layers=5, num_single_layers=20))


def peaks(config: ModelConfig, grid: tuple[int, int], length: int, method: str = "lora") -> Iterator[int]:
    """Bytes above the weights, of three: of blockwise gradients; of a forward pass; of the gradients of one
    value_and_grad, less what it returns. The smallest of some runs: arrays leave later where a machine is busy."""
    transformer: Any = build("transformer", config)
    transformer.update(
        tree_map(lambda a: 0.02 * mx.random.normal(a.shape, key=mx.random.key(0)), transformer.parameters())
    )
    trainables, c = trainables_of(transformer, method), config.transformer
    blockwise = Blockwise(transformer, trainables, mx.float32)
    latents, noise = (mx.random.normal((1, *grid, c.in_channels), key=mx.random.key(k)) for k in (1, 2))
    one = Sample(latents, noise, mx.random.normal((1, length, c.joint_attention_dim), key=mx.random.key(3)), 0.6)
    blockwise._rope(one)
    mx.eval(tree_flatten(transformer.parameters()), trainables.weights, latents, noise, one.prompt_embeds)

    def peak(call: Callable[[], Any]) -> int:
        gc.collect()  # of what other tests left
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(call())
        return mx.get_peak_memory() - before

    yield min(peak(lambda: mx.array(blockwise.loss_and_gradients(one, lambda stage, own: None))) for _ in range(2))
    yield min(peak(lambda: blockwise.velocity(one)) for _ in range(2))
    whole = peak(lambda: mx.value_and_grad(at_once(blockwise, one))(dict(trainables.weights)))
    yield whole - sum(array.nbytes for array in trainables.weights.values())


@pytest.mark.parametrize(
    ("config", "length"), [(NARROW, 80), pytest.param(KLEIN, 336, marks=pytest.mark.slow)], ids=["10", "25"]
)
def test_peak_memory_is_that_of_a_block(config: ModelConfig, length: int) -> None:
    """Above the weights at most 1.6 times a forward pass, in which no block's input is kept, and a quarter of one
    value_and_grad. Of klein's 25 blocks, 384 tokens: 1.5 and 0.07."""
    backward, forward, whole = peaks(config, (8, 6), length)
    assert backward <= 1.6 * forward
    assert backward <= whole / 4
