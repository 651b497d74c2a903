"""`cud study`: cells, what is skipped, killed, failed and refused, and the comparison at matched utility."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from builders import make_model, make_tokenizer, qa_dataset
from studies import config, results
from transformers import TrainerControl

from cud_trainer import DifficultyScores
from cud_trainer.cli import main
from cud_trainer.data import prepare_samples
from cud_trainer.logprobs import answer_probability
from evaluation.endpoint import worst_quarter
from evaluation.statistics import Interval
from evaluation.study import cell as study_cell
from evaluation.study import runs as study_runs
from evaluation.study.engine import remove_others
from evaluation.study.grid import plan
from evaluation.study.options import StudyArguments
from evaluation.study.report import verdict
from evaluation.study.runs import coordinates, finished_cells, first_seeds, reported
from evaluation.trajectory import at_position, matched_position

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    make_model(0).save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    forget = qa_dataset(12)
    forget.add_column("author", [f"author {i % 4}" for i in range(12)]).to_json(root / "forget.jsonl")
    qa_dataset(8, 100).to_json(root / "retain.jsonl")
    return root


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "out"
    assert main(config(world, output)) == 0
    return output


def test_every_cell_ran_and_is_compared(finished):
    cells = sorted(path.name for path in (finished / "cells").iterdir())
    assert len(cells) == 5 and sum(name.startswith("scores-") for name in cells) == 1
    found = results(finished)
    (entry,) = found["matched"]
    assert [row["schedule"] for row in entry["rows"]] == ["uniform", "upweight_hard"]
    assert any("upweight_hard, change against uniform at matched retain utility" in line for line in found["findings"])
    assert any(table["id"].startswith("groups") for table in found["tables"])
    assert found["difficulty"]["objectives"][0]["ceiling"]["n_seeds"] == 2
    for path in (p for p in finished.rglob("*") if p.is_file()):
        assert b"Who is" not in path.read_bytes(), path


def test_comparison_by_hand(finished):
    """From the cells' own files: samples where a run has forgotten most at 95% of the starting retain probability."""
    level, hardest = {}, None
    for path in (finished / "cells").glob("schedule=*"):
        run = json.loads((path / "result.json").read_text())
        forget, retain = np.array(run["forget"]), np.array(run["retain"])
        position = matched_position(retain, forget.mean(1), 0.95 * retain[0])
        schedule = re.search(r"schedule=(\w+)", path.name)[1]
        level.setdefault(schedule, []).append(at_position(forget, position))
        assert run["steps"] == [0, 1, 2, 3, 4]
    scores = pd.read_parquet(next((finished / "cells").glob("scores-*/scores.parquet")))
    order = np.argsort(scores["loss"].to_numpy(), kind="stable")
    hardest = np.isin(np.arange(12), order[-3:])
    means = {name: np.mean(values, axis=0) for name, values in level.items()}
    found = results(finished)
    for row in found["matched"][0]["rows"]:
        assert row["forget"]["value"] == pytest.approx(means[row["schedule"]].mean())
        assert row["hardest_bucket"]["value"] == pytest.approx(means[row["schedule"]][hardest].mean())
        assert row["worst_quarter"] == pytest.approx(np.mean([worst_quarter(v) for v in level[row["schedule"]]]))
    (table,) = [table for table in found["tables"] if table["id"].startswith("differences")]
    difference = (means["upweight_hard"] - means["uniform"])[hardest].mean()
    assert table["rows"][0]["cells"][0]["value"] == pytest.approx(difference)


@pytest.fixture(scope="module")
def tuned(world, tmp_path_factory):
    """Two schedules, each with two learning rates on two seeds; scores made before, utility of a set of its own."""
    root = tmp_path_factory.mktemp("tuned")
    names = prepare_samples(qa_dataset(12), make_tokenizer())["sample_id"]
    columns = {"cud": np.arange(12.0), "loss": -np.arange(12.0), "length": np.ones(12) + np.arange(12) % 3}
    DifficultyScores(list(names), columns).save(root / "scores.parquet")
    qa_dataset(5, 300).to_json(root / "utility.jsonl")
    qa_dataset(7, 400).to_json(root / "holdout.jsonl")
    common = {"difficulty_scores": [str(root / "scores.parquet")], "learning_rate": [0.0003, 0.003], "seed": [1, 2]}
    grid = [
        {**common, "schedule": ["uniform"], "difficulty": ["cud"]},
        {**common, "schedule": ["upweight_hard"], "difficulty": ["cud", "loss"]},
    ]
    train = {"objective": "ga", "passes": 2, "per_device_train_batch_size": 6, "bf16": False, "use_cpu": True}
    settings = config(
        world,
        root / "out",
        grid=grid,
        train=train,
        utility_dataset=str(root / "utility.jsonl"),
        retain_level=[0.95, 0.5],
        relearn_samples=4,
        relearn_steps=2,
        relearn_rate=0.003,
        holdout_dataset=str(root / "holdout.jsonl"),
        generate_seeds=[2],
    )
    assert main(settings) == 0
    return root / "out"


