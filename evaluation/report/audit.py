"""What puts the report on one unlearned model together: what is left by difficulty, and the tables beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from cud_trainer.difficulty import Buckets, DifficultyScores

from ..metrics import leak, privacy, secret
from ..metrics.measure import Measured
from ..metrics.memorization import MEASURES, TOKEN_STATISTICS
from ..statistics import Interval
from .cells import interval_text, means
from .difficulty import TRIVIAL, comparisons_note, difficulty_section
from .schema import Condition, Difficulty, Final, Head, Results, Run, Table
from .tables import by_bucket, change_table, forget_quality_table, privacy_table, relative_table, utility_table

# Columns of a table of samples that are no difficulty.
WHITE_BOX = ("logit_lens", "gradient_norm", "uds", "depth_of_change", "depth_drops", "reference_depth_drops")
MEASURED = (
    *(*MEASURES, *TOKEN_STATISTICS, "truth_ratio", "paraphrased_probability", *WHITE_BOX),
    *(*secret.COLUMNS, *(f"{leak.COLUMN}{kind}" for kind in leak.KINDS)),
)
ATTACKED = ("relearned/", "relearn_taught", "quantised/")
BESIDE = ("set", "lost", "group", "true_answer", "ground_truth", "generation")

# Wherever a figure says what is left, these stand side by side.
HEADLINES = {"probability": "answer probability", "extraction_strength": "extraction strength"}

Sets = Mapping[str, Mapping[str, np.ndarray]]


def audit_results(
    after: Sets,
    run: Run,
    *,
    before: Sets | None = None,
    scores: DifficultyScores | None = None,
    buckets: Buckets | None = None,
    seed: int = 0,
    name: str = "model",
) -> Results:
    """`Results` of one unlearned model, without tables.

    Args:
        after, before: `{"forget": {metric: [N]}, "retain": {metric: [M]}}` of the unlearned and the original model.
        run: how they were made.
        scores: difficulty of the forget samples, in the same order.
        buckets: made of one of its metrics; `None` without scores.
    """
    final = Final(sets={part: means(values, seed) for part, values in after.items()})
    started = None if before is None else {part: means(values, seed) for part, values in before.items()}
    findings = []
    for part in ("forget", "retain"):
        if part in final.sets:
            findings.append(_headline(part, final.sets[part], None if started is None else started.get(part)))
    condition = Condition(
        name=name,
        objective=None,
        schedule=None,
        retain_weight=None,
        learning_rate=None,
        seeds=[],
        curve=[],
        final=final,
    )
    title = f"Residual memorisation of {name}"
    results = Results(head=Head.now(title), conditions=[condition], findings=findings, before=started, run=run)
    if scores is not None and buckets is not None:
        final.buckets = by_bucket(after["forget"], buckets, seed)
        for measure, what in HEADLINES.items():
            if measure in after["forget"]:
                easy, hard = (interval_text(final.buckets[side].metrics[measure]) for side in (0, -1))
                ends = f"bucket 1 (easiest) {easy}, bucket {buckets.count} (hardest) {hard}"
                findings.append(f"by {buckets.metric}: {ends} ({what})")
        if buckets.note:
            findings.append(buckets.note)
        if all(column in scores.columns for column in TRIVIAL):
            results.difficulty, lines = _difficulty(after["forget"]["probability"], scores, buckets, seed, name)
            findings += lines
    return results


def _headline(part: str, now: Mapping[str, Interval], before: Mapping[str, Interval] | None) -> str:
    """What is known of a set, per token and as far as it can be extracted."""
    said = []
    for name in (name for name in HEADLINES if name in now):
        line = f"{name.replace('_', ' ')} {interval_text(now[name])}"
        if before is not None and name in before:
            level = before[name].value
            line += f" (before unlearning {level:.3f})" if np.isfinite(level) else " (before unlearning n/a)"
        said.append(line)
    return f"mean {part} " + ", ".join(said)


def _difficulty(
    left: np.ndarray, scores: DifficultyScores, buckets: Buckets, seed: int, name: str
) -> tuple[Difficulty, list[str]]:
    """How well each metric predicted what is `left` of each sample, `[N]`; findings on the buckets' metric and loss."""
    section = difficulty_section(name, scores.columns, [left], target="answer probability now", seed=seed)
    note = "One unlearned model: without a second seed there is no ceiling to compare with. "
    rows = {row.metric: row for row in section.rows}
    findings = [
        f"Spearman of {rows[metric].label} with what is left (answer probability): "
        f"{interval_text(rows[metric].spearman)}"
        for metric in (buckets.metric, "loss")
    ]
    return Difficulty(note=note + comparisons_note(len(section.rows)), objectives=[section]), findings


