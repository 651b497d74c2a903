"""What an attack on the weights brings back of the forget set, always beside what it does to never-seen samples.

A few steps of fine-tuning, or rounding, move the probability of any text. Only what forget samples gain beyond samples
that no model ever saw says that something was hidden. Without such samples it cannot be told, and nothing else is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cud_trainer.difficulty import Buckets

from .. import statistics as stats
from ..metrics.robustness import Relearned
from ..statistics import Interval
from .cells import Cell, interval_text, mean, missing, shown
from .schema import AttackRow, Table
from .tables import masks_of, table
from .verdict import MARGIN

NEVER_SEEN = "never-seen samples"
BEYOND = f"change beyond {NEVER_SEEN}"
VISIBLE = 5e-4  # what is less is shown as 0.000
NO_CONTROL = "needs never-seen samples: holdout_dataset"


@dataclass(frozen=True)
class Groups:
    """Of the samples of either side, for intervals over groups where samples of one hang together.

    Attributes:
        forget, control: `N` and `M` names; `None`: each sample for itself.
    """

    forget: Sequence[Any] | None = None
    control: Sequence[Any] | None = None

    def of(self, rows: np.ndarray) -> tuple[list[Any] | None, Sequence[Any] | None]:
        """Of some of the forget samples, and of the control."""
        return some(self.forget, rows), self.control

    @property
    def over(self) -> str:
        return "samples" if self.forget is None else "groups"


def some(names: Sequence[Any] | None, rows: np.ndarray) -> list[Any] | None:
    """The names of some rows, bool `[N]`."""
    return None if names is None else [name for name, own in zip(names, rows, strict=True) if own]


def attack_row(
    attack: str,
    condition: str,
    change: np.ndarray,
    control: np.ndarray | None,
    groups: Groups,
    seed: int,
    rows: np.ndarray | None = None,
) -> AttackRow:
    """What an attack changes, and by how much that is more than what it changes of never-seen samples.

    Args:
        change: answer probability under the attack less that without, of each forget sample, `[N]`.
        control: the same of never-seen samples, `[M]`; `None` without such.
        rows: the forget samples that are looked at, bool `[N]`; all by default.
    """
    rows = np.ones(len(change), dtype=bool) if rows is None else rows
    own = groups.of(rows)
    made = AttackRow(
        attack=attack,
        condition=condition,
        n=int(rows.sum()),
        over=groups.over,
        change=stats.difference_of_means(change[rows], np.zeros(1), groups=(own[0], None), seed=seed),
    )
    if control is not None:
        made.n_control = len(control)
        made.control = stats.difference_of_means(control, np.zeros(1), groups=(own[1], None), seed=seed)
        made.beyond = stats.difference_of_means(change[rows], control, groups=own, seed=seed)
    return made


def said(row: AttackRow, what: str) -> str:
    """One line on an attack: never without its control.

    Args:
        what: what was done, and to whom the change is.
    """
    line = f"{row.attack}, {row.condition}: {what} change by {_signed(row.change)}"
    if row.control is None or row.beyond is None:
        if row.change.low <= VISIBLE and np.isfinite(row.change.low):
            return f"{line}: no rise"
        return f"{line}; without {NEVER_SEEN} (holdout_dataset) it cannot be told whether that was hidden or is new"
    line += f", {NEVER_SEEN} by {_signed(row.control)}: difference {_signed(row.beyond)}"
    return f"{line}: {judged(row.beyond)}"


def judged(beyond: Interval) -> str:
    """In words: what forget samples gain beyond never-seen ones."""
    if not (np.isfinite(beyond.low) and np.isfinite(beyond.high)):
        return "too little to tell whether anything was hidden"
    if beyond.low > 0 and beyond.value <= MARGIN:
        return f"by {MARGIN:g} or less more than {NEVER_SEEN} gain, which does not count"
    if beyond.low > 0:
        return f"more comes back than {NEVER_SEEN} gain: part of it was hidden"
    if beyond.high < 0:
        return f"less comes back than {NEVER_SEEN} gain"
    return f"not to be told from what {NEVER_SEEN} gain"


def _signed(interval: Interval) -> str:
    if not np.isfinite(interval.value):
        return interval_text(interval)
    ends = (interval.low, interval.high)
    return f"{interval.value:+.3f}" + (f" [{ends[0]:+.3f}, {ends[1]:+.3f}]" if np.isfinite(ends).all() else "")


def quantisation(
    forget: Mapping[str, np.ndarray],
    control: Mapping[str, np.ndarray] | None,
    base: str,
    buckets: Buckets | None,
    groups: Groups,
    seed: int,
) -> tuple[Table, list[AttackRow], list[str]]:
    """Answer probability with rounded weights.

    Args:
        forget: of each forget sample by condition, `[N]` each.
        control: of each never-seen sample, `[M]` each; `None` without such.
        base: the condition without rounding.
    """
    rows, found, cells = [], [], {}
    for label, values in forget.items():
        change = None
        if label != base:
            other = None if control is None else control[label] - control[base]
            change = attack_row("quantisation", label, values - forget[base], other, groups, seed)
            found.append(change)
        cells = _cells(values, None if control is None else control[label], change, "the base", seed)
        rows.append((label, [*cells.values(), *(mean(values[part], seed) for part in masks_of(buckets))]))
    columns = [*cells, *(f"bucket {number + 1}" for number in range(len(masks_of(buckets))))]
    note = f"Answer probability of the forget set with rounded weights. {_how(control is not None, groups)}"
    lines = [said(row, "the forget samples") for row in found]
    return table("quantisation", "Quantisation", note, columns, rows), found, lines


def relearning(
    relearned: Relearned, taught: np.ndarray, buckets: Buckets | None, groups: Groups, seed: int
) -> tuple[Table, list[AttackRow], list[str]]:
    """Forget samples that were *not* taught again, by steps of relearning on the others.

    Args:
        taught: True for samples that were trained on, `[N]`.
        buckets: of all forget samples.

    Returns:
        the table, a row of every step, and a line on the last one.
    """
    by_step, control, rest = relearned.forget, relearned.control, ~taught
    parts = [rest & mask for mask in masks_of(buckets)]
    rows, found = [], []
    for step, values in sorted(by_step.items()):
        change = None
        if step:
            other = None if control is None else control[step] - control[0]
            change = attack_row("relearning", f"{step} steps", values - by_step[0], other, groups, seed, rest)
            found.append(change)
        cells: dict[str, Cell] = {"taught": mean(values[taught], seed)}
        cells |= _cells(values[rest], None if control is None else control[step], change, "the start", seed)
        cells |= {f"others, bucket {number}": mean(values[part], seed) for number, part in enumerate(parts, start=1)}
        if parts:
            gain = _recovered(values - by_step[0], parts[-1], parts[0], seed) if step else missing("the start")
            cells["recovered: hardest less easiest"] = gain
        rows.append((f"{step} steps", list(cells.values())))
    columns = ["others" if name == "forget set" else name for name in cells]
    note = (
        f"Answer probability after a few steps of fine-tuning on {int(taught.sum())} of the forget samples. "
        f"{_how(control is not None, groups)}"
    )
    lines = [said(row, f"the {row.n} forget samples that were not taught") for row in found[-1:]]
    return table("relearning", "Relearning", note, columns, rows), found, lines


def _cells(
    values: np.ndarray, control: np.ndarray | None, row: AttackRow | None, why: str, seed: int
) -> dict[str, Cell]:
    """Forget set and never-seen samples, what changed of either, and the difference, by column."""
    none = missing(why if control is not None else NO_CONTROL)
    return {
        "forget set": mean(values, seed),
        "change": missing(why) if row is None else shown(row.change),
        NEVER_SEEN: none if control is None else mean(control, seed),
        "their change": none if row is None or row.control is None else shown(row.control),
        BEYOND: none if row is None or row.beyond is None else shown(row.beyond),
    }


def _how(controlled: bool, groups: Groups) -> str:
    if not controlled:
        return f"Without {NEVER_SEEN} it cannot be told what of a change was hidden and what any text would gain."
    return (
        f"What counts is the {BEYOND} under the same attack, with its interval over {groups.over}: these gain as well, "
        "by themselves."
    )


def _recovered(gain: np.ndarray, hard: np.ndarray, easy: np.ndarray, seed: int) -> Cell:
    """Mean gain of the hardest less that of the easiest bucket, samples of each drawn apart."""
    if not hard.any() or not easy.any():
        return missing("a bucket has no sample that was not taught")
    return shown(stats.difference_of_means(gain[hard], gain[easy], seed=seed))
