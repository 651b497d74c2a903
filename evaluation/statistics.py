"""Statistics with intervals. Pure functions of numpy arrays; all randomness comes from an explicit seed.

Intervals are 95% percentile bootstrap intervals over samples: they say how far the figure would move with other samples
of the same kind, nothing about other models or runs. Schedules are compared over seeds: `t_interval`, `paired_change`,
and `crossed_bootstrap`, which draws seeds and groups of samples.

No figure depends on the order of the samples: they are sorted by what is known of them before any is drawn. Where one
of them is not finite there is no figure, and `Interval.reason` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from cud_trainer.data.ranks import ends

BOOTSTRAP = 1000
PIECE = 1 << 18  # values of the draws that are in memory at a time
LEVELS = (2.5, 97.5)


@dataclass(frozen=True)
class Interval:
    """A figure and its 95% interval; NaN where it is undefined, and why."""

    value: float
    low: float
    high: float
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"value": self.value, "low": self.low, "high": self.high}
        return plain if self.reason is None else {**plain, "reason": self.reason}


def undefined(reason: str | None = None) -> Interval:
    """No figure, and why."""
    return Interval(float("nan"), float("nan"), float("nan"), reason)


def why_undefined(*series: np.ndarray) -> str | None:
    """Why there is no figure of these series over the same samples, `[N]` each (or `[N, C]`); `None` if there is."""
    size = len(series[0])
    broken = ~np.all([np.isfinite(one).reshape(size, -1).all(1) for one in series], axis=0) if size else np.ones(0)
    return f"{int(broken.sum())} of {size} are not finite" if broken.any() else None if size else "no samples"


def _in_order(*series: np.ndarray) -> list[np.ndarray]:
    """The same samples, sorted by the first series, equal ones by the next, and so on."""
    order = np.lexsort(series[::-1])
    return [one[order] for one in series]


def _bootstrap(size: int, figure: Callable[[np.ndarray], np.ndarray], seed: int, n_boot: int) -> Interval:
    """`figure` of all rows, and its percentile interval over rows drawn with replacement.

    Args:
        figure: from many selections of rows, int `[B, size]`, to the figure of each, `[B]`.
    """
    value = float(figure(np.arange(size)[None])[0])
    if not np.isfinite(value):
        return undefined("it does not vary")
    draws = np.concatenate([figure(rows) for rows in _draws(np.random.default_rng(seed), size, n_boot)])
    if not np.isfinite(draws).any():
        return Interval(value, float("nan"), float("nan"))
    low, high = np.nanpercentile(draws, LEVELS)
    return Interval(value, float(low), float(high))


def _draws(generator: np.random.Generator, size: int, n_boot: int) -> Iterator[np.ndarray]:
    """Rows drawn with replacement, int `[B, size]`, `n_boot` in all; in pieces, so that they need little memory."""
    piece = max(1, PIECE // max(1, size))
    for start in range(0, n_boot, piece):
        yield generator.integers(0, size, (min(piece, n_boot - start), size))


def _pair(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"two series of equal length are needed, got shapes {x.shape} and {y.shape}")
    return x, y


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation over the last axis; NaN where either is constant."""
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    norm = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.where(norm > 0, (a * b).sum(-1) / np.where(norm > 0, norm, 1.0), np.nan)


def _ranks(values: np.ndarray) -> np.ndarray:
    return stats.rankdata(values, axis=-1)


def bootstrap_mean(values: np.ndarray, *, seed: int = 0, n_boot: int = 2000) -> Interval:
    """Mean of `values [N]`; NaN for no values, or where one is not finite."""
    values = np.sort(np.asarray(values, dtype=float))
    if reason := why_undefined(values):
        return undefined(reason)
    return _bootstrap(values.size, lambda rows: values[rows].mean(-1), seed, n_boot)


def paired_difference(a: np.ndarray, b: np.ndarray, *, seed: int = 0, n_boot: int = 2000) -> Interval:
    """Mean of `a - b` over the same samples, `[N]` each."""
    a, b = _pair(a, b)
    if reason := why_undefined(a, b):
        return undefined(reason)
    return bootstrap_mean(a - b, seed=seed, n_boot=n_boot)


