"""The registry of difficulty metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..registry import Registry, check_options, keyword_options

if TYPE_CHECKING:
    from .context import DifficultyContext


@dataclass(frozen=True)
class Metric:
    """A registered difficulty metric.

    Attributes:
        name: the name used in configs.
        compute: `(context, **options) -> float [N]`, higher = harder.
        needs_circuits: whether it reads edge scores (and so needs a supported architecture), or a function that tells
            it from all options of `compute`, given or default; see `reads_circuits`.
        needs_retain: whether it compares with a retain set.
        needs_groups: whether it needs a group (author, topic) for every sample.
        cross_fitted: whether a sample's score depends on folds of the others, or a function as above; see `uses_folds`.
        check: `(owner, **options)`, called with every option of `compute`, given or default; raises `ValueError` for a
            value that one cannot have.
    """

    name: str
    compute: Callable[..., np.ndarray]
    needs_circuits: bool | Callable[..., bool] = False
    needs_retain: bool = False
    needs_groups: bool = False
    cross_fitted: bool | Callable[..., bool] = False
    check: Callable[..., Any] | None = None

    def reads_circuits(self, options: dict[str, Any]) -> bool:
        """Whether it reads edge scores when it is called with these options."""
        return self._holds(self.needs_circuits, options)

    def uses_folds(self, options: dict[str, Any]) -> bool:
        """Whether it needs folds when it is called with these options."""
        return self._holds(self.cross_fitted, options)

    def _holds(self, property_: bool | Callable[..., bool], options: dict[str, Any]) -> bool:
        if not callable(property_):
            return property_
        return property_(**{**keyword_options(self.compute), **options})

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise `ValueError` for an option this metric does not have, or a value it cannot have."""
        owner = f"difficulty metric {self.name!r}"
        if not isinstance(options, dict):
            raise ValueError(f"options of {owner} must be a dictionary, got {options!r}")
        check_options(owner, self.compute, options, self.check, numbers=False)

    def check_data(self, context: DifficultyContext) -> None:
        """Raise `ValueError` naming what this metric needs and `context` lacks."""
        if self.needs_retain and not context.retain:
            raise ValueError(f"difficulty metric {self.name!r} needs a retain set: give retain_dataset")
        if self.needs_groups and context.groups is None:
            raise ValueError(f"difficulty metric {self.name!r} needs a group for every sample: give group_column")


METRICS: Registry[Metric] = Registry("difficulty metric")


def register_metric(name: str, **properties: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a difficulty metric under `name`; `properties` are those of `Metric`. `ValueError` if taken."""

    def register(compute: Callable[..., Any]) -> Callable[..., Any]:
        METRICS.add(name, Metric(name, compute, **properties))
        return compute

    return register
