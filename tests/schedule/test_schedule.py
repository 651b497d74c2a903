"""Schedules are data: pure, exact, hashed."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cud_trainer.schedule import (
    SCHEDULES,
    DynamicWeights,
    OnePass,
    RunState,
    Schedule,
    make_schedule,
    parse,
    register_schedule,
    scaled_to_mean_one,
)

IDS = [f"s{i}" for i in range(7)]
DIFFICULTY = np.array([0.3, 2.0, -1.0, 0.3, 5.0, 0.3, 1.0])


# Orders that do not serve every sample once a pass.
REPEATING = {"competence", "baby_steps", "two_stage", "budget", "random_share"}
ONCE = sorted(set(SCHEDULES) - REPEATING)
# As `loss` has them (log-probabilities), so that weights which read it make sense.
LOGPS = -np.array([0.3, 0.02, 3.0, 0.3, 0.001, 0.3, 0.5])


def make(name, **options):
    return make_schedule(name, IDS, **{"difficulty": DIFFICULTY, "passes": 3, "seed": 1, **options})


@pytest.mark.parametrize("name", ONCE)
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
@given(st.sampled_from(ONCE), st.lists(st.integers(-3, 3), min_size=2, max_size=12), st.integers(0, 9))
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
    rows = schedule.rows(["a", "b"], ["x", "y", "z"], 2)
    assert {name: values.tolist() for name, values in rows.items()} == {
        "row": [0, 1, 2, -1],
        "forget_index": [1, 0, 1, 1],
        "retain_index": [1, 0, 1, 1],
        "weight": [0.5, 1.0, 3.0, 0.0],
        "retain_scale": [1.0, 1.0, 2.0, 0.0],
    }
    assert schedule.rows(["a", "b"], None, 3)["retain_index"].tolist() == [0, 0, 0]


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
    assert rows["row"].tolist() == [*range(len(schedule)), *[-1] * (count - len(schedule))]


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
    for name, kind, message in (
        ("uniform", "order", "'uniform' is already registered"),
        ("a+b", "order", "cannot be called 'a\\+b'"),
        ("mine", "sampler", "kind of schedule 'mine' must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            register_schedule(name, kind)(lambda difficulty, turn: turn.shuffled)
    try:

        @register_schedule("mine")
        def mine(difficulty, turn, *, step: int = 2):
            return np.roll(np.arange(turn.size), step)

        assert make("mine", passes=1, step=1).order.tolist() == ["s6", *IDS[:-1]]
        assert [part.name for part, _ in parse("mine+focal")] == ["mine", "focal"]
    finally:
        SCHEDULES.pop("mine", None)


class TestOrders:
    """Each by its definition."""

    def rows(self, name, size=40, passes=6, seed=0, **options):
        difficulty = np.random.default_rng(seed).permutation(size).astype(float)
        schedule = make_schedule(
            name, [str(d) for d in difficulty], difficulty=difficulty, passes=passes, seed=seed, **options
        )
        return schedule.order.astype(float)  # a sample's id is its difficulty

    def test_interleaved(self):
        served = self.rows("interleaved").reshape(6, 10, 4)
        assert (served // 10 == [0, 1, 2, 3]).all()  # one sample of each quarter in turn
        assert len({tuple(part.ravel()) for part in served}) == 6
        assert sorted(make("interleaved", passes=1, buckets=3).order) == IDS  # buckets of unequal size
        assert sorted(make("interleaved", passes=1, buckets=99).order) == IDS

    def test_easy_first_sampling(self):
        served = self.rows("easy_first_sampling", passes=200).reshape(200, 40)
        assert all(sorted(part) == list(range(40)) for part in served)
        position = served.argsort(1).mean(0)
        assert position[:10].mean() < position[10:30].mean() < position[30:].mean()
        # first draw of Plackett and Luce: p proportional to exp(-strength * rank)
        expected = np.exp(-4 * np.arange(40) / 39)
        first = np.bincount(served[:, 0].astype(int), minlength=40)[:10].sum() / 200
        assert first == pytest.approx(expected[:10].sum() / expected.sum(), abs=0.11)
        flat = self.rows("easy_first_sampling", passes=200, strength=0.0).reshape(200, 40).argsort(1).mean(0)
        assert flat.std() < 3

    def test_competence(self):
        served = self.rows("competence", size=50, passes=8, start=0.2, until=0.5)
        t = np.arange(400) / 400
        reach = np.ceil(np.minimum(1, np.sqrt(t / 0.5 * (1 - 0.2**2) + 0.2**2)) * 50)
        assert (served < reach).all() and served[:20].max() < 20  # never beyond what is in reach
        assert served[200:].max() == 49 and len(set(served[200:])) > 45  # all in reach, drawn with replacement

    def test_baby_steps(self):
        for passes, stages in ((4, [1, 2, 3, 4]), (8, [1, 1, 2, 2, 3, 3, 4, 4]), (2, [3, 4]), (1, [4])):
            served = self.rows("baby_steps", passes=passes).reshape(passes, 40)
            assert [int(part.max() // 10) + 1 for part in served] == stages
            assert all(sorted(set(part)) == list(range(10 * stage)) for part, stage in zip(served, stages, strict=True))
            counts = np.bincount(served[0].astype(int))[: 10 * stages[0]]
            assert np.ptp(counts) <= 1  # all of them before any comes again

    def test_two_stage(self):
        served = self.rows("two_stage", easy_share=0.25, first=0.5).reshape(6, 40)
        assert (served[:3] < 10).all() and (served[3:] >= 10).all()
        assert set(served[0]) == set(range(10)) and set(served[3]) == set(range(10, 40))

    def test_budget(self):
        served = self.rows("budget", passes=8, strength=0.5)
        counts = np.bincount(served.astype(int))
        expected = 8 * (1 + 0.5 * (2 * np.arange(40) / 39 - 1))
        assert (np.abs(counts - expected) < 1).all()
        assert len(served) == pytest.approx(8 * 40, abs=20)
        assert (np.bincount(self.rows("budget", strength=0.0).astype(int)) == 6).all()

    def test_random_share(self):
        served = self.rows("random_share", share=0.25).reshape(6, 40)
        assert len(set(served.ravel())) == 10 and set(served[0]) == set(served[5])
        assert (np.bincount(served[0].astype(int))[sorted(set(served[0].astype(int)))] == 4).all()
        others = [set(self.rows("random_share", share=0.25, seed=seed)) for seed in range(8)]
        assert len(set(map(frozenset, others))) == 8
        assert len(set(self.rows("random_share", share=0.001))) == 1  # never of nothing

    @pytest.mark.parametrize("name", sorted(REPEATING - {"random_share"}))
    def test_weights_have_mean_one_in_every_pass_also_where_samples_repeat(self, name):
        joined = make_schedule(f"{name}+upweight_hard", IDS, difficulty=DIFFICULTY, passes=5, seed=2)
        alone = make_schedule(name, IDS, difficulty=DIFFICULTY, passes=5, seed=2)
        assert joined.order.tolist() == alone.order.tolist() and (alone.weight == 1).all()
        turns = [OnePass(number, 5, 7, 2) for number in range(5)]
        sizes = [len(SCHEDULES[name].function(DIFFICULTY, turn)) for turn in turns]
        assert sum(sizes) == len(joined) and set(joined.order) <= set(IDS)
        for part in np.split(joined.weight, np.cumsum(sizes)[:-1]):
            assert part.mean() == pytest.approx(1)
        level = dict(zip(IDS, DIFFICULTY, strict=True))
        first = slice(0, sizes[0])
        for i, a in zip(joined.order[first], joined.weight[first], strict=True):
            for j, b in zip(joined.order[first], joined.weight[first], strict=True):
                assert (a > b) == (level[i] > level[j])


class TestWeights:
    def weight(self, name, difficulty, **options):
        return SCHEDULES[name].function(np.asarray(difficulty, dtype=float), **options)

    def test_forms(self):
        rank = np.arange(5) / 4
        for form, raw in (("softmax", np.exp(1.5 * (2 * rank - 1))), ("power", ((4 * rank + 0.5) / 5) ** 1.5)):
            found = self.weight("upweight_hard", rank, form=form, strength=1.5)
            np.testing.assert_allclose(found, raw / raw.mean())
            np.testing.assert_allclose(self.weight("upweight_easy", rank, form=form, strength=1.5), found[::-1])
            clipped = self.weight("upweight_hard", rank, form=form, strength=50.0, low=0.2, high=2.0)
            assert clipped.min() == pytest.approx(0.2) and clipped.max() <= 2 and clipped.mean() == pytest.approx(1)

    def test_of_the_probability(self):
        p = np.exp(LOGPS)
        for name, raw in (("inverse_loss", -1 / LOGPS), ("inverse_error", 1 / (1 - p)), ("focal", p**2.0)):
            np.testing.assert_allclose(self.weight(name, LOGPS, low=0.0, high=1e9), raw / raw.mean())
        norms = np.array([0.5, 2.0, 8.0])
        found = self.weight("inverse_gradient", -np.log(norms), low=0.0, high=1e9)
        np.testing.assert_allclose(found, 1 / norms / (1 / norms).mean())
        certain = np.array([0.0, -1.0, -2.0])  # probability 1
        for name in ("inverse_loss", "inverse_error"):
            found = self.weight(name, certain)
            assert np.isfinite(found).all() and found.argmax() == 0 and found.mean() == pytest.approx(1)

    def test_risk_by_hand(self):
        """Forget weight d (1 - r), retain weight 1 + r, both gated min-max scores."""
        difficulty, alignment = np.array([0.0, 2.0, 4.0, 4.0]), np.array([0.3, -0.2, 0.3, 0.8])
        forget, retain = SCHEDULES["risk"].function(difficulty, alignment)
        gate = {x: 1 / (1 + np.exp(-(x - 0.5) / 0.25)) for x in (0.0, 0.5, 1.0)}
        d = np.array([gate[0.0], gate[0.5], gate[1.0], gate[1.0]])
        r = np.array([gate[0.5], gate[0.0], gate[0.5], gate[1.0]])
        np.testing.assert_allclose(forget, d * (1 - r) / (d * (1 - r)).mean())
        np.testing.assert_allclose(retain, 1 + r)

    def test_risk_goes_with_the_pair(self, tmp_path):
        """Row by row: each forget sample's retain weight stands beside it, also by tokens, in the file and the hash."""
        alignment = np.random.default_rng(0).normal(size=7)
        values = {"difficulty": DIFFICULTY, "grad_alignment": alignment}
        retain, lengths = ["r0", "r1", "r2"], np.array([3, 1, 7])
        schedule = make("risk+easy_to_hard", difficulty=values, retain_ids=retain)
        expected = SCHEDULES["risk"].function(DIFFICULTY, alignment)
        index = [IDS.index(i) for i in schedule.order]
        np.testing.assert_allclose(schedule.weight, expected[0][index])
        np.testing.assert_allclose(schedule.retain_weight, expected[1][index])
        rows = schedule.rows(IDS, retain, 4)
        np.testing.assert_allclose(rows["retain_scale"][:20], schedule.retain_weight[:20])
        assert rows["retain_scale"][20:].tolist() == [pytest.approx(4 * schedule.retain_weight[20]), 0, 0, 0]
        tokens = np.array(schedule.rows(IDS, retain, 7, retain_lengths=lengths)["retain_scale"][:7])
        n = lengths[[retain.index(r) for r in schedule.retain_id[:7]]]
        np.testing.assert_allclose(tokens / 7, n * schedule.retain_weight[:7] / n.sum())
        loaded = Schedule.load(schedule.save(tmp_path / "s.parquet"))
        assert loaded.hash == schedule.hash and (loaded.retain_weight == schedule.retain_weight).all()
        assert replace(schedule, retain_weight=None).hash != schedule.hash

    def test_a_schedule_names_the_metric_that_is_missing(self):
        with pytest.raises(ValueError, match="schedule 'risk' needs grad_alignment scores"):
            make("risk", difficulty={"difficulty": DIFFICULTY})


