"""Compiled blocks: traced once per kind and shape, whatever leaves memory and comes back; the results are the same."""

from collections.abc import Callable

import mlx.core as mx
import pytest

from klein_mlx import KleinPipeline, pipeline
from klein_mlx.config import TransformerConfig
from klein_mlx.model.compile import CompiledBlocks
from klein_mlx.model.layers import Cpu, Gpu, Placed, place
from klein_mlx.model.sampler import Predict, join_references
from klein_mlx.model.transformer import RunBlock, Transformer, call_block, in_parts
from klein_mlx.model.velocity import Reuse, Tables, velocity
from klein_mlx.weights.quantize import Quantization, prepare

CONFIG = TransformerConfig(16, 2, 3, 32, 2, 64, 3.0, (8, 8, 8, 8))
SIGMAS = (0.9, 0.5)


def model(seed: int = 0, bits: int | None = None) -> Transformer:
    mx.random.seed(seed)
    transformer = Transformer(CONFIG)
    if bits:
        prepare(transformer, "transformer", Quantization(bits))
    place(transformer, Gpu())
    transformer.arrange()
    mx.eval(transformer.parameters())
    return transformer


def picture(
    transformer: Transformer,
    run: RunBlock | CompiledBlocks,
    grid: tuple[int, int] = (3, 4),
    reuse: Reuse | None = None,
    batch: int = 1,
) -> Predict:
    references = join_references([mx.random.normal((1, 2, 3, 16), key=mx.random.key(1))]) if reuse else None
    embeds = mx.random.normal((batch, 5, 64), key=mx.random.key(2))
    tables = Tables(transformer, references, grid, SIGMAS, mx.float32, still=reuse == "alone")
    if isinstance(run, CompiledBlocks):
        run = in_parts(run, lambda *arrays: None)
    return velocity(transformer, embeds, tables, reuse, run)


def latents(grid: tuple[int, int] = (3, 4), seed: int = 3) -> mx.array:
    return mx.random.normal((1, *grid, 16), key=mx.random.key(seed))


def test_a_second_picture_of_the_same_size_traces_nothing() -> None:
    """One trace for all double blocks, one for the single ones, one for the last.

    Nothing is evaluated: that would take a compiler.
    """
    blocks, transformer = CompiledBlocks(), model()
    for seed in range(2):  # two pictures, two steps each
        predict = picture(transformer, blocks)
        for sigma in SIGMAS:
            predict(latents(seed=seed), sigma)
        assert blocks.traces == 3
    picture(transformer, blocks, grid=(4, 4))(latents((4, 4)), 0.9)
    assert blocks.traces == 6  # another size
    picture(transformer, blocks)(latents(), 0.9)
    assert blocks.traces == 6  # and back
    picture(transformer, blocks, batch=2)(latents(), 0.9)
    assert blocks.traces == 9  # both branches of guidance at once


def test_weights_may_leave_and_come_back() -> None:
    """Loaded anew, or others of the same shapes: nothing is traced. Packed weights are another kind of block."""
    blocks = CompiledBlocks()
    for seed in range(2):
        picture(model(seed), blocks)(latents(), 0.9)
        assert blocks.traces == 3
    for seed in range(2):
        picture(model(seed, bits=4), blocks)(latents(), 0.9)
        assert blocks.traces == 6


def test_no_weights_are_held() -> None:
    blocks, before = CompiledBlocks(), mx.get_active_memory()
    transformer = model()
    held = mx.get_active_memory() - before
    predict = picture(transformer, blocks)
    predict(latents(), 0.9)
    del transformer, predict
    assert mx.get_active_memory() - before < held / 10


class Scaled(Placed):
    """A block with a setting. Nothing in it becomes one kernel, so that no compiler is needed to evaluate it."""

    def __init__(self, factor: float):
        super().__init__()
        self.weight = mx.array([[1.0, 2.0], [3.0, 4.0]])
        self.factor, self.device = factor, Gpu()

    def __call__(self, x: mx.array, power: int = 1) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        for _ in range(power):
            x = x @ (self.factor * self.weight)
        return x, (x, x.T)


def test_what_decides_a_blocks_code_is_in_its_key() -> None:
    """Blocks with other settings, on a device that computes otherwise, or called with other numbers have functions of
    their own; what differs in arrays only shares one."""
    blocks, x = CompiledBlocks(), mx.array([[1.0, 1.0]])
    for factor, power, traces in ((1.0, 1, 1), (2.0, 1, 2), (2.0, 2, 3), (1.0, 1, 3)):
        block = Scaled(factor)
        out, (key, value) = blocks(block, x, power)
        assert out.tolist() == key.tolist() == block(x, power)[0].tolist()
        assert value.tolist() == key.T.tolist()
        assert blocks.traces == traces
    block.device = Gpu(rows=4)
    blocks(block, x, 1)
    assert blocks.traces == 4
    block.weight = block.weight + 1
    assert blocks(block, x, 1)[0].tolist() == [[6.0, 8.0]]
    assert blocks.traces == 4


@pytest.mark.parametrize("reuse", [None, "alone", "first step"])
def test_compiled_blocks_get_their_own_weights_and_inputs(reuse: Reuse | None) -> None:
    """Every block's own weights, every step's modulations and the kept keys and values reach the function.

    With mx.compile switched off the functions run as Python: what is passed is the same, and no compiler is needed.
    """
    transformer, blocks = model(), CompiledBlocks()
    mx.disable_compile()
    try:
        straight = picture(transformer, call_block, reuse=reuse)
        wanted = [straight(latents(), sigma) for sigma in SIGMAS]
        mx.eval(wanted)
        through = picture(transformer, blocks, reuse=reuse)
        for sigma, velocity_wanted in zip(SIGMAS, wanted, strict=True):
            assert mx.array_equal(through(latents(), sigma), velocity_wanted)
    finally:
        mx.enable_compile()
    passes = len(SIGMAS) + (reuse == "alone")  # the references' own
    assert blocks.traces == passes * (CONFIG.num_layers + CONFIG.num_single_layers)


def test_references_alone_stop_between_blocks() -> None:
    """The pass over the references is told block by block too: what is raised there ends it."""
    done: list[mx.array] = []

    def part_done(*arrays: mx.array) -> None:
        done.extend(arrays)
        if len(done) >= 3:
            raise KeyboardInterrupt

    predict = picture(model(), in_parts(CompiledBlocks(), part_done), reuse="alone")
    with pytest.raises(KeyboardInterrupt):
        predict(latents(), 0.9)
    assert [array.shape for array in done] == [(1, 6, CONFIG.hidden_size), *[(1, 6, 2, 32)] * 2]


def test_the_pipeline_keeps_its_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over pictures and over reloads of the weights."""
    seen: list[CompiledBlocks] = []

    def noting(blocks: CompiledBlocks, part_done: Callable[..., None]) -> RunBlock:
        seen.append(blocks)
        return in_parts(blocks, part_done)

    monkeypatch.setattr(pipeline, "in_parts", noting)
    pipe = KleinPipeline.from_pretrained("tiny", keep="nothing")
    for seed in range(2):
        pipe("a red circle", seed=seed, num_inference_steps=1)
    assert len(seen) == 2
    assert seen[0] is seen[1]


def test_blocks_are_compiled_where_their_device_compiles() -> None:
    blocks, transformer = CompiledBlocks(), model()
    place(transformer, Cpu())
    transformer.arrange()
    predict = picture(transformer, blocks)
    predict(latents(), 0.9)
    assert blocks.traces == 0
