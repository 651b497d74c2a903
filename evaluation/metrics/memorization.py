"""What a model still holds of each sample: teacher-forced metrics in one pass, and greedy generation."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cud_trainer.data import IGNORE_INDEX, PREPARED, Samples
from cud_trainer.logprobs import AnswerScores, extraction_strength, score_answers, wide
from cud_trainer.models.generation import Sampling, continuations, stop_tokens
from cud_trainer.models.memory import each_batch
from cud_trainer.models.modes import evaluation_mode
from cud_trainer.models.precision import exact

from .passes import Passes
from .words import rouge_l_recall, tells, verbatim

TEACHER_FORCED = ("probability", "exact_memorization", "extraction_strength", "extraction_strength_corrected")
GENERATED = ("rouge_l_recall", "verbatim")
MEASURES = (*TEACHER_FORCED, *GENERATED)
SECRET_SAID = "secret_verbatim"
# Kept by the same pass for attacks and truth ratios (see `privacy`); no measures of memorisation themselves.
TOKEN_STATISTICS = ("mean_logps", "min_k", "min_k_plus_plus")
MIN_K = 0.2
EXTRA_TOKENS = 16  # that a model may write beyond the length of the true answer


def exact_memorization(correct: Sequence[bool]) -> float:
    """Share of answer tokens that are the arg max given the true prefix, in [0, 1] (Tirumala et al. 2022)."""
    return float(np.mean(correct)) if len(correct) else float("nan")


@torch.no_grad()
def teacher_forced(
    model: PreTrainedModel,
    prepared: Samples | Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    desc: str | None = None,
) -> dict[str, np.ndarray]:
    """`probability` (exp of the mean answer log-probability) and the arg-max metrics, each `[N]`.

    Of the tokens that `Samples.measured` counts: of a conversation the message's own, of plain strings eos included.

    The arg-max metrics count the answer's tokens before the first that ends one (`stop_tokens`), as do `min_k` and
    `min_k_plus_plus`: mean of the lowest 20% of the answer's log-probabilities (Shi et al. 2023, arXiv 2310.16789),
    plain, and less the mean over the vocabulary in units of its deviation (Zhang et al. 2024, arXiv 2404.02936). NaN
    where an answer has no such token. All from one forward pass.
    """
    device = model.get_input_embeddings().weight.device
    stop = torch.tensor(stop_tokens(tokenizer, model), device=device, dtype=torch.long)
    prepared = with_pad_token(prepared, tokenizer).measured
    values = {name: np.zeros(len(prepared)) for name in (*TEACHER_FORCED, *TOKEN_STATISTICS)}

    def forced(batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        scores = score_answers(model, batch)
        hits = scores.logits.argmax(-1) == scores.targets
        standard = _standardised(scores)
        numbers = (scores.mean_logps, scores.token_logps, standard)
        return (*(one.cpu().double() for one in numbers), hits.cpu(), scores.before(stop).cpu())

    with evaluation_mode(model), exact(model):
        for rows, found in each_batch(prepared, forced, batch_size, device=device, desc=desc):
            for row, mean_logps, plain, standard, hits, content in zip(rows, *found, strict=True):
                correct = hits[content].tolist()
                values["mean_logps"][row] = mean_logps
                values["probability"][row] = mean_logps.exp()
                values["min_k"][row] = lowest_mean(plain[content].numpy())
                values["min_k_plus_plus"][row] = lowest_mean(standard[content].numpy())
                values["exact_memorization"][row] = exact_memorization(correct)
                values["extraction_strength"][row] = extraction_strength(correct)
                values["extraction_strength_corrected"][row] = extraction_strength(correct, corrected=True)
    return values


def generate_answers(
    model: PreTrainedModel,
    prepared: Samples | Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    extra_tokens: int = EXTRA_TOKENS,
    sampling: Sampling | None = None,
    desc: str | None = None,
) -> list[str]:
    """Continuation of each sample's prompt, `[N]` strings; `extra_tokens` more than the true answer at most.

    A sample without a prompt (plain text) is continued from its first token. A true answer that no end token ends (a
    chunk of a longer text) may be cut inside a word: its continuation is as long, no longer. Nothing of the model's
    generation config counts but its end tokens (see `cud_trainer.models.generation`).

    Args:
        sampling: draw instead of writing greedily: `[N x draws]` strings, those of a sample after each other.
    """
    stop = stop_tokens(tokenizer, model)
    prompts, limits, prepared = [], [], with_pad_token(prepared, tokenizer).measured
    for tokens, labels in zip(prepared["input_ids"], prepared["labels"], strict=True):
        start = answer_start(labels)
        prompts.append(list(tokens[:start]))
        ended = any(token in stop for token in tokens[start:])
        limits.append(len(tokens) - start + (extra_tokens if ended else 0))
    written = continuations(
        model,
        prompts,
        limits,
        stop=stop,
        pad=prepared.pad_token_id,
        batch_size=batch_size,
        sampling=sampling,
        desc=desc,
    )
    return [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in written]


def with_pad_token(prepared: Samples | Dataset, tokenizer: PreTrainedTokenizerBase) -> Samples:
    """The samples as they are, or those of a prepared dataset (`prepare_dataset`)."""
    if isinstance(prepared, Samples):
        return prepared
    missing = [column for column in PREPARED if column not in prepared.column_names]
    if missing:
        raise ValueError(f"the dataset is not prepared: it has no column {missing[0]!r} (see prepare_dataset)")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Samples(prepared, int(pad))  # type: ignore[arg-type]


def answer_start(labels: Sequence[int]) -> int:
    """Where the answer's first token that can be predicted stands: the first token of a sequence cannot."""
    return max(1, next(place for place, label in enumerate(labels) if label != IGNORE_INDEX))


