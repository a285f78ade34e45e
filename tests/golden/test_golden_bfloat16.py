"""bfloat16 from end to end: no float32 in between, and the timestep rounded as the reference rounds it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from golden import cases, port
from golden.files import MODEL, load
from mlx.utils import tree_flatten

IMAGE_TOKENS = cases.GRID[0] * cases.GRID[1]


@pytest.fixture(scope="module")
def model() -> Iterator[port.Port]:
    with mx.stream(mx.cpu):  # the tolerances are the CPU's
        yield port.Port(MODEL, mx.bfloat16)


@contextmanager
def recorded(kind: type, kept: list[tuple[str, mx.Dtype]]) -> Iterator[None]:
    """Note the dtype of every floating array that goes into and comes out of modules of a class."""
    original: Callable[..., Any] = kind.__call__

    def call(self: Any, *args: Any) -> Any:
        result = original(self, *args)
        for what, values in (("into", [a for a in args if isinstance(a, mx.array)]), ("out of", result)):
            kept.extend((f"{what} {kind.__name__}", v.dtype) for _, v in tree_flatten(values))  # type: ignore[misc]
        return result

    kind.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.__call__ = original  # type: ignore[method-assign]


def leaks(kept: list[tuple[str, mx.Dtype]]) -> list[tuple[str, mx.Dtype]]:
    return [(what, dtype) for what, dtype in kept if dtype not in (mx.bfloat16, mx.bool_)]


def test_text_encoder_blocks(model: port.Port):
    kept: list[tuple[str, mx.Dtype]] = []
    encoder = model.part("text_encoder")
    with recorded(type(encoder.layers[0]), kept):
        ids = mx.array(load("text", "short")["input_ids"])
        embeds = encoder(ids, mx.array(load("text", "short")["attention_mask"]).astype(mx.bool_))
    assert len(kept) >= 2 * len(encoder.layers)
    assert not leaks(kept)
    assert embeds.dtype == mx.bfloat16


def test_transformer_blocks(model: port.Port):
    kept: list[tuple[str, mx.Dtype]] = []
    transformer = model.part("transformer")
    golden = load("transformer", "references")
    tokens, embeds = (mx.array(golden[key]).astype(mx.bfloat16) for key in ("tokens", "prompt_embeds"))
    rope = port.rope_of(model, golden["txt_ids"], golden["img_ids"])
    mods = transformer.modulations(0.7, mx.bfloat16)
    vectors = [v for m in (*mods.txt, *mods.img, mods.single, mods.final) for v in m if v is not None]
    assert {v.dtype for v in vectors} == {mx.bfloat16}
    kinds = type(transformer.double_blocks[0]), type(transformer.single_blocks[0])
    with recorded(kinds[0], kept), recorded(kinds[1], kept):
        velocity = transformer(tokens, transformer.embed_text(embeds), mods, rope, IMAGE_TOKENS)
    assert len(kept) >= 4 + 2 * len(transformer.single_blocks)
    assert not leaks(kept)
    assert velocity.dtype == mx.bfloat16


def test_vae_blocks(model: port.Port):
    kept: list[tuple[str, mx.Dtype]] = []
    vae = model.part("vae")
    kinds = type(vae.encoder.down[0]), type(vae.decoder.up[0]), type(vae.encoder.down[0].resnets[0])
    with recorded(kinds[0], kept), recorded(kinds[1], kept), recorded(kinds[2], kept):
        z = vae.encode(mx.array(load("vae")["pixels"]).astype(mx.bfloat16) / 127.5 - 1)
        pixels = vae.decode(z)
    assert kept
    assert not leaks(kept)
    assert z.dtype == pixels.dtype == mx.bfloat16
    assert vae.normalize(mx.zeros((1, 2, 2, 32), mx.bfloat16)).dtype == mx.bfloat16
    assert vae.denormalize(mx.zeros((1, 2, 2, 32), mx.bfloat16)).dtype == mx.bfloat16


@pytest.mark.parametrize("name", ["two_references", "guided"])
def test_latents_through_the_loop(model: port.Port, name: str):
    """Every step's latents are bfloat16 (`port.run` asserts it), with references and with guidance too."""
    kept: list[tuple[str, mx.Dtype]] = []
    golden = load("runs", name)
    with recorded(type(model.part("transformer")), kept):
        port.run(model, name, golden["noise"])
    assert kept
    assert not [k for k in leaks(kept) if k[1] != mx.int32]


@pytest.mark.parametrize("index", range(len(cases.BFLOAT16_SIGMAS)))
def test_timestep_is_rounded_as_in_the_reference(model: port.Port, index: int):
    """The reference's modulations in bfloat16. The tolerance is three bfloat16 roundings (2**-8 each) of the largest
    value; an exact timestep would be off by up to 2 radians in the fastest sinusoid."""
    golden = load("bfloat16")
    ours = port.modulations(model, float(golden["sigmas"][index]))
    for key in ("img", "txt", "single"):
        assert port.error(ours[key], golden[key][index]) <= 3 * 2**-8


def test_float32_timestep_is_exact():
    """In float32 the timestep is not rounded: the modulations at 0.9666 are not those of bfloat16's 0.968."""
    exact = port.modulations(port.Port(MODEL), 0.9666)
    golden = load("bfloat16")
    assert float(np.float32(cases.BFLOAT16_SIGMAS[1])) == golden["sigmas"][1]
    assert port.error(exact["img"], golden["img"][1]) > 0.05
