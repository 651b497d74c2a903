"""Privacy, utility, robustness, groups and mechanisms: hand-worked cases, invariants, and the command as a whole."""

import json
import math
import re
import shutil
import subprocess
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scipy import stats as scipy_stats
from sklearn.metrics import roc_auc_score

from cud_trainer import score_difficulty
from cud_trainer.cli import main
from cud_trainer.data import prepare_samples
from cud_trainer.difficulty import Buckets
from cud_trainer.logprobs import answer_probability
from evaluation.metrics import privacy, robustness
from evaluation.metrics.lm_eval import lm_eval_figures
from evaluation.metrics.memorization import (
    evaluate_memorization,
    generate_answers,
    lowest_mean,
    teacher_forced,
    verbatim,
)
from evaluation.metrics.utility import (
    answer_logps,
    closer_to_one,
    forget_quality,
    model_utility,
    normalised_probability,
    tofu_utility,
    true_better,
    truth_ratio,
)
from evaluation.report import tables as sections
from evaluation.report.circuits import MECHANISMS, mechanism_table
from evaluation.report.schema import jsonable

pytestmark = pytest.mark.slow

NASTY = "<script>document.title='owned'</script>|<img src=x onerror=alert(1)>"


def tofu_like(n, start=0, other=3):
    rows = []
    for i in range(start, start + n):
        rows.append(
            {
                "question": f"Who is {i}?",
                "answer": f"Person {i * 7} of the town",
                "paraphrased_answer": f"It is person {i * 7} of the town",
                "perturbed_answer": [f"Person {i * 7 + k} of the city" for k in range(1, other + 1)],
                "paraphrased_question": f"Do you know who {i} is?",
                "author": NASTY if i % 4 == 0 else f"author{i % 4}",
            }
        )
    return Dataset.from_list(rows)


