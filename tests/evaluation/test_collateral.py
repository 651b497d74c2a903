"""What was lost of samples that were to be kept, against the same figures by hand."""

import json

import numpy as np
import pandas as pd
import pytest
from builders import make_model, make_tokenizer, qa_dataset
from scipy.stats import spearmanr

from cud_trainer import DifficultyScores
from cud_trainer.cli import main
from cud_trainer.data import prepare_samples
from cud_trainer.logprobs import answer_probability
from evaluation.metrics.measure import Measured
from evaluation.report.collateral import collateral_tables, kept_samples_table
from evaluation.report.schema import jsonable


def measured(**sets):
    return Measured({name: {"probability": np.asarray(values, dtype=float)} for name, values in sets.items()})


def tables_of(found):
    return {table.id: {row.label: jsonable(row.cells) for row in table.rows} for table in found}


def test_figures_by_hand():
    before = measured(retain=[0.8, 0.8, 0.4, 0.4, 0.6, 0.6, 0.2, 0.9], heldout=[0.5, 0.7])
    after = measured(retain=[0.1, 0.7, 0.3, 0.1, 0.5, 0.6, 0.2, 0.1], heldout=[0.5, 0.1])
    ids = [f"r{i}" for i in range(8)]
    scores = DifficultyScores(ids, {"cud": np.array([1.0, 7, 6, 3, 5, 8, 9, 2]), "same": np.ones(8)})
    buckets = scores.bucketed(None, 2)
    groups = ["a", "b"] * 4
    made, findings = collateral_tables(after, before, scores, buckets, groups, 0)
    tables = tables_of(made)
    assert list(tables) == ["collateral", "collateral_predictors", "collateral_groups"]
    lost = before.sets["retain"]["probability"] - after.sets["retain"]["probability"]
    rows = tables["collateral"]
    assert list(rows) == [
        "retain, all",
        "retain, bucket 1, predicted to be lost first",
        "retain, bucket 2, predicted to be kept",
        "held-out, all",
    ]
    assert rows["retain, all"][3]["value"] == pytest.approx(lost.mean())
    assert rows["retain, all"][4]["value"] == 3 / 8  # 0.8 -> 0.1, 0.4 -> 0.1, 0.9 -> 0.1
    easy = [0, 7, 3, 4]
    first = rows["retain, bucket 1, predicted to be lost first"]
    assert first[0] == 4 and first[3]["value"] == pytest.approx(lost[easy].mean())
    assert rows["held-out, all"][0] == 2 and rows["held-out, all"][3]["value"] == pytest.approx(0.3)
    told = tables["collateral_predictors"]
    assert told["cud"][0]["value"] == pytest.approx(spearmanr(-scores["cud"], lost).statistic)
    assert told["cud"][0]["value"] > 0.8 and told["cud"][1]["value"] == 1.0
    assert told["cud"][2]["value"] == 1.0 and told["cud"][3] == 0.25  # the two that lost most are the two easiest
    assert told["same"][0]["reason"] == "it does not vary" and told["same"][2]["reason"] == "nothing to rank"
    assert list(tables["collateral_groups"]) == ["b", "a"]  # 0.3 before 0.225
    assert "held-out samples lost 0.300" in findings[1] and findings[2].startswith("Spearman of cud of the retain")
    frame = kept_samples_table({"retain": ids, "heldout": ["h0", "h1"]}, after, before, scores, buckets, groups)
    assert frame["set"].tolist() == ["retain"] * 8 + ["held-out"] * 2
    np.testing.assert_allclose(frame["lost"], [*lost, 0.0, 0.6])
    assert frame["bucket"][:8].tolist() == (buckets.number + 1).tolist() and frame["bucket"][8:].isna().all()


def test_what_is_no_number_and_what_is_not_there():
    before, after = measured(retain=[0.5] * 5), measured(retain=[0.1, np.nan, 0.2, 0.3, 0.4])
    scores = DifficultyScores(list("abcde"), {"loss": np.arange(5.0)})
    made, _ = collateral_tables(after, before, scores, scores.bucketed(None, 2), None, 0)
    tables = tables_of(made)
    assert tables["collateral"]["retain, all"][3]["reason"] == "1 of 5 are not finite"
    assert tables["collateral"]["retain, all"][4]["reason"] == "1 of 5 are not finite"
    assert tables["collateral"]["retain, bucket 2, predicted to be kept"][3]["value"] is not None
    assert tables["collateral_predictors"]["loss"][0]["reason"] == "1 of 5 are not finite"
    assert collateral_tables(measured(forget=[1.0]), measured(forget=[1.0]), None, None, None, 0) == ([], [])
    assert kept_samples_table({}, measured(forget=[1.0]), None, None, None, None) is None


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    for name, seed in (("original", 0), ("unlearned", 1)):
        make_model(seed).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    sets = {"forget": qa_dataset(6), "retain": qa_dataset(8, 100), "heldout": qa_dataset(4, 400)}
    for number, (name, data) in enumerate(sets.items()):
        data.add_column("author", [f"{number}{i % 2}" for i in range(len(data))]).to_json(root / f"{name}.jsonl")
    qa_dataset(3, 104).to_json(root / "retained.jsonl")
    qa_dataset(3, 500).add_column("author", ["01"] * 3).to_json(root / "group.jsonl")
    return root


