"""Does predicted difficulty earn its place? The rule, stated before any run, and what it says of finished ones.

An arm is one way to unlearn, run with several seeds; arms are paired by seed and compared by H@0.1 (`endpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .endpoint import ROUNDING
from .statistics import Interval, paired_change, t_interval

MARGIN = 0.02  # of H
SEEDS = 4  # at least, where the other never gets there: there is no interval to go by
Verdict = Literal["yes", "no", "undecided"]

RULE = (
    "H is the share of the held-out answer probability that a run keeps when the worst quarter of its forget set is "
    "down to 0.10, or to what a model that never saw it says, if that is more. "
    f"A difficulty earns its place (yes) if it keeps at least {MARGIN:g} more of H than the random difficulty and "
    "than every arm without difficulty, paired by seed, each with its 95% t interval over seeds above 0, and if the "
    "mean that is left at H = 90% is not higher by more than seeds differ. It does not (no) if one of the intervals "
    f"of H ends below {MARGIN:g}. Anything else is undecided. A run that never gets to the endpoint has no H: an arm "
    "that does not get there in a seed in which the other does cannot earn its place, and one that does where the "
    f"other does not cannot be refused it; where the other never does, {SEEDS} seeds in which it always does "
    "are enough."
)


@dataclass(frozen=True)
class Arm:
    """What the runs of one way to unlearn came to.

    Attributes:
        kept: H by seed, 1 = all is kept; `None` for a run that never got to the endpoint.
        left: mean forget probability at H = 90%, by seed (`Endpoint.left_at_kept`).
    """

    kept: Mapping[int, float | None]
    left: Mapping[int, float]


@dataclass(frozen=True)
class Comparison:
    """One arm less another, paired by seed.

    Attributes:
        seeds: those in which both got to the endpoint; intervals are over these.
        won, lost: seeds in which only the first, only the other did.
        difference: of H, mean and 95% t interval over seeds.
        change: relative, of H: `exp` of the mean log ratio less 1, and of its t interval.
        left: difference of the mean that is left at H = 90%, over all seeds in common.
        verdict: of the rule, against this arm alone.
    """

    seeds: tuple[int, ...]
    won: tuple[int, ...]
    lost: tuple[int, ...]
    difference: Interval
    change: Interval
    left: Interval
    verdict: Verdict


@dataclass(frozen=True)
class Decision:
    """Attributes:
    verdict: of the rule.
    comparisons: with every arm that it asks for, by name.
    reason: for an `undecided` that no further seed would change; empty otherwise.
    """

    verdict: Verdict
    comparisons: Mapping[str, Comparison]
    reason: str = ""


def compare(ours: Arm, other: Arm) -> Comparison:
    """Two arms, over the seeds that both were run with."""
    shared = sorted(set(ours.kept) & set(other.kept))
    reached = {seed: (ours.kept[seed] is not None, other.kept[seed] is not None) for seed in shared}
    both, won, lost = (
        tuple(seed for seed in shared if reached[seed] == which)
        for which in ((True, True), (True, False), (False, True))
    )

    kept = tuple(np.array([of.kept[seed] for seed in both], dtype=float) for of in (ours, other))
    left = t_interval(np.array([ours.left[seed] - other.left[seed] for seed in shared]))
    difference = t_interval(kept[0] - kept[1])
    verdict = _verdict(difference, left, len(both), len(won), len(lost))
    return Comparison(both, won, lost, difference, paired_change(*kept), left, verdict)


def _verdict(difference: Interval, left: Interval, both: int, won: int, lost: int) -> Verdict:
    """By numbers of seeds in which both, only ours, only the other got to the endpoint."""
    if both == 0:
        return "yes" if won >= SEEDS and not lost else "no" if lost >= SEEDS and not won else "undecided"
    if both == 1:
        return "undecided"
    enough = difference.value >= MARGIN - ROUNDING and difference.low > ROUNDING
    if enough and not left.low > ROUNDING and not lost:
        return "yes"
    return "no" if difference.high < MARGIN - ROUNDING and not won else "undecided"


def decide(ours: Arm, placebo: Mapping[str, Arm], without: Mapping[str, Arm]) -> Decision:
    """Whether the difficulty of `ours` earns its place.

    Args:
        placebo: arms with a random difficulty, by name.
        without: arms without difficulty, by name. Each has to be beaten, so that none has to be picked as the best.
    """
    comparisons = {name: compare(ours, other) for name, other in {**placebo, **without}.items()}
    verdicts = {comparison.verdict for comparison in comparisons.values()}
    if "no" in verdicts:
        return Decision("no", comparisons)
    lacking = [what for what, arms in (("a random difficulty", placebo), ("no difficulty", without)) if not arms]
    if lacking:
        return Decision("undecided", comparisons, f"there is no arm with {' and none with '.join(lacking)}")
    return Decision("yes" if verdicts == {"yes"} else "undecided", comparisons)
