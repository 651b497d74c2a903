"""Scores travel: tables of text, columns of a dataset, score files of other projects."""

import csv
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import qa_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from cud_trainer import DifficultyScores

IDS = ["a", "b", "c", "7"]


def table(values=(0.1, 1 / 3, -2e-17, 5.0)):
    return DifficultyScores(list(IDS), {"cud": np.array(values), "loss": np.arange(4.0)}, np.array([0, 1, 0, 1]))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_round_trip_is_exact(tmp_path, suffix):
    scores = table()
    path = scores.save(tmp_path / f"s.{suffix}")
    again = DifficultyScores.load(path)
    assert again.ids == IDS and again.metrics == ["cud", "loss"] and again.fold.tolist() == [0, 1, 0, 1]
    assert all((again[name] == scores[name]).all() for name in scores.metrics)
    with pytest.raises(ValueError, match="exists; pass overwrite"):
        scores.save(path)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-1e300, 1e300), min_size=4, max_size=4))
def test_any_number_survives_text(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("numbers")
    for suffix in ("csv", "jsonl"):
        again = DifficultyScores.load(table(values).save(folder / f"s.{suffix}"))
        assert again["cud"].tolist() == values


@pytest.mark.parametrize("suffix", ["csv", "CSV", "jsonl", "JSONL", "parquet"])
def test_an_id_is_text_whatever_it_looks_like(tmp_path, suffix):
    ids = ["NA", "007", "7", "None", "nan", "1e5", "true", "2024-01-01", 'a,"b"', " x", "null", "٣"]
    scores = DifficultyScores(ids, {"cud": np.arange(12.0), "NA": np.arange(12.0)})
    again = DifficultyScores.load(scores.save(tmp_path / f"s.{suffix}"))
    assert again.ids == ids and again.metrics == ["cud", "NA"]
    (tmp_path / "theirs.csv").write_text("method,order\n" + "".join(f"NA,{i}\n" for i in ("NA", "007", "7", "None")))
    assert DifficultyScores.published(tmp_path / "theirs.csv", ids[:4]).metrics == ["NA"]


def test_unreadable_tables(tmp_path):
    for name, text, message in (
        ("a.csv", "id,cud\nx,1\n", "has no column sample_id"),
        ("b.csv", "sample_id,cud\nx,high\n", "column 'cud' of .* holds no numbers"),
        ("c.jsonl", "{broken\n", "cannot read difficulty scores"),
        ("d.csv", "sample_id,cud\nx,1\nx,2\n", "the id 'x' more than once"),
        ("e.csv", "sample_id,cud\nx,\ny,1\n", "not finite for 1 of 2 samples, the first is 'x'"),
        ("f.jsonl", '{"sample_id": "x"}\n', "at least one metric"),
        ("g.csv", "", "cannot read difficulty scores"),
        ("h.csv", "sample_id,cud\n,1\ny,2\n", "no column sample_id, or one with gaps"),
        ("i.csv", "sample_id,cud,cud\nx,1,2\n", "has the column 'cud' twice"),
        ("j.csv", "sample_id,cud,fold\nx,1,0.5\n", "'fold' of .* holds no whole numbers"),
        ("k.csv", "sample_id,cud\nx,True\n", "column 'cud' of .* holds no numbers"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            DifficultyScores.load(tmp_path / name)
    with pytest.raises(ValueError, match="cannot read"):
        DifficultyScores.load(tmp_path / "missing.csv")


def test_join():
    data = qa_dataset(4).add_column("id", IDS[::-1])
    joined = table().join(data)
    assert joined["difficulty_cud"] == table()["cud"][::-1].tolist() and joined["answer"] == data["answer"]
    assert table().join(qa_dataset(4), ids=IDS)["difficulty_loss"] == [0, 1, 2, 3]
    for call, message in (
        (lambda: table().join(qa_dataset(4)), "has no column sample_id or id"),
        (lambda: table().join(qa_dataset(4), ids=["x", *IDS[1:]]), "lack 1 of 4 samples, the first is 'x'"),
        (lambda: table().join(qa_dataset(3), ids=IDS), "ids are 4 for 3 samples"),
        (lambda: table().join(joined), "column 'difficulty_cud' already"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


class TestPublished:
    def read(self, path, **options):
        return DifficultyScores.published(path, IDS, **options)["published"].tolist()

    def test_every_layout(self, tmp_path):
        values = [0.5, 2.0, -1.0, 3.0]
        for name, content in (
            ("tensor", torch.tensor(values)),
            ("list", values),
            ("ids", dict(zip(IDS, values, strict=True))),
            ("positions", {0: 0.5, 1: 2.0, 2: torch.tensor(-1.0)} | {"7": 3.0}),
        ):
            torch.save(content, tmp_path / f"{name}.pt")
            assert self.read(tmp_path / f"{name}.pt") == values
        assert self.read(tmp_path / "list.pt", higher="easier") == [-v for v in values]
        (tmp_path / "list.json").write_text(json.dumps(values))
        assert self.read(tmp_path / "list.json") == values
        (tmp_path / "sides.json").write_text(json.dumps({"easy": ["b"], "hard": [0, "7"]}))
        assert self.read(tmp_path / "sides.json") == [1.0, 0.0, 0.5, 1.0]
        (tmp_path / "ranking.txt").write_text("c\n1\n\na\n7\n")
        assert self.read(tmp_path / "ranking.txt") == pytest.approx([2 / 3, 1 / 3, 0.0, 1.0])
        assert DifficultyScores.published(tmp_path / "list.json", IDS, name="mine").metrics == ["mine"]

    def test_as_the_authors_of_cud_publish_them(self, tmp_path):
        (tmp_path / "NPO_easy.txt").write_text("1,3\n")
        (tmp_path / "NPO_hard.txt").write_text("0")
        assert self.read({side: tmp_path / f"NPO_{side}.txt" for side in ("easy", "hard")}) == [1.0, 0.0, 0.5, 0.0]
        (tmp_path / "ranking.txt").write_text("2,1,0,3")
        assert self.read(tmp_path / "ranking.txt") == pytest.approx([2 / 3, 1 / 3, 0.0, 1.0])
        (tmp_path / "loss.csv").write_text("method,order\nNPO,3\nNPO,0\nNPO,1\nNPO,2\nRMU,0\nRMU,1\nRMU,2\nRMU,3\n")
        scores = DifficultyScores.published(tmp_path / "loss.csv", IDS)
        assert scores.metrics == ["NPO", "RMU"]
        assert scores["NPO"].tolist() == pytest.approx(
            [2 / 3, 1 / 3, 0.0, 1.0]
        )  # lowest loss afterwards first: hardest
        assert scores["RMU"].tolist() == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0])
        torch.save({"loss": torch.tensor([1.0, 2.0, 3.0, 4.0]), "step": 7}, tmp_path / "vector.pt")
        assert self.read(tmp_path / "vector.pt", higher="easier") == [-1.0, -2.0, -3.0, -4.0]
        with pytest.raises(ValueError, match="files of easy and hard samples are"):
            self.read({"easy": tmp_path / "NPO_easy.txt"})

    def test_their_rankings_of_tofu(self, tmp_path):
        """The rankings that they publish, as they say them: methods agree little."""
        path = Path(__file__).parents[3] / "shared" / "data" / "tofu_difficulty" / "forget10_llama32_1b_orders.txt"
        if not path.is_file():
            pytest.skip("the published rankings are not on this machine")
        rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
        text = "".join(f"{method},{sample}\n" for method, *order in rows for sample in order)
        (tmp_path / "loss.csv").write_text(f"method,order\n{text}")
        scores = DifficultyScores.published(tmp_path / "loss.csv", [str(row) for row in range(400)])
        for a, b, agreement in (("GradDiff", "NPO", 0.31), ("GradDiff", "RMU", 0.33), ("NPO", "RMU", -0.06)):
            assert spearmanr(scores[a], scores[b]).statistic == pytest.approx(agreement, abs=0.006)

    def test_nothing_in_a_file_is_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (open, (str(tmp_path / "owned"), "w"))

        with (tmp_path / "evil.pt").open("wb") as file:
            pickle.dump(Evil(), file)
        torch.save(Evil(), tmp_path / "evil2.pt")
        for name in ("evil.pt", "evil2.pt"):
            with pytest.raises(ValueError, match="cannot read"):
                self.read(tmp_path / name)
        assert not (tmp_path / "owned").exists()

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", "a\nb\n", "ranks 2 different samples of 4"),
            ("b.txt", "a\na\nb\nc\n", "ranks 3 different samples of 4"),
            ("c.txt", "a\nb\nc\nzz\n", "names 'zz', which is neither a sample id nor a position below 4"),
            ("d.json", "[1, 2]", "has 2 scores for 4 samples"),
            ("e.json", '{"a": 1}', "has no score for 3 samples, the first is 'b'"),
            ("f.json", '[1, 2, "x", 4]', "has 'x' where a finite number belongs"),
            ("g.json", '{"easy": ["a"], "hard": ["a"]}', "calls sample 'a' both easy and hard"),
            ("h.json", "{broken", "cannot read"),
            ("j.csv", "method,loss\nNPO,1\n", "has no columns method and order"),
            ("k.csv", "method,order\nNPO,1\n", "ranks 1 different samples of 4"),
            ("i.npy", "", "are read from .pt, .json, .txt and .csv files, not from 'i.npy'"),
        ],
    )
    def test_refusals(self, tmp_path, name, content, message):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            self.read(tmp_path / name)
        with pytest.raises(ValueError, match="higher must be"):
            self.read(tmp_path / name, higher="up")


def test_a_spreadsheet_finds_no_formula(tmp_path):
    """Ids and names of metrics that begin like one get a quote in front, and are read as they were."""
    ids = ["=1+1", "+44 7700", "-5", "@me", "\tx", "'=1", "''=1", "'tis", "plain", "a=b"]
    scores = DifficultyScores(ids, {"=cmd": np.arange(10.0), "loss": -np.arange(10.0)})
    path = scores.save(tmp_path / "scores.csv")
    with path.open(newline="") as file:
        head, *lines = csv.reader(file)
    assert not any(cell.startswith(tuple("=+-@\t\r")) for cell in [*head, *(line[0] for line in lines)])
    again = DifficultyScores.load(path)
    assert again.ids == ids and again.metrics == ["=cmd", "loss"]
    assert again["loss"].tolist() == scores["loss"].tolist()


class TestTheAuthorsSelection:
    """`ranked_scores.csv` and `selected_samples.json` as the authors' package `cud_difficulty` writes them."""

    HEAD = "method,sample_id,score,easy_rank,hard_rank\n"

    def test_ranked_scores(self, tmp_path):
        path = tmp_path / "ranked_scores.csv"
        rows = [
            "GA,0,0.5,2.0,2.0",
            "GA,1,0.9,3.0,1.0",
            "GA,2,0.1,1.0,3.0",
            "NPO,0,7,1.0,3.0",
            "NPO,1,5,2.0,2.0",
            "NPO,2,3,3.0,1.0",
        ]
        path.write_text(self.HEAD + "\n".join(rows) + "\n")
        scores = DifficultyScores.published(path, ["x", "y", "z"])
        assert scores.metrics == ["GA", "NPO"]
        assert scores["GA"].tolist() == [0.5, 1.0, 0.0] and scores["NPO"].tolist() == [0.0, 0.5, 1.0]
        path.write_text(self.HEAD + "\n".join(reversed(rows)) + "\n")
        again = DifficultyScores.published(path, ["x", "y", "z"])
        assert again["GA"].tolist() == [0.5, 1.0, 0.0]
        with pytest.raises(ValueError, match="has a ranking for each method: read it with DifficultyScores.published"):
            DifficultyScores.load(path)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ("GA,0,1,1.0,2.0\nGA,1,2,1.0,1.0\n", "is no ranking from 1 to 2"),
            ("GA,0,1,1.0,2.0\nGA,0,2,2.0,1.0\n", "ranks 1 different samples of 2"),
            ("GA,0,1,1.0,2.0\n", "ranks 1 different samples of 2"),
            ("GA,0,1,1.0,2.0\nGA,9,2,2.0,1.0\n", "names '9', which is neither"),
            ("GA,0,1,low,2.0\nGA,1,2,2.0,1.0\n", "column 'easy_rank' of .* holds no numbers"),
            ("GA,0,1,,2.0\nGA,1,2,2.0,1.0\n", "has gaps"),
        ],
    )
    def test_what_does_not_fit(self, tmp_path, rows, message):
        path = tmp_path / "ranked_scores.csv"
        path.write_text(self.HEAD + rows)
        with pytest.raises(ValueError, match=message):
            DifficultyScores.published(path, ["x", "y"])

    def test_selected_samples(self, tmp_path):
        path = tmp_path / "selected_samples.json"
        content = {"easy": [2], "hard": [0], "metadata": {"easy": "low", "num_samples": 1, "score_paths": ["a.pt"]}}
        path.write_text(json.dumps(content, indent=2) + "\n")
        assert DifficultyScores.published(path, ["x", "y", "z"])["published"].tolist() == [1.0, 0.5, 0.0]
        path.write_text(json.dumps({**content, "hard": [2]}))
        with pytest.raises(ValueError, match="calls sample 'z' both easy and hard"):
            DifficultyScores.published(path, ["x", "y", "z"])
