"""Difficulty buckets: the samples of a forget set in a few groups of equal size, from the easiest to the hardest.

Equal scores share a bucket: nothing but the score decides which one a sample is in, least of all its place in a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..data.ranks import bucket_numbers


@dataclass(frozen=True, eq=False)
class Buckets:
    """Which bucket each sample is in; people count buckets from 1, arrays from 0.

    Attributes:
        number: bucket of each sample, 0 (easiest) to `count - 1` (hardest), int `[N]`.
        count: how many buckets there are.
        metric: the difficulty metric whose ranks make them; empty where all samples are in one.
        note: where ties made them unequal, or fewer than asked for, in words; else empty.
    """

    number: np.ndarray
    count: int
    metric: str = ""
    note: str = ""

    @classmethod
    def by_rank(cls, values: np.ndarray, count: int, metric: str) -> Buckets:
        """Buckets of equal size (by at most one sample) by the rank of `values`, `[N]`, higher = harder.

        Equal values share the bucket in which the middle one of them ranks. Then sizes differ, and a bucket that is
        left empty is not there: `note` says so. There are always two at least.

        Raises:
            ValueError: with fewer samples than buckets, or when several buckets are to be made of equal values.
        """
        size = len(values)
        if not 1 <= count <= size:
            raise ValueError(f"cannot make {count} buckets of {size} samples")
        if count > 1 and np.ptp(values) == 0:
            raise ValueError(f"difficulty metric {metric!r} is the same for all samples: it ranks nothing")
        number = bucket_numbers(values, count)
        sizes = np.bincount(number)
        note = ""
        if sizes.max() - sizes.min() > 1 or len(sizes) < count:
            parts = ", ".join(map(str, sizes))
            note = (
                f"equal scores share a bucket: ties of {metric!r} made {len(sizes)} buckets of {parts} samples, "
                f"not {count} of {size / count:g}"
            )
        return cls(number, len(sizes), metric, note)

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
        return Buckets(self.number[rows], self.count, self.metric, self.note)

    def means(self, values: np.ndarray) -> dict[int, float]:
        """Mean of `values`, `[N]`, over each bucket that has samples; by its number, counted from 1."""
        return {n: float(values[mask].mean()) for n, mask in enumerate(self.masks, start=1) if mask.any()}
