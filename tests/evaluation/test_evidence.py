"""Studies with held-out samples: measured, refused, compared by H@0.1, and the verdict of the rule in the report."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from builders import make_model, make_tokenizer, qa_dataset
from studies import config, results

from cud_trainer.cli import main
from cud_trainer.data import prepare_samples
from cud_trainer.logprobs import answer_probability
from cud_trainer.schedule import parse
from evaluation.decision import RULE
from evaluation.endpoint import Endpoint, endpoint
from evaluation.metrics.memorization import teacher_forced
from evaluation.study.evidence import crossed, decided, evidence
from evaluation.study.options import StudyArguments
from evaluation.study.runs import at_endpoint

ROOT = Path(__file__).parents[2]
TRAIN = {
    "objective": "ga",
    "passes": 1,
    "learning_rate": 0.003,
    "difficulty": "none",
    "group_column": "author",
    "per_device_train_batch_size": 6,
    "bf16": False,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("evidence")
    make_model(0).save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    make_model(1).save_pretrained(root / "reference")
    for name, data, authors in (
        ("forget", qa_dataset(12), "ABCD"),
        ("retain", qa_dataset(8, 100), "EF"),
        ("heldout", qa_dataset(6, 400), "GH"),
        ("of-a-forget-author", qa_dataset(4, 500), "GA"),
        ("of-a-retain-author", qa_dataset(4, 500), "GF"),
        ("without", qa_dataset(4, 500), ""),
        ("retained", qa_dataset(3, 103), "GH"),
    ):
        if authors:
            data = data.add_column("author", [authors[i % len(authors)] for i in range(len(data))])
        data.to_json(root / f"{name}.jsonl")
    return root


def study(world, output, **changes):
    grid = {"schedule": ["uniform", "per_sample_stop"], "seed": [1, 2]}
    return config(
        world, output, grid=grid, train=TRAIN, workers=1, **{"heldout_dataset": str(world / "heldout.jsonl"), **changes}
    )


def test_held_out_samples_are_measured_and_reported(world, tmp_path, cells_in_process):
    output = tmp_path / "out"
    assert main(study(world, output, heldout_samples=4, reference_model=str(world / "reference"))) == 0
    model, tokenizer = make_model(0), make_tokenizer()
    held_out = prepare_samples(qa_dataset(6, 400).select([0, 2, 3, 5]), tokenizer)
    forget = prepare_samples(qa_dataset(12), tokenizer)
    start, strength = answer_probability(model, held_out), teacher_forced(model, forget, tokenizer)
    ends = {}
    asked = json.loads((output / "cells" / "never-seen" / "result.json").read_text())
    never_seen = np.array(asked["forget"])
    np.testing.assert_allclose(never_seen, answer_probability(make_model(1), forget), rtol=1e-5)
    for path in output.glob("cells/schedule=*/result.json"):
        run = json.loads(path.read_text())
        np.testing.assert_allclose(run["held_out"][0], start, rtol=1e-5)
        assert run["extraction"]["mean"][0] == pytest.approx(strength["extraction_strength"].mean())
        assert len(run["held_out"]) == len(run["extraction"]["worst_quarter"]) == len(run["steps"])
        ends[path.parent.name] = endpoint(np.array(run["forget"]), np.array(run["held_out"]), never_seen)
    found = results(output)
    (table,) = [table for table in found["tables"] if table["id"].startswith("endpoint-ga")]
    rows = {row["label"]: row["cells"] for row in table["rows"]}
    for name, end in ends.items():
        parts = dict(part.split("=") for part in name.split(","))
        cells = rows[f"{parts['schedule']}, seed {parts['seed']}"]
        assert cells[0] == (pytest.approx(end.kept) if end.kept is not None else {"value": None, "reason": "never"})
        assert cells[4] == pytest.approx(end.worst_at_kept) and cells[5] == pytest.approx(end.left_at_kept)
    assert found["decision"] == {"rule": RULE, "arms": []}  # no arm has a difficulty
    assert sum("seed by seed" in line for line in found["findings"]) == 2
    before = {path: path.read_bytes() for path in output.glob("cells/*/result.json")}
    assert main(study(world, output, heldout_samples=4, reference_model=str(world / "reference"))) == 0
    assert before == {path: path.read_bytes() for path in before} and results(output) == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heldout_dataset": "of-a-forget-author"}, "held-out group 'A' (author) is in the forget dataset"),
        ({"heldout_dataset": "of-a-retain-author"}, "held-out group 'F' (author) is in the retain dataset"),
        ({"heldout_dataset": "without"}, "held-out dataset has no column 'author'; it has ['answer', "),
        ({"heldout_dataset": "retained"}, "is in the retain dataset: a loss sees it"),
        ({"heldout_dataset": "nowhere"}, "nowhere.jsonl does not exist"),
        ({"heldout_samples": 0}, "heldout_samples must be at least 1, got 0"),
        ({"never_seen": 1.5}, "never_seen must be at least 0 and below 1, got 1.5"),
        ({"never_seen": 0.2, "reference_model": "m"}, "never_seen is what reference_model says: give one of them"),
        ({"heldout_dataset": None, "never_seen": 0.2}, "never_seen needs heldout_dataset"),
        ({"heldout_dataset": None, "tune_on": "endpoint"}, "tune_on 'endpoint' needs heldout_dataset"),
    ],
)
def test_refusals_before_anything_runs(world, tmp_path, capsys, changes, message):
    if changes.get("heldout_dataset"):
        changes = {**changes, "heldout_dataset": str(world / f"{changes['heldout_dataset']}.jsonl")}
    assert main(study(world, tmp_path / "out", **changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_are_chosen_by_the_endpoint_where_there_is_one():
    assert StudyArguments(grid={"seed": [1]}).tune_on == "hardest"
    assert StudyArguments(grid={"seed": [1]}, heldout_dataset="x").tune_on == "endpoint"
    assert StudyArguments(grid={"seed": [1]}, heldout_dataset="x", tune_on="all").tune_on == "all"
    often, seldom = [end(0.5), end(0.5)], [end(0.99), end(None)]
    assert at_endpoint(often) < at_endpoint(seldom) < at_endpoint([end(None), end(None)])
    assert at_endpoint([end(0.9)]) < at_endpoint(often[:1])
    assert at_endpoint([end(0.9)]) == at_endpoint([end(0.9 + 1e-7)])  # rounding has no say


def end(kept, lowest=0.05, left=0.02):
    return Endpoint(None if kept is None else 1, kept, left, 0.1, lowest, left, 1)


def run(seed, kept, schedule="uniform", difficulty="cud"):
    """A finished run as a report reads it, of two snapshots and four held-out samples."""
    held_out = np.array([[0.8, 0.4, 0.8, 0.4], [0.8 * (kept or 0.5)] * 2 + [0.4 * (kept or 0.5)] * 2])
    return SimpleNamespace(
        seed=seed,
        end=end(kept),
        held_out=held_out,
        steps=np.array([0, 5]),
        extraction={"mean": np.array([1.0, 0.2]), "worst_quarter": np.array([1.0, 0.4])},
        options={"difficulty": difficulty, "schedule": schedule},
        reads_difficulty=schedule != "uniform",
        pairs=24,
        calibration_pairs=0,
    )


def arms(cud, random, uniform):
    return {
        "by cud": [run(seed, kept, "upweight_hard") for seed, kept in enumerate(cud)],
        "by random": [run(seed, kept, "upweight_hard", "random") for seed, kept in enumerate(random)],
        "uniform": [run(seed, kept) for seed, kept in enumerate(uniform)],
    }


@pytest.mark.parametrize(
    ("cud", "verdict"),
    [
        ([0.95, 0.96, 0.94, 0.95], "yes"),  # an oracle
        ([0.80, 0.81, 0.79, 0.80], "no"),  # a placebo
        ([0.70, 0.95, 0.72, 0.90], "undecided"),  # a tie
        ([None, None, None, None], "no"),
    ],
)
def test_the_report_states_rule_and_verdict(cud, verdict):
    found = evidence("ga", arms(cud, [0.80, 0.81, 0.80, 0.79], [0.79, 0.80, 0.80, 0.80]), "aabb", None, 0)
    (line,) = [line for line in found.findings if "earn its place? " in line]
    assert f"by cud earn its place? {verdict}" in line and "against by random" in line and "against uniform" in line
    assert decided({"ga": found}).rule == RULE  # the page has it in a fold, the summary below the verdict
    (entry,) = decided({"ga": found}).arms
    assert (entry.arm, entry.verdict, [one.arm for one in entry.against]) == (
        "by cud",
        verdict,
        ["by random", "uniform"],
    )
    for kept in cud:  # seeds are shown one by one
        assert any(("never" if kept is None else f"{kept:.3f}") in line for line in found.findings)


def test_the_crossed_interval_is_that_of_h():
    both = arms([0.9, 0.8], [0.7, 0.7], [0.6, 0.7])
    found = crossed(both["by cud"], both["uniform"], "aabb", 0)
    assert found.value == pytest.approx(np.mean([0.9, 0.8]) - np.mean([0.6, 0.7]))
    assert found.low <= found.value <= found.high
    assert np.isnan(crossed([run(0, None)], both["uniform"], "aabb", 0).value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "uniform"}, None),
        ({"schedule": "per_sample_stop"}, {"target": 0.1}),
        ({"schedule": "odds+per_sample_stop"}, {"per_sample_stop": {"target": 0.1}}),
        (
            {"schedule": "odds+per_sample_stop", "schedule_args": {"odds": {"keep": "pull"}}},
            {"odds": {"keep": "pull"}, "per_sample_stop": {"target": 0.1}},
        ),
        (
            {"schedule": "odds+per_sample_stop", "schedule_args": {"per_sample_stop": {"target": 0.07}}},
            {"per_sample_stop": {"target": 0.07}},
        ),
    ],
)
def test_arms_stop_where_they_did(options, expected, monkeypatch):
    """Where a protocol names no target, at the default of when it was written; the protocol itself stays as it is."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import evidence

    protocol = {"arms": {"a": options}}
    before = json.dumps(protocol)
    arm = evidence.arms_of(protocol, "graddiff-full")["a"]
    assert arm.get("schedule_args") == expected and json.dumps(protocol) == before
    parse(arm["schedule"], arm.get("schedule_args"))


def test_arms_by_cud_read_what_they_did(monkeypatch):
    """Edges among it, which the default left out later."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import evidence

    options = {"schedule": "upweight_hard", "difficulty": "cud"}
    others = {"random": {**options, "difficulty": "random"}, "own": {**options, "difficulty_args": {"variant": "log"}}}
    arms = evidence.arms_of({"arms": {"cud": options, **others}}, "graddiff-full")
    assert arms["cud"]["difficulty_args"] == {"features": ["edges", "hidden", "gradients", "outputs"]}
    assert "difficulty_args" not in arms["random"] and arms["own"]["difficulty_args"] == {"variant": "log"}
