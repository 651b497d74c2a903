"""Is it gone? The rule of `cud evaluate` on every run that a study reports, as it is at its end, arm by arm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cud_trainer.training.residual import COSTLY

from ..report.schema import AttackRow
from ..report.story import UNTRIED, cost, returned_by
from ..report.verdict import FORGOTTEN, LEAKING, OVER, RULE, UNKNOWN, Judgement, judge, said
from ..report.verdict_schema import ANSWER, ArmVerdict, Cost, Returned, Verdicts
from ..statistics import Interval
from .heldout import Unseen
from .runs import Run

DIVERGED = "diverged"
AVERAGE = f"{LEAKING} on average"  # no sample stands out
UNBOUNDED = (float("nan"), float("nan"))  # a mean over seeds, of samples that are not kept one by one
NEEDS = "reference_model, holdout_dataset"
LACKING = f"Give a model that never saw the forget samples, or other such samples ({NEEDS})."
HOW = "Each run is judged at its end, which may be further than where schedules are compared."


def arm_verdicts(
    objective: str, chosen: Mapping[str, Sequence[Run]], unseen: Unseen, groups: Sequence[Any] | None, seed: int
) -> tuple[list[ArmVerdict], list[str]]:
    """The verdict on each arm, and a finding on each of its runs.

    Args:
        chosen: the runs that are reported of each arm.
        groups: of each forget sample.
        seed: of the bootstrap.
    """
    rows, findings = [], []
    for arm, runs in chosen.items():
        found = {run.seed: (run, *_judged(run, unseen, groups, seed)) for run in runs}
        for number, (run, judgement, left) in found.items():
            line = f"training diverged: {run.diverged}" if run.diverged else said(judgement, left, ANSWER)
            findings.append(f"{objective}, {arm}, seed {number}: {line}")
        rows.append(_row(objective, arm, found))
    return rows, findings


def _judged(run: Run, unseen: Unseen, groups: Sequence[Any] | None, seed: int) -> tuple[Judgement, np.ndarray]:
    """The rule on one run, and what it has left of each forget sample."""
    left = run.final["forget"]["probability"] if run.final else run.forget[-1]
    of_both = groups, unseen.groups
    return judge(left, unseen.reference, run.unseen, unseen.holdout, groups=of_both, seed=seed), left


def _row(objective: str, arm: str, found: Mapping[int, tuple[Run, Judgement, np.ndarray]]) -> ArmVerdict:
    runs = [run for run, _, _ in found.values()]
    judgements = [judgement for _, judgement, _ in found.values()]
    left = np.mean([values for _, _, values in found.values()], axis=0)
    levels = [float(one.level.mean()) for one in judgements if one.level is not None]
    row = ArmVerdict(
        objective=objective,
        arm=arm,
        seeds=list(found),
        states=[DIVERGED if run.diverged else _state(one) for run, one, _ in found.values()],
        n=len(left),
        left=float(left.mean()),
        hardest=float(left[runs[0].hardest].mean()) if runs[0].buckets.count > 1 else None,
        level=float(np.mean(levels)) if levels else None,
        above=[int(one.above.sum()) for one in judgements if one.above is not None] or None,
        costs=_costs(runs),
        said="",
    )
    row.said = _said(row)
    return row


def _state(one: Judgement) -> str:
    return AVERAGE if one.state == LEAKING and one.above is not None and not one.above.any() else one.state


def _costs(runs: Sequence[Run]) -> list[Cost]:
    """What the runs kept of what measures utility and of the held-out samples, from their start to their end."""
    paths = {"retain": [run.retain for run in runs], "held-out": [run.held_out for run in runs]}
    made = []
    for name, of_runs in paths.items():
        known = [path for path in of_runs if path is not None]
        if known:
            start, end = (Interval(float(np.mean([path[at].mean() for path in known])), *UNBOUNDED) for at in (0, -1))
            made.append(cost(name, ANSWER, None, start, end))
    return made


def _said(row: ArmVerdict) -> str:
    """The row in words."""
    states = Counter(row.states)
    judged = ", ".join(
        f"{state}" + (f" ({number} of {len(row.states)} seeds)" if len(states) > 1 else "")
        for state, number in states.most_common()
    )
    line = f"{row.objective}, {row.arm}: {judged}; left {row.left:.3f}"
    if row.level is not None:
        line += f", never seen {row.level:.3f}"
    for one in row.costs:
        line += f"; {one.set} {one.before.value:.3f} -> {one.after.value:.3f}"
        line += "" if one.lost is None else f" ({round(-100 * one.lost) + 0:+d}%)"
    return line


def verdicts(
    arms: Sequence[ArmVerdict], compared: Sequence[str], attacks: Sequence[AttackRow], untried: str
) -> Verdicts:
    """The top of the report on many runs.

    Args:
        compared: how the arms compare, in sentences.
        attacks: what was done to the weights of their runs.
        untried: what to do where nothing was.
    """
    states = Counter(state for row in arms for state in row.states)
    count = states.total()
    answer, headline, state = _answer(states, count), HOW, FORGOTTEN
    if set(states) <= {UNKNOWN}:
        headline, state = f"{LACKING} {HOW}", UNKNOWN
    elif states[FORGOTTEN] < count:
        state = next(one for one in (LEAKING, AVERAGE, OVER, DIVERGED, UNKNOWN) if states[one])
    lost = [row for row in arms if any(one.warning for one in row.costs)]
    if lost:
        headline += f" {len(lost)} of {len(arms)} arms lost more than {COSTLY:.0%} of what was to be kept."
    hidden = [returned_by(row) for row in attacks] or [Returned(how="relearning", answer=UNTRIED, said=untried)]
    top = {"state": state, "answer": answer, "headline": headline, "rule": RULE}
    return Verdicts(**top, arms=list(arms), compared=list(compared), hidden=hidden)


def _answer(states: Counter[str], count: int) -> str:
    if set(states) <= {UNKNOWN}:
        return "That cannot be said."
    if states[FORGOTTEN] == count:
        return f"Yes, in {'the run' if count == 1 else f'all {count} runs'}, as far as was measured."
    others = ", ".join(f"{state} in {number}" for state, number in states.most_common() if state != FORGOTTEN)
    if not states[FORGOTTEN]:
        return f"In none of {count} runs: {others}."
    return f"In {states[FORGOTTEN]} of {count} runs, as far as was measured; {others}."
