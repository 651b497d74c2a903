"""Nothing that is ranked depends on the order of the samples: what is equal is treated alike."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cud_trainer.data.groups import group_labels
from cud_trainer.data.ranks import bucket_numbers, ends
from cud_trainer.difficulty import make_folds
from cud_trainer.schedule.dynamic import RunState, self_paced
from cud_trainer.schedule.orders import OnePass, baby_steps, interleaved, two_stage

some_ties = st.lists(st.integers(0, 4), min_size=2, max_size=25).filter(lambda values: len(set(values)) > 1)


def permuted(values, seed=1):
    order = np.random.default_rng(seed).permutation(len(values))
    return order, values[order]


@settings(deadline=None, max_examples=60)
@given(some_ties, st.integers(1, 6))
def test_ranks(values, count):
    values = np.array(values, dtype=float)
    order, moved = permuted(values)
    number = bucket_numbers(values, count)
    np.testing.assert_array_equal(bucket_numbers(moved, count), number[order])
    for value in set(values):
        assert len(set(number[values == value])) == 1
    count = min(count, len(values) // 2)
    for side, again in zip(ends(values, count), ends(moved, count), strict=True):
        assert set(order[again]) == set(side) and not set(values[side]) & set(np.delete(values, side))


def test_ranks_without_ties_are_equal_in_size():
    values = np.random.default_rng(0).permutation(10).astype(float)
    np.testing.assert_array_equal(bucket_numbers(values, 4), (values * 4 // 10).astype(int))
    low, high = ends(values, 3)
    assert values[low].tolist() == [0, 1, 2] and values[high].tolist() == [7, 8, 9]
    assert [side.tolist() for side in ends(np.array([0.0, 1.0, 1.0, 1.0, 2.0]), 2)] == [[0], [4]]
    assert [side.tolist() for side in ends(np.array([0.0, 0.0, 0.0, 1.0]), 2)] == [[0, 1, 2], [3]]


@settings(deadline=None, max_examples=40)
@given(some_ties)
def test_stages_of_a_schedule(values):
    """Which samples a stage has is a matter of their difficulty alone; equal ones are in the same."""
    values = np.array(values, dtype=float)
    order, moved = permuted(values)
    for schedule in (baby_steps, two_stage):
        stages = []
        for number in range(4):
            turn = OnePass(number, 4, len(values), 3)
            members, again = set(schedule(values, turn).tolist()), set(order[schedule(moved, turn)].tolist())
            assert members == again
            assert not set(values[list(members)]) & set(np.delete(values, list(members)))
            stages.append(members)
        assert len(stages[0]) < len(values) and stages[-1] - stages[0]
    turn = OnePass(0, 1, len(values), 3)
    served = [values[interleaved(values, turn, buckets=2)], moved[interleaved(moved, turn, buckets=2)]]
    number = bucket_numbers(values, 2)
    middle = values[number == 1].min()
    assert ((served[0] >= middle) == (served[1] >= middle)).all()  # the same bucket at every place


def test_self_paced_takes_equal_samples_together():
    logps = np.array([-5.0, -1.0, -5.0, -5.0, -2.0, -0.5])
    factor = self_paced(RunState(logps, np.ones(6), 0, 0.0), start=1 / 3, until=1.0)
    assert factor.tolist() == [2.0, 0.0, 2.0, 2.0, 0.0, 0.0]


class TestGroups:
    def test_labels(self):
        assert group_labels(["a", "b", "a"]) == ["a", "b", "a"] and group_labels([1, 2]) == ["1", "2"]
        assert group_labels([None, float("nan"), "x"]) == ["None", "None", "x"]
        assert group_labels(["A", None, "None"]) == ["A", "None", "'None'"]
        assert group_labels([True, "True", 1, "1", np.int64(1)]) == ["True", "'True'", "1", "'1'", "1"]
        labels = group_labels([None, "None", "'None'"])
        assert len(set(labels)) == 3 and group_labels(labels) == labels
        assert group_labels([["A"], ["A", "B"]]) == ["['A']", "['A', 'B']"]

    def test_folds_keep_them_apart(self):
        fold = make_folds(6, 3, 0, ["A", None, "None", "A", None, "None"])
        assert len(set(fold)) == 3 and (fold[:3] == fold[3:]).all()
        with pytest.raises(ValueError, match="cannot split 3 groups into 4 folds"):
            make_folds(6, 4, 0, ["A", None, "None", "A", None, "None"])
