"""Tables of `results.json` beyond what is left by bucket: utility, privacy, other wording, groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from cud_trainer.data.groups import group_labels
from cud_trainer.difficulty import Buckets

from .. import statistics as stats
from ..metrics import privacy
from ..metrics.utility import UTILITY_SETS, closer_to_one, forget_quality, model_utility
from ..statistics import Interval
from .cells import Cell, finite, interval_text, mean, means, missing, shown
from .schema import BucketRow, ResidualRow, Row, Table

BucketRows = TypeVar("BucketRows", bound=BucketRow)


def table(
    name: str, title: str, note: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]]
) -> Table:
    """A table; every row must have a cell per column."""
    for label, cells in rows:
        assert len(cells) == len(columns), label
    made = [Row(label=label, cells=list(cells)) for label, cells in rows]
    return Table(id=name, title=title, note=note, columns=list(columns), rows=made)


def by_bucket(values: Mapping[str, np.ndarray], buckets: Buckets, seed: int) -> list[ResidualRow]:
    """What is left by difficulty bucket, 1 = easiest: its size and the mean of every metric with its interval."""
    return bucket_rows(ResidualRow, values, buckets, seed)


def bucket_rows(
    kind: type[BucketRows], values: Mapping[str, np.ndarray], buckets: Buckets, seed: int
) -> list[BucketRows]:
    """One row per difficulty bucket, of whatever `values` are, `[N]` each."""
    rows = []
    for number, inside in enumerate(buckets.masks, start=1):
        metrics = means({name: column[inside] for name, column in values.items()}, seed)
        rows.append(kind(bucket=number, n=int(inside.sum()), metrics=metrics))
    return rows


def masks_of(buckets: Buckets | None) -> tuple[np.ndarray, ...]:
    """The samples of each bucket, bool `[N]` each; none without buckets."""
    return () if buckets is None else buckets.masks


def relative_table(after: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray], seed: int) -> Table:
    """Residual memorisation less that of a model that never saw the samples: what is merely predictable drops out."""
    rows: list[tuple[str, list[Cell]]] = []
    for name, values in after.items():
        if name in reference:
            difference = shown(stats.paired_difference(values, reference[name], seed=seed))
            rows.append((name, [mean(values, seed), mean(reference[name], seed), difference]))
    return table(
        "relative",
        "Relative to the reference model",
        "The reference model never saw the forget set; what it knows of it can be guessed.",
        ["unlearned", "reference", "difference, paired"],
        rows,
    )


def forget_quality_table(
    ratios: np.ndarray | None, reference: np.ndarray | None, before: np.ndarray | None, seed: int
) -> Table:
    """Truth ratio of the forget set, and the test against the reference model's."""
    columns = ["truth ratio, closer to 1 is better", "forget quality (KS p-value)"]
    if ratios is None:
        cells: list[Cell] = [missing("the forget set has no perturbed_answer column")] * 2
        rows = [("unlearned", cells)]
    else:
        no_reference = missing("needs reference_model")

        def row(values: np.ndarray) -> list[Cell]:
            quality: Cell = no_reference
            if reference is not None:
                why = stats.why_undefined(values) or stats.why_undefined(reference)
                quality = missing(why) if why else forget_quality(values, reference)
            return [mean(closer_to_one(values), seed), quality]

        rows = [("unlearned", row(ratios))]
        if before is not None:
            rows.append(("original", row(before)))
        if reference is not None:
            rows.append(("reference", [mean(closer_to_one(reference), seed), missing("the reference itself")]))
    return table(
        "forget_quality",
        "Forget quality",
        "Kolmogorov-Smirnov test of truth ratios against those of the reference model (TOFU): a high p-value means "
        "that they cannot be told apart.",
        columns,
        rows,
    )


