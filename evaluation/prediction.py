"""Does one kind of features say more than another of what unlearning leaves? Pure functions of arrays.

`N` samples in groups (authors, topics). Fits are cross-fitted by group: a sample is scored by a fit to samples of other
groups. Figures have bootstrap intervals over groups: they are arrays `[1 + B]`, the figure of all samples and then that
of each of `B` draws, so that means and differences of figures are those of the arrays, and `interval` says what they
come to. Fits are not made anew for a draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold, cross_val_predict

from cud_trainer.data.groups import group_labels
from cud_trainer.difficulty.folds import make_folds

from .statistics import BOOTSTRAP, LEVELS, Interval, undefined

PENALTIES = np.logspace(-3, 4, 15)
SCALES = (0.3, 1.0, 3.0)  # of what a step adds, beside 0: nothing
INNER_FOLDS = 5
STILL = 1e-6  # a feature that varies by no more than that says nothing


def falls_to(path: np.ndarray, level: float) -> float | None:
    """Where a path `[T]` is first at `level` or below it, its points joined by straight lines: a position in
    [0, T - 1]; `None` if it never is."""
    below = np.flatnonzero(np.asarray(path) <= level)
    if not below.size:
        return None
    after = int(below[0])
    if after == 0:
        return 0.0
    return after - 1 + float((path[after - 1] - level) / (path[after - 1] - path[after]))


def nested_fits(
    steps: Sequence[Sequence[np.ndarray]], outcome: np.ndarray, groups: Sequence[Any], *, folds: int, seed: int
) -> np.ndarray:
    """Ranks of the outcome as each step predicts them from its own features and those of the steps before, `[S, N]`.

    Ridge regression from standardised blocks of features, each of the same total variance. A step is scaled against
    those before it by the factor (of `SCALES`, or 0: it says nothing), and the fit penalised by the penalty, with the
    least squared error in cross-validation by group inside the training samples. So a step that says nothing new can be
    left out, and costs the fit little.

    Args:
        steps: blocks of features `[N, p]` of each of the `S` steps.
        outcome: `[N]`; only its ranks are used, from 0 (lowest) to 1.
        groups: of each sample; in training and test samples there are none in common.
        folds: of the cross-fitting.
        seed: of the folds.
    """
    target = ranks(outcome)
    labels = np.array(group_labels(groups))
    fold = make_folds(len(target), folds, seed, groups)
    said = np.full((len(steps), len(target)), np.nan)
    for number in range(folds):
        test, train = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        inside = _Inside(target[train], labels[train])
        design, others = np.empty((len(train), 0)), np.empty((len(test), 0))
        best: tuple[float, float] | None = None
        for place, blocks in enumerate(steps):
            new, asked = _standardised(blocks, train, test)
            chosen = 0.0
            for scale in SCALES if place else (1.0,):
                found = inside.error(np.hstack([design, scale * new]))
                if best is None or found < best:
                    best, chosen = found, scale
            assert best is not None
            if chosen:
                design, others = np.hstack([design, chosen * new]), np.hstack([others, chosen * asked])
            said[place, test] = Ridge(alpha=best[1]).fit(design, target[train]).predict(others)
    return said


class _Inside:
    """Cross-validation by group inside the training samples of a fold."""

    def __init__(self, target: np.ndarray, groups: np.ndarray) -> None:
        self.target, self.groups = target, groups
        self.folds = GroupKFold(min(INNER_FOLDS, len(set(groups))))

    def error(self, design: np.ndarray) -> tuple[float, float]:
        """Least mean squared error of any penalty, and that penalty."""
        copies = np.repeat(self.target[:, None], len(PENALTIES), axis=1)  # a fit for each penalty at once
        said = cross_val_predict(Ridge(alpha=PENALTIES), design, copies, groups=self.groups, cv=self.folds)
        errors = ((said - copies) ** 2).mean(0)
        best = int(errors.argmin())
        return float(errors[best]), float(PENALTIES[best])


def _standardised(blocks: Sequence[np.ndarray], train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training and test rows of the blocks, together of variance 1 in training, turned onto the span of the training
    rows: that leaves a ridge fit as it is, and makes it cheap."""
    sides: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for block in blocks:
        mean, deviation = block[train].mean(0), block[train].std(0)
        moving = deviation > STILL
        scale = np.where(moving, deviation, np.inf) * np.sqrt(max(1, int(moving.sum())) * len(blocks))
        for side, rows in zip(sides, (train, test), strict=True):
            side.append((block[rows] - mean) / scale)
    known, asked = map(np.hstack, sides)
    axes = np.linalg.svd(known, full_matrices=False)[2]
    return known @ axes.T, asked @ axes.T


