"""Prompts rewritten: by a small random Qwen3 through mlx-lm, and by a stand-in for what is made of the words."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from test_cli import TINY, klein

from klein_mlx.cli.enhance import LanguageModel, enhance, enhance_prompts, find_language_model
from klein_mlx.errors import CheckpointError, RequestError
from klein_mlx.images.saving import read_metadata

TOKENIZER = Path(__file__).parents[2] / "klein_mlx" / "tiny" / "tokenizer.json"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of two layers with random weights, as mlx-lm saves one."""
    from mlx_lm.models.qwen3 import Model, ModelArgs

    folder = tmp_path_factory.mktemp("qwen")
    vocabulary = max(json.loads(TOKENIZER.read_text())["model"]["vocab"].values()) + 64
    config = {
        **{"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-6},
        **{"vocab_size": vocabulary, "max_position_embeddings": 512, "rope_theta": 1e6, "tie_word_embeddings": True},
    }
    model = Model(ModelArgs.from_dict(config))
    keys = mx.random.split(mx.random.key(0), 1000)
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for index, (name, value) in enumerate(weights.items()):
        weights[name] = value if value.ndim == 1 else mx.random.normal(value.shape, key=keys[index]) * 0.5
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_real_language_model_is_deterministic_by_seed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves MLX's own random state alone."""
    from klein_mlx.cli import enhance as module

    monkeypatch.setattr(module, "MAX_TOKENS", 12)
    mx.random.seed(5)
    expected = mx.random.uniform().item()
    mx.random.seed(5)
    language = LanguageModel(folder, folder)
    first, again, other = (language.write("a star", seed) for seed in (1, 1, 2))
    assert first == again != other
    assert language.write("a cross", 1) != first
    assert mx.random.uniform().item() == expected


def test_in_the_command(folder: Path, tmp_path: Path) -> None:
    step = ("--steps", "1", "--width", "64", "--height", "64", "--seed", "7", "--offline")
    done = klein(*TINY, "a star", *step, "--enhance", "--enhance-model", folder, "-o", "a.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    recipe = read_metadata(tmp_path / "a.png").recipe
    assert recipe
    assert (recipe["original"], recipe["enhanced_by"]) == ("a star", folder.name)
    assert recipe["prompt"] != "a star"
    assert "enhanced: " in done.stderr
    assert str(folder).encode() not in (tmp_path / "a.png").read_bytes()
    again = klein("again", "a.png", "-o", "b.png", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ('"A red fox,\n\n soft light."', "A red fox, soft light."),
        ("<think>hm</think>\n**Prompt:** a fox", "a fox"),
        ("Enhanced prompt: 赤い狐 🦊", "赤い狐 🦊"),
        ('a sign that says "OPEN"', 'a sign that says "OPEN"'),
    ],
)
def test_what_is_made_of_its_words(written: str, kept: str) -> None:
    assert enhance([("a fox", 1)], lambda prompt, seed: written) == [kept]


def test_silence_is_told() -> None:
    with pytest.raises(RequestError, match="wrote nothing for 'a fox'; leave --enhance out"):
        enhance([("a fox", 1)], lambda prompt, seed: "<think>and so on")


class Source:
    def __init__(self, path: Path):
        self.path = path


def test_which_model_is_taken(folder: Path, tmp_path: Path) -> None:
    """The checkpoint's own where it is whole; none that wants to run code, or that mlx-lm cannot load."""
    with pytest.raises(CheckpointError, match="lacks the layers that --enhance needs"):
        find_language_model(Source(tmp_path), None, True)
    shutil.copytree(folder, tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(folder / "tokenizer.json", tmp_path / "tokenizer")
    own = find_language_model(Source(tmp_path), None, True)
    assert own == (tmp_path / "text_encoder", tmp_path / "tokenizer", "the checkpoint's Qwen3")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="mlx-lm cannot load it as a language model"):
        enhance_prompts([("a fox", 1)], Source(tmp_path), None, True)
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps({**config, "model_file": "evil.py"}))
    with pytest.raises(CheckpointError, match="needs custom code to be run"):
        find_language_model(Source(tmp_path), None, True)


def test_a_model_for_nothing_is_refused(tmp_path: Path) -> None:
    """Not ignored: the prompt would stay as it is."""
    done = klein(*TINY, "a star", "--enhance-model", "x/y", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --enhance-model is x/y, but no prompt is rewritten; add --enhance\n"
    assert list(tmp_path.iterdir()) == []
