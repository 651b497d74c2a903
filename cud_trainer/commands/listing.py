"""`cud list`: what options can name, a line for each."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Callable
from typing import Any

from .early import IMPORT
from .imports import registries, run_imports


def main(argv: list[str]) -> int:
    """Entry point of `cud list`."""
    kinds = ("objectives", "schedules", "metrics", "architectures", "steps", "attributions")
    parser = argparse.ArgumentParser("cud list", description="What options can name, a line for each.")
    parser.add_argument("kind", nargs="*", help=f"of {', '.join(kinds)}; by default all")
    parser.add_argument(f"--{IMPORT}", nargs="+", default=[], help="also what these Python files of yours register")
    args = parser.parse_args(argv)
    unknown = [kind for kind in args.kind if kind not in kinds]
    if unknown:
        raise ValueError(f"there are no {unknown[0]!r} to list; choose from {', '.join(kinds)}")
    run_imports(getattr(args, IMPORT))
    wanted = list(dict.fromkeys(args.kind)) or kinds
    for kind in wanted:
        lines = listed(kind)
        if len(wanted) > 1:
            print(f"{kind}:")
        width = max(map(len, lines)) + 2
        for name, said in lines.items():
            room = max(40, shutil.get_terminal_size((120, 24)).columns) - width
            print(f"{name:{width}}{textwrap.shorten(said, room, placeholder=' ...')}")
    return 0


def listed(kind: str) -> dict[str, str]:
    """What is there of a kind, by name, with the first sentence of its documentation."""
    if kind == "attributions":
        from ..circuits.attribution import METHODS

        return dict(METHODS)
    return {name: _about(entry) for name, entry in registries()[kind].items()}


def _about(entry: Any) -> str:
    """The first sentence about a registered entry: of the function that it is, or has."""
    kind, alternative = getattr(entry, "kind", None), getattr(entry, "alternative", None)
    where = f"({kind}) " if isinstance(kind, str) else f"(answer: {alternative}) " if alternative else ""
    for name in ("loss", "compute", "function"):
        function = getattr(entry, name, None)
        if callable(function):
            return where + _first_sentence(function)
    return "described by its configuration" if callable(entry) else _described(entry)


def _first_sentence(function: Callable[..., Any]) -> str:
    text = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
    return text or "(says nothing of itself)"


def _described(architecture: Any) -> str:
    """In what an architecture differs from Llama."""
    fields = [f for f in dataclasses.fields(architecture) if getattr(architecture, f.name) != f.default]
    return ", ".join(f"{f.name}={getattr(architecture, f.name)!r}" for f in fields) or "as Llama"
