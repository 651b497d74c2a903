"""Statistics against scipy, scikit-learn and formulas by hand; invariants by property tests."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from sklearn.metrics import roc_auc_score

from evaluation import statistics as stats

series = st.lists(st.floats(-1e6, 1e6), min_size=5, max_size=30)


def data(n=60, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=n)
    return x, x + generator.normal(size=n), generator.normal(size=(n, 2))


def test_agrees_with_scipy():
    x, y, _ = data()
    y = np.round(y, 1)  # ties
    assert stats.spearman(x, y).value == pytest.approx(scipy_stats.spearmanr(x, y).statistic)
    assert stats.kendall(x, y, n_boot=20).value == pytest.approx(scipy_stats.kendalltau(x, y).statistic)


def test_mean_interval_is_the_textbook_one_for_many_samples():
    values = np.random.default_rng(1).normal(3, 2, size=2000)
    found = stats.bootstrap_mean(values, seed=0)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=half / 10)
    assert found.high == pytest.approx(values.mean() + half, abs=half / 10)


def test_paired_change_is_the_t_interval_of_log_ratios():
    a, b = np.array([0.02, 0.05, 0.3]), np.array([0.4, 0.5, 0.6])
    found = stats.paired_change(a, b)
    low, high = scipy_stats.ttest_1samp(np.log(a / b), 0).confidence_interval(0.95)
    assert found.value == pytest.approx((0.05 * 0.1 * 0.5) ** (1 / 3) - 1)
    assert (found.low, found.high) == pytest.approx((np.expm1(low), np.expm1(high)))


def test_paired_change_never_ends_below_minus_one():
    """Two seeds that disagree say nothing, and say so; one seed has no interval."""
    found = stats.paired_change(np.array([1e-9, 0.9]), np.array([0.9, 0.9]))
    assert found.low >= -1 and found.high > 1000
    single = stats.paired_change(np.array([0.1]), np.array([0.4]))
    assert single.value == pytest.approx(-0.75) and math.isnan(single.low) and math.isnan(single.high)
    for a, b in (([0.0, 0.1], [0.1, 0.1]), ([], [])):
        assert math.isnan(stats.paired_change(np.array(a), np.array(b)).value)


def test_partial_against_the_inverse_correlation_matrix():
    x, y, controls = data()
    x, y = x + controls[:, 0], y + controls[:, 1]
    ranks = np.column_stack([scipy_stats.rankdata(v) for v in (x, y, *controls.T)])
    precision = np.linalg.inv(np.corrcoef(ranks.T))
    expected = -precision[0, 1] / math.sqrt(precision[0, 0] * precision[1, 1])
    assert stats.partial_spearman(x, y, controls, n_boot=50).value == pytest.approx(expected)


def test_partial_is_undefined_when_the_controls_say_it_all():
    x, y, controls = data()
    for determined in (controls[:, 0], np.exp(controls[:, 1])):
        assert math.isnan(stats.partial_spearman(determined, y, controls, n_boot=10).value)
        assert math.isnan(stats.partial_spearman(x, determined, controls, n_boot=10).value)


def test_auroc_of_the_extreme_quarters():
    score, target, _ = data(40)
    found = stats.auroc_extremes(score, target, n_boot=50)
    order = np.argsort(target)
    chosen = np.r_[order[:10], order[-10:]]
    assert found.value == pytest.approx(roc_auc_score([0] * 10 + [1] * 10, score[chosen]))
    assert stats.auroc_extremes(target, target, n_boot=50).value == 1.0
    assert stats.auroc_extremes(-target, target, n_boot=50).value == 0.0


def test_intervals_are_those_of_scipy_and_scikit_learn_draw_by_draw():
    """The draws are computed all at once; here one after the other, by the libraries, ties and all."""
    x, y, controls = data(40)
    x, y = np.round(x, 1), np.round(y, 1)
    # No figure depends on the order of the samples: they are sorted before any is drawn.
    order = np.lexsort((*controls.T[::-1], y, x))
    x, y, controls = x[order], y[order], controls[order]
    rows = np.random.default_rng(3).integers(0, 40, (100, 40))

    def interval(figure, rows=rows):
        return np.nanpercentile([figure(row) for row in rows], [2.5, 97.5])

    def partial(row):
        ranks = np.column_stack([scipy_stats.rankdata(v[row]) for v in (x, y, *controls.T)])
        precision = np.linalg.inv(np.corrcoef(ranks.T))
        return -precision[0, 1] / math.sqrt(precision[0, 0] * precision[1, 1])

    order = np.argsort(y, kind="stable")
    low, high = (order[(y <= np.sort(y)[9])[order]], order[(y >= np.sort(y)[-10])[order]])  # equal targets together
    chosen, label = np.r_[low, high], np.repeat([0, 1], [len(low), len(high)])
    extreme = np.random.default_rng(3).integers(0, len(chosen), (100, len(chosen)))
    expected = {
        stats.spearman: interval(lambda row: scipy_stats.spearmanr(x[row], y[row]).statistic),
        stats.partial_spearman: interval(partial),
        stats.auroc_extremes: interval(lambda row: roc_auc_score(label[row], x[chosen][row]), extreme),
        stats.paired_difference: interval(lambda row: np.sort(x - y)[row].mean()),
    }
    for figure, (low, high) in expected.items():
        more = (controls,) if figure is stats.partial_spearman else ()
        found = figure(x, y, *more, seed=3, n_boot=100)
        assert (found.low, found.high) == pytest.approx((low, high))


def test_auroc_is_undefined_when_the_extremes_share_a_value():
    """Otherwise a score that follows the order of the rows looks perfect on a target that is constant."""
    score = np.arange(40.0)
    assert math.isnan(stats.auroc_extremes(score, np.ones(40), n_boot=10).value)
    assert stats.auroc_extremes(score, (score >= 30).astype(float), n_boot=10).value == 1.0


def test_ceiling():
    x, _, _ = data(200)
    noise = np.random.default_rng(2).normal(size=(3, 200))
    found = stats.ceiling(x + noise, n_boot=50)
    pairs = [scipy_stats.spearmanr(x + noise[i], x + noise[j]).statistic for i, j in ((0, 1), (0, 2), (1, 2))]
    r = np.mean(pairs)
    assert found["agreement"]["value"] == pytest.approx(r)
    assert found["attainable"] == pytest.approx(math.sqrt(3 * r / (1 + 2 * r)))
    # The formula's claim: it is about the correlation of the truth with the mean over the seeds.
    assert found["attainable"] == pytest.approx(scipy_stats.spearmanr(x, (x + noise).mean(0)).statistic, abs=0.05)
    assert stats.ceiling(np.stack([x, -x]), n_boot=10)["attainable"] is None


def test_paired_difference():
    a, b, _ = data()
    found = stats.paired_difference(a, b)
    assert found.value == pytest.approx((a - b).mean())
    assert found == stats.bootstrap_mean(a - b)
    assert stats.paired_difference(a, a) == stats.Interval(0.0, 0.0, 0.0)


def test_coverage_of_the_spearman_interval():
    """About 95% of intervals from independent samples contain the value of a very large one."""
    x, y, _ = data(20_000, seed=5)
    truth = scipy_stats.spearmanr(x, y).statistic
    inside = 0
    for start in range(100):
        rows = slice(start * 80, start * 80 + 80)
        found = stats.spearman(x[rows], y[rows], seed=start, n_boot=200)
        inside += found.low <= truth <= found.high
    assert 86 <= inside <= 100


def test_same_seed_same_interval():
    x, y, _ = data()
    assert stats.spearman(x, y, seed=3) == stats.spearman(x, y, seed=3) != stats.spearman(x, y, seed=4)


@settings(deadline=None, max_examples=30)
@given(series, st.integers(0, 100))
def test_rank_statistics_do_not_see_monotone_changes(values, seed):
    x = np.array(values)
    y = np.random.default_rng(seed).normal(size=len(x))
    first = stats.spearman(x, y, n_boot=5)
    second = stats.spearman(np.arctan(x / 1e3), y, n_boot=5)
    if len(set(np.arctan(x / 1e3))) == len(set(x)) and not math.isnan(first.value):
        assert second.value == pytest.approx(first.value)
        assert -1 <= first.value <= 1
        assert stats.spearman(-x, y, n_boot=5).value == pytest.approx(-first.value)
    if len(set(x)) == 1:
        assert math.isnan(first.value)


@settings(deadline=None, max_examples=30)
@given(series)
def test_interval_of_a_mean_lies_within_the_data(values):
    found = stats.bootstrap_mean(np.array(values), n_boot=50)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= found.low <= found.high <= max(values) + slack


def test_refusals():
    with pytest.raises(ValueError, match="equal length"):
        stats.spearman(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="at least two seeds"):
        stats.ceiling(np.ones((1, 5)))
    with pytest.raises(ValueError, match="rows for"):
        stats.partial_spearman(np.ones(3), np.ones(3), np.ones((4, 1)))
    assert stats.bootstrap_mean(np.array([])).reason == "no samples"


def every_figure(x, y, controls, n_boot=8):
    """All statistics of two series, by name."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    found = {
        "mean": stats.bootstrap_mean(x, n_boot=n_boot),
        "difference": stats.paired_difference(x, y, n_boot=n_boot),
        "apart": stats.difference_of_means(x, y, n_boot=n_boot),
        "change": stats.paired_change(x, y),
        "spearman": stats.spearman(x, y, n_boot=n_boot),
        "against": stats.spearman_difference(x, controls[:, 0], y, seed=0, n_boot=n_boot),
        "kendall": stats.kendall(x, y, n_boot=n_boot),
        "partial": stats.partial_spearman(x, y, controls, n_boot=n_boot),
        "auroc": stats.auroc_extremes(x, y, n_boot=n_boot),
        "ceiling": stats.Interval(**stats.ceiling(np.stack([x, y]), n_boot=n_boot)["agreement"]),
    }
    return {name: (one.value, one.low, one.high, one.reason) for name, one in found.items()}


