"""`cud import`: open-unlearning's results as our report."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from builders import qa_dataset

from cud_trainer import DifficultyScores
from cud_trainer.cli import main
from evaluation.commands.import_open_unlearning import import_results
from evaluation.metrics.open_unlearning import Evaluation, rows_by_text
from evaluation.metrics.utility import closer_to_one, forget_quality, model_utility, true_better
from evaluation.report.schema import jsonable
from evaluation.report.verdict import judge, said

N = 12
SECRET = "town"  # in every answer


def by_index(**columns):
    names = list(columns)
    return {str(i): dict(zip(names, row, strict=True)) for i, row in enumerate(zip(*columns.values(), strict=True))}


def results(seed=0, n=N):
    """What TOFU_EVAL.json looks like."""
    draw = np.random.default_rng(seed)
    column = lambda size=n: draw.uniform(0.05, 0.95, size).tolist()  # noqa: E731
    found = {}
    for name, size in (("forget", n), ("retain", 7), ("ra", 5), ("wf", 5)):
        prob = "_normalised" if name in ("ra", "wf") else ""
        values = column(size)
        found[f"{name}_Q_A_Prob{prob}"] = {"agg_value": float(np.mean(values)), "value_by_index": by_index(prob=values)}
        rouge = by_index(rouge1_recall=column(size), rougeL_f1=column(size), rougeL_recall=column(size))
        if name == "forget":
            for entry, sample in zip(rouge.values(), qa_dataset(n), strict=True):
                entry |= {"input": "system user", "ground_truth": sample["answer"] + "  ", "generation": f"a {SECRET}"}
        found[f"{name}_Q_A_ROUGE"] = {"agg_value": 0.5, "value_by_index": rouge}
        ratio = 2 * draw.uniform(0, 1, size)
        way = closer_to_one if name == "forget" else true_better
        label = "forget_truth_ratio" if name == "forget" else f"{name}_Truth_Ratio"
        found[label] = {"agg_value": float(way(ratio).mean()), "value_by_index": by_index(score=ratio.tolist())}
    found["extraction_strength"] = {"agg_value": 0.1, "value_by_index": by_index(score=column())}
    found["exact_memorization"] = {"agg_value": 0.1, "value_by_index": by_index(score=column())}
    found["forget_Q_A_PERT_Prob"] = {"agg_value": None, "value_by_index": by_index(prob=[[0.1, 0.3]] * n)}
    found["model_utility"] = {"agg_value": 0.25}
    found["privleak"] = {"agg_value": -12.5}
    return found


def save(folder, found, name="TOFU_EVAL.json"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(found if isinstance(found, str) else json.dumps(found))
    return str(folder / name)


def scores(ids=None):
    ids = ids or [f"s{row}" for row in range(N)]
    table = {name: np.random.default_rng(1).permutation(N).astype(float) for name in ("loss", "length")}
    return DifficultyScores(ids, table)


def table_of(found, name):
    return next(table for table in found["tables"] if table["id"] == name)


def values(found, metric, key):
    return np.array([sample[key] for sample in found[metric]["value_by_index"].values()])


def test_report_from_the_command_line(tmp_path):
    after, before, reference = (results(seed) for seed in (0, 1, 2))
    scores().save(tmp_path / "difficulty.csv")
    command = [
        "import",
        "--open_unlearning",
        save(tmp_path / "run", after),
        "--scores",
        str(tmp_path / "difficulty.csv"),
    ]
    command += ["--original_open_unlearning", save(tmp_path / "a", before), "--n_buckets", "3"]
    command += ["--reference_open_unlearning", save(tmp_path / "b", reference)]
    assert main([*command, "--output_dir", str(tmp_path / "audit")]) == 0
    found = json.loads((tmp_path / "audit" / "results.json").read_text())
    buckets = found["conditions"][0]["final"]["buckets"]
    bucket, left = scores().buckets("loss", 3), values(after, "forget_Q_A_Prob", "prob")
    assert [row["probability"]["value"] for row in buckets] == pytest.approx(
        [left[bucket == b].mean() for b in range(3)]
    )
    assert buckets[2]["extraction_strength"]["value"] == pytest.approx(
        values(after, "extraction_strength", "score")[bucket == 2].mean()
    )
    assert found["conditions"][0]["name"] == "run"
    assert found["conditions"][0]["final"]["retain"]["probability"]["value"] == after["retain_Q_A_Prob"]["agg_value"]
    assert found["before"]["forget"]["rouge_l_recall"]["value"] == pytest.approx(
        values(before, "forget_Q_A_ROUGE", "rougeL_recall").mean()
    )
    frame = pd.read_parquet(tmp_path / "audit" / "per_sample.parquet")
    assert frame["sample_id"].tolist() == scores().ids and frame["probability"].tolist() == left.tolist()
    assert {"before/probability", "reference/truth_ratio", "loss", "bucket"} <= set(frame.columns)
    quality = table_of(found, "forget_quality")["rows"][0]["cells"]
    ratios = [values(one, "forget_truth_ratio", "score") for one in (after, reference)]
    assert quality[1] == pytest.approx(forget_quality(*ratios))
    assert quality[0]["value"] == pytest.approx(after["forget_truth_ratio"]["agg_value"])
    utility = table_of(found, "utility")["rows"]
    parts = {row["label"]: row["cells"][0]["value"] for row in utility[:-1]}
    assert len(parts) == 9 and utility[-1]["cells"][0] == pytest.approx(model_utility(parts))
    assert parts["world_facts/truth_ratio"] == pytest.approx(after["wf_Truth_Ratio"]["agg_value"])
    rest = {row["label"]: row["cells"][0] for row in table_of(found, "open_unlearning")["rows"]}
    assert set(rest) == {"forget_Q_A_PERT_Prob", "model_utility", "privleak"} and rest["privleak"] == -12.5
    for path in (tmp_path / "audit").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    assert (tmp_path / "audit" / "report.html").is_file()


def with_losses(found, unseen, forget=None):
    """With `mia_loss`, as open-unlearning writes it: mean answer losses of the forget set, and of another."""
    forget = values(found, "forget_Q_A_Prob", "prob") if forget is None else forget
    parts = {"forget": forget, "holdout": unseen}
    losses = {name: {"value_by_index": by_index(score=(-np.log(part)).tolist())} for name, part in parts.items()}
    return found | {"mia_loss": {"auc": 0.5, "agg_value": 0.5, **losses}}


def told(after, before=None, reference=None, folder=None):
    files = [None if one is None else save(folder / str(n), one) for n, one in enumerate((after, before, reference))]
    read = [None if path is None else Evaluation.load(path) for path in files]
    return import_results(*read, scores=scores(), n_buckets=2)[0]


def leaving(probabilities):
    found = results()
    found["forget_Q_A_Prob"]["value_by_index"] = by_index(prob=list(probabilities))
    return found


def test_the_verdict_is_that_of_the_same_rule(tmp_path):
    """The level is of the results of a retain model, or of what `mia_loss` has of samples that nobody saw."""
    low = np.linspace(0.05, 0.15, N)
    unseen, one_known = np.linspace(0.05, 0.2, 20), np.where(np.arange(N) == 4, 0.9, low)
    for left, state, ids in ((low, "forgotten", []), (one_known, "still above", ["s4"])):
        found = told(with_losses(leaving(left), unseen), results(1), folder=tmp_path).verdict
        assert (found.state, found.ids) == (state, ids)
        expected = judge(left, holdout=unseen)
        assert found.judged[0].said == said(expected, left, "answer probability")
        assert found.judged[0].against == "never-seen samples"
        found = told(leaving(left), results(1), leaving(low + 0.01), folder=tmp_path).verdict
        assert (found.state, found.ids, found.judged[0].against) == (state, ids, "reference model")
        assert found.judged[0].said == said(judge(left, low + 0.01), left, "answer probability")
    assert [row.set for row in found.costs] == ["retain"]
    assert {row.answer for row in found.hidden} == {"not tried"}
    both = [with_losses(leaving(left), unseen) for left in (one_known, low)]
    found = told(both[0], None, both[1], tmp_path).verdict
    assert found.judged[0].said == said(judge(one_known, low, unseen, unseen), one_known, "answer probability")


def test_the_verdict_says_what_it_needs(tmp_path, capsys):
    """Each question that stays open names what answers it, and no option of another command."""
    path = save(tmp_path / "run", results())
    assert main(["import", "--open_unlearning", path, "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())["verdict"]
    assert found["state"] == "cannot be said" and found["headline"] in printed
    assert "(--reference_open_unlearning, or the metric mia_loss in open-unlearning's evaluation)" in found["headline"]
    assert "(--original_open_unlearning)" in found["cost"] and "--scores" in found["whom"]
    assert {row["said"] for row in found["hidden"]} == {"needs the model: cud evaluate"}
    same = told(results(), results(), folder=tmp_path).verdict
    assert same.headline.startswith("The forget probabilities are the very ones from before unlearning")


def test_never_seen_samples_of_another_forget_set_draw_no_line(tmp_path):
    other = with_losses(results(), np.full(20, 0.1), forget=np.full(N, 0.5))
    found = told(other, folder=tmp_path)
    assert found.verdict.state == "cannot be said"
    rest = {row["label"]: row["cells"] for row in table_of(jsonable(found), "open_unlearning")["rows"]}
    assert rest["mia_loss"] == [0.5, "its forget set gets other probabilities than forget_Q_A_Prob has"]
    assert not [name for name in rest if "/" in name]
    twelve, twenty = (with_losses(results(), np.full(size, 0.1)) for size in (12, 20))
    with pytest.raises(ValueError, match="another number of never-seen samples in each of"):
        told(twelve, None, twenty, tmp_path)


def test_text_if_asked_for(tmp_path):
    path = save(tmp_path / "run", results())
    assert (
        main(["import", "--open_unlearning", path, "--show_text", "true", "--output_dir", str(tmp_path / "out")]) == 0
    )
    frame = pd.read_parquet(tmp_path / "out" / "per_sample.parquet")
    assert frame["generation"].tolist() == [f"a {SECRET}"] * N and "bucket" not in frame


def test_joined_by_text(tmp_path):
    """The data that was scored is in another order, and has ids."""
    order = np.random.default_rng(3).permutation(N)
    dataset = qa_dataset(N).add_column("id", [f"s{row}" for row in range(N)]).select(order)
    evaluation = Evaluation.load(save(tmp_path / "run", results()))
    assert rows_by_text(evaluation, dataset).tolist() == order.tolist()
    _, frame = import_results(evaluation, scores=scores(), dataset=dataset, n_buckets=2)
    assert frame["sample_id"].tolist() == [f"s{row}" for row in order]
    assert frame["probability"].tolist() == values(results(), "forget_Q_A_Prob", "prob")[order].tolist()
    assert frame["loss"].tolist() == scores()["loss"][order].tolist()
    with pytest.raises(ValueError, match="the answer of sample 0 is not in the forget dataset"):
        rows_by_text(evaluation, qa_dataset(N, start=50))
    with pytest.raises(ValueError, match="has 12 forget samples, the forget dataset 3"):
        rows_by_text(evaluation, qa_dataset(3))
    twice = qa_dataset(N).select([1, *range(1, N)])
    with pytest.raises(ValueError, match="answer of sample 0 is not in"):
        rows_by_text(evaluation, twice)


def test_undefined_values_and_another_definition(tmp_path):
    """Exact memorisation without a number, truth ratios as a share: left out, and named."""
    found = results()
    found["exact_memorization"]["value_by_index"]["3"]["score"] = None
    found["forget_truth_ratio"]["agg_value"] = float(values(found, "forget_truth_ratio", "score").mean())
    made, frame = import_results(Evaluation.load(save(tmp_path / "run", found)), scores=scores())
    report = jsonable(made)
    assert "exact_memorization" not in frame and "truth_ratio" not in frame
    rows = {row["label"]: row["cells"] for row in table_of(report, "open_unlearning")["rows"]}
    assert rows["exact_memorization"] == [0.1, "undefined for 1 of 12 samples"]
    assert rows["forget_truth_ratio"][1] == "another definition (aggregator) than TOFU's"
    assert len(report["conditions"][0]["final"]["buckets"]) == 4


def broken(change):
    found = results()
    change(found)
    return found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[1]", "it must map metrics to results"),
        (json.dumps({"forget_Q_A_Prob": 0.3}), "it must map metrics to results"),
        (json.dumps({"a": {"agg_value": 1}}), "give the EVAL.json, not the SUMMARY.json"),
        (broken(lambda r: r.pop("forget_Q_A_Prob")), "has no forget_Q_A_Prob of every sample"),
        (broken(lambda r: r["forget_Q_A_Prob"]["value_by_index"].pop("4")), "has 11 samples, but no index 4"),
        (broken(lambda r: r["forget_Q_A_Prob"].update(value_by_index={})), "has 0 samples, but no index 0"),
        (broken(lambda r: r["forget_Q_A_Prob"].update(value_by_index=[1])), "has no values by sample"),
        (
            broken(lambda r: r["extraction_strength"]["value_by_index"].pop("11")),
            "extraction_strength has 11 samples, forget_Q_A_Prob 12",
        ),
        (
            broken(lambda r: r["forget_Q_A_Prob"]["value_by_index"]["2"].clear()),
            "sample 2 of forget_Q_A_Prob has no 'prob'",
        ),
        (
            broken(lambda r: r["forget_Q_A_Prob"]["value_by_index"]["2"].update(prob="x")),
            "prob of sample 2 .* is no number",
        ),
        (results(n=9), "has 9 forget samples, the difficulty scores 12"),
    ],
)
def test_refusals(tmp_path, capsys, content, message):
    scores().save(tmp_path / "difficulty.parquet")
    command = [
        "import",
        "--open_unlearning",
        save(tmp_path / "run", content),
        "--scores",
        str(tmp_path / "difficulty.parquet"),
    ]
    assert main([*command, "--output_dir", str(tmp_path / "audit")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and re.search(message, lines[0]), lines
    assert SECRET not in lines[0] and not (tmp_path / "audit").exists()


def test_files_that_do_not_fit(tmp_path, capsys):
    after, before = save(tmp_path / "a", results()), save(tmp_path / "b", results(n=9))
    command = ["import", "--open_unlearning", after, "--original_open_unlearning", before]
    assert main([*command, "--output_dir", str(tmp_path / "audit")]) == 2
    assert "has another number of forget samples" in capsys.readouterr().err
    assert main(["import"]) == 2
    assert "give --open_unlearning TOFU_EVAL.json" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds no texts to join by: leave forget_dataset out"):
        found = results()
        del found["forget_Q_A_ROUGE"]
        rows_by_text(Evaluation.load(save(tmp_path / "c", found)), qa_dataset(N))
