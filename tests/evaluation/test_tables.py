"""Tables of the report: rules by hand, and cells that say why they are empty."""

import sys

import numpy as np
import pytest

from cud_trainer.difficulty import Buckets, DifficultyScores
from evaluation.metrics.robustness import Relearned
from evaluation.metrics.utility import UTILITY_SETS
from evaluation.report import tables as sections
from evaluation.report.attacks import Groups, relearning
from evaluation.report.audit import audit_results
from evaluation.report.circuits import MECHANISMS, mechanism_table
from evaluation.report.difficulty import reliability_by_decile
from evaluation.report.schema import Run, jsonable


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

    def test_groups_that_look_alike_are_told_apart(self):
        made, finding = sections.group_table(np.array([0.1, 0.9, 0.2, 0.8]), ["A", None, "None", None], None, seed=0)
        assert [(row["label"], row["cells"][0]) for row in jsonable(made)["rows"]] == [
            ("None", 2),
            ("'None'", 1),
            ("A", 1),
        ]
        assert "3 groups: worst 'None' 0.850, best 'A' 0.100" in finding

    def test_a_group_that_is_not_finite_takes_no_other_with_it(self):
        values = np.array([0.1, 0.2, np.nan, 0.5, 0.6, 0.7])
        made, finding = sections.group_table(values, list("aabbcc"), np.arange(6.0), seed=0)
        cells = {row["label"]: row["cells"][1] for row in jsonable(made)["rows"]}
        assert cells["b"] == {"value": None, "reason": "1 of 2 are not finite"} and list(cells) == ["c", "a", "b"]
        assert cells["a"]["value"] == pytest.approx(0.15) and "of the others worst 'c' 0.650, best 'a' 0.150" in finding
        for broken in (np.full(6, np.nan), np.where(np.arange(6) < 2, values, np.inf)):
            assert "no two can be compared" in sections.group_table(broken, list("aabbcc"), None, seed=0)[1]

    def test_a_table_by_group_is_linear(self):
        """Calls per sample do not grow with the groups: it went through all groups for every draw by chance."""
        calls = 0

        def count(frame, event, argument):
            nonlocal calls
            calls += event.endswith("call")

        size, values = 4000, np.random.default_rng(0).random(4000)
        sys.setprofile(count)
        try:
            sections.group_table(values, [f"person {i % 2000}" for i in range(size)], values, seed=0)
        finally:
            sys.setprofile(None)
        assert calls / size < 100

    def test_cells_say_why_they_are_empty(self):
        assert jsonable(sections.mean(np.array([]), 0))["reason"] == "no samples"
        assert jsonable(sections.mean(np.array([1.0, np.nan]), 0))["reason"] == "1 of 2 are not finite"
        found = jsonable(sections.forget_quality_table(None, None, None, 0))["rows"][0]["cells"]
        assert all(cell["reason"] == "the forget set has no perturbed_answer column" for cell in found)
        scores = {name: np.arange(5.0) for name in ("loss", "zlib", "min_k")} | {"min_k_plus_plus": np.full(5, np.nan)}
        rows = {row["label"]: row["cells"] for row in jsonable(sections.privacy_table(scores, scores, None, 0))["rows"]}
        assert rows["reference"][0]["reason"] == "needs reference_model"
        assert rows["min_k_plus_plus"][0]["reason"] == "5 of 5 are not finite" and rows["loss"][0]["value"] == 0.5
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
        table = jsonable(relearning(Relearned(found), taught, Buckets(bucket, 2), Groups(), seed=0)[0])
        assert table["columns"] == [
            "taught",
            "others",
            "change",
            "never-seen samples",
            "their change",
            "change beyond never-seen samples",
            "others, bucket 1",
            "others, bucket 2",
            "recovered: hardest less easiest",
        ]
        cells = table["rows"][1]["cells"]
        assert cells[6]["value"] == pytest.approx(0.3) and cells[7]["value"] == pytest.approx(0.6)
        assert cells[8]["value"] == pytest.approx(0.3) and table["rows"][0]["cells"][8]["reason"] == "the start"


SIZE = 24
GENERATOR = np.random.default_rng(0)
# with ties, as probabilities of texts that are gone or known by heart have them
COLUMNS = {name: GENERATOR.integers(0, 6, SIZE) / 7 for name in ("a", "b", "loss", "length", "ratio", "line")}
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus")


