"""Finished runs, and which of them are reported: settings tuned on the first seeds, figures of the others, where all
have kept equally much."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cud_trainer.difficulty import Buckets, DifficultyScores
from cud_trainer.schedule import parse

from ..endpoint import Endpoint, endpoint
from ..report.schema import Trial
from ..trajectory import at_position, matched_position
from .grid import Cell
from .options import SCORES, TUNED

BASE = "uniform"
DIGITS = 4  # of a figure that settings are ranked by
T = TypeVar("T")


@dataclass(frozen=True)
class Coordinates:
    """Where a run lies in a study.

    Attributes:
        panel: what is compared only within itself: the objective, and whatever else of the grid is neither tuned nor
            part of a schedule.
        schedule: with its options, and the metric where the grid has it beside scores made before; the name of the arm
            in a study that has arms.
        tuning: learning rate and retain weight.
        seed: of the run.
    """

    panel: str
    schedule: str
    tuning: tuple
    seed: int


def coordinates(cell: Cell) -> Coordinates:
    """`Coordinates` of a run cell."""
    options = cell.settings["options"]
    not_of_panel = {"objective", "objective_args", "schedule", "schedule_args", "seed", SCORES, *TUNED}
    schedule = _with_options(options["schedule"], options.get("schedule_args"))
    if "scores_file" in cell.settings and "difficulty" in cell.choices:  # buckets are those of the file's first metric
        not_of_panel.add("difficulty")
        if any("difficulty" in part.metrics for part, _ in parse(options["schedule"])):
            schedule += f" by {options['difficulty']}"
    if "arm" in cell.choices:
        schedule = cell.choices["arm"]
        not_of_panel.add("arm")
    others = {name: value for name, value in cell.choices.items() if name not in not_of_panel}
    objective = _with_options(options.get("objective", "npo"), options.get("objective_args"))
    panel = ", ".join([objective, *(f"{key}={value}" for key, value in others.items())])
    return Coordinates(panel, schedule, tuple(options.get(name) for name in TUNED), int(options.get("seed", 42)))


class Run:
    """What a finished run cell left behind.

    Args:
        study: folder of the study.
        n_buckets: difficulty buckets, equal in size.
        never_seen: worst quarter of the forget set under a model that never saw it, if that is known.

    Attributes:
        steps: optimizer steps of the snapshots, `[T]`.
        forget: answer probability of every forget sample at each, `[T, N]`.
        retain: mean answer probability of what measures utility, `[T]`; `None` without a retain set.
        final: metrics of every sample at the end, by set (`forget`, `retain`).
        buckets: of the forget samples; one without scores.
        held_out: answer probability of every held-out sample at each snapshot, `[T, M]`; `None` without such.
        extraction: extraction strength of the forget samples at each, mean and worst quarter, `[T]`; empty for a run
            that did not measure it.
        strengths: the same of each sample, `[T, N]`; `None` likewise.
        unseen: answer probability of each never-seen sample at the end, `[K]`; `None` likewise.
        end: where the run is compared with others; `None` likewise.
        pairs: forget-retain pairs that it was planned to train on; `None` likewise.
    """

    def __init__(self, study: Path, cell: Cell, n_buckets: int, never_seen: float | None = None) -> None:
        result = json.loads((study / "cells" / cell.name / "result.json").read_text())
        self.cell, self.seconds, self.diverged = cell, result["seconds"], result["diverged"]
        at = coordinates(cell)
        self.panel, self.schedule, self.tuning, self.seed = at.panel, at.schedule, at.tuning, at.seed
        self.options = cell.settings["options"]
        self.steps, self.forget = np.array(result["steps"]), np.array(result["forget"])
        self.retain = None if result["retain"] is None else np.array(result["retain"])
        self.final = {name: {k: np.array(v) for k, v in part.items()} for name, part in result["final"].items()}
        self.relearned: dict[str, Any] | None = result["relearned"]
        self.ids: list[str] = result["forget_ids"]
        self.pairs: int | None = result.get("pairs")
        self.held_out = np.array(result["held_out"]) if "held_out" in result else None
        self.extraction = {name: np.array(values) for name, values in result.get("extraction", {}).items()}
        self.strengths = np.array(result["strengths"]) if "strengths" in result else None
        self.unseen = np.array(result["holdout"]) if "holdout" in result else None
        self.end: Endpoint | None = None
        if self.held_out is not None:
            known = None if never_seen is None else np.array([never_seen])
            self.end = endpoint(self.forget, self.held_out, known)
        self.scores: DifficultyScores | None = None
        self.buckets = Buckets.single(len(self.ids))
        path = cell.settings.get("scores_file")
        if cell.settings["scores_cell"] is not None:
            path = study / "cells" / cell.settings["scores_cell"] / "scores.parquet"
        if path is not None:
            self.scores = DifficultyScores.load(path).aligned(self.ids)
            self.buckets = self.scores.bucketed(n=n_buckets)

    @property
    def hardest(self) -> np.ndarray:
        """Samples of the bucket predicted hardest (all, without scores), bool `[N]`."""
        return self.buckets.hardest

    @property
    def reads_difficulty(self) -> bool:
        """Whether the schedule reads any difficulty of the samples."""
        return any(part.metric is not None for part, _ in parse(self.options["schedule"]))

    @property
    def calibration_pairs(self) -> int:
        """Pairs that calibrating its difficulty took; 0 for a schedule that reads none."""
        return 0 if self.scores is None or not self.reads_difficulty else pairs_of(self.scores)

    def at(self, share: float) -> tuple[np.ndarray, float]:
        """Forget probability of each sample where the run has forgotten most at `share` of the starting retain
        probability, and the step; without a retain set, at its end."""
        position = self._position(share)
        return at_position(self.forget, position), float(at_position(self.steps, position))

    def extraction_at(self, share: float) -> np.ndarray | None:
        """Extraction strength of each forget sample there, `[N]`; `None` where it was not measured."""
        return None if self.strengths is None else at_position(self.strengths, self._position(share))

    def _position(self, share: float) -> float:
        """Number of that snapshot, with a fraction between two."""
        if self.retain is None:
            return float(len(self.steps) - 1)
        position = matched_position(self.retain, self.forget.mean(1), share * self.retain[0])
        assert position is not None  # the start is above the level
        return position


def pairs_of(scores: DifficultyScores) -> int:
    """Forget-retain pairs that calibrating these scores took."""
    runs = scores.provenance.get("calibration", {}).get("runs", {})
    return sum(int(run["pairs"]) for run in runs.values())


def finished_cells(study: Path) -> list[Cell]:
    """The finished cells in the folder of a study, by name."""
    cells = []
    for path in sorted(study.glob("cells/*/result.json")):
        content = json.loads(path.with_name("cell.json").read_text())
        cells.append(Cell(content["kind"], path.parent.name, content["choices"], content["settings"]))
    return cells


def first_seeds(cells: Sequence[Cell], tuning_seeds: int = 1) -> list[Cell]:
    """The cells that decide which settings are reported: of each schedule with several, those with its first seeds."""
    first = []
    for same in grouped(cells, _condition_of).values():
        settings = {coordinates(cell).tuning for cell in same}
        seeds = leading([coordinates(cell).seed for cell in same], tuning_seeds)
        first += [cell for cell in same if len(settings) == 1 or coordinates(cell).seed in seeds]
    return first


def reported(
    study: Path,
    cells: Sequence[Cell],
    tried: Sequence[Cell],
    levels: Sequence[float],
    n_buckets: int,
    tune_on: str | None = "hardest",
    never_seen: float | None = None,
) -> list[Cell]:
    """The cells that figures are made of: `tried`, and those of the settings that are best among them at one of the
    levels. A schedule of which nothing was tried has none.

    Args:
        tried: finished cells out of those that `first_seeds` names.
        tune_on: as in `StudyArguments`.
        never_seen: as for `Run`.
    """
    chosen = []
    trials = {cell.name for cell in tried}
    for same in grouped(cells, _condition_of).values():
        runs = [Run(study, cell, n_buckets, never_seen) for cell in same if cell.name in trials]
        if runs:
            best = {_best(runs, level, tune_on) for level in levels}
            chosen += [cell for cell in same if cell.name in trials or coordinates(cell).tuning in best]
    return chosen


def tuned(runs: Sequence[Run], level: float, tuning_seeds: int = 1, tune_on: str | None = "hardest") -> list[Run]:
    """The runs that are reported: with the learning rate and retain weight that leave least of what `tune_on` says on
    the first `tuning_seeds` seeds (or keep most there, at the endpoint), the other seeds.

    With one setting or one seed there is nothing to choose, or nothing to choose on: all (of the best setting) are.
    """
    if len({run.tuning for run in runs}) == 1:
        return list(runs)
    first = leading([run.seed for run in runs], tuning_seeds)
    best = _best([run for run in runs if run.seed in first], level, tune_on)
    same = [run for run in runs if run.tuning == best]
    return [run for run in same if run.seed not in first] or same


def trials(runs: Sequence[Run], chosen: Sequence[Run], level: float, label: str, tuning_seeds: int = 1) -> list[Trial]:
    """A row for every setting that was tried, mean over the first seeds.

    Args:
        chosen: those of `runs` that `tuned` has chosen.
        label: what to call the objective, with `{rate}` for the learning rate.
    """
    first = leading([run.seed for run in runs], tuning_seeds)
    rows = []
    for tuning, group in grouped([run for run in runs if run.seed in first], attrgetter("tuning")).items():
        run = group[0]
        left = np.mean([one.at(level)[0] for one in group], axis=0)
        rows.append(
            Trial(
                objective=label.format(rate=run.options.get("learning_rate")),
                schedule=run.schedule,
                retain_weight=run.options.get("retain_weight", 1.0),
                forget=float(left.mean()),
                hardest_bucket=float(left[run.hardest].mean()),
                chosen=tuning == chosen[0].tuning,
            )
        )
    return rows


def left_at(chosen: dict[str, list[Run]], level: float) -> dict[str, np.ndarray]:
    """What each schedule leaves of each sample at `level`, mean over seeds, `[N]`."""
    return {schedule: np.mean([run.at(level)[0] for run in group], axis=0) for schedule, group in chosen.items()}


def grouped(items: Sequence[T], key: Callable[[T], Hashable]) -> dict[Any, list[T]]:
    """Items by what `key` says of them, both in the order of their first appearance."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def leading(seeds: Sequence[int], count: int) -> list[int]:
    """The first `count` different seeds."""
    return list(dict.fromkeys(seeds))[:count]


