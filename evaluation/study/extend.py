"""Grids that grow: a best retain weight or learning rate at the end of its grid may not be the best there is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from .grid import Cell
from .options import TUNED, StudyArguments
from .runs import Run, coordinates, grouped, leading, tuned

Wanted = dict[tuple[str, str], dict[str, set[float]]]  # new values by panel, schedule and option


def corners(runs: Sequence[Run], args: StudyArguments) -> dict[str, set[float]]:
    """Of the runs of one schedule: the values beyond the ends of the grid at which a best setting lies, by option.

    An option with a single value is not tuned. A new value is as far from the end as that is from its neighbour, as a
    ratio.
    """
    found: dict[str, set[float]] = {}
    first = leading([run.seed for run in runs], args.tuning_seeds)
    tried = [run for run in runs if run.seed in first]
    if len({run.tuning for run in tried}) < 2:
        return found
    for level in args.retain_level:
        best = tuned(tried, level, args.tuning_seeds, args.tune_on)[0].tuning
        for place, name in enumerate(TUNED):
            values = sorted({run.tuning[place] for run in tried if run.tuning[place] is not None})
            if len(values) < 2 or best[place] not in (values[0], values[-1]) or not values[0] > 0:
                continue
            end, inner = (values[0], values[1]) if best[place] == values[0] else (values[-1], values[-2])
            found.setdefault(name, set()).add(float(f"{end * end / inner:.6g}"))
    return found


def grow(args: StudyArguments, runs: Sequence[Run]) -> tuple[StudyArguments, Wanted]:
    """The same study with a grid that has the values beyond, and which schedules want which of them."""
    wanted: Wanted = {}
    for (panel, schedule), same in grouped(runs, attrgetter("panel", "schedule")).items():
        found = corners(same, args)
        if found:
            wanted[panel, schedule] = found
    grown = copy.copy(args)
    grids: list[dict[str, Any]] = [dict(grid) for grid in args.grids]
    for grid in grids:
        for name in TUNED:
            if len(grid.get(name, [])) > 1:
                new = {value for found in wanted.values() for value in found.get(name, ())}
                grid[name] = [*grid[name], *sorted(new - {float(value) for value in grid[name]})]
    grown.grid = grids
    return grown, wanted


def is_wanted(cell: Cell, wanted: Wanted) -> bool:
    """Whether a cell of a grown grid has a value that its schedule asked for."""
    at = coordinates(cell)
    found = wanted.get((at.panel, at.schedule), {})
    return any(at.tuning[place] in found.get(name, ()) for place, name in enumerate(TUNED))
