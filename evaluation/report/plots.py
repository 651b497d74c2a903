"""Figures of the report, in colours of Okabe and Ito (safe for colour-blind readers) and different line styles."""

from __future__ import annotations

import io
import math
import textwrap
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ..statistics import Interval
from .schema import Circuits, Condition, DifficultySection, EdgeRow, LayerCurve, Layers, Matched
from .verdict_schema import ANSWER, Verdict

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#777777"
STYLES = ("-", "--", "-.", ":")
WIDTH, NARROW = 4.6, 3.75  # of a panel, in inches; the latter is a phone's page, where panels are stacked


def _figure(
    columns: int, rows: int = 1, height: float = 3.3, stacked: bool = False, **shared: Any
) -> tuple[Figure, Any]:
    """A figure and its panels, `[rows][columns]`; stacked, they stand below each other, column by column."""
    if stacked:
        figure = Figure(figsize=(NARROW, height * rows * columns), layout="constrained")
        axes = figure.subplots(rows * columns, 1, squeeze=False).reshape(columns, rows).T
    else:
        figure = Figure(figsize=(WIDTH * columns, height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **shared)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _plain(text: Any) -> str:
    """`text` as it stands: matplotlib reads what is between two dollar signs as a formula, and fails on prices."""
    return str(text).replace("$", r"\$")


def _name(condition: Condition) -> str:
    schedule, weight = condition.schedule or condition.name, condition.retain_weight
    return _plain(schedule if weight is None else f"{schedule} (retain weight {weight:g})")


def _objectives(conditions: list[Condition]) -> list[str | None]:
    return list(dict.fromkeys(condition.objective for condition in conditions))


def verdict(section: Verdict, stacked: bool = False) -> Figure:
    """Forget samples before and after unlearning, all and by bucket, and what was to be kept; a line at the level."""
    parts = [part for part in section.parts if not part.part.startswith("group ")]
    bars: list[tuple[str, Interval | None, Interval, Interval | None]] = [
        ("all" if number == 0 else part.part, part.before, part.after, part.level) for number, part in enumerate(parts)
    ]
    bars += [(f"{row.set} set", row.before, row.after, None) for row in section.costs if row.measure == ANSWER]
    figure, axes = _figure(1, height=0.9 + 0.42 * len(bars), stacked=stacked)
    if not stacked:
        figure.set_size_inches(1.2 * WIDTH, figure.get_size_inches()[1])
    ax = axes[0][0]
    sides = [("before", GREY, -0.19, 1), ("after", COLOURS[0], 0.19, 2)]
    for label, colour, shift, side in sides:
        places = [(place + shift, bar[side]) for place, bar in enumerate(bars) if bar[side] is not None]
        known = [(place, value) for place, value in places if isinstance(value, Interval)]
        if known:
            _bars(ax, [place for place, _ in known], [value for _, value in known], colour, label)
    levels = [(place, bar[3]) for place, bar in enumerate(bars) if bar[3] is not None]
    for number, (place, level) in enumerate(levels):
        seen = "never seen" if number == 0 else None
        ax.plot([level.value] * 2, [place - 0.42, place + 0.42], "--", color=COLOURS[1], linewidth=1.8, label=seen)
    ax.set_yticks(range(len(bars)), [_plain(bar[0]) for bar in bars], fontsize=9)
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.set_xlabel("answer probability, per token")
    figure.legend(fontsize=9, frameon=False, loc="outside upper center", ncols=3)
    return figure


def _bars(ax: Any, places: list[float], values: list[Interval], colour: str, label: str) -> None:
    """Lying bars with their intervals."""
    errors = [
        [max(one.value - one.low, 0.0) for one in values],
        [max(one.high - one.value, 0.0) for one in values],
    ]
    middles = [one.value for one in values]
    style = {"elinewidth": 1}
    ax.barh(places, middles, 0.36, xerr=errors, capsize=2, color=colour, label=label, error_kw=style)


def tradeoff(conditions: list[Condition], matched: list[Matched], stacked: bool = False) -> Figure:
    """Retain utility against what is left: hardest bucket (top), all forget samples (bottom); a column an objective."""
    objectives = _objectives(conditions)
    figure, axes = _figure(len(objectives), 2, stacked=stacked, sharex="col", sharey=True)
    for column, objective in enumerate(objectives):
        mine = [condition for condition in conditions if condition.objective == objective]
        for row, what in enumerate(("hardest bucket", "all forget samples")):
            ax = axes[row][column]
            for number, condition in enumerate(mine):
                for seed in condition.seeds:
                    points = [point for point in condition.curve if point.seed == seed]
                    left = [point.buckets[-1] if row == 0 else point.forget for point in points]
                    ax.plot(
                        [point.retain for point in points],
                        left,
                        STYLES[number % len(STYLES)],
                        marker=".",
                        markersize=4,
                        linewidth=1.4,
                        color=COLOURS[number % len(COLOURS)],
                        label=_name(condition) if seed == condition.seeds[0] else None,
                    )
            for level in (entry.retain_level for entry in matched if entry.objective == objective):
                ax.axvline(level, color=GREY, linewidth=1, linestyle=":")
            ax.set_ylim(-0.02, 1.02)
            if column == 0 or stacked:
                ax.set_ylabel(f"left of {what}\n(answer probability)")
            if row == 0:
                ax.set_title(_plain(objective or mine[0].name))
            else:
                ax.set_xlabel("kept: retain answer probability")
                # Below the axes: inside, it would cover the upper left, where slow runs pass.
                ax.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    return figure


def buckets(conditions: list[Condition], metric: str = "probability", stacked: bool = False) -> Figure:
    """What is left by difficulty bucket at the end of each run, with 95% intervals."""
    objectives = _objectives(conditions)
    figure, axes = _figure(len(objectives), stacked=stacked, sharey=True)
    for column, objective in enumerate(objectives):
        ax = axes[0][column]
        mine = [condition for condition in conditions if condition.objective == objective]
        width = 0.8 / len(mine)
        count = 0
        for number, condition in enumerate(mine):
            rows = condition.final.buckets or []
            count = len(rows)
            figures = [row.metrics[metric] for row in rows]
            values, lows, highs = ([getattr(one, side) for one in figures] for side in ("value", "low", "high"))
            # The value first: max(0, NaN) is 0, max(NaN, 0) is NaN.
            errors = [
                [max(value - low, 0.0) for value, low in zip(values, lows, strict=True)],
                [max(high - value, 0.0) for value, high in zip(values, highs, strict=True)],
            ]
            positions = [index + (number - (len(mine) - 1) / 2) * width for index in range(len(rows))]
            ax.bar(
                positions,
                values,
                width,
                yerr=errors,
                capsize=3,
                color=COLOURS[number % len(COLOURS)],
                label=_plain(condition.schedule or condition.name),
                error_kw={"elinewidth": 1},
            )
        names = ["1\neasiest", *[str(i + 2) for i in range(count - 2)], f"{count}\nhardest"]
        ax.set_xticks(range(count), names[:count])
        ax.set_xlabel("difficulty bucket, predicted before unlearning")
        if column == 0 or stacked:
            ax.set_ylabel(f"left: {metric.replace('_', ' ')}")
        ax.set_title(_plain(objective or mine[0].name))
        # Below the axes on a narrow page: inside, it would cover bars.
        below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.3)} if stacked else {}
        ax.legend(fontsize=8, frameon=False, **below)
    return figure