def measured_tables(
    after: Measured, before: Measured | None, reference: Measured | None, buckets: Buckets | None, seed: int
) -> tuple[list[Table], list[str]]:
    """Tables and findings that only need what was measured."""
    tables, findings = [], []
    if reference is not None:
        tables.append(relative_table(after.sets["forget"], reference.sets["forget"], seed))
    if after.truth_ratio is not None or reference is not None:
        never_saw, original = (None if other is None else other.truth_ratio for other in (reference, before))
        tables.append(forget_quality_table(after.truth_ratio, never_saw, original, seed))
        quality = tables[-1].rows[0].cells[1]
        if isinstance(quality, float) and np.isfinite(quality):
            findings.append(f"forget quality (KS p-value of truth ratios against the reference model) {quality:.3g}")
    if after.utility:
        tables.append(utility_table(after.utility, None if before is None else before.utility, seed))
        total = tables[-1].rows[-1].cells[0]
        if isinstance(total, float):
            findings.append(f"model utility (TOFU) {total:.3f}")
    if after.paraphrased is not None:
        as_asked = "as asked in training"
        conditions = {as_asked: after.sets["forget"]["probability"], "in other words": after.paraphrased}
        note = "Answer probability of the forget set when the question is asked in other words (TOFU)."
        tables.append(change_table("paraphrase", "Other wording", note, as_asked, conditions, buckets, seed))
    if "holdout" in after.sets:
        members, others = (_attacks(after, reference, name) for name in ("forget", "holdout"))
        unseen = None
        if reference is not None:
            unseen = _attacks(reference, None, "forget"), _attacks(reference, None, "holdout")
        tables.append(privacy_table(members, others, unseen, seed, buckets))
        lowest = next(row for row in tables[-1].rows if row.label == "min_k").cells[0]
        if isinstance(lowest, Interval):
            findings.append(f"membership inference (Min-K%): AUC {interval_text(lowest)}")
    return tables, findings


def _attacks(measured: Measured, reference: Measured | None, name: str) -> dict[str, np.ndarray]:
    return privacy.attack_scores(
        measured.statistics[name], measured.texts[name], None if reference is None else reference.statistics[name]
    )


def check_score_names(scores: DifficultyScores) -> None:
    """Raise `ValueError` naming a difficulty metric that is called like a column of what is measured."""
    for name in scores.metrics:
        own = name.removeprefix("before/").removeprefix("reference/")
        if name in BESIDE or own in MEASURED or name.startswith(ATTACKED):
            raise ValueError(
                f"the scores have a metric {name!r}, which is a column of what is measured of each sample: rename it"
            )


def per_sample_table(
    ids: Sequence[str],
    after: Measured,
    before: Measured | None,
    reference: Measured | None,
    scores: DifficultyScores | None,
    buckets: Buckets | None,
) -> pd.DataFrame:
    """One row per forget sample: what was measured, its difficulty and its bucket (1 = easiest). No text."""
    frame = pd.DataFrame({"sample_id": ids, **after.per_sample()})
    for name, other in (("before", before), ("reference", reference)):
        if other is not None:
            frame = frame.assign(**{f"{name}/{key}": values for key, values in other.per_sample().items()})
    if scores is not None and buckets is not None:
        frame = frame.assign(**scores.columns, bucket=buckets.number + 1)
    return frame
