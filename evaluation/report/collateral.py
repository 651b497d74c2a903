"""Collateral: which samples that were to be kept were lost, and whether their difficulty predicted it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cud_trainer.data.groups import group_labels
from cud_trainer.difficulty import Buckets, DifficultyScores

from .. import statistics as stats
from ..metrics.measure import Measured
from .cells import Cell, interval_text, mean, missing, shown
from .schema import Table
from .tables import table

KEPT = {"retain": "retain", "neighbour": "neighbour", "heldout": "held-out"}
GROUPS_SHOWN = 20
QUARTERS = 4


def collateral_tables(
    after: Measured,
    before: Measured,
    scores: DifficultyScores | None,
    buckets: Buckets | None,
    groups: Sequence[Any] | None,
    seed: int,
) -> tuple[list[Table], list[str]]:
    """What each set that was to be kept has lost: over all, by difficulty bucket, by group; and what predicted it.

    Args:
        scores, buckets: of the retain samples. A sample that is easy to forget is predicted to be lost first.
        groups: of the retain samples.
    """
    lost = {
        part: (before.sets[part]["probability"], after.sets[part]["probability"]) for part in KEPT if part in after.sets
    }
    if not lost:
        return [], []
    rows, findings = [], []
    for part, (start, end) in lost.items():
        rows.append((f"{KEPT[part]}, all", _row(start, end, np.ones(len(start), dtype=bool), seed)))
        if part == "retain" and buckets is not None:
            ends = {1: ", predicted to be lost first", buckets.count: ", predicted to be kept"}
            for number, mask in enumerate(buckets.masks, start=1):
                rows.append((f"retain, bucket {number}{ends.get(number, '')}", _row(start, end, mask, seed)))
        cost = stats.paired_difference(start, end, seed=seed)
        findings.append(f"{KEPT[part]} samples lost {interval_text(cost)} of answer probability")
    made = [
        table(
            "collateral",
            "Collateral",
            "What unlearning cost of the samples that were to be kept. Lost: answer probability before less after, "
            "paired. Halved: the share of samples that lost half of it or more. A retain sample that is easy to forget "
            "(bucket 1) is predicted to be lost first.",
            ["samples", "before", "after", "lost", "halved"],
            rows,
        )
    ]
    if "retain" in lost:
        start, end = lost["retain"]
        if scores is not None:
            predictors, line = _predictors(scores, start - end, seed)
            made.append(predictors)
            findings.append(line)
        if groups is not None:
            made.append(_by_group(start, end, groups, seed))
    return made, findings


def _row(start: np.ndarray, end: np.ndarray, mask: np.ndarray, seed: int) -> list[Cell]:
    start, end = start[mask], end[mask]
    halved = np.where(np.isfinite(start - end), end <= start / 2, np.nan)
    difference = shown(stats.paired_difference(start, end, seed=seed))
    return [int(mask.sum()), mean(start, seed), mean(end, seed), difference, mean(halved, seed)]


def _predictors(scores: DifficultyScores, lost: np.ndarray, seed: int) -> tuple[Table, str]:
    """How well each metric, with its sign turned (easy to forget = lost first), told what was lost."""
    rows: list[tuple[str, list[Cell]]] = []
    first = stats.undefined()
    for name, values in scores.columns.items():
        agreement = stats.spearman(-values, lost, seed=seed)
        if name == scores.metrics[0]:
            first = agreement
        told: Cell = missing("fewer than 4 samples")
        if len(lost) >= QUARTERS:
            told = shown(stats.auroc_extremes(-values, lost, seed=seed))
        rows.append((name, [shown(agreement), told, *_met(values, lost, seed)]))
    columns = ["Spearman with what was lost", "AUROC, most against least lost", "found", "by chance"]
    note = (
        "Each metric of the retain samples with its sign turned: what is easy to forget is predicted to be lost first. "
        "Found: of the quarter that lost most, the share that is in the quarter predicted to be lost first."
    )
    line = f"Spearman of {scores.metrics[0]} of the retain samples with what they lost: {interval_text(first)}"
    return table("collateral_predictors", "Was collateral predicted?", note, columns, rows), line


def _met(values: np.ndarray, lost: np.ndarray, seed: int) -> list[Cell]:
    """Of the quarter that lost most, the share predicted to; and the share of all that is predicted to."""
    why = stats.why_undefined(lost)
    if why is None and (len(lost) < QUARTERS or np.ptp(values) == 0 or np.ptp(lost) == 0):
        why = "nothing to rank"
    if why is not None:
        return [missing(why)] * 2
    predicted = Buckets.by_rank(values, QUARTERS, "").easiest
    worst = Buckets.by_rank(lost, QUARTERS, "lost").hardest
    return [mean(predicted[worst].astype(float), seed), float(predicted.mean())]


def _by_group(start: np.ndarray, end: np.ndarray, groups: Sequence[Any], seed: int) -> Table:
    """The retain samples by group, most lost first."""
    labels = np.array(group_labels(groups))
    names = np.unique(labels)
    losses = np.array([(start - end)[labels == name].mean() for name in names])
    order = np.lexsort((np.arange(len(names)), -losses))  # NaN last
    rows = [(str(names[place]), _row(start, end, labels == names[place], seed)) for place in order[:GROUPS_SHOWN]]
    note = "Most lost first" + (f"; the first {GROUPS_SHOWN} of {len(names)}." if len(names) > GROUPS_SHOWN else ".")
    return table(
        "collateral_groups", "Collateral by group", note, ["samples", "before", "after", "lost", "halved"], rows
    )


def kept_samples_table(
    ids: Mapping[str, Sequence[str]],
    after: Measured,
    before: Measured | None,
    scores: DifficultyScores | None,
    buckets: Buckets | None,
    groups: Sequence[Any] | None,
) -> pd.DataFrame | None:
    """One row per sample that was to be kept: its set, what was measured, what was lost, and of retain samples their
    difficulty, bucket (1 = predicted to be lost first) and group. No text. `None` without such sets.

    Args:
        ids: of the samples of each set.
    """
    frames = []
    for part in (part for part in KEPT if part in after.sets):
        frame = pd.DataFrame({"set": KEPT[part], "sample_id": ids[part], **after.sets[part]})
        if before is not None:
            frame = frame.assign(**{f"before/{name}": values for name, values in before.sets[part].items()})
            frame = frame.assign(lost=frame["before/probability"] - frame["probability"])
        if part == "retain" and scores is not None and buckets is not None:
            frame = frame.assign(**scores.columns, bucket=buckets.number + 1)
        if part == "retain" and groups is not None:
            frame = frame.assign(group=group_labels(groups))
        frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else None
