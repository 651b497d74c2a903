"""The report of a study: conditions tuned on one seed, compared on the others at matched retain utility."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cud_trainer.difficulty import DifficultyScores
from cud_trainer.fingerprint import versions

from . import audit, sections
from . import statistics as stats
from .memorization import TOKEN_STATISTICS
from .report import write_report
from .study import TUNED, Cell

BASE = "uniform"


class Run:
    """What a finished run cell left behind."""

    def __init__(self, study: Path, cell: Cell, n_buckets: int) -> None:
        found = json.loads((study / "cells" / cell.name / "result.json").read_text())
        self.cell, self.seconds, self.diverged = cell, found["seconds"], found["diverged"]
        self.options = cell.settings["options"]
        self.steps, self.forget = np.array(found["steps"]), np.array(found["forget"])
        self.retain = None if found["retain"] is None else np.array(found["retain"])
        self.final = {name: {k: np.array(v) for k, v in part.items()} for name, part in found["final"].items()}
        self.ids: list[str] = found["forget_ids"]
        self.scores: DifficultyScores | None = None
        self.bucket = np.zeros(len(self.ids), dtype=int)
        if cell.settings["scores_cell"] is not None:
            loaded = DifficultyScores.load(study / "cells" / cell.settings["scores_cell"] / "scores.parquet")
            self.scores = loaded.aligned(self.ids)
            self.bucket = self.scores.buckets(n=n_buckets)

    @property
    def seed(self) -> int:
        return int(self.options.get("seed", 42))

    @property
    def schedule(self) -> str:
        return _with_options(self.options.get("schedule", BASE), self.options.get("schedule_args"))

    @property
    def panel(self) -> str:
        """What is compared only within itself: the objective, and whatever else of the grid is neither tuned nor a
        schedule."""
        others = {
            name: value for name, value in self.cell.choices.items()
            if name not in ("objective", "objective_args", "schedule", "schedule_args", "seed", *TUNED)
        }  # fmt: skip
        name = _with_options(self.options.get("objective", "npo"), self.options.get("objective_args"))
        return ", ".join([name, *(f"{key}={value}" for key, value in others.items())])

    @property
    def tuning(self) -> tuple:
        return tuple(self.options.get(name) for name in TUNED)

    def at(self, share: float) -> tuple[np.ndarray, float]:
        """Forget probability of each sample where the run has forgotten most at `share` of the starting retain
        probability, and the step; without a retain set, at its end."""
        if self.retain is None:
            return self.forget[-1], float(self.steps[-1])
        position = audit.matched_position(self.retain, self.forget.mean(1), share * self.retain[0])
        assert position is not None  # the start is above the level
        return audit.at_position(self.forget, position), float(audit.at_position(self.steps, position))


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
    retain_level: float,
    n_buckets: int,
    command: str,
    seconds: float,
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
    for panel in dict.fromkeys(run.panel for run in runs):
        mine = [run for run in runs if run.panel == panel]
        chosen: dict[str, list[Run]] = {}
        for schedule in dict.fromkeys(run.schedule for run in mine):
            same = [run for run in mine if run.schedule == schedule]
            chosen[schedule], rows = _tune(same, retain_level, n_buckets, panel)
            fits += rows
        levels, lines = {}, []
        for schedule, group in chosen.items():
            found = [run.at(retain_level) for run in group]
            levels[schedule] = np.mean([values for values, _ in found], axis=0)
            hardest = group[0].bucket == n_buckets - 1
            lines.append(
                {
                    "schedule": schedule,
                    "retain_weight": group[0].options.get("retain_weight", 1.0),
                    "learning_rate": group[0].options.get("learning_rate"),
                    "forget": stats.bootstrap_mean(levels[schedule], seed=seed).as_dict(),
                    "hardest_bucket": stats.bootstrap_mean(levels[schedule][hardest], seed=seed).as_dict(),
                    "worst_quarter": float(np.mean([worst_quarter(values) for values, _ in found])),
                    "steps": float(np.mean([step for _, step in found])),
                    "seconds": float(np.mean([run.seconds for run in group])),
                    "reason": "diverged later" if any(run.diverged for run in group) else None,
                }
            )
            conditions.append(_condition(panel, schedule, group, n_buckets, seed))
            frame = pd.DataFrame({"sample_id": group[0].ids, "left": levels[schedule], "bucket": group[0].bucket + 1})
            rows_of_samples.append(frame.assign(panel=panel, schedule=schedule))
        begun = [run.retain[0] for run in mine if run.retain is not None]
        start = float(np.mean(begun)) if begun else float("nan")
        entry: dict[str, Any] = {
            "objective": panel,
            "retain_level": retain_level * start,
            "rows": lines,
            "difference": None,
        }
        matched.append(entry)
        if BASE in chosen and len(chosen) > 1:
            extra, more = _differences(panel, chosen, levels, n_buckets, retain_level, seed)
            tables.append(extra)
            findings += more
        elif len(chosen) > 1:
            findings.append(f"{panel}: no {BASE!r} in the grid to compare with")
        uniform = chosen.get(BASE, [])
        if uniform and uniform[0].scores is not None:
            section = audit.difficulty_section(
                panel, uniform[0].scores.columns, [audit.averaged_residual(list(run.forget))[0] for run in uniform],
                target=f"answer probability, mean over {len(uniform)} uniform runs and the snapshots at which 15-75% "
                "of the starting probability are left", seed=seed,
            )  # fmt: skip
            difficulty.append(section)
            findings.append(_best_predictor(panel, section))
        if groups is not None and uniform:
            scored = uniform[0].scores
            primary = None if scored is None else scored[scored.metrics[0]]
            extra, line = sections.group_table(levels[BASE], groups, primary, seed)
            tables.append({**extra, "id": f"groups-{len(tables)}", "title": f"By group: {panel}, {BASE}"})
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
        "schema_version": 1,
        "title": "cud study: schedules at matched retain utility",
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "run": {
            "command": command, "seed": seed, "versions": versions(),
            "model": {"path": cells[0].settings["model"]["model_name_or_path"]},
            "data": {"n_forget": len(runs[0].ids), "cells": len(runs), "failed": len(failed)},
            "seconds": {"this start": seconds, "all cells": float(sum(run.seconds for run in runs))},
        },
        "conditions": conditions, "matched": matched, "tables": tables, "findings": findings,
    }  # fmt: skip
    if difficulty:
        note = "Known before unlearning, against what uniform runs left. " + sections.comparisons_note(
            len(difficulty[0]["rows"])
        )
        results["difficulty"] = {"note": note, "objectives": difficulty}
    if any(row["chosen"] for row in fits):
        results["retain_weight_fit"] = fits
    return write_report(results, study, pd.concat(rows_of_samples, ignore_index=True))


def _tune(runs: list[Run], retain_level: float, n_buckets: int, panel: str) -> tuple[list[Run], list[dict[str, Any]]]:
    """The runs that are reported: with the learning rate and retain weight that are best on the first seed, the others.

    With one setting or one seed there is nothing to choose, or nothing to choose on: all (of the best setting) are.
    """
    settings = list(dict.fromkeys(run.tuning for run in runs))
    seeds = list(dict.fromkeys(run.seed for run in runs))
    if len(settings) == 1:
        return runs, []
    trial = [run for run in runs if run.seed == seeds[0]]
    rows = []
    for run in trial:
        values, _ = run.at(retain_level)
        rows.append(
            {
                "objective": f"{panel}, learning rate {run.options.get('learning_rate')}",
                "schedule": run.schedule,
                "retain_weight": run.options.get("retain_weight", 1.0),
                "forget": float(values.mean()),
                "hardest_bucket": float(values[run.bucket == n_buckets - 1].mean()),
                "chosen": False,
            }
        )
    best = int(np.argmin([row["forget"] for row in rows]))
    rows[best]["chosen"] = True
    same = [run for run in runs if run.tuning == trial[best].tuning]
    return [run for run in same if run.seed != seeds[0]] or same, rows


def _differences(
    panel: str,
    chosen: dict[str, list[Run]],
    levels: dict[str, np.ndarray],
    n_buckets: int,
    retain_level: float,
    seed: int,
) -> tuple[dict[str, Any], list[str]]:
    """Every schedule less `uniform`, paired over samples, and by seed."""
    base, rows, findings = levels[BASE], [], []
    hardest = chosen[BASE][0].bucket == n_buckets - 1
    tail = float(np.mean([worst_quarter(run.at(retain_level)[0]) for run in chosen[BASE]]))
    for schedule, group in chosen.items():
        if schedule == BASE:
            continue
        all_, hard = (
            stats.paired_difference(levels[schedule][part], base[part], seed=seed)
            for part in (np.ones(len(base), dtype=bool), hardest)
        )
        own = float(np.mean([worst_quarter(run.at(retain_level)[0]) for run in group]))
        by_seed = [
            float((run.at(retain_level)[0] - other.at(retain_level)[0])[hardest].mean())
            for run in group for other in chosen[BASE] if run.seed == other.seed
        ]  # fmt: skip
        spread = f"{min(by_seed):.3f} to {max(by_seed):.3f}" if by_seed else sections.missing("no seed in common")
        relative = 100 * hard.value / max(float(base[hardest].mean()), 1e-12)
        rows.append((schedule, [hard.as_dict(), relative, spread, all_.as_dict(), own - tail]))
        if hard.high < 0 and all_.low <= 0:
            verdict = "less of the hardest bucket is left than with uniform"
        else:
            verdict = "more of it is left" if hard.low > 0 else "no gain beyond what other samples could change"
        findings.append(
            f"{panel}: {schedule} less {BASE} at matched retain utility, hardest bucket "
            f"{audit.shown(hard.as_dict())}, all {audit.shown(all_.as_dict())}: {verdict}"
        )
    table = sections.table(
        f"differences-{panel}", f"{panel}: less {BASE}, at matched retain utility",
        f"{len(rows)} schedules against {BASE}; intervals over samples, single seeds beside. The worst quarter is "
        "picked by the result, for each condition its own.",
        ["hardest bucket", "relative, %", "hardest bucket, by seed", "all", "worst quarter by outcome"], rows,
    )  # fmt: skip
    return table, findings


def _best_predictor(panel: str, section: dict[str, Any]) -> str:
    rows = sorted(section["rows"], key=lambda row: -(row["spearman"]["value"] or 0))
    loss = next(row for row in section["rows"] if row["metric"] == "loss")
    return (
        f"{panel}: what uniform runs leave is predicted best by {rows[0]['label']}, Spearman "
        f"{audit.shown(rows[0]['spearman'])}; initial log-probability {audit.shown(loss['spearman'])}"
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
        final = {"seed": ended.seed, **{name: audit.means(part, seed) for name, part in kept.items()}}
        if ended.scores is not None:
            final["buckets"] = audit.by_bucket(kept["forget"], ended.bucket, seed)
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
