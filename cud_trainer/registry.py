"""What is registered under a name, and the options it takes: keyword-only parameters, checked before anything runs."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Generic, TypeVar

Entry = TypeVar("Entry")


class Registry(dict[str, Entry], Generic[Entry]):
    """Entries by name, in the order they were registered.

    Args:
        kind: what an entry is called in errors, for example `"objective"`.
        hint: what an error adds to the names to choose from.
    """

    def __init__(self, kind: str, hint: str = "") -> None:
        super().__init__()
        self.kind, self.hint = kind, hint

    def add(self, name: str, entry: Entry) -> None:
        """Register `entry`; `ValueError` when the name is taken."""
        if name in self:
            raise ValueError(f"{self.kind} {name!r} is already registered")
        self[name] = entry

    def find(self, name: str) -> Entry:
        """The entry of this name; `ValueError` naming those to choose from when there is none."""
        if name not in self:
            raise ValueError(f"unknown {self.kind} {name!r}; choose one of {sorted(self)}{self.hint}")
        return self[name]


# What the files that were run have registered: kind and name.
_added: dict[Path, list[tuple[str, str]]] = {}


def run_file(path: str | Path, registries: Sequence[Registry[Any]], option: str) -> list[tuple[str, str]]:
    """Run a Python file of the user that registers something, once in a process; kind and name of what it registered.

    The file is code: it can do whatever you can. It can import what lies beside it.

    Args:
        registries: in which something new may be found.
        option: what the file is called in errors.

    Raises:
        ValueError: when there is no such file, or it fails; nothing of it is registered then.
    """
    path = Path(path).expanduser().resolve()
    if path in _added:
        return _added[path]
    if not path.is_file():
        raise ValueError(f"{option}: there is no file {str(path)!r}")
    before = [dict(registry) for registry in registries]
    name = f"cud_imported_{len(_added)}_{path.stem}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{option}: {path.name} is no Python file")
    sys.modules[name] = module = module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        for registry, names in zip(registries, before, strict=True):
            registry.clear()
            registry.update(names)
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{option}: {path.name}: {kind}{error}") from error
    added = [(r.kind, name) for r, names in zip(registries, before, strict=True) for name in r if name not in names]
    _added[path] = added
    return added


def imported_files() -> list[Path]:
    """The files that have registered something (`run_file`), in this order."""
    return [path for path, names in _added.items() if names]


def keyword_options(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only parameters of `function` and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_options(
    owner: str,
    function: Callable[..., Any],
    options: dict[str, Any],
    check: Callable[..., Any] | None = None,
    *,
    numbers: bool = True,
    others: Sequence[str] = (),
) -> None:
    """Check the options that `function` is to be called with.

    Args:
        owner: what the function is called in errors, for example `"objective 'npo'"`.
        options: those that are given.
        check: `(owner, **options)`, called with every option, given or default; raises `ValueError` for a bad value.
        numbers: an option without a default, or with a number or `None` for one, must be a number (or `None`, where
            that is the default).
        others: options of the owner that are not the function's, and are checked elsewhere.

    Raises:
        ValueError: naming an option that the function does not have, or needs, or a value that it cannot have.
    """
    defaults = keyword_options(function)
    for option in options:
        if option not in defaults and option not in others:
            raise ValueError(f"{owner} has no option {option!r}; it has {sorted([*defaults, *others]) or 'none'}")
    options = {**defaults, **{option: value for option, value in options.items() if option in defaults}}
    for option, value in options.items():
        if value is inspect.Parameter.empty:
            raise ValueError(f"{owner} needs option {option!r}")
    if numbers:
        check_numbers(owner, {name: options[name] for name in defaults if _is_number(defaults[name], options[name])})
    if check is not None:
        check(owner, **options)


def _is_number(default: Any, value: Any) -> bool:
    """Whether an option with this default must be a number when it has this value."""
    if default is None:
        return value is not None
    return default is inspect.Parameter.empty or type(default) in (int, float)


def check_numbers(owner: str, options: dict[str, Any]) -> None:
    """Raise `ValueError` naming an option whose value is not a number."""
    for option, value in options.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"option {option!r} of {owner} must be a number, got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"option {option!r} of {owner} must be a finite number, got {value!r}")
