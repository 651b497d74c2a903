"""The report: every figure on the page is in results.json, nothing is unescaped, nothing comes from a network."""

import copy
import json
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from evaluation.metrics.memorization import MEASURES
from evaluation.report.cells import format_number
from evaluation.report.page import lookup, write_report
from evaluation.report.schema import jsonable

NASTY = "<script>alert('x')</script> & \"quotes\""


def interval(value, half=0.05):
    return {"value": value, "low": value - half, "high": value + half}


def example() -> dict:
    """Results of schema version 1 with every section."""
    generator = np.random.default_rng(0)

    def metrics():
        return {name: interval(float(generator.uniform(0.1, 0.9))) for name in MEASURES}

    conditions = []
    for objective in ("graddiff", "npo"):
        for schedule in ("uniform", "inverse_mass"):
            curve = [
                {
                    "seed": seed,
                    "step": t,
                    "retain": 0.98 - 0.01 * t,
                    "forget": 0.95 * 0.8**t,
                    "buckets": [0.95 * rate**t for rate in (0.7, 0.75, 0.8, 0.9)],
                }
                for seed in (1, 2)
                for t in range(8)
            ]
            final = {
                "seed": 1,
                "forget": metrics(),
                "retain": metrics(),
                "buckets": [{"bucket": i + 1, "n": 30, **metrics()} for i in range(4)],
            }
            conditions.append(
                {
                    "name": f"{objective} / {schedule}",
                    "objective": objective,
                    "schedule": schedule,
                    "retain_weight": 4.0,
                    "learning_rate": 1e-3,
                    "passes": 10,
                    "seeds": [1, 2],
                    "curve": curve,
                    "final": final,
                }
            )
    rows = [
        {
            "metric": name,
            "label": name,
            "kind": kind,
            "spearman": interval(value),
            "partial": partial,
            "auroc": interval(0.9),
        }
        for name, kind, value, partial in (
            ("cud", "circuit", 0.7, interval(0.3)),
            ("loss", "trivial", 0.65, None),
            (NASTY, "circuit", 0.1, None),
        )
    ]
    sections = [
        {
            "objective": objective,
            "n": 120,
            "target": "what is left",
            "rows": rows,
            "ceiling": {"agreement": interval(0.8), "attainable": 0.94, "n_seeds": 2},
            "cud_minus_loss": interval(0.05),
        }
        for objective in ("graddiff", "npo")
    ]
    matched = [
        {
            "objective": objective,
            "retain_level": 0.9,
            "rows": [
                {
                    "schedule": schedule,
                    "retain_weight": 4.0,
                    "forget": interval(0.2),
                    "hardest_bucket": value,
                    "steps": 11.5,
                    "reason": reason,
                }
                for schedule, value, reason in (
                    ("uniform", interval(0.4), None),
                    ("inverse_mass", None, "never got there"),
                )
            ],
            "difference": {
                "schedule": "inverse_mass",
                "against": "uniform",
                "forget": interval(-0.1),
                "hardest_bucket": None,
            },
        }
        for objective in ("graddiff", "npo")
    ]
    return {
        "schema_version": 1,
        "title": f"demo {NASTY}",
        "created": "2026-01-01T00:00:00+00:00",
        "run": {
            "command": "cud demo",
            "seed": 0,
            "versions": {"cud-trainer": "0.1.0"},
            "model": {"parameters": 754816},
            "data": {"n_forget": 120},
            "seconds": {"memorise": 30.5},
        },
        "before": {"forget": metrics(), "retain": metrics()},
        "difficulty": {"note": "a note", "objectives": sections},
        "conditions": conditions,
        "fit_note": "how",
        "retain_weight_fit": [
            {
                "objective": "npo",
                "schedule": "uniform",
                "retain_weight": 1.0,
                "forget": 0.5,
                "hardest_bucket": float("nan"),
                "chosen": True,
            }
        ],
        "matched": matched,
        "findings": [f"finding {NASTY}", "another"],
    }


