"""The registry of schedules: orders, weights, and weights that follow the run, which compose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..registry import Registry, check_options

KINDS = ("order", "weights", "dynamic")


@dataclass(frozen=True)
class ScheduleRule:
    """A registered schedule, or a part of one.

    Attributes:
        name: the name used in configs.
        kind: `"order"`: `(difficulty [N] | None, turn, **options) -> rows` of one pass, see `OnePass`;
            `"weights"`: `(difficulty [N], **options) -> [N]`, mean 1, a weight per sample;
            `"dynamic"`: `(state, **options) -> [N]`, factors on the weights of the next step, see `RunState`.
        function: the pure function.
        metric: the difficulty metric it reads: a name, `"difficulty"` for the configured one, or `None`. Of several, an
            order or weights get the values one after the other; dynamic ones have theirs in `state.values`.
        weighs_retain: whether weights come as a pair, for the forget samples and for the retain samples that they are
            paired with, `[N]` each; the mean of the second is as it comes.
        check: `(owner, **options)`, called with every option, given or default; raises `ValueError` for a bad value.
    """

    name: str
    kind: str
    function: Callable[..., Any]
    metric: str | tuple[str, ...] | None = "difficulty"
    weighs_retain: bool = False
    check: Callable[..., Any] | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that it reads, in its order."""
        if self.metric is None:
            return ()
        return (self.metric,) if isinstance(self.metric, str) else self.metric

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise `ValueError` for an option this schedule does not have, or a value it cannot have."""
        check_options(f"schedule {self.name!r}", self.function, options, self._check_values)

    def _check_values(self, owner: str, **options: Any) -> None:
        if "low" in options and not 0 <= options["low"] <= 1 <= options["high"]:
            raise ValueError(f"{owner} needs 0 <= low <= 1 <= high, got {options['low']!r} and {options['high']!r}")
        if self.check is not None:
            self.check(owner, **options)


SCHEDULES: Registry[ScheduleRule] = Registry("schedule", hint=", or several joined by '+'")


def register_schedule(
    name: str, kind: str = "order", **properties: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an order, weights or dynamic weights under `name`; `properties` are those of `ScheduleRule`.

    Raises:
        ValueError: when the name is taken or cannot be used in a composition, or for an unknown kind.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if "+" in name or name != name.strip():
            raise ValueError(f"a schedule cannot be called {name!r}: '+' joins schedules")
        if kind not in KINDS:
            raise ValueError(f"kind of schedule {name!r} must be one of {list(KINDS)}, got {kind!r}")
        SCHEDULES.add(name, ScheduleRule(name, kind, function, **properties))
        return function

    return register


def parse(name: str, options: dict[str, Any] | None = None) -> list[tuple[ScheduleRule, dict[str, Any]]]:
    """The parts of a schedule and the options of each, checked.

    Raises:
        ValueError: for an unknown part, two orders or two sets of weights, or an option that a part does not have.
    """
    options = options or {}
    names = [part.strip() for part in name.split("+")]
    parts = [SCHEDULES.find(part) for part in names]
    if len(set(names)) < len(names):
        raise ValueError(f"schedule {name!r} has a part twice")
    for kind in ("order", "weights"):
        same = [part.name for part in parts if part.kind == kind]
        if len(same) > 1:
            raise ValueError(
                f"schedule {name!r} has more than one {'order' if kind == 'order' else 'set of weights'}: {same}"
            )
    if len(names) == 1:
        parsed = [(parts[0], dict(options))]
    else:
        for key, value in options.items():
            if key not in names or not isinstance(value, dict):
                raise ValueError(
                    f"options of schedule {name!r} go by its parts, for example {{{names[0]!r}: {{...}}}}; got {key!r}"
                )
        parsed = [(part, dict(options.get(part.name, {}))) for part in parts]
    for part, own_options in parsed:
        part.check_options(own_options)
    return parsed


def within(low: float, high: float, *names: str, open_low: bool = False) -> Callable[..., None]:
    """A check that the options of these names are between `low` and `high`."""

    def check(owner: str, **options: Any) -> None:
        for name in names:
            value = options[name]
            if not ((low < value if open_low else low <= value) and value <= high):
                raise ValueError(f"{owner} needs {name} in {'(' if open_low else '['}{low:g}, {high:g}], got {value!r}")

    return check
