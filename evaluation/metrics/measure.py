"""What `cud evaluate` measures on one model, and the tables made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cud_trainer.data import Samples, prepare_samples

from ..report import tables as sections
from . import privacy
from .memorization import METRICS, TOKEN_STATISTICS, evaluate_memorization, teacher_forced, true_answers
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
        if name == "holdout":
            values = teacher_forced(model, prepared, tokenizer, batch_size=batch_size, desc=f"{desc}: {name}")
        else:
            values = evaluate_memorization(
                model, prepared, tokenizer, batch_size=batch_size, generate=generate, desc=f"{desc}: {name}",
                samples=samples if name == "forget" else 0, temperature=temperature, seed=seed,
                token_statistics=True,
            )  # fmt: skip
        result.statistics[name] = {key: values.pop(key) for key in TOKEN_STATISTICS}
        result.sets[name] = {key: values[key] for key in METRICS if key in values}
        result.texts[name] = true_answers(prepared, tokenizer)
    columns, options = forget_raw.column_names, {"batch_size": batch_size, "max_length": max_length, "name": "forget"}
    if "perturbed_answer" in columns and "question" in columns:
        wrong = answer_logps(model, forget_raw, tokenizer, ["perturbed_answer"], **options)  # type: ignore[arg-type]
        correct = result.statistics["forget"]["mean_logps"]
        if "paraphrased_answer" in columns:
            correct = answer_logps(model, forget_raw, tokenizer, ["paraphrased_answer"], **options)[:, 0]  # type: ignore[arg-type]
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


def tables(
    after: Measured,
    before: Measured | None,
    reference: Measured | None,
    bucket: np.ndarray | None,
    n_buckets: int,
    seed: int,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Tables and findings that only need what was measured."""
    made, findings = [], []
    parts = [] if bucket is None else [bucket == number for number in range(n_buckets)]
    if reference is not None:
        made.append(sections.relative_table(after.sets["forget"], reference.sets["forget"], seed))
    if after.truth_ratio is not None or reference is not None:
        known, original = (None if one is None else one.truth_ratio for one in (reference, before))
        made.append(sections.forget_quality_table(after.truth_ratio, known, original, seed))
        quality = made[-1]["rows"][0]["cells"][1]
        if isinstance(quality, float):
            findings.append(f"forget quality (KS p-value of truth ratios against the reference model) {quality:.3g}")
    if after.utility:
        made.append(sections.utility_table(after.utility, None if before is None else before.utility, seed))
        total = made[-1]["rows"][-1]["cells"][0]
        if isinstance(total, float):
            findings.append(f"model utility (TOFU) {total:.3f}")
    if after.paraphrased is not None:
        conditions = {"as asked in training": after.sets["forget"]["probability"], "in other words": after.paraphrased}
        note = "Answer probability of the forget set when the question is asked in other words (TOFU)."
        made.append(
            sections.change_table("paraphrase", "Other wording", note, "as asked in training", conditions, parts, seed)
        )
    if "holdout" in after.sets:
        members, others = (_attacks(after, reference, name) for name in ("forget", "holdout"))
        unseen = None
        if reference is not None:
            unseen = _attacks(reference, None, "forget"), _attacks(reference, None, "holdout")
        made.append(sections.privacy_table(members, others, unseen, seed, parts))
        lowest = next(row for row in made[-1]["rows"] if row["label"] == "min_k")["cells"][0]
        if lowest.get("low") is not None:
            findings.append(
                f"membership inference (Min-K%): AUC {lowest['value']:.3f} [{lowest['low']:.3f}, {lowest['high']:.3f}]"
            )
    return made, findings


def _attacks(one: Measured, reference: Measured | None, name: str) -> dict[str, np.ndarray]:
    return privacy.attack_scores(
        one.statistics[name], one.texts[name], None if reference is None else reference.statistics[name]
    )


def line_table(path: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Answer probability along the straight line from the original to the unlearned weights."""
    names = [name for name in path[0] if name != "share"]
    rows = [(f"{entry['share']:g}", [sections.mean(entry[name], seed) for name in names]) for entry in path]
    return sections.table(
        "straight_line", "Between the original and the unlearned weights",
        "Share of the way: 0 = original, 1 = unlearned. A forget probability that falls at once lies on one slope; a "
        "ridge on the way means that the two are different solutions.", names, rows,
    )  # fmt: skip


def check_lm_eval() -> None:
    """Raise `ValueError` when lm-evaluation-harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ValueError("lm_eval_tasks need lm-evaluation-harness: pip install 'cud-trainer[lm-eval]'") from None


def lm_eval_table(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    include_path: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
) -> dict[str, Any]:
    """Figures of lm-evaluation-harness with its own standard errors.

    Raises:
        ValueError: for an unknown task.
    """
    check_lm_eval()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"lm-evaluation-harness has no task {unknown[0]!r}")
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), tasks=list(tasks),
        task_manager=manager,
        limit=limit, bootstrap_iters=0, log_samples=False,
    )  # fmt: skip
    assert found is not None
    rows: list[tuple[str, list[Any]]] = []
    for task, values in found["results"].items():
        for key, value in values.items():
            name, _, kind = key.partition(",")
            if name.endswith("_stderr") or not isinstance(value, float):
                continue
            error = values.get(f"{name}_stderr,{kind}")
            rows.append(
                (f"{task}: {name}", [value, error if isinstance(error, float) else sections.missing("none given")])
            )
    return sections.table(
        "lm_eval", "lm-evaluation-harness", "General ability; standard errors are those of the harness.",
        ["value", "standard error"], rows,
    )  # fmt: skip
