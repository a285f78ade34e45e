"""The tokenizer around a real tokenizer.json (the embedded checkpoint's); the goldens compare ids with transformers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from klein_mlx.errors import CheckpointError
from klein_mlx.model.tokenizer import TEMPLATE, Tokenizer
from klein_mlx.weights.checkpoint import read_tokenizer

TINY = Path(__file__).parents[2] / "klein_mlx" / "tiny" / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return read_tokenizer(TINY, 768)


def test_padding_is_on_the_right_and_masked(tokenizer: Tokenizer) -> None:
    tokens = tokenizer(["a red circle", ""], 40)
    assert tokens.input_ids.shape == tokens.attention_mask.shape == (2, 40)
    assert tokens.cut == [0, 0]
    lengths = tokens.attention_mask.sum(axis=1).tolist()
    assert lengths[1] < lengths[0] < 40
    for ids, mask, length in zip(tokens.input_ids.tolist(), tokens.attention_mask.tolist(), lengths, strict=True):
        assert mask == [True] * length + [False] * (40 - length)
        assert set(ids[length:]) == {tokenizer.pad_id}
        assert tokenizer.pad_id not in ids[:length]


def test_what_is_cut_is_the_end_and_is_told(tokenizer: Tokenizer) -> None:
    whole = tokenizer(["circle " * 100], 400)
    short = tokenizer(["circle " * 100], 40)
    assert short.input_ids.tolist()[0] == whole.input_ids.tolist()[0][:40]
    assert short.cut == [int(whole.attention_mask.sum().item()) - 40]


def test_the_template_is_around_the_prompt(tokenizer: Tokenizer) -> None:
    text = TEMPLATE.replace("{prompt}", "{braces} stay")
    assert text == "<|im_start|>user\n{braces} stay<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    with_braces = tokenizer(["{prompt}"], 40)
    assert with_braces.cut == [0]


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        read_tokenizer(path, 768)
    path.write_text('{"version": "1.0", "model"')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is not valid JSON"):
        read_tokenizer(path, 768)


def test_another_models_tokenizer(tmp_path: Path) -> None:
    """MLX does not check an embedding's bounds: ids beyond it would read memory that is not ours."""
    with pytest.raises(CheckpointError, match="token ids go up to 767, but the text encoder has 767"):
        read_tokenizer(TINY, 767)
    path = tmp_path / "tokenizer.json"
    path.write_text(TINY.read_text().replace("<|im_start|>", "<|start|>"))
    with pytest.raises(CheckpointError, match="<.im_start.> is not a single token"):
        read_tokenizer(path, 768)


HOSTILE: dict[str, tuple[str, Any, str]] = {
    "words": ("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "its model is 'WordLevel', not BPE"),
    "pieces": ("model", {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}, "its model is 'Unigram', not BPE"),
    "no model": ("model", None, "it has no model"),
    "a regex that backtracks": (
        "pre_tokenizer",
        {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
        "its pre_tokenizer is not Qwen2's split into words and bytes",
    ),
    "a text that grows": (
        "normalizer",
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000},
        "its normalizer is 'Replace', not NFC",
    ),
    "no normalizer": ("normalizer", None, "its normalizer is None, not NFC"),
    "a token in front": (
        "post_processor",
        {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]},
        "its post_processor, 'BertProcessing', adds tokens",
    ),
    "chance": ("model dropout", 0.5, "its model's dropout is 0.5"),
    "an id as text": ("model vocab", {"a": "0"}, "its tokens are damaged"),
    "few bytes": ("model vocab", {"a": 0}, "255 of the 256 bytes are not tokens ('!' ...)"),
    "a merge of nothing": ("model merges", [["a", "\ud800"]], "not a tokenizer.json"),
    "a merge of one": ("model merges", ["a"], "not a tokenizer.json"),
    "an endless token": ("added_tokens", [{"id": 763, "content": "a" * 5000}], "the longest token of 5000 characters"),
    "a gap": ("added_tokens", [{"id": 765, "content": "<think>"}], "'<think>' has the id 765, but it would be 763"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_only_qwens_kind_reaches_the_library(name: str) -> None:
    """Another kind is another model's, or one that hangs, aborts or eats the memory."""
    where, value, words = HOSTILE[name]
    values = json.loads(TINY.read_text())
    *outer, last = where.split()
    place = values[outer[0]] if outer else values
    place[last] = value
    with pytest.raises(CheckpointError, match=re.escape(words)):
        Tokenizer(values, 768)


def test_what_decides_no_id_is_not_read(tokenizer: Tokenizer) -> None:
    """As transformers leaves it behind: lengths, padding, a decoder, and an empty template."""
    values = json.loads(TINY.read_text())
    template = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": []}
    values |= {"truncation": {"max_length": 3}, "padding": [], "decoder": {"type": "Fuse"}, "post_processor": template}
    prompts = ["a re\u0301d circle, 12 of <|im_end|> them\n\n", ""]
    twin = Tokenizer(values, 768)(prompts, 64)
    assert twin.input_ids.tolist() == tokenizer(prompts, 64).input_ids.tolist()


MARKS = "<|im_end|>\n<|im_start|>system\n<think>x</think><|endoftext|>"


def test_marks_in_a_prompt_are_marks_or_text(tokenizer: Tokenizer) -> None:
    """Literally, the template's own marks are the only ones, and the text comes back whole."""
    assert tokenizer.special_in(f"a {MARKS}") == ["<|im_end|>", "<|im_start|>", "<think>", "</think>", "<|endoftext|>"]
    assert tokenizer.special_in("a <think less> |im_end| star") == []
    backend = tokenizer._backend
    marks = {backend.token_to_id(token) for token in tokenizer.special_in(MARKS)}

    def marks_and_text(prompt: str, literal: bool) -> tuple[list[Any], str]:
        tokens = tokenizer([prompt], 120, literal)
        ids = tokens.input_ids.tolist()[0][: int(tokens.attention_mask.sum().item())]
        return [token for token in ids if token in marks], backend.decode(ids, skip_special_tokens=False)

    template, _ = marks_and_text("a star", False)
    for literal in (False, True):
        found, text = marks_and_text(MARKS, literal)
        assert text == TEMPLATE.replace("{prompt}", MARKS)
        assert (found == template) is literal


@pytest.mark.parametrize(
    "prompt", ["a star", "", "\n\n two  lines\n", " it's 3 o'clock", "e\u0301 \u661f \U0001f98a", "<a|b>"]
)
def test_the_literal_way_is_the_same_for_text(tokenizer: Tokenizer, prompt: str) -> None:
    assert tokenizer._literally(prompt) == tokenizer._ids(prompt)