class TestComposition:
    def test_an_order_with_weights_and_a_stop(self):
        values = {"difficulty": DIFFICULTY, "circuit_mass": DIFFICULTY[::-1], "loss": LOGPS}
        joined = make_schedule(
            "easy_to_hard + inverse_mass+per_sample_stop",
            IDS,
            difficulty=values,
            passes=2,
            seed=1,
            inverse_mass={"high": 4.0},
            per_sample_stop={"target": 0.2},
        )
        order = make_schedule("easy_to_hard", IDS, difficulty=DIFFICULTY, passes=2, seed=1)
        weights = make_schedule("inverse_mass", IDS, difficulty=DIFFICULTY[::-1], passes=2, seed=1, high=4.0)
        assert joined.order.tolist() == order.order.tolist()
        by_id = dict(zip(weights.order.tolist(), weights.weight.tolist(), strict=True))
        assert joined.weight.tolist() == [by_id[i] for i in joined.order.tolist()]
        assert joined.dynamic == (("per_sample_stop", {"target": 0.2}),)

    def test_saved_with_its_dynamic_parts(self, tmp_path):
        schedule = make("uniform+per_sample_stop+dynamic", per_sample_stop={"target": 0.2})
        loaded = Schedule.load(schedule.save(tmp_path / "s.parquet"))
        assert loaded.dynamic == schedule.dynamic == (("per_sample_stop", {"target": 0.2}), ("dynamic", {}))
        assert loaded.hash == schedule.hash != make("uniform+per_sample_stop+dynamic").hash != make("uniform").hash