def difference_of_means(
    a: np.ndarray,
    b: np.ndarray,
    *,
    groups: tuple[Sequence[Any] | None, Sequence[Any] | None] = (None, None),
    seed: int = 0,
    n_boot: int = 2000,
) -> Interval:
    """Mean of `a` less mean of `b`, other samples, `[N]` and `[M]`; each side is drawn apart.

    Args:
        groups: of the samples of either side, which are drawn together then; `None`: each sample for itself. A side
            with one group has nothing to draw: the ends are NaN.
    """
    a, b = (np.asarray(side, dtype=float) for side in (a, b))
    if reason := why_undefined(a) or why_undefined(b):
        return undefined(reason)
    generator = np.random.default_rng(seed)
    left, right = (_drawn_means(side, of, generator, n_boot) for side, of in zip((a, b), groups, strict=True))
    low, high = np.percentile(left - right, LEVELS)
    return Interval(float(np.sort(a).mean() - np.sort(b).mean()), float(low), float(high))


def _drawn_means(
    values: np.ndarray, groups: Sequence[Any] | None, generator: np.random.Generator, n_boot: int
) -> np.ndarray:
    """Means of `values [N]` over samples, or groups of samples, drawn with replacement, `[n_boot]`."""
    if groups is None:
        values = np.sort(values)
        return np.concatenate([values[rows].mean(1) for rows in _draws(generator, len(values), n_boot)])
    _, place = np.unique(np.array([str(group) for group in groups]), return_inverse=True)
    sums, sizes = _in_order(np.bincount(place, weights=values), np.bincount(place).astype(float))
    if len(sums) < 2:
        return np.full(n_boot, np.nan)
    return np.concatenate([sums[rows].sum(1) / sizes[rows].sum(1) for rows in _draws(generator, len(sums), n_boot)])


