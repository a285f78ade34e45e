"""Beside quantised layers a LoRA keeps all of its strength, and the layers keep their bits."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from folders import quantizable_model
from lora_kinds import KINDS
from lora_layouts import LAYOUTS, Tensors, make_twin, save
from lora_runs import difference, pipeline, velocity
from test_cost import modulations

from klein_mlx.bench.cost import trace
from klein_mlx.config import TransformerConfig
from klein_mlx.model.branched import Branched
from klein_mlx.model.compile import CompiledBlocks
from klein_mlx.model.layers import Gpu, layer_at, place, set_layer
from klein_mlx.model.sampler import image_ids, text_ids
from klein_mlx.model.transformer import Transformer, rope_tables
from klein_mlx.runtime.parts import expanded
from klein_mlx.weights.lora import Change, LowRank, Scaled
from klein_mlx.weights.quantize import Quantization, prepare


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantizable_model(tmp_path_factory.mktemp("quantizable") / "model")


def made(kind: str) -> Tensors:
    return LAYOUTS[kind](make_twin())[0] if kind in LAYOUTS else KINDS[kind]()[0]


ALL_KINDS = ("comfyui alpha", "kohya", "musubi sparse", "full difference", *KINDS)
ONE_OF_EACH = ("comfyui alpha", "full difference", "loha", "lokr", "dora peft", "dora_scale columns", "norms")
MODES = ("3", "8", "4-g32", "mxfp4", "nvfp4", "mxfp8")


@pytest.mark.parametrize(
    ("quantize", "kind"),
    [*(("4", kind) for kind in ALL_KINDS), *((mode, kind) for mode in MODES for kind in ONE_OF_EACH)],
)
def test_quantised_plus_branch_is_expanded_plus_difference(
    quantize: str, kind: str, model: Path, tmp_path: Path
) -> None:
    """To 2e-5 in float32. The right side has no branches: every quantised layer is a plain one with its expanded
    weight, into which the same changes are merged. Taken off, the velocity is what it was, to the bit."""
    file = save(tmp_path / "lora.safetensors", made(kind))
    pipe = pipeline(model, quantize=quantize)
    before = velocity(pipe)
    pipe.load_lora(file, scale=0.7)
    found = velocity(pipe)
    transformer: Any = pipe.parts.loaded["transformer"].module
    branched = [module for _, module in transformer.named_modules() if isinstance(module, Branched)]
    assert bool(branched) == (kind not in ("full difference", "norms"))
    applied = pipe.parts.loaded["transformer"]
    changes = pipe.parts.loras.changes("transformer")
    for path, layer in applied.replaced.items():
        set_layer(transformer, path, applied._plain(layer, expanded(layer), changes[path]))
    assert difference(found, velocity(pipe)) < 2e-5
    assert difference(found, before) > 0.01
    pipe.unload_lora()
    assert mx.array_equal(velocity(pipe), before)


def test_small_differences_are_kept(model: Path, tmp_path: Path) -> None:
    """A LoRA of a hundredth of the weights' size would vanish in their 4 bits; beside them all of it is there: the
    velocity changes by the same, to 2 %, as it does without quantisation (the rest is of second order)."""
    tensors = LAYOUTS["comfyui"](make_twin())[0]
    file = save(tmp_path / "lora.safetensors", tensors)
    moves = []
    for bits in (None, 8):
        pipe = pipeline(model, quantize=bits)
        before = velocity(pipe)
        pipe.load_lora(file, scale=0.01)
        moves.append(velocity(pipe) - before)
    assert float(mx.linalg.norm(moves[0] - moves[1]) / mx.linalg.norm(moves[0])) < 0.05


def test_several_loras_are_one_branch(model: Path, tmp_path: Path) -> None:
    """Their factors stand side by side, whatever their order; a scale can be changed alone."""
    files = [save(tmp_path / f"{n}.safetensors", LAYOUTS["kohya"](make_twin(seed=n))[0]) for n in range(3)]
    pipe = pipeline(model, quantize=4)
    for file, scale in zip(files, (0.5, 1.0, -0.3), strict=True):
        pipe.load_lora(file, scale)
    together = velocity(pipe)
    transformer: Any = pipe.parts.loaded["transformer"].module
    assert transformer.double_blocks[0].img.to_q.down.shape[0] == 9
    other = pipeline(model, quantize=4)
    for file, scale in zip(reversed(files), (-0.3, 2.0, 0.5), strict=True):
        other.load_lora(file, scale)
    other.set_lora_scale("1", 1.0)
    assert difference(velocity(other), together) < 1e-5


def test_a_branch_takes_part_in_what_saves_copies(model: Path, tmp_path: Path) -> None:
    """Cut outputs and cut inputs give what the whole layer gives; so does the compiled step."""
    pipe = pipeline(model, quantize=4)
    pipe.load_lora(save(tmp_path / "lora.safetensors", LAYOUTS["ai-toolkit"](make_twin())[0]))
    velocity(pipe)
    transformer: Any = pipe.parts.loaded["transformer"].module
    block = transformer.single_blocks[0]
    rng = np.random.default_rng(0)
    x = mx.array(rng.standard_normal((1, 5, 64), np.float32))
    first, second = block.linear_in.split(x, 100)
    assert difference(mx.concatenate([first, second], axis=-1), block.linear_in(x)) < 1e-5
    wide = mx.array(rng.standard_normal((1, 5, block.linear_out.down.shape[1]), np.float32))
    assert difference(sum(block.linear_out.terms(wide[..., :64], wide[..., 64:])), block.linear_out(wide)) < 1e-5


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_do_the_same(dtype: str, bits: int | None, model: Path, tmp_path: Path) -> None:
    """Merged or beside, in the type that is computed in: the change that it makes in float32, to a tenth."""
    file = save(tmp_path / "lora.safetensors", LAYOUTS["kohya"](make_twin())[0])
    moves = []
    for kind in ("float32", dtype):
        pipe = pipeline(model, quantize=bits, dtype=kind)
        before = velocity(pipe)
        pipe.load_lora(file, 0.5)
        moves.append(velocity(pipe).astype(mx.float32) - before.astype(mx.float32))
        pipe.unload_lora()
        assert mx.array_equal(velocity(pipe), before)
    assert float(mx.linalg.norm(moves[0] - moves[1]) / mx.linalg.norm(moves[0])) < 0.1


def test_a_branch_s_memory_is_told(tmp_path: Path, model: Path) -> None:
    """A LoRA's own factors stay in memory, and beside quantised weights those of its branches; plain weights take them
    in. Off again, nothing is left."""
    path = save(tmp_path / "lora.safetensors", LAYOUTS["ai-toolkit"](make_twin())[0])
    for quantize in (4, None):
        pipe = pipeline(model, quantize=quantize)
        before = pipe.stream("x", seed=0).expected["steps"]
        pipe.load_lora(path, name="style")
        velocity(pipe)
        transformer: Any = pipe.parts.loaded["transformer"].module
        branches = [module for module in transformer.modules() if isinstance(module, Branched)]
        bytes_beside = sum(branch.up.nbytes + branch.down.nbytes for branch in branches)
        assert (bytes_beside > 0) == (quantize is not None)
        own = pipe.parts.loras.get("style").nbytes
        assert own > 0
        assert pipe.stream("x", seed=0).expected["steps"] - before == bytes_beside + own
        pipe.unload_lora()
        assert pipe.stream("x", seed=0).expected["steps"] == before


@pytest.mark.skipif(not shutil.which("g++"), reason="MLX compiles for a CPU by a C++ compiler")
def test_a_compiled_block_sees_every_change(tmp_path: Path, model: Path) -> None:
    """A compiled block is a function of what stands beside its weights too: another scale is no other trace."""
    pipe = pipeline(model, quantize=4)
    pipe.load_lora(save(tmp_path / "lora.safetensors", LAYOUTS["ai-toolkit"](make_twin())[0]), name="style")
    velocity(pipe)
    transformer: Any = pipe.parts.loaded["transformer"].module
    config = pipe.config.transformer
    x = mx.array(np.random.default_rng(0).standard_normal((1, 12, config.hidden_size), np.float32))
    ids = mx.concatenate([text_ids(8), image_ids(2, 2)])
    rope = rope_tables(ids, config.axes_dims_rope, config.rope_theta, 8)
    modulation, blocks, found = transformer.modulations(0.5, mx.float32).single, CompiledBlocks(), []
    for scale in (1.0, -0.5):
        pipe.set_lora_scale("style", scale)
        place(transformer, Gpu())
        found.append(blocks(transformer.single_blocks[0], x, modulation, rope)[0])
        assert difference(found[-1], transformer.single_blocks[0](x, modulation, rope)[0]) < 1e-5
    assert blocks.traces == 1
    assert difference(*found) > 0.01


def test_a_rank_of_16_costs_less_than_3_percent() -> None:
    """klein 4B at 1024 x 1024, in 4 bits, with a branch beside every linear layer of its blocks: 0.5 % more FLOPs.

    Two matmuls more for each of the layers, three where inputs or outputs are cut, eight
    for the parts that the last block takes; q and k apart.
    """
    config = TransformerConfig(128, 5, 20, 128, 24, 7680, 3.0, (32, 32, 32, 32))
    costs = []
    for rank in (0, 16):
        model = Transformer(config)
        prepare(model, "transformer", Quantization(4))
        model.set_dtype(mx.bfloat16)
        changes: dict[str, Scaled] = {}
        for path, layer in model.named_modules() if rank else ():
            if isinstance(layer, nn.QuantizedLinear):
                out, inputs = layer.weight.shape[0], layer.weight.shape[1] * 8
                factors = LowRank(mx.zeros((out, rank), mx.bfloat16), mx.zeros((rank, inputs), mx.bfloat16))
                changes[path] = [(1.0, Change(factors))]
        model.arrange()
        for path, own in changes.items():
            parent = layer_at(model, path.rpartition(".")[0])
            if hasattr(parent, "separate"):
                parent.separate()
            beside = Branched(layer_at(model, path))
            beside.up, beside.down = own[0][1].delta.up, own[0][1].delta.down  # type: ignore[union-attr]
            set_layer(model, path, beside)
        model.arrange()
        ids = mx.concatenate([text_ids(512), image_ids(64, 64)])
        rope = rope_tables(ids, config.axes_dims_rope, config.rope_theta, 512)
        mods = modulations()
        mx.eval(rope, mods)

        def step(tokens: mx.array, txt: mx.array, model: Any = model, mods: Any = mods, rope: Any = rope) -> mx.array:
            return model(tokens, txt, mods, rope, 4096)

        place(model, Gpu())
        tokens, txt = mx.zeros((1, 4096, 128), mx.bfloat16), mx.zeros((1, 512, 3072), mx.bfloat16)
        costs.append(trace(model, step, tokens, txt))
    plain, branched = costs
    assert len(changes) == 5 * 12 + 20 * 2
    assert 1.004 < branched.flops / plain.flops < 1.006
    joined = 5 * 2 * (1 + 2)  # q and k are two matmuls again, whose results are copied beside each other
    assert branched.total - plain.total == 5 * 12 * 2 + joined + 19 * (3 + 3) + (6 + 3)
