"""Prompts to tokens: a byte-level BPE tokenizer in Qwen's layout, trained on the world's captions.

The chat template is Qwen3's for one user message with thinking switched off; prompts are padded on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from captions import caption, combine_instruction, instruction
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Qwen2Tokenizer
from world import EDIT_KINDS, random_edit, random_scene

LENGTH = 48  # text positions, template and padding included
VOCABULARY = 768
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINKING = ("<think>", "</think>")
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)


def chat(prompt: str) -> str:
    """The text that the encoder reads for a prompt."""
    return f"{START}user\n{prompt}{END}\n{START}assistant\n{THINKING[0]}\n\n{THINKING[1]}\n\n"


def any_words(rng: np.random.Generator) -> str:
    """A random caption or instruction of any task, from scenes allowed in training."""
    draw = rng.random()
    scene = random_scene(rng, 1 if draw > 0.9 else None)
    if draw < 0.6:
        return caption(scene, rng).words
    if draw > 0.9:
        return combine_instruction(scene, rng).words
    edit = random_edit(scene, EDIT_KINDS[int(rng.integers(4))], rng)
    return instruction(scene, edit, rng).words


def train_tokenizer(seed: int, count: int = 30_000) -> Tokenizer:
    """A byte-level BPE of exactly VOCABULARY tokens, the five special ones last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    special = (PAD, START, END, *THINKING)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = np.random.default_rng(seed)
    words = [any_words(rng) for _ in range(count)]
    tokenizer.train_from_iterator([*words, *["user\nassistant\n\n\n"] * 300, *["\n\n"] * 300], trainer)
    free = VOCABULARY - len(special) - tokenizer.get_vocab_size()
    if free < 0:
        raise ValueError(f"the tokenizer has {-free} tokens too many")
    tokenizer.add_tokens([AddedToken(f"<|unused_{i}|>", normalized=False) for i in range(free)])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special[:3]])
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in THINKING])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a transformers tokenizer folder with the chat template."""
    wrapped = Qwen2Tokenizer(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=None, bos_token=None)
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.model_max_length = 512
    wrapped.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


class Prompts:
    """Turns prompts into padded ids and masks."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.pad = self.tokenizer.token_to_id(PAD)

    def fits(self, prompt: str) -> bool:
        """Whether the prompt, in its chat template, has at most LENGTH tokens."""
        return len(self.tokenizer.encode(chat(prompt), add_special_tokens=False).ids) <= LENGTH

    def __call__(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask, both (B, LENGTH) int64; a prompt that does not fit is refused."""
        ids = np.full((len(prompts), LENGTH), self.pad, np.int64)
        mask = np.zeros((len(prompts), LENGTH), np.int64)
        for row, prompt in enumerate(prompts):
            tokens = self.tokenizer.encode(chat(prompt), add_special_tokens=False).ids
            if len(tokens) > LENGTH:
                raise ValueError(f"{len(tokens)} tokens for {prompt!r}; at most {LENGTH} fit")
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask
