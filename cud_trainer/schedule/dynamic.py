"""Weights that follow the run: factors made from how memorised each sample is now. Pure, plus their state.

The order of a run is fixed before it starts, so that it is exact under accumulation, several processes and resume.
What follows the run are factors on the weights: after every optimizer step, each sample's log-probability in the
forward pass that trained it is known, on all processes alike, and the factors of the next step are made from it. A
sample with factor 0 is still served, at the cost of its forward pass; that is how it can come back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
        factor: what the function said last, `[N]`; all 1 at the start. Checkpoints hold it bit for bit: it is where a
            function keeps its state.
        step: optimizer steps done.
        progress: share of the run that is done, in [0, 1).
        served: samples that the last optimizer step served, without repeats; empty at the start.
        values: the metrics that the function is registered with, by name, `[N]` each.
    """

    logps: np.ndarray
    factor: np.ndarray
    step: int
    progress: float
    served: np.ndarray = field(default_factory=lambda: np.array([], dtype=int))
    values: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def probability(self) -> np.ndarray:
        """`exp(logps)`, `[N]` in [0, 1]."""
        return np.exp(self.logps)


def _check_stop(owner: str, **options: Any) -> None:
    within(0, 1, "target", open_low=True)(owner, **options)
    within(1, np.inf, "back")(owner, **options)
    start = options.get("start")
    if start is not None and not options["target"] <= start <= 1:
        raise ValueError(f"{owner} needs a start between target ({options['target']:g}) and 1, got {start!r}")


@register_schedule("per_sample_stop", "dynamic", metric=None, check=_check_stop)
def per_sample_stop(
    state: RunState, *, target: float = 0.07, back: float = 1.5, start: float | None = None
) -> np.ndarray:
    """A sample whose answer probability has reached `target` leaves the forget loss: factor 0, the others keep 1.

    It comes back when its probability is above `back * target` again. Easy samples are thus not over-unlearned.

    Args:
        target: a little below 0.1, where studies call a sample forgotten: what has left hovers around it.
        start: the target at the beginning of the run; it falls to `target` by equal ratios,
            `start^(1 - t) target^t` at the share t of the run. By default it is `target` throughout.
    """
    level = target if start is None else start ** (1 - state.progress) * target**state.progress
    return _stopped(state, level, back)


@register_schedule("never_seen_stop", "dynamic", metric=("loss", "memorization"), check=within(1, np.inf, "back"))
def never_seen_stop(state: RunState, *, back: float = 1.5) -> np.ndarray:
    """`per_sample_stop` with the sample's own target: the answer probability of a model that never saw it.

    By the metrics `loss` (mean log-probability before unlearning) and `memorization` (the same minus that of the
    reference model), `exp(loss - memorization)`. Below it nothing is left to forget; a common target is too high for
    one sample and out of reach for another.
    """
    never_seen = np.exp(np.minimum(state.values["loss"] - state.values["memorization"], 0.0))
    return _stopped(state, never_seen, back)


def _stopped(state: RunState, level: float | np.ndarray, back: float) -> np.ndarray:
    """Factor 0 from `level` on, 1 above `back * level`, and between the two as it was."""
    p = state.probability
    return np.where(p <= level, 0.0, np.where(p > back * level, 1.0, state.factor))


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


KEPT = ("weight", "pull")


def _check_odds(owner: str, **options: Any) -> None:
    _check_dynamic(owner, **options)
    if options["keep"] not in KEPT:
        raise ValueError(f"{owner} needs keep out of {list(KEPT)}, got {options['keep']!r}")


