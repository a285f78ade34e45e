"""Prompt -> token ids, as the chat template of Qwen3, or of Mistral-Small, writes them.

The template is fixed (one user message; Qwen3's thinking switched off, Mistral's behind one system message), so no
template engine is needed and tokenizer.json is all that is read. Such a file is a program: its regular expressions can
backtrack for ever, its normalizers grow a text without bound, and the library aborts on some. So only its tokens are
taken, into a byte-level BPE of a known layout, and a file that describes anything else is refused.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import mlx.core as mx

from klein_mlx.errors import CheckpointError, line_of, short

HEAD, USER = "<|im_start|>", "user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
TEMPLATE = HEAD + USER + "{prompt}" + TAIL
PAD = "<|endoftext|>"
SPECIAL = (PAD, "<|im_start|>", "<|im_end|>", "<think>", "</think>")

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+"
)
# Mistral's own, of tekken.json; and the one with which transformers wrote most of its tokenizer.json files (numbers in
# threes, no words by case). diffusers takes what the file has.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONVERTED = _WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
# What a BPE may have and these have not: absent, null, false, 0 or "".
_UNUSED = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MOST_ADDED = 10_000  # Qwen3 has 26, Mistral-Small 1000
_LONGEST_TOKEN = 1000  # characters; Qwen3's longest has 256


# Source: diffusers, pipelines/flux2/system_messages.py: with its line break, which the encoder reads.
SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object"
    " relationships, object\nattribution and actions without speculation."
)


@dataclass(frozen=True)
class Layout:
    """What a kind of text encoder expects around a prompt and of its tokenizer.json.

    name, split: for errors. head, user, tail: the template's text before the prompt, up to its last special token and
    behind that, and after the prompt. special: tokens that must be there. words: the regular expressions that may split
    a text, of which the file has one. normalizer: the file's. bare: what a prompt loses before all else. pads_left: on
    which side the padding is. merges: whether words that are tokens may skip the merges (`ignore_merges`), and special
    tokens may be put before a text, which the template has itself.
    """

    name: str
    split: str
    head: str
    user: str
    tail: str
    pad: str
    special: tuple[str, ...]
    words: tuple[str, ...]
    normalizer: Any = None
    bare: str | None = None
    pads_left: bool = False
    merges: bool = False


QWEN = Layout("Qwen3", "Qwen2", HEAD, USER, TAIL, PAD, SPECIAL, (_WORDS,), {"type": "NFC"})
_MISTRAL_HEAD = f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]"
MISTRAL = Layout(
    "Mistral-Small-3.2",
    "Tekken",
    _MISTRAL_HEAD,
    "",
    "[/INST]",
    "<pad>",
    ("<pad>", "<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"),
    (_TEKKEN, _CONVERTED, _WORDS),
    bare="[IMG]",
    pads_left=True,
    merges=True,
)
LAYOUTS = {"qwen3": QWEN, "mistral": MISTRAL}


@dataclass(frozen=True)
class Tokens:
    """What the text encoder reads.

    input_ids: (B, L) int32, padded on the layout's side. attention_mask: (B, L) bool, False on padding.
    cut: how many tokens each prompt lost to the length limit (0 for most).
    """

    input_ids: mx.array
    attention_mask: mx.array
    cut: list[int]


class Tokenizer:
    """A byte-level BPE with the chat template around the prompt."""

    def __init__(self, values: dict[str, Any], vocab_size: int, path: str = "tokenizer.json", layout: Layout = QWEN):
        """values: of a tokenizer.json. vocab_size: rows of the text encoder's embedding. path: for errors.

        Raises CheckpointError if it is not the layout's BPE, lacks one of its special tokens, or has ids beyond the
        embedding, which MLX would read from whatever lies behind it.
        """
        self._layout = layout
        words = _check_kind(values, path, layout)
        self._backend = _built(
            *_checked_tokens(values, vocab_size, path), path, words, layout, bool(values["model"].get("ignore_merges"))
        )
        for token in layout.special:
            if len(self._backend.encode(token).ids) != 1 or self._backend.token_to_id(token) is None:
                raise _refusal(path, f"{token} is not a single token", layout)
        self.pad_id: int = self._backend.encode(layout.pad).ids[0]

    def __call__(self, prompts: list[str], max_length: int, literal: bool = False) -> Tokens:
        """Tokenize, cut and pad to exactly `max_length` positions.

        Special tokens written in a prompt count as such, as in the reference, unless it is `literal`: then they are
        text as any other, and nothing but the template makes a message. What is cut is the end, so a prompt that is
        too long loses the template's tail too, as in the reference.
        """
        rows = [self._literally(p) if literal and self.special_in(p) else self._ids(p) for p in prompts]
        kept = [row[:max_length] for row in rows]
        free, order = [max_length - len(row) for row in kept], -1 if self._layout.pads_left else 1
        ids = [sum((row, [self.pad_id] * n)[::order], []) for row, n in zip(kept, free, strict=True)]
        mask = [sum(([True] * (max_length - n), [False] * n)[::order], []) for n in free]
        cut = [len(row) - len(short) for row, short in zip(rows, kept, strict=True)]
        return Tokens(mx.array(ids, dtype=mx.int32), mx.array(mask), cut)

    def special_in(self, prompt: str) -> list[str]:
        """The tokenizer's own tokens that are written out in a prompt, in the order in which they come."""
        places = {prompt.find(token): token for token in self._added}
        return [places[place] for place in sorted(places) if place >= 0]

    def _ids(self, prompt: str) -> list[int]:
        own = self._layout
        prompt = prompt.replace(own.bare, "") if own.bare else prompt
        return self._backend.encode(f"{own.head}{own.user}{prompt}{own.tail}").ids

    def _literally(self, prompt: str) -> list[int]:
        """What is between two special tokens is tokenized by itself anyway, so the ends stay as they are."""
        own = self._layout
        inner = self._plain.encode(own.user + prompt).ids
        return [*self._backend.encode(own.head).ids, *inner, *self._backend.encode(own.tail).ids]

    @cached_property
    def _added(self) -> list[str]:
        return [token.content for token in self._backend.get_added_tokens_decoder().values()]

    @cached_property
    def _plain(self) -> Any:
        """The same BPE, without the tokens that are found as a whole before it."""
        from tokenizers import Tokenizer as Backend

        plain = Backend(self._backend.model)
        plain.pre_tokenizer = self._backend.pre_tokenizer
        if self._backend.normalizer:
            plain.normalizer = self._backend.normalizer
        return plain


