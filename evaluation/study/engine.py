"""A study from its options to its finished runs: what is checked, what runs in which order, what is skipped.

Settings are tried on the first seeds; the other seeds are run for those that won only. A finished cell is recognised by
the fingerprint of everything its outcome depends on, and skipped: a study that was killed goes on where it was.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from trl import ModelConfig

from cud_trainer.commands.options import DataArguments, inputs_of
from cud_trainer.data.ids import IdKey, given_key
from cud_trainer.files import check_output_dir, holds_something, remove_leftovers, write_json
from cud_trainer.models.fingerprint import file_hash, versions
from cud_trainer.ownership import REPORT_FILES, check_no_input, clear, owned
from cud_trainer.registry import imported_files

from ..endpoint import worst_quarter
from .data import StudyData
from .extend import grow, is_wanted
from .grid import Cell, plan
from .heldout import Unseen, identity_of_heldout, reference_cell
from .jobs import Jobs, withdraw
from .keys import key_of_study
from .options import StudyArguments
from .oracle import is_oracle, with_outcome
from .pool import Executor, Pool
from .runs import BASE, Run, coordinates, first_seeds, grouped, reported, tuned

logger = logging.getLogger(__name__)

Attach = Callable[[list[Cell], list[Cell]], tuple[list[Cell], list[Cell]]]


@dataclass(frozen=True)
class Finished:
    """What a study has come to.

    Attributes:
        folder: of the study.
        args: its options.
        cells: the runs that figures are made of.
        failed: why a cell failed, by name; these are in no figure.
        groups: of each forget sample, where the study has a `group_column`.
        seconds: that this start took.
        heldout_groups: of each held-out sample that is measured, where there are any.
        never_seen: worst quarter of the forget set under a model that never saw it, where the study knows of one.
        unseen: what that model, or never-seen samples, say.
    """

    folder: Path
    args: StudyArguments
    cells: list[Cell]
    failed: dict[str, str]
    groups: list[Any] | None
    seconds: float
    heldout_groups: list[Any] | None = None
    never_seen: float | None = None
    unseen: Unseen = field(default_factory=Unseen)

    def runs(self) -> list[Run]:
        """`cells`, read."""
        return [Run(self.folder, cell, self.args.n_buckets, self.never_seen) for cell in self.cells]


class Study:
    """A study that has been checked; nothing has run yet, and nothing has been written.

    Raises:
        ValueError: for whatever is wrong with the folder, the data, the model or any cell.
    """

    def __init__(self, args: StudyArguments, model_args: ModelConfig) -> None:
        self.args, self.model_args, self.folder = args, model_args, Path(args.output_dir)
        check_no_input(self.folder, inputs_of(args, model_args))
        check_output_dir(self.folder, overwrite=True)
        if holds_something(self.folder) and not (self.folder / "study.json").exists():
            raise ValueError(f"output directory {self.folder} is not empty and holds no study; choose another one")
        data = StudyData.read(args, model_args)
        heldout = identity_of_heldout(args, data)
        self.groups, self.heldout_groups = data.groups, None if heldout is None else heldout.groups
        self.unseen_groups = data.unseen_groups
        fingerprints = data.fingerprints + ([] if heldout is None else [heldout.fingerprint])
        self.key = key_of_study(args, self.folder)
        fingerprints = self.key.keyed_values(fingerprints)
        base = {"model": _identity_of_model(model_args), "data": fingerprints, "versions": versions()}
        if imported_files():  # what they register decides on every outcome
            base["imports"] = [file_hash(path) for path in imported_files()]
        self.reference = reference_cell(args, base)
        self.base = base
        self.scores, self.cells = plan(args, base)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While no other study may run in this folder.

        Raises:
            ValueError: when one does.
        """
        with owned(self.folder, "study"):
            yield

    def progress(self) -> str:
        """How many cells are finished, in a sentence; not all of them need be run (see `runs.reported`)."""
        cells = [*self.reference, *self.scores, *self.cells]
        done = sum((self.folder / "cells" / cell.name / "result.json").exists() for cell in cells)
        return f"{done} cells are finished, of {len(cells)} at most, in {self.folder / 'cells'}."

    def run(self, argv: Sequence[str] = (), pool: Executor | None = None) -> Finished:
        """Run what is not finished, in `pool`, or one of its own.

        Args:
            argv: the command line, to be kept.

        Raises:
            ValueError: for a finished cell with other settings, unless it may be replaced.
        """
        args, folder = self.args, self.folder
        remove_leftovers(folder)
        known = [cell for cell in self.cells if not is_oracle(cell)]  # what an oracle builds on is not
        check_finished(folder, [*self.reference, *self.scores, *known], args.overwrite)
        planned = _hash_of([*self.reference, *self.scores, *self.cells])
        if args.overwrite:
            clear(folder, REPORT_FILES)
            if _planned(folder) != planned:  # else it goes on, with cells by which its grid grew
                remove_others(folder, [*self.reference, *self.scores, *self.cells])
        names = [f.name for f in fields(DataArguments)]
        names += [
            f.name
            for f in fields(StudyArguments)
            if f.name.startswith(("utility_", "heldout_", "holdout_", "relearn_"))
        ]
        shared = {
            "model": vars(self.model_args),
            "data": {name: getattr(args, name) for name in names},
            "day": _day_of(folder),
            "imports": [str(path) for path in imported_files()],
        }
        if given_key() is None:
            IdKey.made(self.key.path, self.key.secret)
        content = {"argv": list(argv), "planned": planned, "shared": shared}
        write_json(folder / "study.json", json.loads(json.dumps(content, default=str)))
        started = time.time()
        with nullcontext(pool) if pool is not None else _executor(args, folder) as pool:
            unseen = what_is_never_seen(args, folder, self.reference, pool, self.unseen_groups)
            never_seen = args.never_seen if unseen.reference is None else float(worst_quarter(unseen.reference))
            work = _Work(args, folder, self.base, pool, never_seen)
            cells = work.extended(self.scores, known, lambda scores, cells: (scores, cells))
            oracles = [cell for cell in self.cells if is_oracle(cell)]
            cells += work.oracles(oracles, cells) if oracles else []
        seconds = time.time() - started
        known_of = self.heldout_groups, never_seen, unseen
        return Finished(folder, args, cells, work.failed, self.groups, seconds, *known_of)