class TestDynamic:
    def state(self, p, factor=None, step=0, progress=0.0):
        p = np.asarray(p, dtype=float)
        return RunState(np.log(p), np.ones(len(p)) if factor is None else np.asarray(factor, float), step, progress)

    def test_stop_and_come_back(self):
        def stop(p, factor):
            return SCHEDULES["per_sample_stop"].function(self.state(p, factor), target=0.2, back=1.5).tolist()

        assert stop([0.1, 0.2, 0.21, 0.9], [1, 1, 1, 1]) == [0, 0, 1, 1]
        assert stop([0.25, 0.29, 0.31, 0.9], [0, 0, 0, 0]) == [0, 0, 1, 1]  # between the two it stays as it is

    def test_joint_stop_looks_at_the_mean(self):
        def factors(p, factor):
            return SCHEDULES["joint_stop"].function(self.state(p, factor), target=0.2, back=1.5).tolist()

        assert factors([0.9, 0.1], [1.0, 1.0]) == [1.0, 1.0]  # mean 0.5
        assert factors([0.3, 0.1], [1.0, 1.0]) == [0.0, 0.0]  # 0.2: done, the hard one with it
        assert factors([0.4, 0.1], [0.0, 0.0]) == [0.0, 0.0]  # 0.25: stays away
        assert factors([0.4, 0.1], [1.0, 1.0]) == [1.0, 1.0]  # and had not left
        assert factors([0.6, 0.1], [0.0, 0.0]) == [1.0, 1.0]  # 0.35: back

    def test_dynamic_and_self_paced(self):
        p = [0.1, 0.2, 0.4, 0.8]
        found = SCHEDULES["dynamic"].function(self.state(p), power=1.0, low=0.0, high=99.0)
        np.testing.assert_allclose(found, np.array(p) / np.mean(p))
        old = SCHEDULES["dynamic"].function(self.state(p, [1, 2, 3, 4], step=3), every=2)
        assert old.tolist() == [1, 2, 3, 4]  # estimated at steps 0, 2, 4, ...
        paced = SCHEDULES["self_paced"].function
        assert paced(self.state(p), start=0.5, until=1.0).tolist() == [2, 2, 0, 0]
        assert paced(self.state(p, progress=0.9), start=0.5, until=0.5).tolist() == [1, 1, 1, 1]
        middle = paced(self.state(p[::-1], progress=0.25), start=0.5, until=0.5)  # c = sqrt(0.5 * 0.75 + 0.25) = 0.79
        np.testing.assert_allclose(middle, [1, 1, 1, 1])

    def test_odds(self):
        p = np.array([0.1, 0.5, 0.9, 0.999])
        found = SCHEDULES["odds"].function(self.state(p), power=1.0, low=0.0, high=1e9)
        np.testing.assert_allclose(found, (p / (1 - p)) / np.mean(p / (1 - p)))
        found = SCHEDULES["odds"].function(self.state(p))
        assert found.mean() == pytest.approx(1) and (np.diff(found) >= 0).all() and found[0] == pytest.approx(0.05)
        small = np.array([1e-4, 2e-4, 3e-4])  # where little is left it is `dynamic`
        one, other = (
            SCHEDULES[name].function(self.state(small), power=2.0, low=0.0, high=9.0) for name in ("odds", "dynamic")
        )
        np.testing.assert_allclose(one, other, rtol=1e-3)
        assert np.isfinite(SCHEDULES["odds"].function(self.state([1.0, 1.0, 0.5]))).all()  # 1 - p is 0
        old = SCHEDULES["odds"].function(self.state(p, [1, 2, 3, 4], step=3), every=2)
        assert old.tolist() == [1, 2, 3, 4]

    def test_odds_that_keep_the_pull(self):
        """Sum of weight times 1 - p as with equal weights, by any clipping; the mean weight is what gives way."""
        p = np.array([0.05, 0.5, 0.9, 0.999])
        found = SCHEDULES["odds"].function(self.state(p), low=0.0, high=1e9, keep="pull")
        np.testing.assert_allclose(found, p / (1 - p) * (1 - p).sum() / p.sum())
        for low, high in ((0.05, 20.0), (0.5, 3.0)):
            kept = SCHEDULES["odds"].function(self.state(p), low=low, high=high, keep="pull")
            assert (kept * (1 - p)).sum() == pytest.approx((1 - p).sum())
            assert kept.min() >= low and kept.max() <= high
        mean = SCHEDULES["odds"].function(self.state(p))
        assert (mean * (1 - p)).sum() < 0.5 * (1 - p).sum()
        assert np.isfinite(SCHEDULES["odds"].function(self.state([1.0, 1.0]), high=np.inf, keep="pull")).all()

    def test_a_target_that_falls(self):
        """start^(1 - t) target^t: 0.4, 0.2, 0.1."""
        stop = SCHEDULES["per_sample_stop"].function
        options = {"target": 0.1, "start": 0.4, "back": 1.0}
        for progress, level in ((0.0, 0.4), (0.5, 0.2), (1.0, 0.1)):
            p = [level * 0.999, level * 1.001]
            assert stop(self.state(p, progress=progress), **options).tolist() == [0, 1]
        # what left early comes back when the target has fallen
        assert stop(self.state([0.35], [1.0]), **options).tolist() == [0]
        assert stop(self.state([0.35], [0.0], progress=0.5), **options).tolist() == [1]

    def test_never_seen_stop(self):
        """Each sample at its own level, exp(loss - memorization): 0.2, 0.05, and never above 1."""
        values = {"loss": np.log([0.8, 0.9, 0.5]), "memorization": np.log([4.0, 18.0, 0.4])}

        def stop(p, factor):
            state = replace(self.state(p, factor), values=values)
            return SCHEDULES["never_seen_stop"].function(state, back=1.5).tolist()

        assert stop([0.19, 0.06, 0.99], [1, 1, 1]) == [0, 1, 0]
        assert stop([0.29, 0.07, 0.99], [0, 0, 0]) == [0, 0, 0]
        assert stop([0.31, 0.08, 0.99], [0, 0, 0]) == [1, 1, 0]

    def test_what_dynamic_parts_read_is_part_of_the_schedule(self, tmp_path):
        values = {"loss": LOGPS, "memorization": -LOGPS}
        schedule = make("uniform+never_seen_stop", difficulty=values)
        loaded = Schedule.load(schedule.save(tmp_path / "s.parquet"))
        assert loaded.hash == schedule.hash
        assert {name: column.tolist() for name, column in loaded.values.items()} == {
            name: column.tolist() for name, column in values.items()
        }
        other = make("uniform+never_seen_stop", difficulty={**values, "memorization": -2 * LOGPS})
        assert other.hash != schedule.hash
        run = DynamicWeights(schedule.dynamic, LOGPS, 10, schedule.values)
        assert run.factor.tolist() == [1] * 7
        run.update(np.array([2]), np.array([2 * LOGPS[2] - 0.01]), 1)
        assert run.factor.tolist() == [1, 1, 0, 1, 1, 1, 1]

    def test_parts_see_only_what_the_run_serves(self):
        """Of samples that are never trained on nothing is known: they take no weight from the others."""
        p = np.array([0.9, 0.2, 0.9, 0.6, 0.9])
        run = DynamicWeights((("tail", {}), ("dual", {"target": 0.2})), np.log(p), 4, planned=np.array([1, 3]))
        assert run.factor.tolist() == [1, 0, 1, 2, 1]
        run.update(np.array([3]), np.log([0.1]), 1)
        np.testing.assert_allclose(run.factor, [1, 2, 1, 0, 1])
        np.testing.assert_allclose(run.factors[1], [1, 1, 1, 0.5**0.25, 1])
        again = DynamicWeights(run.parts, np.log(p), 4, planned=run.planned)
        again.restore(json.loads(json.dumps(run.state())))
        assert again.factor.tolist() == run.factor.tolist()

    def test_tail(self):
        tail = SCHEDULES["tail"].function
        assert tail(self.state([0.1, 0.9, 0.4, 0.6])).tolist() == [0, 2, 0, 2]
        assert tail(self.state([0.1, 0.9, 0.4, 0.6]), share=0.25).tolist() == [0, 4, 0, 0]
        assert tail(self.state([0.1, 0.9, 0.4]), share=0.5).tolist() == [0, 2, 1]  # one and a half
        assert tail(self.state([0.1, 0.4, 0.4, 0.9])).tolist() == [0, 1, 1, 2]  # equals share
        assert tail(self.state(np.linspace(0.1, 1, 10)), share=0.7).tolist() == [0.0] * 3 + [1 / 0.7] * 7
        assert tail(self.state([0.5, 0.5, 0.5])).tolist() == [1, 1, 1]
        assert tail(self.state([0.1, 0.9], [1.5, 0.5], step=1), every=2).tolist() == [1.5, 0.5]

    def test_unlikelihood(self):
        """On the mean log-probability of an answer it gives the gradient of -scale log(1 - p), a softmax's by autograd."""
        torch.manual_seed(0)
        logits = torch.randn(3, 4, 9, dtype=torch.float64).mul(3).requires_grad_()  # 3 answers of 4 tokens
        logits.data[0, :, 0] += 12.0  # known by heart
        logps = torch.log_softmax(logits, -1)[..., 0].mean(1)
        (expected,) = torch.autograd.grad(-0.5 * torch.log1p(-logps.exp()).sum(), logits, retain_graph=True)
        state = self.state(logps.detach().exp().numpy())
        factor = torch.from_numpy(SCHEDULES["unlikelihood"].function(state, scale=0.5, power=1.0))
        (found,) = torch.autograd.grad((factor * logps).sum(), logits)
        torch.testing.assert_close(found, expected)
        root = SCHEDULES["unlikelihood"].function(self.state([0.25, 0.64]))  # the default
        np.testing.assert_allclose(root, [0.3 * 0.5 / 0.75, 0.3 * 0.8 / 0.36])
        certain = SCHEDULES["unlikelihood"].function(self.state([1.0, 0.5, 0.0]), scale=2.0, power=1.0, high=40.0)
        assert certain.tolist() == [40.0, 2.0, 0.0]
        old = SCHEDULES["unlikelihood"].function(self.state([0.1, 0.5], [3, 4], step=3), every=2)
        assert old.tolist() == [3, 4]

    def test_dro(self):
        p = np.array([0.1, 0.5, 0.99])
        found = SCHEDULES["dro"].function(self.state(p), tau=0.2)
        np.testing.assert_allclose(found, np.exp(p / 0.2) / np.exp(p / 0.2).mean())
        assert (np.diff(found) > 0).all()  # what is remembered is pushed
        # the maximiser of sum q p - tau KL(q, uniform), q = w / N: its value is tau log mean exp(p / tau)
        q = found / 3
        value = q @ p - 0.2 * (q * np.log(q * 3)).sum()
        assert value == pytest.approx(0.2 * np.log(np.exp(p / 0.2).mean()))
        np.testing.assert_allclose(SCHEDULES["dro"].function(self.state(p), tau=np.inf), 1)
        assert SCHEDULES["dro"].function(self.state(p), tau=1e-6).tolist() == [0, 0, 3]

    def test_dual_by_hand(self):
        """Only what was served moves; from the multipliers there were."""
        run = DynamicWeights((("dual", {"target": 0.2, "rate": 0.5, "high": 3.0}),), np.log([0.9, 0.8, 0.1]), steps=9)
        assert run.factor.tolist() == [1, 1, 1]
        run.update(np.array([1, 1]), np.log([0.5, 0.4]), 1)  # twice in a step: once, by the last
        np.testing.assert_allclose(run.factor, [1, (0.4 / 0.2) ** 0.5, 1])
        run.update(np.array([2, 0]), np.log([0.1, 0.9]), 2)
        np.testing.assert_allclose(run.factor, [4.5**0.5, 2**0.5, 0.5**0.5])
        run.update(np.array([0, 2]), np.array([np.log(0.9), -np.inf]), 3)
        np.testing.assert_allclose(run.factor, [3.0, 2**0.5, 0.01])  # clipped on both sides
        run.update(np.array([2]), np.log([0.9]), 4)
        np.testing.assert_allclose(run.factor[2], 0.01 * 4.5**0.5)  # and it comes back

    @pytest.mark.parametrize(
        "name", ["tail", "dro", "self_paced", "odds", "unlikelihood", "dynamic", "per_sample_stop"]
    )
    def test_rows_in_another_order_have_the_same_factors(self, name):
        p = np.array([0.2, 0.6, 0.6, 0.6, 0.1, 0.6, 0.3])
        turned = np.random.default_rng(0).permutation(7)
        function = SCHEDULES[name].function
        one, other = function(self.state(p, progress=0.3)), function(self.state(p[turned], progress=0.3))
        np.testing.assert_allclose(one[turned], other, rtol=1e-12)
        assert np.ptp(one[[1, 2, 3, 5]]) == 0

    def test_an_odds_weight_evens_out_the_pull_on_saturated_samples(self):
        """Of a softmax over two, d log p / d logit is 1 - p: with power 1 all pulls are proportional to p."""
        logits = torch.tensor([1.0, 3.0, 6.0], dtype=torch.float64, requires_grad=True)
        logps = torch.nn.functional.logsigmoid(logits)
        (pull,) = torch.autograd.grad(logps.sum(), logits)
        p = logps.detach().exp().numpy()
        factor = SCHEDULES["odds"].function(self.state(p), power=1.0, low=0.0, high=1e9)
        np.testing.assert_allclose(factor * pull.numpy() / p, (factor * pull.numpy() / p)[0])

    def test_runs_and_resumes(self):
        parts = (("per_sample_stop", {"target": 0.3, "start": 0.6}), ("dynamic", {"every": 2}), ("dual", {}))
        generator = np.random.default_rng(0)
        run = DynamicWeights(parts, np.log(np.full(6, 0.9)), steps=10)
        np.testing.assert_allclose(run.factor, 1)
        shown = [(generator.integers(0, 6, 3), np.log(generator.random(3))) for _ in range(8)]
        for step, (rows, logps) in enumerate(shown[:4], start=1):
            run.update(rows, logps, step)
        again = DynamicWeights(parts, np.log(np.full(6, 0.9)), steps=10)
        again.restore(json.loads(json.dumps(run.state())))
        for step, (rows, logps) in enumerate(shown[4:], start=5):
            for each in (run, again):
                each.update(rows, logps, step)
            assert (run.factor == again.factor).all() and (run.logps == again.logps).all()
        assert (run.factor >= 0).all() and run.factor.min() == 0

    def test_an_impossible_probability_is_kept_finite(self):
        run = DynamicWeights((("dynamic", {}),), np.log(np.full(3, 0.5)), steps=2)
        run.update(np.array([1]), np.array([-np.inf]), 1)
        json.dumps(run.state(), allow_nan=False)
        assert np.isfinite(run.factor).all()

    def test_a_factor_that_makes_no_sense_is_refused(self):
        try:
            register_schedule("bad", "dynamic", metric=None)(lambda state: np.full(len(state.logps), -1.0))
            with pytest.raises(ValueError, match="'bad' must return one finite factor of at least 0"):
                DynamicWeights((("bad", {}),), np.zeros(3), steps=1)
        finally:
            SCHEDULES.pop("bad", None)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(0, 99))