@register_schedule("odds", "dynamic", metric=None, check=_check_odds)
def odds(
    state: RunState, *, power: float = 1.0, low: float = 0.05, high: float = 20.0, every: int = 1, keep: str = "weight"
) -> np.ndarray:
    """Difficulty estimated anew: factor proportional to the current `(p / (1 - p))^power`, clipped to [low, high].

    As `dynamic` where little is left. Where almost everything is, the gradient of a sample is about proportional to
    `1 - p`: what is known best would be pushed least, and this makes up for it.

    Args:
        every: optimizer steps between two estimates.
        keep: what stays as it is with equal weights. `"weight"`: the mean, 1; the forget gradient is then smaller at
            the start (0.6 of `uniform`'s was seen), as if the retain weight were larger. `"pull"`: the sum of
            weight times gradient scale, `sum_i w_i (1 - p_i) = sum_i (1 - p_i)`.
    """
    if state.step % int(every):
        return state.factor
    wrong = -np.expm1(np.minimum(state.logps, -1e-12))  # 1 - p, kept off 0
    return from_logs(power * (state.logps - np.log(wrong)), low, high, wrong if keep == "pull" else None)


def _check_unlikelihood(owner: str, **options: Any) -> None:
    within(0, 1e6, "scale", "high", open_low=True)(owner, **options)
    within(0, np.inf, "power")(owner, **options)
    within(1, np.inf, "every")(owner, **options)


@register_schedule("unlikelihood", "dynamic", metric=None, check=_check_unlikelihood)
def unlikelihood(
    state: RunState, *, scale: float = 0.3, power: float = 0.5, high: float = 500.0, every: int = 1
) -> np.ndarray:
    """Factor `scale * p^power / (1 - p)`, at most `high`, of the current p; as it is, not scaled to a mean of 1.

    On a loss that is the mean log-probability of the answer (`ga`, `graddiff`), power 1 gives the gradient of
    `-scale * log(1 - p)`, unlikelihood training (Welleck et al. 2020, arXiv 1908.04319), with p the answer probability.
    It does not vanish where almost everything is known, as that of log p does, and it fades as p falls. `odds` has the
    same ratios between samples, but its mean stays 1.

    Args:
        scale: against the retain weight: half of it is twice the retain weight.
        power: below 1 the pull fades less as p falls, so that the last samples get there, too.
        every: optimizer steps between two estimates.
    """
    if state.step % int(every):
        return state.factor
    wrong = -np.expm1(np.minimum(state.logps, -1e-12))  # 1 - p, kept off 0
    return np.minimum(scale * np.exp(power * state.logps) / wrong, high)


def _check_share(owner: str, **options: Any) -> None:
    within(0, 1, "share", open_low=True)(owner, **options)
    within(1, np.inf, "every")(owner, **options)


@register_schedule("tail", "dynamic", metric=None, check=_check_share)
def tail(state: RunState, *, share: float = 0.5, every: int = 1) -> np.ndarray:
    """Only what is known best now: factor `1 / share` for the share of samples with the highest current p, else 0.

    The group form of distributionally robust unlearning (BalDRO, arXiv 2601.09172: the top half by what is left), over
    the forget set instead of the micro-batch; the mean of the worst `share` is also known as CVaR. Mean 1: the sample
    that the border cuts has a part of the factor, and so have equals there.

    Args:
        every: optimizer steps between two estimates.
    """
    return state.factor if state.step % int(every) else _lowest(-state.logps, round(share * len(state.logps), 9))


def _check_dro(owner: str, **options: Any) -> None:
    within(0, np.inf, "tau", open_low=True)(owner, **options)
    within(1, np.inf, "every")(owner, **options)


@register_schedule("dro", "dynamic", metric=None, check=_check_dro)
def dro(state: RunState, *, tau: float = 0.25, every: int = 1) -> np.ndarray:
    """Distributionally robust: factor proportional to `exp(left / tau)`, left = the current p, mean 1.

    The maximiser of `sum_i w_i left_i - tau KL(w, uniform)` (BalDRO, arXiv 2601.09172). The sign is the point: what is
    still remembered is pushed. With a forget *loss* in place of what is left, what is forgotten would be.

    Args:
        tau: temperature; towards 0 only the best known sample counts, towards infinity all alike.
        every: optimizer steps between two estimates.
    """
    if state.step % int(every):
        return state.factor
    weights = np.exp((state.probability - state.probability.max()) / tau)
    return weights / weights.mean()


