"""The report of a study: conditions tuned on one seed, compared on the others at matched retain utility."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from cud_trainer.difficulty import Buckets, DifficultyScores
from cud_trainer.models.fingerprint import versions
from cud_trainer.schedule import parse

from .. import statistics as stats
from ..metrics.memorization import TOKEN_STATISTICS
from ..report import tables as sections
from ..report.cells import Cell as Figure
from ..report.cells import interval_text, means
from ..report.difficulty import comparisons_note, difficulty_section
from ..report.page import write_report
from ..report.schema import DifficultySection, Head, Table, jsonable
from ..trajectory import at_position, averaged_residual, matched_position
from .command import SCORES, TUNED, Cell

BASE = "uniform"
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a cell stands in a study.

    Attributes:
        panel: what is compared only within itself: the objective, and whatever else of the grid is neither tuned nor
            part of a schedule.
        schedule: with its options, and the metric where the grid has it beside scores made before.
        tuning: learning rate and retain weight.
        seed: of the run.
    """

    panel: str
    schedule: str
    tuning: tuple
    seed: int


def place(cell: Cell) -> Place:
    """`Place` of a run cell."""
    options = cell.settings["options"]
    own = {"objective", "objective_args", "schedule", "schedule_args", "seed", SCORES, *TUNED}
    schedule = _with_options(options["schedule"], options.get("schedule_args"))
    if "scores_file" in cell.settings and "difficulty" in cell.choices:  # buckets are those of the file's first metric
        own.add("difficulty")
        if any(part.metric == "difficulty" for part, _ in parse(options["schedule"])):
            schedule += f" by {options['difficulty']}"
    others = {name: value for name, value in cell.choices.items() if name not in own}
    objective = _with_options(options.get("objective", "npo"), options.get("objective_args"))
    panel = ", ".join([objective, *(f"{key}={value}" for key, value in others.items())])
    return Place(panel, schedule, tuple(options.get(name) for name in TUNED), int(options.get("seed", 42)))


class Run:
    """What a finished run cell left behind."""

    def __init__(self, study: Path, cell: Cell, n_buckets: int) -> None:
        found = json.loads((study / "cells" / cell.name / "result.json").read_text())
        self.cell, self.seconds, self.diverged = cell, found["seconds"], found["diverged"]
        where = place(cell)
        self.panel, self.schedule, self.tuning, self.seed = where.panel, where.schedule, where.tuning, where.seed
        self.options = cell.settings["options"]
        self.steps, self.forget = np.array(found["steps"]), np.array(found["forget"])
        self.retain = None if found["retain"] is None else np.array(found["retain"])
        self.final = {name: {k: np.array(v) for k, v in part.items()} for name, part in found["final"].items()}
        self.relearned: dict[str, Any] | None = found["relearned"]
        self.ids: list[str] = found["forget_ids"]
        self.scores: DifficultyScores | None = None
        self.bucket = np.zeros(len(self.ids), dtype=int)
        given = cell.settings.get("scores_file")
        if cell.settings["scores_cell"] is not None:
            given = study / "cells" / cell.settings["scores_cell"] / "scores.parquet"
        if given is not None:
            self.scores = DifficultyScores.load(given).aligned(self.ids)
            self.bucket = self.scores.buckets(n=n_buckets)

    @property
    def hardest(self) -> np.ndarray:
        """Samples of the bucket predicted hardest (all, without scores), bool `[N]`."""
        return self.bucket == self.bucket.max()

    def at(self, share: float) -> tuple[np.ndarray, float]:
        """Forget probability of each sample where the run has forgotten most at `share` of the starting retain
        probability, and the step; without a retain set, at its end."""
        if self.retain is None:
            return self.forget[-1], float(self.steps[-1])
        position = matched_position(self.retain, self.forget.mean(1), share * self.retain[0])
        assert position is not None  # the start is above the level
        return at_position(self.forget, position), float(at_position(self.steps, position))


