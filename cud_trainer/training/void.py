"""Runs that come to nothing: noticed as they happen, and said at their end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from ..models.shards import sampled_values, whole
from .inputs import RunInputs
from .plan import RunPlan
from .progress import RunProgress

logger = logging.get_logger(__name__)

SAMPLES_PER_TENSOR = 256
MEMORISED = 0.1  # mean answer probability of a forget set that there is something to forget of


class VoidWatch:
    """Looks for a gradient that means something, a weight that moves, and a sample that is forgotten.

    The gradient of a model that has not moved is rounding noise when no forget sample has a weight and the retain loss
    compares with that very model. Adam and its kind divide by its size: they would blow it up to full steps. Up to
    the first gradient that means something, gradients are dropped.

    Args:
        trainer: a `CUDTrainer`.
        inputs, plan, progress: of the run.
    """

    def __init__(self, trainer: Any, inputs: RunInputs, plan: RunPlan, progress: RunProgress) -> None:
        self.trainer, self.plan, self.progress = trainer, plan, progress
        self.retain_loss, self.global_batch = inputs.loss.retain_loss, inputs.global_batch
        self.sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        fsdp2 = trainer.is_fsdp_enabled and trainer.accelerator.is_fsdp2
        # DeepSpeed has made its step when it can be asked, and FSDP 1 shows no gradient by tensor: taken on trust.
        self.trusted = self.sharded and not fsdp2
        self.began = self.trusted
        self.reason: str | None = None
        self._idle = False
        self._first = np.full(len(inputs.forget), np.nan)
        self._same: bool | None = None
        self._weights = self._looked_at() if not self.sharded or fsdp2 or trainer.is_deepspeed_enabled else []

    def before_step(self, step: int) -> bool:
        """Look at the gradient that the optimizer is about to follow; whether the run is to end.

        Args:
            step: optimizer steps done.
        """
        idle = bool(self.plan.schedule.dynamic) and not self.progress.factor.any()
        if idle and not self._idle:
            logger.warning(
                f"from step {step + 1} on schedule {self.plan.schedule.name!r} gives every forget sample the factor 0 "
                "(they are at its target): nothing is forgotten, only what is kept is trained"
            )
        self._idle = idle
        if self.began:
            return False
        if (idle or not self.batch_has_weight(step)) and self.retain_loss in ("none", "kl", "activations"):
            self.reason = "nothing was unlearned: no forget sample that was served had a weight"
        elif self._is_noise():
            self.reason = "nothing was unlearned: the gradient is rounding noise"
        else:
            self.began, self.reason = True, None
            return False
        self._drop_gradients()
        return idle

    def after_steps(self, rows: np.ndarray, mean_logps: np.ndarray) -> None:
        """Take in what steps showed of the samples before they were trained on; see `StepRecord`."""
        samples = self.plan.forget_row[rows]
        new = np.isnan(self._first[samples])
        # reversed: of a sample that comes twice the first counts
        self._first[samples[new][::-1]] = np.exp(mean_logps[new][::-1])

    def restart(self, resumed: bool, began: bool) -> None:
        """A run begins, or goes on from a checkpoint, when what samples were at the start is no longer seen.

        Args:
            began: whether there was a gradient that meant something, before the checkpoint.
        """
        self.began, self.reason, self._same = self.trusted or began, None, None
        self._first[:] = np.inf if resumed else np.nan

    def why(self, start: np.ndarray | None, measured: Mapping[str, float] | None) -> str | None:
        """Why the run came to nothing, in one sentence; `None` if it did not.

        Args:
            start: answer probability of each forget sample before, `[N]`; `None` where nobody asked for it.
            measured: the last evaluation, if there was one.
        """
        return self.unmoved() or self.unforgotten(
            None if start is None else float(start.mean()), None if measured is None else measured["eval_forget_prob"]
        )

    def unmoved(self) -> str | None:
        """Why no weight has moved, in one sentence; `None` if some have."""
        if self.reason is not None:
            return self.reason
        if self._weights and (self._is_same() if self._same is None else self._same):
            why = "a learning rate of 0, or steps too small for the dtype of the weights"
            return f"nothing was unlearned: no weight has changed ({why})"
        return None

    def after_training(self) -> None:
        """Look at weights that are split while every process is here: later, one alone may ask."""
        if self.sharded and self._weights:
            self._same = self._is_same()

    def unforgotten(self, start: float | None, end: float | None) -> str | None:
        """That no more is forgotten than before, in one sentence; `None` if it is, or nobody knows.

        Where next to nothing was known before (`MEMORISED`) there was nothing to forget, and this says nothing.

        Args:
            start, end: mean forget probability before and after; without `start`, of each sample when it was first
                served.
        """
        if start is None and np.isfinite(self._first).all():
            start = float(self._first.mean())
        if start is None or end is None or end < start or start < MEMORISED:
            return None
        return f"nothing was forgotten: the mean forget probability was {start:.4g} and is {end:.4g}"

    def batch_has_weight(self, step: int) -> bool:
        """Whether a forget sample of the next batch has a weight."""
        rows = slice(step * self.global_batch, (step + 1) * self.global_batch)
        weights = self.plan.rows["weight"][rows]
        return bool((weights * self.progress.factor[self.plan.rows["forget_index"][rows]]).any())

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.trainer.model.parameters() if parameter.grad is not None]

    def _is_noise(self) -> bool:
        """Whether the whole gradient is no larger than rounding makes it of losses of the order of 1."""
        gradients = self._gradients()
        if not gradients:
            return True
        exact = max(gradients, key=lambda gradient: torch.finfo(gradient.dtype).bits).dtype
        limit = min(torch.finfo(exact).eps, torch.finfo(torch.float32).eps)
        return bool(whole(torch.nn.utils.get_total_norm(gradients)) <= limit)

    def _drop_gradients(self) -> None:
        for parameter in self.trainer.model.parameters():
            if parameter.grad is None:
                continue
            if self.trainer.accelerator.scaler is None:
                parameter.grad = None
            else:  # the scaler of float16 asks for gradients
                parameter.grad.zero_()

    def _is_same(self) -> bool:
        now = self._looked_at()
        return all(torch.equal(old.to(new.dtype), new) for old, new in zip(self._weights, now, strict=True))

    def _looked_at(self) -> list[Tensor]:
        """Up to 256 evenly spaced values of every tensor that is trained."""
        trained = [parameter for parameter in self.trainer.model.parameters() if parameter.requires_grad]
        values = [sampled_values(parameter, SAMPLES_PER_TENSOR) for parameter in trained]
        return [value.cpu() for value in values] if self.sharded else values
