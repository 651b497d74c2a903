"""Options of registered functions: their keyword-only parameters, checked by name before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def keyword_options(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only parameters of `function` and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_known(owner: str, function: Callable[..., Any], given: dict[str, Any]) -> None:
    """Raise `ValueError` naming an option in `given` that `function` does not have, and those it has."""
    known = keyword_options(function)
    for option in given:
        if option not in known:
            raise ValueError(f"{owner} has no option {option!r}; it has {sorted(known) or 'none'}")


def check_numbers(owner: str, given: dict[str, Any]) -> None:
    """Raise `ValueError` naming an option in `given` whose value is not a number."""
    for option, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"option {option!r} of {owner} must be a number, got {value!r}")