def test_what_is_not_finite_is_no_figure_and_says_why():
    x, y, controls = data(30)
    for value in (np.nan, np.inf, -np.inf):
        broken = np.where(np.arange(30) % 10 == 3, value, x)
        found = every_figure(broken, y, controls)
        assert {reason for *_, reason in found.values()} == {"3 of 30 are not finite"}
        assert all(np.isnan(figure[0]) for figure in found.values())
    assert stats.spearman(np.ones(5), np.arange(5.0)).reason == "it does not vary"
    assert "reason" not in stats.bootstrap_mean(x).as_dict() and stats.undefined("why").as_dict()["reason"] == "why"


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 6), min_size=8, max_size=30), st.integers(0, 99))
def test_no_figure_depends_on_the_order_of_the_samples(values, seed):
    generator = np.random.default_rng(seed)
    x = np.array(values) / 7 + 0.1
    y, controls = generator.integers(1, 5, len(x)) / 3, generator.integers(0, 3, (len(x), 2)).astype(float)
    order = generator.permutation(len(x))
    first, moved = every_figure(x, y, controls), every_figure(x[order], y[order], controls[order])
    for name, figure in first.items():
        np.testing.assert_equal(moved[name], figure, name)


def test_t_interval_is_that_of_scipy():
    values = np.array([0.1, 0.4, 0.2, 0.25])
    low, high = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = stats.t_interval(values)
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), low, high))
    assert math.isnan(stats.t_interval(values[:1]).low) and math.isnan(stats.t_interval(values[:0]).value)


