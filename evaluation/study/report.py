"""The report of a study: conditions tuned on the first seeds, compared on the others at matched retain utility."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cud_trainer.models.fingerprint import versions

from .. import statistics as stats
from ..endpoint import worst_quarter
from ..metrics.memorization import TOKEN_STATISTICS
from ..report import tables as sections
from ..report.cells import Cell, interval_text, means
from ..report.difficulty import comparisons_note, difficulty_section
from ..report.page import write_report
from ..report.schema import AttackRow, Condition, CurvePoint, DifficultySection, Final, Head, Table, Trial, jsonable
from ..report.verdict_schema import ArmVerdict, Verdicts
from ..trajectory import averaged_residual
from .engine import Finished
from .evidence import Evidence, decided, evidence
from .extend import corners
from .options import StudyArguments
from .relearning import relearning
from .runs import BASE, Run, grouped, left_at, trials, tuned
from .verdicts import arm_verdicts, verdicts

SEED = 0  # of the bootstrap
UNTRIED = "relearn_samples (and holdout_dataset) tries it for every run, cud evaluate for a model"


def write_study(finished: Finished, command: str) -> tuple[Path, Verdicts] | None:
    """Write the report of the finished runs into the folder of the study, and what its top says; `None` when there is
    none."""
    runs = finished.runs()
    if not runs:
        return None
    content = _Content()
    for panel, group in grouped(runs, attrgetter("panel")).items():
        _add_panel(content, panel, group, finished)
    if finished.failed:
        content.findings.append(f"{len(finished.failed)} cells failed: {', '.join(finished.failed)}")
        rows = [(name, [reason]) for name, reason in finished.failed.items()]
        content.tables.append(sections.table("failed", "Cells that failed", "They are in no figure.", ["reason"], rows))
    results = _results(content, runs, finished, command)
    page = write_report(results, finished.folder, pd.concat(content.samples, ignore_index=True))
    return page, results["verdicts"]


@dataclass
class _Content:
    """What a report is about, panel by panel: entries of `results.json`, and what is left of every sample."""

    conditions: list[Condition] = field(default_factory=list)
    matched: list[dict[str, Any]] = field(default_factory=list)
    fits: list[Trial] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    difficulty: list[DifficultySection] = field(default_factory=list)
    samples: list[pd.DataFrame] = field(default_factory=list)
    evidence: dict[str, Evidence] = field(default_factory=dict)
    verdicts: list[ArmVerdict] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    attacks: list[AttackRow] = field(default_factory=list)


def _results(content: _Content, runs: list[Run], finished: Finished, command: str) -> dict[str, Any]:
    """The contents of `results.json`."""
    results: dict[str, Any] = {
        **jsonable(Head.now("cud study: schedules at matched retain utility")),
        "run": {
            "command": command,
            "seed": SEED,
            "versions": versions(),
            "model": {"path": runs[0].cell.settings["model"]["model_name_or_path"]},
            "data": {"n_forget": len(runs[0].ids), "cells": len(runs), "failed": len(finished.failed)},
            "seconds": {"this start": finished.seconds, "all cells": float(sum(run.seconds for run in runs))},
        },
        "conditions": content.conditions,
        "matched": content.matched,
        "tables": content.tables,
        "findings": content.findings,
    }
    results["verdicts"] = verdicts(content.verdicts, content.compared, content.attacks, UNTRIED)
    if content.attacks:
        results["attacks"] = content.attacks
    if content.evidence:
        results["decision"] = decided(content.evidence)
    if content.difficulty:
        note = "Known before unlearning, against what uniform runs left. "
        note += comparisons_note(len(content.difficulty[0].rows))
        results["difficulty"] = {"note": note, "objectives": content.difficulty}
    if any(trial.chosen for trial in content.fits):
        results["retain_weight_fit"] = content.fits
        tuning_seeds = finished.args.tuning_seeds
        seeds = "the first seed" if tuning_seeds == 1 else f"the first {tuning_seeds} seeds"
        least = {
            "hardest": "leave least of the hardest bucket",
            "all": "leave least",
            "endpoint": "keep most of the held-out samples at the endpoint",
        }[finished.args.tune_on or "hardest"]
        results["fit_note"] = (
            f"Learning rate and retain weight of each schedule are those that {least} on "
            f"{seeds}, at each level; figures are of the other seeds."
        )
    return results


def _add_panel(content: _Content, panel: str, runs: list[Run], finished: Finished) -> None:
    """Compare the schedules of a panel at every level; curves and samples are those of the first."""
    args, groups = finished.args, finished.groups
    starts = [run.retain[0] for run in runs if run.retain is not None]
    start = float(np.mean(starts)) if starts else float("nan")
    compared = {}
    for number, level in enumerate(args.retain_level):
        compared[level] = _add_level(content, panel, runs, level, start, args)
        if number == 0:
            _add_conditions(content, panel, compared[level], level)
    level = args.retain_level[0]
    chosen = compared[level]
    rows, findings = arm_verdicts(panel, chosen, finished.unseen, groups, SEED)
    content.verdicts += rows
    content.findings += findings
    if finished.heldout_groups is not None:
        found = evidence(panel, chosen, finished.heldout_groups, finished.never_seen, SEED)
        content.evidence[panel] = found
        content.tables += found.tables
        content.findings += found.findings
    if BASE in chosen and len(chosen) > 1:
        table, findings = _differences(panel, compared)
        content.tables.append(table)
        content.compared += findings
        content.findings += findings
    elif len(chosen) > 1:
        content.findings.append(f"{panel}: no {BASE!r} in the grid to compare with")
    if any(run.relearned for run in runs):
        table, attacks, lines = relearning(panel, chosen, level)
        content.tables.append(table)
        content.attacks += attacks
        content.findings += lines
    uniform = chosen.get(BASE, [])
    scores = uniform[0].scores if uniform else None
    if scores is not None:
        section = difficulty_section(
            panel,
            scores.columns,
            [averaged_residual(list(run.forget))[0] for run in uniform],
            target=f"answer probability, mean over {len(uniform)} uniform runs and the snapshots at which 15-75% "
            "of the starting probability are left",
            seed=SEED,
        )
        content.difficulty.append(section)
        content.findings.append(_best_predictor(panel, section))
    if groups is not None and uniform:
        primary = None if scores is None else scores[scores.metrics[0]]
        table, finding = sections.group_table(left_at(chosen, level)[BASE], groups, primary, SEED)
        number = len(content.tables)
        content.tables.append(replace(table, id=f"groups-{number}", title=f"By group: {panel}, {BASE}"))
        content.findings.append(f"{panel}, {BASE}: {finding}")


def _add_level(
    content: _Content, panel: str, runs: list[Run], level: float, start: float, args: StudyArguments
) -> dict[str, list[Run]]:
    """Tune every schedule for a level; returns the runs that are reported of each.

    Args:
        start: utility before unlearning.
    """
    chosen: dict[str, list[Run]] = {}
    for schedule, same in grouped(runs, attrgetter("schedule")).items():
        chosen[schedule] = tuned(same, level, args.tuning_seeds, args.tune_on)
        if len({run.tuning for run in same}) > 1:
            label = f"{panel}, at {level:g}, learning rate {{rate}}"
            content.fits += trials(same, chosen[schedule], level, label, args.tuning_seeds)
        if args.extensions:
            content.findings += [
                f"{panel}, {schedule}, at {level:g}: the best {name} is still at an end of its grid after "
                f"{args.extensions} extensions; {value:g} was not tried"
                for name, values in corners(same, args).items()
                for value in sorted(values)
            ]
    left = left_at(chosen, level)
    rows = [_matched_row(schedule, group, left[schedule], level, SEED) for schedule, group in chosen.items()]
    content.matched.append({"objective": panel, "retain_level": level * start, "rows": rows, "difference": None})
    return chosen


def _add_conditions(content: _Content, panel: str, chosen: dict[str, list[Run]], level: float) -> None:
    """The curves of every schedule, and what it leaves of every sample at a level."""
    for (schedule, group), left in zip(chosen.items(), left_at(chosen, level).values(), strict=True):
        content.conditions.append(condition(panel, schedule, group, SEED))
        values = {"sample_id": group[0].ids, "left": left, "bucket": group[0].buckets.number + 1}
        content.samples.append(pd.DataFrame(values).assign(panel=panel, schedule=schedule))


def _matched_row(schedule: str, group: list[Run], left: np.ndarray, level: float, seed: int) -> dict[str, Any]:
    points = [run.at(level) for run in group]
    spent = [run.seconds * step / run.steps[-1] for run, (_, step) in zip(group, points, strict=True)]
    return {
        "schedule": schedule,
        "retain_weight": group[0].options.get("retain_weight", 1.0),
        "learning_rate": group[0].options.get("learning_rate"),
        "forget": stats.bootstrap_mean(left, seed=seed).as_dict(),
        "hardest_bucket": stats.bootstrap_mean(left[group[0].hardest], seed=seed).as_dict(),
        **extraction_figure(group, level, seed),
        "worst_quarter": float(np.mean([worst_quarter(values) for values, _ in points])),
        "steps": float(np.mean([step for _, step in points])),
        "seconds": float(np.mean(spent)),
        "reason": "diverged later" if any(run.diverged for run in group) else None,
    }


def extraction_figure(group: list[Run], level: float, seed: int) -> dict[str, Any]:
    """Extraction strength of the forget samples at a level, mean over seeds; nothing where a run did not measure it."""
    strengths = [run.extraction_at(level) for run in group]
    if any(one is None for one in strengths):
        return {}
    return {"extraction": stats.bootstrap_mean(np.mean(strengths, axis=0), seed=seed).as_dict()}  # type: ignore[arg-type]


def verdict(hardest: stats.Interval, everything: stats.Interval) -> str:
    """In words: what is left less what `uniform` leaves, of the hardest bucket and of the whole forget set."""
    if hardest.low > 0:
        return "more of the hardest bucket is left"
    if not hardest.high < 0:
        return "no gain beyond what other seeds could change"
    paid = ", but more of the whole forget set" if everything.low > 0 else ""
    return f"less of the hardest bucket is left than with {BASE}{paid}"


def _differences(panel: str, compared: dict[float, dict[str, list[Run]]]) -> tuple[Table, list[str]]:
    """Every schedule less `uniform` at every level, paired by seed; findings for the first level."""
    rows: list[tuple[str, list[Cell]]] = []
    findings = []
    for level, chosen in compared.items():
        base = {run.seed: run for run in chosen[BASE]}
        for schedule, group in chosen.items():
            if schedule == BASE:
                continue
            pairs = [(run.at(level)[0], base[run.seed].at(level)[0], run) for run in group if run.seed in base]
            hardest = [float((ours - other)[run.hardest].mean()) for ours, other, run in pairs]
            hard, all_ = (
                stats.t_interval(np.array(values))
                for values in (hardest, [float((ours - other).mean()) for ours, other, _ in pairs])
            )
            worst = [np.array([worst_quarter(v) for v in of]) for of in ([p[0] for p in pairs], [p[1] for p in pairs])]
            change = stats.paired_change(*worst)
            alone = sections.missing("fewer than two seeds in common")
            enough = len(pairs) > 1
            cells: list[Cell] = [hard if enough else hard.value if pairs else alone]
            cells.append(", ".join(f"{value:+.3f}" for value in hardest) or alone)
            cells.append(all_ if enough else all_.value if pairs else alone)
            cells.append(float(np.mean(worst[0] - worst[1])) if pairs else alone)
            cells.append(change if enough and np.isfinite(change.value) else alone)
            rows.append((schedule if len(compared) == 1 else f"{schedule}, at {level:g}", cells))
            if level == next(iter(compared)):
                findings.append(
                    f"{panel}: {schedule}, change against {BASE} at matched retain utility, over {len(pairs)} seeds, "
                    f"hardest bucket {_over_seeds(hard)}, all {_over_seeds(all_)}: {verdict(hard, all_)}"
                )
    table = sections.table(
        f"differences-{panel}",
        f"{panel}: change against {BASE}, at matched retain utility",
        f"{len(rows)} comparisons with {BASE}, paired by seed, with 95% t intervals over seeds; single seeds beside. "
        "The worst quarter is picked by the result, for each run its own; its change is that of the mean log ratio.",
        [
            "hardest bucket",
            "hardest bucket, by seed",
            "all",
            "worst quarter by outcome",
            "worst quarter, relative change",
        ],
        rows,
    )
    return table, findings


def _over_seeds(found: stats.Interval) -> str:
    """A figure with its interval; without one, for a single seed."""
    return interval_text(found) if np.isfinite(found.low) or not np.isfinite(found.value) else f"{found.value:.3f}"


def _best_predictor(panel: str, section: DifficultySection) -> str:
    rows = sorted(section.rows, key=lambda row: -(row.spearman.value or 0))
    loss = next(row for row in section.rows if row.metric == "loss")
    return (
        f"{panel}: what uniform runs leave is predicted best by {rows[0].label}, Spearman "
        f"{interval_text(rows[0].spearman)}; initial log-probability {interval_text(loss.spearman)}"
    )


def condition(panel: str, schedule: str, runs: list[Run], seed: int) -> Condition:
    """A schedule among the conditions of `results.json`: its curves, and what the first run that came to its end with
    all metrics left there."""
    curve = [
        CurvePoint(
            seed=run.seed,
            step=int(step),
            retain=float(run.retain[i]) if run.retain is not None else 1.0,
            forget=float(run.forget[i].mean()),
            buckets=[float(run.forget[i][mask].mean()) for mask in run.buckets.masks],
        )
        for run in runs
        for i, step in enumerate(run.steps)
    ]
    ended = [run for run in runs if run.final]
    final = Final(sets={"forget": {}})
    if ended:
        last = max(ended, key=lambda run: len(run.final["forget"]))  # of those that generated answers, if any did
        measures = {
            name: {key: column for key, column in part.items() if key not in TOKEN_STATISTICS}
            for name, part in last.final.items()
        }
        final = Final(seed=last.seed, sets={name: means(part, seed) for name, part in measures.items()})
        if last.scores is not None:
            final.buckets = sections.by_bucket(measures["forget"], last.buckets, seed)
    return Condition(
        name=f"{panel} / {schedule}",
        objective=panel,
        schedule=schedule,
        retain_weight=runs[0].options.get("retain_weight", 1.0),
        learning_rate=runs[0].options.get("learning_rate"),
        seeds=[run.seed for run in runs],
        curve=curve,
        final=final,
    )
