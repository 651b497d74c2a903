"""`results.json`, `per_sample.parquet`, plots and one self-contained HTML page.

The page shows nothing that is not in `results.json`: every figure is written by `num(path)`, which looks it up and
marks where it came from. It needs no network and holds no forget text.
"""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from matplotlib.figure import Figure

from cud_trainer.files import atomic_write, write_json

from ..metrics.memorization import METRICS
from . import plots

SCHEMA_VERSION = 1
REQUIRED = ("schema_version", "title", "created", "run", "findings")
RUN = ("command", "seed", "versions", "model", "data", "seconds")
# What the entries of optional sections must have for the page and the plots; `*` stands for every entry of a list.
ENTRIES = {
    "difficulty": ("note", "objectives"),
    "difficulty.objectives.*": ("objective", "n", "target", "rows"),
    "difficulty.objectives.*.ceiling": ("agreement", "attainable", "n_seeds"),
    "difficulty.objectives.*.rows.*": ("metric", "label", "kind", "spearman", "partial", "auroc"),
    "circuits": (
        "n",
        "n_empty",
        "k",
        "note",
        "settings",
        "layers",
        "heads",
        "kv_heads",
        "signature",
        "buckets",
        "mean_circuit",
        "difference",
    ),
    "circuits.buckets.*": ("bucket", "n"),
    "tables.*": ("id", "title", "note", "columns", "rows"),
    "tables.*.rows.*": ("label", "cells"),
    "circuits.spearman.*": ("name", "spearman"),
    "conditions.*": ("name", "objective", "schedule", "retain_weight", "seeds", "final"),
    "conditions.*.curve.*": ("seed", "retain", "forget", "buckets"),
    "conditions.*.final": ("forget",),
    "conditions.*.final.buckets.*": ("bucket", "n", "probability"),
    "retain_weight_fit.*": ("objective", "schedule", "retain_weight", "forget", "hardest_bucket", "chosen"),
    "matched.*": ("objective", "retain_level", "rows", "difference"),
    "matched.*.rows.*": ("schedule", "retain_weight", "forget", "hardest_bucket", "steps", "reason"),
    "matched.*.difference": ("schedule", "against", "forget", "hardest_bucket"),
}


def write_report(results: dict[str, Any], out_dir: str | Path, per_sample: pd.DataFrame | None = None) -> Path:
    """Write everything into `out_dir` and return the path of `report.html`.

    Args:
        results: see the module's tests for the schema (version 1); `before`, `difficulty`, `conditions`,
            `retain_weight_fit` and `matched` may be missing.
        per_sample: one row per forget sample, without text.

    Raises:
        ValueError: naming a required entry that is missing.
    """
    results = jsonable(results)
    check(results)
    out_dir = Path(out_dir)
    write_json(out_dir / "results.json", results)
    if per_sample is not None:
        atomic_write(out_dir / "per_sample.parquet", lambda path: per_sample.to_parquet(path, index=False))
    figures = make_figures(results)
    inline = {}
    for name, figure in figures.items():
        svg = plots.to_svg(figure)
        # Ids must not clash between the plots of one page.
        inline[name] = Markup(re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg))
        atomic_write(out_dir / "plots" / f"{name}.svg", partial(_write_text, svg))
        atomic_write(out_dir / "plots" / f"{name}.png", partial(_write_png, figure))
    atomic_write(out_dir / "summary.md", partial(_write_text, summary(results)))
    page = render(results, inline)
    return atomic_write(out_dir / "report.html", partial(_write_text, page))