@dataclass
class _Work:
    """The cells of a study, run in the order in which they need each other; `failed` says which did not finish."""

    args: StudyArguments
    folder: Path
    base: dict[str, Any]
    pool: Executor
    never_seen: float | None
    failed: dict[str, str] = field(default_factory=dict)

    def extended(self, scores: list[Cell], cells: list[Cell], attach: Attach) -> list[Cell]:
        """`all` of these cells, and of those of values beyond an end of the grid at which a best setting lies.

        Args:
            attach: makes cells of a grown grid ready to run, their scores first.
        """
        args = self.args
        for _ in range(args.extensions or 0 if args.tunes else 0):
            runs = [self.read(cell) for cell in self.tried(scores, cells)]
            args, wanted = grow(args, runs)
            if not wanted:
                break
            more_scores, more = attach(*plan(args, self.base))
            names = {cell.name for cell in (*scores, *cells)}
            more = [cell for cell in more if cell.name not in names and is_wanted(cell, wanted)]
            used = {cell.settings["scores_cell"] for cell in more}
            more_scores = [cell for cell in more_scores if cell.name in used and cell.name not in names]
            check_finished(self.folder, [*more_scores, *more], self.args.overwrite)
            scores, cells = [*scores, *more_scores], [*cells, *more]
        return self.all(scores, cells)

    def read(self, cell: Cell) -> Run:
        return Run(self.folder, cell, self.args.n_buckets, self.never_seen)

    def tried(self, scores: list[Cell], cells: list[Cell]) -> list[Cell]:
        """The cells that decide which settings are reported, as far as they finish."""
        failed = self.pool.run(self.folder, scores)
        lost = {cell.name for cell in scores if cell.name in failed}
        tried = first_seeds([c for c in cells if c.settings["scores_cell"] not in lost], self.args.tuning_seeds)
        failed |= self.pool.run(self.folder, tried)
        return [cell for cell in tried if cell.name not in failed]

    def all(self, scores: list[Cell], cells: list[Cell]) -> list[Cell]:
        """Scores, settings on the first seeds, and the other seeds of those that won; returns what figures are of."""
        args, folder, pool = self.args, self.folder, self.pool
        failed = pool.run(folder, scores)
        lost = {cell.name for cell in scores if cell.name in failed}
        ready = [cell for cell in cells if cell.settings["scores_cell"] not in lost]
        failed |= {c.name: "its difficulty scores failed" for c in cells if c not in ready}
        tried = first_seeds(ready, args.tuning_seeds)
        failed |= pool.run(folder, tried)
        # The settings that lose on the first seeds are in no figure: their other seeds are not run.
        tried, ready = ([cell for cell in part if cell.name not in failed] for part in (tried, ready))
        ready = reported(folder, ready, tried, args.retain_level, args.n_buckets, args.tune_on, self.never_seen)
        failed |= pool.run(folder, ready)
        self.failed |= failed
        return [cell for cell in ready if cell.name not in failed]

    def oracles(self, cells: list[Cell], finished: list[Cell]) -> list[Cell]:
        """The same of runs whose difficulty is what finished uniform runs of other seeds have left."""
        args, known = self.args, {}
        uniform = [self.read(cell) for cell in finished if coordinates(cell).schedule == BASE]
        for panel, same in grouped(uniform, attrgetter("panel")).items():
            best = tuned(same, args.retain_level[0], args.tuning_seeds, args.tune_on)[0].tuning
            known[panel] = [run for run in same if run.tuning == best]

        def attach(_: list[Cell], cells: list[Cell]) -> tuple[list[Cell], list[Cell]]:
            pairs = {c.name: with_outcome(c, known.get(coordinates(c).panel, [])) for c in cells if is_oracle(c)}
            without = [name for name, pair in pairs.items() if pair is None]
            self.failed |= dict.fromkeys(without, "no uniform run of another seed has finished")
            made = [pair for pair in pairs.values() if pair is not None]
            return list({scores.name: scores for scores, _ in made}.values()), [cell for _, cell in made]

        scores, ready = attach([], cells)
        check_finished(self.folder, [*scores, *ready], args.overwrite)
        return self.extended(scores, ready, attach) if ready else []


