"""The path of one run: what is left of the forget set against what is kept of the retain set, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
        forget: prepared dataset.
        retain: prepared dataset; not what the retain loss trains on.
        pad_token_id: for batching.
        every: steps between snapshots.
        progress: called after every step with its number.
    """

    def __init__(
        self, forget: Dataset, retain: Dataset, *, pad_token_id: int, every: int = 1, progress: Any = None
    ) -> None:
        self.path = Path()
        self._sets = forget, retain
        self._pad_token_id, self._every, self._progress = pad_token_id, every, progress

    def _snapshot(self, model: Any, step: int) -> None:
        forget, retain = self._sets
        self.path.steps.append(step)
        self.path.forget.append(answer_probability(model, forget, pad_token_id=self._pad_token_id))
        self.path.retain.append(float(answer_probability(model, retain, pad_token_id=self._pad_token_id).mean()))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._snapshot(kwargs["model"], state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._every == 0 or state.global_step >= state.max_steps:
            self._snapshot(kwargs["model"], state.global_step)
        if self._progress is not None:
            self._progress(state.global_step)
