"""The words of a text in any script, for measures that compare two texts word by word."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

# Scripts that put no space between words: a character, with the marks on it, stands for a word. Thai and Lao, Burmese,
# Khmer, Tai and Javanese, Chinese and Japanese, Yi.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u2e80-\u2fff\u3005-\u3007\u3021-\u312f"
    "\u31a0-\u31ff\u3400-\u4dbf\u4e00-\ua4cf\ua980-\ua9df\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f"
    "\U00020000-\U0003ffff"
)
# The same with the punctuation between them: what follows a Chinese full stop begins a new piece.
PIECES = re.compile(f"[{UNSPACED}\u3000-\u303f\uff00-\uff65]|[^\\s{UNSPACED}\u3000-\u303f\uff00-\uff65]+")
ALONE = re.compile(f"[{UNSPACED}]")
JOINERS = dict.fromkeys(map(ord, "\u200c\u200d"))  # they shape letters inside a word


@lru_cache(maxsize=1 << 16)
def _kind(character: str) -> str:
    """L, M or N where the character is part of a word (a letter, a mark on one, a digit), else nothing."""
    category = unicodedata.category(character)
    return category[0] if category[0] in "LM" or category in ("Nd", "Nl") else ""


class Words(Tokenizer):
    """Words for ROUGE: in ASCII those of rouge-score, stemmed; in other scripts runs of letters, marks and digits.

    A character of a script without spaces is a word of its own.
    """

    def __init__(self) -> None:
        self.ascii = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        if text.isascii():
            return self.ascii.tokenize(text)
        found: list[str] = []
        for run in _runs(unicodedata.normalize("NFC", text).translate(JOINERS).lower()):
            found += self.ascii.tokenize(run) if run.isascii() else [run]
        return found


class Signs(Tokenizer):
    """Every character but white space, for true answers that have no words."""

    def tokenize(self, text: str) -> list[str]:
        return list("".join(unicodedata.normalize("NFC", text).split()))


def _runs(text: str) -> list[str]:
    """Words of a text in the order they stand."""
    found: list[str] = []
    open_run = False  # whether the next character may belong to the last word
    for character in text:
        kind = _kind(character)
        if kind == "M" and found and (open_run or ALONE.match(found[-1])):
            found[-1] += character
        elif not kind:
            open_run = False
        elif ALONE.match(character):
            found.append(character)
            open_run = False
        elif open_run:
            found[-1] += character
        else:
            found.append(character)
            open_run = True
    return found


def rouge_l_recall(truths: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Share of each true answer's words in its longest common subsequence with the generated one, `[N]` in [0, 1].

    English figures are those of rouge-score with its stemmer; see `Words` for other scripts. NaN where the true answer
    is empty.
    """
    words = Words()
    by_word, by_sign = (RougeScorer(["rougeL"], tokenizer=tokenizer) for tokenizer in (words, Signs()))
    recalls = np.full(len(truths), np.nan)
    for row, (truth, answer) in enumerate(zip(truths, answers, strict=True)):
        if truth.strip():
            scorer = by_word if words.tokenize(truth) else by_sign
            recalls[row] = scorer.score(truth, answer)["rougeL"].recall
    return recalls


def verbatim(truths: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """1 where the generated answer begins with the words of the true one, else 0, `[N]`; NaN for an empty true answer.

    Words are parted by white space, in scripts without it character by character.
    """
    pairs = [(_pieces(truth), _pieces(answer)) for truth, answer in zip(truths, answers, strict=True)]
    return np.array([float(answer[: len(truth)] == truth) if truth else np.nan for truth, answer in pairs], dtype=float)


def longest_span(truth: str, answer: str) -> tuple[int, int]:
    """Words of the longest piece of the true answer that stands in the other one as it is, and of the true answer.

    Words as for `verbatim`.
    """
    true, other = _pieces(truth), _pieces(answer)
    longest, before = 0, [0] * (len(other) + 1)
    for word in true:
        ending = [0] * (len(other) + 1)  # the longest piece that ends with this word, by where it ends in the answer
        for place, same in enumerate(other):
            if word == same:
                ending[place + 1] = before[place] + 1
        longest, before = max(longest, *ending), ending
    return longest, len(true)


def tells(truth: str, answer: str, span: str) -> bool:
    """Whether an answer holds a span of the true one, in whatever case and spacing.

    Where the span is no part of a longer word or number of the true answer, nor may it be of the other one.
    """
    true, answer, span = (
        " ".join(unicodedata.normalize("NFC", text).casefold().split()) for text in (truth, answer, span)
    )
    found = _places(answer, span)
    return any(whole for _, whole in found) if any(whole for _, whole in _places(true, span)) else bool(found)


def _places(text: str, span: str) -> list[tuple[int, bool]]:
    """Where a span stands in a text, and whether it is no part of a longer word there."""
    found = []
    place = text.find(span) if span else -1
    while place >= 0:
        edges = [text[end - 1 : end + 1] for end in (place, place + len(span)) if 0 < end < len(text)]
        inside = [all(_kind(sign) and not ALONE.match(sign) for sign in edge) for edge in edges]
        found.append((place, not any(inside)))
        place = text.find(span, place + 1)
    return found


def _pieces(text: str) -> list[str]:
    return PIECES.findall(unicodedata.normalize("NFC", text))
