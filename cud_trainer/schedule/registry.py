"""The registry of schedules: orders, weights, and weights that follow the run, which compose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..registry import check_known, check_numbers, keyword_options

KINDS = ("order", "weights", "dynamic")


@dataclass(frozen=True)
class Part:
    """A registered schedule, or a part of one.

    Attributes:
        name: the name used in configs.
        kind: `"order"`: `(difficulty [N] | None, turn, **options) -> rows` of one pass, see `Turn`;
            `"weights"`: `(difficulty [N], **options) -> [N]`, mean 1, a weight per sample;
            `"dynamic"`: `(state, **options) -> [N]`, factors on the weights of the next step, see `RunState`.
        function: the pure function.
        metric: the difficulty metric it reads: a name, `"difficulty"` for the configured one, or `None`.
        check: `(owner, **options)`, called with every option, given or default; raises `ValueError` for a bad value.
    """

    name: str
    kind: str
    function: Callable[..., Any]
    metric: str | None = "difficulty"
    check: Callable[..., Any] | None = None

    def check_options(self, given: dict[str, Any]) -> None:
        """Raise `ValueError` for an option this schedule does not have, or a value it cannot have."""
        owner = f"schedule {self.name!r}"
        check_known(owner, self.function, given)
        options = {**keyword_options(self.function), **given}
        check_numbers(owner, {key: value for key, value in options.items() if key not in ("form",)})
        if "low" in options and not 0 <= options["low"] <= 1 <= options["high"]:
            raise ValueError(f"{owner} needs 0 <= low <= 1 <= high, got {options['low']!r} and {options['high']!r}")
        if self.check is not None:
            self.check(owner, **options)


SCHEDULES: dict[str, Part] = {}


def register_schedule(
    name: str, kind: str = "order", **properties: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an order, weights or dynamic weights under `name`; `properties` are those of `Part`.

    Raises:
        ValueError: when the name is taken or cannot be used in a composition, or for an unknown kind.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if name in SCHEDULES:
            raise ValueError(f"schedule {name!r} is already registered")
        if "+" in name or name != name.strip():
            raise ValueError(f"a schedule cannot be called {name!r}: '+' joins schedules")
        if kind not in KINDS:
            raise ValueError(f"kind of schedule {name!r} must be one of {list(KINDS)}, got {kind!r}")
        SCHEDULES[name] = Part(name, kind, function, **properties)
        return function

    return register


def parse(name: str, options: dict[str, Any] | None = None) -> list[tuple[Part, dict[str, Any]]]:
    """The parts of a schedule and the options of each, checked.

    Raises:
        ValueError: for an unknown part, two orders or two sets of weights, or an option that a part does not have.
    """
    options = options or {}
    names = [part.strip() for part in name.split("+")]
    for part in names:
        if part not in SCHEDULES:
            raise ValueError(f"unknown schedule {part!r}; choose one of {sorted(SCHEDULES)}, or several joined by '+'")
    if len(set(names)) < len(names):
        raise ValueError(f"schedule {name!r} has a part twice")
    for kind in ("order", "weights"):
        same = [part for part in names if SCHEDULES[part].kind == kind]
        if len(same) > 1:
            raise ValueError(
                f"schedule {name!r} has more than one {'order' if kind == 'order' else 'set of weights'}: {same}"
            )
    if len(names) == 1:
        found = [(SCHEDULES[names[0]], dict(options))]
    else:
        for key, value in options.items():
            if key not in names or not isinstance(value, dict):
                raise ValueError(
                    f"options of schedule {name!r} go by its parts, for example {{{names[0]!r}: {{...}}}}; got {key!r}"
                )
        found = [(SCHEDULES[part], dict(options.get(part, {}))) for part in names]
    for spec, given in found:
        spec.check_options(given)
    return found


def within(low: float, high: float, *names: str, open_low: bool = False) -> Callable[..., None]:
    """A check that the options of these names are between `low` and `high`."""

    def check(owner: str, **options: Any) -> None:
        for name in names:
            value = options[name]
            if not ((low < value if open_low else low <= value) and value <= high):
                raise ValueError(f"{owner} needs {name} in {'(' if open_low else '['}{low:g}, {high:g}], got {value!r}")

    return check