def test_the_verdict_is_on_top(tuned):
    """Of each arm that is reported, against the never-seen samples of its own runs."""
    found = results(tuned)["verdicts"]
    assert [row["arm"] for row in found["arms"]] == ["uniform", "upweight_hard by cud", "upweight_hard by loss"]
    unseen = [json.loads(path.read_text()).get("holdout") for path in tuned.glob("cells/*/result.json")]
    assert {len(values) for values in unseen if values} == {7}
    assert found["state"] == "cannot be said"  # with 7 samples to compare with
    assert all("relearning" in row["how"] for row in found["hidden"])


def test_only_what_is_reported_is_run(tuned):
    cells = [json.loads(path.read_text()) for path in tuned.glob("cells/*/cell.json")]
    rates = {schedule: {} for schedule in ("uniform cud", "upweight_hard cud", "upweight_hard loss")}
    for cell in cells:
        choices = cell["choices"]
        rates[f"{choices['schedule']} {choices['difficulty']}"].setdefault(choices["seed"], set()).add(
            choices["learning_rate"]
        )
    found = results(tuned)
    for name, seeds in rates.items():
        label = "uniform" if name == "uniform cud" else name.replace(" ", " by ")
        best = {row["learning_rate"] for entry in found["matched"] for row in entry["rows"] if row["schedule"] == label}
        assert seeds == {1: {0.0003, 0.003}, 2: best}, name


def test_a_schedule_whose_trials_failed_is_left_out(tuned):
    cells = finished_cells(tuned)
    cells.sort(key=lambda cell: cell.settings["options"]["seed"])
    tried = first_seeds(cells)
    assert len(tried) == 6 and {cell.settings["options"]["seed"] for cell in tried} == {1}
    assert {cell.name for cell in first_seeds(cells, 2)} == {cell.name for cell in cells}
    uniform = [cell for cell in tried if cell.choices["schedule"] == "uniform"]
    kept = reported(tuned, cells, uniform, [0.95, 0.5], 4)
    assert {cell.choices["schedule"] for cell in kept} == {"uniform"} and len(kept) > len(uniform)
    assert reported(tuned, cells, [], [0.95], 4) == []


@dataclass(frozen=True)
class Outcome:
    """What is left after a made-up run, of two samples of which the second is the hardest."""

    tuning: str
    seed: int
    left: float
    easy: float = 0.0
    hardest = np.array([False, True])

    def at(self, level):
        return np.array([self.easy, self.left]), 1.0


@pytest.mark.parametrize(("tuning_seeds", "best", "reported_on"), [(1, "lucky once", [2, 3]), (2, "steady", [3])])
def test_settings_are_chosen_on_the_first_seeds_and_reported_on_the_others(tuning_seeds, best, reported_on):
    runs = [Outcome("lucky once", seed, left) for seed, left in ((1, 0.1), (2, 0.9), (3, 0.9))]
    runs += [Outcome("steady", seed, 0.3) for seed in (1, 2, 3)]
    kept = study_runs.tuned(runs, 0.95, tuning_seeds)
    assert {run.tuning for run in kept} == {best} and [run.seed for run in kept] == reported_on


@pytest.mark.parametrize(("tune_on", "best"), [("hardest", "of the hardest"), ("all", "of all")])
def test_settings_are_chosen_by_what_is_left_of(tune_on, best):
    runs = [Outcome("of the hardest", seed, 0.1, easy=0.9) for seed in (1, 2)]
    runs += [Outcome("of all", seed, 0.3, easy=0.1) for seed in (1, 2)]
    kept = study_runs.tuned(runs, 0.95, tune_on=tune_on)
    assert [(run.tuning, run.seed) for run in kept] == [(best, 2)]


@pytest.mark.parametrize(("share", "ends"), [(0.0, False), (0.4, False), (0.6, True)])
def test_a_run_ends_when_little_is_left(share, ends):
    tradeoff = SimpleNamespace(path=SimpleNamespace(forget=[np.array([1.0, 0.8]), np.array([0.6, 0.3])]))
    control = TrainerControl()
    study_cell._End(tradeoff, share).on_step_end(None, None, control)
    assert control.should_training_stop == ends


