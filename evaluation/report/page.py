"""`results.json`, `per_sample.parquet`, plots and one self-contained HTML page.

The page shows nothing that is not in `results.json`: every figure is written by `num(path)`, which looks it up and
marks where it came from. It needs no network and holds no forget text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from matplotlib.figure import Figure

from cud_trainer.data.ids import IdKey, keyed_for
from cud_trainer.files import atomic_write, write_json
from cud_trainer.markdown import markdown_text

from ..metrics.memorization import MEASURES
from ..statistics import Interval
from . import plots
from .cells import Cell, Missing, format_number
from .schema import Results, jsonable, read_results
from .verdict_schema import Returned


def write_report(
    results: Results | Mapping[str, Any],
    out_dir: str | Path,
    per_sample: pd.DataFrame | None = None,
    kept_samples: pd.DataFrame | None = None,
    *,
    keys: tuple[IdKey, ...] = (),
) -> Path:
    """Write everything into `out_dir` and return the path of `report.html`.

    Args:
        results: `Results`, or the same as plain values.
        per_sample: one row per forget sample, without text.
        kept_samples: one row per sample that was to be kept, likewise.
        keys: of the ids of other files that this is written for, if there are some; see `cud_trainer.data.ids`.

    Raises:
        ValueError: naming a required entry that is missing.
    """
    out_dir = Path(out_dir)
    plain = keyed_for(out_dir / "results.json", jsonable(results), keys)  # names of groups may be hashes, too
    read = read_results(plain)  # nothing but what stands in the file is shown
    write_json(out_dir / "results.json", plain, private=True)  # a verdict names samples
    for name, frame in (("per_sample", per_sample), ("kept_samples", kept_samples)):
        if frame is not None:
            path = out_dir / f"{name}.parquet"
            named = [column for column in ("sample_id", "group") if column in frame]
            frame = frame.assign(**{column: keyed_for(path, frame[column].tolist(), keys) for column in named})
            atomic_write(path, partial(_write_parquet, frame), private=True)
    figures = make_figures(read)
    inline = {}
    for name, figure in [*figures.items(), *((f"{n}-narrow", one) for n, one in make_figures(read, True).items())]:
        svg = plots.to_svg(figure)
        # Ids must not clash between the plots of one page.
        inline[name] = Markup(re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg))
        if name not in figures:
            continue
        atomic_write(out_dir / "plots" / f"{name}.svg", partial(_write_text, svg))
        atomic_write(out_dir / "plots" / f"{name}.png", partial(_write_png, figure))
    atomic_write(out_dir / "summary.md", partial(_write_text, summary(read)))
    page = render(plain, inline, metrics_of(read))
    return atomic_write(out_dir / "report.html", partial(_write_text, page), private=True)


def _hidden(rows: Sequence[Returned]) -> list[str]:
    """Whether it was only hidden, by attack, as lines of Markdown."""
    said = (f"- {_markdown(row.how)}: {_markdown(row.answer)}. {_markdown(row.said)}" for row in rows)
    return ["**Was it only hidden?**", "", *said, ""]


def summary(results: Results) -> str:
    """Markdown for a model card: the verdict, findings, what is left by difficulty bucket, every table. No ids."""
    lines = ["## Unlearning", ""]
    if (verdict := results.verdict) is not None:
        lines += [f"**Is it gone?** {_markdown(verdict.headline)}", ""]
        lines += [f"**What did it cost?** {_markdown(verdict.cost)}", ""]
        lines += [f"**For whom?** {_markdown(verdict.whom)}", "", *_hidden(verdict.hidden), "### Findings", ""]
    if (runs := results.verdicts) is not None:
        lines += [f"**Is it gone?** {_markdown(runs.answer)} {_markdown(runs.headline)}", ""]
        lines += [*(f"- {_markdown(row.said)}" for row in runs.arms), ""]
        if runs.compared:
            lines += ["**How do they compare?**", "", *(f"- {_markdown(line)}" for line in runs.compared), ""]
        lines += _hidden(runs.hidden)
    if (decision := results.decision) is not None:
        lines += ["**Does difficulty earn its place?**", ""]
        for arm in decision.arms:
            said = " ".join(f"{arm.objective}, {arm.arm}: {arm.verdict}. {arm.reason}".split())
            lines.append(f"- {_markdown(said)}")
        lines += ["", _markdown(decision.rule), ""]
    if runs is not None or decision is not None:
        lines += ["### Findings", ""]
    lines += [*(f"- {_markdown(finding)}" for finding in results.findings), ""]
    for condition in results.conditions or []:
        buckets = condition.final.buckets
        if buckets:
            names = [name for name in MEASURES if name in buckets[0].metrics]
            lines += [f"### {_markdown(condition.name)}: residual memorisation by difficulty (1 = easiest)", ""]
            body: list[list[Cell]] = [[row.bucket, row.n, *(row.metrics[name] for name in names)] for row in buckets]
            lines += _markdown_table(["bucket", "samples", *names], body)
    for table in results.tables or []:
        lines += [f"### {_markdown(table.title)}", "", _markdown(table.note), ""]
        lines += _markdown_table(["", *table.columns], [[row.label, *row.cells] for row in table.rows])
    about = "Intervals are 95% bootstrap intervals over samples."
    lines.append(f"Seed {results.run.seed}, schema version {results.head.schema_version}. {about}")
    return "\n".join(lines) + "\n"


def _markdown(cell: Cell) -> str:
    """A cell in one line that does not end the table, nor brings markup of its own."""
    if isinstance(cell, Missing):
        return f"n/a ({markdown_text(cell.reason)})" if cell.reason else "n/a"
    if isinstance(cell, Interval):
        if not np.isfinite(cell.value):
            return _markdown(Missing(cell.reason or ""))
        bounds = [format_number(bound) for bound in (cell.low, cell.high) if np.isfinite(bound)]
        shown = format_number(cell.value)
        return f"{shown} [{', '.join(bounds)}]" if bounds else shown
    return markdown_text(cell) if isinstance(cell, str) else format_number(cell)


def _markdown_table(head: list[str], body: list[list[Cell]]) -> list[str]:
    return [
        "| " + " | ".join(map(_markdown, head)) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(map(_markdown, line)) + " |" for line in body),
        "",
    ]


def _write_parquet(frame: pd.DataFrame, path: Path) -> None:
    frame.to_parquet(path, index=False)


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _write_png(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=150, facecolor="white")


def lookup(results: dict[str, Any], path: str) -> Any:
    """The value at a dotted path such as `matched.0.rows.1.forget.value`; `KeyError` when there is none."""
    value: Any = results
    for part in path.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, TypeError, ValueError):
            raise KeyError(f"results.json has nothing at {path!r}") from None
    return value


def make_figures(results: Results, stacked: bool = False) -> dict[str, Figure]:
    """The figures that the results have data for, by name; stacked, as narrow as a phone's page."""
    figures = {} if results.verdict is None else {"verdict": plots.verdict(results.verdict, stacked)}
    conditions = results.conditions or []
    curves = [condition for condition in conditions if condition.curve]
    if curves:
        figures["tradeoff"] = plots.tradeoff(curves, results.matched or [], stacked)
    bucketed = [condition for condition in conditions if condition.final.buckets]
    if bucketed:
        figures["buckets"] = plots.buckets(bucketed, stacked=stacked)
    if results.difficulty is not None and results.difficulty.objectives:
        figures["predictors"] = plots.predictors(results.difficulty.objectives, stacked)
    if results.circuits is not None:
        section = results.circuits
        helps = ("works against the answer", "helps the answer")
        stronger = ("stronger in the hardest bucket", "stronger in the easiest bucket")
        figures["circuit"] = plots.circuit(section, "mean_circuit", *helps, stacked)
        figures["circuit_difference"] = plots.circuit(section, "difference", *stronger, stacked)
    if results.layers is not None:
        figures["layers"] = plots.by_layer(results.layers, stacked)
    return figures