def true_answers(
    prepared: Samples | Dataset, tokenizer: PreTrainedTokenizerBase, stop: Collection[int] = ()
) -> list[str]:
    """Text of the answer of each sample from `answer_start` on, without special tokens, `[N]`.

    Args:
        stop: tokens that end an answer: nothing behind the first of them counts.
    """
    texts, prepared = [], with_pad_token(prepared, tokenizer).measured
    for tokens, labels in zip(prepared["input_ids"], prepared["labels"], strict=True):
        last = next(place for place in reversed(range(len(labels))) if labels[place] != IGNORE_INDEX)
        answer = list(tokens[answer_start(labels) : last + 1])
        end = next((place for place, token in enumerate(answer) if token in stop), len(answer))
        texts.append(tokenizer.decode(answer[:end], skip_special_tokens=True).strip())
    return texts


def evaluate_memorization(
    model: PreTrainedModel,
    prepared: Samples | Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    generate: bool = True,
    token_statistics: bool = False,
    secrets: Sequence[Sequence[str]] | None = None,
    passes: Passes | None = None,
    name: str = "",
    desc: str | None = None,
) -> dict[str, np.ndarray]:
    """All metrics of residual memorisation, each `[N]`; higher = more is left.

    Args:
        secrets: spans of each true answer, `[N]` lists: also `SECRET_SAID`, 1 where the greedy answer has one of them,
            NaN for a sample without any.
        token_statistics: also return `TOKEN_STATISTICS`, which the same pass gives.
        generate: also continue the prompts greedily: `rouge_l_recall`, and `verbatim`, 1 where the answer begins with
            the true one, word by word.
        passes: how the model goes over the samples, with `name` for these; by default in one go.
    """
    passes, samples = passes or Passes(), with_pad_token(prepared, tokenizer)

    def forced(part: Samples, rows: list[int]) -> dict[str, np.ndarray]:
        return teacher_forced(model, part, tokenizer, batch_size=batch_size, desc=desc)

    def written(part: Samples, rows: list[int]) -> dict[str, np.ndarray]:
        own = None if secrets is None else [secrets[row] for row in rows]
        label = f"{desc}, generating" if desc else passes.writing
        return generated(model, part, tokenizer, batch_size=batch_size, secrets=own, desc=label)

    values = passes.over(f"{name}-forced", samples, forced)
    if not token_statistics:
        values = {name: column for name, column in values.items() if name not in TOKEN_STATISTICS}
    if generate:
        values |= passes.over(f"{name}-generated", samples, written, by_answer_length(samples, batch_size))
    return values


def generated(
    model: PreTrainedModel,
    prepared: Samples | Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    secrets: Sequence[Sequence[str]] | None = None,
    desc: str | None = None,
) -> dict[str, np.ndarray]:
    """Of the metrics of `evaluate_memorization` those that greedy answers give."""
    truths = true_answers(prepared, tokenizer, stop_tokens(tokenizer, model))
    answers = generate_answers(model, prepared, tokenizer, batch_size=batch_size, desc=desc)
    values = {"rouge_l_recall": rouge_l_recall(truths, answers), "verbatim": verbatim(truths, answers)}
    if secrets is not None:
        said = zip(truths, answers, secrets, strict=True)
        values[SECRET_SAID] = np.array(
            [float(any(tells(truth, answer, one) for one in own)) if own else np.nan for truth, answer, own in said]
        )
    return values


def by_answer_length(prepared: Samples, batch_size: int) -> list[list[int]]:
    """Rows that are written together: answers of similar length, then prompts, longest first (as `in_batches`)."""
    answers, lengths = prepared.measured.answer_lengths, np.array(prepared.lengths)
    order = np.lexsort((answers - lengths, -answers)).tolist()
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]


def lowest_mean(values: np.ndarray, share: float = MIN_K) -> float:
    """Mean of the lowest `share` of the values, of one at least; NaN for none."""
    return float(np.sort(values)[: max(1, int(len(values) * share))].mean()) if len(values) else float("nan")


def _standardised(scores: AnswerScores) -> Tensor:
    """Log-probabilities of the answer tokens less the mean over the vocabulary, in units of its deviation, `[B, K]`."""
    logps = wide(scores.logits).log_softmax(-1)
    p = logps.exp()
    finite = torch.where(p > 0, logps, torch.zeros_like(logps))  # 0 log 0 = 0
    mean = (p * finite).sum(-1)
    variance = (p * finite.square()).sum(-1) - mean.square()
    return (scores.token_logps - mean) / variance.clamp(min=1e-6).sqrt()
