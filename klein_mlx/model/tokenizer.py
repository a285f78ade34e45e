"""Prompt -> token ids, as Qwen3's chat template writes them.

The template is fixed (one user message, thinking switched off), so no template engine is needed and tokenizer.json is
all that is read.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

from klein_mlx.errors import CheckpointError

HEAD, USER = "<|im_start|>", "user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
TEMPLATE = HEAD + USER + "{prompt}" + TAIL
PAD = "<|endoftext|>"
SPECIAL = (PAD, "<|im_start|>", "<|im_end|>", "<think>", "</think>")


@dataclass(frozen=True)
class Tokens:
    """What the text encoder reads.

    input_ids: (B, L) int32, padded on the right. attention_mask: (B, L) bool, False on padding.
    cut: how many tokens each prompt lost to the length limit (0 for most).
    """

    input_ids: mx.array
    attention_mask: mx.array
    cut: list[int]


class Tokenizer:
    """Qwen's byte-level BPE with the chat template around the prompt."""

    def __init__(self, text: str, vocab_size: int, path: str = "tokenizer.json"):
        """text: a tokenizer.json's. vocab_size: rows of the text encoder's embedding. path: for errors.

        Raises CheckpointError if it is not a tokenizer, lacks one of Qwen3's special tokens, or has ids beyond the
        embedding, which MLX would read from whatever lies behind it.
        """
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_str(text)
        except Exception as error:  # the tokenizers library raises bare Exception for a malformed file
            raise CheckpointError(f"{path}: not a tokenizer.json ({_first_line(error)})") from None
        self._backend.no_truncation()
        self._backend.no_padding()
        for token in SPECIAL:
            if len(self._backend.encode(token).ids) != 1 or self._backend.token_to_id(token) is None:
                raise CheckpointError(f"{path}: {token} is no token of its own; klein needs Qwen3's tokenizer.json")
        largest = max(self._backend.get_vocab(with_added_tokens=True).values())
        if largest >= vocab_size:
            raise CheckpointError(
                f"{path}: token ids go up to {largest}, but the text encoder has {vocab_size}: it is another model's"
            )
        self.pad_id: int = self._backend.encode(PAD).ids[0]

    def __call__(self, prompts: list[str], max_length: int, literal: bool = False) -> Tokens:
        """Tokenise, cut and pad to exactly `max_length` positions.

        Special tokens written in a prompt count as such, as in the reference, unless it is `literal`: then they are
        text as any other, and nothing but the template makes a message. What is cut is the end, so a prompt that is
        too long loses the template's tail too, as in the reference.
        """
        rows = [self._literally(p) if literal and self.special_in(p) else self._ids(p) for p in prompts]
        kept = [row[:max_length] for row in rows]
        ids = [row + [self.pad_id] * (max_length - len(row)) for row in kept]
        mask = [[True] * len(row) + [False] * (max_length - len(row)) for row in kept]
        cut = [len(row) - len(short) for row, short in zip(rows, kept, strict=True)]
        return Tokens(mx.array(ids, dtype=mx.int32), mx.array(mask), cut)

    def special_in(self, prompt: str) -> list[str]:
        """The tokenizer's own tokens that are written out in a prompt, in the order in which they come."""
        places = {prompt.find(token): token for token in self._added}
        return [places[place] for place in sorted(places) if place >= 0]

    def _ids(self, prompt: str) -> list[int]:
        return self._backend.encode(TEMPLATE.replace("{prompt}", prompt)).ids

    def _literally(self, prompt: str) -> list[int]:
        """What is between two special tokens is tokenised by itself anyway, so the ends stay as they are."""
        own = self._plain.encode(USER + prompt).ids
        return [*self._backend.encode(HEAD).ids, *own, *self._backend.encode(TAIL).ids]

    @cached_property
    def _added(self) -> list[str]:
        return [token.content for token in self._backend.get_added_tokens_decoder().values()]

    @cached_property
    def _plain(self) -> Any:
        """The same BPE, without the tokens that are found as a whole before it."""
        from tokenizers import Tokenizer as Backend

        plain = Backend(self._backend.model)
        if self._backend.normalizer is not None:
            plain.normalizer = self._backend.normalizer
        if self._backend.pre_tokenizer is not None:
            plain.pre_tokenizer = self._backend.pre_tokenizer
        plain.no_truncation()
        plain.no_padding()
        return plain


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
