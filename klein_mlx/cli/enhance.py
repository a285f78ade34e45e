"""Prompts rewritten by a language model, through mlx-lm: off unless asked for, shown, and recorded beside the original.

The model is the checkpoint's own Qwen3, where all of its layers are on disk (a folder in diffusers' layout has them,
our own keep what the encoder needs), or any that mlx-lm runs. mlx-lm is imported when it is needed, and the language
model's weights are gone before the first part of the pipeline is loaded.
"""

import gc
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from klein_mlx.errors import CheckpointError, RequestError, line_of
from klein_mlx.weights.checkpoint import kept_random_state
from klein_mlx.weights.hub import download

TEMPERATURE, TOP = 0.7, 20  # Qwen3's own advice without thinking
MAX_TOKENS = 400
PATTERNS = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "*.model")  # never code
INSTRUCTION = (
    "You write prompts for an image generator. Rewrite the user's prompt as one vivid paragraph of at most 120 words: "
    "keep every subject, colour, number, place and quoted text that it names, change none of them, and add light, "
    "composition, material and mood that suit it. Answer with the new prompt alone, in the language of the user."
)

Write = Callable[[str, int], str]


def enhance(prompts: Sequence[tuple[str, int]], write: Write) -> list[str]:
    """Each (prompt, seed) rewritten; `write` is what the language model says to a prompt with a seed.

    Raises RequestError if it says nothing.
    """
    written = []
    for prompt, seed in prompts:
        text = _clean(write(prompt, seed))
        if not text:
            raise RequestError(
                f"--enhance: the language model wrote nothing for {prompt[:40]!r}; leave --enhance out, or name "
                "another with --enhance-model"
            )
        written.append(text)
    return written


def _clean(text: str) -> str:
    """What was written without thoughts, a heading, quotes around it and line breaks."""
    text = re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.S)
    text = " ".join(text.split())
    text = re.sub(r"^\**(?:new |rewritten |enhanced )?prompt\**:\**\s*", "", text, flags=re.I)
    return text[1:-1].strip() if len(text) > 1 and text[0] in "\"'“" and text[-1] in "\"'”" else text


def find_language_model(source: Any, model: str | None, offline: bool) -> tuple[Path, Path, str]:
    """(folder of the weights, folder of the tokenizer, name for the recipe).

    source: the opened pipeline's, whose own Qwen3 is taken where `model` is None. model: a folder or a hub id.
    Raises CheckpointError if there is none.
    """
    if model is not None:
        folder = Path(model).expanduser()
        if not folder.is_dir():
            folder = download(model, local_files_only=offline, patterns=PATTERNS)
        _check_config(folder)
        return folder, folder, model if folder != Path(model).expanduser() else folder.resolve().name
    encoder, tokenizer = source.path / "text_encoder", source.path / "tokenizer"
    if not (encoder / "config.json").is_file() or not (tokenizer / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{source.path}: its text encoder lacks the layers that --enhance needs; name a language model with "
            "--enhance-model, such as Qwen/Qwen3-4B"
        )
    if _check_config(encoder).get("model_type") == "mistral3":
        raise CheckpointError(f"{source.path}: has no Qwen3; name one with --enhance-model, such as Qwen/Qwen3-4B")
    return encoder, tokenizer, "the checkpoint's Qwen3"


def _check_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: cannot be read ({type(error).__name__})") from None
    if not isinstance(config, dict) or "model_file" in config or "auto_map" in config:
        raise CheckpointError(f"{folder / 'config.json'}: needs custom code to be run; klein_mlx runs none")
    return config


class LanguageModel:
    """A language model of mlx-lm, loaded. `write` is deterministic: it depends on prompt and seed alone."""

    def __init__(self, weights: Path, tokenizer: Path):
        """Raises CheckpointError if mlx-lm cannot run it."""
        import contextlib
        import io

        try:
            with contextlib.redirect_stdout(io.StringIO()), kept_random_state():
                from mlx_lm.utils import load_model, load_tokenizer

                self.model, config = load_model(weights)
                self.tokenizer = load_tokenizer(tokenizer, eos_token_ids=config.get("eos_token_id"))
        except Exception as error:  # of mlx-lm, transformers and MLX, which have no common parent
            raise CheckpointError(f"{weights}: mlx-lm cannot load it as a language model: {line_of(error)}") from None

    def write(self, prompt: str, seed: int) -> str:
        """What the model answers to INSTRUCTION and a prompt."""
        from mlx_lm.generate import generate_step

        messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": prompt}]
        try:
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)
        except Exception as error:
            wrong = f"the language model's tokenizer has no usable chat template: {line_of(error)}"
            raise CheckpointError(wrong) from None
        tokens = []
        sampler = _sampler(mx.random.key(seed))
        for token, _ in generate_step(mx.array(ids), self.model, max_tokens=MAX_TOKENS, sampler=sampler):
            if int(token) in self.tokenizer.eos_token_ids:
                break
            tokens.append(int(token))
        return self.tokenizer.decode(tokens)


def _sampler(key: mx.array) -> Callable[[mx.array], mx.array]:
    """Draws from the TOP likeliest tokens with a key of its own: MLX's global random state is left alone."""
    state = key

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal state
        state, now = mx.random.split(state)
        count = min(TOP, logprobs.shape[-1])
        likely = mx.argsort(-logprobs, axis=-1)[..., :count]
        scaled = mx.take_along_axis(logprobs, likely, axis=-1) / TEMPERATURE
        choice = mx.random.categorical(scaled, key=now)
        return mx.take_along_axis(likely, choice[..., None], axis=-1).squeeze(-1)

    return sample


def enhance_prompts(
    prompts: Sequence[tuple[str, int]], source: Any, model: str | None, offline: bool
) -> tuple[list[str], str]:
    """The prompts rewritten, and the language model's name; nothing of it stays in memory."""
    weights, tokenizer, name = find_language_model(source, model, offline)
    language = LanguageModel(weights, tokenizer)
    try:
        return enhance(prompts, language.write), name
    finally:
        del language
        gc.collect()
        mx.clear_cache()