def _check_dual(owner: str, **options: Any) -> None:
    within(0, 1, "target", "low", open_low=True)(owner, **options)  # from 0 no multiplier comes back
    within(0, 100, "rate")(owner, **options)
    within(1, 1e6, "high")(owner, **options)


@register_schedule("dual", "dynamic", metric=None, check=_check_dual)
def dual(
    state: RunState, *, target: float = 0.1, rate: float = 0.25, low: float = 0.01, high: float = 20.0
) -> np.ndarray:
    """A multiplier for each sample: whenever it is served, `w_i *= exp(rate (log p_i - log target))`, in [low, high].

    Exponentiated dual ascent on the constraints `p_i <= target`: the retain loss is what is minimised, and what is not
    forgotten yet pulls ever harder. The sample-wise form of PDU's retain multiplier (Entesari et al. 2025, arXiv
    2506.05314). The mean is not 1: it says how far the constraints are from being met.

    Args:
        rate: step size, eta.
    """
    result, rows = state.factor.copy(), state.served
    change = rate * (state.logps[rows] - np.log(target))
    result[rows] = np.exp(np.clip(np.log(result[rows]) + change, np.log(low), np.log(high)))
    return result


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
    return _lowest(state.logps, np.ceil(competence(np.array(state.progress), start, until) * size))


def _lowest(values: np.ndarray, count: float) -> np.ndarray:
    """`N / count` for the `count` lowest values, else 0; those on the border share what is left of it, mean 1.

    Equals are treated alike, whatever row they are in.
    """
    size = len(values)
    border = np.sort(values)[min(int(np.ceil(count)), size) - 1]
    below, equal = values < border, values == border
    part = (count - below.sum()) / equal.sum()
    return (below + part * equal) * (size / count)


class DynamicWeights:
    """The factors of a run, one part after the other multiplied, and their state.

    Args:
        parts: names and options, as in `Schedule.dynamic`.
        logps: mean answer log-probability of each forget sample under the original model, `[N]`.
        steps: optimizer steps of the whole run.
        values: metrics that the parts read, by name, `[N]` each, as in `Schedule.values`.
        planned: samples that the run serves, without repeats and sorted; by default all. Nothing is known, in a run, of
            the others: the parts do not see them, and their factor is 1.
    """

    def __init__(
        self,
        parts: tuple[tuple[str, dict[str, Any]], ...],
        logps: np.ndarray,
        steps: int,
        values: Mapping[str, np.ndarray] | None = None,
        planned: np.ndarray | None = None,
    ) -> None:
        self.parts, self.steps, self.step = parts, steps, 0
        self.planned = np.arange(len(logps)) if planned is None else planned
        self.values = {name: np.asarray(column)[self.planned] for name, column in (values or {}).items()}
        self.logps = np.maximum(np.asarray(logps, dtype=np.float64), FLOOR)
        self.factors = [np.ones(len(logps)) for _ in parts]
        self._estimate(np.array([], dtype=int))

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
        self._estimate(np.unique(rows))

    def _estimate(self, served: np.ndarray) -> None:
        progress = min(self.step / max(self.steps, 1), 1.0)
        logps, rows = self.logps[self.planned], np.searchsorted(self.planned, served)
        for number, (name, options) in enumerate(self.parts):
            before = self.factors[number][self.planned]
            rule = SCHEDULES[name]
            values = {metric: self.values[metric] for metric in rule.metrics}
            state = RunState(logps.copy(), before, self.step, progress, rows, values)
            factor = np.asarray(rule.function(state, **options), dtype=np.float64)
            if factor.shape != logps.shape or not (np.isfinite(factor).all() and (factor >= 0).all()):
                raise ValueError(f"schedule {name!r} must return one finite factor of at least 0 per forget sample")
            self.factors[number] = np.ones(len(self.logps))
            self.factors[number][self.planned] = factor

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