def arguments(world, output, **options):
    given = {
        "model_name_or_path": world / "unlearned",
        "original_model": world / "original",
        "forget_dataset": world / "forget.jsonl",
        "retain_dataset": world / "retain.jsonl",
        "output_dir": output,
        "generate": False,
        **options,
    }
    return [
        "evaluate",
        *(text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))),
    ]


@pytest.mark.slow
def test_command(world, tmp_path):
    """`cud score` on the retain file, then `cud evaluate` with its scores and a held-out set."""
    score = ["score", "--model_name_or_path", str(world / "original"), "--forget_dataset", str(world / "retain.jsonl")]
    score += ["--output", str(tmp_path / "retain.parquet"), "--metrics", "loss", "length", "--use_cpu", "true"]
    assert main([*score, "--bf16", "false"]) == 0
    options = {
        "retain_difficulty_scores": tmp_path / "retain.parquet",
        "heldout_dataset": world / "heldout.jsonl",
        "group_column": "author",
        "n_buckets": 2,
    }
    assert main(arguments(world, tmp_path / "out", **options)) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    tables = {table["id"]: {row["label"]: row["cells"] for row in table["rows"]} for table in results["tables"]}
    tokenizer, expected = make_tokenizer(), {}
    for name, data in (("retain", qa_dataset(8, 100)), ("held-out", qa_dataset(4, 400))):
        samples = prepare_samples(data, tokenizer)
        before, after = (answer_probability(make_model(seed), samples) for seed in (0, 1))
        expected[name] = before - after
        assert tables["collateral"][f"{name}, all"][3]["value"] == pytest.approx((before - after).mean(), rel=1e-4)
    scores = DifficultyScores.load(tmp_path / "retain.parquet")
    agreement = spearmanr(-scores["loss"], expected["retain"]).statistic
    assert tables["collateral_predictors"]["loss"][0]["value"] == pytest.approx(agreement, abs=1e-6)
    assert set(tables["collateral_groups"]) == {"10", "11"}
    assert results["conditions"][0]["final"]["heldout"]["probability"]["value"] > 0
    frame = pd.read_parquet(tmp_path / "out" / "kept_samples.parquet")
    np.testing.assert_allclose(frame["lost"], np.concatenate(list(expected.values())), atol=1e-7)
    assert frame["group"][:8].tolist() == ["10", "11"] * 4
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Was collateral predicted?" in page and "Person" not in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retain_difficulty_scores": "s", "original_model": None}, "has no effect without original_model"),
        (
            {"retain_difficulty_scores": "s", "retain_dataset": None},
            "has no effect without retain_dataset or retain_co",
        ),
        ({"retain_difficulty_scores": "s"}, "difficulty scores lack 8 of 8 retain samples, the first is '"),
        ({"heldout_config": "x"}, "heldout_config has no effect without heldout_dataset"),
        ({"heldout_dataset": "heldout.jsonl", "heldout_split": "test"}, "heldout_split has no effect: .* is a file"),
        (
            {"heldout_dataset": "retained.jsonl"},
            r"held-out sample '.+' \(row 0\) is in the retain dataset: a loss sees it",
        ),
        (
            {"heldout_dataset": "forget.jsonl"},
            r"held-out sample '.+' \(row 0\) is in the forget dataset: a loss sees it",
        ),
        (
            {"heldout_dataset": "group.jsonl", "group_column": "author"},
            r"held-out group '01' \(author\) is in the forget",
        ),
    ],
)
def test_refusals(world, tmp_path, capsys, monkeypatch, options, message):
    import re

    def loads(*args, **more):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("evaluation.commands.inputs.load_model", loads)
    DifficultyScores(list("abc"), {"loss": np.arange(3.0)}).save(tmp_path / "s.parquet")
    if options.get("retain_difficulty_scores"):
        options = {**options, "retain_difficulty_scores": tmp_path / "s.parquet"}
    if options.get("heldout_dataset"):
        options = {**options, "heldout_dataset": world / options["heldout_dataset"]}
    assert main(arguments(world, tmp_path / "out", **options)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()
