"""The oracle of a study: what uniform runs of other seeds have left, as a difficulty. No prediction can know more."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cud_trainer import DifficultyScores
from cud_trainer.commands.early import ORACLE

from ..trajectory import averaged_residual
from .grid import Cell
from .runs import Run

OUTCOME = "outcome"


def is_oracle(cell: Cell) -> bool:
    """Whether the difficulty of a run cell is the outcome of other runs."""
    return bool(cell.settings.get(ORACLE))


def with_outcome(cell: Cell, uniform: Sequence[Run]) -> tuple[Cell, Cell] | None:
    """The cell of scores that an oracle's run waits for, and the run that builds on it; `None` when no uniform run of
    another seed has finished.

    Args:
        uniform: finished runs of the same panel, with the settings that are reported.
    """
    others = [run for run in uniform if run.seed != int(cell.settings["options"].get("seed", 42))]
    if not others:
        return None
    sources = {run.cell.name: run.cell.fingerprint for run in others}
    base: dict[str, Any] = {
        name: cell.settings[name] for name in ("model", "data", "versions") if name in cell.settings
    }
    number = hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:8]
    scores = Cell(OUTCOME, f"outcome-{number}", {}, {**base, "kind": OUTCOME, "sources": sources})
    settings = {**cell.settings, "scores": scores.fingerprint, "scores_cell": scores.name}
    return scores, replace(cell, settings=settings)


def save_outcome(study: Path, cell: Cell) -> dict[str, Any]:
    """What the work on a cell of scores leaves: residual memorisation, mean over the runs; more left = harder."""
    residuals, ids = [], []
    for name in cell.settings["sources"]:
        result = json.loads((study / "cells" / name / "result.json").read_text())
        residuals.append(averaged_residual([np.array(values) for values in result["forget"]])[0])
        ids = result["forget_ids"]
    scores = DifficultyScores(ids, {ORACLE: np.mean(residuals, axis=0)}, provenance={"source": "runs of other seeds"})
    scores.save(study / "cells" / cell.name / "scores.parquet", overwrite=True)
    return {"metrics": scores.metrics}
