"""Tables of `results.json` beyond what is left by bucket: privacy, utility, robustness, groups, mechanisms.

A table is `{"id", "title", "note", "columns", "rows": [{"label", "cells"}]}`; a cell is a number, a text, a figure with
its interval, or `{"value": None, "reason": ...}` where there is nothing to show and why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

from .. import statistics as stats
from ..metrics import privacy
from ..metrics.utility import UTILITY_SETS, closer_to_one, forget_quality, model_utility

# What Cheng et al. 2026 found of hard samples: longer, deeper and later circuits.
MECHANISMS = ("mean_edge_length", "mean_destination_depth", "late_share")


def missing(reason: str) -> dict[str, Any]:
    """A cell without a figure."""
    return {"value": None, "reason": reason}


def table(
    name: str, title: str, note: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Any]]]
) -> dict[str, Any]:
    """A table; every row must have a cell per column."""
    for label, cells in rows:
        assert len(cells) == len(columns), label
    return {
        "id": name, "title": title, "note": note, "columns": list(columns),
        "rows": [{"label": label, "cells": list(cells)} for label, cells in rows],
    }  # fmt: skip


def mean(values: np.ndarray, seed: int) -> dict[str, Any]:
    """A cell: the mean over samples."""
    values = np.asarray(values, dtype=float)
    undefined = int((~np.isfinite(values)).sum())
    if not values.size or undefined:
        return missing("no samples" if not values.size else f"{undefined} of {values.size} are not finite")
    return stats.bootstrap_mean(values, seed=seed).as_dict()


def relative_table(after: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Residual memorisation less that of a model that never saw the samples: what is merely predictable drops out."""
    rows = []
    for name, values in after.items():
        if name in reference and np.isfinite(values).all() and np.isfinite(reference[name]).all():
            difference = stats.paired_difference(values, reference[name], seed=seed).as_dict()
            rows.append((name, [mean(values, seed), mean(reference[name], seed), difference]))
    return table(
        "relative", "Relative to the reference model",
        "The reference model never saw the forget set; what it knows of it can be guessed.",
        ["unlearned", "reference", "difference, paired"], rows,
    )  # fmt: skip


def forget_quality_table(
    ratios: np.ndarray | None, reference: np.ndarray | None, before: np.ndarray | None, seed: int
) -> dict[str, Any]:
    """Truth ratio of the forget set, and the test against the reference model's."""
    columns = ["truth ratio, closer to 1 is better", "forget quality (KS p-value)"]
    if ratios is None:
        cells = [missing("the forget set has no perturbed_answer column")] * 2
        rows = [("unlearned", cells)]
    else:
        no_reference = missing("needs reference_model")

        def row(values: np.ndarray) -> list[Any]:
            quality = no_reference if reference is None else forget_quality(values, reference)
            return [mean(closer_to_one(values), seed), quality]

        rows = [("unlearned", row(ratios))]
        if before is not None:
            rows.append(("original", row(before)))
        if reference is not None:
            rows.append(("reference", [mean(closer_to_one(reference), seed), missing("the reference itself")]))
    return table(
        "forget_quality", "Forget quality",
        "Kolmogorov-Smirnov test of truth ratios against those of the reference model (TOFU): a high p-value means "
        "that they cannot be told apart.", columns, rows,
    )  # fmt: skip


