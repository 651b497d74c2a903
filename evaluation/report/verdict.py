"""Is it gone? What is left of each forget sample against what samples get that were never in the data, by one rule.

The level is what a model says of the forget samples that never saw them (`reference`), or else what this model says of
other samples that it never saw (`holdout`). Never-seen samples differ among themselves, so a sample is above only if it
is above what 95% of them get, and a set only if more of it is above than chance explains. Nothing here knows of files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

from .. import statistics as stats
from ..statistics import Interval

LEAKING, HIDDEN, OVER, FORGOTTEN, UNKNOWN = "still above", "hidden", "over-forgotten", "forgotten", "cannot be said"
WORST_FIRST = (LEAKING, HIDDEN, OVER, FORGOTTEN, UNKNOWN)

SHARE = 0.05  # of never-seen samples that may be above the line
ALPHA = 0.05 / 3  # of each of the three ways to be above by chance
MARGIN = 0.01  # of probability: less does not count
FEWEST = 8  # never-seen samples that can draw a line
HALF = 0.5  # of the level: less is far below

REFERENCE, HOLDOUT = "reference model", "never-seen samples"
NO_LEVEL = "without a reference model or never-seen samples"

RULE = (
    f"A sample is above the line if it has over {MARGIN:g} more than all but {SHARE:.0%} of never-seen samples. "
    "Against a reference model what counts is the difference to that model on the same sample, and the line is drawn "
    "by the differences of never-seen samples, or, without such, by how far forget samples fall below it. The set is "
    f"still above if more samples are than chance explains (p < {ALPHA:.3f}, exact), if one sample stands out so far "
    f"that no one of the whole set would by chance (p < {ALPHA:.3f}), or if the mean is above with its 95% interval. "
    f"It is over-forgotten if more samples are below the lowest {SHARE:.0%} than chance explains, or if the mean is "
    "less than half of the level, with its interval. Else it is at or below the level."
)


@dataclass(frozen=True)
class Judgement:
    """What the rule says of one measure, `N` forget samples.

    Attributes:
        state: `LEAKING`, `OVER`, `FORGOTTEN` or `UNKNOWN`.
        against: what the level is of; `None` where there is none.
        reason: why nothing can be said.
        level: what each forget sample would get, never seen, `[N]`: of the reference model; else the mean of others.
        line: what is above it counts, `[N]`.
        above, below: beyond either line, bool `[N]`.
        expected: how many never-seen samples of `N` would be above.
        difference: of the mean, from the level.
    """

    state: str
    against: str | None = None
    reason: str | None = None
    level: np.ndarray | None = None
    line: np.ndarray | None = None
    above: np.ndarray | None = None
    below: np.ndarray | None = None
    expected: float | None = None
    difference: Interval | None = None


def judge(
    left: np.ndarray,
    reference: np.ndarray | None = None,
    holdout: np.ndarray | None = None,
    holdout_reference: np.ndarray | None = None,
    *,
    groups: tuple[Sequence[Any] | None, Sequence[Any] | None] = (None, None),
    seed: int = 0,
) -> Judgement:
    """The rule (`RULE`; docs/evaluation.md derives it).

    Args:
        left: of each forget sample under the unlearned model, in [0, 1], `[N]`; higher = more is left.
        reference: the same under a model that never saw them, `[N]`.
        holdout: of samples that nobody saw, under the unlearned model, `[M]`.
        holdout_reference: the same under the reference model.
        groups: of forget and holdout samples, for the interval of the mean.
    """
    if reference is None and holdout is None:
        return Judgement(UNKNOWN, reason=NO_LEVEL)
    against = HOLDOUT if reference is None else REFERENCE
    for values in (left, reference, holdout, holdout_reference):
        if values is not None and (reason := stats.why_undefined(values)):
            return Judgement(UNKNOWN, against, f"since {reason}")
    paired = reference is not None and holdout is not None and holdout_reference is not None
    paired = paired and len(holdout) >= FEWEST  # type: ignore[arg-type]
    base = np.zeros(len(left)) if reference is None else _logit(reference)
    gaps = _logit(left) - base
    if reference is None:
        assert holdout is not None
        control, usual = _logit(holdout), _logit(holdout)
        difference = stats.difference_of_means(left, holdout, groups=groups, seed=seed)
    elif paired:
        assert holdout is not None and holdout_reference is not None
        control, usual = _logit(holdout) - _logit(holdout_reference), base
        moved = holdout - holdout_reference
        difference = stats.difference_of_means(left - reference, moved, groups=groups, seed=seed)
    else:
        control, usual = -gaps, base  # by chance a sample is as often so far above the reference as below it
        difference = stats.difference_of_means(left - reference, np.zeros(1), groups=(groups[0], None), seed=seed)
    if len(control) < FEWEST:
        return Judgement(UNKNOWN, against, f"with {len(control)} samples to compare with: at least {FEWEST} are needed")
    rate, chance = _chance(len(control), len(left))
    edge, middle = _edge(control), float(np.median(control))
    if reference is not None:
        edge = max(edge, 0.0)
        if not paired:
            # What was forgotten too well lies far below the reference, and is no noise: two models that never saw a
            # sample differ on it by less than their samples do among themselves.
            edge = min(edge, max(_edge(usual) - float(np.median(usual)), 0.0))
        middle = min(middle, edge)
    # As of a normal distribution: so many times as far from the median as the edge is, none of the set is by chance.
    far = middle + (edge - middle) * float(scipy_stats.norm.isf(ALPHA / len(left)) / scipy_stats.norm.isf(rate))
    line = _probability(base + edge) + MARGIN
    above, stands_out = left > line, left > _probability(base + far) + MARGIN
    below = _logit(left) < -_edge(-usual)
    level = reference
    if level is None:
        assert holdout is not None
        level = np.full(len(left), float(holdout.mean()))
    state = FORGOTTEN
    if chance(int(below.sum())) < ALPHA or (difference.high < 0 and left.mean() < HALF * level.mean()):
        state = OVER
    if chance(int(above.sum())) < ALPHA or stands_out.any() or (difference.low > 0 and difference.value > MARGIN):
        state = LEAKING
    expected = rate * len(left)
    return Judgement(state, against, None, level, line, above, below, expected, difference)


def _rank(size: int) -> int:
    """The place from the top of the value that `SHARE` of `size` values are above, or fewer."""
    return max(1, int(SHARE * (size + 1)))


def _edge(values: np.ndarray) -> float:
    """What all but `SHARE` of the values have at most."""
    return float(np.sort(values)[-_rank(len(values))])


def _chance(size: int, others: int) -> tuple[float, Callable[[int], float]]:
    """The share of others that are above the edge of `size` values, and the chance that so many or more of them are.

    Others of the same kind: whatever the values are distributed like, how many are above the j-th largest of M has a
    beta-binomial distribution with j and M + 1 - j.
    """
    rank = _rank(size)
    exceeding = scipy_stats.betabinom(others, rank, size + 1 - rank)
    return rank / (size + 1), lambda count: float(exceeding.sf(count - 1))


def _logit(values: np.ndarray) -> np.ndarray:
    inside = np.clip(np.asarray(values, dtype=float), 1e-9, 1 - 1e-9)
    return np.log(inside / (1 - inside))


def _probability(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def said(found: Judgement, left: np.ndarray, what: str) -> str:
    """The judgement in one or two sentences, without ids.

    Args:
        left: of each forget sample, `[N]`.
        what: the measure, e.g. "answer probability".
    """
    if found.level is None or found.above is None or found.below is None or found.difference is None:
        return f"Whether it is gone cannot be said {found.reason} ({what})."
    count, size, others = int(found.above.sum()), len(left), "what samples get that were never in the data"
    figures = f"mean {what} {left.mean():.3f}, theirs {found.level.mean():.3f} ({found.against})"
    chance = f"by chance {found.expected:.1f} would be"
    if found.state == LEAKING and count == 0:
        return f"Still above {others}, on average: {figures}. None of {size} samples stands out."
    if found.state == LEAKING:
        return f"Still above {others}: {count} of {size} samples, {chance}; {figures}."
    if found.state == OVER:
        low = f"{int(found.below.sum())} of {size} samples are below the lowest {SHARE:.0%} of them"
        return f"Over-forgotten: far below {others}, which also tells: {figures}; {low}."
    return f"At or below {others}: {figures}. {count} of {size} samples above the line; {chance}."
