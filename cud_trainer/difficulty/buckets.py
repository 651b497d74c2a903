"""Difficulty buckets: the samples of a forget set in a few groups of equal size, from the easiest to the hardest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Buckets:
    """Which bucket each sample is in; people count buckets from 1, arrays from 0.

    Attributes:
        number: bucket of each sample, 0 (easiest) to `count - 1` (hardest), int `[N]`.
        count: how many buckets there are.
        metric: the difficulty metric whose ranks make them; empty where all samples are in one.
    """

    number: np.ndarray
    count: int
    metric: str = ""

    @classmethod
    def by_rank(cls, values: np.ndarray, count: int, metric: str) -> Buckets:
        """Buckets of equal size (by at most one sample) by the rank of `values`, `[N]`, higher = harder.

        Raises:
            ValueError: with fewer samples than buckets, or when several buckets are to be made of equal values.
        """
        size = len(values)
        if not 1 <= count <= size:
            raise ValueError(f"cannot make {count} buckets of {size} samples")
        if count > 1 and np.ptp(values) == 0:
            raise ValueError(f"difficulty metric {metric!r} is the same for all samples: it ranks nothing")
        rank = np.empty(size, dtype=int)
        rank[np.argsort(values, kind="stable")] = np.arange(size)
        return cls(rank * count // size, count, metric)

    @classmethod
    def single(cls, size: int) -> Buckets:
        """All samples in one bucket, where there is no difficulty to rank them by."""
        return cls(np.zeros(size, dtype=int), 1)

    @cached_property
    def masks(self) -> tuple[np.ndarray, ...]:
        """The samples of each bucket, the easiest bucket first; bool `[N]` each."""
        return tuple(self.number == number for number in range(self.count))

    @property
    def easiest(self) -> np.ndarray:
        """The samples of the easiest bucket, bool `[N]`."""
        return self.masks[0]

    @property
    def hardest(self) -> np.ndarray:
        """The samples of the hardest bucket, bool `[N]`."""
        return self.masks[-1]

    def select(self, rows: np.ndarray | Sequence[int]) -> Buckets:
        """The same buckets of the samples `rows` (positions, or a bool mask); some may have none left."""
        return Buckets(self.number[rows], self.count, self.metric)

    def means(self, values: np.ndarray) -> dict[int, float]:
        """Mean of `values`, `[N]`, over each bucket that has samples; by its number, counted from 1."""
        return {n: float(values[mask].mean()) for n, mask in enumerate(self.masks, start=1) if mask.any()}
