"""What the demo found: the contents of its `results.json`, its findings, and a row per forget sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np
import pandas as pd

from cud_trainer.circuits import CircuitTable, Faithfulness
from cud_trainer.difficulty import DifficultyScores
from cud_trainer.models.fingerprint import versions
from cud_trainer.preserving import UNLIKELIHOOD, UNLIKELIHOOD_TARGET, default_schedule

from . import statistics as stats
from .endpoint import worst_quarter
from .metrics.memorization import TOKEN_STATISTICS
from .report.cells import interval_text
from .report.circuits import circuit_section
from .report.difficulty import difficulty_section
from .report.schema import DifficultySection, Head, Table, jsonable
from .report.tables import table
from .report.verdict_schema import ArmVerdict
from .study.engine import Finished
from .study.evidence import decided, evidence
from .study.report import condition, extraction_figure
from .study.runs import Run, grouped, left_at
from .study.verdicts import arm_verdicts, verdicts
from .trajectory import averaged_residual

OBJECTIVES = ("graddiff", "npo")
UNIFORM_WEIGHTS = {"graddiff": 16.0, "npo": 64.0}  # of `uniform`: best in benchmarks/evidence/development.yaml
SCHEDULES = UNIFORM, DEFAULT, BY_CUD, PLACEBO = ("uniform", "default", "default with CUD", "default with random")
BUCKETS = 4
UNTRIED = "the demo leaves the weights alone; cud evaluate tries relearning, rounding and sampled answers on a model"
CAVEAT = (
    "Nothing was tuned here: uniform has the retain weight that did best on another model. Retain utility is measured "
    "on retained facts asked in other words than the retain loss uses, held-out knowledge on authors that it never "
    "mentions. Few seeds seldom decide: --report_seeds 5 says more. The ceiling is that of few seeds, and noisy."
)


def arms(objective: str) -> dict[str, dict[str, Any]]:
    """What is compared: the published algorithm, the default, and the default with hard samples weighted up."""
    own = default_schedule(objective, preserve=True)
    weighted: dict[str, Any] = {"schedule": f"upweight_hard+{own}"}
    if own == UNLIKELIHOOD:
        weighted["schedule_args"] = {"per_sample_stop": {"target": UNLIKELIHOOD_TARGET}}
    return {
        UNIFORM: {"schedule": "uniform", "preserve": False, "retain_weight": UNIFORM_WEIGHTS[objective]},
        DEFAULT: {},
        BY_CUD: weighted,
        PLACEBO: {**weighted, "difficulty": "random"},
    }


def results(
    command: str,
    before: dict[str, Any],
    sizes: dict[str, Any],
    scores: dict[str, DifficultyScores],
    circuits: CircuitTable,
    faithfulness: Faithfulness,
    runs: dict[str, list[Run]],
    finished: dict[str, Finished],
    *,
    retain_level: float,
    seed: int,
) -> dict[str, Any]:
    """The contents of `results.json`, but for the seconds.

    Args:
        before: what the model knew of each set.
        sizes: of the sets and the model.
        scores: by objective.
        runs: of each objective.
        finished: the study that they are of.
        seed: the first of the runs, and of the bootstrap.
    """
    findings: list[str] = []
    judged: list[ArmVerdict] = []
    difficulty, conditions, matched, tables, found = [], [], [], [], {}
    for objective in scores:
        study = finished[objective]
        by_arm = grouped(runs[objective], attrgetter("schedule"))
        chosen = {arm: by_arm[arm] for arm in SCHEDULES}
        uniform = chosen[UNIFORM]
        residuals = [averaged_residual(list(run.forget))[0] for run in uniform]
        section, against = _difficulty(objective, scores[objective], residuals, seed)
        if objective == next(iter(scores)):
            note = f"Buckets are those of CUD calibrated for {objective}; what is left is that of {objective}, uniform."
            left = np.mean(residuals, axis=0)
            pictures = circuit_section(
                circuits, uniform[0].buckets, left, seed=seed, note=note, faithfulness=faithfulness
            )
        difficulty.append(section)
        findings.append(_difficulty_finding(objective, section, against))
        conditions += [
            replace(condition(objective, schedule, group, seed), passes=group[0].options["passes"])
            for schedule, group in chosen.items()
        ]
        matched.append(_matched(objective, chosen, retain_level, seed))
        worst, means = (_figures(chosen, retain_level, of) for of in (worst_quarter, np.mean))
        strengths = _strengths(chosen, retain_level)
        found[objective] = evidence(objective, chosen, study.heldout_groups or [], None, seed)
        rows, lines = arm_verdicts(objective, chosen, study.unseen, study.groups, seed)
        judged += rows
        findings += lines
        tables += [*found[objective].tables, _by_seed(objective, worst, means, strengths)]
        findings += found[objective].findings
        findings.append(_schedule_finding(objective, matched[-1]["retain_level"], worst, means, strengths))
    return {
        **jsonable(Head.now("cud demo: which fictitious authors are hard to forget?")),
        "run": _run(command, sizes, seed),
        "before": before,
        "difficulty": {
            "note": "Spearman correlation of each metric, computed before unlearning, with what is left afterwards. "
            "CUD is cross-fitted: anchors never include the author that is scored. One model and one forget set: "
            "intervals are over its samples, not over models.",
            "objectives": difficulty,
        },
        "circuits": pictures,
        "conditions": conditions,
        "matched": matched,
        "verdicts": verdicts(judged, [], [], UNTRIED),
        "decision": decided(found),
        "tables": tables,
        "findings": [*findings, CAVEAT],
    }


def _run(command: str, sizes: dict[str, Any], seed: int) -> dict[str, Any]:
    return {
        "command": command.strip(),
        "seed": seed,
        "versions": versions(),
        "model": {key: sizes[key] for key in ("parameters", "layers", "hidden_size", "vocabulary")},
        "data": {key: value for key, value in sizes.items() if key.startswith("n_")},
        "seconds": {},
    }


def _difficulty(
    objective: str, scores: DifficultyScores, residuals: list[np.ndarray], seed: int
) -> tuple[DifficultySection, stats.Interval]:
    """How well each metric predicts what uniform runs leave, and by how much CUD does better than the loss."""
    section = difficulty_section(
        objective,
        scores.columns,
        residuals,
        target=f"answer probability after uniform unlearning, mean over {len(residuals)} seeds and over the "
        "snapshots at which the mean forget probability is 15-75% of its start",
        seed=seed,
    )
    against = stats.spearman_difference(scores["cud"], scores["loss"], np.mean(residuals, axis=0), seed=seed)
    section.cud_minus_loss = against
    return section, against


def _matched(objective: str, chosen: dict[str, list[Run]], retain_level: float, seed: int) -> dict[str, Any]:
    """What each schedule leaves at matched retain utility."""
    left = left_at(chosen, retain_level)
    hardest = chosen[UNIFORM][0].hardest
    rows = [
        {
            "schedule": schedule,
            "retain_weight": group[0].options["retain_weight"],
            "forget": stats.bootstrap_mean(left[schedule], seed=seed).as_dict(),
            "hardest_bucket": stats.bootstrap_mean(left[schedule][hardest], seed=seed).as_dict(),
            **extraction_figure(group, retain_level, seed),
            "steps": float(np.mean([run.at(retain_level)[1] for run in group])),
            "reason": None,
        }
        for schedule, group in chosen.items()
    ]
    utility = chosen[UNIFORM][0].retain
    assert utility is not None  # the demo has a retain set
    level = retain_level * float(utility[0])
    # No difference over samples: two schedules differ from seed to seed by far more.
    return {"objective": objective, "retain_level": level, "rows": rows, "difference": None}


def _difficulty_finding(objective: str, section: DifficultySection, against: stats.Interval) -> str:
    spearman = {row.metric: row.spearman for row in section.rows}
    partial = next(row.partial for row in section.rows if row.metric == "cud")
    assert partial is not None and section.ceiling is not None  # of CUD, over several seeds
    return (
        f"{objective}: Spearman with residual memorisation: CUD {interval_text(spearman['cud'])}, its top-k cosine "
        f"form (cud_top_k, inspired by the paper, not as published) {interval_text(spearman['cud_top_k'])}, "
        f"circuit mass {interval_text(spearman['circuit_mass'])}, initial loss {interval_text(spearman['loss'])}; "
        f"between seeds {section.ceiling.agreement.value:.2f}. CUD less loss {interval_text(against)}; CUD given "
        f"loss and length {interval_text(partial)}. Intervals are over the samples of one model, and "
        "say nothing of another."
    )


BySeed = dict[str, dict[int, float]]  # a figure of each schedule and seed


def _figures(chosen: dict[str, list[Run]], level: float, of: Callable[[np.ndarray], Any]) -> BySeed:
    """`of` what every run leaves of each sample at matched retain utility."""
    return {schedule: {run.seed: float(of(run.at(level)[0])) for run in group} for schedule, group in chosen.items()}


def _strengths(chosen: dict[str, list[Run]], level: float) -> BySeed:
    """Mean extraction strength of every run at matched retain utility."""
    found = {schedule: {run.seed: run.extraction_at(level) for run in group} for schedule, group in chosen.items()}
    return {
        schedule: {seed: float(np.mean(one)) for seed, one in runs.items() if one is not None}
        for schedule, runs in found.items()
    }


def _schedule_finding(objective: str, level: float, worst: BySeed, means: BySeed, strengths: BySeed) -> str:
    change = _change(worst)
    return (
        f"{objective} at retain probability {level:.3f}, worst quarter by outcome, seed by seed: {_seeds(worst)}; "
        f"change {_percent(change)} over {len(worst[UNIFORM])} seeds. Mean of all samples: {_seeds(means)}. "
        f"Extraction strength, mean of all samples: {_seeds(strengths)}."
    )


def _change(figures: BySeed) -> stats.Interval:
    """Of the default schedule from `uniform`, paired by seed."""
    uniform, aware = figures[UNIFORM], figures[DEFAULT]
    return stats.paired_change(*(np.array([values[run] for run in sorted(uniform)]) for values in (aware, uniform)))


def _seeds(figures: BySeed) -> str:
    return ", ".join(
        f"{schedule} " + " ".join(f"{figures[schedule][run]:.3f}" for run in sorted(figures[schedule]))
        for schedule in figures
    )


def _percent(change: stats.Interval) -> str:
    if not np.isfinite(change.value):
        return "n/a"
    value, high = (f"{100 * of:+.0f}" if of < 10 else "more than +1000" for of in (change.value, change.high))
    return f"{value}% [{100 * change.low:+.0f}, {high}]"


def _by_seed(objective: str, worst: BySeed, means: BySeed, strengths: BySeed) -> Table:
    """The table behind the finding."""
    return table(
        f"seeds-{objective}",
        f"{objective}: schedules by seed, at matched retain utility",
        "The worst quarter is picked by the result, of each run its own. Change: geometric mean over seeds, with "
        "its 95% t interval over seeds of the paired log ratio.",
        ["worst quarter by outcome", "all samples", "extraction strength, all samples"],
        [
            *(
                (f"{schedule}, seed {run}", [worst[schedule][run], means[schedule][run], strengths[schedule][run]])
                for schedule in worst
                for run in sorted(worst[schedule])
            ),
            (f"change with {DEFAULT}", [_percent(_change(one)) for one in (worst, means, strengths)]),
        ],
    )


def per_sample(scores: dict[str, DifficultyScores], runs: dict[str, list[Run]]) -> pd.DataFrame:
    """One row per forget sample: difficulty by objective, and what every run left at its end. No text."""
    first = next(iter(scores.values()))
    frame = pd.DataFrame({"sample_id": first.ids, "fold": first.fold})
    for objective, difficulty in scores.items():
        for name, values in difficulty.columns.items():
            frame[f"{objective}/{name}"] = values
        frame[f"{objective}/bucket"] = difficulty.buckets("cud", BUCKETS) + 1
    for run in (run for same in runs.values() for run in same):
        label = f"{run.options['objective']}-{run.schedule}-s{run.seed}"
        frame[f"{label}/probability"] = run.forget[-1]
        if run.cell.settings.get("generate"):
            for name, values in run.final["forget"].items():
                if name not in TOKEN_STATISTICS:
                    frame[f"{label}/{name}"] = values
    return frame
