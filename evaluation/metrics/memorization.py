"""What a model still holds of each sample: teacher-forced metrics in one pass, and greedy generation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cud_trainer.data import IGNORE_INDEX, Samples
from cud_trainer.logprobs import AnswerScores, score_answers, wide
from cud_trainer.models.modes import evaluation_mode

TEACHER_FORCED = ("probability", "exact_memorization", "extraction_strength", "extraction_strength_corrected")
GENERATED = ("rouge_l_recall", "verbatim")
SAMPLED = ("sampled_rouge_l_recall", "sampled_verbatim")
MEASURES = (*TEACHER_FORCED, *GENERATED, *SAMPLED)
# Kept by the same pass for attacks and truth ratios (see `privacy`); no measures of memorisation themselves.
TOKEN_STATISTICS = ("mean_logps", "min_k", "min_k_plus_plus")
MIN_K = 0.2


def exact_memorization(correct: Sequence[bool]) -> float:
    """Share of answer tokens that are the arg max given the true prefix, in [0, 1] (Tirumala et al. 2022)."""
    return float(np.mean(correct)) if len(correct) else float("nan")


def extraction_strength(correct: Sequence[bool], *, corrected: bool = False) -> float:
    """`1 - k/n`, k the length of the shortest answer prefix after which the arg max continues correctly to the end.

    As in open-unlearning (after Carlini et al. 2021) at least the last token counts as extracted, so that the smallest
    value is 1/n and short answers look memorised; `corrected` lets k be n, with smallest value 0.
    """
    n = len(correct)
    if n == 0:
        return float("nan")
    k = n
    while k > 0 and correct[k - 1]:
        k -= 1
    return 1 - (k if corrected else min(k, n - 1)) / n


@torch.no_grad()
def teacher_forced(
    model: PreTrainedModel,
    prepared: Samples,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    desc: str | None = None,
) -> dict[str, np.ndarray]:
    """`probability` (exp of the mean answer log-probability, eos included) and the arg-max metrics, each `[N]`.

    The arg-max metrics count the answer's tokens before its first eos token, as do `min_k` and `min_k_plus_plus`: mean
    of the lowest 20% of the answer's log-probabilities (Shi et al. 2023, arXiv 2310.16789), plain, and less the mean
    over the vocabulary in units of its deviation (Zhang et al. 2024, arXiv 2404.02936). All from one forward pass.
    """
    device = model.get_input_embeddings().weight.device
    values = {name: np.zeros(len(prepared)) for name in (*TEACHER_FORCED, *TOKEN_STATISTICS)}
    with evaluation_mode(model):
        for rows, batch in prepared.batches(batch_size, device=device, desc=desc):
            scores = score_answers(model, batch)
            mean_logps = scores.mean_logps.double().cpu()
            plain, standard = scores.token_logps.double().cpu(), _standardised(scores).double().cpu()
            hits = (scores.logits.argmax(-1) == scores.targets).cpu()
            content = (scores.mask & ~_from_first(scores.targets == tokenizer.eos_token_id)).cpu()
            for position, row in enumerate(rows):
                correct = hits[position][content[position]].tolist()
                values["mean_logps"][row] = mean_logps[position]
                values["probability"][row] = mean_logps[position].exp()
                values["min_k"][row] = lowest_mean(plain[position][content[position]].numpy())
                values["min_k_plus_plus"][row] = lowest_mean(standard[position][content[position]].numpy())
                values["exact_memorization"][row] = exact_memorization(correct)
                values["extraction_strength"][row] = extraction_strength(correct)
                values["extraction_strength_corrected"][row] = extraction_strength(correct, corrected=True)
    return values


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    prepared: Samples,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    extra_tokens: int = 16,
    temperature: float | None = None,
    seed: int = 0,
    desc: str | None = None,
) -> list[str]:
    """Continuation of each sample's prompt, `[N]` strings; `extra_tokens` more than the true answer at most.

    A sample without a prompt (plain text) is continued from its first token.

    Args:
        temperature: of sampling; greedy by default.
        seed: of sampling.
    """
    device = model.get_input_embeddings().weight.device
    prompts, lengths = [], []
    for tokens, labels in zip(prepared["input_ids"], prepared["labels"], strict=True):
        start = max(1, next(i for i, label in enumerate(labels) if label != IGNORE_INDEX))
        prompts.append(list(tokens[:start]))
        lengths.append(len(tokens) - start)
    order = sorted(range(len(prompts)), key=lambda row: (lengths[row], len(prompts[row]), row))
    answers = [""] * len(prompts)
    with (
        evaluation_mode(model),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        tqdm(total=len(prompts), desc=desc, disable=desc is None, unit="sample", leave=False) as bar,
    ):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            longest = max(len(prompts[row]) for row in rows)
            inputs = torch.full((len(rows), longest), int(tokenizer.pad_token_id))
            mask = torch.zeros_like(inputs)
            for position, row in enumerate(rows):
                size = len(prompts[row])
                inputs[position, longest - size :] = torch.tensor(prompts[row])
                mask[position, longest - size :] = 1
            output = model.generate(
                input_ids=inputs.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max(lengths[row] for row in rows) + extra_tokens,
                do_sample=temperature is not None,
                # Whatever the model's own generation config says.
                temperature=temperature,
                top_p=None if temperature is None else 1.0,
                top_k=None if temperature is None else 0,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text.strip()
            bar.update(len(rows))
    return answers


def true_answers(prepared: Samples, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Text of the answer tokens of each sample, without special tokens, `[N]`."""
    texts = []
    for tokens, labels in zip(prepared["input_ids"], prepared["labels"], strict=True):
        start = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
        texts.append(tokenizer.decode(list(tokens[start:]), skip_special_tokens=True).strip())
    return texts


