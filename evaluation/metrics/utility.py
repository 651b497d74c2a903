"""TOFU's measures of utility and forget quality (Maini et al. 2024, arXiv 2401.06121), from mean log-probabilities.

Definitions are those of open-unlearning: where it averages the losses of several wrong answers, so does this (the
paper's formula averages their probabilities). Ratios are made of logarithms, without the 1e-10 that it adds below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from scipy import special, stats
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cud_trainer.data import Samples, TemplateContext, prepare_samples
from cud_trainer.data.columns import id_column
from cud_trainer.data.formats import TEMPLATE_COLUMNS

from .memorization import evaluate_memorization, teacher_forced
from .passes import Passes

LARGEST = 700.0  # of an exponent that a float holds
SAMPLE_NAMES = ("sample_id", "id")
# Sets of TOFU that make up its model utility, by the name of their configuration; whose probability is normalised.
UTILITY_SETS = {
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
NORMALISED = ("real_authors", "world_facts")


def truth_ratio(correct: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """`p_wrong / p_correct`, `[N]`, positive; large where wrong answers are as likely.

    Made of logarithms, so that it holds for a model that gives either of them next to no probability.

    Args:
        correct: mean log-probability of the (paraphrased) true answer, `[N]`.
        wrong: of wrong answers, `[N, P]`; p_wrong is exp of their mean.
    """
    with np.errstate(invalid="ignore"):  # of two that are impossible, there is no ratio
        return np.exp(np.clip(wrong.mean(1) - correct, -LARGEST, LARGEST))


def true_better(ratio: np.ndarray) -> np.ndarray:
    """`max(0, 1 - ratio)`, `[N]` in [0, 1]: for what is to be kept."""
    return np.maximum(0.0, 1.0 - ratio)


def closer_to_one(ratio: np.ndarray) -> np.ndarray:
    """`min(ratio, 1 / ratio)`, `[N]` in [0, 1]: for what is to be forgotten, 1 = true and wrong are equally likely."""
    with np.errstate(divide="ignore"):
        return np.minimum(ratio, 1.0 / ratio)


def normalised_probability(correct: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """`p / (p + sum of p_wrong)`, `[N]` in [0, 1], from mean log-probabilities `[N]` and `[N, P]`."""
    with np.errstate(invalid="ignore"):
        return special.expit(correct - special.logsumexp(wrong, axis=1))


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
    passes: Passes | None = None,
) -> np.ndarray:
    """Mean log-probability of other answers to the same questions, `[N, C]`.

    NaN for a sample whose question is missing, or one of its answers.

    Args:
        columns: columns with an answer, or a list of answers of the same number for every row.
        question: the column that asks.
        passes: how the model goes over the answers; by default in one go.

    Raises:
        ValueError: naming a missing column or a row with another number of answers.
    """
    rows, prepared, width = prepare_answers(
        dataset, tokenizer, columns, max_length=max_length, template=template, question=question, name=name
    )
    logps = np.full((len(dataset), width), np.nan)
    if prepared is not None:

        def measure(part: Samples, places: list[int]) -> dict[str, np.ndarray]:
            return {"logps": teacher_forced(model, part, tokenizer, batch_size=batch_size)["mean_logps"]}

        told = "-".join([name, *columns, "by", question])
        measured = (passes or Passes()).over(told, prepared, measure)["logps"]
        logps[rows] = measured.reshape(len(rows), width)
    return logps


def prepare_answers(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[str],
    *,
    max_length: int | None = 1024,
    template: TemplateContext | None = None,
    question: str = "question",
    name: str = "evaluation",
) -> tuple[list[int], Samples | None, int]:
    """Of `answer_logps`, what needs no model.

    Returns:
        the rows that have a question and all their answers; their answers row by row, `None` if there are none; and how
        many a row has.

    Raises:
        ValueError: as `answer_logps`, and for an answer that cannot be prepared.
    """
    for column in (*columns, question):
        if column not in dataset.column_names:
            raise ValueError(f"{name} dataset has no column {column!r}; it has {sorted(dataset.column_names)}")
    named = id_column(dataset.column_names)
    ids = [str(row) for row in (range(len(dataset)) if named is None else dataset[named])]
    kept = [column for column in TEMPLATE_COLUMNS if column in dataset.column_names]
    rows: list[int] = []
    pairs: list[dict[str, Any]] = []
    width = 1
    for row, sample in enumerate(dataset.with_format(None)):
        answers = [text for column in columns for text in _answers(sample[column], f"{name} sample {ids[row]!r}")]
        if not answers or not all([sample[question], *answers]):
            continue
        if rows and len(answers) != width:
            raise ValueError(
                f"{name} sample {ids[row]!r} has {len(answers)} answers, {ids[rows[0]]!r}, the first, has {width}"
            )
        width = len(answers)
        rows.append(row)
        told = {"question": sample[question]} | {column: sample[column] for column in kept}
        pairs += [{"sample_id": f"{ids[row]}-{number}", "answer": text, **told} for number, text in enumerate(answers)]
    if not pairs:
        return [], None, width
    options: dict[str, Any] = {"max_length": max_length, "name": name, "template": template}
    return rows, prepare_samples(Dataset.from_list(pairs), tokenizer, **options), width


def _answers(value: Any, where: str) -> list[str | None]:
    """An answer, or a list of them; what is missing or blank is `None`."""
    answers = value if isinstance(value, list) else [value]
    for answer in answers:
        if answer is not None and not isinstance(answer, str):
            raise ValueError(f"{where}: one of its answers is of type {type(answer).__name__}, no text")
    return [answer if answer is not None and answer.strip() else None for answer in answers]


def questions_and_answers(dataset: Dataset) -> Dataset:
    """What is measured of one of TOFU's sets: its questions and answers, with what names and renders them."""
    kept = (*SAMPLE_NAMES, *TEMPLATE_COLUMNS, "question", "answer")
    return dataset.select_columns([column for column in kept if column in dataset.column_names])


def tofu_utility(
    model: PreTrainedModel,
    sets: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    max_length: int | None = 1024,
    template: TemplateContext | None = None,
    generate: bool = True,
    passes: Passes | None = None,
) -> dict[str, np.ndarray]:
    """Per sample, `"<set>/probability"`, `"<set>/rouge_l_recall"` and `"<set>/truth_ratio"` of TOFU's sets.

    Args:
        sets: by the names in `UTILITY_SETS`, with `question`, `answer`, `perturbed_answer` and, for retain,
            `paraphrased_answer`.
        generate: also ROUGE-L recall, without which there is no model utility.
        passes: how the model goes over the sets; by default in one go.
    """
    values: dict[str, np.ndarray] = {}
    passes = passes or Passes()
    for name, dataset in sets.items():
        options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "passes": passes}
        options |= {"name": name, "template": template}
        prepared = prepare_samples(
            questions_and_answers(dataset), tokenizer, max_length=max_length, name=name, template=template
        )
        measured = evaluate_memorization(
            model,
            prepared,
            tokenizer,
            batch_size=batch_size,
            generate=generate,
            token_statistics=True,
            passes=passes,
            name=f"tofu-{name}",
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