class TestByHand:
    def test_truth_ratio(self):
        correct, wrong = np.log([0.5, 0.2]), np.log([[0.1, 0.4], [0.2, 0.2]])
        found = truth_ratio(correct, wrong)
        np.testing.assert_allclose(found, [math.sqrt(0.1 * 0.4) / 0.5, 1.0], rtol=1e-8)
        np.testing.assert_allclose(true_better(found), [0.6, 0.0], atol=1e-8)
        np.testing.assert_allclose(closer_to_one(np.array([0.4, 2.5, 1.0])), [0.4, 0.4, 1.0], rtol=1e-8)
        np.testing.assert_allclose(normalised_probability(correct, wrong), [0.5 / 1.0, 0.2 / 0.6], rtol=1e-8)

    def test_model_utility_and_forget_quality(self):
        names = [
            f"{s}/{k}"
            for s in ("retain", "real_authors", "world_facts")
            for k in ("probability", "rouge_l_recall", "truth_ratio")
        ]
        values = dict(zip(names, [0.5, 0.25, 1.0, 0.5, 0.5, 0.5, 1.0, 1.0, 0.2], strict=True))
        assert model_utility(values) == pytest.approx(9 / sum(1 / v for v in values.values()))
        assert model_utility({**values, names[0]: 0.0}) == 0.0
        for bad in (float("nan"), 1.5, None):
            with pytest.raises(ValueError, match="model utility needs retain/probability in \\[0, 1\\]"):
                model_utility({**values, names[0]: bad})
        a, b = np.arange(20.0), np.arange(20.0) + 0.5
        assert forget_quality(a, b) == scipy_stats.ks_2samp(a, b).pvalue > 0.9
        assert forget_quality(a, a + 100) < 1e-9

    def test_attacks(self):
        values = {
            "mean_logps": np.array([-0.5, -2.0]),
            "min_k": np.array([-1.0, -5.0]),
            "min_k_plus_plus": np.array([0.5, -1.0]),
        }
        texts = ["abc" * 30, "xyzzy plugh"]
        reference = {"mean_logps": np.array([-3.0, -2.5])}
        found = privacy.attack_scores(values, texts, reference)
        assert list(found) == list(privacy.ATTACKS)
        assert found["loss"].tolist() == [0.5, 2.0] and found["min_k"].tolist() == [1.0, 5.0]
        assert found["zlib"][0] == 0.5 / len(zlib.compress(texts[0].encode()))
        assert found["reference"].tolist() == [0.5 - 3.0, 2.0 - 2.5]
        assert "reference" not in privacy.attack_scores(values, texts)
        # members have the lower scores: AUC 1
        assert privacy.attack_auc(np.array([0.1, 0.2]), np.array([0.3, 0.4])) == 1.0
        assert privacy.attack_auc(np.array([0.1, 0.4]), np.array([0.2, 0.3])) == 0.5
        one, two = (np.random.default_rng(seed).integers(0, 9, 20) for seed in (0, 1))  # with ties
        assert privacy.attack_auc(one, two) == pytest.approx(roc_auc_score(np.repeat([0, 1], 20), np.r_[one, two]))
        assert privacy.privleak(1.0) == pytest.approx(-100) and privacy.privleak(0.5) == 0
        assert privacy.privleak(0.9, 0.6) == pytest.approx(100 * (0.1 - 0.4) / 0.4)
        interval = privacy.attack_interval(np.arange(50.0), np.arange(50.0) + 10, n_boot=200)
        assert interval.low < interval.value < interval.high
        assert math.isnan(privacy.attack_interval(np.array([np.nan, 1.0]), np.arange(3.0)).value)

    def test_min_k(self):
        assert lowest_mean(np.array([-1.0, -9.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0, -0.5])) == -8.5
        assert lowest_mean(np.array([-1.0, -3.0])) == -3.0 and math.isnan(lowest_mean(np.array([])))

    def test_verbatim(self):
        assert verbatim(["a b", "a b", "a b", "", "a b"], ["a b c", "a bc", "x a b", "z", "a  b"]).tolist() == [
            1,
            0,
            0,
            0,
            1,
        ]

    def test_round_trip(self):
        weight = torch.tensor([[1.0, -0.45, 0.26], [0.0, 0.0, 0.0]])
        torch.testing.assert_close(robustness.round_trip(weight, 8), (weight * 127).round() / 127)
        four = robustness.round_trip(weight, 4)
        torch.testing.assert_close(four[0], torch.tensor([1.0, -3 / 7, 2 / 7]))
        wide = torch.randn(3, 256)
        grouped = robustness.round_trip(wide, 4, 128)
        assert all(len(block.unique()) <= 15 for row in grouped for block in row.split(128))
        assert (
            (grouped - wide).abs() <= wide.abs().reshape(3, 2, 128).amax(-1).repeat_interleave(128, 1) / 14 + 1e-6
        ).all()