def rouge_l_recall(truths: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Share of each true answer's words in its longest common subsequence with the generated one, `[N]` in [0, 1]."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return np.array([scorer.score(t, a)["rougeL"].recall for t, a in zip(truths, answers, strict=True)])


def evaluate_memorization(
    model: PreTrainedModel,
    prepared: Samples,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    generate: bool = True,
    samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    token_statistics: bool = False,
    desc: str | None = None,
) -> dict[str, np.ndarray]:
    """All metrics of residual memorisation, each `[N]`; higher = more is left.

    Args:
        token_statistics: also return `TOKEN_STATISTICS`, which the same pass gives.
        generate: also continue the prompts greedily: `rouge_l_recall`, and `verbatim`, 1 where the answer begins with
            the true one, word by word.
        samples: also draw as many continuations at `temperature`; `sampled_*` is the largest over them (what somebody
            who asks as often can get).
    """
    values = teacher_forced(model, prepared, tokenizer, batch_size=batch_size, desc=desc)
    if not token_statistics:
        values = {name: column for name, column in values.items() if name not in TOKEN_STATISTICS}
    if generate or samples:
        truths = true_answers(prepared, tokenizer)
    if generate:
        answers = generate_answers(
            model, prepared, tokenizer, batch_size=batch_size, desc=desc and f"{desc}, generating"
        )
        values["rouge_l_recall"] = rouge_l_recall(truths, answers)
        values["verbatim"] = verbatim(truths, answers)
    for number in range(samples):
        answers = generate_answers(
            model,
            prepared,
            tokenizer,
            batch_size=batch_size,
            temperature=temperature,
            seed=seed + number,
            desc=desc and f"{desc}, sample {number + 1}",
        )
        for name, metric in (("rouge_l_recall", rouge_l_recall), ("verbatim", verbatim)):
            drawn, largest = metric(truths, answers), values.get(f"sampled_{name}")
            values[f"sampled_{name}"] = drawn if largest is None else np.maximum(largest, drawn)
    return values


def verbatim(truths: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """1 where the generated answer begins with the words of the true one, else 0, `[N]`."""
    pairs = [(truth.split(), answer.split()) for truth, answer in zip(truths, answers, strict=True)]
    return np.array([float(bool(truth) and answer[: len(truth)] == truth) for truth, answer in pairs])


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


def _from_first(flags: Tensor) -> Tensor:
    """True from the first True on, along the last axis."""
    return flags.long().cumsum(-1) > 0
