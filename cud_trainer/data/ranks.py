"""What ranks decide, whatever the order of the samples: equal values are treated alike."""

from __future__ import annotations

import numpy as np


def bucket_numbers(values: np.ndarray, count: int) -> np.ndarray:
    """Which of `count` buckets of equal size each of the `values` is in by its rank, int `[N]` from 0, the lowest.

    Equal values share the bucket in which the middle one of them ranks; buckets without any are left out of the count.
    Where values differ and `count` is 2 or more there are two buckets at least.
    """
    _, place, size = np.unique(values, return_inverse=True, return_counts=True)
    middle = size.cumsum() - size + size // 2
    return np.unique(middle * count // len(values), return_inverse=True)[1][place]


def ends(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the `count` lowest and of the `count` highest of the `values`, in rising order of the value.

    Whoever is equal to the last one of them belongs to them, too. What is equal to the last one on both sides belongs
    to neither, unless a side would be empty: then to that one.
    """
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    low, high = ranked[count - 1], ranked[-count]
    if low < high:
        return order[ranked <= low], order[ranked >= high]
    below, above = order[ranked < high], order[ranked > low]
    middle = order[(ranked >= high) & (ranked <= low)]
    return (below if len(below) else middle), (above if len(above) else middle)
