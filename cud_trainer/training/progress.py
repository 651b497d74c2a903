"""What a run learns about itself step by step: how memorised each sample is, the retain weight, whether it is done.

Everything is a pure function of what the steps so far have shown, equal on all processes, and goes into checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..schedule import DynamicWeights
from .inputs import RunInputs
from .plan import RunPlan


class DivergenceError(RuntimeError):
    """Training stopped because a loss is not finite or too high; the model is back at the last checkpoint, if any."""

    exit_code = 4  # of `cud train`


@dataclass
class StepRecord:
    """What the optimizer steps since the last look showed, a row per served pair, over all processes.

    Attributes:
        row: position in the schedule, `[n]`.
        mean_logps: mean answer log-probability of the forget samples, `[n]`.
        forget, retain: losses, `[n]`; `retain` is NaN without a retain loss.
    """

    row: np.ndarray
    mean_logps: np.ndarray
    forget: np.ndarray
    retain: np.ndarray


class RunProgress:
    """Follows a run.

    Args:
        forget_row: forget sample of each position in the schedule, `[len(schedule)]`.
        weights: factors on the weights, with the latest log-probability of each sample.
        retain_weight: at the start.
        retain_weight_end: in the last step, from there by equal ratios; `None` for no such way.
        steps: of the run.
        retain_limit: limit of the retain loss at which its weight is held, or `None` for a fixed weight.
        dual_rate: step size of the retain weight.
        target_forget_prob: mean forget probability at which the run is done, or `None`.
        max_retain_loss: retain loss above which a run is not done but diverged.
        steps_per_pass: horizon of the running mean of the retain loss.

    Attributes:
        factor: what the weights of each forget sample are multiplied by in the next step, `[N]`.
    """

    def __init__(
        self,
        forget_row: np.ndarray,
        weights: DynamicWeights,
        *,
        retain_weight: float,
        retain_weight_end: float | None,
        steps: int,
        retain_limit: float | None,
        dual_rate: float,
        target_forget_prob: float | None,
        max_retain_loss: float | None,
        steps_per_pass: int,
    ) -> None:
        self.forget_row, self.weights = forget_row, weights
        self.retain_weight, self.retain_limit, self.dual_rate = retain_weight, retain_limit, dual_rate
        self.retain_weight_end, self.steps = retain_weight_end, steps
        self.target_forget_prob, self.max_retain_loss = target_forget_prob, max_retain_loss
        self.horizon = max(1, steps_per_pass)
        self.retain_loss: float | None = None
        self.factor = weights.factor

    @classmethod
    def of(cls, inputs: RunInputs, plan: RunPlan, at_start: np.ndarray | None) -> RunProgress:
        """Of a run before its first step.

        Args:
            at_start: answer probability of each forget sample, `[N]`; `None` where nobody asks for it.
        """
        args, schedule = inputs.args, plan.schedule
        logps = np.zeros(len(inputs.forget)) if at_start is None else np.log(np.maximum(at_start, 1e-300))
        return cls(
            plan.forget_row,
            DynamicWeights(schedule.dynamic, logps, plan.steps, schedule.values, np.unique(plan.forget_row)),
            retain_weight=args.retain_weight,  # type: ignore[arg-type]
            retain_weight_end=args.retain_weight_end,
            steps=plan.steps,
            retain_limit=args.retain_limit,
            dual_rate=args.dual_rate,
            target_forget_prob=args.target_forget_prob,
            max_retain_loss=args.max_retain_loss,
            steps_per_pass=-(-len(inputs.forget) // inputs.global_batch),
        )

    @property
    def follows(self) -> bool:
        """Whether weights follow the run: without, every factor is 1."""
        return bool(self.weights.parts)

    def after_step(self, record: StepRecord, step: int) -> None:
        """Take in one optimizer step."""
        self.weights.update(self.forget_row[record.row], record.mean_logps, step)
        self.factor = self.weights.factor
        if self.retain_weight_end is not None and step < self.steps:
            self.retain_weight *= (self.retain_weight_end / self.retain_weight) ** (1 / (self.steps - step))
        if len(record.retain) and np.isfinite(record.retain).all():
            mean = float(record.retain.mean())
            before = self.retain_loss
            self.retain_loss = mean if before is None else before + (mean - before) / self.horizon
            if self.retain_limit is not None:  # dual ascent on the constraint (Entesari et al. 2025, PDU)
                self.retain_weight = max(0.0, self.retain_weight + self.dual_rate * (mean - self.retain_limit))

    @property
    def forget_prob(self) -> float:
        """Mean answer probability of the forget samples, each when it was served last."""
        return float(np.exp(self.weights.logps).mean())

    @property
    def done(self) -> bool:
        """Whether the target is reached with the retain loss (running mean over a pass) inside its limits."""
        if self.target_forget_prob is None or self.forget_prob > self.target_forget_prob:
            return False
        limits = [limit for limit in (self.retain_limit, self.max_retain_loss) if limit is not None]
        return self.retain_loss is None or all(self.retain_loss <= limit for limit in limits)

    def state(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "retain_weight": self.retain_weight,
            "retain_loss": self.retain_loss,
            "weights": self.weights.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.retain_weight, self.retain_loss = state["retain_weight"], state["retain_loss"]
        self.weights.restore(state["weights"])
        self.factor = self.weights.factor
