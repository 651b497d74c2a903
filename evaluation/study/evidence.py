"""What a study with held-out samples comes to: arms compared by H@0.1, seed by seed, and the verdict of the rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import statistics as stats
from ..decision import RULE, Arm, Comparison, Decision, compare, decide
from ..endpoint import forgotten_level
from ..report import tables as sections
from ..report.cells import Cell
from ..report.schema import Against, Decided, Decisions, Table
from ..statistics import Interval
from .runs import BASE, Run

NEVER = "never"
RANDOM = "random"  # the difficulty metric without any meaning


@dataclass(frozen=True)
class Evidence:
    """Of one panel.

    Attributes:
        tables: of H by arm and seed, and of every arm less the others.
        findings: the verdicts, in words.
        decisions: by arm with a difficulty.
    """

    tables: list[Table]
    findings: list[str]
    decisions: dict[str, Decision]


def evidence(
    panel: str, chosen: Mapping[str, Sequence[Run]], groups: Sequence[Any], never_seen: float | None, seed: int
) -> Evidence:
    """Compare the arms of a panel.

    Args:
        chosen: the runs that are reported of each arm; all have held-out samples.
        groups: of each held-out sample.
        never_seen: as in `StudyArguments`.
        seed: of the bootstrap.
    """
    arms = {name: arm_of(runs) for name, runs in chosen.items()}
    kinds = {name: kind_of(runs[0]) for name, runs in chosen.items()}
    placebo, without = ({n: arms[n] for n in arms if kinds[n] == kind} for kind in ("placebo", "without"))
    decisions = {name: decide(arms[name], placebo, without) for name in arms if kinds[name] == "difficulty"}
    level = forgotten_level(None if never_seen is None else np.array([never_seen]))
    tables = [_by_seed(panel, chosen, level)]
    if len(arms) > 1:
        tables.append(_less(panel, chosen, arms, kinds, groups, seed))
    findings = [f"{panel}: {_seeds(name, runs)}" for name, runs in chosen.items()]
    findings += [f"{panel}: {_verdict(name, decision)}" for name, decision in decisions.items()]
    return Evidence(tables, findings, decisions)


def arm_of(runs: Sequence[Run]) -> Arm:
    """What the runs of an arm came to, by seed."""
    ends = {run.seed: run.end for run in runs if run.end is not None}
    return Arm(
        {seed: end.kept for seed, end in ends.items()},
        {seed: float("nan") if end.left_at_kept is None else end.left_at_kept for seed, end in ends.items()},
    )


def kind_of(run: Run) -> str:
    """`"without"` for a run whose schedule reads no difficulty, `"placebo"` for one by the random one, else
    `"difficulty"`."""
    if not run.reads_difficulty:
        return "without"
    return "placebo" if run.options.get("difficulty") == RANDOM else "difficulty"


def kept_samples(run: Run) -> np.ndarray:
    """Held-out probability of each sample at the endpoint, `[M]`; for a run that gets there."""
    assert run.held_out is not None and run.end is not None and run.end.snapshot is not None
    return run.held_out[run.end.snapshot]


def crossed(ours: Sequence[Run], other: Sequence[Run], groups: Sequence[Any], seed: int) -> Interval:
    """Difference of H with its bootstrap interval over seeds and groups, over seeds in which both got there."""
    pairs = [
        (a, b)
        for a in ours
        for b in other
        if a.seed == b.seed and a.end and b.end and None not in (a.end.snapshot, b.end.snapshot)
    ]
    if not pairs:
        return stats.undefined("no seed in which both got there")
    values = np.array([kept_samples(a) - kept_samples(b) for a, b in pairs])
    start = np.array([a.held_out[0] for a, _ in pairs if a.held_out is not None])
    return stats.crossed_bootstrap(values, groups, per=start, seed=seed)


def _by_seed(panel: str, chosen: Mapping[str, Sequence[Run]], level: float) -> Table:
    """H of every run, and what is left at the same points."""
    never = sections.missing(NEVER)
    rows: list[tuple[str, list[Cell]]] = []
    for name, runs in chosen.items():
        for run in runs:
            end = run.end
            assert end is not None and end.at_kept is not None and end.left_at_kept is not None
            there = end.snapshot
            cells: list[Cell] = [never if end.kept is None or there is None else end.kept]
            cells.append(never if there is None else int(run.steps[there]))
            cells.append(never if end.left is None else end.left)
            cells.append(never if there is None else float(run.extraction["worst_quarter"][there]))
            cells += [end.worst_at_kept, end.left_at_kept, float(run.extraction["worst_quarter"][end.at_kept])]
            cells += [sections.missing("not known") if run.pairs is None else run.pairs, run.calibration_pairs]
            rows.append((f"{name}, seed {run.seed}", cells))
        kept = [run.end.kept for run in runs if run.end is not None and run.end.kept is not None]
        if len(runs) > 1:
            mean: Cell = stats.t_interval(np.array(kept)) if len(kept) > 1 else sections.missing("fewer than two seeds")
            share = f"{len(kept)} of {len(runs)} seeds get there"
            rows.append((f"{name}, {share}", [mean, *[sections.missing("by seed")] * 8]))
    return sections.table(
        f"endpoint-{panel}",
        f"{panel}: kept of what no loss sees",
        f"H: share of held-out probability that is kept at the first snapshot at which the run's own worst quarter by "
        f"outcome is at most {level:.3g}; {NEVER}: there is none. Worst quarter, mean and extraction strength (of the "
        "worst quarter) are of the forget set. Means have 95% t intervals over the seeds that get there.",
        [
            "H",
            "step",
            "mean",
            "extraction",
            "worst quarter at H = 90%",
            "mean at H = 90%",
            "extraction at H = 90%",
            "training pairs",
            "calibration pairs",
        ],
        rows,
    )


def _less(
    panel: str,
    chosen: Mapping[str, Sequence[Run]],
    arms: Mapping[str, Arm],
    kinds: Mapping[str, str],
    groups: Sequence[Any],
    seed: int,
) -> Table:
    """Every arm less `uniform`, and every arm with a difficulty less those that the rule asks for."""
    pairs = [(name, BASE) for name in arms if BASE in arms and name != BASE]
    pairs += [(a, b) for a in arms for b in arms if kinds[a] == "difficulty" != kinds[b] and (a, b) not in pairs]
    rows = []
    for ours, other in pairs:
        found = compare(arms[ours], arms[other])
        both = crossed(chosen[ours], chosen[other], groups, seed)
        rows.append((f"{ours}, change against {other}", _cells(found, both)))
    return sections.table(
        f"endpoint-differences-{panel}",
        f"{panel}: differences of H",
        "Paired by seed: mean with its 95% t interval over the seeds in which both get to the endpoint; beside it the "
        "bootstrap interval over seeds and held-out groups, both drawn at once; the relative change is of the mean log "
        "ratio.",
        ["H", "H, seeds and groups", "relative change of H", "mean at H = 90%", "seeds", "won", "lost"],
        rows,
    )


def _cells(found: Comparison, both: Interval) -> list[Cell]:
    few = sections.missing("fewer than two seeds in common")
    enough = len(found.seeds) > 1
    cells: list[Cell] = [found.difference if enough else few]
    cells.append(both if np.isfinite(both.low) else sections.missing("needs two seeds and two groups"))
    cells.append(found.change if enough and np.isfinite(found.change.value) else few)
    cells.append(found.left if np.isfinite(found.left.low) else few)
    return [*cells, len(found.seeds), len(found.won), len(found.lost)]


def _seeds(name: str, runs: Sequence[Run]) -> str:
    """Every seed, one by one."""
    kept = ", ".join(
        NEVER if run.end is None or run.end.kept is None else f"{run.end.kept:.3f}"
        for run in sorted(runs, key=lambda run: run.seed)
    )
    return f"held-out knowledge that {name} keeps (H@0.1), seed by seed: {kept}"


def _verdict(name: str, decision: Decision) -> str:
    parts = []
    for other, found in decision.comparisons.items():
        text = f"{found.verdict} against {other}"
        if len(found.seeds) > 1:
            text += f" ({found.difference.value:+.3f} [{found.difference.low:+.3f}, {found.difference.high:+.3f}])"
        parts.append(text)
    reason = f" ({decision.reason})" if decision.reason else ""
    return f"does the difficulty of {name} earn its place? {decision.verdict}{reason}: {'; '.join(parts) or 'alone'}"


def decided(panels: Mapping[str, Evidence]) -> Decisions:
    """The entry of `results.json`: the rule, and by panel and arm its verdict with every comparison."""
    arms = [
        Decided(objective=panel, arm=name, verdict=found.verdict, reason=found.reason, against=_against(found))
        for panel, of_panel in panels.items()
        for name, found in of_panel.decisions.items()
    ]
    return Decisions(rule=RULE, arms=arms)


def _against(decision: Decision) -> list[Against]:
    """Every comparison behind a decision."""
    return [
        Against(
            arm=name,
            verdict=found.verdict,
            difference=found.difference,
            change=found.change,
            left=found.left,
            seeds=list(found.seeds),
            won=list(found.won),
            lost=list(found.lost),
        )
        for name, found in decision.comparisons.items()
    ]
