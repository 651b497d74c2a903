"""Schedules are data: pure, exact, hashed."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cud_trainer.schedule import SCHEDULES, Schedule, make_schedule, register_schedule, scaled_to_mean_one

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
    assert scaled.mean() == pytest.approx(1, abs=1e-9)
    assert (np.diff(scaled[np.argsort(values)]) >= -1e-12).all()
    inside = (scaled > low) & (scaled < min(high, len(values)))
    assert np.ptp(np.log(scaled[inside]) - np.array(logs)[inside]) < 1e-9 if inside.any() else True


@pytest.mark.parametrize("low", [0.0, 0.25, 1.0])
def test_no_upper_limit(low):
    """`high: .inf` in a recipe means no limit, not infinite weights."""
    values = np.array([1.0, 3.0, 1e9])
    found = scaled_to_mean_one(values, low, float("inf"))
    np.testing.assert_allclose(found, scaled_to_mean_one(values, low, 3.0))
    assert found.mean() == pytest.approx(1)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-600, 600), min_size=1, max_size=12), st.sampled_from([(0.25, 6.0), (0.0, 50.0), (0.9, 1.1)]))
def test_inverse_mass_over_any_range(difficulty, limits):
    """Masses of any size: proportional to 1 / mass where neither limit cuts, mean 1."""
    low, high = limits
    ids = [str(i) for i in range(len(difficulty))]
    schedule = make_schedule("inverse_mass", ids, difficulty=np.array(difficulty), low=low, high=high)
    weight = dict(zip(schedule.order.tolist(), schedule.weight.tolist(), strict=True))
    weight = np.array([weight[i] for i in ids])
    assert np.isfinite(weight).all() and weight.min() >= low and weight.max() <= high
    assert weight.mean() == pytest.approx(1, abs=1e-9)
    # within what a double can hold of the largest, and off the limits
    inside = (weight > low) & (weight < high) & (np.array(difficulty) > max(difficulty) - 600)
    if inside.any():
        factor = np.log(weight[inside]) - np.array(difficulty)[inside]
        assert np.ptp(factor) < 1e-6


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_single_sample_has_weight_one(name):
    schedule = make_schedule(name, ["only"], difficulty=np.array([3.0]), passes=2)
    assert schedule.order.tolist() == ["only", "only"] and schedule.weight.tolist() == [1, 1]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(SCHEDULES)), st.lists(st.integers(-3, 3), min_size=2, max_size=12), st.integers(0, 9))
def test_any_difficulty(name, difficulty, seed):
    if len(set(difficulty)) == 1:
        difficulty[0] += 1
    ids = [f"s{i}" for i in range(len(difficulty))]
    schedule = make_schedule(name, ids, difficulty=np.array(difficulty, dtype=float), seed=seed, passes=2)
    level = dict(zip(ids, difficulty, strict=True))
    for part in np.split(np.arange(len(schedule)), 2):
        served = [level[i] for i in schedule.order[part]]
        assert sorted(schedule.order[part]) == sorted(ids)
        assert schedule.weight[part].mean() == pytest.approx(1) and (schedule.weight[part] >= 0).all()
        if name.endswith("_to_hard"):
            assert served == sorted(difficulty)
        if name.endswith("_to_easy"):
            assert served == sorted(difficulty, reverse=True)
    if name == "upweight_hard":  # the same for equals, more for the harder
        assert all(
            (schedule.weight[i] > schedule.weight[j]) == (level[schedule.order[i]] > level[schedule.order[j]])
            for i in range(len(ids))
            for j in range(len(ids))
        )


def test_rows_by_hand():
    schedule = Schedule("s", np.array(["b", "a", "b"]), np.array([0.5, 1.0, 1.5]), np.array(["y", "x", "y"]))
    assert schedule.rows(["a", "b"], ["x", "y", "z"], 2) == {
        "row": [0, 1, 2, -1],
        "forget_index": [1, 0, 1, 1],
        "retain_index": [1, 0, 1, 1],
        "weight": [0.5, 1.0, 3.0, 0.0],
        "retain_scale": [1.0, 1.0, 2.0, 0.0],
    }
    assert schedule.rows(["a", "b"], None, 3)["retain_index"] == [0, 0, 0]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_the_mean_is_the_same_under_any_split(micro, accumulation, processes, seed):
    """Means of micro-batches, averaged over accumulation and processes, are the weighted mean of the real rows."""
    size = micro * accumulation * processes
    schedule = make("inverse_mass", passes=1, seed=seed, retain_ids=["r0", "r1"])
    rows = {key: np.array(values) for key, values in schedule.rows(IDS, ["r0", "r1"], size).items()}
    losses, retain = np.random.default_rng(seed).normal(size=(2, 7))
    for start in range(0, len(rows["row"]), size):
        parts = np.split(np.arange(start, start + size), accumulation * processes)
        real = np.arange(start, min(start + size, len(schedule)))
        forget = np.mean([(rows["weight"][p] * losses[rows["forget_index"][p]]).mean() for p in parts])
        by_hand = [schedule.weight[i] * losses[IDS.index(schedule.order[i])] for i in real]
        assert forget == pytest.approx(np.mean(by_hand))
        kept = np.mean([(rows["retain_scale"][p] * retain[rows["retain_index"][p]]).mean() for p in parts])
        assert kept == pytest.approx(np.mean([retain[["r0", "r1"].index(schedule.retain_id[i])] for i in real]))


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


def test_the_hash_sees_every_change():
    schedule = make("upweight_hard", retain_ids=["r0", "r1"])
    swapped = np.roll(np.arange(21), 1)
    for values in (schedule.order, schedule.weight, schedule.retain_id):
        assert (values[swapped] != values).any()
    changes = [
        {"order": schedule.order[swapped]},
        {"weight": schedule.weight + np.eye(21)[3] * 1e-12},
        {"weight": schedule.weight[swapped]},
        {"retain_id": schedule.retain_id[swapped]},
        {"retain_id": None},
    ]
    found = {replace(schedule, **change).hash for change in changes} | {schedule.hash}
    assert len(found) == len(changes) + 1
    assert replace(schedule, name="other", settings={}).hash == schedule.hash  # what is trained is the same


@pytest.mark.parametrize("column", ["forget_id", "weight", "retain_id"])
def test_an_altered_file_is_refused(tmp_path, column):
    path = make("inverse_mass", retain_ids=["r0", "r1"]).save(tmp_path / "schedule.parquet")
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[0], values[1:] = values[-1], values[1:]
    if values == table[column].to_pylist():
        values[0] = values[0] * 2
    pq.write_table(table.set_column(table.column_names.index(column), column, [values]), path)
    with pytest.raises(ValueError, match="was altered"):
        Schedule.load(path)


def test_cut_anywhere_or_foreign_it_is_refused(tmp_path):
    path = make("uniform").save(tmp_path / "schedule.parquet")
    assert Schedule.load(path).retain_id is None
    whole = path.read_bytes()
    for size in range(0, len(whole), 101):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cannot read a schedule"):
            Schedule.load(path)
    pq.write_table(pq.read_table(make("uniform").save(path, overwrite=True)).replace_schema_metadata(None), path)
    for foreign in (path, tmp_path / "missing.parquet"):
        with pytest.raises(ValueError, match="cannot read a schedule"):
            Schedule.load(foreign)


def test_registering():
    with pytest.raises(ValueError, match="'uniform' is already registered"):
        register_schedule("uniform")(lambda difficulty, shuffled: (shuffled, shuffled))


def test_partners_do_not_follow_the_order():
    """As many retain as forget samples: each pass pairs them anew, not number by number."""
    schedule = make("uniform", passes=20, retain_ids=[f"r{i}" for i in range(7)])
    pairs = {(f[1:], r[1:]) for f, r in zip(schedule.order.tolist(), schedule.retain_id.tolist(), strict=True)}
    assert len(pairs) > 40  # of 49


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
        ("uniform", {"passes": True}, "passes must be a positive integer"),
        ("uniform", {"passes": 2.0}, "passes must be a positive integer"),
        ("uniform", {"retain_ids": []}, "no retain sample"),
        ("uniform", {"strength": 1}, "'uniform' has no option 'strength'; it has none"),
        ("upweight_easy", {"strength": -0.1}, "strength in \\[0, 1\\]"),
        ("upweight_easy", {"strength": float("nan")}, "strength in \\[0, 1\\]"),
        ("upweight_easy", {"strength": True}, "must be a number"),
        ("inverse_mass", {"low": 1.5}, "low <= 1 <= high"),
        ("inverse_mass", {"high": 0.5}, "low <= 1 <= high"),
        ("inverse_mass", {"low": float("nan")}, "low <= 1 <= high"),
        ("inverse_mass", {"difficulty": np.full(7, np.inf)}, "one finite difficulty"),
    ],
)
def test_refusals(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(name, IDS, **{"difficulty": DIFFICULTY, "passes": 1, **options})


@pytest.mark.parametrize("ids", [[], ["a", "b", "a"]])
def test_forget_ids(ids):
    with pytest.raises(ValueError, match="forget sample"):
        make_schedule("uniform", ids)
