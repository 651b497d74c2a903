"""Tables of the report: rules by hand, and cells that say why they are empty."""

import numpy as np
import pytest

from cud_trainer.difficulty import Buckets
from evaluation.report import tables as sections
from evaluation.report.circuits import MECHANISMS, mechanism_table
from evaluation.report.schema import jsonable


class TestSections:
    def test_mechanisms_by_their_rule(self):
        generator = np.random.default_rng(0)
        bucket = np.repeat([0, 1, 2, 3], 40)
        buckets = Buckets(bucket, 4)

        def verdict(*shifts):
            signature = {
                name: np.tile(generator.normal(size=40), 4) + shift * (bucket == 3)  # the same spread everywhere
                for name, shift in zip(MECHANISMS, shifts, strict=True)
            }
            table, finding = mechanism_table(signature, buckets, seed=0, n_boot=300)
            return finding.rsplit(": ", 1)[1], jsonable(table)

        assert verdict(3, 3, 0)[0] == verdict(3, 3, 3)[0] == "yes"
        assert verdict(0, 0, 3)[0] == verdict(0, 0, 0)[0] == verdict(3, 3, -3)[0] == "undecided"
        assert verdict(-3, 0, 0)[0] == "no"
        effect = verdict(3, 3, 0)[1]["rows"][0]["cells"][2]
        assert effect["low"] < 3 < effect["high"]
        signature = {name: np.full(8, np.nan) for name in MECHANISMS}
        table, finding = mechanism_table(signature, Buckets(np.repeat([0, 1], 4), 2), seed=0)
        assert finding.endswith("undecided") and jsonable(table)["rows"][0]["cells"][2]["reason"]

    def test_groups(self):
        generator = np.random.default_rng(0)
        groups = np.repeat(list("abcdefgh"), 12)
        level = np.repeat(np.arange(8) / 8, 12)
        made, finding = sections.group_table(level + 0.01 * generator.random(96), groups, level, seed=0, shown=3)
        table = jsonable(made)
        assert [row["label"] for row in table["rows"]] == ["h", "g", "f"] and "the first 3 of 8" in table["note"]
        assert "worst 'h'" in finding and "best 'a'" in finding and "(more than groups drawn by chance" in finding
        assert "difficulty explains part of the gap" in finding
        _, finding = sections.group_table(generator.random(96), groups, generator.random(96), seed=0)
        assert "(no more than groups drawn by chance" in finding and "does not explain it" in finding

    def test_cells_say_why_they_are_empty(self):
        assert jsonable(sections.mean(np.array([]), 0))["reason"] == "no samples"
        assert jsonable(sections.mean(np.array([1.0, np.nan]), 0))["reason"] == "1 of 2 are not finite"
        found = jsonable(sections.forget_quality_table(None, None, None, 0))["rows"][0]["cells"]
        assert all(cell["reason"] == "the forget set has no perturbed_answer column" for cell in found)
        scores = {name: np.arange(5.0) for name in ("loss", "zlib", "min_k")} | {"min_k_plus_plus": np.full(5, np.nan)}
        rows = {row["label"]: row["cells"] for row in jsonable(sections.privacy_table(scores, scores, None, 0))["rows"]}
        assert rows["reference"][0]["reason"] == "needs reference_model"
        assert rows["min_k_plus_plus"][0]["reason"] == "scores are not finite" and rows["loss"][0]["value"] == 0.5
        apart = ({"loss": np.arange(5.0)}, {"loss": np.arange(5.0) + 9})
        table = jsonable(sections.privacy_table(*apart, apart, 0))
        assert "holdout set is of another kind" in table["rows"][0]["cells"][1]["reason"]
        total = jsonable(sections.utility_table({"retain/probability": np.array([0.5])}, None, 0))["rows"][-1]["cells"][
            0
        ]
        assert "model utility needs retain/rouge_l_recall" in total["reason"]

    def test_relearning_by_bucket(self):
        taught = np.arange(8) % 2 == 0
        bucket = np.repeat([0, 1], 4)
        start = np.full(8, 0.1)
        found = {0: start, 5: start + np.where(bucket == 1, 0.5, 0.2)}
        table = jsonable(sections.relearning_table(found, taught, Buckets(bucket, 2), seed=0))
        assert table["columns"] == [
            "taught",
            "others",
            "others, bucket 1",
            "others, bucket 2",
            "recovered: hardest less easiest",
        ]
        cells = table["rows"][1]["cells"]
        assert cells[2]["value"] == pytest.approx(0.3) and cells[3]["value"] == pytest.approx(0.6)
        assert cells[4]["value"] == pytest.approx(0.3) and table["rows"][0]["cells"][4]["reason"] == "the start"
