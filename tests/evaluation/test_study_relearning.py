"""Relearning in a study: intervals over seeds, with the control of each run."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from evaluation.report.schema import jsonable
from evaluation.study.relearning import relearning

TAUGHT, HARDEST = [0, 1], np.array([False, True, False, False, True, True])


def run(seed, gain, unseen=None):
    before = np.linspace(0.1, 0.3, 6)
    again = {"taught": TAUGHT, "before": before.tolist(), "after": (before + gain).tolist()}
    if unseen is not None:
        again["control"] = [[0.2, 0.2, 0.2], [0.2 + unseen] * 3]
    return SimpleNamespace(seed=seed, relearned=again, hardest=HARDEST)


def test_over_seeds():
    gains, unseen, base = [0.1, 0.3, 0.5], [0.1, 0.1, 0.2], [0.3, 0.3, 0.3]
    chosen = {
        "uniform": [run(seed, gain, 0.1) for seed, gain in enumerate(base)],
        "other": [run(seed, *pair) for seed, pair in enumerate(zip(gains, unseen, strict=True))],
    }
    table, attacks, lines = relearning("npo", chosen, 0.95)
    cells = dict(zip(table.columns, jsonable(table)["rows"][1]["cells"], strict=True))
    beyond = np.subtract(gains, unseen)
    expected = stats.t.interval(0.95, 2, beyond.mean(), stats.sem(beyond))
    found = cells["all, change beyond never-seen samples"]
    assert (found["value"], found["low"], found["high"]) == pytest.approx((beyond.mean(), *expected))
    assert cells["all, change against uniform"]["value"] == pytest.approx(beyond.mean() - 0.2)
    assert cells["hardest bucket, before"]["value"] == pytest.approx(np.linspace(0.1, 0.3, 6)[4:].mean())
    assert attacks[1].over == "seeds" and attacks[1].n == 4 and attacks[1].n_control == 3
    assert lines[1].startswith("relearning, npo, other: the 4 forget samples that were not taught change by +0.300")
    assert expected[0] < 0 < expected[1] and lines[1].endswith("not to be told from what never-seen samples gain")
    assert lines[0].endswith("more comes back than never-seen samples gain: part of it was hidden")


def test_without_never_seen_samples_nothing_is_said_of_hiding():
    table, attacks, lines = relearning("npo", {"uniform": [run(0, 0.3), run(1, 0.3)]}, 0.95)
    assert lines[0].endswith("it cannot be told whether that was hidden or is new") and attacks[0].beyond is None
    assert "it cannot be told" in table.note and table.rows[0].cells[3].reason.startswith("needs never-seen samples")
