"""The audit of one model: an independent computation."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from cud_trainer.difficulty import DifficultyScores
from evaluation.metrics.memorization import (
    MEASURES,
)
from evaluation.report.audit import audit_results
from evaluation.report.difficulty import difficulty_section
from evaluation.report.schema import Run, jsonable
from evaluation.statistics import spearman_difference


class TestAudit:
    def test_difficulty_section(self):
        generator = np.random.default_rng(0)
        target = generator.normal(size=80)
        columns = {
            "cud": target + 0.1 * generator.normal(size=80),
            "loss": target + generator.normal(size=80),
            "length": generator.normal(size=80),
        }
        section = jsonable(difficulty_section("npo", columns, [target, target + 0.2], target="t", seed=0))
        rows = {row["metric"]: row for row in section["rows"]}
        assert rows["cud"]["spearman"]["value"] == pytest.approx(spearmanr(columns["cud"], target).statistic)
        assert rows["cud"]["partial"]["value"] > 0.9 and rows["loss"]["partial"] is None
        assert section["ceiling"]["agreement"]["value"] == pytest.approx(1.0)
        difference = spearman_difference(columns["cud"], columns["loss"], target, seed=0)
        assert difference.low > 0
        assert difference.value == pytest.approx(rows["cud"]["spearman"]["value"] - rows["loss"]["spearman"]["value"])

    def test_results_of_one_model(self):
        generator = np.random.default_rng(1)
        values = {name: generator.uniform(size=12) for name in MEASURES}
        scores = DifficultyScores(
            [str(i) for i in range(12)],
            {"cud": values["probability"].copy(), "loss": generator.normal(size=12), "length": np.arange(12.0)},
        )
        run = Run(command="", seed=0, versions={}, model={}, data={}, seconds={})
        sets = {"forget": values, "retain": values}
        results = jsonable(
            audit_results(sets, run, before={"forget": values}, scores=scores, buckets=scores.bucketed())
        )
        buckets = results["conditions"][0]["final"]["buckets"]
        assert [row["n"] for row in buckets] == [3, 3, 3, 3]
        expected = np.sort(values["probability"]).reshape(4, 3).mean(1)
        np.testing.assert_allclose([row["probability"]["value"] for row in buckets], expected)
        assert any("Spearman of CUD" in line and "1.000" in line for line in results["findings"])
