"""Figures of the report, in colours of Okabe and Ito (safe for colour-blind readers) and different line styles."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#777777"
STYLES = ("-", "--", "-.", ":")
WIDTH = 4.6


def _figure(columns: int, rows: int = 1, height: float = 3.3) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _objectives(conditions: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(condition["objective"] for condition in conditions))


def tradeoff(conditions: list[dict[str, Any]], matched: list[dict[str, Any]]) -> Figure:
    """Retain utility against what is left: hardest bucket (top), all forget samples (bottom); a column an objective."""
    objectives = _objectives(conditions)
    figure, axes = _figure(len(objectives), 2)
    levels = {row["objective"]: row["retain_level"] for row in matched}
    for column, objective in enumerate(objectives):
        mine = [condition for condition in conditions if condition["objective"] == objective]
        for row, what in enumerate(("hardest bucket", "all forget samples")):
            ax = axes[row][column]
            for number, condition in enumerate(mine):
                for seed in condition["seeds"]:
                    points = [point for point in condition["curve"] if point["seed"] == seed]
                    left = [point["buckets"][-1] if row == 0 else point["forget"] for point in points]
                    ax.plot(
                        [point["retain"] for point in points],
                        left,
                        STYLES[number % len(STYLES)],
                        marker=".",
                        markersize=4,
                        linewidth=1.4,
                        color=COLOURS[number % len(COLOURS)],
                        label=f"{condition['schedule']} (retain weight {condition['retain_weight']:g})"
                        if seed == condition["seeds"][0]
                        else None,
                    )
            if objective in levels:
                ax.axvline(levels[objective], color=GREY, linewidth=1, linestyle=":")
            ax.set_ylim(-0.02, 1.02)
            ax.set_ylabel(f"left of {what}\n(answer probability)")
            if row == 0:
                ax.set_title(objective)
                ax.legend(fontsize=8, frameon=False, loc="upper left")
            else:
                ax.set_xlabel("kept: retain answer probability")
    return figure


def buckets(conditions: list[dict[str, Any]], metric: str = "probability") -> Figure:
    """What is left by difficulty bucket at the end of each run, with 95% intervals."""
    objectives = _objectives(conditions)
    figure, axes = _figure(len(objectives))
    for column, objective in enumerate(objectives):
        ax = axes[0][column]
        mine = [condition for condition in conditions if condition["objective"] == objective]
        width = 0.8 / len(mine)
        count = 0
        for number, condition in enumerate(mine):
            rows = condition["final"]["buckets"]
            count = len(rows)
            values = [row[metric]["value"] for row in rows]
            errors = [
                [max(0.0, row[metric]["value"] - row[metric]["low"]) for row in rows],
                [max(0.0, row[metric]["high"] - row[metric]["value"]) for row in rows],
            ]
            positions = [index + (number - (len(mine) - 1) / 2) * width for index in range(len(rows))]
            ax.bar(
                positions, values, width, yerr=errors, capsize=3, color=COLOURS[number % len(COLOURS)],
                label=condition["schedule"] or condition["name"], error_kw={"elinewidth": 1},
            )  # fmt: skip
        ax.set_xticks(range(count), ["easiest", *[str(i + 2) for i in range(count - 2)], "hardest"][:count])
        ax.set_xlabel("difficulty bucket, predicted before unlearning")
        ax.set_ylabel(f"left: {metric.replace('_', ' ')}")
        ax.set_title(objective or mine[0]["name"])
        ax.legend(fontsize=8, frameon=False)
    return figure


def predictors(objectives: list[dict[str, Any]]) -> Figure:
    """Spearman of each metric with what is left, trivial predictors in grey, the seed-to-seed ceiling as a line."""
    rows = max(len(section["rows"]) for section in objectives)
    figure, axes = _figure(len(objectives), height=1.3 + 0.32 * rows)
    for column, section in enumerate(objectives):
        ax = axes[0][column]
        order = sorted(section["rows"], key=lambda row: _or(row["spearman"]["value"], -2))
        for position, row in enumerate(order):
            value = row["spearman"]
            if value["value"] is None or value["value"] != value["value"]:
                continue
            colour = GREY if row["kind"] == "trivial" else COLOURS[0]
            ax.plot([value["low"], value["high"]], [position, position], color=colour, linewidth=2)
            ax.plot(value["value"], position, "o", color=colour, markersize=6)
        ax.set_yticks(range(len(order)), [row["label"] for row in order])
        ax.axvline(0, color="black", linewidth=0.8)
        ceiling = section.get("ceiling")
        if ceiling:
            ax.axvline(
                ceiling["agreement"]["value"], color=COLOURS[1], linestyle="--", linewidth=1.2, label="another seed"
            )
            if ceiling["attainable"] is not None:
                ax.axvline(ceiling["attainable"], color=COLOURS[2], linestyle=":", linewidth=1.2, label="attainable")
            if column == 0:
                figure.legend(
                    *ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8
                )
        ax.set_xlim(-1, 1)
        ax.set_xlabel("Spearman with residual memorisation")
        ax.set_title(section["objective"])
    return figure


def _or(value: float | None, other: float) -> float:
    return other if value is None or value != value else value


def to_svg(figure: Figure) -> str:
    """The figure as an `<svg>` element, without a date, so that equal results give equal files."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