def privacy_table(
    members: Mapping[str, np.ndarray],
    others: Mapping[str, np.ndarray],
    reference: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]] | None,
    seed: int,
    buckets: Buckets | None = None,
) -> Table:
    """AUC of every attack and PrivLeak, over all forget samples and by difficulty bucket.

    Args:
        members, others: attack scores of the forget and the holdout set.
        reference: the same two under the reference model.
        buckets: of the forget samples.
    """
    masks = masks_of(buckets)
    columns = ["AUC", "PrivLeak, %", *(f"AUC, bucket {number + 1}" for number in range(len(masks)))]
    rows: list[tuple[str, list[Cell]]] = []
    for name in privacy.ATTACKS:
        if name not in members:
            why = f"needs {privacy.NEEDS[name]}" if name in privacy.NEEDS else "not measured"
            rows.append((name, [missing(why)] * len(columns)))
            continue
        known = None if reference is None or name not in reference[0] else (reference[0][name], reference[1][name])
        parts = [privacy.attack_interval(members[name][part], others[name], seed=seed) for part in masks]
        auc = privacy.attack_interval(members[name], others[name], seed=seed)
        rows.append((name, [shown(auc), _leak(auc, known), *map(shown, parts)]))
    return table(
        "privacy",
        "Membership inference",
        "Can forget samples be told from a holdout set? AUC 0.5: no; 1: always taken for training data. PrivLeak is "
        f"relative to {'the reference model' if reference is not None else 'an AUC of 0.5 (no reference)'}; 0 is best.",
        columns,
        rows,
    )


def _leak(auc: Interval, reference: tuple[np.ndarray, np.ndarray] | None) -> Cell:
    """PrivLeak against the scores of both sets under the reference model, if there is one."""
    if not np.isfinite(auc.value):
        return missing(auc.reason or "undefined")
    if reference is None:
        return privacy.privleak(auc.value)
    if why := stats.why_undefined(reference[0]) or stats.why_undefined(reference[1]):
        return missing(f"under the reference model {why}")
    reference_auc = privacy.attack_auc(*reference)
    if reference_auc > 1 - 1e-6:
        return missing("the reference tells the two sets apart by itself: the holdout set is of another kind")
    return privacy.privleak(auc.value, reference_auc)


def utility_table(values: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray] | None, seed: int) -> Table:
    """TOFU's nine figures and their harmonic mean."""
    rows: list[tuple[str, list[Cell]]] = []
    for part in UTILITY_SETS:
        for kind in ("probability", "rouge_l_recall", "truth_ratio"):
            name = f"{part}/{kind}"
            cells: list[Cell] = [
                missing("not measured") if figures is None or name not in figures else mean(figures[name], seed)
                for figures in (values, before)
            ]
            rows.append((name, cells))

    def harmonic(figures: Mapping[str, np.ndarray] | None) -> Cell:
        for name, column in (figures or {}).items():
            if why := stats.why_undefined(column):
                return missing(f"{name}: {why}")
        try:
            return model_utility({name: float(np.mean(column)) for name, column in (figures or {}).items()})
        except ValueError as error:
            return missing(str(error))

    rows.append(("model utility", [harmonic(values), harmonic(before)]))
    return table(
        "utility",
        "Utility (TOFU)",
        "Harmonic mean of nine figures: retained authors, real authors, world facts.",
        ["unlearned", "original"],
        rows,
    )


def change_table(
    name: str,
    title: str,
    note: str,
    base: str,
    conditions: Mapping[str, np.ndarray],
    buckets: Buckets | None,
    seed: int,
) -> Table:
    """Answer probability of the forget set under several conditions, over all and by bucket.

    Args:
        base: the condition that the others are compared with, paired over samples.
    """
    masks = masks_of(buckets)
    rows: list[tuple[str, list[Cell]]] = []
    for label, values in conditions.items():
        difference: Cell = missing("the base")
        if label != base:
            difference = shown(stats.paired_difference(values, conditions[base], seed=seed))
        rows.append((label, [mean(values, seed), difference, *(mean(values[part], seed) for part in masks)]))
    columns = ["all", f"change against {base}", *(f"bucket {number + 1}" for number in range(len(masks)))]
    return table(name, title, note, columns, rows)