def privacy_table(
    members: Mapping[str, np.ndarray],
    others: Mapping[str, np.ndarray],
    reference: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]] | None,
    seed: int,
    by_bucket: Sequence[np.ndarray] = (),
) -> dict[str, Any]:
    """AUC of every attack and PrivLeak, over all forget samples and by difficulty bucket.

    Args:
        members, others: attack scores of the forget and the holdout set.
        reference: the same two under the reference model.
        by_bucket: rows of each bucket, easiest first.
    """
    columns = ["AUC", "PrivLeak, %", *(f"AUC, bucket {number + 1}" for number in range(len(by_bucket)))]
    rows: list[tuple[str, list[Any]]] = []
    for name in privacy.ATTACKS:
        if name not in members:
            rows.append((name, [missing("needs reference_model")] * len(columns)))
            continue
        found = privacy.attack_interval(members[name], others[name], seed=seed)
        if not np.isfinite(found.value):
            rows.append((name, [missing("scores are not finite")] * len(columns)))
            continue
        known = 0.5
        if reference is not None and name in reference[0]:
            known = privacy.attack_auc(reference[0][name], reference[1][name])
        parts: list[Any] = [
            privacy.attack_interval(members[name][part], others[name], seed=seed).as_dict() for part in by_bucket
        ]
        leak: Any = privacy.privleak(found.value, known)
        if known > 1 - 1e-6:
            leak = missing("the reference tells the two sets apart by itself: the holdout set is of another kind")
        cells: list[Any] = [found.as_dict(), leak, *parts]
        rows.append((name, cells))
    return table(
        "privacy", "Membership inference",
        "Can forget samples be told from a holdout set? AUC 0.5: no; 1: always taken for training data. PrivLeak is "
        f"relative to {'the reference model' if reference is not None else 'an AUC of 0.5 (no reference)'}; 0 is best.",
        columns, rows,
    )  # fmt: skip


def utility_table(
    values: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray] | None, seed: int
) -> dict[str, Any]:
    """TOFU's nine figures and their harmonic mean."""
    rows: list[tuple[str, list[Any]]] = []
    for part in UTILITY_SETS:
        for kind in ("probability", "rouge_l_recall", "truth_ratio"):
            name = f"{part}/{kind}"
            cells = [
                missing("not measured") if found is None or name not in found else mean(found[name], seed)
                for found in (values, before)
            ]
            rows.append((name, cells))

    def harmonic(found: Mapping[str, np.ndarray] | None) -> Any:
        try:
            return model_utility({name: float(np.mean(column)) for name, column in (found or {}).items()})
        except ValueError as error:
            return missing(str(error))

    rows.append(("model utility", [harmonic(values), harmonic(before)]))
    return table(
        "utility", "Utility (TOFU)", "Harmonic mean of nine figures: retained authors, real authors, world facts.",
        ["unlearned", "original"], rows,
    )  # fmt: skip


def change_table(
    name: str,
    title: str,
    note: str,
    base: str,
    conditions: Mapping[str, np.ndarray],
    buckets: Sequence[np.ndarray],
    seed: int,
) -> dict[str, Any]:
    """Answer probability of the forget set under several conditions, over all and by bucket.

    Args:
        base: the condition that the others are compared with, paired over samples.
    """
    rows = []
    for label, values in conditions.items():
        difference = missing("the base") if label == base else None
        if difference is None:
            difference = stats.paired_difference(values, conditions[base], seed=seed).as_dict()
        rows.append((label, [mean(values, seed), difference, *(mean(values[part], seed) for part in buckets)]))
    columns = ["all", f"less {base}", *(f"bucket {number + 1}" for number in range(len(buckets)))]
    return table(name, title, note, columns, rows)


def relearning_table(
    found: Mapping[int, np.ndarray], taught: np.ndarray, bucket: np.ndarray | None, n_buckets: int, seed: int
) -> dict[str, Any]:
    """Forget samples that were *not* taught again, by steps of relearning on the others.

    Args:
        taught: True for samples that were trained on, `[N]`.
        bucket: difficulty bucket of every sample, 0 = easiest.
    """
    rest = ~taught
    columns = ["taught", "others"]
    parts: list[np.ndarray] = []
    if bucket is not None:
        parts = [rest & (bucket == number) for number in range(n_buckets)]
        columns += [f"others, bucket {number + 1}" for number in range(n_buckets)]
        columns.append("recovered: hardest less easiest")
    rows = []
    for step, values in sorted(found.items()):
        cells = [mean(values[taught], seed), mean(values[rest], seed), *(mean(values[part], seed) for part in parts)]
        if bucket is not None:
            cells.append(_recovered(values - found[0], parts[-1], parts[0], seed) if step else missing("the start"))
        rows.append((f"{step} steps", cells))
    return table(
        "relearning", "Relearning",
        f"Answer probability after a few steps of fine-tuning on {int(taught.sum())} of the forget samples. What comes "
        "back of the others was hidden, not gone.", columns, rows,
    )  # fmt: skip


