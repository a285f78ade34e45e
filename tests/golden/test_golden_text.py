"""The tokenizer and the text encoder against transformers' tensors, and against mlx_lm's Qwen3."""

import json
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from golden import cases, port
from golden.files import MODEL, load
from mlx.utils import tree_flatten

from klein_mlx.model.text_encoder import TextEncoder
from klein_mlx.weights.checkpoint import read_tokenizer


@pytest.fixture(scope="module")
def model() -> Iterator[port.Port]:
    with mx.stream(mx.cpu):  # the tolerances are the CPU's
        yield port.Port(MODEL)


LENGTHS = {"short": (cases.PROMPTS, cases.SHORT), "long": (tuple(cases.PROMPTS[i] for i in cases.LONG_PROMPTS), 512)}


@pytest.mark.parametrize("name", LENGTHS)
def test_text(model: port.Port, name: str):
    """Equal ids; embeddings within 1e-4: float32 sums in another order, four layers deep, give about 2e-5."""
    golden = load("text", name)
    ours = port.text(model, *LENGTHS[name])
    np.testing.assert_array_equal(ours["input_ids"], golden["input_ids"])
    np.testing.assert_array_equal(ours["attention_mask"], golden["attention_mask"])
    np.testing.assert_array_equal(ours["txt_ids"], golden["txt_ids"])
    assert port.error(ours["prompt_embeds"], golden["prompt_embeds"]) <= 1e-4


def test_golden_text_is_not_trivial():
    """One prompt is cut, one is nearly empty, all differ in length: the cases say what they mean to say."""
    lengths = load("text", "short")["attention_mask"].sum(axis=1)
    assert lengths[3] == cases.SHORT
    assert len(set(lengths.tolist())) == len(lengths)
    assert lengths[1] == lengths.min() < 20
    long = load("text", "long")["attention_mask"].sum(axis=1)
    assert long[0] < 40
    assert long[1] == cases.LONG


def test_cut_prompt_loses_the_templates_tail(model: port.Port):
    """What is cut off is the end, <|im_end|> and all, and the caller is told how much."""
    tokenizer = read_tokenizer(model.source.tokenizer_file, model.source.config.text_encoder.vocab_size)
    tokens = tokenizer([cases.PROMPTS[3], cases.PROMPTS[0]], cases.LONG)
    whole = tokenizer([cases.PROMPTS[3]], 2048)
    assert tokens.cut == [int(np.array(whole.attention_mask).sum()) - cases.LONG, 0]
    assert tokens.cut[0] > 0
    np.testing.assert_array_equal(np.array(tokens.input_ids)[0], np.array(whole.input_ids)[0, : cases.LONG])


@pytest.mark.parametrize("taps", [(1, 3), (2, 3), (2,), (3,)])
def test_taps_count_layers(model: port.Port, taps: tuple[int, ...]):
    """Tap k is the state after k layers: other taps of the same weights give the same pieces of the golden tensor."""
    encoder = TextEncoder(model.config.text_encoder, taps)
    names = {name for name, _ in tree_flatten(encoder.parameters())}
    weights = tree_flatten(model.part("text_encoder").parameters())
    encoder.load_weights([(name, value) for name, value in weights if name in names])
    golden = load("text", "short")
    embeds = encoder(mx.array(golden["input_ids"]), mx.array(golden["attention_mask"]).astype(mx.bool_))
    pieces = np.split(golden["prompt_embeds"], 3, axis=-1)
    wanted = np.concatenate([pieces[tap - 1] for tap in taps], axis=-1)
    assert port.error(np.array(embeds), wanted) <= 1e-4


def test_batch_does_not_matter(model: port.Port):
    """A prompt's embeddings, padding positions included, are the same alone and beside others."""
    alone = port.text(model, cases.PROMPTS[2:3], cases.SHORT)["prompt_embeds"]
    together = port.text(model, cases.PROMPTS, cases.SHORT)["prompt_embeds"][2:3]
    assert port.error(alone, together) <= 1e-5


def test_mlx_lm_agrees(model: port.Port):
    """mlx_lm's Qwen3 with the same weights, on a prompt without padding, has the same states at the taps."""
    qwen3 = pytest.importorskip("mlx_lm.models.qwen3")
    folder = MODEL / "text_encoder"
    config = json.loads((folder / "config.json").read_text())
    theirs = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    weights: dict[str, mx.array] = mx.load(str(folder / "model.safetensors"))  # type: ignore[assignment]
    theirs.load_weights([(key, value.astype(mx.float32)) for key, value in weights.items()], strict=True)
    length = int(load("text", "short")["attention_mask"][2].sum())
    ours = port.text(model, cases.PROMPTS[2:3], length)
    x = theirs.model.embed_tokens(mx.array(ours["input_ids"]))
    mask = mx.tri(length, dtype=mx.bool_)
    states = []
    for count, layer in enumerate(theirs.model.layers, start=1):
        x = layer(x, mask, None)
        if count in model.config.taps:
            states.append(x)
    assert len(states) == 3
    assert port.error(ours["prompt_embeds"], np.array(mx.concatenate(states, axis=-1))) <= 1e-5
