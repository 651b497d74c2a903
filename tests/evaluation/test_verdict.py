"""The verdict: the rule on made-up samples of which the truth is known, and what the report says of it."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from evaluation.commands.endings import after_evaluating, answers
from evaluation.metrics.leak import LeakRule
from evaluation.metrics.measure import Measured
from evaluation.report.attacks import Groups, attack_row
from evaluation.report.page import summary, write_report
from evaluation.report.schema import Head, Results, Run, jsonable, read_results
from evaluation.report.story import Evidence, verdict_of
from evaluation.report.verdict import FORGOTTEN, HIDDEN, LEAKING, OVER, UNKNOWN, judge, said
from evaluation.statistics import Interval

SIZE = 24


def never_seen(size, seed, spread=0.7):
    """Answer probabilities of samples that a model never saw."""
    return 1 / (1 + np.exp(1.2 - np.random.default_rng(seed).normal(0, spread, size)))


def pair(size, seed):
    """The same of two models that never saw the samples."""
    first = never_seen(size, seed)
    noise = np.exp(np.random.default_rng(seed + 1000).normal(0, 0.25, size))
    odds = first / (1 - first) * noise
    return odds / (1 + odds), first


def judged(case, seed=0, leaking=0, share=1.0):
    """A judgement of each kind; the first `leaking` samples are still known, the others at `share` of never-seen ones."""
    if case == "holdout":
        left, level = never_seen(SIZE, seed), {"holdout": never_seen(40, seed + 500)}
    else:
        left, reference = pair(SIZE, seed)
        level = {"reference": reference}
    if case == "both":
        level["holdout"], level["holdout_reference"] = pair(40, seed + 500)
    left = left * share
    left[:leaking] = 0.9
    return judge(left, **level), left


CASES = ("holdout", "reference", "both")


@pytest.mark.parametrize("case", CASES)
class TestRule:
    def test_what_was_never_seen_is_forgotten(self, case):
        """By chance about one in fifteen is called still above."""
        states = [judged(case, seed)[0].state for seed in range(40)]
        assert states.count(FORGOTTEN) >= 34

    @pytest.mark.parametrize("leaking", [1, 3, 12, SIZE])
    def test_samples_that_leak_are_found_however_many_there_are(self, case, leaking):
        """Their own spread hides none: it draws no line."""
        found, left = judged(case, leaking=leaking)
        assert found.state == LEAKING and found.above[:leaking].all() and found.above[leaking:].sum() <= 3
        assert said(found, left, "p").startswith("Still above what samples get that were never in the data: ")

    def test_far_below_tells_too(self, case):
        found, left = judged(case, share=0.05)
        assert found.state == OVER and not found.above.any() and found.below.sum() > SIZE / 2
        assert "which also tells" in said(found, left, "p")

    def test_a_leak_among_what_is_over_forgotten_is_found(self, case):
        found, _ = judged(case, share=0.05, leaking=2)
        assert found.state == LEAKING and found.above.sum() == 2

    def test_one_sample_that_is_not_finite_is_no_verdict(self, case):
        _, left = judged(case)
        left[3] = np.nan
        found = judge(
            left, **({"holdout": never_seen(40, 1)} if case == "holdout" else {"reference": never_seen(24, 1)})
        )
        assert found.state == UNKNOWN and "1 of 24 are not finite" in said(found, left, "p")


def test_without_a_level_nothing_is_said():
    left = never_seen(SIZE, 0)
    assert judge(left).state == UNKNOWN
    assert "cannot be said without a reference model or never-seen samples" in said(judge(left), left, "p")
    few = judge(left, holdout=never_seen(7, 1))
    assert few.state == UNKNOWN and "at least 8" in few.reason


def test_all_a_little_above_is_above_on_average():
    """None stands out, but the mean does."""
    level = np.full(40, 0.2) + np.linspace(-0.1, 0.1, 40)
    left = np.full(SIZE, 0.28) + np.linspace(-0.01, 0.01, SIZE)
    found = judge(left, holdout=level)
    assert found.state == LEAKING and not found.above.any()
    assert "on average" in said(found, left, "p") and found.difference.value == pytest.approx(0.08)
    assert judge(level + 0.005, holdout=level).state == FORGOTTEN  # less than 0.01 does not count


def test_the_line_and_what_is_above_by_chance():
    """The second highest of 40 never-seen samples; by hand, and by drawing both sets from one pot."""
    others, left = np.arange(1, 41) / 100, np.full(SIZE, 0.2)
    found = judge(left, holdout=others)
    assert found.line[0] == pytest.approx(0.39 + 0.01) and found.expected == pytest.approx(SIZE * 2 / 41)
    generator = np.random.default_rng(0)
    counts = []
    for _ in range(2000):
        pot = generator.random(64)
        counts.append((pot[:24] > np.sort(pot[24:])[-2]).sum())
    assert np.mean(counts) == pytest.approx(found.expected, abs=0.1)
    law = scipy_stats.betabinom(24, 2, 39)
    assert np.mean(np.array(counts) >= 3) == pytest.approx(law.sf(2), abs=0.02)


def test_samples_of_a_group_hang_together():
    """Two groups a little above: as samples they are many, as groups they are two."""
    left = np.repeat([0.21, 0.29], 12)
    level = np.tile([0.18, 0.24], 12)
    groups = (np.repeat(["a", "b"], 12).tolist(), np.repeat(list("wxyz"), 6).tolist())
    apart, together = judge(left, holdout=level), judge(left, holdout=level, groups=groups)
    width = [found.difference.high - found.difference.low for found in (apart, together)]
    assert width[1] > width[0] and apart.difference.value == pytest.approx(together.difference.value)


def measured(forget, retain=None, holdout=None, **more):
    sets = {"forget": forget, "retain": retain, "holdout": holdout}
    made = {
        name: {"probability": values, "verbatim": (values > 0.8).astype(float)}
        for name, values in sets.items()
        if values is not None
    }
    return Measured(made, **more)


IDS = [f"customer {number} <b>" for number in range(SIZE)]
RETAIN = np.linspace(0.85, 0.99, 30)


def evidence(leaking=0, kept=1.0, **more):
    reference = never_seen(SIZE, 0)
    left = reference * np.tile([0.9, 1.0, 1.1], SIZE // 3)
    left[:leaking] = 0.9
    before = measured(np.full(SIZE, 0.95), RETAIN)
    known = {"after": measured(left, RETAIN * kept), "before": before, "reference": measured(reference, RETAIN)}
    return Evidence(ids=IDS, **(known | more))


class TestStory:
    def test_a_leak_is_named_and_all_agree(self):
        verdict = verdict_of(evidence(leaking=3), 0)
        assert verdict.state == LEAKING and set(verdict.ids) == set(IDS[:3])
        assert "3 of 24 samples" in verdict.headline and IDS[0] not in verdict.headline
        assert [row.sample_id for row in verdict.samples[:3]] == verdict.ids and len(verdict.samples) == 10
        assert [row.above for row in verdict.samples] == [True] * 3 + [False] * 7
        assert verdict.parts[0].above == 3 and verdict.judged[0].above == verdict.ids
        told = answers(verdict)
        assert told[0] == f"is it gone? {verdict.headline} ({', '.join(verdict.ids)})"
        assert "leak most" in after_evaluating(verdict)

    def test_cost_is_told_with_a_warning_above_5_percent(self):
        little, much = (verdict_of(evidence(kept=kept), 0) for kept in (0.96, 0.9))
        assert [row.warning for row in little.costs] == [False, False] and "Warning" not in little.cost
        assert much.costs[0].lost == pytest.approx(0.1) and much.costs[0].warning
        assert "answer probability 0.920 -> 0.828 (-10.0%)" in much.cost and "Warning: more than 5%" in much.cost
        assert "--original_model" in verdict_of(evidence(before=None), 0).cost

    def test_hidden_only_beyond_the_control(self):
        """What never-seen samples gain as well is no accusation, and without them it cannot be told."""

        def state(gain, control):
            other = None if control is None else np.full(30, control)
            noise = np.linspace(-0.01, 0.01, SIZE)
            row = attack_row("relearning", "5 steps", np.full(SIZE, gain) + noise, other, Groups(), 0)
            verdict = verdict_of(evidence(attacks=[row]), 0)
            return verdict.state, verdict.hidden[0].answer

        assert state(0.2, 0.2) == (FORGOTTEN, "no")
        assert state(0.2, 0.02) == (HIDDEN, "yes")
        assert state(0.205, 0.2) == (FORGOTTEN, "no")  # less than 0.01 does not count
        assert state(0.2, None) == (FORGOTTEN, "cannot be told")
        verdict = verdict_of(evidence(), 0)
        assert [row.answer for row in verdict.hidden] == ["not tried"] * 4
        assert "--relearn_samples" in after_evaluating(verdict)

    def test_reworded_and_sampled(self):
        known = evidence()
        left, theirs = (one.sets["forget"]["probability"] for one in (known.after, known.reference))
        known.after.paraphrased, known.reference.paraphrased = left + 0.3, theirs + 0.02
        known.after.leaks["forget"] = {"rouge": np.repeat([4, 0], 12)}
        known.reference.leaks["forget"] = {"rouge": np.zeros(SIZE)}
        told = {row.how: row for row in verdict_of(evidence(after=known.after, leak=LeakRule(4)), 0).hidden}
        assert told["rewording"].answer == told["sampled answers"].answer == "cannot be told"
        both = {"after": known.after, "reference": known.reference}
        told = {row.how: row for row in verdict_of(evidence(**both, leak=LeakRule(4)), 0).hidden}
        assert told["rewording"].answer == told["sampled answers"].answer == "yes"
        assert told["sampled answers"].said.startswith("12 of 24 samples leak in 4 answers each")

    def test_the_secret_is_judged_too_and_the_worse_of_the_two_is_the_verdict(self):
        known = evidence()
        has = np.arange(SIZE) < 12
        theirs = known.reference.sets["forget"]["probability"].copy()
        own = np.where(np.arange(SIZE) < 2, 0.95, theirs)
        known.after.secret["forget"] = {"secret_probability": np.where(has, own, np.nan)}
        known.reference.secret["forget"] = {"secret_probability": np.where(has, theirs, np.nan)}
        more = {"after": known.after, "reference": known.reference, "secret": {"forget": has}}
        verdict = verdict_of(evidence(**more), 0)
        assert verdict.state == LEAKING and set(verdict.ids) == set(IDS[:2])
        assert [row.state for row in verdict.judged] == [LEAKING, FORGOTTEN]
        assert verdict.judged[0].measure == "probability of the secret" and verdict.judged[0].n == 12

    def test_nothing_unlearned_comes_first(self):
        verdict = verdict_of(evidence(leaking=SIZE, wrong="the model is the same: nothing was unlearned"), 0)
        assert verdict.headline.startswith("The model is the same: nothing was unlearned. Still above")


def test_in_the_files(tmp_path):
    """Ids are keyed where they are hashes, escaped, and in no model card; results are read back as they were."""
    plain = [f"sha256:{number:016x}" for number in range(SIZE)]
    known = evidence(leaking=3)
    for folder, ids in (("own", IDS), ("hashes", plain)):
        verdict = verdict_of(Evidence(**(vars(known) | {"ids": ids})), 0)
        run = Run(command="", seed=0, versions={}, model={}, data={}, seconds={})
        results = Results(head=Head.now("t"), findings=["f"], verdict=verdict, run=run)
        page = write_report(results, tmp_path / folder, pd.DataFrame({"sample_id": ids}))
        text, card = page.read_text(), (tmp_path / folder / "summary.md").read_text()
        assert "Is it gone? No." in text and "<b> <" not in text and "customer" not in card
        assert "sha256:" not in text + (tmp_path / folder / "results.json").read_text()
        assert ("customer 1 &lt;b&gt;" in text) == (folder == "own") and ("hmac:" in text) == (folder == "hashes")
        assert page.stat().st_mode & 0o077 == 0 and "Still above what samples get" in card
        assert (tmp_path / folder / "plots" / "verdict.svg").is_file()
        assert jsonable(read_results(jsonable(results))) == jsonable(results)
    assert summary(results).startswith("## Unlearning\n\n**Is it gone?** Still above")
    assert isinstance(read_results(jsonable(results)).verdict.judged[0].left, Interval)