def _recovered(gain: np.ndarray, hard: np.ndarray, easy: np.ndarray, seed: int) -> dict[str, Any]:
    """Mean gain of the hardest less that of the easiest bucket, samples of each drawn apart."""
    if not hard.any() or not easy.any():
        return missing("a bucket has no sample that was not taught")
    return difference_of_means(gain[hard], gain[easy], seed).as_dict()


def difference_of_means(a: np.ndarray, b: np.ndarray, seed: int, n_boot: int = 2000) -> stats.Interval:
    """Mean of `a` less mean of `b`, other samples; 95% bootstrap interval, each side drawn apart."""
    generator = np.random.default_rng(seed)
    left = a[generator.integers(0, len(a), (n_boot, len(a)))].mean(1)
    right = b[generator.integers(0, len(b), (n_boot, len(b)))].mean(1)
    low, high = np.percentile(left - right, stats.LEVELS)
    return stats.Interval(float(a.mean() - b.mean()), float(low), float(high))


def group_table(
    values: np.ndarray, groups: Sequence[Any], difficulty: np.ndarray | None, seed: int, shown: int = 20
) -> tuple[dict[str, Any], str]:
    """Residual memorisation by group (author, topic, source), worst first; and the finding in words.

    Args:
        values: answer probability of each forget sample, `[N]`.
        difficulty: predicted difficulty of each sample, higher = harder.
        shown: groups in the table at most.
    """
    names = np.array([str(group) for group in groups])
    order = sorted(set(names.tolist()), key=lambda name: -values[names == name].mean())
    rows: list[tuple[str, list[Any]]] = []
    for name in order[:shown]:
        inside = names == name
        cells: list[Any] = [int(inside.sum()), mean(values[inside], seed)]
        cells.append(missing("needs scores") if difficulty is None else mean(difficulty[inside], seed))
        rows.append((name, cells))
    worst, best = (names == order[0]), (names == order[-1])
    gap = difference_of_means(values[worst], values[best], seed)
    # The worst and the best group are picked by the result: groups of noise have a gap, too.
    generator = np.random.default_rng(seed)
    chance = []
    for _ in range(500):
        mixed = generator.permutation(values)
        level = [mixed[names == name].mean() for name in order]
        chance.append(max(level) - min(level))
    high = float(np.percentile(chance, 95))
    finding = (
        f"{len(order)} groups: worst {order[0]!r} {values[worst].mean():.3f}, best {order[-1]!r} "
        f"{values[best].mean():.3f}, gap {gap.value:.3f} ({'more' if gap.value > high else 'no more'} than groups "
        f"drawn by chance have, 95%: {high:.3f})"
    )
    if difficulty is not None and len(order) > 2:
        levels = np.array([[values[names == name].mean(), difficulty[names == name].mean()] for name in order])
        agreement = stats.spearman(levels[:, 1], levels[:, 0], seed=seed)
        explained = agreement.low > 0
        finding += (
            f"; Spearman of group means with mean difficulty {agreement.value:.3f} "
            f"[{agreement.low:.3f}, {agreement.high:.3f}]: difficulty "
            f"{'explains part of the gap' if explained else 'does not explain it within the noise'}"
        )
    note = "Worst first" + (f"; the first {shown} of {len(order)}." if len(order) > shown else ".")
    return table("groups", "By group", note, ["samples", "answer probability", "mean difficulty"], rows), finding


