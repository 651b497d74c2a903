"""`--import`: files of the user that register what they add to this project."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..registry import Registry, run_file
from .early import IMPORT


def registries() -> dict[str, Registry[Any]]:
    """What can be registered, by the word that `cud list` has for it."""
    from ..circuits import ARCHITECTURES
    from ..difficulty import METRICS
    from ..objectives import OBJECTIVES, STEPS
    from ..schedule import SCHEDULES

    return {
        "objectives": OBJECTIVES,
        "schedules": SCHEDULES,
        "metrics": METRICS,
        "architectures": ARCHITECTURES,
        "steps": STEPS,
    }


def run_imports(paths: Iterable[str | Path]) -> None:
    """Run these files, each once in a process.

    Raises:
        ValueError: for one that is not there, fails, or registers nothing, naming it.
    """
    for path in paths:
        if not run_file(path, list(registries().values()), IMPORT):
            kinds = ", ".join(f"register_{kind.removesuffix('s')}" for kind in registries())
            raise ValueError(f"{IMPORT}: {Path(path).name} registers nothing: it calls none of {kinds}")
