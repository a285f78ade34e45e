"""Compiled blocks: traced once per kind and shape, whatever leaves memory and comes back; the results are the same."""

import gc
import weakref
from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
import pytest

from klein_mlx import KleinPipeline
from klein_mlx.config import TransformerConfig
from klein_mlx.model.compile import CompiledBlocks, compiles, compiling
from klein_mlx.model.latents import join_references
from klein_mlx.model.sampler import Predict
from klein_mlx.model.transformer import RunBlock, Transformer
from klein_mlx.model.velocity import Reuse, Tables, in_parts, velocity
from klein_mlx.weights.quantize import Quantization, prepare

CONFIG = TransformerConfig(16, 2, 3, 32, 2, 64, 3.0, (8, 8, 8, 8))
SIGMAS = (0.9, 0.5)


def model(seed: int = 0, bits: int | None = None) -> Transformer:
    mx.random.seed(seed)
    transformer = Transformer(CONFIG)
    if bits:
        prepare(transformer, "transformer", Quantization(bits))
    transformer.arrange()
    mx.eval(transformer.parameters())
    return transformer


def picture(
    transformer: Transformer,
    blocks: RunBlock,
    grid: tuple[int, int] = (3, 4),
    reuse: Reuse | None = None,
    batch: int = 1,
) -> Predict:
    references = join_references([mx.random.normal((1, 2, 3, 16), key=mx.random.key(1))]) if reuse else None
    embeds = mx.random.normal((batch, 5, 64), key=mx.random.key(2))
    tables = Tables(transformer, references, grid, SIGMAS, mx.float32, still=reuse == "alone")
    return velocity(transformer, embeds, tables, reuse, blocks)


def latents(grid: tuple[int, int] = (3, 4), seed: int = 3) -> mx.array:
    return mx.random.normal((1, *grid, 16), key=mx.random.key(seed))


@pytest.fixture
def _compiled() -> Iterator[None]:
    with compiling("always"):
        yield


@pytest.mark.usefixtures("_compiled")
def test_a_second_picture_of_the_same_size_traces_nothing() -> None:
    """One trace for all double blocks and one for all single ones. Nothing is evaluated: that would take a compiler."""
    blocks, transformer = CompiledBlocks(), model()
    for seed in range(2):  # two pictures, two steps each
        predict = picture(transformer, blocks)
        for sigma in SIGMAS:
            predict(latents(seed=seed), sigma)
        assert blocks.traces == 2
    picture(transformer, blocks, grid=(4, 4))(latents((4, 4)), 0.9)
    assert blocks.traces == 4  # another size
    picture(transformer, blocks)(latents(), 0.9)
    assert blocks.traces == 4  # and back
    picture(transformer, blocks, batch=2)(latents(), 0.9)
    assert blocks.traces == 6  # both branches of guidance at once


@pytest.mark.usefixtures("_compiled")
def test_weights_may_leave_and_come_back() -> None:
    """Loaded anew, or others of the same shapes: nothing is traced. Packed weights are another kind of block."""
    blocks = CompiledBlocks()
    for seed in range(2):
        picture(model(seed), blocks)(latents(), 0.9)
        assert blocks.traces == 2
    for seed in range(2):
        picture(model(seed, bits=4), blocks)(latents(), 0.9)
        assert blocks.traces == 4


@pytest.mark.usefixtures("_compiled")
def test_no_weights_are_held() -> None:
    blocks, before = CompiledBlocks(), mx.get_active_memory()
    transformer = model()
    held = mx.get_active_memory() - before
    predict = picture(transformer, blocks)
    predict(latents(), 0.9)
    del transformer, predict
    assert mx.get_active_memory() - before < held / 10


class Noting(nn.Module):
    """A block that shows arrays to a function, as attention shows keys and values. Nothing in it becomes one kernel,
    so that no compiler is needed to evaluate it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.array([[1.0, 2.0], [3.0, 4.0]])

    def __call__(self, x: mx.array, note: Callable[..., None]) -> mx.array:
        y = x @ self.weight
        note(y, y.T)
        return y


@pytest.mark.usefixtures("_compiled")
def test_functions_are_shown_arrays_and_never_kept() -> None:
    """Not what a trace is made with: arrays with values, each function its own call's; of one trace, and let go."""
    blocks, block = CompiledBlocks(), Noting()
    for number in (1.0, 2.0):
        shown: list[tuple[mx.array, ...]] = []

        def note(*arrays: mx.array, shown: list[tuple[mx.array, ...]] = shown) -> None:
            shown.append(arrays)

        kept = weakref.ref(note)
        out = blocks(block, mx.full((1, 2), number), note)
        assert out.tolist() == [[4 * number, 6 * number]]
        assert [array.tolist() for array in shown[0]] == [out.tolist(), [[4 * number], [6 * number]]]
        del note
        gc.collect()
        assert kept() is None
    assert blocks.traces == 1


@pytest.mark.parametrize("reuse", [None, "alone", "first step"])
def test_compiled_blocks_get_their_own_weights_and_inputs(reuse: Reuse | None) -> None:
    """Every block's own weights, every step's modulations and the kept keys and values reach the function.

    With mx.compile switched off the functions run as Python: what is passed is the same, and no compiler is needed.
    """
    transformer, blocks = model(), CompiledBlocks()
    straight = picture(transformer, blocks, reuse=reuse)
    wanted = [straight(latents(), sigma) for sigma in SIGMAS]
    mx.eval(wanted)
    assert blocks.traces == 0
    mx.disable_compile()
    try:
        with compiling("always"):
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
        if len(done) == 3:
            raise KeyboardInterrupt

    predict = picture(model(), in_parts(CompiledBlocks(), part_done), reuse="alone")
    with pytest.raises(KeyboardInterrupt):
        predict(latents(), 0.9)
    assert [array.shape for array in done] == [(1, 6, CONFIG.hidden_size)] * 3


def test_the_pipeline_keeps_its_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over pictures and over reloads of the weights."""
    seen: set[CompiledBlocks] = set()
    call = CompiledBlocks.__call__

    def noting(self: CompiledBlocks, *args: object) -> object:
        seen.add(self)
        return call(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(CompiledBlocks, "__call__", noting)
    pipe = KleinPipeline.from_pretrained("tiny", keep="nothing")
    for seed in range(2):
        pipe("a red circle", seed=seed, num_inference_steps=1)
    assert len(seen) == 1


def test_when_blocks_are_compiled() -> None:
    assert compiles() == (mx.default_device().type == mx.DeviceType.gpu)
    with compiling("always"):
        assert compiles()
        with compiling("never"):
            assert not compiles()
    with pytest.raises(ValueError, match="when is 'often'; it must be one of auto, always, never"), compiling("often"):
        pass