def mechanism_table(
    signature: Mapping[str, np.ndarray], bucket: np.ndarray, seed: int, n_boot: int = 2000
) -> tuple[dict[str, Any], str]:
    """Are the circuits of hard samples longer, deeper and later, as Cheng et al. (2026) found?

    Effect size: mean of the hardest less mean of the easiest bucket, in pooled standard deviations (Cohen's d), with an
    interval at 1 - 0.05 / 3 (Bonferroni over the three). Yes: at least two intervals lie above 0 and none below; no: at
    least one lies below 0 and none above; undecided otherwise.

    Args:
        signature: `MECHANISMS` of each sample, `[N]`, NaN for empty circuits.
        bucket: difficulty bucket, 0 = easiest.
    """
    generator = np.random.default_rng(seed)
    rows: list[tuple[str, list[Any]]] = []
    above = below = 0
    for name in MECHANISMS:
        values = np.asarray(signature[name], dtype=float)
        easy, hard = (values[(bucket == side) & np.isfinite(values)] for side in (0, int(bucket.max())))
        if min(len(easy), len(hard)) < 2:
            rows.append((name, [missing("fewer than two circuits in a bucket")] * 3))
            continue
        draws = np.array([
            _cohen(generator.choice(hard, len(hard)), generator.choice(easy, len(easy))) for _ in range(n_boot)
        ])  # fmt: skip
        effect = _cohen(hard, easy)
        if not np.isfinite(effect) or not np.isfinite(draws).any():
            rows.append((name, [mean(easy, seed), mean(hard, seed), missing("no variance")]))
            continue
        tail = 100 * 0.05 / len(MECHANISMS) / 2
        low, high = np.nanpercentile(draws, [tail, 100 - tail])
        above, below = above + (low > 0), below + (high < 0)
        rows.append(
            (name, [mean(easy, seed), mean(hard, seed), {"value": effect, "low": float(low), "high": float(high)}])
        )
    verdict = "yes" if above >= 2 and not below else "no" if below and not above else "undecided"
    note = (
        "Effect size: hardest less easiest bucket in pooled standard deviations, interval at 98.3% (three at once). "
        "Yes: two or more above 0, none below; no: one or more below 0, none above; else undecided."
    )
    finding = f"hard samples have longer, deeper and later circuits, as the CUD paper found: {verdict}"
    return table("mechanisms", "Mechanisms", note, ["easiest bucket", "hardest bucket", "effect size"], rows), finding


def _cohen(a: np.ndarray, b: np.ndarray) -> float:
    pooled = np.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2))
    return float((a.mean() - b.mean()) / pooled) if pooled > 1e-12 else float("nan")


def comparisons_note(count: int) -> str:
    """What several intervals at once mean."""
    level = 1 - 0.05 / max(count, 1)
    return (
        f"{count} metrics are compared: of as many without any relation {0.05 * count:.1f} would exclude 0 at 95% by "
        f"chance; hold a single one to {100 * level:.1f}%."
    )


def reliability_by_decile(predicted: np.ndarray, observed: np.ndarray, seed: int, bins: int = 5) -> dict[str, Any]:
    """Calibration of predicted difficulty: mean observed rank of residual memorisation by bin of predicted rank."""
    ranks = [(scipy_stats.rankdata(x) - 0.5) / len(x) for x in (predicted, observed)]
    rows = []
    edges = np.array_split(np.argsort(ranks[0], kind="stable"), min(bins, len(predicted)))
    for number, part in enumerate(edges):
        rows.append((f"bin {number + 1}", [len(part), mean(ranks[0][part], seed), mean(ranks[1][part], seed)]))
    return table(
        "calibration", "Predicted and observed difficulty",
        "Mean rank, 0 = easiest, 1 = hardest; a predictor that knows everything has the same on both sides.",
        ["samples", "predicted rank", "observed rank"], rows,
    )  # fmt: skip
