"""Commands killed at fixed moments and started again end with the same bits; `benchmarks/kills.py` draws moments."""

import json

import pytest

from benchmarks import kills

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]


def killed(tmp_path, name, shares):
    """Every second kill is of a command that overwrites a run with other settings."""
    kills.make_world(tmp_path)
    case = next(case for case in kills.cases(tmp_path) if (case.name, case.processes) == (name, 1))
    codes, said = kills.start(case.command, tmp_path / "straight", tmp_path, at=0)
    assert codes == [0], said
    case.moments = (tmp_path / "count").stat().st_size
    codes, said = kills.start(case.other, tmp_path / "old", tmp_path)
    assert codes == [0], said
    expected = kills.bits(tmp_path / "straight")
    assert kills.differences(kills.bits(tmp_path / "old"), expected)
    for number, share in enumerate(shares):
        old = tmp_path / "old" if number % 2 else None
        row = kills.one_kill(case, old, expected, tmp_path, max(1, int(share * case.moments)), False)
        assert row["reached"] and row["exit_codes"] == [-9] and not row["differs"], row


def test_a_scoring(tmp_path):
    killed(tmp_path, "score", [0.5, 0.95])  # fewer moments where a folder is there already


def test_a_training_with_its_scores_and_checkpoints(tmp_path):
    killed(tmp_path, "train", [0.3, 0.55, 0.8, 0.97])


def test_the_figures_of_the_benchmark_are_of_kills_that_came():
    found = json.loads((kills.ROOT / "benchmarks" / "results" / "kills.json").read_text())
    assert found["kills"] == found["same"] == len(found["rows"]) >= 30
    assert all(row["reached"] and not row["differs"] for row in found["rows"])
    kinds = {(row["command"], row["processes"], row["overwrite"]) for row in found["rows"]}
    assert {
        (name, n, o) for name, n in (("score", 1), ("score", 2), ("train", 1), ("train", 2)) for o in (True, False)
    } <= kinds
    assert {"evaluate", "study"} <= {row["command"] for row in found["rows"]}
