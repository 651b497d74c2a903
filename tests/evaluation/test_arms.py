"""Arms of a study: a placebo, an oracle, equal compute; and grids that grow until the best setting is inside."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from builders import make_model, make_tokenizer, qa_dataset
from studies import config, results

from cud_trainer import DifficultyScores
from cud_trainer.cli import main
from cud_trainer.difficulty import METRICS
from cud_trainer.preserving import PLAIN, PRESERVING
from evaluation.study.extend import corners, grow, is_wanted
from evaluation.study.grid import plan
from evaluation.study.options import StudyArguments
from evaluation.study.runs import coordinates
from evaluation.trajectory import averaged_residual

HARD = "upweight_hard"
ARMS = {
    "uniform": {"schedule": "uniform", "difficulty": "none"},
    "uniform, longer": {"schedule": "uniform", "difficulty": "calibration", "equal_compute": True},
    "calibration": {"schedule": HARD, "difficulty": "calibration"},
    "placebo": {"schedule": HARD, "difficulty": "random"},
    "oracle": {"schedule": HARD, "difficulty": "oracle"},
}
TRAIN = {"objective": "ga", "passes": 2, "learning_rate": 0.003, "per_device_train_batch_size": 6, "bf16": False}
TRAIN |= {"use_cpu": True, "group_column": "author"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("arms")
    make_model(0).save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    for name, data in (("forget", qa_dataset(12)), ("retain", qa_dataset(6, 100)), ("heldout", qa_dataset(4, 400))):
        data.add_column("author", [f"{name} {i % 4}" for i in range(len(data))]).to_json(root / f"{name}.jsonl")
    return root


def test_arms_run_and_are_judged(world, tmp_path, cells_in_process):
    output = tmp_path / "out"
    heldout = {"heldout_dataset": str(world / "heldout.jsonl"), "workers": 1}
    command = config(world, output, grid={"seed": [1, 2]}, arms=ARMS, train=TRAIN, **heldout)
    assert main(command) == 0
    runs = {path.parent.name: json.loads(path.read_text()) for path in output.glob("cells/arm=*/result.json")}
    assert len(runs) == 10
    cells = {path.parent.name: json.loads(path.read_text())["settings"] for path in output.glob("cells/*/cell.json")}

    def scores(name):
        return DifficultyScores.load(output / "cells" / cells[name]["scores_cell"] / "scores.parquet")

    # equal compute: as many pairs more as the calibration of the other arm took
    name = "arm=uniform__longer,seed=1"
    pairs = scores(name).provenance["calibration"]["runs"]["ga"]["pairs"]
    assert scores("arm=calibration,seed=1").columns["calibration"].tolist() == scores(name)["calibration"].tolist()
    assert runs[name]["pairs"] == 24 + 12 * math.ceil(pairs / 12) and runs["arm=uniform,seed=1"]["pairs"] == 24
    assert len(runs[name]["steps"]) > len(runs["arm=uniform,seed=1"]["steps"])
    # the placebo is drawn anew with every seed
    draws = [scores(f"arm=placebo,seed={seed}")["random"] for seed in (1, 2)]
    assert abs(np.corrcoef(*draws)[0, 1]) < 0.9
    # the oracle of a seed is what uniform left with the other
    left = averaged_residual([np.array(values) for values in runs["arm=uniform,seed=2"]["forget"]])[0]
    np.testing.assert_allclose(scores("arm=oracle,seed=1")["oracle"], left)
    found = results(output)
    against = {one["arm"]: [other["arm"] for other in one["against"]] for one in found["decision"]["arms"]}
    assert against == {name: ["placebo", "uniform", "uniform, longer"] for name in ("calibration", "oracle")}
    (table,) = [table for table in found["tables"] if table["id"] == "endpoint-ga"]
    spent = {row["label"]: row["cells"][-2:] for row in table["rows"] if "seed " in row["label"]}
    assert spent["calibration, seed 1"] == [24, pairs] and spent["uniform, longer, seed 1"][1] == 0
    before = {path: path.stat().st_mtime_ns for path in output.glob("cells/*/result.json")}
    assert main(command) == 0  # finished: only reported again
    assert before == {path: path.stat().st_mtime_ns for path in before} and results(output) == found


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"a": {"schedule": "uniform", "colour": 1}}, "arm 'a': 'colour' is no option of an arm"),
        ({"a": {"max_steps": 1}}, "arm 'a': 'max_steps' is set by the study itself"),
        ({"a": {"seed": 1}}, "arm 'a': 'seed' is no option of an arm"),
        ({"a": ["uniform"]}, "arm 'a' must be a mapping of options"),
        (["uniform"], "arms must be a mapping"),
        ({"a": {"difficulty": "oracle"}}, "arm 'a': difficulty 'oracle' needs an arm called 'uniform'"),
        ({"a": {"equal_compute": "yes"}}, "arm 'a': equal_compute must be true or false, got 'yes'"),
    ],
)
def test_arms_that_are_refused(arms, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        StudyArguments(grid={"seed": [1]}, arms=arms)


def test_arms_are_checked_with_the_grid():
    with pytest.raises(ValueError, match="'schedule' is both in grid and in arm 'a'"):
        StudyArguments(grid={"schedule": ["uniform"]}, arms={"a": {"schedule": "uniform"}})
    train = {"bf16": False, "use_cpu": True}
    with pytest.raises(ValueError, match="cell arm=a,seed=1: equal_compute needs the difficulty"):
        plan(
            StudyArguments(grid={"seed": [1]}, arms={"a": {"difficulty": "none", "equal_compute": True}}, train=train),
            {},
        )
    arms = {"uniform": {"schedule": "uniform"}, "a": {"schedule": "odds+per_sample_stop"}}
    for difficulty in ("random", "oracle"):  # which would be compared with itself
        with pytest.raises(
            ValueError, match=f"cell arm=a,seed=1: schedule .* reads no .* with difficulty '{difficulty}'"
        ):
            plan(
                StudyArguments(
                    grid={"seed": [1]}, arms={**arms, "a": {**arms["a"], "difficulty": difficulty}}, train=train
                ),
                {},
            )
    with pytest.raises(ValueError, match="cell seed=1: .*'oracle'"):  # no arm, no oracle
        plan(StudyArguments(grid={"seed": [1]}, train={**train, "difficulty": "oracle"}), {})


def test_random_difficulty_is_of_the_seed_alone():
    def draw(seed):
        return METRICS["random"].compute(SimpleNamespace(seed=seed, forget=range(500)))

    assert (draw(1) == draw(1)).all() and (draw(1) != draw(2)).any()
    assert draw(1).min() >= 0 and draw(1).max() < 1 and draw(1).mean() == pytest.approx(0.5, abs=0.05)


# -- grids that grow ---------------------------------------------------------------------------------------------------


def tried(best, weights, rates=(None,), seeds=(1,)):
    """Runs of a grid in which what is left grows with the distance from the best weight and rate, as ratios."""

    def run(weight, rate, seed):
        left = abs(math.log(weight / best[0])) + (0.0 if rate is None else abs(math.log(rate / best[1])))
        return SimpleNamespace(
            panel="ga",
            schedule="uniform",
            seed=seed,
            tuning=(rate, weight),
            hardest=slice(None),
            at=lambda level: ([left], 1),
        )

    for_all = [run(weight, rate, seed) for weight in weights for rate in rates for seed in seeds]
    for one in for_all:
        left = one.at(0)[0]
        one.at = lambda level, left=left: (np.array(left), 1.0)
    return for_all


def arguments(weights, **options):
    return StudyArguments(grid={"retain_weight": weights, "seed": [1, 2]}, tune_on="all", extensions=3, **options)


@pytest.mark.parametrize(
    ("best", "new"),
    [(4, {}), (1, {"retain_weight": {0.25}}), (0.1, {"retain_weight": {0.25}}), (99, {"retain_weight": {64}})],
)
def test_a_best_weight_at_an_end_asks_for_the_next(best, new):
    weights = [16, 1, 4]  # in any order
    runs = tried((best, None), weights)
    assert corners(runs, arguments(weights)) == new
    grown, wanted = grow(arguments(weights), runs)
    assert grown.grids[0]["retain_weight"] == weights + sorted(new.get("retain_weight", ()))
    assert wanted == ({("ga", "uniform"): new} if new else {})


def test_what_is_not_tuned_does_not_grow():
    assert corners(tried((4, None), [4]), arguments([4])) == {}
    assert corners(tried((4, 1e-3), [1, 4, 16], (1e-4, 1e-3)), arguments([1, 4, 16])) == {"learning_rate": {0.01}}


def test_only_cells_that_a_schedule_asked_for_are_new():
    train = {"objective": "ga", "difficulty": "none", "bf16": False, "use_cpu": True}
    args = StudyArguments(grid={"retain_weight": [1, 4, 16], "schedule": ["uniform", "per_sample_stop"]}, train=train)
    args.grid = [{**args.grids[0], "retain_weight": [1, 4, 16, 64]}]
    cells = plan(args, {})[1]
    new = [cell for cell in cells if is_wanted(cell, {("ga", "uniform"): {"retain_weight": {64}}})]
    assert [(coordinates(cell).schedule, coordinates(cell).tuning) for cell in new] == [("uniform", (None, 64))]


def test_a_study_grows_until_the_best_weight_is_inside(world, tmp_path, cells_in_process):
    """Learning rates: the best is the largest that is still there, at first at the end of the grid."""
    output = tmp_path / "out"
    grid = {"learning_rate": [3e-6, 1e-5], "seed": [1]}
    train = {**TRAIN, "difficulty": "none", "schedule": "uniform", "passes": 1}
    train.pop("learning_rate")
    assert main(config(world, output, grid=grid, train=train, extensions=1, workers=1)) == 0
    rates = {
        json.loads(p.read_text())["settings"]["options"]["learning_rate"] for p in output.glob("cells/*/cell.json")
    }
    assert rates == {3e-6, 1e-5, 3.33333e-5}
    assert any("is still at an end of its grid after 1 extensions" in line for line in results(output)["findings"])


@pytest.mark.parametrize(("objective", "preserve"), [("graddiff", True), ("simnpo", False)])
def test_a_run_says_what_preserve_came_to(objective, preserve):
    """The defaults, too: with SimNPO it is off."""
    train = {"bf16": False, "use_cpu": True, "objective": objective, "difficulty": "none"}
    (cell,) = plan(StudyArguments(grid={"seed": [1]}, train=train), {"model": {}})[1]
    options = cell.settings["options"]
    assert options["preserve"] is preserve
    assert {name: options[name] for name in PRESERVING} == (PRESERVING if preserve else {**PLAIN, "retain_loss": "nll"})
