"""What the demo says of its runs: by the worst quarter by outcome, seed by seed, and not more than the seeds allow."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from cud_trainer import CUDConfig, DifficultyScores
from cud_trainer.preserving import PRESERVING
from evaluation import demo, demo_report
from evaluation import statistics as stats
from evaluation.endpoint import Endpoint
from evaluation.report.schema import Ceiling, DifficultySection, PredictorRow, jsonable
from evaluation.study.engine import Finished
from evaluation.study.grid import plan
from evaluation.study.runs import coordinates

UNIFORM, DEFAULT, AWARE, PLACEBO = demo_report.SCHEDULES


def finding(uniform, aware):
    worst = {UNIFORM: dict(enumerate(uniform, 1)), DEFAULT: dict(enumerate(aware, 1))}
    table = demo_report._by_seed("npo", worst, worst, worst)
    return demo_report._schedule_finding("npo", 0.9, worst, worst, worst), jsonable(table)


def test_every_seed_is_shown():
    uniform, aware = [0.242, 0.153], [0.072, 0.150]
    text, table = finding(uniform, aware)
    assert "over 2 seeds" in text
    for value in (*uniform, *aware):
        assert f"{value:.3f}" in text
    assert [row["cells"][0] for row in table["rows"][:-1]] == [*uniform, *aware]


@pytest.mark.parametrize(
    ("uniform", "aware", "placebo", "verdict"),
    [
        ([0.50, 0.52], [0.95, 0.97], [0.70, 0.71], "yes"),
        ([0.50, 0.52], [0.95, 0.97], [0.95, 0.97], "no"),
        ([0.50, 0.70], [0.95, 0.90], [0.70, 0.93], "undecided"),
        ([0.50, None], [0.95, 0.90], [0.70, 0.93], "undecided"),
        ([0.50, 0.52], [0.90, 0.90 + 1e-9], [0.90, 0.90], "no"),
    ],
)
def test_the_verdict_is_that_of_the_rule(uniform, aware, placebo, verdict):
    """On what no loss sees, by the function that studies use; seeds that disagree are undecided."""

    def runs(arm, kept):
        return [
            SimpleNamespace(
                seed=seed,
                end=Endpoint(None if value is None else 1, value, 0.02, 0.1, 0.05, 0.02, 1),
                held_out=np.array([[0.8, 0.8], [0.8 * (value or 0.1)] * 2]),
                steps=np.array([0, 5]),
                extraction={"mean": np.ones(2), "worst_quarter": np.ones(2)},
                options=demo_report.arms("npo")[arm],
                reads_difficulty=arm not in (UNIFORM, DEFAULT),
                pairs=24,
                calibration_pairs=0,
            )
            for seed, value in enumerate(kept)
        ]

    kept = (uniform, uniform, aware, placebo)
    chosen = {arm: runs(arm, values) for arm, values in zip(demo_report.SCHEDULES, kept, strict=True)}
    (decision,) = demo_report.decided({"npo": demo_report.evidence("npo", chosen, "ab", None, 0)}).arms
    assert (decision.arm, decision.verdict) == (AWARE, verdict)
    assert [one.arm for one in decision.against] == [PLACEBO, UNIFORM, DEFAULT]


def test_the_interval_is_over_seeds():
    uniform, aware = [0.5, 0.52, 0.6], [0.1, 0.2, 0.15]
    low, high = scipy_stats.ttest_1samp(np.log(np.divide(aware, uniform)), 0).confidence_interval(0.95)
    text, table = finding(uniform, aware)
    assert f"[{100 * np.expm1(low):+.0f}, {100 * np.expm1(high):+.0f}]" in text
    assert table["rows"][-1]["cells"][0] in text


def test_cud_top_k_is_called_what_it_is():
    half = stats.Interval(0.5, 0.4, 0.6)
    figures = {"kind": "circuit", "spearman": half, "partial": half, "auroc": half}
    rows = [PredictorRow(metric=name, label=name, **figures) for name in demo.DIFFICULTY_METRICS]
    ceiling = Ceiling(agreement=stats.Interval(0.97, 0.9, 0.99), attainable=0.98, n_seeds=2)
    section = DifficultySection(objective="npo", n=9, target="", rows=rows, ceiling=ceiling)
    text = demo_report._difficulty_finding("npo", section, stats.Interval(0.1, 0.01, 0.2))
    assert "not as published" in text and "better" not in text


@pytest.fixture
def studies(tmp_path, monkeypatch):
    """Studies that the demo would run; `failed` says which of their cells fail."""
    asked = SimpleNamespace(studies=[], failed={})

    def run_study(args, model_args, pool):
        asked.studies.append(args)
        return Finished(Path(args.output_dir), args, [], asked.failed, None, 0.0)

    monkeypatch.setattr("evaluation.study.engine.run_study", run_study)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for objective in demo_report.OBJECTIVES:
        columns = {name: np.arange(3.0) for name in demo.DIFFICULTY_METRICS}
        DifficultyScores(["a", "b", "c"], columns).save(demo._scores_file(tmp_path, objective))
    return asked


def test_the_runs_are_a_study_of_each_objective(tmp_path, studies):
    """What is published, the default as it is where nothing is named, and the default with hard samples weighted up."""
    args = demo.DemoArguments(output_dir=str(tmp_path), seed=5, workers=2)
    assert list(demo._unlearn(args, tmp_path, 120)) == ["graddiff", "npo"]
    for study, objective in zip(studies.studies, demo_report.OBJECTIVES, strict=True):
        cells = plan(study, {})[1]
        assert len(cells) == 4 * 3  # arms, seeds
        assert {coordinates(cell).panel for cell in cells} == {objective}
        assert {cell.choices["seed"] for cell in cells} == {5, 6, 7}
        assert {cell.choices["seed"] for cell in cells if cell.settings.get("generate")} == {5}
        assert all(cell.settings["options"]["per_device_train_batch_size"] == 60 for cell in cells)
        by_arm = {cell.choices["arm"]: cell.settings["options"] for cell in cells}
        named = CUDConfig("unused", objective=objective, difficulty="none", report_to="none")
        for name in ("schedule", "schedule_args", "preserve", *PRESERVING):
            assert by_arm[DEFAULT][name] == getattr(named, name)
        assert not by_arm[UNIFORM]["preserve"] and by_arm[UNIFORM]["schedule"] == "uniform"
        for arm in (AWARE, PLACEBO):
            differing = {name for name in by_arm[arm] if by_arm[arm][name] != by_arm[DEFAULT].get(name)}
            assert differing - {"difficulty"} == {"schedule"}
            assert by_arm[arm]["schedule"] == f"upweight_hard+{named.schedule}"


def test_weights_of_uniform_are_those_that_did_best_in_development():
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "evidence-development.json"
    found = json.loads(path.read_text())["conditions"]
    for objective, weight in demo_report.UNIFORM_WEIGHTS.items():
        assert found[f"{objective}-full"]["weights"]["uniform"] == weight


def test_a_run_that_fails_is_named(tmp_path, studies):
    studies.failed["seed=5"] = "no room"
    with pytest.raises(ValueError, match="run seed=5 of graddiff failed: no room"):
        demo._unlearn(demo.DemoArguments(output_dir=str(tmp_path)), tmp_path, 120)
