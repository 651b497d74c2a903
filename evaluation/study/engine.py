"""A study from its options to its finished runs: what is checked, what runs in which order, what is skipped.

Settings are tried on the first seeds; the other seeds are run for those that won only. A finished cell is recognised by
the fingerprint of everything its outcome depends on, and skipped: a study that was killed goes on where it was.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trl import ModelConfig

from cud_trainer.commands.options import DataArguments, inputs_of, load_tokenizer
from cud_trainer.data import check_disjoint, prepare_samples
from cud_trainer.data.template import TRAIN_ON, TemplateContext
from cud_trainer.files import check_output_dir, holds_something, remove_leftovers, write_json
from cud_trainer.models.fingerprint import file_hash, versions
from cud_trainer.ownership import REPORT_FILES, check_no_input, clear, owned

from .grid import Cell, plan
from .options import StudyArguments
from .pool import Pool
from .runs import Run, first_seeds, reported


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
    """

    folder: Path
    args: StudyArguments
    cells: list[Cell]
    failed: dict[str, str]
    groups: list[Any] | None
    seconds: float

    def runs(self) -> list[Run]:
        """`cells`, read."""
        return [Run(self.folder, cell, self.args.n_buckets) for cell in self.cells]


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
        data, self.groups = _identity_of_data(args, model_args)
        base = {"model": _identity_of_model(model_args), "data": data, "versions": versions()}
        self.scores, self.cells = plan(args, base)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While no other study may run in this folder.

        Raises:
            ValueError: when one does.
        """
        with owned(self.folder, "study"):
            yield

    def run(self, argv: Sequence[str] = (), pool: Pool | None = None) -> Finished:
        """Run what is not finished, in `pool`, or one of its own.

        Args:
            argv: the command line, to be kept.

        Raises:
            ValueError: for a finished cell with other settings, unless it may be replaced.
        """
        args, folder = self.args, self.folder
        remove_leftovers(folder)
        check_finished(folder, [*self.scores, *self.cells], args.overwrite)
        if args.overwrite:
            clear(folder, REPORT_FILES)
        names = [f.name for f in fields(DataArguments)]
        names += [f.name for f in fields(StudyArguments) if f.name.startswith("utility_")]
        shared = {
            "model": vars(self.model_args),
            "data": {name: getattr(args, name) for name in names},
            "day": _day_of(folder),
        }
        write_json(folder / "study.json", json.loads(json.dumps({"argv": list(argv), "shared": shared}, default=str)))
        started = time.time()
        with nullcontext(pool) if pool is not None else Pool(args.workers, args.devices) as pool:
            failed = pool.run(folder, self.scores)
            lost = {cell.name for cell in self.scores if cell.name in failed}
            ready = [cell for cell in self.cells if cell.settings["scores_cell"] not in lost]
            failed |= {c.name: "its difficulty scores failed" for c in self.cells if c not in ready}
            tried = first_seeds(ready, args.tuning_seeds)
            failed |= pool.run(folder, tried)
            # The settings that lose on the first seeds are in no figure: their other seeds are not run.
            tried, ready = ([cell for cell in part if cell.name not in failed] for part in (tried, ready))
            ready = reported(folder, ready, tried, args.retain_level, args.n_buckets, args.tune_on)
            failed |= pool.run(folder, ready)
        cells = [cell for cell in ready if cell.name not in failed]
        return Finished(folder, args, cells, failed, self.groups, time.time() - started)


def _day_of(folder: Path) -> str:
    """The day on which the study began: what is today for chat templates in all its cells."""
    try:
        return str(json.loads((folder / "study.json").read_text())["shared"]["day"])
    except (OSError, ValueError, KeyError, TypeError):
        return datetime.date.today().isoformat()


def run_study(args: StudyArguments, model_args: ModelConfig, pool: Pool | None = None) -> Finished:
    """Check a study and run it, in `pool`, or one of its own; it writes no report."""
    study = Study(args, model_args)
    with study.locked():
        return study.run(pool=pool)


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
        if before.get("fingerprint") != cell.fingerprint:
            if not overwrite:
                changed = _changed(before.get("settings", {}), cell.settings)
                raise ValueError(
                    f"cell {cell.name} in {folder} was run with other settings ({changed}); pass overwrite to run it "
                    "anew, or choose another output_dir"
                )
            for file in path.parent.iterdir():
                if file.is_file():
                    file.unlink()


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


def _identity_of_data(args: StudyArguments, model_args: ModelConfig) -> tuple[list[str | None], list[Any] | None]:
    """Fingerprints of forget set, retain set and what measures utility, and the group of each forget sample."""
    train: dict[str, Any] = dict(args.train)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(model_args, SimpleNamespace(**train))
    told = train.get("chat_template_kwargs") or {}
    seen = TemplateContext(train.get("system_prompt"), told, train.get("train_on", TRAIN_ON[0]))
    forget, retain = args.load(tokenizer)
    group = args.train.get("group_column")  # type: ignore[union-attr]
    length = args.train.get("max_length", 1024)  # type: ignore[union-attr]
    prepared = [
        None if part is None else prepare_samples(part, tokenizer, max_length=length, name=name, template=seen)
        for name, part in (("forget", forget), ("retain", retain), ("utility", args.load_utility(tokenizer)))
    ]
    if prepared[0] is not None and prepared[1] is not None:
        check_disjoint(prepared[0], prepared[1])
    if isinstance(group, str) and group not in forget.column_names:
        raise ValueError(f"forget dataset has no column {group!r}; it has {sorted(forget.column_names)}")
    fingerprints = [None if part is None else part.fingerprint for part in prepared]
    return fingerprints, list(forget[group]) if isinstance(group, str) else None


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
