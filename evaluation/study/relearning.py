"""What comes back in a study when some forget samples are taught again: over seeds, beside never-seen samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import statistics as stats
from ..report.attacks import BEYOND, NEVER_SEEN, NO_CONTROL, said
from ..report.cells import Cell, missing, shown
from ..report.schema import AttackRow, Table
from ..report.tables import table
from ..statistics import Interval
from .runs import BASE, Run

COLUMNS = ("before", "after", "change", BEYOND)
PARTS = ("hardest bucket", "all")


def relearning(
    panel: str, chosen: Mapping[str, Sequence[Run]], level: float
) -> tuple[Table, list[AttackRow], list[str]]:
    """Samples that were not taught again, from the snapshot that has forgotten most at `level`.

    Figures are means over the samples of a run, intervals are 95% t intervals over seeds.

    Args:
        chosen: the runs that are reported of each schedule.

    Returns:
        the table; of each schedule what comes back of all these samples, and the same in words.
    """
    again = {name: {run.seed: run for run in runs if run.relearned} for name, runs in chosen.items()}
    again = {name: runs for name, runs in again.items() if runs}
    rows, attacks = [], []
    for name, runs in again.items():
        cells: list[Cell] = []
        for part in PARTS:
            figures = {seed: _figures(run, part) for seed, run in runs.items()}
            for what in ("before", "after", "change"):
                cells.append(_cell([one[what] for one in figures.values()]))
            cells.append(_cell([one[BEYOND] for one in figures.values() if BEYOND in one], NO_CONTROL))
            cells.append(_less_base(name, figures, again.get(BASE, {}), part))
        rows.append((name, cells))
        attacks.append(_attack(panel, name, runs.values()))
    taught = {len(run.relearned["taught"]) for runs in again.values() for run in runs.values() if run.relearned}
    controlled = f"What counts is the {BEYOND}, which gain as well."
    if not all(row.control for row in attacks):
        controlled = f"Without {NEVER_SEEN} (holdout_dataset) it cannot be told what of a change was hidden."
    made = table(
        f"relearning-{panel}",
        f"{panel}: relearning",
        f"Fine-tuning on {' or '.join(map(str, sorted(taught)))} of the forget samples again, from the last snapshot "
        f"with {level:g} of the starting utility at which least was left. Samples that were not taught: means of a "
        f"run, with 95% t intervals over seeds. {controlled}",
        [f"{part}, {what}" for part in PARTS for what in (*COLUMNS, f"change against {BASE}")],
        rows,
    )
    return made, attacks, [said(row, f"the {row.n} forget samples that were not taught") for row in attacks]


def _figures(run: Run, part: str) -> dict[str, float]:
    """Of one run: mean answer probability before and after, the change, and that beyond never-seen samples."""
    again: dict[str, Any] = run.relearned or {}
    before, after = (np.array(again[key]) for key in ("before", "after"))
    rest = np.ones(len(before), dtype=bool)
    rest[again["taught"]] = False
    if part == PARTS[0]:
        rest &= run.hardest
    if not rest.any():
        return dict.fromkeys(("before", "after", "change"), float("nan"))
    found = {"n": float(rest.sum()), "before": float(before[rest].mean()), "after": float(after[rest].mean())}
    found["change"] = found["after"] - found["before"]
    if "control" in again:
        start, end = (np.array(values) for values in again["control"])
        found["control"] = float((end - start).mean())
        found[BEYOND] = found["change"] - found["control"]
    return found


def _attack(panel: str, name: str, runs: Any) -> AttackRow:
    figures = [_figures(run, PARTS[1]) for run in runs]
    row = AttackRow(
        attack="relearning",
        condition=f"{panel}, {name}",
        n=int(figures[0]["n"]),
        over="seeds",
        change=_over_seeds([one["change"] for one in figures]),
    )
    if all("control" in one for one in figures):
        row.n_control = len(next(iter(runs)).relearned["control"][0])
        row.control, row.beyond = (_over_seeds([one[what] for one in figures]) for what in ("control", BEYOND))
    return row


def _over_seeds(values: Sequence[float]) -> Interval:
    return stats.t_interval(np.array(values))


def _cell(values: Sequence[float], why: str = "nothing was relearned") -> Cell:
    """Mean over seeds with its interval; without one, of a single seed."""
    if not values:
        return missing(why)
    found = _over_seeds(values)
    return found.value if len(values) == 1 and np.isfinite(found.value) else shown(found)


def _less_base(name: str, figures: Mapping[int, dict[str, float]], base: Mapping[int, Run], part: str) -> Cell:
    """What comes back, beyond never-seen samples if there are some, less what does with `uniform`, paired by seed."""
    if name == BASE:
        return missing("the base")
    pairs = [(figures[seed], _figures(run, part)) for seed, run in base.items() if seed in figures]
    what = BEYOND if all(BEYOND in one for pair in pairs for one in pair) else "change"
    return _cell([ours[what] - other[what] for ours, other in pairs], f"no seed in common with {BASE}")