class Page(HTMLParser):
    """Collects figures with their paths, tags and everything that would load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures, self.tags, self.loads, self._path, self._text = [], [], [], None, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        for name in ("src", "href", "xlink:href", "action"):
            if attributes.get(name) and not attributes[name].startswith("#"):
                self.loads.append(attributes[name])
        if "data-path" in attributes:
            self._path, self._text = attributes["data-path"], ""

    def handle_data(self, data):
        if self._path:
            self._text += data

    def handle_endtag(self, tag):
        if tag == "span" and self._path:
            self.figures.append((self._path, self._text))
            self._path = None


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(example(), folder, pd.DataFrame({"sample_id": ["a"], "cud": [0.5]}))
    return folder


def test_every_figure_is_in_results_json(written):
    results = json.loads((written / "results.json").read_text())
    page = Page((written / "report.html").read_text())
    assert len(page.figures) > 300
    for path, text in page.figures:
        assert text == format_number(lookup(results, path)), path
    shown = {path for path, _ in page.figures}
    for path in (
        "matched.0.rows.0.hardest_bucket.low",
        "difficulty.objectives.1.rows.0.partial.value",
        "conditions.3.final.buckets.3.rouge_l_recall.high",
        "retain_weight_fit.0.hardest_bucket",
        "difficulty.objectives.0.ceiling.attainable",
        "findings.1",
    ):
        assert path in shown


def test_nothing_is_unescaped_and_nothing_is_loaded(written):
    text = (written / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("script") == 1 and "alert('x')</script>" not in text
    assert "&lt;script&gt;" in text
    assert page.loads == []


def test_missing_values_are_said_to_be_missing(written):
    page = dict(Page((written / "report.html").read_text()).figures)
    assert page["matched.0.rows.1.hardest_bucket"] == "n/a"
    assert page["matched.0.rows.1.reason"] == "never got there"
    assert json.loads((written / "results.json").read_text())["retain_weight_fit"][0]["hardest_bucket"] is None


def test_files(written):
    assert pd.read_parquet(written / "per_sample.parquet")["sample_id"].tolist() == ["a"]
    for name in ("tradeoff", "buckets", "predictors"):
        assert (written / "plots" / f"{name}.png").stat().st_size > 10_000
        assert "<svg" in (written / "plots" / f"{name}.svg").read_text()
    text = (written / "report.html").read_text()
    assert text.count("<svg") == 6  # each for a desk and for a phone
    ids = [part.split('"')[0] for part in text.split(' id="')[1:]]
    assert len(ids) == len(set(ids))


def test_sections_may_be_missing(tmp_path):
    results = example()
    for key in ("before", "difficulty", "retain_weight_fit", "matched"):
        del results[key]
    results["conditions"] = results["conditions"][:1]
    results["conditions"][0].update(curve=[], objective=None, schedule=None)
    del results["conditions"][0]["final"]["retain"]
    page = Page(write_report(results, tmp_path).read_text())
    assert page.tags.count("figure") == 1


def test_undefined_figures_and_dollar_signs_do_not_stop_the_report(tmp_path):
    undefined = dict.fromkeys(("value", "low", "high"), float("nan"))
    results = example()
    results["conditions"][0]["final"]["buckets"][0]["probability"] = undefined
    results["conditions"][0].update(retain_weight=None, schedule="$\\frac$")
    results["conditions"][1]["curve"][2].update(retain=float("nan"), buckets=[0.1, 0.2, 0.3, float("nan")])
    section = results["difficulty"]["objectives"][0]
    section["ceiling"].update(agreement=undefined, attainable=None)
    section["rows"][0].update(label="from $5 to $\\frac$", spearman=undefined)
    page = dict(Page(write_report(results, tmp_path).read_text()).figures)
    assert page["conditions.0.final.buckets.0.probability.value"] == "n/a"
    assert page["difficulty.objectives.0.rows.0.label"] == "from $5 to $\\frac$"


def test_equal_results_give_equal_files(written, tmp_path):
    write_report(example(), tmp_path)
    for name in ("report.html", "plots/tradeoff.svg", "plots/buckets.svg", "plots/predictors.svg"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()


@pytest.mark.parametrize(
    "path",
    [
        "title",
        "findings",
        "run.seed",
        "run.versions",
        "conditions.1.final",
        "conditions.0.curve.3.buckets",
        "matched.0.retain_level",
        "matched.1.difference.forget",
        "difficulty.objectives.0.rows.2.partial",
    ],
)
def test_missing_entry_is_named(tmp_path, path):
    results = copy.deepcopy(example())
    *parents, last = path.split(".")
    inner = results
    for part in parents:
        inner = inner[int(part)] if isinstance(inner, list) else inner[part]
    del inner[last]
    with pytest.raises(ValueError, match=f"results have no '{path}'"):
        write_report(results, tmp_path)
    assert not list(tmp_path.iterdir())


def test_jsonable():
    value = {"a": np.float32(0.5), "b": [np.int64(3), float("inf"), np.bool_(True)], 1: (None, "x")}
    assert jsonable(value) == {"a": 0.5, "b": [3, None, True], "1": [None, "x"]}
    assert jsonable(np.array([[1.0, np.nan]])) == [[1.0, None]]