def _executor(args: StudyArguments, folder: Path) -> Executor:
    """What the cells of a study run in."""
    if args.executor == "slurm":
        return Jobs(folder, args.slurm, args.workers)  # type: ignore[arg-type]
    for job in folder.glob("cells/*/job.json"):  # of a start on a cluster
        withdraw(job.parent)
    return Pool(args.workers or 1, args.devices)


def _day_of(folder: Path) -> str:
    """The day on which the study began: what is today for chat templates in all its cells."""
    try:
        return str(json.loads((folder / "study.json").read_text())["shared"]["day"])
    except (OSError, ValueError, KeyError, TypeError):
        return datetime.date.today().isoformat()


def run_study(args: StudyArguments, model_args: ModelConfig, pool: Executor | None = None) -> Finished:
    """Check a study and run it, in `pool`, or one of its own; it writes no report."""
    study = Study(args, model_args)
    with study.locked():
        return study.run(pool=pool)


def what_is_never_seen(
    args: StudyArguments, folder: Path, cells: list[Cell], pool: Executor, groups: list[Any] | None
) -> Unseen:
    """What the reference model says, where there is one.

    Args:
        groups: of the never-seen samples.

    Raises:
        ValueError: when that model cannot be asked.
    """
    if not cells:
        return Unseen(groups=groups)
    for reason in pool.run(folder, cells).values():
        raise ValueError(f"the reference model {args.reference_model!r} cannot be asked: {reason}")
    result = json.loads((folder / "cells" / cells[0].name / "result.json").read_text())
    holdout = np.array(result["holdout"]) if "holdout" in result else None
    return Unseen(np.array(result["forget"]), holdout, groups)


def check_finished(folder: Path, cells: Sequence[Cell], overwrite: bool) -> None:
    """Raise `ValueError` for the first finished cell with other settings, unless it may be replaced."""
    for cell in cells:
        path = folder / "cells" / cell.name / "cell.json"
        if not path.exists():
            continue
        try:
            before = json.loads(path.read_text())
        except ValueError:
            before = {}
        if not isinstance(before, dict):
            before = {}
        if before.get("fingerprint") != cell.fingerprint:
            if not overwrite:
                changed = _changed(before.get("settings", {}), cell.settings)
                raise ValueError(
                    f"cell {cell.name} in {folder} was run with other settings ({changed}); pass overwrite to run it "
                    "anew, or choose another output_dir"
                )
            withdraw(path.parent)
            for file in path.parent.iterdir():
                if file.is_file():
                    file.unlink()


def remove_others(folder: Path, cells: Sequence[Cell]) -> None:
    """Remove every cell that is none of these: of a study that is overwritten nothing stays, and this is said."""
    names = {cell.name for cell in cells}
    others = [path for path in sorted((folder / "cells").glob("*/")) if path.name not in names]
    for path in others:
        shutil.rmtree(path)
    if others:
        shown = ", ".join(path.name for path in others[:5]) + (", ..." if len(others) > 5 else "")
        logger.warning(f"{folder}: removed {len(others)} cells of the study that was overwritten: {shown}")


def _hash_of(cells: Sequence[Cell]) -> str:
    return hashlib.sha256(json.dumps(sorted((cell.name, cell.fingerprint) for cell in cells)).encode()).hexdigest()[:16]


def _planned(folder: Path) -> str | None:
    """`_hash_of` the cells that the study in this folder had before its grid grew."""
    try:
        return str(json.loads((folder / "study.json").read_text())["planned"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


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


def _identity_of_model(model_args: ModelConfig) -> dict[str, Any]:
    """Path and files of the model, and the adapter's options: cheap, and another one shows."""
    identity: dict[str, Any] = {
        key: value
        for key, value in vars(model_args).items()
        if isinstance(value, (str, int, float, bool, list, type(None)))
    }
    folder = Path(str(model_args.model_name_or_path))
    if folder.is_dir():
        files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".bin"))
        identity["files"] = {path.name: file_hash(path) for path in files}
    return identity
