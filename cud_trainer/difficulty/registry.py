"""The registry of difficulty metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..registry import check_known, keyword_options

if TYPE_CHECKING:
    from .context import DifficultyContext


@dataclass(frozen=True)
class Metric:
    """A registered difficulty metric.

    Attributes:
        name: the name used in configs.
        compute: `(context, **options) -> float [N]`, higher = harder.
        needs_circuits: whether it reads edge scores (and so needs a supported architecture).
        needs_retain: whether it compares with a retain set.
        needs_groups: whether it needs a group (author, topic) for every sample.
        cross_fitted: whether a sample's score depends on folds of the others.
        check: `(**options)`, called with every option of `compute`, given or default; raises `ValueError` for a value
            that one cannot have.
    """

    name: str
    compute: Callable[..., np.ndarray]
    needs_circuits: bool = False
    needs_retain: bool = False
    needs_groups: bool = False
    cross_fitted: bool = False
    check: Callable[..., Any] | None = None

    def check_options(self, given: dict[str, Any]) -> None:
        """Raise `ValueError` for an option this metric does not have, or a value it cannot have."""
        if not isinstance(given, dict):
            raise ValueError(f"options of difficulty metric {self.name!r} must be a dictionary, got {given!r}")
        check_known(f"difficulty metric {self.name!r}", self.compute, given)
        if self.check is not None:
            self.check(**{**keyword_options(self.compute), **given})

    def check_data(self, context: DifficultyContext) -> None:
        """Raise `ValueError` naming what this metric needs and `context` lacks."""
        if self.needs_retain and not context.retain:
            raise ValueError(f"difficulty metric {self.name!r} needs a retain set: give retain_dataset")
        if self.needs_groups and context.groups is None:
            raise ValueError(f"difficulty metric {self.name!r} needs a group for every sample: give group_column")


METRICS: dict[str, Metric] = {}


def register_metric(name: str, **properties: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a difficulty metric under `name`; `properties` are those of `Metric`. `ValueError` if taken."""

    def register(compute: Callable[..., Any]) -> Callable[..., Any]:
        if name in METRICS:
            raise ValueError(f"difficulty metric {name!r} is already registered")
        METRICS[name] = Metric(name, compute, **properties)
        return compute

    return register
