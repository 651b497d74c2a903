"""The path of one run: what is left of the forget set against what is kept of the retain set, step by step."""

from __future__ import annotations

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
    """

    steps: list[int] = field(default_factory=list)
    forget: list[np.ndarray] = field(default_factory=list)
    retain: list[float] = field(default_factory=list)


class TradeoffCallback(TrainerCallback):
    """Records a `Path` while a trainer runs.

    Args:
        forget: prepared samples.
        retain: prepared samples; not what the retain loss trains on.
        every: steps between snapshots.
        progress: called after every step with its number.
        keep_at: keep the trainable weights of the snapshot that has forgotten most with at least this share of the
            starting retain probability (`best`); `None` keeps none.

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
    ) -> None:
        self.path = Path()
        self.best: tuple[int, dict[str, Tensor]] | None = None
        self._sets = forget, retain
        self._every, self._progress, self._keep_at = every, progress, keep_at

    def _snapshot(self, model: Any, step: int) -> None:
        forget, retain = self._sets
        self.path.steps.append(step)
        self.path.forget.append(answer_probability(model, forget))
        self.path.retain.append(float(answer_probability(model, retain).mean()))
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
