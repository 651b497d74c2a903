"""What one kind of features says beyond another: fits against an oracle, known worlds, and `benchmarks/prediction.py`."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.model_selection import GroupKFold

from cud_trainer.difficulty.folds import make_folds
from evaluation.prediction import (
    PENALTIES,
    SCALES,
    adds,
    bootstrapped,
    falls_to,
    halves,
    interval,
    nested_fits,
    partial_rank_correlation,
    rank_correlation,
    rank_r2,
    ranks,
    transferred,
)
from evaluation.statistics import Interval, partial_spearman

ROOT = Path(__file__).parents[2]
GROUPS = [f"author {row // 4}" for row in range(160)]


def ridge(design, target, penalty):
    """Coefficients by the normal equations, and the intercept."""
    mean = design.mean(0)
    centred = design - mean
    slopes = np.linalg.solve(centred.T @ centred + penalty * np.eye(design.shape[1]), centred.T @ target)
    return slopes, target.mean() - mean @ slopes


def by_hand(steps, outcome, groups, folds, seed):
    """The fits of `nested_fits`, without turning anything onto a span, one penalty at a time."""
    target, fold = (stats.rankdata(outcome) - 0.5) / len(outcome), make_folds(len(outcome), folds, seed, groups)
    said = np.zeros((len(steps), len(outcome)))
    for number in range(folds):
        train, test = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        inner = list(GroupKFold(min(5, len(set(groups[train])))).split(train, groups=groups[train]))
        design, best = np.zeros((len(outcome), 0)), None
        for place, blocks in enumerate(steps):
            scaled = [(b - b[train].mean(0)) / b[train].std(0) / np.sqrt(b.shape[1] * len(blocks)) for b in blocks]
            before = design
            for scale in SCALES if place else (1.0,):
                tried = np.hstack([before, scale * np.hstack(scaled)])
                for penalty in PENALTIES:
                    errors = []
                    for known, asked in inner:
                        slopes, intercept = ridge(tried[train[known]], target[train[known]], penalty)
                        errors.extend((tried[train[asked]] @ slopes + intercept - target[train[asked]]) ** 2)
                    if best is None or np.mean(errors) < best[0] - 1e-12:
                        best, design = (np.mean(errors), penalty), tried
            slopes, intercept = ridge(design[train], target[train], best[1])
            said[place, test] = design[test] @ slopes + intercept
    return said


@pytest.mark.parametrize(
    ("path", "level", "position"),
    [
        ([1.0, 0.8, 0.4], 0.8, 1.0),
        ([1.0, 0.8, 0.4], 0.5, 1.75),
        ([1.0, 0.8, 0.9, 0.2], 0.85, 0.75),  # the first time, though it comes back
        ([0.5, 0.4], 0.6, 0.0),
        ([1.0, 0.95], 0.9, None),
    ],
)
def test_where_a_path_falls(path, level, position):
    found = falls_to(np.array(path), level)
    assert found is None if position is None else found == pytest.approx(position)


def test_fits_by_hand():
    generator = np.random.default_rng(0)
    groups = np.array([f"g{row // 3}" for row in range(36)])
    base, wide, noise = (generator.normal(size=(36, width)) for width in (2, 50, 3))
    outcome = base[:, 0] + 0.8 * wide[:, 0] + 0.3 * generator.normal(size=36)
    steps = [[base], [wide, noise], [generator.normal(size=(36, 4))]]
    found = nested_fits(steps, outcome, groups, folds=3, seed=4)
    np.testing.assert_allclose(found, by_hand(steps, outcome, groups, 3, 4), atol=1e-8)


def test_no_sample_has_a_say_in_its_own_prediction():
    """Nor has its group: whatever happens to the outcomes of a fold, in their ranks, its predictions stay."""
    generator = np.random.default_rng(1)
    blocks, outcome = generator.normal(size=(160, 6)), generator.normal(size=160)
    fold = make_folds(160, 4, 0, GROUPS)
    changed = outcome.copy()
    changed[fold == 2] = generator.permutation(outcome[fold == 2])
    before, after = (nested_fits([[blocks]], values, GROUPS, folds=4, seed=0)[0] for values in (outcome, changed))
    np.testing.assert_array_equal(before[fold == 2], after[fold == 2])
    assert (before[fold != 2] != after[fold != 2]).any()


def world(own):
    """Outcome and features of 40 authors: `own` is how much the edges say that the loss does not."""
    generator = np.random.default_rng(2)
    author = np.repeat(generator.normal(size=40), 4)
    loss, secret = author + generator.normal(size=160), generator.normal(size=160)
    outcome = loss + own * secret + 0.5 * generator.normal(size=160)
    mixing = generator.normal(size=(2, 60))
    edges = np.column_stack([loss, own * secret]) @ mixing + 0.3 * generator.normal(size=(160, 60))
    return loss[:, None], edges, outcome


def gain(own):
    base, edges, outcome = world(own)
    said = np.stack([nested_fits([[base], [edges]], outcome, GROUPS, folds=5, seed=seed) for seed in (0, 1)], axis=1)
    alone = np.stack([nested_fits([[edges]], outcome, GROUPS, folds=5, seed=seed)[0] for seed in (0, 1)])
    target = ranks(outcome)

    def figures(rows):
        small, large = (rank_r2(fit[:, rows], target[rows]) for fit in said)
        given = partial_rank_correlation(alone[:, rows], outcome[rows], said[0][:, rows])
        return {"alone": rank_r2(alone[:, rows], target[rows]), "gain": large - small, "partial": given}

    found = bootstrapped(figures, GROUPS, seed=0, n_boot=300)
    return {name: interval(values) for name, values in found.items()}


def test_edges_that_only_repeat_the_loss_add_nothing():
    """Though they say much by themselves."""
    found = gain(0.0)
    assert found["alone"].low > 0.3
    assert adds(found["gain"], 0.02) == "no"
    assert abs(found["gain"].value) < 0.02 and found["partial"].low < 0 < found["partial"].high


def test_edges_that_know_more_add():
    found = gain(1.0)
    assert adds(found["gain"], 0.02) == "yes"
    assert found["gain"].low > 0.1 and found["partial"].low > 0.3


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ((0.05, 0.01, 0.09), "yes"),
        ((0.05, -0.01, 0.09), "undecided"),
        ((0.01, 0.001, 0.03), "undecided"),
        ((0.01, 0.005, 0.015), "no"),
        ((-0.02, -0.05, 0.01), "no"),
        ((float("nan"),) * 3, "undecided"),
    ],
)
def test_rule(ends, verdict):
    assert adds(Interval(*ends), 0.02) == verdict


def test_rank_r2():
    target = ranks(np.array([3.0, 1.0, 2.0, 9.0]))
    np.testing.assert_allclose(target, [0.625, 0.125, 0.375, 0.875])
    assert rank_r2(target, target) == 1.0
    assert rank_r2(np.full(4, 0.5), target) == pytest.approx(0.0)
    # residuals 0.1 each: 4 * 0.01 over a spread of 0.3125; of two partitions the mean
    assert rank_r2(target + 0.1, target) == pytest.approx(1 - 0.04 / 0.3125)
    assert rank_r2(np.stack([target + 0.1, target]), target) == pytest.approx(1 - 0.02 / 0.3125)
    assert np.isnan(rank_r2(target, np.ones(4)))


def test_correlations():
    generator = np.random.default_rng(3)
    x, y, control = generator.normal(size=(3, 30)).round(1)
    x, y = x + control, y + 2 * control
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    both = rank_correlation(np.stack([x, -x]), y)
    assert both == pytest.approx(0)
    expected = partial_spearman(x, y, control, n_boot=2).value
    assert partial_rank_correlation(x, y, control) == pytest.approx(expected)
    assert np.isnan(rank_correlation(np.ones(30), y)) and np.isnan(partial_rank_correlation(control, y, control))


def test_draws_are_of_groups():
    """Samples of a group come together and equally often; the first figure is that of all; draws are those of the seed."""
    seen = []

    def figures(rows):
        counts = np.bincount(rows, minlength=12).reshape(4, 3)
        assert (counts == counts[:, :1]).all() and counts[:, 0].sum() == 4
        seen.append(counts[:, 0])
        return {"mean": float(rows.mean())}

    groups = [f"g{row // 3}" for row in range(12)]
    found = bootstrapped(figures, groups, seed=[5, 1], n_boot=50)["mean"]
    assert found.shape == (51,) and found[0] == 5.5 and (seen[0] == 1).all()
    assert len({tuple(counts) for counts in seen}) > 10
    np.testing.assert_array_equal(bootstrapped(figures, groups, seed=[5, 1], n_boot=50)["mean"], found)
    assert (bootstrapped(figures, groups, seed=[5, 2], n_boot=50)["mean"] != found).any()
    summary = interval(found)
    assert (summary.low, summary.high) == tuple(np.percentile(found[1:], (2.5, 97.5))) and summary.value == 5.5


def test_transfer_is_within_halves():
    """A score that ranks each half well, and the halves against each other badly, is a good one."""
    first = halves(GROUPS, 3, 0)
    by_group = first.reshape(3, 40, 4)
    assert (by_group == by_group[..., :1]).all() and (by_group[..., 0].sum(1) == 20).all()
    assert (first[0] != first[1]).any() and (first[0] != first[2]).any()
    outcome = np.random.default_rng(0).normal(size=160)
    assert transferred(outcome - 10.0 * first, first, outcome) == pytest.approx(1)
    assert transferred(outcome, first, outcome) == pytest.approx(1)
    one = transferred(np.where(first[:1], outcome, -outcome), first[:1], outcome)
    assert one == pytest.approx(0)


@pytest.fixture
def prediction(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import prediction

    return prediction


@pytest.mark.slow
def test_every_part_of_the_benchmark(prediction, tmp_path, cells_in_process, monkeypatch):
    """Small; its banks are those of `fit` and `score`, and it goes on where it was."""
    from cud_trainer.difficulty import AnchorBank

    monkeypatch.setitem(prediction.TINY, "learning_rates", {"npo-lora": 1e-2})
    command = ["--tiny", "--work_dir", str(tmp_path / "work"), "--output", str(tmp_path)]
    prediction.main(command)
    found = json.loads((tmp_path / "prediction.json").read_text())
    assert found["worlds"]["tiny"]["forget"] == 12 and found["worlds"]["tiny"]["authors"]["forget"] == 6
    (condition,) = found["conditions"].values()
    assert set(condition["figures"]) == {"left", "later, bank of outcomes", "later, bank of a calibration", "lost"}
    assert prediction.markdown(found) == (tmp_path / "prediction.md").read_text()
    for verdicts in (found["verdicts"]["npo-lora"], found["verdicts"]["all"]):
        assert len(verdicts) == 7 and set(verdicts.values()) <= {"yes", "no", "undecided"}
    assert "torch" in json.dumps(found["versions"])
    assert all(figure["value"] is not None for part in found["all"].values() for figure in part.values())

    of = prediction.known(tmp_path / "work" / "tiny-0", "forget")
    outcome, half = np.random.default_rng(0).random(12), halves(of.groups, 1, 0)
    scores = prediction.banks(of, outcome[None], half)
    rows, others = np.flatnonzero(half[0]), np.flatnonzero(~half[0])
    model, forget = of.context.model, of.context.forget
    groups = [of.groups[row] for row in rows]
    bank = AnchorBank.fit(
        model, forget.select(rows), outcome[rows], features=prediction.FEATURES, groups=groups, progress=False
    )
    for name, reads in prediction.BANKS.items():
        expected = bank.score(model, forget.select(others), features=reads, progress=False)
        np.testing.assert_allclose(scores[name][0, others], expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="not those whose features"):
        prediction.check_order(of, np.exp(of.context.answers[0])[::-1])

    monkeypatch.setattr("cud_trainer.scoring.calibration.calibrate", lambda *a, **k: pytest.fail("calibrated again"))
    before = (tmp_path / "prediction.json").read_bytes()
    prediction.main(command)
    assert (tmp_path / "prediction.json").read_bytes() == before