def _built(
    vocab: dict[str, int],
    merges: list[Any],
    added: list[dict[str, Any]],
    path: str,
    words: str,
    layout: Layout,
    ignore_merges: bool,
) -> Any:
    """A byte-level BPE with a file's tokens. words: the regular expression that splits a text."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    try:
        pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
        backend = Backend(models.BPE(vocab, pairs, ignore_merges=ignore_merges))  # type: ignore[arg-type]
        if layout.normalizer:
            backend.normalizer = normalizers.NFC()
        flags = [{flag: token.get(flag, False) for flag in _FLAGS} for token in added]
        backend.add_tokens([AddedToken(token["content"], **own) for token, own in zip(added, flags, strict=True)])
    except BaseException as error:  # bare Exception for wrong merges; a panic derives from BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise CheckpointError(f"{path}: not a tokenizer.json ({line_of(error)})") from None
    for token in added:
        if (number := backend.token_to_id(token["content"])) != token["id"]:
            raise CheckpointError(
                f"{path}: {short(token['content'])} has the id {token['id']}, but it would be {number}: the tokens"
                " before it are incomplete"
            )
    split = pre_tokenizers.Split(Regex(words), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    backend.decoder = decoders.ByteLevel()
    return backend


def _refusal(path: str, what: str, layout: Layout) -> CheckpointError:
    who = "dev" if layout is MISTRAL else "klein"
    return CheckpointError(f"{path}: {what}; {who} needs {layout.name}'s tokenizer.json")


def _check_kind(values: dict[str, Any], path: str, layout: Layout) -> str:
    """The regular expression that splits a text; CheckpointError unless the file describes the layout's BPE."""
    refuse = partial(_refusal, path, layout=layout)
    model = values.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{path}: not a tokenizer.json (it has no model)")
    if model.get("type", "BPE") != "BPE":
        raise refuse(f"its model is {short(model['type'])}, not BPE")
    if other := [key for key in (*_UNUSED, *(() if layout.merges else ("ignore_merges",))) if model.get(key)]:
        raise refuse(f"its model's {other[0]} is {short(model[other[0]])}")
    if values.get("normalizer") != layout.normalizer:
        raise refuse(f"its normalizer is {_kind(values.get('normalizer'))}, not {'NFC' if layout.normalizer else None}")
    before = values.get("pre_tokenizer")
    steps = before.get("pretokenizers") if isinstance(before, dict) and before.get("type") == "Sequence" else None
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    is_known = isinstance(steps, list) and len(steps) == 2 and _contains(steps[1], _BYTES)
    words = [w for w in layout.words if is_known and steps[0] == {**split, "pattern": {"Regex": w}}]  # type: ignore
    if not words:
        raise refuse(f"its pre_tokenizer is not {layout.split}'s split into words and bytes")
    if not layout.merges and not _keeps(values.get("post_processor")):
        raise refuse(f"its post_processor, {_kind(values['post_processor'])}, adds tokens")
    return words[0]


def _checked_tokens(values: dict[str, Any], vocab_size: int, path: str) -> tuple[dict[str, int], list[Any], list[Any]]:
    """The vocabulary, merges and added tokens, with ids that the text encoder has; or a CheckpointError."""
    from tokenizers.pre_tokenizers import ByteLevel

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
    if missing := sorted(set(ByteLevel.alphabet()) - vocab.keys()):
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


def _keeps(processor: Any) -> bool:
    """Whether a post-processor leaves the ids of one text as they are: ByteLevel only moves offsets."""
    if processor is None or _contains(processor, {"type": "ByteLevel"}):
        return True
    return _contains(processor, {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]})


def _contains(value: Any, expected: dict[str, Any]) -> bool:
    return isinstance(value, dict) and all(key in value and value[key] == item for key, item in expected.items())


def _kind(value: Any) -> str:
    return short(value.get("type")) if isinstance(value, dict) else short(value)
