"""What stands in one cell of a report: a number, a text, a figure with its interval, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import statistics as stats
from ..statistics import Interval


@dataclass(frozen=True)
class Missing:
    """No figure, and why; `{"value": null, "reason": ...}` in `results.json`."""

    reason: str


Cell = float | int | str | Interval | Missing


def missing(reason: str) -> Missing:
    """A cell without a figure."""
    return Missing(reason)


def mean(values: np.ndarray, seed: int) -> Interval | Missing:
    """A cell: the mean over samples."""
    return shown(stats.bootstrap_mean(values, seed=seed))


def shown(interval: Interval) -> Interval | Missing:
    """A cell: the figure, or why there is none."""
    return interval if np.isfinite(interval.value) else missing(interval.reason or "undefined")


def finite(value: float) -> float | Missing:
    """A cell: one number, or that it is none."""
    return float(value) if np.isfinite(value) else missing("not finite")


def means(values: Mapping[str, np.ndarray], seed: int) -> dict[str, Interval]:
    """Mean over samples of every metric, with its bootstrap interval."""
    return {name: stats.bootstrap_mean(column, seed=seed) for name, column in values.items()}


def interval_text(interval: Interval) -> str:
    """A figure with its interval as text, `0.712 [0.601, 0.803]`; `n/a` where it is undefined, and why."""
    if not np.isfinite(interval.value):
        return f"n/a ({interval.reason})" if interval.reason else "n/a"
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def format_number(value: Any) -> str:
    """How a single value is shown."""
    if value is None:
        return "n/a"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, float) and value.is_integer() and abs(value) >= 2:  # weights and steps, not probabilities
        value = int(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.2g}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
