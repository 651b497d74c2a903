"""Schedules are data: pure, exact, hashed."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cud_trainer.schedule import SCHEDULES, Schedule, make_schedule, scaled_to_mean_one

IDS = [f"s{i}" for i in range(7)]
DIFFICULTY = np.array([0.3, 2.0, -1.0, 0.3, 5.0, 0.3, 1.0])


def make(name, **options):
    return make_schedule(name, IDS, difficulty=DIFFICULTY, **{"passes": 3, "seed": 1, **options})


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_pass_serves_every_sample_once_with_mean_weight_one(name):
    schedule = make(name)
    for number in range(3):
        part = slice(number * 7, number * 7 + 7)
        assert sorted(schedule.order[part]) == IDS
        assert schedule.weight[part].mean() == pytest.approx(1)
    by_id = {(i, w) for i, w in zip(schedule.order.tolist(), schedule.weight.tolist(), strict=True)}
    assert len(by_id) == 7  # a sample's weight is the same in every pass
    assert make(name).hash == schedule.hash != make(name, seed=2).hash


def test_orders():
    difficulty = dict(zip(IDS, DIFFICULTY, strict=True))
    up = [difficulty[i] for i in make("easy_to_hard").order]
    down = [difficulty[i] for i in make("hard_to_easy").order]
    assert up[:7] == up[7:14] == sorted(DIFFICULTY) and down[:7] == sorted(DIFFICULTY)[::-1]
    tied = {tuple(i for i in make("easy_to_hard", seed=s, passes=1).order if difficulty[i] == 0.3) for s in range(30)}
    assert len(tied) == 6  # ties in every order, by seed
    passes = make("uniform").order.reshape(3, 7).tolist()
    assert passes[0] != passes[1] != passes[2]


def test_weights():
    def weight(name, **options):
        schedule = make(name, passes=1, **options)
        found = dict(zip(schedule.order.tolist(), schedule.weight.tolist(), strict=True))
        return np.array([found[i] for i in IDS])

    hard, easy = weight("upweight_hard", strength=0.5), weight("upweight_easy", strength=0.5)
    assert hard[4] == pytest.approx(1.5) and hard[2] == pytest.approx(0.5) and len(set(hard[[0, 3, 5]])) == 1
    np.testing.assert_allclose(hard + easy, 2)
    mass = np.exp(-DIFFICULTY)  # inverse_mass reads -log(mass)
    inverse = weight("inverse_mass", low=0.0, high=100.0)
    np.testing.assert_allclose(inverse * mass, (inverse * mass)[0])
    clipped = weight("inverse_mass")
    assert clipped.min() == 0.25 and clipped.mean() == pytest.approx(1)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-200, 200), min_size=1, max_size=20), st.floats(0, 1), st.floats(1, 50))
def test_scaled_to_mean_one(logs, low, high):
    values = np.exp(np.array(logs))
    scaled = scaled_to_mean_one(values, low, high)
    assert (scaled >= low).all() and (scaled <= high).all()
    if low > 0 or high >= len(values):  # else all the weight may not fit on the few samples below the cap
        assert scaled.mean() == pytest.approx(1, abs=1e-6)
    assert (np.diff(scaled[np.argsort(values)]) >= -1e-12).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 4))
def test_rows_give_the_weighted_mean_of_every_global_batch(global_batch, passes):
    schedule = make("upweight_hard", passes=passes, retain_ids=["r0", "r1", "r2"])
    rows = schedule.rows(IDS, ["r0", "r1", "r2"], global_batch)
    count = len(rows["row"])
    assert count % global_batch == 0 and 0 <= count - len(schedule) < global_batch
    values = np.random.default_rng(0).normal(size=7)
    for start in range(0, count, global_batch):
        part = slice(start, start + global_batch)
        padded = np.mean(np.array(rows["weight"][part]) * values[rows["forget_index"][part]])
        real = slice(start, min(start + global_batch, len(schedule)))
        sample_values = values[[IDS.index(i) for i in schedule.order[real]]]
        assert padded == pytest.approx(np.mean(schedule.weight[real] * sample_values))
        assert np.mean(rows["retain_scale"][part]) == pytest.approx(1)
    assert [IDS[i] for i in rows["forget_index"][: len(schedule)]] == schedule.order.tolist()
    assert rows["row"] == [*range(len(schedule)), *[-1] * (count - len(schedule))]


def test_retain_partners_all_come_before_any_comes_again():
    retain = [f"r{i}" for i in range(5)]
    drawn = make("uniform", retain_ids=retain).retain_id.tolist()
    assert len(drawn) == 21
    for start in range(0, 20, 5):
        assert sorted(drawn[start : start + 5]) == retain
    assert make("easy_to_hard", retain_ids=retain).retain_id.tolist() == drawn  # a generator of their own


def test_saved_and_hashed(tmp_path):
    schedule = make("inverse_mass", retain_ids=["r0", "r1"])
    path = schedule.save(tmp_path / "schedule.parquet")
    loaded = Schedule.load(path)
    assert loaded.hash == schedule.hash and (loaded.weight == schedule.weight).all()
    assert loaded.settings == {"name": "inverse_mass", "options": {}, "seed": 1, "passes": 3}
    with pytest.raises(ValueError, match="exists; pass overwrite"):
        schedule.save(path)
    table = pq.read_table(path)
    changed = table.set_column(0, "forget_id", [table["forget_id"].to_pylist()[::-1]])
    pq.write_table(changed, path)
    with pytest.raises(ValueError, match="was altered"):
        Schedule.load(path)
    path.write_bytes(b"PAR1nothing")
    with pytest.raises(ValueError, match="cannot read a schedule"):
        Schedule.load(path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("magic", {}, "unknown schedule 'magic'; choose one of \\['easy_to_hard'"),
        ("uniform", {"passes": 0}, "passes must be a positive integer"),
        ("upweight_hard", {"strength": 2}, "strength in \\[0, 1\\]"),
        ("upweight_hard", {"strength": "x"}, "must be a number"),
        ("easy_to_hard", {"difficulty": None}, "needs difficulty scores"),
        ("easy_to_hard", {"difficulty": np.ones(7)}, "scores that differ"),
        ("easy_to_hard", {"difficulty": np.full(7, np.nan)}, "one finite difficulty"),
        ("easy_to_hard", {"difficulty": np.ones(6)}, "one finite difficulty"),
    ],
)
def test_refusals(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(name, IDS, **{"difficulty": DIFFICULTY, "passes": 1, **options})
