"""What a study knows beside its runs: samples that no loss sees, and a model that never saw the forget set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from cud_trainer.data import evenly_spaced, prepare_samples
from cud_trainer.data.groups import check_groups
from cud_trainer.data.samples import check_unseen
from cud_trainer.models.fingerprint import file_hash

from .data import OPTIONS_OF_TEXT, StudyData, preparation
from .grid import Cell
from .options import StudyArguments

REFERENCE = "never-seen"


@dataclass(frozen=True)
class HeldOut:
    """Attributes:
    groups: of each held-out sample that is measured; its id, without a `group_column`.
    fingerprint: of these samples.
    """

    groups: list[Any]
    fingerprint: str


@dataclass(frozen=True)
class Unseen:
    """What the forget samples of a study would get, had they never been in the data.

    Attributes:
        reference: answer probability of each forget sample under a model that never saw them, `[N]`; `None` without.
        holdout: the same of the never-seen samples, `[M]`; `None` likewise.
        groups: of each never-seen sample; `None` where they have no `group_column`.
    """

    reference: np.ndarray | None = None
    holdout: np.ndarray | None = None
    groups: list[Any] | None = None


def identity_of_heldout(args: StudyArguments, data: StudyData) -> HeldOut | None:
    """The held-out samples of a study, checked; `None` without.

    Raises:
        ValueError: naming a sample or a group that a loss sees, too.
    """
    held_out, raw, column = data.samples.get("held-out"), data.raw, data.group_column
    if held_out is None:
        return None
    if column is not None and column not in raw["held-out"].column_names:
        raise ValueError(f"held-out dataset has no column {column!r}; it has {sorted(raw['held-out'].column_names)}")
    for name in ("forget", "retain"):
        if name in raw:
            check_unseen(held_out, data.samples[name], name)
            if column is not None and column in raw[name].column_names:
                check_groups(raw["held-out"][column], raw[name][column], column, name)
    measured = evenly_spaced(held_out, args.heldout_samples)
    groups = measured.ids if column is None else evenly_spaced(raw["held-out"], args.heldout_samples)[column]
    return HeldOut(list(groups), measured.fingerprint)


def reference_cell(args: StudyArguments, base: dict[str, Any]) -> list[Cell]:
    """The cell that asks a model that never saw the forget set; none where the study names none."""
    if args.reference_model is None:
        return []
    folder = Path(args.reference_model)
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.json")) if folder.is_dir() else []
    settings = {
        **base,
        "kind": REFERENCE,
        "reference_model": args.reference_model,
        "files": {path.name: file_hash(path) for path in files},
        "options": {name: value for name, value in dict(args.train).items() if name in OPTIONS_OF_TEXT},  # type: ignore[arg-type]
    }
    return [Cell(REFERENCE, REFERENCE, {}, settings)]


def ask_reference(
    settings: dict[str, Any], forget: Dataset, holdout: Dataset | None, tokenizer: Any, day: str | None
) -> dict[str, Any]:
    """What the work on a reference cell leaves: answer probability of every forget and every never-seen sample."""
    from cud_trainer.logprobs import answer_probability
    from cud_trainer.models.loading import load_causal_lm

    how = preparation(settings["options"], day)
    raw = {"forget": forget, "holdout": holdout}
    sets = {name: prepare_samples(part, tokenizer, name=name, **how) for name, part in raw.items() if part is not None}
    model = load_causal_lm(settings["reference_model"], dtype="float32")
    return {name: answer_probability(model, samples).tolist() for name, samples in sets.items()}
