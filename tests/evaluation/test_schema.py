"""`results.json` as types: what is written, in which order, and what reading it gives back."""

import json
import math

import numpy as np
import pytest
from test_report import example

from evaluation.report.cells import Missing
from evaluation.report.schema import (
    BucketRow,
    Condition,
    Final,
    Head,
    Results,
    Row,
    Run,
    Table,
    jsonable,
    read_results,
)
from evaluation.statistics import Interval, undefined


def results() -> Results:
    left = Interval(0.5, 0.25, 0.75)
    final = Final(sets={"forget": {"probability": left}})
    condition = Condition(
        name="a", objective=None, schedule=None, retain_weight=None, learning_rate=None, seeds=[], curve=[], final=final
    )
    cells = [np.float64(0.25), 3, "text", left, undefined(), Missing("why")]
    table = Table(id="t", title="T", note="", columns=list("abcdef"), rows=[Row(label="r", cells=cells)])
    run = Run(command="cud", seed=0, versions={}, model={}, data={"n": np.int64(4)}, seconds={})
    head = Head(schema_version=1, title="title", created="now")
    return Results(head=head, conditions=[condition], findings=["found"], tables=[table], run=run)


def test_what_is_written():
    """To the byte, but for white space: a page, a model card and other people's scripts read it."""
    interval = '{"value": 0.5, "low": 0.25, "high": 0.75}'
    assert json.dumps(jsonable(results())) == (
        '{"schema_version": 1, "title": "title", "created": "now", "conditions": [{"name": "a", "objective": null, '
        '"schedule": null, "retain_weight": null, "learning_rate": null, "seeds": [], "curve": [], '
        f'"final": {{"forget": {{"probability": {interval}}}}}}}], "findings": ["found"], '
        '"tables": [{"id": "t", "title": "T", "note": "", "columns": ["a", "b", "c", "d", "e", "f"], '
        f'"rows": [{{"label": "r", "cells": [0.25, 3, "text", {interval}, '
        '{"value": null, "low": null, "high": null}, {"value": null, "reason": "why"}]}]}], '
        '"run": {"command": "cud", "seed": 0, "versions": {}, "model": {}, "data": {"n": 4}, "seconds": {}}}'
    )


def test_reading_gives_back_what_was_written():
    read = read_results(jsonable(results()))
    cells = read.tables[0].rows[0].cells
    assert cells[:4] == [0.25, 3, "text", Interval(0.5, 0.25, 0.75)] and cells[5] == Missing("why")
    assert math.isnan(cells[4].value) and math.isnan(cells[4].low)
    assert read.conditions == results().conditions and read.head == results().head and read.matched is None
    assert jsonable(read) == jsonable(results())


def test_every_section_is_read():
    plain = jsonable(example())
    read = read_results(plain)
    assert read.conditions[3].final.buckets[3].metrics["probability"].value == pytest.approx(
        plain["conditions"][3]["final"]["buckets"][3]["probability"]["value"]
    )
    assert set(read.conditions[0].final.sets) == {"forget", "retain"} and read.conditions[0].final.seed == 1
    assert read.difficulty.objectives[1].rows[1].partial is None and read.matched[0].rows[1].hardest_bucket is None
    for name in ("before", "difficulty", "conditions", "matched", "retain_weight_fit", "findings"):
        assert jsonable(getattr(read, name)) == plain[name], name


def test_entries_beside_each_other():
    row = BucketRow(bucket=1, n=2, metrics={"late_share": Interval(0.5, 0.25, 0.75)})
    assert list(jsonable(row)) == ["bucket", "n", "late_share"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 2, "schema version 2, this writes 1"),
        ("conditions.0.final", {}, "results have no 'conditions.0.final.forget'"),
        ("conditions.0.final.buckets", [{"bucket": 1, "n": 1}], "no 'conditions.0.final.buckets.0.probability'"),
    ],
)
def test_refusals(path, value, message):
    plain = jsonable(example())
    *parents, last = path.split(".")
    inner = plain
    for part in parents:
        inner = inner[int(part)] if isinstance(inner, list) else inner[part]
    inner[last] = value
    with pytest.raises(ValueError, match=message):
        read_results(plain)
