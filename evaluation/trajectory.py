"""The path of one run: what is left of the forget set against what is kept of the retain set, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cud_trainer.data import Samples
from cud_trainer.logprobs import answer_probability


@dataclass
class Path:
    """Snapshots of a run.

    Attributes:
        steps: optimizer steps, starting at 0.
        forget: answer probability of every forget sample at each snapshot, `[T, N]`.
        retain: mean answer probability of the retain evaluation set, `[T]`.
        held_out: answer probability of every held-out sample, `[T, M]`; empty without such a set.
        extraction: extraction strength of every forget sample, `[T, N]`; empty where it is not measured.
    """

    steps: list[int] = field(default_factory=list)
    forget: list[np.ndarray] = field(default_factory=list)
    retain: list[float] = field(default_factory=list)
    held_out: list[np.ndarray] = field(default_factory=list)
    extraction: list[np.ndarray] = field(default_factory=list)


def averaged_residual(
    forget: Sequence[np.ndarray], window: tuple[float, float] = (0.15, 0.75)
) -> tuple[np.ndarray, list[int]]:
    """Residual memorisation of a run: mean over the snapshots at which the mean forget probability is inside `window`
    (shares of the first snapshot's), and which snapshots these are. Falls back to the one closest to the middle."""
    shares = np.array([snapshot.mean() for snapshot in forget]) / forget[0].mean()
    used = [i for i, share in enumerate(shares) if window[0] <= share <= window[1]]
    if not used:
        used = [int(np.argmin(np.abs(shares - sum(window) / 2)))]
    return np.mean([forget[i] for i in used], axis=0), used


def matched_position(utility: np.ndarray, residual: np.ndarray, level: float) -> float | None:
    """Where on a run's path the residual is lowest while utility is at least `level`; `None` if it never is.

    Args:
        utility, residual: along the path, `[T]`. Between two snapshots the path is a straight line, so that the point
            may lie on a crossing of the level.

    Returns:
        A position in [0, T - 1]; its fraction is that between two snapshots.
    """
    candidates = [float(i) for i in np.flatnonzero(utility >= level)]
    for i in range(len(utility) - 1):
        if (utility[i] - level) * (utility[i + 1] - level) < 0:
            candidates.append(i + (utility[i] - level) / (utility[i] - utility[i + 1]))
    if not candidates:
        return None
    return min(candidates, key=lambda position: float(at_position(residual, position)))


def at_position(values: np.ndarray, position: float) -> np.ndarray:
    """`values [T, ...]` at a fractional position along the first axis, by linear interpolation."""
    values = np.asarray(values, dtype=float)
    before = int(position)
    after = min(before + 1, len(values) - 1)
    return values[before] + (position - before) * (values[after] - values[before])


class TradeoffCallback(TrainerCallback):
    """Records a `Path` while a trainer runs.

    Args:
        forget: prepared samples.
        retain: prepared samples; not what the retain loss trains on.
        every: steps between snapshots.
        progress: called after every step with its number.
        keep_at: keep the trainable weights of the snapshot that has forgotten most with at least this share of the
            starting retain probability (`best`); `None` keeps none.
        held_out: prepared samples of groups that no loss of the run sees.
        extraction: from a model and samples to probability and extraction strength of each, `[N]` both, in one pass
            (`cud_trainer.logprobs.answer_recall`); `None`: probability alone.

    Attributes:
        path: the snapshots so far.
        best: number of the snapshot that is kept, and its weights by name, on the CPU.
    """

    def __init__(
        self,
        forget: Samples,
        retain: Samples,
        *,
        every: int = 1,
        progress: Any = None,
        keep_at: float | None = None,
        held_out: Samples | None = None,
        extraction: Callable[[Any, Samples], tuple[np.ndarray, np.ndarray]] | None = None,
    ) -> None:
        self.path = Path()
        self.best: tuple[int, dict[str, Tensor]] | None = None
        self._sets = forget, retain
        self._every, self._progress, self._keep_at = every, progress, keep_at
        self._held_out, self._extraction = held_out, extraction

    def _snapshot(self, model: Any, step: int) -> None:
        forget, retain = self._sets
        self.path.steps.append(step)
        if self._extraction is None:
            self.path.forget.append(answer_probability(model, forget))
        else:
            probability, strength = self._extraction(model, forget)
            self.path.forget.append(probability)
            self.path.extraction.append(strength)
        self.path.retain.append(float(answer_probability(model, retain).mean()))
        if self._held_out is not None:
            self.path.held_out.append(answer_probability(model, self._held_out))
        if self._keep_at is None or not self.path.retain[-1] >= self._keep_at * self.path.retain[0]:
            return
        left = [snapshot.mean() for snapshot in self.path.forget]
        if self.best is None or left[-1] < left[self.best[0]]:
            trained = {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters() if p.requires_grad}
            self.best = len(left) - 1, trained

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._snapshot(kwargs["model"], state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._every == 0 or state.global_step >= state.max_steps:
            self._snapshot(kwargs["model"], state.global_step)
        if self._progress is not None:
            self._progress(state.global_step)