def metrics_of(results: Results) -> list[str]:
    """The metrics of residual memorisation that some condition, or the model before unlearning, has."""
    sets = [condition.final.sets["forget"] for condition in results.conditions or []]
    sets.append((results.before or {}).get("forget", {}))
    return [name for name in MEASURES if any(name in values for values in sets)]


def render(results: dict[str, Any], figures: dict[str, Markup], metrics: list[str]) -> str:
    """The HTML page.

    Args:
        results: what stands in `results.json`.
        figures: SVG by name; `NAME-narrow` takes the place of `NAME` on a narrow page.
        metrics: columns of the tables of what is left.
    """
    environment = Environment(
        loader=PackageLoader("evaluation.report", "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def num(path: str) -> Markup:
        """One value of results.json, marked with its path."""
        shown = format_number(lookup(results, path))
        return Markup('<span class="num" data-path="{0}" title="results.json: {0}">{1}</span>').format(path, shown)

    def interval(path: str) -> Markup:
        """A figure with its 95% interval."""
        if lookup(results, path) is None:
            return num(path)
        if lookup(results, f"{path}.value") is None:
            why = lookup(results, path).get("reason")
            reason = Markup(' <span class="ci">({})</span>').format(num(f"{path}.reason")) if why else Markup("")
            return num(f"{path}.value") + reason
        value, low, high = (num(f"{path}.{part}") for part in ("value", "low", "high"))
        return Markup('{} <span class="ci">[{}, {}]</span>').format(value, low, high)

    def sort_key(path: str) -> float | str:
        """What a table cell is sorted by."""
        value = lookup(results, path)
        value = value.get("value") if isinstance(value, dict) else value
        return "" if value is None else value

    def any_cell(path: str) -> Markup:
        """A table cell of `results.tables`: a number, a text, a figure with its interval, or why there is none."""
        value = lookup(results, path)
        key = sort_key(path)
        if not isinstance(value, dict):
            shown = num(path)
        elif value.get("value") is None:
            reason = num(f"{path}.reason") if value.get("reason") else Markup("undefined")
            shown = Markup('n/a <span class="ci">({})</span>').format(reason)
        elif "low" in value:
            shown = interval(path)
        else:
            shown = num(f"{path}.value")
        return Markup('<td data-sort="{}">{}</td>').format(key, shown)

    environment.globals.update(
        any_cell=any_cell, num=num, interval=interval, sort_key=sort_key, lookup=partial(lookup, results)
    )
    return environment.get_template("report.html.j2").render(r=results, figures=figures, metrics=metrics)
