"""TOFU's measures of utility and forget quality (Maini et al. 2024, arXiv 2401.06121), from mean log-probabilities.

Definitions are those of open-unlearning: where it averages the losses of several wrong answers, so does this (the
paper's formula averages their probabilities).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from scipy import stats
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cud_trainer.data import TemplateContext, prepare_samples

from .memorization import evaluate_memorization, teacher_forced

EPSILON = 1e-10
# Sets of TOFU that make up its model utility, by the name of their configuration; whose probability is normalised.
UTILITY_SETS = {
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
NORMALISED = ("real_authors", "world_facts")


def truth_ratio(correct: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """`p_wrong / p_correct`, `[N]`, at least 0; large where wrong answers are as likely.

    Args:
        correct: mean log-probability of the (paraphrased) true answer, `[N]`.
        wrong: of wrong answers, `[N, P]`; p_wrong is exp of their mean.
    """
    return np.exp(wrong.mean(1)) / (np.exp(correct) + EPSILON)


def true_better(ratio: np.ndarray) -> np.ndarray:
    """`max(0, 1 - ratio)`, `[N]` in [0, 1]: for what is to be kept."""
    return np.maximum(0.0, 1.0 - ratio)


def closer_to_one(ratio: np.ndarray) -> np.ndarray:
    """`min(ratio, 1 / ratio)`, `[N]` in [0, 1]: for what is to be forgotten, 1 = true and wrong are equally likely."""
    return np.minimum(ratio, 1.0 / (ratio + EPSILON))


def normalised_probability(correct: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """`p / (p + sum of p_wrong)`, `[N]` in [0, 1], from mean log-probabilities `[N]` and `[N, P]`."""
    p = np.exp(correct)
    return p / (p + np.exp(wrong).sum(1) + EPSILON)


def model_utility(parts: Mapping[str, float]) -> float:
    """Harmonic mean of TOFU's nine figures (probability, ROUGE-L recall, truth ratio of three sets), in [0, 1].

    Raises:
        ValueError: for a figure that is missing or not in [0, 1].
    """
    names = [f"{part}/{kind}" for part in UTILITY_SETS for kind in ("probability", "rouge_l_recall", "truth_ratio")]
    for name in names:
        if parts.get(name) is None or not 0 <= parts[name] <= 1:
            raise ValueError(f"model utility needs {name} in [0, 1], got {parts.get(name)!r}")
    values = [parts[name] for name in names]
    return float(stats.hmean(values)) if min(values) > 0 else 0.0


def forget_quality(ratios: np.ndarray, reference: np.ndarray) -> float:
    """P-value of the two-sample Kolmogorov-Smirnov test of truth ratios against a retain-only model's, in [0, 1].

    High = not to be told apart from a model that never saw the forget set.
    """
    return float(stats.ks_2samp(ratios, reference).pvalue)


def answer_logps(
    model: PreTrainedModel,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[str],
    *,
    batch_size: int = 16,
    max_length: int | None = 1024,
    template: TemplateContext | None = None,
    question: str = "question",
    name: str = "evaluation",
) -> np.ndarray:
    """Mean log-probability of other answers to the same questions, `[N, C]`.

    Args:
        columns: columns with an answer, or a list of answers of the same number for every row.
        question: the column that asks.

    Raises:
        ValueError: naming a missing column or a row with another number of answers.
    """
    for column in (*columns, question):
        if column not in dataset.column_names:
            raise ValueError(f"{name} dataset has no column {column!r}; it has {sorted(dataset.column_names)}")
    answers: list[list[str]] = []
    for row, texts in enumerate(zip(*(dataset[column] for column in columns), strict=True)):
        answers.append([text for value in texts for text in ([value] if isinstance(value, str) else value)])
        if len(answers[row]) != len(answers[0]) or not answers[row]:
            raise ValueError(f"{name} sample {row} has {len(answers[row])} answers, the first has {len(answers[0])}")
    pairs: list[dict[str, Any]] = [
        {"sample_id": f"{row}-{number}", "question": asked, "answer": text}
        for row, (asked, texts) in enumerate(zip(dataset[question], answers, strict=True))
        for number, text in enumerate(texts)
    ]
    prepared = prepare_samples(Dataset.from_list(pairs), tokenizer, max_length=max_length, name=name, template=template)
    mean_logps = teacher_forced(model, prepared, tokenizer, batch_size=batch_size)["mean_logps"]
    return mean_logps.reshape(len(answers), len(answers[0]))


def tofu_utility(
    model: PreTrainedModel,
    sets: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    max_length: int | None = 1024,
    template: TemplateContext | None = None,
    generate: bool = True,
    desc: str | None = None,
) -> dict[str, np.ndarray]:
    """Per sample, `"<set>/probability"`, `"<set>/rouge_l_recall"` and `"<set>/truth_ratio"` of TOFU's sets.

    Args:
        sets: by the names in `UTILITY_SETS`, with `question`, `answer`, `perturbed_answer` and, for retain,
            `paraphrased_answer`.
        generate: also ROUGE-L recall, without which there is no model utility.
    """
    values: dict[str, np.ndarray] = {}
    for name, dataset in sets.items():
        options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}
        options |= {"name": name, "template": template}
        prepared = prepare_samples(
            dataset.select_columns(["question", "answer"]),
            tokenizer,
            max_length=max_length,
            name=name,
            template=template,
        )
        measured = evaluate_memorization(
            model,
            prepared,
            tokenizer,
            batch_size=batch_size,
            generate=generate,
            token_statistics=True,
            desc=desc and f"{desc}: {name}",
        )
        wrong = answer_logps(model, dataset, tokenizer, ["perturbed_answer"], **options)
        correct = measured["mean_logps"]
        values[f"{name}/probability"] = (
            normalised_probability(correct, wrong) if name in NORMALISED else measured["probability"]
        )
        if generate:
            values[f"{name}/rouge_l_recall"] = measured["rouge_l_recall"]
        if "paraphrased_answer" in dataset.column_names and name not in NORMALISED:
            correct = answer_logps(model, dataset, tokenizer, ["paraphrased_answer"], **options)[:, 0]
        values[f"{name}/truth_ratio"] = true_better(truth_ratio(correct, wrong))
    return values
