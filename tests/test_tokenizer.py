"""The tokenizer around a real tokenizer.json (the embedded checkpoint's); the goldens compare ids with transformers."""

from pathlib import Path

import pytest

from klein_mlx.errors import CheckpointError
from klein_mlx.tokenizer import TEMPLATE, Tokenizer

TINY = Path(__file__).parent.parent / "klein_mlx" / "tiny" / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY, 512)


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
        Tokenizer(path, 512)
    path.write_text('{"version": "1.0", "model"')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer\.json"):
        Tokenizer(path, 512)


def test_another_models_tokenizer(tmp_path: Path) -> None:
    """MLX does not check an embedding's bounds: ids beyond it would read memory that is not ours."""
    with pytest.raises(CheckpointError, match="token ids go up to 511, but the text encoder has 511"):
        Tokenizer(TINY, 511)
    path = tmp_path / "tokenizer.json"
    path.write_text(TINY.read_text().replace("<|im_start|>", "<|start|>"))
    with pytest.raises(CheckpointError, match="<.im_start.> is no token of its own"):
        Tokenizer(path, 512)