def summary(results: dict[str, Any]) -> str:
    """Markdown for a model card: findings, what is left by difficulty bucket, and every table."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            if value.get("value") is None:
                return f"n/a ({value['reason']})" if value.get("reason") else "n/a"
            shown = format_number(value["value"])
            bounds = [format_number(value[side]) for side in ("low", "high") if value.get(side) is not None]
            value = f"{shown} [{', '.join(bounds)}]" if bounds else shown
        # a cell must not end the table, nor bring markup of its own
        found = format_number(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return found.replace("|", "\\|").replace("\n", " ")

    def rows(head: list[str], body: list[list[Any]]) -> list[str]:
        return [
            "| " + " | ".join(map(text, head)) + " |",
            "|" + "---|" * len(head),
            *("| " + " | ".join(map(text, line)) + " |" for line in body),
            "",
        ]

    lines = ["## Unlearning", "", *(f"- {text(finding)}" for finding in results["findings"]), ""]
    for condition in results.get("conditions", []):
        buckets = condition["final"].get("buckets")
        if buckets:
            names = [name for name in METRICS if name in buckets[0]]
            lines += [f"### {text(condition['name'])}: residual memorisation by difficulty (1 = easiest)", ""]
            lines += rows(
                ["bucket", "samples", *names], [[row["bucket"], row["n"], *(row[n] for n in names)] for row in buckets]
            )
    for entry in results.get("tables", []):
        lines += [f"### {text(entry['title'])}", "", text(entry["note"]), ""]
        lines += rows(["", *entry["columns"]], [[row["label"], *row["cells"]] for row in entry["rows"]])
    run = results["run"]
    about = "Intervals are 95% bootstrap intervals over samples."
    lines.append(f"Seed {run['seed']}, schema version {results['schema_version']}. {about}")
    return "\n".join(lines) + "\n"


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _write_png(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=150, facecolor="white")


def check(results: dict[str, Any]) -> None:
    """Raise `ValueError` naming a required entry that is missing, or another schema version."""
    for key in REQUIRED:
        if key not in results:
            raise ValueError(f"results have no {key!r}")
    for key in RUN:
        if key not in results["run"]:
            raise ValueError(f"results have no 'run.{key}'")
    for pattern, keys in ENTRIES.items():
        for path, entry in _entries(results, pattern):
            for key in keys:
                if key not in entry:
                    raise ValueError(f"results have no '{path}.{key}'")
    if results["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"results have schema version {results['schema_version']}, this writes {SCHEMA_VERSION}")


def _entries(results: dict[str, Any], pattern: str) -> list[tuple[str, Any]]:
    """The entries that are there at `pattern`, with their paths."""
    found: list[tuple[str, Any]] = [("", results)]
    for part in pattern.split("."):
        inner = [
            (f"{path}.{key}".lstrip("."), entry[key])
            for path, entry in found
            for key in (range(len(entry)) if part == "*" else [part] if part in entry else [])
        ]
        found = [(path, entry) for path, entry in inner if entry is not None]
    return found


def jsonable(value: Any) -> Any:
    """Plain JSON values: numpy and torch values unpacked, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def lookup(results: dict[str, Any], path: str) -> Any:
    """The value at a dotted path such as `matched.0.rows.1.forget.value`; `KeyError` when there is none."""
    value: Any = results
    for part in path.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, TypeError, ValueError):
            raise KeyError(f"results.json has nothing at {path!r}") from None
    return value


def format_number(value: Any) -> str:
    """How a single value is shown."""
    if value is None:
        return "n/a"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, float) and value.is_integer() and abs(value) >= 2:  # weights and steps, not probabilities
        value = int(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.2g}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def make_figures(results: dict[str, Any]) -> dict[str, Any]:
    """The figures that the results have data for, by name."""
    figures = {}
    conditions = results.get("conditions", [])
    curves = [condition for condition in conditions if condition.get("curve")]
    if curves:
        figures["tradeoff"] = plots.tradeoff(curves, results.get("matched", []))
    bucketed = [condition for condition in conditions if condition["final"].get("buckets")]
    if bucketed:
        figures["buckets"] = plots.buckets(bucketed)
    if results.get("difficulty", {}).get("objectives"):
        figures["predictors"] = plots.predictors(results["difficulty"]["objectives"])
    if results.get("circuits"):
        section = results["circuits"]
        figures["circuit"] = plots.circuit(section, "mean_circuit", "works against the answer", "helps the answer")
        figures["circuit_difference"] = plots.circuit(
            section, "difference", "stronger in the hardest bucket", "stronger in the easiest bucket"
        )
    return figures


def render(results: dict[str, Any], figures: dict[str, Markup]) -> str:
    """The HTML page."""
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
            return num(f"{path}.value")
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
    metrics = [
        name
        for name in METRICS
        if any(name in condition["final"]["forget"] for condition in results.get("conditions", []))
        or name in results.get("before", {}).get("forget", {})
    ]
    return environment.get_template("report.html.j2").render(r=results, figures=figures, metrics=metrics)