def test_crossed_bootstrap_draw_by_draw():
    """Seeds and groups at once, here one draw after the other; a ratio of sums where there is one."""
    generator = np.random.default_rng(0)
    values, per, groups = generator.random((3, 10)), 1 + generator.random((3, 10)), list("aabbbccccd")
    values = values[np.argsort(values[:, :2].sum(1))]  # seeds are sorted by what they say of the first group
    found = stats.crossed_bootstrap(values, groups, per=per, seed=1, n_boot=300)
    assert found.value == pytest.approx(values.sum() / per.sum())
    source = np.random.default_rng(1)
    seeds, drawn = source.multinomial(3, [1 / 3] * 3, 300), source.multinomial(4, [1 / 4] * 4, 300)
    draws = []
    for rows, counts in zip(seeds, drawn, strict=True):
        weights = np.outer(rows, [counts["abcd".index(group)] for group in groups])
        draws.append((weights * values).sum() / (weights * per).sum())
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])))


def test_crossed_bootstrap_is_wider_than_either_alone():
    """Groups that differ and seeds that differ both count; one of a kind has no interval."""
    by_group, by_seed = np.tile([0.0, 0, 0, 1, 1, 1], (4, 1)), np.repeat([[0.0], [1.0], [0.0], [1.0]], 6, axis=1)
    groups = [0, 1, 2, 3, 4, 5]
    for values in (by_group, by_seed):
        found = stats.crossed_bootstrap(values, groups)
        assert found.value == pytest.approx(0.5) and found.high - found.low > 0.5
    assert math.isnan(stats.crossed_bootstrap(by_group[:1], groups).low)
    assert math.isnan(stats.crossed_bootstrap(by_group, [0] * 6).low)
    same = stats.crossed_bootstrap(np.full((3, 6), 0.25), groups)
    assert (same.low, same.high) == pytest.approx((0.25, 0.25))
    with pytest.raises(ValueError, match="need a row of a seed, 5 samples"):
        stats.crossed_bootstrap(by_group, groups[:5])