@pytest.mark.parametrize(("worst", "ends"), [(0.0, False), (0.59, False), (0.6, True)])
def test_a_run_ends_when_its_worst_quarter_is_forgotten(worst, ends):
    path = SimpleNamespace(forget=[np.full(8, 0.9), np.array([0.0, 0.1, 0.7, 0.0, 0.2, 0.5, 0.1, 0.0])])
    control = TrainerControl()
    study_cell._End(SimpleNamespace(path=path), 0.0, worst).on_step_end(None, None, control)
    assert control.should_training_stop == ends


def test_what_is_asked_for_is_in_the_settings_and_what_is_not_is_not():
    def settings(**options):
        train = {"difficulty": "none", "bf16": False, "use_cpu": True}
        return [c.settings for c in plan(StudyArguments(grid={"seed": [1, 2]}, train=train, **options), {})[1]]

    assert all(set(one) & {"generate", "end_below", "end_worst_quarter", "relearn"} == set() for one in settings())
    first, second = settings(generate_seeds=[2], end_below=0.1)
    assert "generate" not in first and second["generate"] and first["end_below"] == second["end_below"] == 0.1


def test_answers_are_generated_with_the_seeds_that_say_so(tuned):
    finals = {path.parent.name: json.loads(path.read_text())["final"] for path in tuned.glob("cells/*/result.json")}
    assert {"seed=1", "seed=2"} == {re.search(r"seed=\d", name)[0] for name in finals}
    for name, final in finals.items():
        assert set(final) == {"forget", "retain"}
        assert ("rouge_l_recall" in final["forget"]) == ("seed=2" in name), name
    assert all("rouge_l_recall" in condition["final"]["forget"] for condition in results(tuned)["conditions"])


def test_levels_utility_and_relearning(tuned):
    found = results(tuned)
    assert [entry["objective"] for entry in found["matched"]] == ["ga", "ga"]
    (path, *_) = tuned.glob("cells/*schedule=uniform*seed=2*/result.json")
    run = json.loads(path.read_text())
    model, tokenizer = make_model(0), make_tokenizer()
    utility = prepare_samples(qa_dataset(5, 300), tokenizer)
    start = answer_probability(model, utility).mean()
    assert run["retain"][0] == pytest.approx(start, rel=1e-5)
    levels = [entry["retain_level"] for entry in found["matched"]]
    assert levels == pytest.approx([0.95 * start, 0.5 * start], rel=1e-5)
    again = run["relearned"]
    kept = [i for i, value in enumerate(run["retain"]) if value >= 0.95 * run["retain"][0]]
    best = min(kept, key=lambda i: np.mean(run["forget"][i]))
    assert again["step"] == run["steps"][best] and len(again["taught"]) == 4
    assert again["before"] == pytest.approx(run["forget"][best], rel=1e-4)  # the weights of that snapshot
    assert np.mean([again["after"][i] - again["before"][i] for i in again["taught"]]) > 0
    (table,) = [table for table in found["tables"] if table["id"].startswith("relearning")]
    assert [row["label"] for row in table["rows"]] == ["uniform", "upweight_hard by cud", "upweight_hard by loss"]
    cells = dict(zip(table["columns"], table["rows"][0]["cells"], strict=True))
    rest = np.setdiff1d(np.arange(12), again["taught"])
    gain = np.mean(np.array(again["after"])[rest]) - np.mean(np.array(again["before"])[rest])
    unseen = np.mean(again["control"][1]) - np.mean(again["control"][0])
    assert len(again["control"][0]) == 7 and cells["all, change"] == pytest.approx(gain)  # one seed: no interval
    assert cells["all, change beyond never-seen samples"] == pytest.approx(gain - unseen)
    (line,) = [line for line in found["findings"] if line.startswith("relearning, ga, uniform: ")]
    assert "too little to tell" in line and found["attacks"][0]["beyond"]["value"] == pytest.approx(gain - unseen)
    first = {row["schedule"]: row for row in found["matched"][0]["rows"]}
    at = study_runs.Run(tuned, next(c for c in finished_cells(tuned) if path.parent.name == c.name), 4)
    assert first["uniform"]["extraction"]["value"] == pytest.approx(at.extraction_at(0.95).mean())
    assert at.extraction["mean"] == pytest.approx(at.strengths.mean(1)) and at.strengths.shape == at.forget.shape
    (table,) = [table for table in found["tables"] if table["id"].startswith("differences")]
    assert len(table["rows"]) == 4  # two schedules at two levels


