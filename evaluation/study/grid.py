"""The cells of a study: which pieces of work its grid stands for, and what each depends on."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from typing import Any

from cud_trainer import CUDConfig
from cud_trainer.commands.early import ORACLE
from cud_trainer.difficulty.scores import PRECOMPUTED, DifficultyScores, merge_metrics
from cud_trainer.models.fingerprint import file_hash
from cud_trainer.preserving import PRESERVING

from .options import EQUAL_COMPUTE, SCORES, StudyArguments

# Options that scores do not depend on: runs that differ in nothing else share theirs.
NOT_OF_SCORES = {"schedule", "schedule_args", "seed", "n_buckets", "preserve", "retain_weight_end", "l2_sp"}
RANDOM = "random"  # the difficulty metric without any meaning
LONGEST_NAME = 200  # bytes: file systems take 255, and names of files are made of it


@dataclass(frozen=True)
class Cell:
    """A piece of work: the difficulty scores that runs share, or a run.

    Attributes:
        kind: `"scores"` or `"run"`.
        name: of its folder.
        choices: its values of the grid.
        settings: everything its outcome depends on, as JSON values.
    """

    kind: str
    name: str
    choices: dict[str, Any]
    settings: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Combination:
    """Values of the grid, one of each option, and what they come to.

    Attributes:
        choices: these values.
        options: of `cud train`, those that all cells share among them, without a path of scores.
        config: what they make.
        scores_file: of scores made before.
        oracle: whether its difficulty is what uniform runs of other seeds have left.
        equal_compute: whether it trains on as many pairs more as its difficulty was calibrated with.
    """

    choices: dict[str, Any]
    options: dict[str, Any]
    config: CUDConfig
    scores_file: str | None
    oracle: bool = False
    equal_compute: bool = False

    @property
    def metrics(self) -> list[str]:
        """What the run needs of its difficulty scores, the primary metric first."""
        config = self.config
        return [] if config.difficulty is None else [config.difficulty, *config.schedule_metrics]

    @property
    def scores_key(self) -> str:
        """Equal for runs that share a cell of scores."""
        return json.dumps(_without(self.options, self.not_of_scores), sort_keys=True)

    @property
    def not_of_scores(self) -> set[str]:
        """Options that its scores do not depend on; those without meaning are drawn anew with every seed."""
        return NOT_OF_SCORES - {"seed"} if self.config.difficulty == RANDOM else NOT_OF_SCORES


def plan(args: StudyArguments, base: dict[str, Any]) -> tuple[list[Cell], list[Cell]]:
    """The score cells, and the run cells that build on them; every configuration is checked.

    Args:
        base: what all cells depend on (model, data).

    Raises:
        ValueError: for a combination that `CUDConfig` refuses, naming it.
    """
    metrics: dict[str, list[str]] = {}
    scores_files: dict[str, tuple[list[str], str]] = {}  # metrics and hash of scores made before, by path
    combinations = []
    for grid in args.grids:
        for arm, values in itertools.product(args.arms or [None], itertools.product(*grid.values())):
            choices = {} if arm is None else {"arm": arm}
            choices = choices | dict(zip(grid, values, strict=True))
            combination = _combination(args, choices)
            combinations.append(combination)
            if combination.scores_file is None and not combination.oracle:
                metrics.setdefault(combination.scores_key, []).extend(combination.metrics)
            elif combination.scores_file is not None:
                _check_scores_file(combination, scores_files)
    scores: dict[str, Cell] = {}
    runs = []
    for combination in combinations:
        key = combination.scores_key
        scores_cell = None
        if combination.config.difficulty is not None and combination.scores_file is None and not combination.oracle:
            if key not in scores:
                scores[key] = _scores_cell(combination, metrics[key], base)
            scores_cell = scores[key]
        settings = _run_settings(args, combination, base, scores_cell, scores_files)
        runs.append(Cell("run", named(combination.choices), combination.choices, settings))
    if len({cell.name for cell in runs}) < len(runs):  # values that differ in what a name cannot show
        runs = [Cell(c.kind, f"{c.name}-{c.fingerprint[:6]}", c.choices, c.settings) for c in runs]
    if len({cell.name for cell in runs}) < len(runs):
        raise ValueError("two mappings of grid have a combination in common")
    return list(scores.values()), runs


def _combination(args: StudyArguments, choices: dict[str, Any]) -> _Combination:
    arm: dict[str, Any] = args.arms[choices["arm"]] if args.arms else {}  # type: ignore[index, assignment]
    # All cells have one difficulty, whatever they read: their buckets are compared.
    options = {"difficulty": "cud", **args.train, **arm, **_without(choices, {"arm"})}  # type: ignore[dict-item]
    scores_file, equal_compute = options.pop(SCORES, None), options.pop(EQUAL_COMPUTE, False)
    oracle = bool(args.arms) and options.get("difficulty") == ORACLE
    if oracle:
        options["difficulty"], scores_file = PRECOMPUTED, None
    try:
        config = CUDConfig("unused", **{"report_to": "none", **options})
    except (ValueError, TypeError) as error:
        raise ValueError(f"cell {named(choices)}: {error}") from None
    if arm.get("difficulty") in (RANDOM, ORACLE) and not config.reads_difficulty:
        raise ValueError(
            f"cell {named(choices)}: schedule {config.schedule!r} reads no difficulty, so it is no comparison with "
            f"difficulty {arm['difficulty']!r}: join a part that reads it, such as 'upweight_hard'"
        )
    if scores_file is None and config.difficulty == PRECOMPUTED and not oracle:
        raise ValueError(f"cell {named(choices)}: difficulty {PRECOMPUTED!r} needs {SCORES}")
    if equal_compute and (config.difficulty is None or oracle):
        raise ValueError(f"cell {named(choices)}: {EQUAL_COMPUTE} needs the difficulty whose calibration it equals")
    # The defaults, too: another version's may differ.
    for name in ("schedule", "schedule_args", "preserve", *PRESERVING):
        options[name] = getattr(config, name)
    return _Combination(choices, options, config, scores_file, oracle, equal_compute)


def _check_scores_file(combination: _Combination, scores_files: dict[str, tuple[list[str], str]]) -> None:
    """Raise `ValueError` where scores made before lack a metric; reads each file once, into `scores_files`."""
    path = combination.scores_file
    assert path is not None
    if path not in scores_files:
        scores_files[path] = DifficultyScores.load(path).metrics, file_hash(path)
    metrics = scores_files[path][0]
    lacking = [name for name in combination.metrics if name not in (*metrics, PRECOMPUTED)]
    if lacking:
        raise ValueError(f"cell {named(combination.choices)}: {path} has no metric {lacking[0]!r}; it has {metrics}")


def _scores_cell(combination: _Combination, metrics: list[str], base: dict[str, Any]) -> Cell:
    """The cell of scores that a run builds on; `metrics` are what all runs that share it need."""
    settings = {
        **base,
        "kind": "scores",
        "options": _without(combination.options, combination.not_of_scores),
        "metrics": merge_metrics(metrics[0], [*metrics[1:], "loss", "length"]),
    }
    number = hashlib.sha256(combination.scores_key.encode()).hexdigest()[:8]
    return Cell(
        "scores", f"scores-{number}", _without(combination.choices, {"arm", *combination.not_of_scores}), settings
    )


def _run_settings(
    args: StudyArguments,
    combination: _Combination,
    base: dict[str, Any],
    scores_cell: Cell | None,
    scores_files: dict[str, tuple[list[str], str]],
) -> dict[str, Any]:
    """Everything that the outcome of a run depends on; what is not asked for is not there."""
    path = combination.scores_file
    settings = {
        **base,
        "kind": "run",
        "options": combination.options,
        "snapshot_every": args.snapshot_every,
        "retain_eval_samples": args.retain_eval_samples,
        "scores": scores_files[path][1] if path is not None else scores_cell.fingerprint if scores_cell else None,
        "scores_cell": scores_cell.name if scores_cell else None,
    }
    if path is not None:
        settings["scores_file"] = str(path)
    if args.relearn_samples:
        settings["relearn"] = {
            "samples": args.relearn_samples,
            "steps": args.relearn_steps,
            "rate": args.relearn_rate,
            "level": args.retain_level[0],
        }
    if args.heldout_dataset is not None:
        settings["heldout_samples"] = args.heldout_samples
    if combination.oracle:
        settings[ORACLE] = True
    if combination.equal_compute:
        settings[EQUAL_COMPUTE] = True
    if combination.config.seed in args.generate_seeds:
        settings["generate"] = True
    if args.end_below:
        settings["end_below"] = args.end_below
    if args.end_worst_quarter:
        settings["end_worst_quarter"] = args.end_worst_quarter
    return settings


def _without(options: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


def named(choices: dict[str, Any]) -> str:
    """A folder name such as `objective=npo,schedule=uniform,seed=1`; one that is too long ends in a hash."""
    parts = []
    for name, value in choices.items():
        text = json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else str(value)
        parts.append(f"{name}={''.join(c if c.isalnum() or c in '.-+_' else '_' for c in text)[:40]}")
    name = ",".join(parts)
    if len(name.encode()) <= LONGEST_NAME:
        return name
    number = hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:12]
    return f"{name.encode()[: LONGEST_NAME - 13].decode(errors='ignore')}-{number}"
