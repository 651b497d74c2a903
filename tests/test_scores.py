"""The difficulty table on disk, and score_difficulty from end to end."""

import numpy as np
import pandas as pd
import pytest
from conftest import make_model, make_tokenizer, qa_dataset
from datasets import Dataset
from scipy.stats import spearmanr

from cud_trainer import DifficultyScores, score_difficulty
from cud_trainer.files import atomic_write, check_output_dir
from cud_trainer.fingerprint import model_fingerprint

ALL = ["cud", "cud_paper", "circuit_mass", "loss", "length"]


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
            assert frame["bucket"].tolist() == [2, 0, 3, 1]

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
        assert make().aligned(["c", "a"])["cud"].tolist() == [0.9, 0.4]
        with pytest.raises(ValueError, match="lack 1 of 2 forget samples, the first is 'z'"):
            make().aligned(["a", "z"])

    def test_buckets(self):
        assert make().buckets(n=2).tolist() == [1, 0, 1, 0]
        counts = np.bincount(DifficultyScores([str(i) for i in range(10)], {"m": np.zeros(10)}).buckets(n=4))
        assert counts.tolist() == [3, 2, 3, 2]
        with pytest.raises(ValueError, match="cannot make 5 buckets of 4 samples"):
            make().buckets(n=5)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((["a", "a"], {"m": [1, 2]}), "id 'a' more than once"),
            ((["a", "b"], {"m": [1, float("nan")]}), "'m' is not finite for 1 of 2 samples, the first is 'b'"),
            ((["a", "b"], {"m": [1]}), "has 1 values for 2 samples"),
            ((["a"], {}), "at least one metric"),
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
