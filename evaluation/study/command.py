"""`cud study`: many unlearning runs that differ in chosen options, compared at matched retain utility.

Every piece of work is a cell with a folder of its own, run in another process (`evaluation.study.cell`): one that
fails, or whose process is killed, does not take the others with it. A finished cell is recognised by the fingerprint of
everything its outcome depends on, and skipped.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import queue
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from cud_trainer import CUDConfig
from cud_trainer.commands.options import DataArguments, load_tokenizer
from cud_trainer.commands.parser import parse_options, read_yaml
from cud_trainer.data import check_disjoint, prepare_samples
from cud_trainer.difficulty.scores import GIVEN, DifficultyScores, merge_metrics
from cud_trainer.files import holds_something, remove_leftovers, write_json
from cud_trainer.models.fingerprint import file_hash, versions

SCORES = "difficulty_scores"  # a path, as in `cud train`: scores made before, instead of cells that compute them
TRAIN_FIELDS = {f.name for f in fields(CUDConfig)} | {SCORES}
SHARED_FIELDS = {f.name for kind in (DataArguments, ModelConfig) for f in fields(kind)}
# What a study sets itself.
RESERVED = {
    "output_dir", "overwrite", "save_strategy", "eval_strategy", "report_to", "disable_tqdm", "push_to_hub",
    "max_steps", "resume_from_checkpoint", "target_forget_prob",
}  # fmt: skip
# Options that scores do not depend on: runs that differ in nothing else share theirs.
NOT_OF_SCORES = {"schedule", "schedule_args", "seed", "n_buckets"}
TUNED = ("learning_rate", "retain_weight")


@dataclass
class StudyArguments(DataArguments):
    """What `cud study` reads besides TRL's `ModelConfig` (model, adapter)."""

    output_dir: str = field(default="cud-study", metadata={"help": "Where the cells and the report go."})
    grid: Any = field(
        default_factory=dict,
        metadata={
            "help": "Options of `cud train` with a list of values each; a cell for every combination. A list of such "
            "mappings is their union."
        },
    )
    train: dict[str, Any] | str = field(
        default_factory=dict, metadata={"help": "Options of `cud train` that all cells share."}
    )
    recipe: str | None = field(
        default=None,
        metadata={"help": "A YAML file of `cud train` whose options hold wherever the study does not say otherwise."},
    )
    workers: int = field(default=1, metadata={"help": "Cells at a time."})
    devices: list[str] = field(
        default_factory=list,
        metadata={"help": "GPUs to deal the cells to (CUDA_VISIBLE_DEVICES of each), for example 0 1 2."},
    )
    snapshot_every: int = field(
        default=1, metadata={"help": "Optimizer steps between two points of a trade-off curve."}
    )
    utility_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Samples whose answer probability is the utility of a curve; better none that the retain loss "
            "sees. Default: the retain set."
        },
    )
    utility_config: str | None = field(default=None, metadata={"help": "Its configuration name."})
    utility_split: str = field(default="train", metadata={"help": "Its split."})
    retain_eval_samples: int = field(
        default=200, metadata={"help": "How many of them are measured at most, evenly spaced."}
    )
    retain_level: list[float] = field(
        default_factory=lambda: [0.95],
        metadata={
            "help": "Conditions are compared at these shares of the starting utility, each tuned for each; curves and "
            "samples are those of the first."
        },
    )
    tuning_seeds: int = field(
        default=1,
        metadata={
            "help": "Learning rate and retain weight are chosen on so many of the first seeds of the grid, and the "
            "others are reported. More than one where what is left at a level differs much from seed to seed."
        },
    )
    relearn_samples: int = field(
        default=0,
        metadata={
            "help": "From where a run has forgotten most at the first level, fine-tune on as many forget samples again "
            "and see what comes back of the others."
        },
    )
    relearn_steps: int = field(default=10, metadata={"help": "Steps of that."})
    relearn_rate: float = field(default=1e-5, metadata={"help": "Its learning rate."})
    n_buckets: int = field(default=4, metadata={"help": "Difficulty buckets, equal in size."})
    overwrite: bool = field(default=False, metadata={"help": "Replace cells that were run with other settings."})

    def __post_init__(self) -> None:
        if not isinstance(self.train, dict):
            raise ValueError(f"train must be a mapping of options, got {self.train!r}")
        for grid in self.grids:
            if not isinstance(grid, dict):
                raise ValueError(f"grid must be a mapping of options or a list of such, got {grid!r}")
            if not grid:
                raise ValueError(
                    "grid is empty: give options with a list of values, for example {schedule: [uniform, ...]}"
                )
            for name, values in grid.items():
                if not isinstance(values, list) or not values:
                    raise ValueError(f"grid: {name} needs a list of values, got {values!r}")
                if len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
                    raise ValueError(f"grid: {name} has a value twice: {values}")
            both = sorted(set(grid) & set(self.train))
            if both:
                raise ValueError(f"{both[0]!r} is both in grid and in train")
            for name in [*grid, *self.train]:
                if name not in TRAIN_FIELDS or name in RESERVED:
                    why = "is set by the study itself" if name in RESERVED else "is no option of `cud train`"
                    raise ValueError(f"{name!r} {why}")
        for name, least in (
            ("workers", 1), ("snapshot_every", 1), ("retain_eval_samples", 1), ("n_buckets", 1), ("relearn_steps", 1),
            ("relearn_samples", 0), ("tuning_seeds", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.relearn_rate > 0:
            raise ValueError(f"relearn_rate must be positive, got {self.relearn_rate}")
        if not self.retain_level or not all(0 < level < 1 for level in self.retain_level):
            raise ValueError(f"retain_level must be between 0 and 1, got {self.retain_level}")
        for grid in self.grids if self.tuning_seeds > 1 else []:
            seeds, settings = len(grid.get("seed", [0])), math.prod(len(grid.get(name, [0])) for name in TUNED)
            if settings > 1 and seeds <= self.tuning_seeds:
                raise ValueError(
                    f"tuning_seeds {self.tuning_seeds} leaves no seed to report on: {seeds} in a mapping of grid"
                )

    @property
    def grids(self) -> list[dict[str, Any]]:
        """The mappings whose combinations are the cells."""
        return self.grid if isinstance(self.grid, list) and self.grid else [self.grid]

    def load_utility(self, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
        """The samples that measure utility, before they are thinned; `None` for the retain set."""
        if self.utility_dataset is None and self.utility_config is None:
            return None
        source = self.utility_dataset or self.retain_dataset or self.forget_dataset or ""
        return self.read(source, self.utility_config, self.utility_split, None, "utility", tokenizer)


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


def plan(args: StudyArguments, base: dict[str, Any]) -> tuple[list[Cell], list[Cell]]:
    """The score cells, and the run cells that build on them; every configuration is checked.

    Args:
        base: what all cells depend on (model, data).

    Raises:
        ValueError: for a combination that `CUDConfig` refuses, naming it.
    """
    train = dict(args.train)  # type: ignore[arg-type]
    combinations = [
        dict(zip(grid, values, strict=True)) for grid in args.grids for values in itertools.product(*grid.values())
    ]
    metrics: dict[str, list[str]] = {}
    files: dict[str, tuple[list[str], str]] = {}  # metrics and hash of scores made before, by path
    configs = []
    for choices in combinations:
        options = {**train, **choices}
        given = options.pop(SCORES, None)
        try:
            config = CUDConfig("unused", **{"report_to": "none", **options})
        except (ValueError, TypeError) as error:
            raise ValueError(f"cell {_named(choices)}: {error}") from None
        configs.append(config)
        needed = [] if config.difficulty is None else [config.difficulty, *config.schedule_metrics]
        if given is None and config.difficulty == GIVEN:
            raise ValueError(f"cell {_named(choices)}: difficulty {GIVEN!r} needs {SCORES}")
        if given is None:
            metrics.setdefault(_scores_key(options), []).extend(needed)
        else:
            if given not in files:
                files[given] = DifficultyScores.load(given).metrics, file_hash(given)
            known = files[given][0]
            lacking = [name for name in needed if name not in (*known, GIVEN)]
            if lacking:
                raise ValueError(f"cell {_named(choices)}: {given} has no metric {lacking[0]!r}; it has {known}")
    scores: dict[str, Cell] = {}
    runs = []
    for choices, config in zip(combinations, configs, strict=True):
        options = {**train, **choices, "schedule": config.schedule}  # the default, too: another version's may differ
        given = options.pop(SCORES, None)
        key = _scores_key(options)
        if config.difficulty is not None and given is None and key not in scores:
            own = {name: value for name, value in options.items() if name not in NOT_OF_SCORES}
            needed = merge_metrics(metrics[key][0], [*metrics[key][1:], "loss", "length"])
            settings = {**base, "kind": "scores", "options": own, "metrics": needed}
            number = hashlib.sha256(key.encode()).hexdigest()[:8]
            shared = {name: value for name, value in choices.items() if name not in NOT_OF_SCORES}
            scores[key] = Cell("scores", f"scores-{number}", shared, settings)
        cell = None if given is not None else scores.get(key)
        settings = {
            **base, "kind": "run", "options": options, "snapshot_every": args.snapshot_every,
            "retain_eval_samples": args.retain_eval_samples,
            "scores": files[given][1] if given is not None else cell.fingerprint if cell else None,
            "scores_cell": cell.name if cell else None,
        }  # fmt: skip
        if given is not None:
            settings["scores_file"] = str(given)
        if args.relearn_samples:
            settings["relearn"] = {
                "samples": args.relearn_samples, "steps": args.relearn_steps, "rate": args.relearn_rate,
                "level": args.retain_level[0],
            }  # fmt: skip
        runs.append(Cell("run", _named(choices), choices, settings))
    if len({cell.name for cell in runs}) < len(runs):  # values that differ in what a name cannot show
        runs = [Cell(c.kind, f"{c.name}-{c.fingerprint[:6]}", c.choices, c.settings) for c in runs]
    if len({cell.name for cell in runs}) < len(runs):
        raise ValueError("two mappings of grid have a combination in common")
    return list(scores.values()), runs


def _scores_key(options: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in options.items() if name not in NOT_OF_SCORES}, sort_keys=True)


def _named(choices: dict[str, Any]) -> str:
    """A folder name such as `objective=npo,schedule=uniform,seed=1`."""
    parts = []
    for name, value in choices.items():
        text = json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else str(value)
        parts.append(f"{name}={''.join(c if c.isalnum() or c in '.-+_' else '_' for c in text)[:40]}")
    return ",".join(parts)


def read_arguments(argv: list[str]) -> tuple[Any, Any]:
    """Options of a study; those of its recipe stand behind its own.

    Raises:
        ValueError: for a recipe that cannot be read or has an option that a study has no place for.
    """
    kinds = (StudyArguments, ModelConfig)
    args, model_args = parse_options(kinds, argv, "cud study")
    if args.recipe is not None:
        recipe = _read_recipe(args.recipe)
        shared = {name: value for name, value in recipe.items() if name in SHARED_FIELDS}
        args, model_args = parse_options(kinds, argv, "cud study", shared)
        _behind(args, {name: value for name, value in recipe.items() if name not in SHARED_FIELDS | RESERVED})
    if args.natural_group is not None:
        _behind(args, {"group_column": args.natural_group})
    return args, model_args


def _behind(args: StudyArguments, options: dict[str, Any]) -> None:
    """Options of `cud train` that hold where neither the grid nor `train` has them."""
    in_a_grid = {name for grid in args.grids for name in grid}
    args.train = {name: value for name, value in options.items() if name not in in_a_grid} | args.train  # type: ignore[operator]
    for grid in args.grids:  # what another mapping of the grid has cannot stand in `train`
        grid.update({name: [options[name]] for name in in_a_grid if name in options and name not in grid})


def _read_recipe(path: str) -> dict[str, Any]:
    recipe = read_yaml(path)
    unknown = [name for name in recipe if name not in SHARED_FIELDS | TRAIN_FIELDS]
    if unknown:
        raise ValueError(f"recipe {path}: a study has no place for {unknown[0]!r}")
    return recipe


def main(argv: list[str]) -> int:
    """Entry point of `cud study`."""
    from .report import first_seeds, reported, write_study

    args, model_args = read_arguments(argv)
    output = Path(args.output_dir)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output directory {output} is a file")
    if holds_something(output, [".lock"]) and not (output / "study.json").exists():
        raise ValueError(f"output directory {output} is not empty and holds no study; choose another one")
    tokenizer = load_tokenizer(model_args)
    forget, retain = args.load(tokenizer)
    group = args.train.get("group_column")  # type: ignore[union-attr]
    length = args.train.get("max_length", 1024)  # type: ignore[union-attr]
    prepared = [
        None if part is None else prepare_samples(part, tokenizer, max_length=length, name=name)
        for name, part in (("forget", forget), ("retain", retain), ("utility", args.load_utility(tokenizer)))
    ]
    if prepared[0] is not None and prepared[1] is not None:
        check_disjoint(prepared[0], prepared[1])
    if isinstance(group, str) and group not in forget.column_names:
        raise ValueError(f"forget dataset has no column {group!r}; it has {sorted(forget.column_names)}")
    base = {
        "model": _model_identity(model_args),
        "data": [None if part is None else part.fingerprint for part in prepared],
        "versions": versions(),
    }
    scores, runs = plan(args, base)
    output.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(output / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise ValueError(f"another study is running in {output}") from None
    try:
        remove_leftovers(output)
        _check_kept(output, [*scores, *runs], args.overwrite)
        kept = [*fields(DataArguments), *(f for f in fields(StudyArguments) if f.name.startswith("utility_"))]
        shared = {"model": vars(model_args), "data": {f.name: getattr(args, f.name) for f in kept}}
        write_json(output / "study.json", json.loads(json.dumps({"argv": argv, "shared": shared}, default=str)))
        started = time.time()
        failed = run_cells(scores, output, args)
        lost = {cell.name for cell in scores if cell.name in failed}
        ready = [cell for cell in runs if cell.settings["scores_cell"] not in lost]
        failed |= {c.name: "its difficulty scores failed" for c in runs if c not in ready}
        tried = first_seeds(ready, args.tuning_seeds)
        failed |= run_cells(tried, output, args)
        # The settings that lose on the first seeds are in no figure: their other seeds are not run.
        tried, ready = ([cell for cell in part if cell.name not in failed] for part in (tried, ready))
        ready = reported(output, ready, tried, args.retain_level, args.n_buckets)
        failed |= run_cells(ready, output, args)
        report = write_study(
            output, [cell for cell in ready if cell.name not in failed], failed, levels=args.retain_level,
            n_buckets=args.n_buckets, command="cud study " + " ".join(argv), seconds=time.time() - started,
            tuning_seeds=args.tuning_seeds,
            groups=list(forget[group]) if isinstance(group, str) else None,
        )  # fmt: skip
    finally:
        lock.release()
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if report is not None:
        print(f"report: {report.resolve()}")
    return 1 if failed else 0


def _model_identity(model_args: Any) -> dict[str, Any]:
    """Path and files of the model, and the adapter's options: cheap, and another one shows."""
    found: dict[str, Any] = {
        key: value
        for key, value in vars(model_args).items()
        if isinstance(value, (str, int, float, bool, list, type(None)))
    }
    folder = Path(model_args.model_name_or_path)
    if folder.is_dir():
        files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".bin"))
        found["files"] = {path.name: file_hash(path) for path in files}
    return found


def _check_kept(output: Path, cells: list[Cell], overwrite: bool) -> None:
    """Raise `ValueError` for the first finished cell with other settings, unless it may be replaced."""
    for cell in cells:
        known = output / "cells" / cell.name / "cell.json"
        if not known.exists():
            continue
        try:
            found = json.loads(known.read_text())
        except ValueError:
            found = {}
        if found.get("fingerprint") != cell.fingerprint:
            if not overwrite:
                changed = _changed(found.get("settings", {}), cell.settings)
                raise ValueError(
                    f"cell {cell.name} in {output} was run with other settings ({changed}); pass overwrite to run it "
                    "anew, or choose another output_dir"
                )
            for path in known.parent.iterdir():
                if path.is_file():
                    path.unlink()


def _changed(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Names of the settings that differ."""
    names = sorted({*old, *new})
    changed = [name for name in names if old.get(name) != new.get(name)]
    if "options" in changed:
        changed = [name for name in changed if name not in ("options", "scores", "scores_cell")]  # follow from them
        inner = {*old.get("options", {}), *new.get("options", {})}
        changed += [
            f"options.{n}" for n in sorted(inner) if old.get("options", {}).get(n) != new.get("options", {}).get(n)
        ]
    return ", ".join(changed) or "unreadable"


def run_cells(cells: list[Cell], output: Path, args: StudyArguments) -> dict[str, str]:
    """Run what is not finished, `workers` at a time; returns why cells failed, by name."""
    failed: dict[str, str] = {}
    todo: queue.SimpleQueue[Cell] = queue.SimpleQueue()
    for cell in cells:
        folder = output / "cells" / cell.name
        if (folder / "result.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        write_json(
            folder / "cell.json",
            {"fingerprint": cell.fingerprint, "kind": cell.kind, "choices": cell.choices, "settings": cell.settings},
        )
        todo.put(cell)
    kind = cells[0].kind if cells else "run"
    count = todo.qsize()
    workers = min(args.workers, count)
    places = args.devices or [""]

    def work(number: int) -> None:
        with Worker(output, places[number % len(places)], args.workers) as worker:
            while True:
                try:
                    cell = todo.get_nowait()
                except queue.Empty:
                    return
                reason = worker.run(cell)
                if reason is not None:
                    failed[cell.name] = reason
                bar.update()

    with (
        ThreadPoolExecutor(max(1, workers)) as pool,
        tqdm(total=len(cells), initial=len(cells) - count, desc=kind, unit="cell") as bar,
    ):
        for future in [pool.submit(work, number) for number in range(workers)]:
            future.result()
    return failed


class Worker:
    """A process that works on one cell after the other (`evaluation.study.cell`), so that each need not import torch.

    One that fails at a cell ends, and the next cell gets a new one. It ends, too, when this process does: its standard
    input is then closed.

    Args:
        study: folder of the study.
        device: for CUDA_VISIBLE_DEVICES; empty for all.
        workers: how many share the cores.
    """

    def __init__(self, study: Path, device: str, workers: int) -> None:
        self.study = study
        self.environment = dict(os.environ)
        self.environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
        if device:
            self.environment["CUDA_VISIBLE_DEVICES"] = device
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.process is not None:
            self.process.stdin.close()  # type: ignore[union-attr]
            self.process.wait()

    def run(self, cell: Cell) -> str | None:
        """Have a cell done; `None`, or why it failed in one line."""
        if self.process is None:
            command = [sys.executable, "-m", "evaluation.study.cell", str(self.study)]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment
            )
        folder = self.study / "cells" / cell.name
        log = folder / "log.txt"
        log.unlink(missing_ok=True)
        with contextlib.suppress(BrokenPipeError):  # it died between two cells; the log says so
            self.process.stdin.write(f"{cell.name}\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
        answer = self.process.stdout.readline()  # type: ignore[union-attr]
        code = 0
        if not answer:
            code, self.process = self.process.wait(), None
        if (folder / "result.json").exists():
            return None
        if code == errno.ENOSPC:
            return f"the disk is full: cannot write to {folder}"
        text = log.read_text(errors="replace") if log.exists() else ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return f"{lines[-1][:300] if lines else 'no output'} (exit code {code}; {log})"
