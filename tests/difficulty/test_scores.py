"""The difficulty table on disk, and score_difficulty from end to end."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from builders import make_model, make_tokenizer, qa_dataset
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from cud_trainer import DifficultyScores, score_difficulty
from cud_trainer.difficulty import Buckets
from cud_trainer.files import atomic_write, check_output_dir
from cud_trainer.models.fingerprint import model_fingerprint

ALL = ["cud", "cud_top_k", "circuit_mass", "loss", "length"]


def make(**provenance) -> DifficultyScores:
    return DifficultyScores(
        ["a", "b", "c", "d"],
        {"cud": np.array([0.4, 0.1, 0.9, 0.2]), "loss": np.arange(4.0)},
        np.array([0, 1, 0, 1]),
        provenance,
    )


class TestTable:
    def test_round_trip(self, tmp_path):
        path = make(model="m", seed=3).save(tmp_path / "scores.parquet")
        loaded = DifficultyScores.load(path, model="m", seed=3)
        assert loaded.ids == ["a", "b", "c", "d"] and loaded.metrics == ["cud", "loss"]
        assert (loaded["cud"] == make()["cud"]).all() and loaded.fold.tolist() == [0, 1, 0, 1]
        for frame in (Dataset.from_parquet(str(path)).to_pandas(), pd.read_parquet(path)):
            assert frame.columns.tolist() == ["sample_id", "cud", "loss", "fold", "bucket"]
            assert frame["bucket"].tolist() == [3, 1, 4, 2]  # from 1 in files

    def test_cut_anywhere_it_is_refused(self, tmp_path):
        path = make(model="m").save(tmp_path / "scores.parquet")
        whole = path.read_bytes()
        for size in range(0, len(whole), 101):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match="cannot read difficulty scores"):
                DifficultyScores.load(path)

    def test_another_format_is_refused(self, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr("cud_trainer.difficulty.scores.FORMAT_VERSION", 99)
            path = make().save(tmp_path / "scores.parquet")
        with pytest.raises(ValueError, match="has format 99, this version reads 1"):
            DifficultyScores.load(path)

    def test_nothing_is_left_of_a_write_that_failed(self, tmp_path, monkeypatch):
        def fail(table, path, **options):
            path.write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr("cud_trainer.files.pq.write_table", fail)
        with pytest.raises(OSError, match="disk full"):
            make().save(tmp_path / "scores.parquet")
        with pytest.raises(TypeError, match="not JSON"):
            make(model=object()).save(tmp_path / "scores.parquet")
        assert not list(tmp_path.iterdir())

    def test_without_folds(self, tmp_path):
        scores = DifficultyScores(["a", "b"], {"m": [2, 1]})
        loaded = DifficultyScores.load(scores.save(tmp_path / "new" / "scores.parquet"))
        assert loaded.fold is None and loaded["m"].tolist() == [2, 1] and loaded["m"].dtype == np.float64
        assert pd.read_parquet(tmp_path / "new" / "scores.parquet").columns.tolist() == ["sample_id", "m", "bucket"]

    def test_what_was_handed_in_is_left_alone(self):
        columns = {"m": [1, 2]}
        DifficultyScores(["a", "b"], columns)
        assert columns == {"m": [1, 2]} and isinstance(columns["m"], list)

    def test_every_difference_in_provenance_is_listed(self, tmp_path):
        path = make(model="m", dataset="d", seed=3).save(tmp_path / "scores.parquet")
        with pytest.raises(ValueError, match="model: scores 'm', here 'x'; seed: scores 3, here 4"):
            DifficultyScores.load(path, model="x", dataset="d", seed=4, unknown="not compared")

    def test_files_are_complete_or_not_there(self, tmp_path):
        path = make().save(tmp_path / "scores.parquet")
        with pytest.raises(ValueError, match="exists; pass overwrite"):
            make().save(path)
        make().save(path, overwrite=True)

        def fail(temporary):
            temporary.write_text("half")
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            atomic_write(tmp_path / "new.txt", fail)
        with pytest.raises(OSError, match="disk full"):
            atomic_write(path, fail)
        assert [p.name for p in tmp_path.iterdir()] == ["scores.parquet"]
        assert DifficultyScores.load(path).ids == make().ids

    def test_foreign_files_are_refused(self, tmp_path):
        pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "foreign.parquet")
        with pytest.raises(ValueError, match="holds no difficulty scores"):
            DifficultyScores.load(tmp_path / "foreign.parquet")
        (tmp_path / "cut.parquet").write_bytes(make().save(tmp_path / "s.parquet").read_bytes()[:200])
        for name in ("cut.parquet", "missing.parquet"):
            with pytest.raises(ValueError, match="cannot read difficulty scores"):
                DifficultyScores.load(tmp_path / name)

    def test_aligned(self):
        found = make(model="m").aligned(["c", "a"])
        assert found["cud"].tolist() == [0.9, 0.4] and found["loss"].tolist() == [2, 0]
        assert found.fold.tolist() == [0, 0] and found.provenance == {"model": "m"} and found.ids == ["c", "a"]
        assert DifficultyScores(["a", "b"], {"m": [1, 2]}, [3, 4]).aligned(["b"]).fold.tolist() == [4]
        with pytest.raises(
            ValueError, match="no difficulty metric 'mass' in these scores; they have \\['cud', 'loss'\\]"
        ):
            found["mass"]
        with pytest.raises(ValueError, match="lack 1 of 2 forget samples, the first is 'z'"):
            make().aligned(["a", "z"])

    def test_buckets(self):
        assert make().buckets(n=2).tolist() == [1, 0, 1, 0]
        counts = np.bincount(DifficultyScores([str(i) for i in range(10)], {"m": np.arange(10.0)}).buckets(n=4))
        assert counts.tolist() == [3, 2, 3, 2]
        with pytest.raises(ValueError, match="cannot make 5 buckets of 4 samples"):
            make().buckets(n=5)

    def test_buckets_know_who_is_in_them(self):
        buckets = make().bucketed("cud", 2)
        assert (buckets.metric, buckets.count) == ("cud", 2) and make().bucketed(n=2).metric == "cud"
        assert buckets.easiest.tolist() == [False, True, False, True] and buckets.hardest is buckets.masks[1]
        assert buckets.means(np.array([1.0, 2.0, 3.0, 6.0])) == {1: 4.0, 2: 2.0}
        hard = buckets.select([0, 2])
        assert hard.number.tolist() == [1, 1] and hard.count == 2 and hard.means(np.array([1.0, 3.0])) == {2: 2.0}
        single = Buckets.single(3)
        assert single.count == 1 and single.hardest.all()

    @settings(deadline=None, max_examples=40)
    @given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.integers(1, 8))
    def test_buckets_are_equal_and_in_order(self, values, n):
        """By at most one sample where no scores are equal; equal ones share a bucket, in whatever order they stand."""
        scores = DifficultyScores([str(i) for i in range(len(values))], {"m": values})
        if n > len(values) or (n > 1 and scores.constant):
            with pytest.raises(ValueError, match="cannot make|ranks nothing"):
                scores.buckets("m", n)
            return
        bucket = scores.buckets("m", n)
        counts = np.bincount(bucket)
        note = scores.bucketed("m", n).note
        assert bool(note) == (counts.max() - counts.min() > 1 or len(counts) < n)
        if len(set(values)) == len(values):
            assert not note
        assert min(n, 2) <= len(counts) <= n and counts.all()
        for lower, upper in pairwise(range(len(counts))):
            assert max(scores["m"][bucket == lower]) < min(scores["m"][bucket == upper])
        order = np.random.default_rng(0).permutation(len(values))
        moved = DifficultyScores([str(i) for i in order], {"m": scores["m"][order]})
        assert (moved.buckets("m", n) == bucket[order]).all()

    def test_ties_share_a_bucket(self):
        ids = [str(i) for i in range(1000)]
        halves = DifficultyScores(ids, {"cud": np.repeat([0.0, 1.0], 500)}).bucketed(n=4)
        assert halves.count == 2 and np.bincount(halves.number).tolist() == [500, 500]
        assert "ties of 'cud' made 2 buckets of 500, 500 samples, not 4 of 250" in halves.note
        assert np.bincount(DifficultyScores(ids, {"cud": np.r_[np.zeros(999), 1]}).buckets()).tolist() == [999, 1]
        # the three ones take the bucket in which the middle one ranks
        found = Buckets.by_rank(np.array([0.0, 1.0, 1.0, 1.0, 2.0, 3.0, 4.0, 5.0]), 4, "m")
        assert found.number.tolist() == [0, 1, 1, 1, 2, 2, 3, 3] and found.count == 4
        assert found.select([0, 7]).note == found.note

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((["a", "a"], {"m": [1, 2]}), "id 'a' more than once"),
            ((["a", "b"], {"m": [1, float("nan")]}), "'m' is not finite for 1 of 2 samples, the first is 'b'"),
            ((["a", "b"], {"m": [1]}), "has 1 values for 2 samples"),
            ((["a"], {}), "at least one metric"),
            ((["a", 1, "1"], {"m": [1, 2, 3]}), "id '1' more than once"),
            ((["a", "b"], {"m": [[1, 2]]}), "has 2 values for 2 samples"),
            ((["a"], {"m": [float("inf")]}), "not finite for 1 of 1 samples, the first is 'a'"),
            ((["a"], {"fold": [1.0]}), "cannot be called 'fold'"),
            ((["a"], {"bucket": [1.0]}), "cannot be called 'bucket'"),
            ((["a"], {"sample_id": [1.0]}), "cannot be called 'sample_id'"),
            ((["a", "b"], {"m": [1, 2]}, [0]), "there are 1 folds for 2 samples"),
        ],
    )
    def test_refusals(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            DifficultyScores(*arguments)


class TestScoring:
    def test_does_not_depend_on_the_batch_size(self):
        a, b = (
            score_difficulty(make_model(0), qa_dataset(10), make_tokenizer(), metrics=ALL, batch_size=n, progress=False)
            for n in (1, 4)
        )
        assert a.ids == b.ids and a.metrics == ALL
        for name in ALL:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4)
            assert spearmanr(a[name], b[name]).statistic > 0.99

    def test_leaves_the_model_and_the_random_state_alone(self):
        import torch

        model = make_model(0).train()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        scores = score_difficulty(model, qa_dataset(8), make_tokenizer(), folds=2, progress=False)
        assert torch.rand(1) == expected and model.training
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert scores.provenance["model"] == model_fingerprint(model)
        assert "town" not in str(scores.provenance)  # no text

    def test_every_mode_is_put_back(self):
        """A part that the user keeps in evaluation is still there, also without circuits."""
        for metrics in (["loss"], ["cud", "loss"]):
            model = make_model(0).train()
            model.model.layers[1].eval()
            before = [module.training for module in model.modules()]
            score_difficulty(model, qa_dataset(6), make_tokenizer(), metrics=metrics, folds=2, progress=False)
            assert [module.training for module in model.modules()] == before

    def test_the_order_of_the_metrics_is_the_users(self):
        def score(metrics):
            return score_difficulty(
                make_model(0), qa_dataset(6), make_tokenizer(), metrics=metrics, folds=2, progress=False
            )

        one, other = score(["length", "loss", "circuit_mass"]), score(["circuit_mass", "loss", "loss", "length"])
        assert one.metrics == ["length", "loss", "circuit_mass"] and other.metrics == one.metrics[::-1]
        for name in one.metrics:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5)
        assert one.fold is None  # nothing was cross-fitted
        # the loss alone goes without circuits, and is the same number
        np.testing.assert_allclose(score(["loss"])["loss"], one["loss"], rtol=1e-5)

    def test_a_lora_calibration_is_repeatable(self):
        """The initial adapter comes from the seed, not from what ran before."""
        import torch
        from peft import LoraConfig

        from cud_trainer.scoring.calibration import CalibrationSettings

        found = []
        for seed in (1, 1, 2):
            torch.manual_seed(len(found))
            lora = CalibrationSettings(
                learning_rate=1e-2,
                max_passes=2,
                seed=0,
                peft_config=LoraConfig(r=2, target_modules=["q_proj", "up_proj"]),
            )
            scores = score_difficulty(
                make_model(0),
                qa_dataset(6),
                make_tokenizer(),
                metrics=["cud"],
                folds=2,
                calibration=lora,
                seed=seed,
                progress=False,
            )
            assert scores.provenance["calibration"]["adapter"]
            found.append(scores.provenance["calibration"]["runs"]["npo"]["forget_probability"])
        assert found[0] == found[1] != found[2]

    def test_an_objective_that_needs_retain_calibrates_alone(self):
        from cud_trainer.objectives import UnlearningLoss
        from cud_trainer.scoring.calibration import CalibrationSettings

        settings = CalibrationSettings(UnlearningLoss("graddiff"), max_passes=1)
        options = dict(metrics=["cud"], folds=2, calibration=settings, progress=False)
        alone = score_difficulty(make_model(0), qa_dataset(6), make_tokenizer(), **options).provenance["calibration"]
        assert (alone["objective"], alone["retain_loss"]) == ("ga", "none")
        options["retain_dataset"] = qa_dataset(3, 50)
        paired = score_difficulty(make_model(0), qa_dataset(6), make_tokenizer(), **options).provenance["calibration"]
        assert (paired["objective"], paired["retain_loss"]) == ("graddiff", "nll")

    def test_groups_are_not_split(self):
        data = qa_dataset(12).add_column("author", [f"author{i // 3}" for i in range(12)])
        scores = score_difficulty(
            make_model(0),
            data,
            make_tokenizer(),
            folds=4,
            group_column="author",
            retain_dataset=qa_dataset(5, 50),
            progress=False,
        )
        assert all(len(set(scores.fold[i * 3 : i * 3 + 3])) == 1 for i in range(4))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"metrics": ["magic"]}, "unknown difficulty metric 'magic'"),
            ({"metrics": []}, "no difficulty metric given"),
            ({"metrics": "loss"}, "metrics must be a list of names, got 'loss'"),
            ({"metric_args": {"cud": {"anchor": 1}}}, "'cud' has no option 'anchor'"),
            ({"metric_args": {"magic": {}}}, "unknown difficulty metric 'magic'"),
            ({"metric_args": {"cud": {"anchor_share": "0.3"}}}, "must be a number"),
            ({"metric_args": {"loss": None}}, "must be a dictionary, got None"),
            ({"metric_args": {"cud": {"anchors": {"easy": ["x"], "hard": ["y"]}}}}, "'x' is not a forget sample"),
            ({"metric_args": {"cud": {"anchors": "missing.safetensors"}}}, "cannot read an anchor bank"),
            ({"circuit_args": {"metric": "rouge"}}, "unknown metric 'rouge'"),
            ({"circuit_args": {"steps": 0, "method": "eap-ig"}}, "steps"),
            ({"folds": "5"}, "folds must be an integer, got '5'"),
            ({"folds": 1}, "folds must be at least 2, got 1"),
            ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
            ({"max_length": 10}, "beyond max_length=10"),
            ({"group_column": "answer", "folds": 11}, "into 11 folds"),
            ({"metric_args": {"cud": {"variant": "old"}}}, "unknown CUD variant"),
            ({"circuit_args": {"methode": "eap"}}, "unknown circuit option 'methode'"),
            ({"circuit_args": {"method": "acdc"}}, "unknown method 'acdc'"),
            ({"folds": 11}, "cannot split 10 samples into 11 folds"),
            ({"group_column": "author"}, "no column 'author'"),
            ({"processing_class": None}, "needs the tokenizer"),
            ({"retain_dataset": qa_dataset(3)}, "is in both"),
        ],
    )
    def test_refusals_come_before_the_model_runs(self, options, message, monkeypatch):
        model = make_model(0)
        monkeypatch.setattr(model, "forward", lambda *a, **k: pytest.fail("the model ran"))
        # Two samples of it, to see whether figures are of one sample: that may come before options of a metric.
        monkeypatch.setattr("cud_trainer.scoring.score.check_padding", lambda *a: None)
        with pytest.raises(ValueError, match=message):
            score_difficulty(model, qa_dataset(10), **{"processing_class": make_tokenizer(), **options})


def test_model_fingerprint():
    model = make_model(0)
    assert model_fingerprint(model) == model_fingerprint(make_model(0)) != model_fingerprint(make_model(1))
    before = model_fingerprint(model)
    assert model_fingerprint(model.bfloat16()) == before


def test_output_directory(tmp_path):
    check_output_dir(tmp_path / "new")
    check_output_dir(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is not empty; pass --overwrite"):
        check_output_dir(tmp_path)
    check_output_dir(tmp_path, overwrite=True)
    check_output_dir(tmp_path, resume=True)
    with pytest.raises(ValueError, match="is a file"):
        check_output_dir(tmp_path / "file")