def predictors(objectives: list[DifficultySection], stacked: bool = False) -> Figure:
    """Spearman of each metric with what is left, trivial predictors in grey, the seed-to-seed ceiling as a line."""
    # One order for all panels, that of the first: they are there to be compared.
    first = sorted(objectives[0].rows, key=lambda row: row.spearman.value if math.isfinite(row.spearman.value) else -2)
    rows = first + [row for section in objectives[1:] for row in section.rows]
    labels = {row.metric: _plain(row.label) for row in rows}
    position = {metric: number for number, metric in enumerate(labels)}
    figure, axes = _figure(
        len(objectives), height=1.3 + (0.45 if stacked else 0.32) * len(labels), stacked=stacked, sharey=True
    )
    for column, section in enumerate(objectives):
        ax = axes[0][column]
        for row in section.rows:
            spearman, at = row.spearman, position[row.metric]
            colour = GREY if row.kind == "trivial" else COLOURS[0]
            ax.plot([spearman.low, spearman.high], [at, at], color=colour, linewidth=2)
            ax.plot(spearman.value, at, "o", color=colour, markersize=6)
        names = [textwrap.fill(label, 16) if stacked else label for label in labels.values()]
        ax.set_yticks(range(len(labels)), names, fontsize=8 if stacked else None)
        ax.set_ylim(-0.6, len(labels) - 0.4)
        ax.axvline(0, color="black", linewidth=0.8)
        ceiling = section.ceiling
        if ceiling is not None and math.isfinite(ceiling.agreement.value):
            ax.axvline(ceiling.agreement.value, color=COLOURS[1], linestyle="--", linewidth=1.2, label="another seed")
            if ceiling.attainable is not None:
                ax.axvline(ceiling.attainable, color=COLOURS[2], linestyle=":", linewidth=1.2, label="attainable")
            if not figure.legends:
                figure.legend(
                    *ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8
                )
        ax.set_xlim(-1, 1)
        ax.set_xlabel("Spearman with\nwhat is left")
        ax.set_title(_plain(section.objective))
    return figure