def first_seeds(cells: Sequence[Cell], tuning_seeds: int = 1) -> list[Cell]:
    """The cells that decide which settings are reported: of each schedule with several, those with its first seeds."""
    found = []
    for mine in grouped(cells, _condition_of).values():
        settings = {place(cell).tuning for cell in mine}
        first = leading([place(cell).seed for cell in mine], tuning_seeds)
        found += [cell for cell in mine if len(settings) == 1 or place(cell).seed in first]
    return found


def reported(
    study: Path, cells: Sequence[Cell], tried: Sequence[Cell], levels: Sequence[float], n_buckets: int
) -> list[Cell]:
    """The cells that figures are made of: `tried`, and those of the settings that are best among them at one of the
    levels. A schedule of which nothing was tried has none.

    Args:
        tried: finished cells out of those that `first_seeds` names.
    """
    found = []
    trials = {cell.name for cell in tried}
    for mine in grouped(cells, _condition_of).values():
        runs = [Run(study, cell, n_buckets) for cell in mine if cell.name in trials]
        if runs:
            best = {_best(runs, level) for level in levels}
            found += [cell for cell in mine if cell.name in trials or place(cell).tuning in best]
    return found


def grouped(items: Sequence[T], key: Callable[[T], Hashable]) -> dict[Any, list[T]]:
    """Items by what `key` says of them, both in the order of their first appearance."""
    found: dict[Any, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def _condition_of(cell: Cell) -> tuple[str, str]:
    where = place(cell)
    return where.panel, where.schedule


def leading(seeds: Sequence[int], count: int) -> list[int]:
    """The first `count` different seeds."""
    return list(dict.fromkeys(seeds))[:count]


def _best(runs: Sequence[Run], level: float) -> tuple:
    """Learning rate and retain weight whose runs leave least of the hardest bucket at `level`, on average."""
    left = {
        tuning: float(np.mean([run.at(level)[0][run.hardest].mean() for run in group]))
        for tuning, group in grouped(runs, attrgetter("tuning")).items()
    }
    return min(left, key=lambda tuning: left[tuning])


def _with_options(name: str, options: Any) -> str:
    return f"{name} {json.dumps(options, sort_keys=True)}" if options else name


def worst_quarter(values: np.ndarray) -> float:
    """Mean of the highest quarter, picked by the values themselves: to be compared between conditions only."""
    return float(np.sort(values)[-max(1, round(len(values) / 4)) :].mean())


def write_study(
    study: Path,
    cells: Sequence[Cell],
    failed: dict[str, str],
    *,
    levels: Sequence[float],
    n_buckets: int,
    command: str,
    seconds: float,
    tuning_seeds: int = 1,
    groups: list[Any] | None = None,
) -> Path | None:
    """Write the report of the finished runs into `study`; `None` when there is none."""
    if not cells:
        return None
    runs = [Run(study, cell, n_buckets) for cell in cells]
    seed = 0
    conditions: list[dict[str, Any]] = []
    matched, fits, findings, tables, difficulty = [], [], [], [], []
    rows_of_samples: list[pd.DataFrame] = []
    for panel, mine in grouped(runs, attrgetter("panel")).items():
        begun = [run.retain[0] for run in mine if run.retain is not None]
        start = float(np.mean(begun)) if begun else float("nan")
        compared = {}
        for number, level in enumerate(levels):
            chosen: dict[str, list[Run]] = {}
            for schedule, same in grouped(mine, attrgetter("schedule")).items():
                chosen[schedule] = tuned(same, level, tuning_seeds)
                fits += _trials(same, chosen[schedule], level, panel, tuning_seeds)
            compared[level] = chosen
            left = left_at(chosen, level)
            lines = [_matched_row(schedule, group, left[schedule], level, seed) for schedule, group in chosen.items()]
            matched.append({"objective": panel, "retain_level": level * start, "rows": lines, "difference": None})
            if number:
                continue
            for schedule, group in chosen.items():
                conditions.append(_condition(panel, schedule, group, n_buckets, seed))
                values = {"sample_id": group[0].ids, "left": left[schedule], "bucket": group[0].bucket + 1}
                rows_of_samples.append(pd.DataFrame(values).assign(panel=panel, schedule=schedule))
        chosen = compared[levels[0]]
        if BASE in chosen and len(chosen) > 1:
            extra, more = _differences(panel, compared, seed)
            tables.append(extra)
            findings += more
        elif len(chosen) > 1:
            findings.append(f"{panel}: no {BASE!r} in the grid to compare with")
        if any(run.relearned for run in mine):
            tables.append(_relearning(panel, chosen, levels[0], seed))
        uniform = chosen.get(BASE, [])
        if uniform and uniform[0].scores is not None:
            section = difficulty_section(
                panel, uniform[0].scores.columns, [averaged_residual(list(run.forget))[0] for run in uniform],
                target=f"answer probability, mean over {len(uniform)} uniform runs and the snapshots at which 15-75% "
                "of the starting probability are left", seed=seed,
            )  # fmt: skip
            difficulty.append(section)
            findings.append(_best_predictor(panel, section))
        if groups is not None and uniform:
            scored = uniform[0].scores
            primary = None if scored is None else scored[scored.metrics[0]]
            extra, line = sections.group_table(left_at(chosen, levels[0])[BASE], groups, primary, seed)
            tables.append(replace(extra, id=f"groups-{len(tables)}", title=f"By group: {panel}, {BASE}"))
            findings.append(f"{panel}, {BASE}: {line}")
    if failed:
        findings.append(f"{len(failed)} cells failed: {', '.join(failed)}")
        tables.append(
            sections.table(
                "failed",
                "Cells that failed",
                "They are in no figure.",
                ["reason"],
                [(n, [r]) for n, r in failed.items()],
            )
        )
    results: dict[str, Any] = {
        **jsonable(Head.now("cud study: schedules at matched retain utility")),
        "run": {
            "command": command, "seed": seed, "versions": versions(),
            "model": {"path": cells[0].settings["model"]["model_name_or_path"]},
            "data": {"n_forget": len(runs[0].ids), "cells": len(runs), "failed": len(failed)},
            "seconds": {"this start": seconds, "all cells": float(sum(run.seconds for run in runs))},
        },
        "conditions": conditions, "matched": matched, "tables": tables, "findings": findings,
    }  # fmt: skip
    if difficulty:
        note = "Known before unlearning, against what uniform runs left. " + comparisons_note(len(difficulty[0].rows))
        results["difficulty"] = {"note": note, "objectives": difficulty}
    if any(row["chosen"] for row in fits):
        results["retain_weight_fit"] = fits
        seeds = "the first seed" if tuning_seeds == 1 else f"the first {tuning_seeds} seeds"
        results["fit_note"] = (
            "Learning rate and retain weight of each schedule are those that leave least of the hardest bucket on "
            f"{seeds}, at each level; figures are of the other seeds."
        )
    return write_report(results, study, pd.concat(rows_of_samples, ignore_index=True))


def left_at(chosen: dict[str, list[Run]], level: float) -> dict[str, np.ndarray]:
    """What each schedule leaves of each sample at `level`, mean over seeds, `[N]`."""
    return {schedule: np.mean([run.at(level)[0] for run in group], axis=0) for schedule, group in chosen.items()}


def _matched_row(schedule: str, group: list[Run], left: np.ndarray, level: float, seed: int) -> dict[str, Any]:
    found = [run.at(level) for run in group]
    spent = [run.seconds * step / run.steps[-1] for run, (_, step) in zip(group, found, strict=True)]
    return {
        "schedule": schedule,
        "retain_weight": group[0].options.get("retain_weight", 1.0),
        "learning_rate": group[0].options.get("learning_rate"),
        "forget": stats.bootstrap_mean(left, seed=seed).as_dict(),
        "hardest_bucket": stats.bootstrap_mean(left[group[0].hardest], seed=seed).as_dict(),
        "worst_quarter": float(np.mean([worst_quarter(values) for values, _ in found])),
        "steps": float(np.mean([step for _, step in found])),
        "seconds": float(np.mean(spent)),
        "reason": "diverged later" if any(run.diverged for run in group) else None,
    }  # fmt: skip


def tuned(runs: list[Run], level: float, tuning_seeds: int = 1) -> list[Run]:
    """The runs that are reported: with the learning rate and retain weight that leave least of the hardest bucket on
    the first `tuning_seeds` seeds, the other seeds.

    With one setting or one seed there is nothing to choose, or nothing to choose on: all (of the best setting) are.
    """
    if len({run.tuning for run in runs}) == 1:
        return runs
    first = leading([run.seed for run in runs], tuning_seeds)
    best = _best([run for run in runs if run.seed in first], level)
    same = [run for run in runs if run.tuning == best]
    return [run for run in same if run.seed not in first] or same


def _trials(runs: list[Run], chosen: list[Run], level: float, panel: str, tuning_seeds: int) -> list[dict[str, Any]]:
    """A row for every setting that was tried, mean over the first seeds; none where there was one only."""
    if len({run.tuning for run in runs}) == 1:
        return []
    first = leading([run.seed for run in runs], tuning_seeds)
    rows = []
    for tuning, group in grouped([run for run in runs if run.seed in first], attrgetter("tuning")).items():
        run = group[0]
        values = np.mean([one.at(level)[0] for one in group], axis=0)
        rows.append(
            {
                "objective": f"{panel}, at {level:g}, learning rate {run.options.get('learning_rate')}",
                "schedule": run.schedule,
                "retain_weight": run.options.get("retain_weight", 1.0),
                "forget": float(values.mean()),
                "hardest_bucket": float(values[run.hardest].mean()),
                "chosen": tuning == chosen[0].tuning,
            }
        )
    return rows


def verdict(hardest: stats.Interval, everything: stats.Interval) -> str:
    """In words: what is left less what `uniform` leaves, of the hardest bucket and of the whole forget set."""
    if hardest.low > 0:
        return "more of the hardest bucket is left"
    if not hardest.high < 0:
        return "no gain beyond what other samples could change"
    paid = ", but more of the whole forget set" if everything.low > 0 else ""
    return f"less of the hardest bucket is left than with {BASE}{paid}"


def _differences(panel: str, compared: dict[float, dict[str, list[Run]]], seed: int) -> tuple[Table, list[str]]:
    """Every schedule less `uniform` at every level, paired over samples, and by seed; findings for the first level."""
    rows: list[tuple[str, list[Figure]]] = []
    findings = []
    for level, chosen in compared.items():
        left = left_at(chosen, level)
        base, hardest = left[BASE], chosen[BASE][0].hardest
        tail = float(np.mean([worst_quarter(run.at(level)[0]) for run in chosen[BASE]]))
        for schedule, group in chosen.items():
            if schedule == BASE:
                continue
            all_, hard = (
                stats.paired_difference(left[schedule][part], base[part], seed=seed)
                for part in (np.ones(len(base), dtype=bool), hardest)
            )
            own = float(np.mean([worst_quarter(run.at(level)[0]) for run in group]))
            by_seed = [
                float((run.at(level)[0] - other.at(level)[0])[hardest].mean())
                for run in group for other in chosen[BASE] if run.seed == other.seed
            ]  # fmt: skip
            spread: Figure = (
                f"{min(by_seed):.3f} to {max(by_seed):.3f}" if by_seed else sections.missing("no seed in common")
            )
            relative = 100 * hard.value / max(float(base[hardest].mean()), 1e-12)
            label = schedule if len(compared) == 1 else f"{schedule}, at {level:g}"
            rows.append((label, [hard, relative, spread, all_, own - tail]))
            if level != next(iter(compared)):
                continue
            findings.append(
                f"{panel}: {schedule} less {BASE} at matched retain utility, hardest bucket "
                f"{interval_text(hard)}, all {interval_text(all_)}: {verdict(hard, all_)}"
            )
    table = sections.table(
        f"differences-{panel}", f"{panel}: less {BASE}, at matched retain utility",
        f"{len(rows)} comparisons with {BASE}; intervals over samples, single seeds beside. The worst quarter is "
        "picked by the result, for each condition its own.",
        ["hardest bucket", "relative, %", "hardest bucket, by seed", "all", "worst quarter by outcome"], rows,
    )  # fmt: skip
    return table, findings


def _relearning(panel: str, chosen: dict[str, list[Run]], level: float, seed: int) -> Table:
    """What comes back of samples that were not taught again, from the snapshot that has forgotten most at `level`."""
    again: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    taught = np.zeros(len(next(iter(chosen.values()))[0].ids), dtype=bool)
    for schedule, group in chosen.items():
        found = [run.relearned for run in group if run.relearned]
        if found:
            before, after = (np.mean([one[key] for one in found], axis=0) for key in ("before", "after"))
            again[schedule] = before, after
            taught[found[0]["taught"]] = True
    hardest = next(iter(chosen.values()))[0].hardest & ~taught
    rows = []
    for schedule, (before, after) in again.items():
        cells: list[Figure] = []
        for part in (hardest, ~taught):
            cells += [sections.mean(before[part], seed), sections.mean(after[part], seed)]
            if schedule == BASE or BASE not in again:
                cells.append(sections.missing("the base"))
            else:
                cells.append(stats.paired_difference(after[part], again[BASE][1][part], seed=seed))
        rows.append((schedule, cells))
    columns = [f"{part}, {what}" for part in ("hardest bucket", "all") for what in ("before", "after", f"less {BASE}")]
    return sections.table(
        f"relearning-{panel}", f"{panel}: relearning",
        f"Fine-tuning on {int(taught.sum())} of the forget samples again, from the last snapshot with {level:g} of the "
        "starting utility at which least was left. Samples that were not taught.", columns, rows,
    )  # fmt: skip


def _best_predictor(panel: str, section: DifficultySection) -> str:
    rows = sorted(section.rows, key=lambda row: -(row.spearman.value or 0))
    loss = next(row for row in section.rows if row.metric == "loss")
    return (
        f"{panel}: what uniform runs leave is predicted best by {rows[0].label}, Spearman "
        f"{interval_text(rows[0].spearman)}; initial log-probability {interval_text(loss.spearman)}"
    )


def _condition(panel: str, schedule: str, runs: list[Run], n_buckets: int, seed: int) -> dict[str, Any]:
    curve = [
        {
            "seed": run.seed,
            "step": int(step),
            "retain": float(run.retain[i]) if run.retain is not None else 1.0,
            "forget": float(run.forget[i].mean()),
            "buckets": [float(run.forget[i][run.bucket == number].mean()) for number in range(run.bucket.max() + 1)],
        }
        for run in runs
        for i, step in enumerate(run.steps)
    ]
    ended = next((run for run in runs if run.final), None)
    final: dict[str, Any] = {"forget": {}}
    if ended is not None:
        kept = {
            name: {key: column for key, column in part.items() if key not in TOKEN_STATISTICS}
            for name, part in ended.final.items()
        }
        final = {"seed": ended.seed, **{name: means(part, seed) for name, part in kept.items()}}
        if ended.scores is not None:
            final["buckets"] = sections.by_bucket(
                kept["forget"], Buckets(ended.bucket, int(ended.bucket.max()) + 1), seed
            )
    return {
        "name": f"{panel} / {schedule}",
        "objective": panel,
        "schedule": schedule,
        "retain_weight": runs[0].options.get("retain_weight", 1.0),
        "learning_rate": runs[0].options.get("learning_rate"),
        "seeds": [run.seed for run in runs],
        "curve": curve,
        "final": final,
    }
