"""How well difficulty predicted what is left of each sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats as scipy_stats

from cud_trainer.data.ranks import bucket_numbers

from .. import statistics as stats
from ..statistics import Interval
from .cells import Cell, mean, missing
from .schema import Ceiling, DifficultySection, PredictorRow, Table
from .tables import table

# How the metrics are called in reports, and what they are: trivial predictors, fits, from circuits, or others.
LABELS = {
    "cud": ("CUD", "fit"),
    "cud_paper": ("CUD as published (cud_paper)", "circuit"),
    "cud_top_k": ("CUD, top 200 edges by cosine (cud_top_k)", "circuit"),
    "circuit_mass": ("circuit mass", "circuit"),
    "loss": ("initial log-probability", "trivial"),
    "length": ("answer length", "trivial"),
    "random": ("random (placebo)", "trivial"),
}
TRIVIAL = ("loss", "length")
CALIBRATION = "Predicted and observed difficulty"


def difficulty_section(
    objective: str,
    columns: Mapping[str, np.ndarray],
    residuals: Sequence[np.ndarray],
    *,
    target: str,
    seed: int,
) -> DifficultySection:
    """How well each metric predicts residual memorisation.

    Args:
        columns: metric name -> score of every forget sample, `[N]`, higher = harder; must contain loss and length.
        residuals: residual memorisation of every sample, one array `[N]` per unlearning seed.
        target: what `residuals` is, in words.
    """
    target_values = np.mean(residuals, axis=0)
    controls = np.column_stack([columns[name] for name in TRIVIAL])
    rows = []
    for name, values in columns.items():
        label, kind = LABELS.get(name, (name, "other"))
        partial = None if name in TRIVIAL else stats.partial_spearman(values, target_values, controls, seed=seed)
        row = PredictorRow(
            metric=name,
            label=label,
            kind=kind,
            spearman=stats.spearman(values, target_values, seed=seed),
            partial=partial,
            # Counting pairs is slow: fewer draws.
            kendall=stats.kendall(values, target_values, seed=seed, n_boot=200),
            auroc=stats.auroc_extremes(values, target_values, seed=seed),
        )
        rows.append(row)
    section = DifficultySection(objective=objective, n=len(target_values), target=target, rows=rows)
    if len(residuals) > 1:
        ceiling = stats.ceiling(np.stack(residuals), seed=seed)
        agreement = Interval(**ceiling["agreement"])
        section.ceiling = Ceiling(agreement=agreement, attainable=ceiling["attainable"], n_seeds=len(residuals))
    return section


def comparisons_note(count: int) -> str:
    """What several intervals at once mean."""
    level = 1 - 0.05 / max(count, 1)
    return (
        f"{count} metrics are compared: of as many without any relation {0.05 * count:.1f} would exclude 0 at 95% by "
        f"chance; hold a single one to {100 * level:.1f}%."
    )


def reliability_by_decile(predicted: np.ndarray, observed: np.ndarray, seed: int, bins: int = 5) -> Table:
    """Calibration of predicted difficulty: mean observed rank of residual memorisation by bin of predicted rank.

    Samples of equal predicted difficulty share a bin; the note says where that made bins unequal.
    """
    note = "Mean rank, 0 = easiest, 1 = hardest; a predictor that knows everything has the same on both sides."
    columns = ["samples", "predicted rank", "observed rank"]
    if why := stats.why_undefined(predicted, observed):
        return table("calibration", CALIBRATION, note, columns, [("all", [len(predicted), missing(why), missing(why)])])
    ranks = [(scipy_stats.rankdata(x) - 0.5) / len(x) for x in (predicted, observed)]
    number = bucket_numbers(predicted, min(bins, len(predicted)))
    sizes = np.bincount(number)
    if len(sizes) < min(bins, len(predicted)) or np.ptp(sizes) > 1:
        note += " Bins are unequal: samples of equal predicted difficulty share one."
    rows: list[tuple[str, list[Cell]]] = []
    for bin_, size in enumerate(sizes.tolist()):
        inside = number == bin_
        rows.append((f"bin {bin_ + 1}", [size, mean(ranks[0][inside], seed), mean(ranks[1][inside], seed)]))
    return table("calibration", CALIBRATION, note, columns, rows)