@pytest.mark.parametrize(
    ("hardest", "everything", "expected"),
    [
        ((-0.2, -0.1), (-0.1, 0.1), "less of the hardest bucket is left than with uniform"),
        ((-0.2, -0.1), (0.1, 0.2), "less of the hardest bucket is left than with uniform, but more of the whole"),
        ((-0.2, 0.1), (-0.2, -0.1), "no gain"),
        ((0.1, 0.2), (-0.2, -0.1), "more of the hardest bucket is left"),
        ((np.nan, np.nan), (np.nan, np.nan), "no gain"),
    ],
)
def test_verdict(hardest, everything, expected):
    found = verdict(*(Interval(sum(ends) / 2, *ends) for ends in (hardest, everything)))
    assert found.startswith(expected)
    assert ("whole forget set" in found) == ("whole" in expected)


def test_scores_without_the_metric_are_refused(world, tuned, tmp_path, capsys):
    scores = str(tuned.parent / "scores.parquet")
    train = {"objective": "ga", "difficulty": "circuit_mass", "bf16": False, "use_cpu": True}
    grid = {"difficulty_scores": [scores], "seed": [1]}
    assert main(config(world, tmp_path / "out", grid=grid, train=train)) == 2
    assert "has no metric 'circuit_mass'; it has ['cud', 'loss', 'length']" in capsys.readouterr().err


def test_a_finished_study_is_only_reported_again(world, finished, monkeypatch):
    before = results(finished)
    monkeypatch.setattr("evaluation.study.pool.Worker.run", lambda *a: pytest.fail("a cell ran again"))
    assert main(config(world, finished)) == 0
    assert results(finished) == before


def test_a_failing_cell_is_listed_and_stops_nothing(world, tmp_path, capsys):
    output = tmp_path / "out"
    grid = {"objective_args": [{"layer": 0}, {"layer": 7}], "schedule": ["uniform"]}
    train = {
        "objective": "rmu",
        "passes": 1,
        "difficulty": "none",
        "per_device_train_batch_size": 6,
        "bf16": False,
        "use_cpu": True,
    }
    assert main(config(world, output, grid=grid, train=train)) == 1
    found = results(output)
    (table,) = [table for table in found["tables"] if table["id"] == "failed"]
    assert len(table["rows"]) == 1 and "must be from 0 to 1 for this model" in table["rows"][0]["cells"][0]
    assert len(found["matched"]) == 1 and "1 cells failed" in " ".join(found["findings"])
    assert "failed: " in capsys.readouterr().err