def _condition_of(cell: Cell) -> tuple[str, str]:
    at = coordinates(cell)
    return at.panel, at.schedule


def _best(runs: Sequence[Run], level: float, tune_on: str | None) -> tuple:
    """Learning rate and retain weight whose runs leave least at `level`, of the hardest bucket or of all; or that keep
    most at the endpoint, those first whose runs get there."""

    def left(group: Sequence[Run]) -> Any:
        if tune_on == "endpoint":
            return at_endpoint([run.end for run in group if run.end is not None])
        part = (lambda run: run.hardest) if tune_on == "hardest" else (lambda run: slice(None))
        return float(np.mean([run.at(level)[0][part(run)].mean() for run in group]))

    found = {tuning: left(group) for tuning, group in grouped(runs, attrgetter("tuning")).items()}
    return min(found, key=lambda tuning: found[tuning])


def at_endpoint(ends: Sequence[Endpoint]) -> tuple[float, float, float]:
    """By which settings are ranked, lower = better: runs that never get to the endpoint, then what is lost there, then
    how far they get; in steps so coarse that rounding has no say."""
    kept = [end.kept for end in ends if end.kept is not None]
    lost = round(1 - float(np.mean(kept)), DIGITS) if kept else 1.0
    return len(ends) - len(kept), lost, round(float(np.mean([end.lowest for end in ends])), DIGITS)


def _with_options(name: str, options: Any) -> str:
    return f"{name} {json.dumps(options, sort_keys=True)}" if options else name
