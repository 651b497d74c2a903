"""Texts as tokens, many at a time: the tokenizer works while Python makes the next texts and reads the last tokens."""

from __future__ import annotations

import json
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")
Span = tuple[int, int]

# Texts that are given to the tokenizer at a time: enough for all cores, few enough that there is something to overlap.
PART = 500
# Parts that are with the tokenizer or wait to be used: what it knows of a text takes far more memory than its tokens.
WAITING = 3
# Nothing else is wanted of a tokenizer; masks are a fifth of its time. What does not fit is an error of ours later.
ONLY_IDS = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
# Normalisers that look at one character (or at what combines with it) at a time, and splitters of words likewise.
CHARACTERWISE = (
    "NFC NFD NFKC NFKD Lowercase BertNormalizer Prepend "
    "Whitespace WhitespaceSplit BertPreTokenizer Punctuation Digits CharDelimiterSplit Metaspace"
).split()
# What a pattern may not have: it would see what stands behind a word. `\s+(?!\S)` gives the same words at any end.
HARMLESS, LOOKS_BEHIND = (r"\s+(?!\S)", "(?i:", "(?:"), ("(?", "$", r"\b", r"\B", r"\z", r"\Z")


class Encoded(NamedTuple):
    """Tokens of a text.

    Attributes:
        ids: the tokens.
        encoding: what a fast tokenizer knows of them beside, a `tokenizers.Encoding`; else `None`.
    """

    ids: list[int]
    encoding: Any


