"""What `cud evaluate` measures on one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cud_trainer.data import Samples, prepare_samples

from .memorization import MEASURES, TOKEN_STATISTICS, evaluate_memorization, teacher_forced, true_answers
from .utility import answer_logps, tofu_utility, truth_ratio


@dataclass
class Measured:
    """What one model says.

    Attributes:
        sets: `{"forget" | "retain" | "holdout": {metric: [N]}}`.
        statistics, texts: by set, what attacks are made of (`TOKEN_STATISTICS`), and the true answers.
        truth_ratio: of the forget samples, `[N]`, where the data has wrong answers to compare with.
        paraphrased: answer probability of the forget samples asked in other words, `[N]`.
        utility: TOFU's figures, per sample.
    """

    sets: dict[str, dict[str, np.ndarray]]
    statistics: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    truth_ratio: np.ndarray | None = None
    paraphrased: np.ndarray | None = None
    utility: dict[str, np.ndarray] = field(default_factory=dict)

    def per_sample(self) -> dict[str, np.ndarray]:
        """Columns of the forget samples for a table, without text."""
        columns = {**self.sets["forget"], **self.statistics["forget"]}
        if self.truth_ratio is not None:
            columns["truth_ratio"] = self.truth_ratio
        if self.paraphrased is not None:
            columns["paraphrased_probability"] = self.paraphrased
        return columns


def measure(
    model: PreTrainedModel,
    sets: Mapping[str, Samples],
    forget_raw: Dataset,
    utility: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    max_length: int | None = 1024,
    generate: bool = True,
    samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    desc: str = "",
) -> Measured:
    """All that is measured on one model.

    Args:
        sets: prepared `forget` and, if there are any, `retain` and `holdout` sets.
        forget_raw: the forget set as text: its columns `perturbed_answer`, `paraphrased_answer` and
            `paraphrased_question` (TOFU's `*_perturbed` configurations) are used where they are there.
        utility: TOFU's sets, by the names in `UTILITY_SETS`; may be empty.
    """
    result = Measured({})
    for name, prepared in sets.items():
        what = f"{desc}: {name}"
        if name == "holdout":
            values = teacher_forced(model, prepared, tokenizer, batch_size=batch_size, desc=what)
        else:
            values = evaluate_memorization(
                model,
                prepared,
                tokenizer,
                batch_size=batch_size,
                generate=generate,
                samples=samples if name == "forget" else 0,
                temperature=temperature,
                seed=seed,
                token_statistics=True,
                desc=what,
            )
        result.statistics[name] = {key: values.pop(key) for key in TOKEN_STATISTICS}
        result.sets[name] = {key: values[key] for key in MEASURES if key in values}
        result.texts[name] = true_answers(prepared, tokenizer)
    columns = forget_raw.column_names
    if "perturbed_answer" in columns and "question" in columns:

        def answers(column: str) -> np.ndarray:
            return answer_logps(
                model, forget_raw, tokenizer, [column], batch_size=batch_size, max_length=max_length, name="forget"
            )

        wrong, correct = answers("perturbed_answer"), result.statistics["forget"]["mean_logps"]
        if "paraphrased_answer" in columns:
            correct = answers("paraphrased_answer")[:, 0]
        result.truth_ratio = truth_ratio(correct, wrong)
    if "paraphrased_question" in columns and "answer" in columns:
        asked = Dataset.from_dict({"question": forget_raw["paraphrased_question"], "answer": forget_raw["answer"]})
        prepared = prepare_samples(asked, tokenizer, max_length=max_length, name="paraphrased forget")
        result.paraphrased = teacher_forced(model, prepared, tokenizer, batch_size=batch_size)["probability"]
    if utility:
        result.utility = tofu_utility(
            model, utility, tokenizer, batch_size=batch_size, max_length=max_length, generate=generate, desc=desc
        )
    return result
