"""`cud study`: many unlearning runs that differ in chosen options, compared at matched retain utility.

Every piece of work is a cell with a folder of its own, run by a process of its own (`evaluation.study_cell`): one that
fails, or whose process is killed, does not take the others with it. A finished cell is recognised by the fingerprint of
everything its outcome depends on, and skipped.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from trl import ModelConfig

from cud_trainer import CUDConfig
from cud_trainer.arguments import parse_options
from cud_trainer.commands import DataArguments, load_tokenizer
from cud_trainer.data import check_disjoint, dataset_fingerprint, prepare_dataset
from cud_trainer.difficulty.scores import merge_metrics
from cud_trainer.files import holds_something, remove_leftovers, write_json
from cud_trainer.fingerprint import versions

TRAIN_FIELDS = {f.name for f in fields(CUDConfig)}
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
    grid: dict[str, Any] | str = field(
        default_factory=dict,
        metadata={"help": "Options of `cud train` with a list of values each; a cell for every combination."},
    )
    train: dict[str, Any] | str = field(
        default_factory=dict, metadata={"help": "Options of `cud train` that all cells share."}
    )
    workers: int = field(default=1, metadata={"help": "Cells at a time."})
    devices: list[str] = field(
        default_factory=list,
        metadata={"help": "GPUs to deal the cells to (CUDA_VISIBLE_DEVICES of each), for example 0 1 2."},
    )
    snapshot_every: int = field(
        default=1, metadata={"help": "Optimizer steps between two points of a trade-off curve."}
    )
    retain_eval_samples: int = field(
        default=200, metadata={"help": "Retain samples whose probability is the utility of a curve, evenly spaced."}
    )
    retain_level: float = field(
        default=0.95, metadata={"help": "Conditions are compared at this share of the starting retain probability."}
    )
    n_buckets: int = field(default=4, metadata={"help": "Difficulty buckets, equal in size."})
    overwrite: bool = field(default=False, metadata={"help": "Replace cells that were run with other settings."})

    def __post_init__(self) -> None:
        for name in ("grid", "train"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} must be a mapping of options, got {getattr(self, name)!r}")
        if not self.grid:
            raise ValueError(
                "grid is empty: give options with a list of values, for example {schedule: [uniform, ...]}"
            )
        for name, values in self.grid.items():  # type: ignore[union-attr]
            if not isinstance(values, list) or not values:
                raise ValueError(f"grid: {name} needs a list of values, got {values!r}")
            if len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
                raise ValueError(f"grid: {name} has a value twice: {values}")
        for name in [*self.grid, *self.train]:
            if name not in TRAIN_FIELDS or name in RESERVED:
                why = "is set by the study itself" if name in RESERVED else "is no option of `cud train`"
                raise ValueError(f"{name!r} {why}")
        both = sorted(set(self.grid) & set(self.train))
        if both:
            raise ValueError(f"{both[0]!r} is both in grid and in train")
        for name in ("workers", "snapshot_every", "retain_eval_samples", "n_buckets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.retain_level < 1:
            raise ValueError(f"retain_level must be between 0 and 1, got {self.retain_level}")


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
    grid, train = dict(args.grid), dict(args.train)  # type: ignore[arg-type]
    names = list(grid)
    combinations = [dict(zip(names, values, strict=True)) for values in itertools.product(*grid.values())]
    metrics: dict[str, list[str]] = {}
    configs = []
    for choices in combinations:
        options = {**train, **choices}
        try:
            config = CUDConfig("unused", **{"report_to": "none", **options})
        except (ValueError, TypeError) as error:
            raise ValueError(f"cell {_named(choices)}: {error}") from None
        configs.append(config)
        found = metrics.setdefault(_scores_key(options), [])
        if config.difficulty is not None:
            found += [config.difficulty, *config.schedule_metrics]
    scores: dict[str, Cell] = {}
    runs = []
    for choices, config in zip(combinations, configs, strict=True):
        options = {**train, **choices}
        key = _scores_key(options)
        if config.difficulty is not None and key not in scores:
            own = {name: value for name, value in options.items() if name not in NOT_OF_SCORES}
            needed = merge_metrics(metrics[key][0], [*metrics[key][1:], "loss", "length"])
            settings = {**base, "kind": "scores", "options": own, "metrics": needed}
            number = hashlib.sha256(key.encode()).hexdigest()[:8]
            shared = {name: value for name, value in choices.items() if name not in NOT_OF_SCORES}
            scores[key] = Cell("scores", f"scores-{number}", shared, settings)
        settings = {
            **base, "kind": "run", "options": options, "snapshot_every": args.snapshot_every,
            "retain_eval_samples": args.retain_eval_samples,
            "scores": scores[key].fingerprint if key in scores else None,
            "scores_cell": scores[key].name if key in scores else None,
        }  # fmt: skip
        runs.append(Cell("run", _named(choices), choices, settings))
    if len({cell.name for cell in runs}) < len(runs):  # values that differ in what a name cannot show
        runs = [Cell(c.kind, f"{c.name}-{c.fingerprint[:6]}", c.choices, c.settings) for c in runs]
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


def main(argv: list[str]) -> int:
    """Entry point of `cud study`."""
    from .study_report import write_study

    args, model_args = parse_options((StudyArguments, ModelConfig), argv, "cud study")
    output = Path(args.output_dir)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output directory {output} is a file")
    if holds_something(output, [".lock"]) and not (output / "study.json").exists():
        raise ValueError(f"output directory {output} is not empty and holds no study; choose another one")
    forget, retain = args.load()
    tokenizer = load_tokenizer(model_args)
    group = {**args.train, **args.grid}.get("group_column")
    prepared = [
        None
        if part is None
        else prepare_dataset(part, tokenizer, max_length=args.train.get("max_length", 1024), name=name)
        for name, part in (("forget", forget), ("retain", retain))
    ]
    if prepared[0] is not None and prepared[1] is not None:
        check_disjoint(prepared[0], prepared[1])
    if isinstance(group, str) and group not in forget.column_names:
        raise ValueError(f"forget dataset has no column {group!r}; it has {sorted(forget.column_names)}")
    base = {
        "model": _model_identity(model_args),
        "data": [None if part is None else dataset_fingerprint(part) for part in prepared],
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
        shared = {"model": vars(model_args), "data": {f.name: getattr(args, f.name) for f in fields(DataArguments)}}
        write_json(output / "study.json", json.loads(json.dumps({"argv": argv, "shared": shared}, default=str)))
        started = time.time()
        failed = run_cells(scores, output, args)
        lost = {cell.name for cell in scores if cell.name in failed}
        ready = [cell for cell in runs if cell.settings["scores_cell"] not in lost]
        failed |= {c.name: "its difficulty scores failed" for c in runs if c not in ready}
        failed |= run_cells(ready, output, args)
        report = write_study(
            output, [cell for cell in runs if cell.name not in failed], failed, retain_level=args.retain_level,
            n_buckets=args.n_buckets, command="cud study " + " ".join(argv), seconds=time.time() - started,
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
    found = {
        key: value
        for key, value in vars(model_args).items()
        if isinstance(value, (str, int, float, bool, list, type(None)))
    }
    folder = Path(model_args.model_name_or_path)
    if folder.is_dir():
        digest = hashlib.sha256()
        for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".bin")):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        found["files"] = digest.hexdigest()[:16]
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
    todo = []
    for cell in cells:
        folder = output / "cells" / cell.name
        if (folder / "result.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        write_json(
            folder / "cell.json",
            {"fingerprint": cell.fingerprint, "kind": cell.kind, "choices": cell.choices, "settings": cell.settings},
        )
        todo.append(cell)
    kind = cells[0].kind if cells else "run"
    places = args.devices or [""]
    with (
        ThreadPoolExecutor(args.workers) as pool,
        tqdm(total=len(cells), initial=len(cells) - len(todo), desc=kind, unit="cell") as bar,
    ):
        started = {
            pool.submit(_run_cell, output, cell, places[number % len(places)], args.workers): cell
            for number, cell in enumerate(todo)
        }
        for future in as_completed(started):
            reason = future.result()
            if reason is not None:
                failed[started[future].name] = reason
            bar.update()
    return failed


def _run_cell(output: Path, cell: Cell, device: str, workers: int) -> str | None:
    """Run a cell in a process of its own; `None`, or why it failed in one line."""
    folder = output / "cells" / cell.name
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    if device:
        environment["CUDA_VISIBLE_DEVICES"] = device
    command = [sys.executable, "-m", "evaluation.study_cell", str(output), cell.name]
    inherited, held = os.pipe()  # nothing is written: that it is closed tells the cell that this process is gone
    try:
        with (folder / "log.txt").open("w") as log:
            done = subprocess.run(
                command, stdin=inherited, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
            )
    finally:
        os.close(inherited)
        os.close(held)
    if (folder / "result.json").exists():
        return None
    if done.returncode == errno.ENOSPC:
        return f"the disk is full: cannot write to {folder}"
    lines = [line.strip() for line in (folder / "log.txt").read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "no output"
    return f"{last} (exit code {done.returncode}; {folder / 'log.txt'})"