def group_table(
    values: np.ndarray, groups: Sequence[Any], difficulty: np.ndarray | None, seed: int, shown: int = 20
) -> tuple[Table, str]:
    """Residual memorisation by group (author, topic, source), worst first; and the finding in words.

    Groups with a sample that is not finite come last and are left out of the finding.

    Args:
        values: answer probability of each forget sample, `[N]`.
        difficulty: predicted difficulty of each sample, higher = harder.
        shown: groups in the table at most.
    """
    labels = np.array(group_labels(groups))
    order = np.lexsort((values, labels))  # by group, and inside each one by what is left: whatever order they came in
    values, labels = np.asarray(values, dtype=float)[order], labels[order]
    difficulty = None if difficulty is None else np.asarray(difficulty, dtype=float)[order]
    names, starts, sizes = np.unique(labels, return_index=True, return_counts=True)
    levels = np.add.reduceat(values, starts) / sizes
    ranked = np.lexsort((np.arange(len(names)), -levels))  # NaN last
    rows: list[tuple[str, list[Cell]]] = []
    for group in ranked[:shown]:
        inside = slice(starts[group], starts[group] + sizes[group])
        cells: list[Cell] = [int(sizes[group]), mean(values[inside], seed)]
        cells.append(missing("needs scores") if difficulty is None else mean(difficulty[inside], seed))
        rows.append((str(names[group]), cells))
    note = "Worst first" + (f"; the first {shown} of {len(names)}." if len(names) > shown else ".")
    made = table("groups", "By group", note, ["samples", "answer probability", "mean difficulty"], rows)
    defined = np.isfinite(levels)
    finding = f"{len(names)} groups: "
    if (broken := int((~defined).sum())) > 0:
        finding += f"{broken} of them with samples that are not finite, of the others "
    if defined.sum() < 2:
        return made, finding + "no two can be compared"
    kept = np.repeat(defined, sizes)
    rest = None if difficulty is None else difficulty[kept]
    return made, finding + _gap(values[kept], names[defined], sizes[defined], rest, seed)


def _gap(values: np.ndarray, names: np.ndarray, sizes: np.ndarray, difficulty: np.ndarray | None, seed: int) -> str:
    """How far the worst group is from the best one, and whether groups by chance are as far apart.

    Args:
        values, difficulty: of the samples, group by group.
        names, sizes: of the groups.
    """
    starts = np.cumsum(sizes) - sizes
    levels = np.add.reduceat(values, starts) / sizes
    worst, best = int(np.argmax(levels)), int(len(levels) - 1 - np.argmin(levels[::-1]))
    gap = levels[worst] - levels[best]
    # The worst and the best group are picked by the result: groups of noise have a gap, too.
    generator = np.random.default_rng(seed)
    mixed, chance = np.sort(values), []
    for _ in range(500):
        level = np.add.reduceat(generator.permutation(mixed), starts) / sizes
        chance.append(np.ptp(level))
    high = float(np.percentile(chance, 95))
    finding = (
        f"worst {str(names[worst])!r} {levels[worst]:.3f}, best {str(names[best])!r} {levels[best]:.3f}, gap {gap:.3f} "
        f"({'more' if gap > high else 'no more'} than groups drawn by chance have, 95%: {high:.3f})"
    )
    if difficulty is None or len(names) < 3:
        return finding
    agreement = stats.spearman(np.add.reduceat(difficulty, starts) / sizes, levels, seed=seed)
    return finding + (
        f"; Spearman of group means with mean difficulty {interval_text(agreement)}: difficulty "
        f"{'explains part of the gap' if agreement.low > 0 else 'does not explain it within the noise'}"
    )


def line_table(path: Sequence[Mapping[str, Any]], seed: int) -> Table:
    """Answer probability along the straight line from the original to the unlearned weights."""
    names = [name for name in path[0] if name != "share"]
    rows = [(f"{entry['share']:g}", [mean(entry[name], seed) for name in names]) for entry in path]
    return table(
        "straight_line",
        "Between the original and the unlearned weights",
        "Share of the way: 0 = original, 1 = unlearned. A forget probability that falls at once lies on one slope; a "
        "ridge on the way means that the two are different solutions.",
        names,
        rows,
    )


def lm_eval_table(figures: Sequence[tuple[str, float, float | None]]) -> Table:
    """Figures of lm-evaluation-harness with its own standard errors.

    Args:
        figures: what it measures, the value and its standard error, if it gives one.
    """
    rows = [
        (label, [finite(value), missing("none given") if error is None else finite(error)])
        for label, value, error in figures
    ]
    note = "General ability; standard errors are those of the harness."
    return table("lm_eval", "lm-evaluation-harness", note, ["value", "standard error"], rows)


def other_results_table(values: Sequence[tuple[str, float | None, str]]) -> Table:
    """What open-unlearning measured and no other section shows.

    Args:
        values: the metric, its single value, if it has one, and why it is here.
    """
    rows = [(name, [missing("no single value") if value is None else value, why]) for name, value, why in values]
    note = "As open-unlearning gives them, over all samples."
    return table("open_unlearning", "Other results of open-unlearning", note, ["value", "why it is here"], sorted(rows))