def test_token_means_by_hand(global_batch, seed):
    """sum w n L / sum w n over every global batch, for the forget as for the retain loss."""
    generator = np.random.default_rng(seed)
    forget_lengths, retain_lengths = generator.integers(1, 30, 7), generator.integers(1, 30, 3)
    retain = ["r0", "r1", "r2"]
    schedule = make("upweight_hard", passes=2, seed=seed, retain_ids=retain, strength=0.5)
    rows = schedule.rows(IDS, retain, global_batch, forget_lengths=forget_lengths, retain_lengths=retain_lengths)
    values, kept = generator.normal(size=7), generator.normal(size=3)
    for start in range(0, len(rows["row"]), global_batch):
        part = slice(start, start + global_batch)
        real = range(start, min(start + global_batch, len(schedule)))
        f = [IDS.index(schedule.order[i]) for i in real]
        mass = schedule.weight[list(real)] * forget_lengths[f]
        found = np.mean(np.array(rows["weight"][part]) * values[rows["forget_index"][part]])
        assert found == pytest.approx((mass * values[f]).sum() / mass.sum())
        r = [retain.index(schedule.retain_id[i]) for i in real]
        found = np.mean(np.array(rows["retain_scale"][part]) * kept[rows["retain_index"][part]])
        assert found == pytest.approx((retain_lengths[r] * kept[r]).sum() / retain_lengths[r].sum())


