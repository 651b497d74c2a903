"""Weights that follow the run: factors made from how memorised each sample is now. Pure, plus their state.

The order of a run is fixed before it starts, so that it is exact under accumulation, several processes and resume.
What follows the run are factors on the weights: after every optimizer step, each sample's log-probability in the
forward pass that trained it is known, on all processes alike, and the factors of the next step are made from it. A
sample with factor 0 is still served, at the cost of its forward pass; that is how it can come back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .orders import competence
from .registry import SCHEDULES, register_schedule, within
from .weights import from_logs

FLOOR = -1e4  # of a log-probability that is kept: JSON has no infinity


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes:
        logps: mean answer log-probability of each forget sample when it was served last (before that, under the
            original model), `[N]`.
        factor: what the function said last, `[N]`; all 1 at the start.
        step: optimizer steps done.
        progress: share of the run that is done, in [0, 1).
    """

    logps: np.ndarray
    factor: np.ndarray
    step: int
    progress: float

    @property
    def probability(self) -> np.ndarray:
        """`exp(logps)`, `[N]` in [0, 1]."""
        return np.exp(self.logps)


def _check_stop(owner: str, **options: Any) -> None:
    within(0, 1, "target", open_low=True)(owner, **options)
    within(1, np.inf, "back")(owner, **options)


@register_schedule("per_sample_stop", "dynamic", metric=None, check=_check_stop)
def per_sample_stop(state: RunState, *, target: float = 0.1, back: float = 1.5) -> np.ndarray:
    """A sample whose answer probability has reached `target` leaves the forget loss: factor 0, the others keep 1.

    It comes back when its probability is above `back * target` again. Easy samples are thus not over-unlearned.
    """
    p = state.probability
    return np.where(p <= target, 0.0, np.where(p > back * target, 1.0, state.factor))


@register_schedule("joint_stop", "dynamic", metric=None, check=_check_stop)
def joint_stop(state: RunState, *, target: float = 0.1, back: float = 1.5) -> np.ndarray:
    """All samples leave the forget loss at once, when their mean answer probability has reached `target`.

    Early stopping with the retain loss going on: what `per_sample_stop` is to be compared with. They come back when the
    mean is above `back * target` again.
    """
    mean = state.probability.mean()
    if target < mean <= back * target:
        return state.factor
    return np.full(len(state.logps), float(mean > target))


def _check_dynamic(owner: str, **options: Any) -> None:
    within(0, np.inf, "power")(owner, **options)
    within(1, np.inf, "every")(owner, **options)


@register_schedule("dynamic", "dynamic", metric=None, check=_check_dynamic)
def dynamic(state: RunState, *, power: float = 1.0, low: float = 0.25, high: float = 6.0, every: int = 1) -> np.ndarray:
    """Difficulty estimated anew: factor proportional to the current `p^power`, clipped to [low, high], mean 1.

    What is still memorised now is emphasised (after HARDY-MER's dynamic curriculum).

    Args:
        every: optimizer steps between two estimates.
    """
    if state.step % int(every):
        return state.factor
    return from_logs(power * state.logps, low, high)


@register_schedule("odds", "dynamic", metric=None, check=_check_dynamic)
def odds(state: RunState, *, power: float = 1.0, low: float = 0.05, high: float = 20.0, every: int = 1) -> np.ndarray:
    """Difficulty estimated anew: factor proportional to the current `(p / (1 - p))^power`, clipped, mean 1.

    As `dynamic` where little is left. Where almost everything is, the gradient of a sample is about proportional to
    `1 - p`: what is known best would be pushed least, and this makes up for it.

    Args:
        every: optimizer steps between two estimates.
    """
    if state.step % int(every):
        return state.factor
    wrong = -np.expm1(np.minimum(state.logps, -1e-12))  # 1 - p, kept off 0
    return from_logs(power * (state.logps - np.log(wrong)), low, high)


def _check_self_paced(owner: str, **options: Any) -> None:
    within(0, 1, "start", "until", open_low=True)(owner, **options)
    within(1, np.inf, "every")(owner, **options)


@register_schedule("self_paced", "dynamic", metric=None, check=_check_self_paced)
def self_paced(state: RunState, *, start: float = 0.25, until: float = 0.5, every: int = 1) -> np.ndarray:
    """Only what is easy now: factor 1 / share for the share of samples with the lowest current probability, else 0.

    Self-paced learning (Kumar et al. 2010) with a share that grows as competence does (`competence`); mean 1.

    Args:
        start: the share at the beginning.
        until: the part of the run after which it is all samples.
        every: optimizer steps between two estimates.
    """
    if state.step % int(every):
        return state.factor
    size = len(state.logps)
    count = int(np.ceil(competence(np.array(state.progress), start, until) * size))
    inside = state.logps <= np.partition(state.logps, count - 1)[count - 1]  # equal ones are in it together
    return inside * (size / inside.sum())


class DynamicWeights:
    """The factors of a run, one part after the other multiplied, and their state.

    Args:
        parts: names and options, as in `Schedule.dynamic`.
        logps: mean answer log-probability of each forget sample under the original model, `[N]`.
        steps: optimizer steps of the whole run.
    """

    def __init__(self, parts: tuple[tuple[str, dict[str, Any]], ...], logps: np.ndarray, steps: int) -> None:
        self.parts, self.steps, self.step = parts, steps, 0
        self.logps = np.maximum(np.asarray(logps, dtype=np.float64), FLOOR)
        self.factors = [np.ones(len(logps)) for _ in parts]
        self._estimate()

    @property
    def factor(self) -> np.ndarray:
        """Product over the parts, `[N]`."""
        result = np.ones(len(self.logps))
        for factor in self.factors:
            result = result * factor
        return result

    def update(self, rows: np.ndarray, logps: np.ndarray, step: int) -> None:
        """Take in what an optimizer step showed: forget samples `rows`, in the order served, and their `logps`."""
        self.logps[rows] = np.maximum(logps, FLOOR)
        self.step = step
        self._estimate()

    def _estimate(self) -> None:
        progress = min(self.step / max(self.steps, 1), 1.0)
        for number, (name, options) in enumerate(self.parts):
            state = RunState(self.logps.copy(), self.factors[number], self.step, progress)
            factor = np.asarray(SCHEDULES[name].function(state, **options), dtype=np.float64)
            if factor.shape != self.logps.shape or not (np.isfinite(factor).all() and (factor >= 0).all()):
                raise ValueError(f"schedule {name!r} must return one finite factor of at least 0 per forget sample")
            self.factors[number] = factor

    def state(self) -> dict[str, Any]:
        """As plain JSON values, which hold float64 exactly."""
        return {
            "step": self.step,
            "logps": self.logps.tolist(),
            "factors": [factor.tolist() for factor in self.factors],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.step = int(state["step"])
        self.logps = np.array(state["logps"], dtype=np.float64)
        self.factors = [np.array(factor, dtype=np.float64) for factor in state["factors"]]
