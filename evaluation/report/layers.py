"""How deep forgetting goes: depth and what can be read off the layers, by bucket, by group and layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cud_trainer.data.groups import group_labels
from cud_trainer.difficulty import Buckets

from .. import statistics as stats
from ..metrics.depth import THRESHOLD, Depth
from ..statistics import Interval
from .cells import Cell, interval_text, mean, missing
from .schema import LayerCurve, Layers, Table
from .tables import masks_of, table

GROUPS_SHOWN = 20
NAMES = {
    "uds": "UDS",
    "depth_of_change": "depth of change",
    "logit_lens": "logit lens",
}
DEPTH_NOTES = {
    "uds": "UDS (unlearning depth score): 0 = the hidden states of the unlearned model carry the answer as the "
    "original's do, 1 = no more than those of the reference model. Samples are those of which a layer of the original "
    f"holds more than the reference model does, by {THRESHOLD:g} nats.",
    "depth_of_change": "Depth of change: the share of the answer probability that the unlearned model's hidden states "
    "take away when they are put into the original, mean over layers. It is relative to the original alone: how much "
    "of that a model does that never saw the samples (UDS), a reference_model would tell.",
}
LENS_NOTE = "Logit lens: the most of the answer probability that can be read off any layer; at least the model's own."


def depth_tables(
    depth: Depth | None,
    readable: Mapping[str, np.ndarray | None],
    buckets: Buckets | None,
    groups: Sequence[Any] | None,
    seed: int,
) -> tuple[list[Table], list[str]]:
    """Depth of unlearning and the logit lens over all forget samples, by difficulty bucket, and by group.

    Args:
        readable: what can be read off the layers of each model, by its name, `[N]`; the unlearned model first.
    """
    said = {name: values for name, values in readable.items() if values is not None}
    if depth is None and not said:
        return [], []
    rows: list[tuple[str, list[Cell]]] = []
    notes, findings = [], []
    masks = masks_of(buckets)
    if depth is not None:
        name = NAMES[depth.measure]
        rows.append((name, _cells(depth.values, depth.said, masks, seed)))
        notes.append(DEPTH_NOTES[depth.measure])
        whole = rows[0][1][1]
        if isinstance(whole, Interval):
            findings.append(f"{name} {interval_text(whole)} over {int(depth.said.sum())} samples (1 = deepest)")
    if said:
        notes.append(LENS_NOTE)
    rows += [
        (f"{NAMES['logit_lens']}, {name}", _cells(values, np.ones(len(values), dtype=bool), masks, seed))
        for name, values in said.items()
    ]
    columns = ["samples", "all", *(f"bucket {number + 1}" for number in range(len(masks)))]
    tables = [table("depth", "Depth", " ".join(notes), columns, rows)]
    if groups is not None:
        tables.append(_by_group(depth, next(iter(said.values()), None), groups, seed))
    return tables, findings


def _cells(values: np.ndarray, said: np.ndarray, masks: Sequence[np.ndarray], seed: int) -> list[Cell]:
    """How many samples it is said of, and its mean over them: over all, and over each bucket."""
    return [int(said.sum()), *(_mean(values[said & mask], seed) for mask in (np.ones_like(said), *masks))]


def _mean(values: np.ndarray, seed: int) -> Cell:
    return mean(values, seed) if len(values) else missing("no layer holds more of the answer than the reference model")


def _by_group(depth: Depth | None, readable: np.ndarray | None, groups: Sequence[Any], seed: int) -> Table:
    """The same by group: least deep first, or most readable first."""
    labels = np.array(group_labels(groups))
    columns, measured = [], []
    if depth is not None:
        columns.append(NAMES[depth.measure])
        measured.append((depth.values, depth.said))
    if readable is not None:
        columns.append(NAMES["logit_lens"])
        measured.append((readable, np.ones(len(readable), dtype=bool)))
    rows: list[tuple[str, list[Cell]]] = []
    keys = []
    for name in np.unique(labels):
        inside = labels == name
        cells: list[Cell] = [_mean(values[said & inside], seed) for values, said in measured]
        rows.append((str(name), [int(inside.sum()), *cells]))
        values, said = measured[0]
        level = float(values[said & inside].mean()) if (said & inside).any() else np.nan
        keys.append(level if depth is not None else -level)
    order = np.argsort(np.array(keys), kind="stable")  # NaN last
    first = "Least deep first" if depth is not None else "Most readable first"
    note = first + (f"; the first {GROUPS_SHOWN} of {len(rows)}." if len(rows) > GROUPS_SHOWN else ".")
    shown = [rows[place] for place in order[:GROUPS_SHOWN]]
    return table("depth_groups", "Depth by group", note, ["samples", *columns], shown)


def layers_section(lens: Mapping[str, np.ndarray | None], depth: Depth | None, seed: int) -> Layers | None:
    """Means over the forget samples layer by layer; `None` where nothing was measured by layer.

    Args:
        lens: answer probability read off every layer of each model, by its name, `[N, L]`.
    """
    read = {name: values for name, values in lens.items() if values is not None}
    drops = {}
    if depth is not None:
        drops = {"states of the unlearned model": depth.unlearned}
        if depth.reference is not None:
            drops["states of the reference model"] = depth.reference
    if not read and not drops:
        return None
    depths = {values.shape[1] for values in (*read.values(), *drops.values())}
    assert len(depths) == 1, depths
    return Layers(count=depths.pop(), lens=_curves(read, seed), drops=_curves(drops, seed))


def _curves(found: Mapping[str, np.ndarray], seed: int) -> list[LayerCurve]:
    return [
        LayerCurve(label=name, values=[stats.bootstrap_mean(column, seed=seed) for column in values.T])
        for name, values in found.items()
    ]
