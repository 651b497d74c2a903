"""Registered names without importing what registers them: read from the source, so that there is no second list."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from ..registry import Registry

# Kind of entry -> the package whose modules register it, the function that does, and the hint of its errors.
SOURCES = {
    "objective": ("objectives", "register_objective", ""),
    "step": ("objectives", "register_step", ""),
    "schedule": ("schedule", "register_schedule", ", or several joined by '+'"),
    "difficulty metric": ("difficulty", "register_metric", ""),
}


@cache
def registered(kind: str) -> Registry[None]:
    """The names of a kind of entry that this project registers, as a registry without entries."""
    package, function, hint = SOURCES[kind]
    names: Registry[None] = Registry(kind, hint)
    for path in sorted((Path(__file__).parents[1] / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
                name = node.args[0]
                if isinstance(name, ast.Constant) and isinstance(name.value, str):
                    names.add(name.value, None)
    return names


def find(kind: str, name: str) -> None:
    """Raise `ValueError`, the same as the registry itself, for a name that is none."""
    registered(kind).find(name)