def test_other_settings_are_refused_unless_they_may_replace(world, finished, capsys):
    changed = yaml.safe_load(Path(f"{finished}.yaml").read_text())["train"] | {"passes": 3}
    before = (finished / "results.json").read_bytes()
    assert main(config(world, finished, train=changed)) == 2
    assert "was run with other settings (options.passes)" in capsys.readouterr().err
    assert (finished / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {}}, "grid is empty"),
        ({"grid": {"schedule": "uniform"}}, "schedule needs a list of values"),
        ({"grid": {"schedule": ["uniform", "uniform"]}}, "schedule has a value twice"),
        ({"grid": {"sheduler": ["a"]}}, "'sheduler' is no option of `cud train`"),
        ({"grid": {"output_dir": ["a"]}}, "'output_dir' is set by the study itself"),
        ({"grid": {"passes": [1]}}, "'passes' is both in grid and in train"),
        ({"grid": {"schedule": ["magic"]}}, "unknown schedule 'magic'"),
        ({"grid": {"seed": [1]}, "workers": 0}, "workers must be at least 1"),
        ({"grid": {"seed": [1]}, "retain_level": 1.5}, "retain_level must be between 0 and 1"),
        ({"grid": {"seed": [1]}, "train": {"group_column": "x"}}, "forget dataset has no column 'x'"),
        ({"grid": {"seed": [1]}, "retain_level": []}, "retain_level must be between 0 and 1"),
        ({"grid": [{"seed": [1]}, {"seed": [1, 2]}]}, "two mappings of grid have a combination in common"),
        ({"grid": [{"seed": [1]}, {}]}, "grid is empty"),
        ({"grid": {"seed": [1]}, "relearn_samples": -1}, "relearn_samples must be at least 0"),
        ({"grid": {"seed": [1]}, "tuning_seeds": 0}, "tuning_seeds must be at least 1"),
        (
            {"grid": {"seed": [1]}, "tune_on": "worst"},
            "tune_on must be one of ['hardest', 'all', 'endpoint'], got 'worst'",
        ),
        ({"grid": {"seed": [1]}, "end_below": 1.0}, "end_below must be below 1, got 1.0"),
        ({"grid": {"seed": [1, 2], "retain_weight": [1, 4]}, "tuning_seeds": 2}, "leaves no seed to report on: 2 in"),
        ({"grid": {"seed": [1]}, "utility_dataset": "nowhere.jsonl"}, "utility dataset nowhere.jsonl does not exist"),
        ({"grid": {"difficulty_scores": ["no.parquet"]}}, "cannot read difficulty scores from no.parquet"),
    ],
)
def test_refusals_before_anything_runs(world, tmp_path, capsys, changes, message):
    assert main(config(world, tmp_path / "out", **changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_refused(world, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert main(config(world, tmp_path / "out")) == 2
    assert "is not empty and holds no study" in capsys.readouterr().err


def test_recipe_is_a_study():
    recipe = yaml.safe_load((ROOT / "recipes" / "study.yaml").read_text())
    known = StudyArguments.__dataclass_fields__
    assert set(recipe) <= set(known)
    train = {**recipe["train"], "bf16": False, "use_cpu": True}
    scores, runs = plan(StudyArguments(grid=recipe["grid"], train=train), {})
    assert (len(scores), len(runs)) == (6, 54)


def test_cells_name_the_default_schedule():
    """The default of another version may be another: what was run then is not taken for it, nor called `uniform`."""
    grid = {"learning_rate": [1e-4, 1e-3]}
    train = {"difficulty": "loss", "bf16": False, "use_cpu": True}
    cells = plan(StudyArguments(grid=grid, train=train), {})[1]
    assert {coordinates(cell).schedule for cell in cells} == {"odds+per_sample_stop"}
    named = plan(StudyArguments(grid=grid, train={**train, "schedule": "odds+per_sample_stop"}), {})[1]
    assert [cell.fingerprint for cell in cells] == [cell.fingerprint for cell in named]


def test_long_names_are_cut_and_stay_apart():
    grid = {
        "schedule": ["upweight_hard+odds+per_sample_stop"],
        **{name: [0.5] for name in ("learning_rate", "retain_weight", "weight_decay", "calibration_share", "l2_sp")},
        **{name: [1] for name in ("passes", "per_device_train_batch_size", "gradient_accumulation_steps", "seed")},
        "max_grad_norm": [1.0, 2.0, 3.0],
        "refusals": [[f"{'é' * 300}"], [f"{'é' * 300}."]],
    }
    train = {"objective": "idk_nll", "bf16": False, "use_cpu": True}
    names = [cell.name for cell in plan(StudyArguments(grid=grid, train=train), {})[1]]
    assert len(set(names)) == 6 and all(150 < len(name.encode()) <= 200 for name in names)
    short = StudyArguments(grid={"schedule": ["uniform"], "seed": [1]}, train=train)
    assert [cell.name for cell in plan(short, {})[1]] == ["schedule=uniform,seed=1"]


def test_cells_of_another_study_go_with_it(tmp_path, caplog):
    for name in ("schedule=uniform,seed=1", "schedule=uniform,seed=2", "scores-00000000"):
        (tmp_path / "cells" / name).mkdir(parents=True)
        (tmp_path / "cells" / name / "cell.json").write_text("{}")
    args = StudyArguments(grid={"schedule": ["uniform"], "seed": [1]}, train={"bf16": False, "use_cpu": True})
    remove_others(tmp_path, plan(args, {})[1])
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["schedule=uniform,seed=1"]
    assert "removed 2 cells of the study that was overwritten: schedule=uniform,seed=2, scores-00000000" in caplog.text
    remove_others(tmp_path, plan(args, {})[1])
    assert len(caplog.records) == 1


def test_scores_are_shared_by_what_they_do_not_depend_on():
    args = StudyArguments(
        grid={"schedule": ["uniform", "inverse_mass"], "seed": [1, 2, 3], "retain_weight": [1.0, 2.0]},
        train={"objective": "npo", "bf16": False, "use_cpu": True},
    )
    scores, runs = plan(args, {"model": {"model_name_or_path": "m"}})
    assert len(runs) == 12 and len(scores) == 2  # calibration depends on the retain weight
    assert all(cell.settings["metrics"] == ["cud", "circuit_mass", "loss", "length"] for cell in scores)
    assert len({cell.fingerprint for cell in [*scores, *runs]}) == 14
    again = plan(args, {"model": {"model_name_or_path": "other"}})[1]
    assert all(a.name == b.name and a.fingerprint != b.fingerprint for a, b in zip(runs, again, strict=True))