def parts(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """The items, `PART` at a time."""
    for start in range(0, len(items), PART):
        yield items[start : start + PART]


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, for many texts.

    Attributes:
        special: whether it adds its special tokens (bos).
    """

    tokenizer: PreTrainedTokenizerBase
    special: bool = True

    def __call__(self, texts: Sequence[str]) -> list[Encoded]:
        """The tokens of texts."""
        if not texts:
            return []
        batch = self.tokenizer(list(texts), add_special_tokens=self.special, **ONLY_IDS)
        return list(map(Encoded, batch["input_ids"], batch.encodings or [None] * len(texts)))

    def each(self, made: Iterable[tuple[Item, Sequence[str]]]) -> Iterator[tuple[Item, list[Encoded]]]:
        """The tokens of parts of many texts, each with what comes along with it, in order.

        Fast tokenizers leave Python alone while they work: meanwhile the next part is made, and the one before is used.
        """
        with ThreadPoolExecutor(1) as pool:
            waiting: deque[tuple[Item, Future[list[Encoded]]]] = deque()
            for item, texts in made:
                waiting.append((item, pool.submit(self, texts)))
                while len(waiting) > WAITING or (len(waiting) > 1 and waiting[0][1].done()):
                    before, encoded = waiting.popleft()
                    yield before, encoded.result()
            while waiting:
                before, encoded = waiting.popleft()
                yield before, encoded.result()

    def beginnings(self, starts: Sequence[str], texts: Sequence[str], encoded: Sequence[Encoded]) -> list[int]:
        """How many first tokens each text has in common with its start, taken alone.

        A tokenizer may merge the end of the start with what comes behind it.

        Args:
            starts, texts: mostly, a text begins with its start.
            encoded: the tokens of the texts.
        """
        counts = list(map(self._read_off, starts, texts, encoded))
        rows = [row for row, count in enumerate(counts) if count is None]
        for row, alone in zip(rows, self([starts[row] for row in rows]), strict=True):
            counts[row] = shared(alone.ids, encoded[row].ids)
        return counts  # type: ignore[return-value]

    def covered(self, span: Span, encoded: Encoded) -> Span:
        """The tokens, from, to, that cover some characters; a token that covers others beside them is one."""
        ids, encoding = encoded
        first = last = None
        if encoding is not None:
            first, last = encoding.char_to_token(span[0]), encoding.char_to_token(span[1] - 1)
        if first is not None and last is not None:
            while last + 1 < len(ids) and _within(encoding.token_to_chars(last + 1), span):
                last += 1  # a character may have several tokens
            return first, last + 1
        offsets = list(self._by_decoding(ids)) if encoding is None else encoding.offsets
        inside = [row for row, chars in enumerate(offsets) if _within(chars, span)]
        return (inside[0], inside[-1] + 1) if inside else (len(offsets), len(offsets))

    def _by_decoding(self, tokens: list[int]) -> Iterator[Span]:
        """The characters of each token, for a tokenizer that does not say; tokens that it adds itself have none."""
        before = 0
        for size in range(1, len(tokens) + 1):
            after = len(self.tokenizer.decode(tokens[:size], skip_special_tokens=self.special))
            yield before, after
            before = after

    def _read_off(self, start: str, text: str, encoded: Encoded) -> int | None:
        """`beginnings` of one text where its tokens tell without a second look; else `None`.

        They do where the start ends with a word of the tokenizer, which makes tokens word by word: alone, it has the
        same words if none depends on what comes behind it (`_words_stand_alone`).
        """
        encoding, size = encoded.encoding, len(start)
        if not self._words_stand_alone or not 0 < size < len(text) or not text.startswith(start):
            return None
        last = encoding.char_to_token(size - 1)
        count = -1 if last is None else last + 1
        if not 0 < count < len(encoded.ids) or encoding.token_to_chars(last)[1] != size:
            return None
        if encoding.token_to_word(last) == encoding.token_to_word(count) or encoded.ids[count] in self._special_ids:
            return None
        return count if _stay_apart(start[-1], text[size]) else None

    @cached_property
    def _special_ids(self) -> set[int]:
        """What may also stand behind the start alone."""
        return {*self.tokenizer.all_special_ids}

    @cached_property
    def _words_stand_alone(self) -> bool:
        """Whether a text's words up to some word are those of the text that ends there."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None) if self.tokenizer.is_fast else None
        if backend is None or backend.pre_tokenizer is None:
            return False
        if any(token.single_word for token in self.tokenizer.added_tokens_decoder.values()):
            return False
        steps = [json.loads(part.__getstate__()) for part in (backend.normalizer, backend.pre_tokenizer) if part]
        flat: list[dict[str, Any]] = []
        while steps:
            step = steps.pop()
            nested = step.get("normalizers") or step.get("pretokenizers")
            steps += nested or []
            flat += [] if nested else [step]
        model = backend.model
        byte_level = any(step["type"] == "ByteLevel" for step in flat)
        if not (byte_level or getattr(model, "byte_fallback", False) or getattr(model, "unk_token", None)):
            return False  # it drops what it does not know, and no longer says where tokens stand
        by_pattern = [step for step in flat if _pattern(step) is not None]
        return len(by_pattern) <= 1 and all(
            step["type"] in CHARACTERWISE or _is_literal(step) or _looks_at_words(_pattern(step)) for step in flat
        )


def shared(start: list[int], whole: list[int]) -> int:
    """How many first tokens are the same."""
    if whole[: len(start)] == start:
        return len(start)
    length = 0
    while length < min(len(start), len(whole)) and start[length] == whole[length]:
        length += 1
    return length


def _within(chars: Span | None, span: Span) -> bool:
    return chars is not None and chars[0] < span[1] and chars[1] > span[0] and chars[1] > chars[0]


def _stay_apart(a: str, b: str) -> bool:
    """Whether no normalisation makes one character of two."""
    if a.isascii() and b.isascii():
        return True
    return all(
        unicodedata.normalize(form, a + b) == unicodedata.normalize(form, a) + unicodedata.normalize(form, b)
        for form in ("NFC", "NFKC", "NFKD")
    )


def _pattern(step: dict[str, Any]) -> str | None:
    """The regular expression by which a step of a tokenizer finds words, if it has one."""
    if step["type"] == "ByteLevel":
        return HARMLESS[0] if step.get("use_regex") else None
    return step["pattern"].get("Regex") if step["type"] == "Split" else None


def _looks_at_words(pattern: str | None) -> bool:
    """Whether what a pattern finds depends on nothing behind it."""
    if pattern is None:
        return False
    for harmless in HARMLESS:
        pattern = pattern.replace(harmless, "(")
    return not any(looks in pattern for looks in LOOKS_BEHIND)


def _is_literal(step: dict[str, Any]) -> bool:
    """Whether a step replaces, or splits at, one character that is given as it is; or only writes bytes."""
    if step["type"] == "ByteLevel":
        return not step.get("use_regex")
    return step["type"] in ("Replace", "Split") and len(step["pattern"].get("String", "--")) == 1
