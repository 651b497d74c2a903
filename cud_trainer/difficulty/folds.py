"""Cross-fitting folds: no score of a sample is made from the sample itself, or from its group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.groups import group_labels


def make_folds(n: int, folds: int, seed: int, groups: Sequence[Any] | None = None) -> np.ndarray:
    """Random fold of each sample, int `[n]`, sizes differing by at most one sample (or group).

    Args:
        groups: samples of one group never straddle folds.

    Raises:
        ValueError: for fewer than 2 folds or fewer samples (groups) than folds.
    """
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise ValueError(f"cross-fitting needs at least 2 folds, got {folds!r}")
    if groups is not None:
        labels = group_labels(groups)
        names = sorted(set(labels))
        if len(names) < folds:
            raise ValueError(f"cannot split {len(names)} groups into {folds} folds")
        fold_of = dict(zip(names, make_folds(len(names), folds, seed), strict=True))
        return np.array([fold_of[label] for label in labels])
    if n < folds:
        raise ValueError(f"cannot split {n} samples into {folds} folds")
    fold = np.arange(n) % folds
    return np.random.default_rng(seed).permutation(fold)