class TestOnAModel:
    def test_token_statistics_against_full_logits(self):
        model, tokenizer = make_model(0).double(), make_tokenizer()
        data = prepare_samples(qa_dataset(5), tokenizer)
        found = teacher_forced(model, data, tokenizer, batch_size=2)
        for row, sample in enumerate(data):
            tokens = torch.tensor(sample["input_ids"])
            with torch.no_grad():
                logps = model(tokens[None]).logits[0].log_softmax(-1)
            answer = [t for t, label in enumerate(sample["labels"]) if label != -100]
            picked = np.array([float(logps[t - 1, tokens[t]]) for t in answer])
            assert found["mean_logps"][row] == pytest.approx(picked.mean())
            content = answer[:-1]  # without eos
            plain = np.sort(picked[:-1])
            count = max(1, int(0.2 * len(plain)))
            assert found["min_k"][row] == pytest.approx(plain[:count].mean())
            standard = []
            for t in content:
                row_logps = logps[t - 1].numpy()
                mean = (np.exp(row_logps) * row_logps).sum()
                deviation = math.sqrt((np.exp(row_logps) * (row_logps - mean) ** 2).sum())
                standard.append((row_logps[tokens[t]] - mean) / deviation)
            assert found["min_k_plus_plus"][row] == pytest.approx(np.sort(standard)[:count].mean())

    def test_samples(self):
        model, tokenizer = make_model(0), make_tokenizer()
        data = prepare_samples(qa_dataset(4), tokenizer)
        torch.manual_seed(5)
        state = torch.random.get_rng_state()
        drawn = [generate_answers(model, data, tokenizer, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert torch.equal(torch.random.get_rng_state(), state)  # the caller's own draws go on as before
        one = evaluate_memorization(model, data, tokenizer, samples=1, seed=3)
        three = evaluate_memorization(model, data, tokenizer, samples=3, seed=3)
        assert (three["sampled_rouge_l_recall"] >= one["sampled_rouge_l_recall"]).all()
        assert set(three) - set(evaluate_memorization(model, data, tokenizer)) == {
            "sampled_rouge_l_recall",
            "sampled_verbatim",
        }

    def test_answers_and_utility(self):
        model, tokenizer, raw = make_model(0), make_tokenizer(), tofu_like(5)
        found = answer_logps(model, raw, tokenizer, ["perturbed_answer", "answer"])
        assert found.shape == (5, 4)
        own = teacher_forced(model, prepare_samples(raw.select_columns(["question", "answer"]), tokenizer), tokenizer)
        np.testing.assert_allclose(found[:, 3], own["mean_logps"], rtol=1e-5)
        values = tofu_utility(model, {"retain": raw, "real_authors": raw, "world_facts": raw}, tokenizer)
        assert len(values) == 9 and all((column >= 0).all() and (column <= 1).all() for column in values.values())
        assert (values["real_authors/probability"] > values["retain/probability"]).all()  # one of four
        assert (values["retain/truth_ratio"] != values["real_authors/truth_ratio"]).any()  # its paraphrase is the truth
        uneven = Dataset.from_list([{**raw[0], "perturbed_answer": ["a"]}, raw[1]])
        with pytest.raises(ValueError, match="sample 1 has 3 answers, the first has 1"):
            answer_logps(model, uneven, tokenizer, ["perturbed_answer"])
        with pytest.raises(ValueError, match="has no column 'x'"):
            answer_logps(model, raw, tokenizer, ["x"])

    def test_relearning_brings_back_and_restores(self):
        model, tokenizer = make_model(0), make_tokenizer()
        data = prepare_samples(qa_dataset(8), tokenizer)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.requires_grad_("mlp" in name)  # whatever was frozen is relearned, too
        found = robustness.relearn(model, data, [0, 1, 2], steps=(1, 30), learning_rate=1e-2)
        assert sorted(found) == [0, 1, 30]
        np.testing.assert_array_equal(found[0], answer_probability(model, data, batch_size=16))
        assert (found[30][:3] > 5 * found[0][:3]).all()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert all(p.requires_grad == ("mlp" in name) for name, p in model.named_parameters())
        again = robustness.relearn(model, data, [0, 1, 2], steps=(1, 30), learning_rate=1e-2)
        assert (again[30] == found[30]).all()
        for bad in ({"rows": []}, {"rows": [0], "steps": ()}, {"rows": [0], "steps": (0,)}):
            with pytest.raises(ValueError, match="relearning needs"):
                robustness.relearn(model, data, bad.pop("rows"), **bad)

    def test_quantised_and_between_restore(self):
        model, other, tokenizer = make_model(0), make_model(1), make_tokenizer()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with pytest.raises(RuntimeError, match="stop"), robustness.quantised(model, 4):
            weight = model.model.layers[0].mlp.up_proj.weight
            torch.testing.assert_close(
                weight, robustness.round_trip(before["model.layers.0.mlp.up_proj.weight"], 4, 128)
            )
            assert torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
            raise RuntimeError("stop")
        start = {name: p.detach().clone() for name, p in other.named_parameters()}
        data = prepare_samples(qa_dataset(3), tokenizer)
        path = robustness.straight_line(model, start, {"forget": data}, shares=(0.0, 0.5, 1.0))
        np.testing.assert_allclose(path[0]["forget"], answer_probability(other, data), rtol=1e-6)
        np.testing.assert_array_equal(path[2]["forget"], answer_probability(model, data, batch_size=16))
        with robustness.between(model, start, 0.25):
            name = "model.layers.1.self_attn.q_proj.weight"
            torch.testing.assert_close(dict(model.named_parameters())[name], 0.75 * start[name] + 0.25 * before[name])
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        del start["model.norm.weight"]
        with (
            pytest.raises(ValueError, match="the models differ in model.norm.weight"),
            robustness.between(model, start, 0.5),
        ):
            pass
        with pytest.raises(ValueError, match="8 or 4 bits"), robustness.quantised(model, 3):
            pass


class TestSections:
    def test_mechanisms_by_their_rule(self):
        generator = np.random.default_rng(0)
        bucket = np.repeat([0, 1, 2, 3], 40)
        buckets = Buckets(bucket, 4)

        def verdict(*shifts):
            signature = {
                name: np.tile(generator.normal(size=40), 4) + shift * (bucket == 3)  # the same spread everywhere
                for name, shift in zip(MECHANISMS, shifts, strict=True)
            }
            table, finding = mechanism_table(signature, buckets, seed=0, n_boot=300)
            return finding.rsplit(": ", 1)[1], jsonable(table)

        assert verdict(3, 3, 0)[0] == verdict(3, 3, 3)[0] == "yes"
        assert verdict(0, 0, 3)[0] == verdict(0, 0, 0)[0] == verdict(3, 3, -3)[0] == "undecided"
        assert verdict(-3, 0, 0)[0] == "no"
        effect = verdict(3, 3, 0)[1]["rows"][0]["cells"][2]
        assert effect["low"] < 3 < effect["high"]
        signature = {name: np.full(8, np.nan) for name in MECHANISMS}
        table, finding = mechanism_table(signature, Buckets(np.repeat([0, 1], 4), 2), seed=0)
        assert finding.endswith("undecided") and jsonable(table)["rows"][0]["cells"][2]["reason"]

    def test_groups(self):
        generator = np.random.default_rng(0)
        groups = np.repeat(list("abcdefgh"), 12)
        level = np.repeat(np.arange(8) / 8, 12)
        made, finding = sections.group_table(level + 0.01 * generator.random(96), groups, level, seed=0, shown=3)
        table = jsonable(made)
        assert [row["label"] for row in table["rows"]] == ["h", "g", "f"] and "the first 3 of 8" in table["note"]
        assert "worst 'h'" in finding and "best 'a'" in finding and "(more than groups drawn by chance" in finding
        assert "difficulty explains part of the gap" in finding
        _, finding = sections.group_table(generator.random(96), groups, generator.random(96), seed=0)
        assert "(no more than groups drawn by chance" in finding and "does not explain it" in finding

    def test_cells_say_why_they_are_empty(self):
        assert jsonable(sections.mean(np.array([]), 0))["reason"] == "no samples"
        assert jsonable(sections.mean(np.array([1.0, np.nan]), 0))["reason"] == "1 of 2 are not finite"
        found = jsonable(sections.forget_quality_table(None, None, None, 0))["rows"][0]["cells"]
        assert all(cell["reason"] == "the forget set has no perturbed_answer column" for cell in found)
        scores = {name: np.arange(5.0) for name in ("loss", "zlib", "min_k")} | {"min_k_plus_plus": np.full(5, np.nan)}
        rows = {row["label"]: row["cells"] for row in jsonable(sections.privacy_table(scores, scores, None, 0))["rows"]}
        assert rows["reference"][0]["reason"] == "needs reference_model"
        assert rows["min_k_plus_plus"][0]["reason"] == "scores are not finite" and rows["loss"][0]["value"] == 0.5
        apart = ({"loss": np.arange(5.0)}, {"loss": np.arange(5.0) + 9})
        table = jsonable(sections.privacy_table(*apart, apart, 0))
        assert "holdout set is of another kind" in table["rows"][0]["cells"][1]["reason"]
        total = jsonable(sections.utility_table({"retain/probability": np.array([0.5])}, None, 0))["rows"][-1]["cells"][
            0
        ]
        assert "model utility needs retain/rouge_l_recall" in total["reason"]

    def test_relearning_by_bucket(self):
        taught = np.arange(8) % 2 == 0
        bucket = np.repeat([0, 1], 4)
        start = np.full(8, 0.1)
        found = {0: start, 5: start + np.where(bucket == 1, 0.5, 0.2)}
        table = jsonable(sections.relearning_table(found, taught, Buckets(bucket, 2), seed=0))
        assert table["columns"] == [
            "taught",
            "others",
            "others, bucket 1",
            "others, bucket 2",
            "recovered: hardest less easiest",
        ]
        cells = table["rows"][1]["cells"]
        assert cells[2]["value"] == pytest.approx(0.3) and cells[3]["value"] == pytest.approx(0.6)
        assert cells[4]["value"] == pytest.approx(0.3) and table["rows"][0]["cells"][4]["reason"] == "the start"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models, an adapter, data sets of TOFU's layout and scores on disk."""
    root = tmp_path_factory.mktemp("world")
    tokenizer = make_tokenizer()
    for name, seed in (("original", 0), ("unlearned", 1), ("reference", 2)):
        make_model(seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    adapted = get_peft_model(make_model(0), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(root / "original")
    adapted.save_pretrained(root / "adapter")
    tokenizer.save_pretrained(root / "adapter")
    forget = tofu_like(12)
    forget.to_json(root / "forget.jsonl")
    tofu_like(6, 100).select_columns(["question", "answer"]).to_json(root / "retain.jsonl")
    tofu_like(9, 200).select_columns(["question", "answer"]).to_json(root / "holdout.jsonl")
    tofu_like(5, 400).select_columns(["question", "answer"]).to_json(root / "neighbour.jsonl")
    (root / "tofu").mkdir()
    for number, name in enumerate(("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")):
        folder = root / "tofu" / name
        folder.mkdir()
        tofu_like(4, 300 + 10 * number).to_json(folder / "train.jsonl")
    lines = [
        f"- config_name: {n}\n  data_files: {n}/train.jsonl"
        for n in ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
    ]
    (root / "tofu" / "README.md").write_text("---\nconfigs:\n" + "\n".join(lines) + "\n---\n")
    scores = score_difficulty(
        make_model(0), forget.select_columns(["question", "answer"]), tokenizer, metrics=["circuit_mass", "loss", "length"],
        progress=False, save_circuits=root / "circuits.safetensors",
    )  # fmt: skip
    scores.save(root / "scores.parquet")
    return root


def arguments(world, output, **options):
    given = {
        "model_name_or_path": world / "unlearned", "forget_dataset": world / "forget.jsonl", "output_dir": output,
        "retain_dataset": world / "retain.jsonl", "batch_size": 4, **options,
    }  # fmt: skip
    result = ["evaluate"]
    for key, value in given.items():
        values = value if isinstance(value, list) else [value]
        result += [f"--{key}", *map(str, values)]
    return result


@pytest.fixture(scope="module")
def everything(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("audit") / "out"
    code = main(
        arguments(
            world, output, original_model=world / "original", reference_model=world / "reference", scores=world / "scores.parquet",
            circuits=world / "circuits.safetensors", holdout_dataset=world / "holdout.jsonl", tofu=world / "tofu",
            neighbour_dataset=world / "neighbour.jsonl",
            group_column="author", relearn_samples=4, relearn_steps=[1, 3], quantize=[8, 4], straight_line=True, samples=2,
            n_buckets=3,
        )
    )  # fmt: skip
    assert code == 0
    return output


class TestCommand:
    def test_every_section_is_there(self, everything):
        results = json.loads((everything / "results.json").read_text())
        assert [table["id"] for table in results["tables"]] == [
            "relative", "forget_quality", "utility", "paraphrase", "privacy", "groups", "calibration", "mechanisms",
            "quantisation", "straight_line", "relearning",
        ]  # fmt: skip
        found = " ".join(results["findings"])
        for part in (
            "forget quality",
            "model utility (TOFU)",
            "membership inference",
            "4 groups",
            "as the CUD paper found: ",
        ):
            assert part in found
        assert "3 metrics are compared" in results["difficulty"]["note"]
        assert results["conditions"][0]["final"]["neighbour"]["probability"]["value"] > 0
        assert all("kendall" in row for row in results["difficulty"]["objectives"][0]["rows"])
        frame = pd.read_parquet(everything / "per_sample.parquet")
        assert len(frame) == 12 and {"truth_ratio", "min_k", "reference/probability", "group", "bucket"} <= set(frame)
        assert "true_answer" not in frame

    def test_figures_against_the_parts(self, world, everything):
        """Each again from its own function."""
        results = json.loads((everything / "results.json").read_text())
        tables = {table["id"]: {row["label"]: row["cells"] for row in table["rows"]} for table in results["tables"]}
        frame = pd.read_parquet(everything / "per_sample.parquet")
        quality = scipy_stats.ks_2samp(frame["truth_ratio"], frame["reference/truth_ratio"]).pvalue
        assert tables["forget_quality"]["unlearned"][1] == pytest.approx(quality)
        tokenizer, model = make_tokenizer(), make_model(1)
        holdout = prepare_samples(tofu_like(9, 200).select_columns(["question", "answer"]), tokenizer)
        other = teacher_forced(model, holdout, tokenizer)["min_k"]
        auc = privacy.attack_auc(-frame["min_k"].to_numpy(), -other)
        assert tables["privacy"]["min_k"][0]["value"] == pytest.approx(auc)
        before = privacy.attack_auc(
            -frame["reference/min_k"].to_numpy(), -teacher_forced(make_model(2), holdout, tokenizer)["min_k"]
        )
        assert tables["privacy"]["min_k"][1] == pytest.approx(privacy.privleak(auc, before))
        gap = (frame["probability"] - frame["reference/probability"]).mean()
        assert tables["relative"]["probability"][2]["value"] == pytest.approx(gap)
        assert tables["straight_line"]["1"][0]["value"] == pytest.approx(frame["probability"].mean())
        assert tables["straight_line"]["0"][0]["value"] == pytest.approx(frame["before/probability"].mean())
        hardest = frame[frame["bucket"] == 3]["probability"].mean()
        assert tables["quantisation"]["as it is"][-1]["value"] == pytest.approx(hardest)

    def test_no_forget_text_and_nothing_unescaped(self, everything):
        for path in (p for p in everything.rglob("*") if p.is_file()):
            content = path.read_bytes()
            assert b"of the town" not in content and b"Who is" not in content, path
        page = (everything / "report.html").read_text()
        assert "<script>document.title" not in page and "&lt;script&gt;document.title" in page
        summary = (everything / "summary.md").read_text()
        assert "<script>" not in summary and "&lt;script&gt;" in summary
        widths = [len(re.findall(r"(?<!\\)\|", line)) for line in summary.splitlines() if line.startswith("|")]
        assert widths and "### Membership inference" in summary

    def test_adapter_is_evaluated_like_its_merged_model(self, world, tmp_path):
        from peft import PeftModel

        merged = PeftModel.from_pretrained(make_model(0), world / "adapter").merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        make_tokenizer().save_pretrained(tmp_path / "merged")
        frames = []
        for name in (world / "adapter", tmp_path / "merged"):
            assert main(arguments(world, tmp_path / f"out-{name.name}", model_name_or_path=name, generate=False,
                                  original_model=world / "original", straight_line=True, quantize=[8], relearn_samples=2)) == 0  # fmt: skip
            frames.append(pd.read_parquet(tmp_path / f"out-{name.name}" / "per_sample.parquet"))
        np.testing.assert_allclose(frames[0]["probability"], frames[1]["probability"], rtol=1e-4)

    def test_text_only_if_asked_for(self, world, tmp_path):
        assert main(arguments(world, tmp_path / "out", generate=False, show_text=True)) == 0
        assert "of the town" in pd.read_parquet(tmp_path / "out" / "per_sample.parquet")["true_answer"][0]

    def test_nothing_unlearned_is_said(self, world, tmp_path):
        assert main(arguments(world, tmp_path / "o", generate=False, model_name_or_path=world / "original", original_model=world / "original")) == 0  # fmt: skip
        assert "nothing was unlearned" in json.loads((tmp_path / "o" / "results.json").read_text())["findings"][0]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"reference_model": "unlearned"}, "has the weights of the model that is evaluated"),
            ({"group_column": "x"}, "forget dataset has no column 'x'"),
            (
                {"group_column": "paraphrased_question", "relearn_samples": 12},
                "must leave some of the 12 forget samples",
            ),
            ({"quantize": [3]}, "quantize takes 8 and 4 bits"),
            ({"straight_line": True}, "give --original_model"),
            ({"relearn_samples": 2, "relearn_steps": [0]}, "relearn_steps must be at least 1"),
            ({"holdout_dataset": "forget.jsonl"}, "is in both|same content"),
            ({"temperature": 0.0}, "must be positive"),
            ({"samples": -1}, "samples must be at least 0"),
            ({"reference_model": "foreign"}, "has another tokenizer"),
            ({"model_name_or_path": "misfit"}, "cannot load a model from"),
        ],
    )
    def test_refusals(self, world, tmp_path, capsys, options, message):
        if not (world / "foreign").exists():
            make_model(0).save_pretrained(world / "foreign")
            foreign = make_tokenizer()
            foreign.add_tokens(["extra"])
            foreign.save_pretrained(world / "foreign")
            shutil.copytree(world / "adapter", world / "misfit")  # an adapter of another base
            make_model(0, hidden_size=64).save_pretrained(world / "wide")
            settings = json.loads((world / "misfit" / "adapter_config.json").read_text())
            settings["base_model_name_or_path"] = str(world / "wide")
            (world / "misfit" / "adapter_config.json").write_text(json.dumps(settings))
        given = {
            key: world / value if isinstance(value, str) and key.endswith(("_model", "_path", "_dataset")) else value
            for key, value in options.items()
        }
        assert main(arguments(world, tmp_path / "out", generate=False, **given)) != 0
        error = capsys.readouterr().err
        assert re.search(message, error) and "Traceback" not in error
        assert not (tmp_path / "out").exists()

    @pytest.mark.subprocess
    def test_in_a_browser(self, everything, tmp_path):
        """No console error, no request, and the markup of a dataset row is only text."""
        browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if browser is None:
            pytest.skip("no Chromium on this machine")
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--no-first-run",
             "--disable-background-networking", "--enable-logging=stderr", "--v=0", "--dump-dom",
             f"file://{everything / 'report.html'}"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert "<title>Residual memorisation of unlearned</title>" in done.stdout
        assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert '<img src="x"' not in done.stdout and "Membership inference" in done.stdout


def test_lm_eval_on_a_local_task(tmp_path):
    pytest.importorskip("lm_eval")
    rows = [{"question": f"Is {i} even?", "choices": ["yes", "no"], "label": i % 2} for i in range(6)]
    Dataset.from_list(rows).to_json(tmp_path / "even.jsonl")
    (tmp_path / "even.yaml").write_text(
        f"task: tiny_even\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'even.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: label\nmetric_list:\n  - metric: acc\n"
    )
    figures = lm_eval_figures(make_model(0), make_tokenizer(), ["tiny_even"], str(tmp_path))
    table = jsonable(sections.lm_eval_table(figures))
    (row,) = [row for row in table["rows"] if row["label"] == "tiny_even: acc"]
    assert 0 <= row["cells"][0] <= 1
    with pytest.raises(ValueError, match="has no task 'missing_task'"):
        lm_eval_figures(make_model(0), make_tokenizer(), ["missing_task"], str(tmp_path))
