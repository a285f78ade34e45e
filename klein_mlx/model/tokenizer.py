"""Prompt -> token ids, as Qwen3's chat template writes them.

The template is fixed (one user message, thinking switched off), so no template engine is needed and tokenizer.json is
all that is read. Such a file is a program: its regular expressions can backtrack for ever, its normalizers grow a text
without bound, and the library aborts on some. So only its tokens are taken, into Qwen2's byte-level BPE, and a file
that describes anything else is refused.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

from klein_mlx.errors import CheckpointError, one_line, short

HEAD, USER = "<|im_start|>", "user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
TEMPLATE = HEAD + USER + "{prompt}" + TAIL
PAD = "<|endoftext|>"
SPECIAL = (PAD, "<|im_start|>", "<|im_end|>", "<think>", "</think>")

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+"
)
_SPLIT = {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Isolated", "invert": False}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
# What a BPE may have and Qwen2's has not: absent, null, false, 0 or "".
_UNUSED = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MOST_ADDED = 10_000  # Qwen3 has 26
_LONGEST_TOKEN = 1000  # characters; Qwen3's longest has 256


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

    def __init__(self, values: dict[str, Any], vocab_size: int, path: str = "tokenizer.json"):
        """values: of a tokenizer.json. vocab_size: rows of the text encoder's embedding. path: for errors.

        Raises CheckpointError if it is not Qwen2's BPE, lacks one of Qwen3's special tokens, or has ids beyond the
        embedding, which MLX would read from whatever lies behind it.
        """
        _check_kind(values, path)
        self._backend = _built(*_checked_tokens(values, vocab_size, path), path)
        for token in SPECIAL:
            if len(self._backend.encode(token).ids) != 1 or self._backend.token_to_id(token) is None:
                raise CheckpointError(f"{path}: {token} is not a single token; klein needs Qwen3's tokenizer.json")
        self.pad_id: int = self._backend.encode(PAD).ids[0]

    def __call__(self, prompts: list[str], max_length: int, literal: bool = False) -> Tokens:
        """Tokenize, cut and pad to exactly `max_length` positions.

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
        """What is between two special tokens is tokenized by itself anyway, so the ends stay as they are."""
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
        plain.normalizer, plain.pre_tokenizer = self._backend.normalizer, self._backend.pre_tokenizer
        return plain


def _built(vocab: dict[str, int], merges: list[Any], added: list[dict[str, Any]], path: str) -> Any:
    """Qwen2's byte-level BPE with a file's tokens."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    try:
        pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
        backend = Backend(models.BPE(vocab, pairs))  # type: ignore[arg-type]
        backend.normalizer = normalizers.NFC()
        backend.add_tokens([AddedToken(token["content"], **_flags(token)) for token in added])
    except BaseException as error:  # bare Exception for wrong merges; a panic derives from BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise CheckpointError(f"{path}: not a tokenizer.json ({one_line(str(error))})") from None
    for token in added:
        if (number := backend.token_to_id(token["content"])) != token["id"]:
            raise CheckpointError(
                f"{path}: {short(token['content'])} has the id {token['id']}, but it would be {number}: the tokens"
                " before it are incomplete"
            )
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    backend.decoder = decoders.ByteLevel()
    return backend


def _flags(token: dict[str, Any]) -> dict[str, bool]:
    return {flag: token.get(flag, False) for flag in _FLAGS}


def _check_kind(values: dict[str, Any], path: str) -> None:
    """CheckpointError unless a tokenizer.json describes Qwen2's byte-level BPE."""

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: {what}; klein needs Qwen3's tokenizer.json")

    model = values.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{path}: not a tokenizer.json (it has no model)")
    if model.get("type", "BPE") != "BPE":
        raise refuse(f"its model is {short(model['type'])}, not BPE")
    if other := [key for key in _UNUSED if model.get(key)]:
        raise refuse(f"its model's {other[0]} is {short(model[other[0]])}")
    if values.get("normalizer") != {"type": "NFC"}:
        raise refuse(f"its normalizer is {_kind(values.get('normalizer'))}, not NFC")
    before = values.get("pre_tokenizer")
    steps = before.get("pretokenizers") if isinstance(before, dict) and before.get("type") == "Sequence" else None
    if not isinstance(steps, list) or len(steps) != 2 or steps[0] != _SPLIT or not _contains(steps[1], _BYTES):
        raise refuse("its pre_tokenizer is not Qwen2's split into words and bytes")
    if not _keeps(values.get("post_processor")):
        raise refuse(f"its post_processor, {_kind(values['post_processor'])}, adds tokens")


def _checked_tokens(values: dict[str, Any], vocab_size: int, path: str) -> tuple[dict[str, int], list[Any], list[Any]]:
    """The vocabulary, merges and added tokens, with ids that the text encoder has; or a CheckpointError."""
    vocab, merges = values["model"].get("vocab"), values["model"].get("merges")
    added = values.get("added_tokens", [])
    sound = (
        isinstance(vocab, dict)
        and isinstance(merges, list)
        and isinstance(added, list)
        and all(type(number) is int and number >= 0 for number in vocab.values())
        and all(isinstance(token, dict) and type(token.get("id")) is int and token["id"] >= 0 for token in added)
        and all(isinstance(token.get("content"), str) and token["content"] for token in added)
        and all(type(token.get(flag, False)) is bool for token in added for flag in _FLAGS)
    )
    if not sound:
        raise CheckpointError(f"{path}: not a tokenizer.json (its tokens are damaged)")
    largest = max((*vocab.values(), *(token["id"] for token in added)), default=-1)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{path}: token ids go up to {largest}, but the text encoder has {vocab_size}: it is another model's"
        )
    if missing := [letter for letter in _alphabet() if letter not in vocab]:
        raise CheckpointError(
            f"{path}: {len(missing)} of the 256 bytes are not tokens ({missing[0]!r} ...), so it would drop text"
        )
    longest = max(map(len, (*vocab, *(token["content"] for token in added))))
    if len(added) > _MOST_ADDED or longest > _LONGEST_TOKEN:
        raise CheckpointError(
            f"{path}: {len(added)} added tokens, the longest token of {longest} characters; at most {_MOST_ADDED} and"
            f" {_LONGEST_TOKEN} are read"
        )
    return vocab, merges, added


def _alphabet() -> list[str]:
    """Byte-level BPE's letters for the 256 bytes: printable ones stand for themselves, others begin at U+0100."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in (*own, *range(0x100, 0x100 + 256 - len(own)))]


def _keeps(processor: Any) -> bool:
    """Whether a post-processor leaves the ids of one text as they are: ByteLevel only moves offsets."""
    if processor is None or _contains(processor, {"type": "ByteLevel"}):
        return True
    return _contains(processor, {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]})


def _contains(value: Any, expected: dict[str, Any]) -> bool:
    return isinstance(value, dict) and all(key in value and value[key] == item for key, item in expected.items())


def _kind(value: Any) -> str:
    return short(value.get("type")) if isinstance(value, dict) else short(value)