def t_interval(values: np.ndarray) -> Interval:
    """Mean of `values [S]`, one of each seed, with its 95% t interval; the ends are NaN with fewer than two seeds."""
    values = np.sort(np.asarray(values, dtype=float))
    if reason := why_undefined(values):
        return undefined(reason)
    middle = float(values.mean())
    if values.size == 1:
        return Interval(middle, float("nan"), float("nan"))
    reach = float(stats.t.ppf(LEVELS[1] / 100, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return Interval(middle, middle - reach, middle + reach)


def paired_change(a: np.ndarray, b: np.ndarray) -> Interval:
    """Relative change from `b` to `a` over the same seeds, `[S]` each, positive: -1 is nothing left, 0 is no change.

    `exp` of the mean of `log(a / b)`, less 1, and of its 95% t interval over seeds, so no end is below -1. One seed has
    no interval (NaN ends).
    """
    a, b = _in_order(*_pair(a, b))
    if reason := why_undefined(a, b):
        return undefined(reason)
    if not ((a > 0) & (b > 0)).all():
        return undefined("nothing is left, or was there, under one of the seeds")
    ratio = t_interval(np.log(a / b))
    with np.errstate(over="ignore"):  # two seeds that disagree: an end at infinity is what they say
        value, low, high = (float(np.expm1(end)) for end in (ratio.value, ratio.low, ratio.high))
    return Interval(value, low, high)


def crossed_bootstrap(
    values: np.ndarray, groups: Sequence[Any], *, per: np.ndarray | None = None, seed: int = 0, n_boot: int = 2000
) -> Interval:
    """Mean of `values`, with a 95% interval over seeds and groups of samples, both drawn with replacement at once.

    Args:
        values: `[S, N]`, a row of each seed.
        groups: of each sample, `N` names: samples of a group are drawn together.
        per: `[S, N]`: the figure is the sum of `values` over the sum of these, drawn alike.

    Returns:
        NaN ends with one seed or one group: an interval over the other alone would pass for one over both.

    Raises:
        ValueError: when the shapes differ.
    """
    values = np.asarray(values, dtype=float)
    per = np.ones_like(values) if per is None else np.asarray(per, dtype=float)
    if values.ndim != 2 or values.shape[1] != len(groups) or per.shape != values.shape:
        raise ValueError(f"values {values.shape} and per {per.shape} need a row of a seed, {len(groups)} samples")
    if reason := why_undefined(values.ravel(), per.ravel()):
        return undefined(reason)
    names, place = np.unique(np.array([str(group) for group in groups]), return_inverse=True)
    inside = np.eye(len(names))[place]  # [N, G]
    above, below = values @ inside, per @ inside
    order = np.lexsort(np.concatenate([above, below], axis=1).T[::-1])  # of the seeds
    above, below = above[order], below[order]
    value = float(above.sum() / below.sum()) if below.sum() else float("nan")
    if len(values) < 2 or len(names) < 2:
        return Interval(value, float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    rows, columns = (generator.multinomial(n, np.full(n, 1 / n), n_boot) for n in above.shape)
    above, below = (np.einsum("bs,sg,bg->b", rows, sums, columns, optimize=True) for sums in (above, below))
    draws = np.divide(above, below, out=np.full(n_boot, np.nan), where=below != 0)
    if not np.isfinite(draws).any():
        return Interval(value, float("nan"), float("nan"))
    low, high = np.nanpercentile(draws, LEVELS)
    return Interval(value, float(low), float(high))


def spearman(x: np.ndarray, y: np.ndarray, *, seed: int = 0, n_boot: int = BOOTSTRAP) -> Interval:
    """Spearman rank correlation, in [-1, 1]; NaN when either series is constant."""
    x, y = _in_order(*_pair(x, y))
    if reason := why_undefined(x, y):
        return undefined(reason)
    return _bootstrap(len(x), lambda rows: _correlation(_ranks(x[rows]), _ranks(y[rows])), seed, n_boot)


def spearman_difference(a: np.ndarray, b: np.ndarray, target: np.ndarray, *, seed: int, n_boot: int = 2000) -> Interval:
    """Spearman of `a` with `target` minus that of `b`, with a paired bootstrap interval over samples, 95%."""
    a, b, target = _in_order(a, b, target)
    if reason := why_undefined(a, b, target):
        return undefined(reason)

    def difference(rows: np.ndarray) -> float:
        return stats.spearmanr(a[rows], target[rows]).statistic - stats.spearmanr(b[rows], target[rows]).statistic

    generator = np.random.default_rng(seed)
    size = len(target)
    draws = [difference(generator.integers(0, size, size)) for _ in range(n_boot)]
    low, high = np.nanpercentile(draws, LEVELS)
    return Interval(difference(np.arange(size)), float(low), float(high))


def kendall(x: np.ndarray, y: np.ndarray, *, seed: int = 0, n_boot: int = BOOTSTRAP) -> Interval:
    """Kendall's tau-b, in [-1, 1]; NaN when either series is constant."""
    x, y = _in_order(*_pair(x, y))
    if reason := why_undefined(x, y):
        return undefined(reason)

    def figure(rows: np.ndarray) -> np.ndarray:
        return np.array([stats.kendalltau(x[row], y[row]).statistic for row in rows])

    return _bootstrap(len(x), figure, seed, n_boot)


def partial_spearman(
    x: np.ndarray, y: np.ndarray, controls: np.ndarray, *, seed: int = 0, n_boot: int = BOOTSTRAP
) -> Interval:
    """Spearman correlation of `x` and `y` given `controls [N, C]`, in [-1, 1].

    Ranks of `x` and `y` are regressed on the ranks of the controls (with intercept); the figure is the Pearson
    correlation of the residuals. NaN when `x` or `y` is determined by the controls, since then nothing but rounding is
    left to correlate.
    """
    x, y = _pair(x, y)
    controls = np.asarray(controls, dtype=float)
    if controls.ndim == 1:
        controls = controls[:, None]
    if len(controls) != len(x):
        raise ValueError(f"controls have {len(controls)} rows for {len(x)} samples")
    if reason := why_undefined(x, y, controls):
        return undefined(reason)
    x, y, *columns = _in_order(x, y, *controls.T)
    controls = np.column_stack(columns)

    def figure(rows: np.ndarray) -> np.ndarray:
        ranks = stats.rankdata(controls[rows], axis=1)
        design = np.concatenate([np.ones((*rows.shape, 1)), ranks], axis=2)
        fit = np.linalg.pinv(design)  # a draw may repeat so many samples that a control is constant
        residuals, determined = [], np.zeros(len(rows), dtype=bool)
        for series in (x, y):
            ranks = _ranks(series[rows])
            rest = ranks - np.einsum("bnc,bcm,bm->bn", design, fit, ranks, optimize=True)
            spread = ((ranks - ranks.mean(-1, keepdims=True)) ** 2).sum(-1)
            determined |= (rest**2).sum(-1) <= 1e-9 * np.maximum(1.0, spread)
            residuals.append(rest)
        return np.where(determined, np.nan, _correlation(*residuals))

    return _bootstrap(len(x), figure, seed, n_boot)


def auroc_extremes(
    score: np.ndarray, target: np.ndarray, *, share: float = 0.25, seed: int = 0, n_boot: int = BOOTSTRAP
) -> Interval:
    """AUROC of `score` telling the `share` of samples with the highest target from that with the lowest, in [0, 1].

    Which samples are extreme is fixed by the whole sample; the bootstrap draws among them. Equal targets are in the
    same group, which may be larger then. NaN when so many tie (all forgotten, all kept) that the groups share a value.
    """
    score, target = _in_order(*_pair(score, target))
    if reason := why_undefined(score, target):
        return undefined(reason)
    count = max(1, round(share * len(target)))
    if len(target) < 2 * count:
        raise ValueError(f"two groups of {count} samples cannot be made of {len(target)}")
    ranked = np.sort(target)
    if ranked[count - 1] == ranked[-count]:
        return undefined("the highest and the lowest share a value")
    low, high = ends(target, count)
    label, values = np.repeat([0, 1], [len(low), len(high)]), score[np.concatenate([low, high])]

    def figure(rows: np.ndarray) -> np.ndarray:
        """From the sum of the positives' ranks (Mann and Whitney 1947)."""
        positive = label[rows]
        n1, n0 = positive.sum(-1), (1 - positive).sum(-1)
        pairs = n1 * n0
        above = (_ranks(values[rows]) * positive).sum(-1) - n1 * (n1 + 1) / 2
        return np.where(pairs > 0, above / np.maximum(pairs, 1), np.nan)

    return _bootstrap(len(values), figure, seed, n_boot)


def ceiling(residuals: np.ndarray, *, seed: int = 0, n_boot: int = BOOTSTRAP) -> dict[str, Any]:
    """How well residual memorisation agrees with itself over seeds: no predictor can be asked to do better.

    Args:
        residuals: `[n_seeds, N]`, at least 2 seeds.

    Returns:
        `agreement`: mean Spearman correlation r over pairs of seeds, with interval; `attainable`: the highest
        correlation with the mean over the `n` seeds that a perfect predictor can be expected to reach, the square root
        of the mean's reliability `n r / (1 + (n - 1) r)` (Spearman 1910; Brown 1910); `None` when r <= 0.
    """
    residuals = np.asarray(residuals, dtype=float)
    if residuals.ndim != 2 or len(residuals) < 2:
        raise ValueError("a ceiling needs at least two seeds")
    n = len(residuals)
    if reason := why_undefined(residuals.T):
        return {"agreement": undefined(reason).as_dict(), "attainable": None}
    residuals = np.stack(_in_order(*residuals))

    def figure(rows: np.ndarray) -> np.ndarray:
        ranks = [_ranks(series[rows]) for series in residuals]
        return np.mean([_correlation(ranks[i], ranks[j]) for i in range(n) for j in range(i)], axis=0)

    agreement = _bootstrap(residuals.shape[1], figure, seed, n_boot)
    r = agreement.value
    attainable = float(np.sqrt(n * r / (1 + (n - 1) * r))) if np.isfinite(r) and r > 0 else None
    return {"agreement": agreement.as_dict(), "attainable": attainable}
