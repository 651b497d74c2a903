"""What the steps of a run show, kept on the device and gathered once per log: metrics, served samples, divergence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather
from torch import Tensor, nn
from transformers.utils import logging

from ..difficulty.gradients import GradientRecorder
from ..models.layers import widest_float
from ..models.matrices import weight_matrices
from ..objectives import LossTerms
from .inputs import RunInputs
from .plan import VOID_WEIGHTS, RunPlan
from .progress import DivergenceError, RunProgress, StepRecord
from .void import VoidWatch

logger = logging.get_logger(__name__)


class StepRecorder:
    """Takes in micro-batches and gives out what they showed.

    Args:
        inputs, plan, progress: of the run.
        metrics: where figures are put for the next log, by name.
        accelerator: whose processes share what they saw.
        void: is told what samples were before they were trained on.

    Attributes:
        served: positions in the schedule that were served, in order, over all processes.
        gradients: what is recorded in the backward pass of the current micro-batch, if anything.
    """

    def __init__(
        self,
        inputs: RunInputs,
        plan: RunPlan,
        progress: RunProgress,
        metrics: dict[str, list[float]],
        accelerator: Any,
        void: VoidWatch,
    ) -> None:
        self.args, self.loss, self.plan, self.progress = inputs.args, inputs.loss, plan, progress
        self.metrics, self.accelerator, self.void = metrics, accelerator, void
        self.served: list[int] = []
        self.gradients: GradientRecorder | None = None
        self._records: list[Tensor] = []
        self._forget: LossTerms | None = None
        self._update_norms: list[Tensor] = []
        self._micro_batches = 0
        self._clipped = 0

    def restart(self, served: list[int]) -> None:
        """Go on where these were served."""
        self.served = list(served)
        self._records.clear()

    # -- losses ----------------------------------------------------------------------------------------------------

    def record(self, inputs: dict[str, Tensor], terms: LossTerms, side: str | None = None) -> None:
        """Keep a micro-batch's numbers on the device.

        Args:
            side: `"forget"` and `"retain"` where the losses are taken apart, in this order; what is taken `"again"` is
                not kept.
        """
        if side == "again":
            return
        if side == "forget" and self.loss.uses_retain:
            self._forget = LossTerms(terms.forget.detach(), None, terms.mean_logps)
            return
        if side == "retain":
            assert self._forget is not None
            terms, self._forget = replace(self._forget, retain=terms.retain), None
        retain = torch.full_like(terms.mean_logps, torch.nan) if terms.retain is None else terms.retain.detach()
        columns = [
            torch.full_like(terms.mean_logps, self._micro_batches),
            torch.full_like(terms.mean_logps, self.accelerator.process_index),
            inputs["row"].to(terms.mean_logps),
            terms.mean_logps,
            terms.forget.detach(),
            retain.to(terms.mean_logps),
        ]
        dtype = widest_float(terms.mean_logps.device)
        self._records.append(torch.stack([column.to(dtype) for column in columns], dim=1))
        self._micro_batches += 1

    def flush(self, step: int) -> StepRecord | None:
        """Gather what was recorded since the last time into `metrics` and `served`, and return it.

        Args:
            step: optimizer steps done, for errors.

        Raises:
            DivergenceError: for a loss that is not finite or too high, the same on all processes.
        """
        if not self._records:
            return None
        table = gather(torch.cat(self._records)).cpu().numpy()
        self._records.clear()
        table = table[np.lexsort((table[:, 1], table[:, 0]))]  # stable: micro-batch, then process, then position
        table = table[table[:, 2] >= 0]
        rows = table[:, 2].astype(int)
        self.served += rows.tolist()
        record = StepRecord(rows, table[:, 3], table[:, 4], table[:, 5])
        self._check_losses(record, step)
        self.void.after_steps(record.row, record.mean_logps)
        self._log_losses(record)
        self._log_update_shares()
        return record

    def _check_losses(self, record: StepRecord, step: int) -> None:
        losses = [record.forget, record.retain] if self.loss.uses_retain else [record.forget]
        for values in losses:
            if not np.isfinite(values).all():
                sample = self.plan.schedule.order[record.row[np.flatnonzero(~np.isfinite(values))[0]]]
                raise DivergenceError(
                    f"training diverged: a loss is not finite at step {step} (first at forget sample {str(sample)!r}); "
                    "lower the learning rate or raise the retain weight."
                )
        highest = self.args.max_retain_loss
        if highest is not None and record.retain.mean() > highest:
            raise DivergenceError(
                f"training diverged: the retain loss is {record.retain.mean():.4g} at step {step}, above "
                f"max_retain_loss={highest:g}; lower the learning rate or raise the retain weight."
            )

    def _log_losses(self, record: StepRecord) -> None:
        metrics, probability = self.metrics, np.exp(record.mean_logps)
        metrics["forget_loss"].append(float(record.forget.mean()))
        metrics["forget_prob"].append(float(probability.mean()))
        if self.loss.uses_retain:
            metrics["retain_loss"].append(float(record.retain.mean()))
            if self.args.retain_limit is not None or self.args.retain_weight_end is not None:
                metrics["retain_weight"].append(self.progress.retain_weight)
        if self.plan.schedule.dynamic:
            metrics["forget_active"].append(float((self.progress.factor > 0).mean()))
        if self.plan.buckets is not None:
            served = self.plan.buckets.select(self.plan.forget_row[record.row])
            for number, mean in served.means(probability).items():
                metrics[f"forget_prob/bucket_{number}"].append(mean)

    # -- the size of every sample's part in an update ----------------------------------------------------------------

    def wants_update_norms(self, step: int, logging_steps: float) -> bool:
        """Whether the batches of an optimizer step are to be taken in by `update_norms`."""
        due = step == 1 or step % max(1, int(logging_steps or 1)) == 0
        return self.args.log_update_share and due

    @contextmanager
    def update_norms(self, model: nn.Module, inputs: dict[str, Any]) -> Iterator[None]:
        """Record the norm of every sample's gradient in the forward and backward pass inside."""
        matrices = [matrix for matrix in weight_matrices(model) if matrix.weight.requires_grad]
        row = inputs["row"].cpu()
        self.gradients = recorder = GradientRecorder(matrices)
        try:
            with recorder.attached(), self.loss.all_logits():
                yield
        finally:
            self.gradients = None
        norms = recorder.results(len(inputs["input_ids"]))["squares"].cpu().double().sum(1).sqrt()
        pairs = len(row)
        forget = norms[:pairs] + (norms[-pairs:] if self.loss.uses_alternative else 0.0)
        retain = norms[pairs : 2 * pairs] if self.loss.uses_retain else torch.zeros(pairs)
        table = torch.stack([row, forget, retain], dim=1).to(widest_float(self.accelerator.device))
        self._update_norms.append(table.to(self.accelerator.device))

    def _log_update_shares(self) -> None:
        """Share of the summed gradient norms that every difficulty bucket, and the retain set, has in the update."""
        if not self._update_norms:
            return
        table = gather(torch.cat(self._update_norms)).cpu().numpy()
        self._update_norms.clear()
        table = table[table[:, 0] >= 0]
        forget, retain = table[:, 1], table[:, 2]
        if self.loss.uses_retain:
            share = float(retain.sum() / max(forget.sum() + retain.sum(), 1e-300))
            self.metrics["update_share/retain"].append(share)
        if self.plan.buckets is not None:
            buckets = self.plan.buckets.select(self.plan.forget_row[table[:, 0].astype(int)])
            for number, mask in enumerate(buckets.masks, start=1):
                share = float(forget[mask].sum() / max(forget.sum(), 1e-300))
                self.metrics[f"update_share/bucket_{number}"].append(share)

    # -- clipping --------------------------------------------------------------------------------------------------

    def watch_clipping(self, norm: float | None) -> None:
        """Warn, once, when the gradients of five logs in a row are clipped and weights thereby come to nothing."""
        limit = self.args.max_grad_norm
        if limit and norm is not None and self.plan.weight_within_batches < 0.1:
            self._clipped = self._clipped + 1 if norm > limit else 0
            if self._clipped == 5:
                logger.warning(VOID_WEIGHTS.format(what=f"With gradients above max_grad_norm={limit:g} at every step"))