def circuit(section: Circuits, edges: str, positive: str, negative: str, stacked: bool = False) -> Figure:
    """Edges of a circuit, layers as columns: heads from below, each layer's MLP above them; stacked, layers as rows.

    Args:
        section: `circuits` of the results.
        edges: its entry with the edges, `"mean_circuit"` or `"difference"`.
        positive, negative: what edges of either sign mean; width is by absolute value.
    """
    layers, heads, kv_heads = section.layers, section.heads, section.kv_heads
    long = min(4 + 0.5 * (layers + 2), 14)
    figure = Figure(figsize=(NARROW, long) if stacked else (long, 3.8), layout="constrained")
    ax = figure.subplots()

    def place(name: str) -> tuple[float, float]:
        x, y = node(name)
        return (y, x) if stacked else (x, y)

    def node(name: str) -> tuple[float, float]:
        if name == "input":
            return -1.0, (heads - 1) / 2
        if name == "logits":
            return float(layers), (heads - 1) / 2
        layer, _, rest = name[1:].partition(".")
        if name[0] == "m":
            return int(layer) + 0.45, heads + 0.6
        head, _, part = rest.partition(".")
        number = float(head[1:])
        if part in ("k", "v"):  # between the query heads that share it
            number = (number + 0.5) * heads / kv_heads - 0.5
        return float(layer), number

    shown: list[EdgeRow] = getattr(section, edges)
    largest = max((abs(edge.value) for edge in shown), default=1.0)
    for edge in reversed(shown):  # the strongest on top
        (x0, y0), (x1, y1) = place(edge.source), place(edge.destination)
        strength = abs(edge.value) / largest
        ax.plot(
            [x0, x1],
            [y0, y1],
            color=COLOURS[0] if edge.value > 0 else COLOURS[1],
            linewidth=0.4 + 3 * strength,
            alpha=0.25 + 0.65 * strength,
            solid_capstyle="round",
        )
    nodes = {place(name) for edge in shown for name in (edge.source, edge.destination)}
    ax.scatter([x for x, _ in nodes], [y for _, y in nodes], s=14, color="black", zorder=3)
    for colour, label in ((COLOURS[0], positive), (COLOURS[1], negative)):
        ax.plot([], [], color=colour, linewidth=2, label=label)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=1 if stacked else 2)
    step = max(1, layers // 12)
    ticks = list(range(0, layers, step))
    along, across = (ax.yaxis, ax.xaxis) if stacked else (ax.xaxis, ax.yaxis)
    along.set_ticks([-1, *ticks, layers], ["input", *map(str, ticks), "logits"], fontsize=8)
    across.set_ticks([(heads - 1) / 2, heads + 0.6], ["heads", "MLP"], fontsize=8)
    (ax.set_xlim if stacked else ax.set_ylim)(-0.8, heads + 1.4)
    ax.spines[["top", "right", "left"]].set_visible(False)
    return figure


def by_layer(section: Layers, stacked: bool = False) -> Figure:
    """What can be read off every layer of each model, and what states of each take away in the original; 95% bands."""
    panels: list[tuple[str, list[LayerCurve]]] = [
        ("answer probability read off a layer", section.lens),
        ("nats off the answer, states put in", section.drops),
    ]
    panels = [(label, curves) for label, curves in panels if curves]
    figure, axes = _figure(len(panels), stacked=stacked)
    for ax, (label, curves) in zip(axes[0], panels, strict=True):
        for number, curve in enumerate(curves):
            layers, colour = range(section.count), COLOURS[number % len(COLOURS)]
            ax.fill_between(
                layers,
                [value.low for value in curve.values],
                [value.high for value in curve.values],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
            middles = [value.value for value in curve.values]
            style = STYLES[number % len(STYLES)]
            ax.plot(layers, middles, style, marker=".", color=colour, linewidth=1.4, label=_plain(curve.label))
        ax.set_xlabel("layer")
        ax.set_ylabel(label)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(fontsize=8, frameon=False)
    return figure


def to_svg(figure: Figure) -> str:
    """The figure as an `<svg>` element, without date, addresses or random ids: equal results give equal files."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "cud-trainer"}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=metadata, facecolor="white")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