def ranks(values: np.ndarray) -> np.ndarray:
    """Mid-ranks of `values [N]`, from 0 (lowest) to 1."""
    return (rankdata(values) - 0.5) / len(values)


def rank_r2(said: np.ndarray, outcome: np.ndarray) -> float:
    """Share of the variance of the outcome's ranks that predicted ranks account for: 1 = all, 0 = no better than their
    mean, below 0 = worse. `said` is `[N]`, or `[R, N]` of several partitions into folds: the mean over them.

    Args:
        outcome: ranks, `[N]`, or those of a draw; they are not ranked anew.
    """
    spread = ((outcome - outcome.mean()) ** 2).sum()
    return float(1 - (((said - outcome) ** 2).sum(-1) / spread).mean()) if spread > 0 else float("nan")


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, in [-1, 1]; NaN where either is constant. `x` may be `[R, N]`: the mean over its rows."""
    return _correlation(rankdata(x, axis=-1), rankdata(y))


def partial_rank_correlation(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> float:
    """Spearman's of `x` and `y` where the ranks of `given` are taken out of the ranks of both, in [-1, 1]; `x` and
    `given` may be `[R, N]`: the mean over rows."""
    found = []
    for one, control in zip(np.atleast_2d(x), np.atleast_2d(given), strict=True):
        by = rankdata(control) - (len(control) + 1) / 2
        sides = [rankdata(side) - (len(side) + 1) / 2 for side in (one, y)]
        square = by @ by
        sides = [side - by * (by @ side / square) if square > 0 else side for side in sides]
        found.append(_correlation(*sides) if min(side @ side for side in sides) > 1e-9 else np.nan)
    return float(np.mean(found))


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(-1, keepdims=True), y - y.mean()
    norm = np.sqrt((x * x).sum(-1) * (y @ y))
    return float(np.mean((x @ y) / norm)) if np.all(norm > 0) else float("nan")


def halves(groups: Sequence[Any], splits: int, seed: int) -> np.ndarray:
    """Random halves of the groups: whether each sample is in the first, bool `[splits, N]`."""
    return np.stack([make_folds(len(groups), 2, seed + split, groups) == 0 for split in range(splits)])


def transferred(scores: np.ndarray, first: np.ndarray, outcome: np.ndarray) -> float:
    """Spearman of scores that come from the other half, within each half, mean over both and over splits.

    Args:
        scores: `[splits, N]`, or `[N]` where they are the same in all.
        first: as of `halves`.
        outcome: `[N]`.
    """
    scores = np.broadcast_to(scores, first.shape)
    sides = [(row, side) for row, half in zip(scores, first, strict=True) for side in (half, ~half)]
    return float(np.mean([rank_correlation(row[side], outcome[side]) if side.any() else np.nan for row, side in sides]))


def bootstrapped(
    figures: Callable[[np.ndarray], Mapping[str, float]],
    groups: Sequence[Any],
    *,
    seed: int | Sequence[int],
    n_boot: int = BOOTSTRAP,
) -> dict[str, np.ndarray]:
    """Figures of all samples and of `n_boot` draws of groups with replacement, `[1 + n_boot]` each.

    The same groups and seed give the same draws, so that figures of two conditions can be averaged and compared.

    Args:
        figures: from rows (drawn groups come again) to figures by name.
    """
    _, place = np.unique(np.array(group_labels(groups)), return_inverse=True)
    rows_of = [np.flatnonzero(place == group) for group in range(place.max() + 1)]
    generator = np.random.default_rng(seed)
    drawn = [np.arange(len(place))]
    for _ in range(n_boot):
        drawn.append(np.concatenate([rows_of[group] for group in generator.integers(0, len(rows_of), len(rows_of))]))
    found = [figures(rows) for rows in drawn]
    return {name: np.array([one[name] for one in found]) for name in found[0]}


def interval(figure: np.ndarray) -> Interval:
    """What a figure `[1 + B]` comes to: its value of all samples, and 95% percentiles of its draws."""
    value, draws = float(figure[0]), figure[1:]
    if not np.isfinite(value):
        return undefined("it does not vary")
    if not np.isfinite(draws).any():
        return Interval(value, float("nan"), float("nan"))
    low, high = np.nanpercentile(draws, LEVELS)
    return Interval(value, float(low), float(high))


def adds(gain: Interval, worth: float) -> str:
    """Whether a step adds something: `"yes"` where its gain is `worth` or more and its interval above 0, `"no"` where
    the interval ends below `worth`, else `"undecided"`."""
    if gain.high < worth:
        return "no"
    return "yes" if gain.value >= worth and gain.low > 0 else "undecided"
