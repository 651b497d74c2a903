"""Is it gone, of many runs: by the rule of one model, run by run, and what the top of a study's page says of it."""

from types import SimpleNamespace

import numpy as np
import pytest
from test_verdict import judged, never_seen

from cud_trainer.difficulty import Buckets
from evaluation.report.verdict import FORGOTTEN, LEAKING, UNKNOWN
from evaluation.study.heldout import Unseen
from evaluation.study.verdicts import DIVERGED, arm_verdicts, verdicts

SIZE = 24


def run(seed, leaking=0, unseen=True, kept=0.9, diverged=None):
    """A run that has come to its end: the samples of `judged` against 40 never-seen ones."""
    left = judged("holdout", seed, leaking)[1]
    return SimpleNamespace(
        seed=seed,
        final={},
        forget=np.array([np.full(SIZE, 0.9), left]),
        unseen=never_seen(40, seed + 500) if unseen else None,
        retain=np.array([0.9, kept]),
        held_out=np.array([[0.8, 0.8], [0.8, 0.4]]),
        buckets=Buckets.single(SIZE),
        hardest=np.ones(SIZE, dtype=bool),
        diverged=diverged,
    )


def top(**arms):
    rows, findings = arm_verdicts("npo", arms, Unseen(), None, 0)
    return verdicts(rows, [], [], "try"), findings


def test_every_run_is_judged_as_one_model_is():
    found, findings = top(a=[run(1), run(2, leaking=3)], b=[run(3), run(4)])
    for row, runs in zip(found.arms, ([(1, 0), (2, 3)], [(3, 0), (4, 0)]), strict=True):
        alone = [judged("holdout", seed, leaking)[0] for seed, leaking in runs]
        assert row.states == [one.state for one in alone] and row.above == [int(one.above.sum()) for one in alone]
        assert row.level == pytest.approx(np.mean([one.level.mean() for one in alone]))
    assert found.arms[0].states == [FORGOTTEN, LEAKING] and found.state == LEAKING
    assert found.answer == "In 3 of 4 runs, as far as was measured; still above in 1."
    assert [line.split(":")[0] for line in findings] == [
        f"npo, {arm}, seed {seed}" for arm, seed in zip("aabb", range(1, 5), strict=True)
    ]


def test_costs_are_those_of_the_runs_and_warn_by_the_rule():
    found, _ = top(a=[run(1), run(2)], b=[run(1, kept=0.8)])
    (retain, held_out), (costly, _) = found.arms[0].costs, found.arms[1].costs
    assert (retain.before.value, retain.after.value, retain.warning) == (pytest.approx(0.9), pytest.approx(0.9), False)
    assert held_out.lost == pytest.approx(0.25) and held_out.warning and costly.warning
    assert "2 of 2 arms lost more than 5%" in found.headline


def test_without_a_level_it_cannot_be_said_and_a_diverged_run_is_not_gone():
    found, _ = top(a=[run(1, unseen=False)])
    assert (found.state, found.answer) == (UNKNOWN, "That cannot be said.") and "holdout_dataset" in found.headline
    assert found.arms[0].level is None and found.arms[0].above is None
    found, _ = top(a=[run(1, diverged="too high"), run(3)])
    assert found.arms[0].states == [DIVERGED, FORGOTTEN] and found.state == DIVERGED
    assert found.answer.startswith("In 1 of 2 runs")
    reference = Unseen(reference=never_seen(SIZE, 1))
    rows, _ = arm_verdicts("npo", {"a": [run(1, leaking=3, unseen=False)]}, reference, None, 0)
    assert rows[0].states == [LEAKING]  # against a model that never saw them
