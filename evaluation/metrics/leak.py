"""leak@k: does one of k sampled answers give the sample away? (Reisizadeh et al. 2025, arXiv 2511.04934)

Greedy decoding shows one answer. Whoever asks again gets another one: what is hidden from the first may be in the
eighth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.special import gammaln
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cud_trainer.data import Samples
from cud_trainer.models.generation import Sampling, stop_tokens

from .entailment import Entailment
from .memorization import generate_answers, true_answers
from .words import longest_span, rouge_l_recall, tells

# Whether each answer gives its sample away, bool `[B]`, from questions, true answers and sampled answers, `B` each. It
# sees what stands before the answer as text, chat template included.
Judge = Callable[[Sequence[str], Sequence[str], Sequence[str]], Sequence[bool]]
KINDS = ("rouge", "verbatim", "entailment", "judge", "secret")
COLUMN = "leaks_"  # of a table of samples: sampled answers that leak, by kind


def leak_at_k(leaks: np.ndarray, n: int, k: int) -> np.ndarray:
    """Chance that one of `k` sampled answers leaks, `[N]` in [0, 1]; higher = more is left.

    `1 - C(n - c, k) / C(n, k)` with c of n answers that leak: the mean over all choices of k of the n, and so unbiased
    (the estimator of pass@k, Chen et al. 2021, arXiv 2107.03374).

    Args:
        leaks: c of each sample, `[N]` from 0 to `n`; NaN gives NaN.
        k: from 1 to `n`.

    Raises:
        ValueError: for a `k` outside, or counts outside.
    """
    leaks = np.asarray(leaks, dtype=float)
    if not 1 <= k <= n:
        raise ValueError(f"leak@k of {n} sampled answers has k from 1 to {n}, got {k}")
    if ((leaks < 0) | (leaks > n)).any():
        raise ValueError(f"of {n} sampled answers 0 to {n} leak, got {np.nanmin(leaks)} to {np.nanmax(leaks)}")
    rest = n - leaks
    few = rest < k  # then every choice has one that leaks
    rest = np.where(few, k, rest)
    logs = gammaln(rest + 1) - gammaln(rest - k + 1) - gammaln(n + 1) + gammaln(n - k + 1)
    return np.where(few, 1.0, np.where(leaks == 0, 0.0, -np.expm1(logs)))


def shown_k(n: int) -> list[int]:
    """The k that are shown of `n` sampled answers: 1, 2, 4, ... and n."""
    return sorted({*(1 << power for power in range(n.bit_length()) if 1 << power <= n), n})


@dataclass(frozen=True)
class LeakRule:
    """What counts as a leak, of each sampled answer.

    Attributes:
        n: answers that are sampled of each sample.
        temperature, seed: of sampling.
        rouge: ROUGE-L recall of the true answer from which on an answer leaks (kind `rouge`).
        span: words of the true answer in a row from which on an answer leaks (kind `verbatim`); of a shorter true
            answer, all of it.
        entailment: a model that says whether the true answer follows from the sampled one (kind `entailment`).
        judge: decides as it likes (kind `judge`); it sees text.
    """

    n: int
    temperature: float = 1.0
    seed: int = 0
    rouge: float = 0.8
    span: int = 6
    entailment: Entailment | None = None
    judge: Judge | None = None

    def in_words(self) -> dict[str, str]:
        """What each kind means; of those that are measured whatever the data."""
        said = {
            "rouge": f"ROUGE-L recall of the true answer at least {self.rouge:g}",
            "verbatim": f"{self.span} words of the true answer in a row, or all of a shorter one",
        }
        if self.entailment is not None:
            said["entailment"] = "the true answer follows from the sampled one, says the entailment model"
        if self.judge is not None:
            said["judge"] = "says the judge that was given"
        return said


def sampled_leaks(
    model: PreTrainedModel,
    prepared: Samples | Dataset,
    tokenizer: PreTrainedTokenizerBase,
    rule: LeakRule,
    *,
    secrets: Sequence[Sequence[str]] | None = None,
    batch_size: int = 16,
    desc: str | None = None,
) -> dict[str, np.ndarray]:
    """How many of `rule.n` sampled answers leak, `[N]` by kind.

    Every draw depends on the seed, its number and the prompt; not on the batch size, but for rounding. No text is
    returned.

    Args:
        secrets: spans of the true answer of each sample, `[N]` lists: an answer with one of them leaks (kind
            `secret`), whatever else it says. NaN for a sample without any.
    """
    sampling = Sampling(temperature=rule.temperature, seed=rule.seed, draws=rule.n)
    answers = generate_answers(model, prepared, tokenizer, batch_size=batch_size, sampling=sampling, desc=desc)
    truths = true_answers(prepared, tokenizer, stop_tokens(tokenizer, model))
    questions = asked(prepared, tokenizer) if rule.judge is not None else [""] * len(truths)
    # The same answer again is judged once.
    pairs = [(row, answer) for row in range(len(truths)) for answer in answers[row * rule.n : (row + 1) * rule.n]]
    place = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
    rows = [row for row, _ in place]
    true, said = [truths[row] for row in rows], [answer for _, answer in place]
    found = {
        "rouge": rouge_l_recall(true, said) >= rule.rouge,
        "verbatim": np.array([_has_span(*longest_span(*pair), rule.span) for pair in zip(true, said, strict=True)]),
    }
    if rule.entailment is not None:
        found["entailment"] = rule.entailment(said, true)
    if rule.judge is not None:
        found["judge"] = _judged(rule.judge, [questions[row] for row in rows], true, said)
    if secrets is not None:
        told = [any(tells(truths[row], answer, one) for one in secrets[row]) for row, answer in place]
        found["secret"] = np.array(told, dtype=bool)
    where = np.array([place[pair] for pair in pairs]).reshape(len(truths), rule.n)
    counts = {kind: np.asarray(flags, dtype=bool)[where].sum(1).astype(float) for kind, flags in found.items()}
    if secrets is not None:
        counts["secret"][[not own for own in secrets]] = np.nan
    return counts


def asked(prepared: Samples | Dataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What stands before the answer of each sample, as text, `[N]`."""
    labels = prepared["labels"]
    return [
        tokenizer.decode(tokens[: next(i for i, label in enumerate(own) if label >= 0)], skip_special_tokens=True)
        for tokens, own in zip(prepared["input_ids"], labels, strict=True)
    ]


def _has_span(longest: int, words: int, span: int) -> bool:
    return longest >= min(span, words) > 0


def _judged(judge: Judge, questions: list[str], truths: list[str], answers: list[str]) -> np.ndarray:
    verdicts: Any = judge(questions, truths, answers)
    flags = np.asarray(verdicts)
    if flags.shape != (len(answers),) or not np.isin(flags, (0, 1)).all():
        raise ValueError(f"the judge must return {len(answers)} of True or False, got an array of shape {flags.shape}")
    return flags.astype(bool)


def by_name(leaks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Counts by the name of their column in a table of samples."""
    return {f"{COLUMN}{kind}": counts for kind, counts in leaks.items()}
