"""The decision rule on synthetic runs whose truth is known, and what it must not hang on."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from evaluation.decision import MARGIN, SEEDS, Arm, compare, decide
from evaluation.endpoint import LEVEL, endpoint, worst_quarter

RANDOM, WITHOUT = "random", "uniform"


def arm(kept, left=0.03):
    kept = dict(enumerate(kept, 1))
    return Arm(kept, dict.fromkeys(kept, left))


def run(skill, seed, noise=0.0, n=40, held_out=20):
    """A synthetic run: each sample fades at its own rate, those ranked hardest (with `skill`) are pushed the more, and
    held-out knowledge fades with every step; returns its endpoint."""
    generator = np.random.default_rng(seed)
    hard = generator.random(n)  # the truth, the same for every arm of a seed
    known = skill * hard + (1 - skill) * np.random.default_rng(1000 + seed).random(n)
    rate = (1.5 - hard) * (1 + 2 * known)
    steps = np.arange(60)
    forget = np.exp(-0.12 * np.outer(steps, rate))
    fading = 0.004 * (1 + noise * generator.normal())
    kept = np.exp(-fading * steps)[:, None] * np.full(held_out, 0.9)
    return endpoint(forget, kept)


def arm_of(skill, seeds, noise=0.0):
    ends = {seed: run(skill, seed, noise) for seed in seeds}
    return Arm({s: e.kept for s, e in ends.items()}, {s: e.left_at_kept for s, e in ends.items()})


def test_a_placebo_comes_out_no_and_an_oracle_yes():
    seeds = range(1, 6)
    placebo, uniform, oracle = (arm_of(skill, seeds) for skill in (0.0, 0.0, 1.0))
    assert decide(oracle, {RANDOM: placebo}, {WITHOUT: uniform}).verdict == "yes"
    assert decide(placebo, {RANDOM: placebo}, {WITHOUT: uniform}).verdict == "no"
    # another placebo, as good as the first but not the same
    other = Arm({s: k + 0.002 * (-1) ** s for s, k in placebo.kept.items()}, placebo.left)
    assert decide(other, {RANDOM: placebo}, {WITHOUT: uniform}).verdict == "no"


def test_a_tie_that_the_seeds_cannot_tell_is_undecided():
    ours, placebo = arm([0.95, 0.90, 0.96, 0.89]), arm([0.90, 0.95, 0.91, 0.94])
    found = decide(ours, {RANDOM: placebo}, {WITHOUT: placebo})
    assert found.verdict == "undecided" and not found.reason
    assert found.comparisons[RANDOM].difference.value == pytest.approx(0)


def test_every_arm_without_difficulty_has_to_be_beaten():
    ours, weak, strong = arm([0.99, 0.98, 0.99]), arm([0.90, 0.89, 0.91]), arm([0.985, 0.978, 0.986])
    assert decide(ours, {RANDOM: weak}, {"uniform": weak}).verdict == "yes"
    assert decide(ours, {RANDOM: weak}, {"uniform": weak, "tail": strong}).verdict == "no"
    assert decide(ours, {RANDOM: strong}, {"uniform": weak}).verdict == "no"


def test_the_mean_may_not_be_higher():
    ours, other = [0.99, 0.98, 0.99], [0.90, 0.89, 0.91]
    assert compare(arm(ours, 0.02), arm(other, 0.02)).verdict == "yes"
    assert compare(arm(ours, 0.05), arm(other, 0.02)).verdict == "undecided"


def test_never_is_a_value_of_its_own():
    reached, never = [0.95, 0.96, 0.95, 0.96], [None] * SEEDS
    assert compare(arm(reached), arm(never)).verdict == "yes"
    assert compare(arm(never), arm(reached)).verdict == "no"
    assert compare(arm(reached[:-1]), arm(never[:-1])).verdict == "undecided"  # too few seeds
    assert compare(arm(never), arm(never)).verdict == "undecided"
    won = compare(arm(reached), arm([0.95, 0.96, 0.95, None]))  # equal where both get there: no interval says no
    assert (won.verdict, won.won, won.lost, won.seeds) == ("undecided", (4,), (), (1, 2, 3))
    lost = compare(arm([0.95, 0.96, 0.95, None]), arm([0.8, 0.8, 0.8, 0.8]))
    assert (lost.verdict, lost.lost) == ("undecided", (4,))
    assert compare(arm([0.95]), arm([0.5])).verdict == "undecided"  # one seed has no interval


def test_what_is_lacking_is_said():
    ours, other = arm([0.99, 0.98, 0.99]), arm([0.90, 0.89, 0.91])
    assert decide(ours, {}, {WITHOUT: other}).reason == "there is no arm with a random difficulty"
    assert decide(ours, {RANDOM: other}, {}).verdict == "undecided"
    assert decide(other, {RANDOM: ours}, {}).verdict == "no"
    assert "random difficulty and none with no difficulty" in decide(ours, {}, {}).reason


def test_intervals_are_those_of_the_t_test():
    a, b = np.array([0.95, 0.97, 0.91]), np.array([0.9, 0.95, 0.9])
    found = compare(arm(a), arm(b))
    interval = scipy_stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.difference.low, found.difference.high) == pytest.approx(tuple(interval))
    assert found.change.value == pytest.approx(np.prod(a / b) ** (1 / 3) - 1)


@pytest.mark.parametrize("shift", [-1e-7, 0.0, 1e-7])
def test_nothing_hangs_on_rounding(shift):
    assert compare(arm([0.95 + MARGIN + shift] * 3), arm([0.95] * 3)).verdict == "yes"
    assert compare(arm([0.95 + shift] * 3), arm([0.95] * 3)).verdict == "no"
    assert compare(arm([0.99] * 3, 0.03 + shift), arm([0.9] * 3, 0.03)).verdict == "yes"
    forget = np.array([[1.0, 0, 0, 0], [LEVEL + shift, 0, 0, 0], [0, 0, 0, 0]])
    assert endpoint(forget, np.array([1.0, 0.9 + shift, 0.5])).snapshot == 1
    assert endpoint(forget, np.array([1.0, 0.9 + shift, 0.5])).worst_at_kept == pytest.approx(LEVEL, abs=1e-6)


shares = st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=2, max_size=6)


@given(shares)
def test_who_beats_does_not_lose(values):
    """The two directions never both come out "yes", nor does an arm beat itself; the order of seeds is of no matter."""
    ours, other = (arm(column) for column in zip(*values, strict=True))
    there, back = compare(ours, other), compare(other, ours)
    assert (there.verdict, back.verdict) != ("yes", "yes")
    if there.verdict == "yes":
        assert back.verdict == "no"
    assert compare(ours, ours).verdict == "no"
    turned = [arm(column) for column in zip(*values[::-1], strict=True)]
    assert compare(*turned).difference.value == pytest.approx(there.difference.value)


@given(shares, st.floats(0.02, 0.2))
def test_a_better_arm_has_no_worse_verdict(values, more):
    order = ("no", "undecided", "yes")
    ours, other = (list(column) for column in zip(*values, strict=True))
    before, after = compare(arm(ours), arm(other)), compare(arm([h + more for h in ours]), arm(other))
    assert order.index(after.verdict) >= order.index(before.verdict)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_worst_quarter_bounds(values):
    found = worst_quarter(np.array(values))
    assert np.mean(values) - 1e-12 <= found <= max(values) + 1e-12 and not math.isnan(found)
