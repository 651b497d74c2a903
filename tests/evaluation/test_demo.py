"""What the demo says of its runs: by the worst quarter by outcome, seed by seed, and not more than the seeds allow."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from cud_trainer import DifficultyScores
from evaluation import demo, demo_report
from evaluation import statistics as stats
from evaluation.report.schema import Ceiling, DifficultySection, PredictorRow, jsonable
from evaluation.study.engine import Finished
from evaluation.study.grid import plan
from evaluation.study.runs import coordinates, first_seeds

UNIFORM, AWARE = demo_report.SCHEDULES


def finding(uniform, aware):
    worst = {UNIFORM: dict(enumerate(uniform, 1)), AWARE: dict(enumerate(aware, 1))}
    table = demo_report._by_seed("npo", worst, worst)
    return demo_report._schedule_finding("npo", 0.9, worst, worst), jsonable(table)


@pytest.mark.parametrize(
    ("uniform", "aware", "verdict"),
    [
        ([0.50, 0.52], [0.100, 0.105], "less than with uniform"),
        ([0.10, 0.11], [0.50, 0.56], "more than with uniform"),
        ([0.004, 0.937], [0.012, 0.021], "undecided"),  # one seed has won its utility back, one has not
        ([0.242, 0.153], [0.072, 0.150], "undecided"),
        ([0.3, 0.3], [0.3, 0.3], "undecided"),
        ([0.0, 0.3], [0.1, 0.1], "undecided"),  # no ratio to nothing
    ],
)
def test_verdict_needs_seeds_that_agree(uniform, aware, verdict):
    text, table = finding(uniform, aware)
    assert f"over 2 seeds: {verdict}." in text
    for value in (*uniform, *aware):  # every seed is shown
        assert f"{value:.3f}" in text
    assert [row["cells"][0] for row in table["rows"][:-1]] == [*uniform, *aware]


def test_the_interval_is_over_seeds():
    uniform, aware = [0.5, 0.52, 0.6], [0.1, 0.2, 0.15]
    low, high = scipy_stats.ttest_1samp(np.log(np.divide(aware, uniform)), 0).confidence_interval(0.95)
    text, table = finding(uniform, aware)
    assert f"[{100 * np.expm1(low):+.0f}, {100 * np.expm1(high):+.0f}]" in text
    assert table["rows"][-1]["cells"][0] in text


def test_cud_paper_is_called_what_it_is():
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

    def run_study(args, model_args):
        asked.studies.append(args)
        return Finished(Path(args.output_dir), args, [], asked.failed, None, 0.0)

    monkeypatch.setattr("evaluation.study.engine.run_study", run_study)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for objective in demo_report.OBJECTIVES:
        columns = {name: np.arange(3.0) for name in demo.DIFFICULTY_METRICS}
        DifficultyScores(["a", "b", "c"], columns).save(demo._scores_file(tmp_path, objective))
    return asked


def test_the_runs_are_a_study_tuned_on_a_seed_of_its_own(tmp_path, studies):
    args = demo.DemoArguments(output_dir=str(tmp_path), retain_weights=[4.0, 16.0], seed=5, workers=2)
    assert demo._unlearn(args, tmp_path, 120) == []
    (study,) = studies.studies
    cells = plan(study, {})[1]
    assert len(cells) == 2 * 2 * 2 * 3  # objectives, schedules, retain weights, seeds
    tried = first_seeds(cells)
    assert len(tried) == 2 * 2 * 2 and {cell.choices["seed"] for cell in tried} == {5}
    assert {cell.choices["seed"] for cell in cells if cell.settings.get("generate")} == {6}
    assert all(cell.settings["options"]["per_device_train_batch_size"] == 60 for cell in cells)
    assert {coordinates(cell).panel for cell in cells} == set(demo_report.OBJECTIVES)


def test_a_run_that_fails_is_named(tmp_path, studies):
    studies.failed["seed=5"] = "no room"
    with pytest.raises(ValueError, match="run seed=5 failed: no room"):
        demo._unlearn(demo.DemoArguments(output_dir=str(tmp_path)), tmp_path, 120)
