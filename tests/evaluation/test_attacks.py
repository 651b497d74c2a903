"""What comes back is what forget samples gain beyond never-seen ones, and nothing is said without these."""

import numpy as np
import pytest

from evaluation.metrics.robustness import Relearned
from evaluation.report.attacks import BEYOND, Groups, quantisation, relearning
from evaluation.report.schema import jsonable
from evaluation.statistics import difference_of_means

NOISE = np.random.default_rng(0).normal(0, 0.01, (2, 40))
TAUGHT = np.arange(40) < 5


def after_relearning(gain, control=None, groups=None):
    by_step = {0: np.full(40, 0.2), 10: 0.2 + gain + NOISE[0]}
    unseen = None if control is None else {0: np.full(40, 0.3), 10: 0.3 + control + NOISE[1]}
    return relearning(Relearned(by_step, unseen), TAUGHT, None, groups or Groups(), 0)


@pytest.mark.parametrize(
    ("gain", "control", "words"),
    [
        (0.2, 0.2, "not to be told from what never-seen samples gain"),  # the false accusation
        (0.2, 0.05, "more comes back than never-seen samples gain: part of it was hidden"),
        (0.05, 0.2, "less comes back than never-seen samples gain"),
        (0.2, None, "it cannot be told whether that was hidden or is new"),
        (-0.001, None, ": no rise"),
    ],
)
def test_the_line_on_relearning(gain, control, words):
    table, rows, (line,) = after_relearning(gain, control)
    assert line.endswith(words) and line.startswith("relearning, 10 steps: the 35 forget samples that were not taught")
    row, cells = jsonable(rows[-1]), dict(zip(table.columns, table.rows[1].cells, strict=True))
    assert row["n"] == 35 and row["change"]["value"] == pytest.approx(gain + NOISE[0][5:].mean())
    if control is None:
        assert "beyond" not in row and "holdout_dataset" in cells[BEYOND].reason
        assert "hidden" not in line.replace("cannot be told whether that was hidden", "")
        return
    expected = gain + NOISE[0][5:].mean() - control - NOISE[1].mean()
    assert row["beyond"]["value"] == pytest.approx(expected) == pytest.approx(cells[BEYOND].value)
    assert row["beyond"]["low"] < expected < row["beyond"]["high"]


def test_the_line_on_quantisation():
    base, rounded = np.full(40, 0.1), 0.1 + NOISE[0]
    forget = {"as it is": base, "8 bits": rounded, "4 bits": rounded + 0.3}
    control = {"as it is": base, "8 bits": rounded, "4 bits": rounded}
    table, rows, lines = quantisation(forget, control, "as it is", None, Groups(), 0)
    assert [row.condition for row in rows] == ["8 bits", "4 bits"] and rows[1].beyond.value == pytest.approx(0.3)
    assert "not to be told from what never-seen samples gain" in lines[0] and "part of it was hidden" in lines[1]
    alone = quantisation(forget, None, "as it is", None, Groups(), 0)[2]
    assert alone[0].endswith(": no rise") and "cannot be told" in alone[1]
    assert "hidden" not in table.note


def test_intervals_over_groups_where_samples_hang_together():
    """Four authors that differ: their ten samples each say no more than one."""
    shift = np.repeat([0.0, 0.1, 0.2, 0.3], 10)
    groups = Groups(np.repeat(list("abcd"), 10).tolist(), np.repeat(list("wxyz"), 10).tolist())
    apart = [after_relearning(shift, shift, of)[1][0] for of in (None, groups)]
    widths = [row.beyond.high - row.beyond.low for row in apart]
    assert widths[1] > 2 * widths[0] and [row.over for row in apart] == ["samples", "groups"]
    assert apart[0].beyond.value == apart[1].beyond.value


def test_difference_over_groups_by_hand():
    a, names = np.array([1.0, 1, 5, 5, 5]), ["p", "p", "q", "q", "q"]
    found = difference_of_means(a, np.zeros(3), groups=(names, None), seed=0)
    assert found.value == pytest.approx(3.4) and (found.low, found.high) == (1.0, 5.0)  # p twice, q twice
    order = [3, 0, 4, 1, 2]
    moved = difference_of_means(a[order], np.zeros(3), groups=([names[i] for i in order], None), seed=0)
    assert moved == found
    one = difference_of_means(a, a, groups=(["p"] * 5, None), seed=0)
    assert one.value == 0 and np.isnan(one.low)
