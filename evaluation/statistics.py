"""Statistics with intervals. Pure functions of numpy arrays; all randomness comes from an explicit seed.

Intervals are 95% percentile bootstrap intervals over samples: they say how far the figure would move with other samples
of the same kind, nothing about other models or runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats
from sklearn.metrics import roc_auc_score

BOOTSTRAP = 1000
LEVELS = (2.5, 97.5)


@dataclass(frozen=True)
class Interval:
    """A figure and its 95% interval; NaN where it is undefined."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


UNDEFINED = Interval(float("nan"), float("nan"), float("nan"))


def _bootstrap(size: int, figure: Callable[[np.ndarray], float], seed: int, n_boot: int) -> Interval:
    """`figure(rows)` on all rows, and its percentile interval over rows drawn with replacement."""
    value = float(figure(np.arange(size)))
    if not np.isfinite(value):
        return UNDEFINED
    generator = np.random.default_rng(seed)
    draws = np.array([figure(generator.integers(0, size, size)) for _ in range(n_boot)], dtype=float)
    if not np.isfinite(draws).any():
        return Interval(value, float("nan"), float("nan"))
    low, high = np.nanpercentile(draws, LEVELS)
    return Interval(value, float(low), float(high))


def _pair(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"two series of equal length are needed, got shapes {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("series must be finite")
    return x, y


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation; NaN when either is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else float("nan")


def bootstrap_mean(values: np.ndarray, *, seed: int = 0, n_boot: int = 2000) -> Interval:
    """Mean of `values [N]`; NaN for no values."""
    values = np.asarray(values, dtype=float)
    if values.size == 0 or not np.isfinite(values).all():
        return UNDEFINED
    return _bootstrap(values.size, lambda rows: float(values[rows].mean()), seed, n_boot)


def paired_difference(a: np.ndarray, b: np.ndarray, *, seed: int = 0, n_boot: int = 2000) -> Interval:
    """Mean of `a - b` over the same samples, `[N]` each."""
    a, b = _pair(a, b)
    return bootstrap_mean(a - b, seed=seed, n_boot=n_boot)


def spearman(x: np.ndarray, y: np.ndarray, *, seed: int = 0, n_boot: int = BOOTSTRAP) -> Interval:
    """Spearman rank correlation, in [-1, 1]; NaN when either series is constant."""
    x, y = _pair(x, y)
    return _bootstrap(len(x), lambda rows: _correlation(stats.rankdata(x[rows]), stats.rankdata(y[rows])), seed, n_boot)


def kendall(x: np.ndarray, y: np.ndarray, *, seed: int = 0, n_boot: int = BOOTSTRAP) -> Interval:
    """Kendall's tau-b, in [-1, 1]; NaN when either series is constant."""
    x, y = _pair(x, y)
    return _bootstrap(len(x), lambda rows: float(stats.kendalltau(x[rows], y[rows]).statistic), seed, n_boot)


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

    def figure(rows: np.ndarray) -> float:
        design = np.column_stack([np.ones(len(rows)), stats.rankdata(controls[rows], axis=0)])
        residuals = []
        for series in (x, y):
            ranks = stats.rankdata(series[rows])
            rest = ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0]
            if rest @ rest <= 1e-9 * max(1.0, float(((ranks - ranks.mean()) ** 2).sum())):
                return float("nan")
            residuals.append(rest)
        return _correlation(*residuals)

    return _bootstrap(len(x), figure, seed, n_boot)


def auroc_extremes(
    score: np.ndarray, target: np.ndarray, *, share: float = 0.25, seed: int = 0, n_boot: int = BOOTSTRAP
) -> Interval:
    """AUROC of `score` telling the `share` of samples with the highest target from that with the lowest, in [0, 1].

    Which samples are extreme is fixed by the whole sample; the bootstrap draws among them. NaN when so many targets tie
    (all forgotten, all kept) that the two groups share a value: which sample is in which would be its position only.
    """
    score, target = _pair(score, target)
    count = max(1, round(share * len(target)))
    if len(target) < 2 * count:
        raise ValueError(f"two groups of {count} samples cannot be made of {len(target)}")
    order = np.argsort(target, kind="stable")
    if target[order[count - 1]] == target[order[-count]]:
        return UNDEFINED
    chosen = np.concatenate([order[:count], order[-count:]])
    label, values = np.repeat([0, 1], count), score[chosen]

    def figure(rows: np.ndarray) -> float:
        return float(roc_auc_score(label[rows], values[rows])) if len(set(label[rows])) == 2 else float("nan")

    return _bootstrap(len(chosen), figure, seed, n_boot)


def ceiling(residuals: np.ndarray, *, seed: int = 0, n_boot: int = BOOTSTRAP) -> dict[str, object]:
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

    def figure(rows: np.ndarray) -> float:
        ranks = [stats.rankdata(series[rows]) for series in residuals]
        return float(np.mean([_correlation(ranks[i], ranks[j]) for i in range(n) for j in range(i)]))

    agreement = _bootstrap(residuals.shape[1], figure, seed, n_boot)
    r = agreement.value
    attainable = float(np.sqrt(n * r / (1 + (n - 1) * r))) if np.isfinite(r) and r > 0 else None
    return {"agreement": agreement.as_dict(), "attainable": attainable}