def every_table(order=None, broken=()):
    """Every table of forget samples, by name, as plain JSON; rows in `order`, the samples `broken` not finite in "a"."""
    order = np.arange(SIZE) if order is None else order
    c = {name: column[order] for name, column in COLUMNS.items()}
    c["a"][np.isin(order, broken)] = np.nan
    buckets = Buckets.by_rank(c["loss"], 4, "loss")
    attacks = {name: c["b"] + number for number, name in enumerate(ATTACKS)} | {"loss": c["a"]}
    groups = [["A", None, "None", 3][row % 4] for row in order]
    taught = order % 5 == 0
    others = {name: np.arange(9.0) / 9 + number for number, name in enumerate(ATTACKS)}
    run = Run(command="", seed=0, versions={}, model={}, data={}, seconds={})
    sets = {"forget": {"probability": c["a"], "verbatim": c["b"]}}
    scores = DifficultyScores([str(row) for row in order], {"loss": c["loss"], "length": c["length"]})
    utility = {f"{s}/{k}": c["b"] for s in UTILITY_SETS for k in ("probability", "rouge_l_recall", "truth_ratio")}
    tables = [
        sections.relative_table(sets["forget"], {"probability": c["b"], "verbatim": c["b"]}, 0),
        sections.forget_quality_table(c["a"], c["ratio"], c["b"], 0),
        sections.privacy_table(attacks, others, (attacks, others), 0, buckets),
        sections.utility_table({**utility, "retain/probability": c["a"]}, utility, 0),
        sections.change_table("change", "", "", "x", {"x": c["b"], "y": c["a"], "z": c["line"]}, buckets, 0),
        relearning(Relearned({0: c["b"], 5: c["a"], 9: c["line"]}), taught, buckets, Groups(), 0)[0],
        sections.group_table(c["a"], groups, c["loss"], 0)[0],
        sections.line_table([{"share": 0.0, "forget": c["a"], "retain": c["b"]}], 0),
        mechanism_table({"mean_edge_length": c["a"], **dict.fromkeys(MECHANISMS[1:], c["b"])}, buckets, 0, n_boot=50)[
            0
        ],
        reliability_by_decile(c["length"], c["a"], 0),
    ]
    audit = audit_results(sets, run, before=sets, scores=scores, buckets=buckets, seed=0)
    audit.head.created = ""
    made = {table.id: table for table in tables} | {"audit": audit}
    finding = sections.group_table(c["a"], groups, c["loss"], 0)[1]
    return {name: jsonable(table) for name, table in made.items()} | {"finding": finding}


@pytest.mark.parametrize("broken", [(), (3, 8)])
def test_no_table_depends_on_the_order_of_the_samples(broken):
    first = every_table(broken=broken)
    for seed in range(3):
        moved = every_table(np.random.default_rng(seed).permutation(SIZE), broken)
        for name, table in first.items():
            assert moved[name] == table, name


def leaves(part, path=()):
    if isinstance(part, dict) and not part.keys() & {"value", "low"}:
        part = list(part.items())
    if isinstance(part, (list, tuple)):
        for number, item in enumerate(part):
            yield from leaves(item, (*path, number))
    else:
        yield path, part


def test_one_sample_that_is_not_finite_makes_its_own_cells_undefined_and_no_other():
    whole, broken = every_table(), every_table(broken=(3,))
    told = 0
    for name in set(whole) - {"finding", "calibration"}:  # ranks of the others move with it
        ours = dict(leaves(broken[name]))
        for path, value in leaves(whole[name]):
            found = ours[path]
            if found == value or not isinstance(found, dict):
                continue
            told += 1
            assert (found["value"] is None and "not finite" in found["reason"]) or name in ("groups", "mechanisms"), (
                path
            )
    assert told > 20
    cells = broken["change"]["rows"][1]["cells"]
    assert sum(cell["value"] is None for cell in cells) == 3  # all, the difference, and the sample's own bucket
    assert cells[0]["reason"] == "1 of 24 are not finite"
    privacy = {row["label"]: row["cells"] for row in broken["privacy"]["rows"]}
    assert privacy["zlib"] == {row["label"]: row["cells"] for row in whole["privacy"]["rows"]}["zlib"]
    assert sum(cell.get("value") is not None for cell in privacy["loss"]) == 3  # three buckets without it
    assert broken["utility"]["rows"][-1]["cells"][0]["reason"] == "retain/probability: 1 of 24 are not finite"
    final = broken["audit"]["conditions"][0]["final"]
    assert final["forget"]["probability"]["reason"] == "1 of 24 are not finite"
    assert final["forget"]["verbatim"] == whole["audit"]["conditions"][0]["final"]["forget"]["verbatim"]
    assert sum(row["probability"]["value"] is None for row in final["buckets"]) == 1


def test_ties_are_told():
    tied = np.repeat([0.0, 1.0], [10, 2])
    buckets = Buckets.by_rank(tied, 4, "loss")
    run = Run(command="", seed=0, versions={}, model={}, data={}, seconds={})
    scores = DifficultyScores([str(i) for i in range(12)], {"loss": tied, "length": tied})
    made = audit_results({"forget": {"probability": np.arange(12.0)}}, run, scores=scores, buckets=buckets)
    assert "equal scores share a bucket: ties of 'loss' made 2 buckets of 10, 2 samples, not 4 of 3" in made.findings
    table = reliability_by_decile(tied, np.arange(12.0), 0)
    assert "Bins are unequal" in table.note and [row.cells[0] for row in table.rows] == [10, 2]
    assert "unequal" not in reliability_by_decile(np.arange(12.0), np.arange(12.0), 0).note