def test_where_the_weights_differ():
    """All between steps for sorted batches of one, all within for a whole pass at once."""
    schedule = make("easy_to_hard+upweight_hard", passes=1)
    assert schedule.weight_within_batches(1) == 0 and schedule.weight_within_batches(7) == pytest.approx(1)
    assert 0 < schedule.weight_within_batches(2) < 0.2 < make("upweight_hard", passes=1).weight_within_batches(3)
    assert np.isnan(make("uniform").weight_within_batches(2))


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
        ("magic", {}, "unknown schedule 'magic'; choose one of \\['baby_steps', "),
        ("uniform+magic", {}, "unknown schedule 'magic'"),
        ("easy_to_hard+uniform", {}, "more than one order: \\['easy_to_hard', 'uniform'\\]"),
        ("inverse_mass+focal", {}, "more than one set of weights"),
        ("focal+focal", {}, "has a part twice"),
        ("uniform+focal", {"power": 2.0}, "go by its parts, for example {'uniform': {...}}; got 'power'"),
        ("uniform+focal", {"focal": {"x": 2.0}}, "schedule 'focal' has no option 'x'"),
        ("upweight_hard", {"form": "cubic"}, "needs a form out of \\['linear', 'power', 'softmax'\\], got 'cubic'"),
        ("upweight_hard", {"form": "power", "strength": -1}, "finite strength of at least 0"),
        (
            "upweight_hard",
            {"form": "power", "strength": float("inf")},
            "'strength' .* must be a finite number, got inf",
        ),
        ("focal", {"power": -1}, "finite power of at least 0"),
        ("competence", {"start": 0}, "start in \\(0, 1\\], got 0"),
        ("two_stage", {"easy_share": 1.5}, "easy_share in \\(0, 1\\]"),
        ("baby_steps", {"buckets": 0}, "buckets in \\[1, inf\\]"),
        ("budget", {"strength": 2}, "strength in \\[0, 1\\]"),
        ("per_sample_stop", {"target": 0}, "target in \\(0, 1\\]"),
        ("per_sample_stop", {"back": 0.5}, "back in \\[1, inf\\]"),
        ("per_sample_stop", {"start": 0.05}, "start between target \\(0.07\\) and 1, got 0.05"),
        ("per_sample_stop", {"start": "x"}, "must be a number"),
        ("dynamic", {"low": 2.0}, "low <= 1 <= high"),
        ("odds", {"keep": "mean"}, "keep out of \\['weight', 'pull'\\], got 'mean'"),
        ("unlikelihood", {"scale": 0}, "scale in \\(0, 1e\\+06\\], got 0"),
        ("tail", {"share": 0}, "share in \\(0, 1\\], got 0"),
        ("dro", {"tau": 0.0}, "tau in \\(0, inf\\], got 0.0"),
        ("dual", {"low": 0.0}, "low in \\(0, 1\\], got 0.0"),
        ("dual", {"high": 1e9}, "high in \\[1, 1e\\+06\\], got 1000000000.0"),
        ("random_share", {"share": 2}, "share in \\(0, 1\\], got 2"),
        ("self_paced", {"every": 0}, "every in \\[1, inf\\]"),
        ("inverse_gradient", {"difficulty": {"difficulty": DIFFICULTY}}, "needs grad_norm scores"),
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
        ("upweight_easy", {"strength": float("nan")}, "must be a finite number, got nan"),
        ("upweight_easy", {"strength": True}, "must be a number"),
        ("inverse_mass", {"low": 1.5}, "low <= 1 <= high"),
        ("inverse_mass", {"high": 0.5}, "low <= 1 <= high"),
        ("inverse_mass", {"low": float("nan")}, "must be a finite number, got nan"),
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


def test_one_long_id_makes_no_schedule_large(tmp_path):
    """Ids are held once each, in memory and as read from a file."""
    ids = [*IDS, "x" * 10_000]
    schedule = make_schedule("uniform", ids, passes=50, retain_ids=ids)
    loaded = Schedule.load(schedule.save(tmp_path / "s.parquet"))
    for one in (schedule, loaded):
        for served in (one.order, one.retain_id):
            assert served.nbytes == 8 * len(one) == 8 * 50 * 8
            assert len({id(name) for name in served}) == 8
    assert loaded.order.tolist() == schedule.order.tolist() and loaded.hash == schedule.hash
    rows = schedule.rows(ids, ids, 32)
    assert [ids[row] for row in rows["retain_index"][: len(schedule)]] == schedule.retain_id.tolist()
