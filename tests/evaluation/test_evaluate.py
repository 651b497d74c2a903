"""`cud evaluate` as a whole."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import vllm_here
from builders import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from scipy import stats as scipy_stats
from tofu import tofu_like
from transformers import BertConfig, BertForSequenceClassification

from cud_trainer import DifficultyScores, score_difficulty
from cud_trainer.cli import main
from cud_trainer.data import prepare_samples
from cud_trainer.logprobs import answer_probability
from evaluation.metrics import depth, privacy, robustness
from evaluation.metrics.gradients import gradient_norms
from evaluation.metrics.leak import leak_at_k
from evaluation.metrics.memorization import (
    teacher_forced,
)

pytestmark = pytest.mark.slow


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
    nli = BertConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        id2label={0: "contradiction", 1: "entailment"},
        label2id={"contradiction": 0, "entailment": 1},
    )
    BertForSequenceClassification(nli).save_pretrained(root / "nli")
    tokenizer.save_pretrained(root / "nli")
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
        make_model(0),
        forget.select_columns(["question", "answer"]),
        tokenizer,
        metrics=["circuit_mass", "loss", "length"],
        progress=False,
        save_circuits=root / "circuits.safetensors",
    )
    scores.save(root / "scores.parquet")
    return root


def arguments(world, output, **options):
    given = {
        "model_name_or_path": world / "unlearned",
        "forget_dataset": world / "forget.jsonl",
        "output_dir": output,
        "retain_dataset": world / "retain.jsonl",
        "batch_size": 4,
        **options,
    }
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
            world,
            output,
            original_model=world / "original",
            reference_model=world / "reference",
            scores=world / "scores.parquet",
            circuits=world / "circuits.safetensors",
            holdout_dataset=world / "holdout.jsonl",
            tofu=world / "tofu",
            neighbour_dataset=world / "neighbour.jsonl",
            group_column="author",
            relearn_samples=4,
            relearn_steps=[1, 3],
            quantize=[8, 4],
            straight_line=True,
            samples=4,
            secret_pattern=r"\d+",
            nli_model=world / "nli",
            n_buckets=3,
            depth=True,
            logit_lens=True,
            gradient_norm=True,
        )
    )
    assert code == 0
    return output


class TestCommand:
    def test_every_section_is_there(self, everything):
        results = json.loads((everything / "results.json").read_text())
        assert [table["id"] for table in results["tables"]] == [
            "relative",
            "forget_quality",
            "utility",
            "paraphrase",
            "privacy",
            "depth",
            "depth_groups",
            "collateral",
            "leak",
            "leak_parts",
            "secret",
            "groups",
            "calibration",
            "mechanisms",
            "quantisation",
            "straight_line",
            "relearning",
        ]
        found = " ".join(results["findings"])
        for part in (
            "forget quality",
            "model utility (TOFU)",
            "membership inference",
            "4 groups",
            "as the CUD paper found: ",
            "sampled answers (secret): leak@4 ",
            "secret: probability ",
            "relearning, 3 steps: the 8 forget samples that were not taught change by ",
            "quantisation, 4 bits: the forget samples change by ",
        ):
            assert part in found
        verdict = results["verdict"]
        assert [row["how"] for row in verdict["hidden"]] == [
            "relearning, 3 steps",
            f"quantisation, {verdict['hidden'][1]['how'][-6:]}",
            "rewording",
            "sampled answers",
        ]
        assert all(row["answer"] in ("yes", "no") for row in verdict["hidden"])  # each with its control
        assert {row["measure"] for row in verdict["judged"]} == {"answer probability", "probability of the secret"}
        assert [row["set"] for row in verdict["costs"]] == ["retain"] * 2 + ["neighbour"] * 2 and len(
            verdict["ids"]
        ) <= 10
        assert "3 metrics are compared" in results["difficulty"]["note"]
        assert results["conditions"][0]["final"]["neighbour"]["probability"]["value"] > 0
        assert all("kendall" in row for row in results["difficulty"]["objectives"][0]["rows"])
        frame = pd.read_parquet(everything / "per_sample.parquet")
        assert len(frame) == 12 and {"truth_ratio", "min_k", "reference/probability", "group", "bucket"} <= set(frame)
        assert "true_answer" not in frame
        kinds = ("rouge", "verbatim", "entailment", "secret")
        assert {f"{of}leaks_{kind}" for kind in kinds for of in ("", "before/", "reference/")} <= set(frame)
        assert {"secret_probability", "secret_verbatim", "before/secret_probability"} <= set(frame)
        assert {"quantised/4 bits", "relearned/3", "relearn_taught"} <= set(frame) and frame[
            "relearn_taught"
        ].sum() == 4
        assert frame["leaks_rouge"].between(0, 4).all()

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
        rest = frame[~frame["relearn_taught"]]
        attacks = {(row["attack"], row["condition"]): row for row in results["attacks"]}
        row = attacks["relearning", "3 steps"]
        assert row["change"]["value"] == pytest.approx((rest["relearned/3"] - rest["probability"]).mean())
        assert row["n"] == 8 and row["n_control"] == 9 and row["over"] == "groups"
        assert row["beyond"]["value"] == pytest.approx(row["change"]["value"] - row["control"]["value"])
        with robustness.quantised(model, 4):
            rounded = answer_probability(model, holdout)
        change = rounded.mean() - answer_probability(model, holdout).mean()
        assert attacks["quantisation", "4 bits"]["control"]["value"] == pytest.approx(change, abs=1e-6)
        every = leak_at_k(frame["leaks_entailment"].to_numpy(), 4, 2)
        assert tables["leak"]["entailment, k = 2"][0]["value"] == pytest.approx(every.mean())
        assert tables["secret"]["secret"][1]["value"] == pytest.approx(frame["secret_probability"].mean())
        assert "--secret_pattern ... --nli_model" in results["run"]["command"]

    def test_layers(self, world, everything):
        """Depth, lens and gradients of the report from their functions."""
        results = json.loads((everything / "results.json").read_text())
        frame = pd.read_parquet(everything / "per_sample.parquet")
        data = prepare_samples(tofu_like(12).select_columns(["question", "answer"]), make_tokenizer())
        original, unlearned, reference = (make_model(seed) for seed in (0, 1, 2))
        d1, d2 = (depth.layer_drops(original, one, data) for one in (reference, unlearned))
        np.testing.assert_allclose(np.stack(frame["depth_drops"]), d2, atol=1e-5)
        np.testing.assert_allclose(np.stack(frame["reference_depth_drops"]), d1, atol=1e-5)
        found = depth.unlearning_depth(d1, d2)
        np.testing.assert_allclose(frame["uds"], found, atol=1e-3)
        tables = {table["id"]: {row["label"]: row["cells"] for row in table["rows"]} for table in results["tables"]}
        assert tables["depth"]["UDS"][0] == np.isfinite(found).sum() > 0
        assert tables["depth"]["UDS"][1]["value"] == pytest.approx(np.nanmean(found), abs=1e-3)
        held = np.isfinite(found) & (frame["bucket"] == 3)
        assert tables["depth"]["UDS"][4]["value"] == pytest.approx(found[held].mean(), abs=1e-3)
        lens = depth.logit_lens(original, data)
        np.testing.assert_allclose(frame["before/logit_lens"], lens.max(1), rtol=1e-4)
        curve = results["layers"]["lens"][2]
        assert curve["label"] == "original"
        assert [value["value"] for value in curve["values"]] == pytest.approx(lens.mean(0), rel=1e-4)
        assert [c["label"] for c in results["layers"]["drops"]] == [
            "states of the unlearned model",
            "states of the reference model",
        ]
        norms = gradient_norms(unlearned, data)
        np.testing.assert_allclose(frame["gradient_norm"], norms, rtol=1e-3)
        others = prepare_samples(tofu_like(9, 200).select_columns(["question", "answer"]), make_tokenizer())
        auc = privacy.attack_auc(norms, gradient_norms(unlearned, others))
        assert tables["privacy"]["gradient_norm"][0]["value"] == pytest.approx(auc, abs=0.01)
        assert (everything / "plots" / "layers.svg").is_file()
        assert "Layer by layer" in (everything / "report.html").read_text()

    def test_depth_without_a_reference_has_its_own_name(self, world, tmp_path):
        options = {"original_model": world / "original", "depth": True, "generate": False}
        assert main(arguments(world, tmp_path / "out", model_name_or_path=world / "adapter", **options)) == 0
        frame = pd.read_parquet(tmp_path / "out" / "per_sample.parquet")
        assert "depth_of_change" in frame and "uds" not in frame
        text = "".join((tmp_path / "out" / name).read_text() for name in ("results.json", "summary.md"))
        assert "depth of change" in text and "| UDS" not in text and '"uds"' not in text

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
            assert (
                main(
                    arguments(
                        world,
                        tmp_path / f"out-{name.name}",
                        model_name_or_path=name,
                        generate=False,
                        original_model=world / "original",
                        straight_line=True,
                        quantize=[8],
                        relearn_samples=2,
                    )
                )
                == 0
            )
            frames.append(pd.read_parquet(tmp_path / f"out-{name.name}" / "per_sample.parquet"))
        np.testing.assert_allclose(frames[0]["probability"], frames[1]["probability"], rtol=1e-4)

    def test_another_engine_gives_the_same_figures(self, world, tmp_path, monkeypatch, capsys):
        """Models are measured each with its own folder; what can be seen beforehand is refused before one is loaded."""
        monkeypatch.setitem(sys.modules, "vllm", vllm_here)
        monkeypatch.setattr(vllm_here, "MADE", [])
        few = world / "retain.jsonl"
        options = {
            "original_model": world / "original",
            "forget_dataset": few,
            "retain_dataset": world / "holdout.jsonl",
        }
        for engine in ("transformers", "vllm"):
            assert main(arguments(world, tmp_path / engine, **options, generation_engine=engine)) == 0
        found = [pd.read_parquet(tmp_path / engine / "per_sample.parquet") for engine in ("transformers", "vllm")]
        pd.testing.assert_frame_equal(*found)
        assert {"rouge_l_recall", "verbatim"} <= {name.split("/")[-1] for name in found[0]}
        assert [made["model"] for made in vllm_here.MADE] == [str(world / "original"), str(world / "unlearned")]
        capsys.readouterr()
        adapter = {"model_name_or_path": world / "adapter", "generation_engine": "vllm"}
        assert main(arguments(world, tmp_path / "adapter", **{**options, **adapter})) == 2
        assert "generation_engine vllm takes a folder with a whole model, model_name_or_path" in capsys.readouterr().err
        assert len(vllm_here.MADE) == 2

    def test_text_only_if_asked_for(self, world, tmp_path):
        assert main(arguments(world, tmp_path / "out", generate=False, show_text=True)) == 0
        assert "of the town" in pd.read_parquet(tmp_path / "out" / "per_sample.parquet")["true_answer"][0]

    def test_nothing_unlearned_is_said(self, world, tmp_path):
        assert (
            main(
                arguments(
                    world,
                    tmp_path / "o",
                    generate=False,
                    model_name_or_path=world / "original",
                    original_model=world / "original",
                )
            )
            == 0
        )
        assert "nothing was unlearned" in json.loads((tmp_path / "o" / "results.json").read_text())["findings"][0]

    def test_a_model_that_diverged_gets_its_report(self, world, tmp_path):
        """One sample that is not finite under it, by its author's name: every other figure is there."""
        model, tokenizer = make_model(1, num_hidden_layers=1), make_tokenizer()
        rows = [{**row, "answer": row["answer"].replace("77", "Z")} for row in tofu_like(12)]
        rows[3]["perturbed_answer"][1] = None
        (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        model.model.embed_tokens.weight.data[tokenizer("Z")["input_ids"][0]] = float("inf")
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        ids = prepare_samples(tofu_like(12).map(lambda _, i: rows[i], with_indices=True), tokenizer).ids
        DifficultyScores(ids, {"loss": np.arange(12.0), "length": np.arange(12.0) % 3}).save(tmp_path / "s.parquet")
        options = {
            "model_name_or_path": tmp_path / "model",
            "forget_dataset": tmp_path / "forget.jsonl",
            "scores": tmp_path / "s.parquet",
            "holdout_dataset": world / "holdout.jsonl",
            "reference_model": world / "reference",
            "group_column": "author",
            "quantize": [8],
            "relearn_samples": 2,
            "samples": 1,
        }
        assert main(arguments(world, tmp_path / "out", **options)) == 0
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        final = results["conditions"][0]["final"]
        assert results["findings"][0] == "the model has weights that are not finite: unlearning diverged"
        assert final["forget"]["probability"]["reason"] == "1 of 12 are not finite"
        assert final["retain"]["probability"]["value"] > 0 and final["forget"]["verbatim"]["value"] == 0
        assert [row["probability"]["value"] is None for row in final["buckets"]] == [False, False, False, True]
        tables = {table["id"]: {row["label"]: row["cells"] for row in table["rows"]} for table in results["tables"]}
        assert tables["privacy"]["loss"][0]["reason"] == "1 of 12 are not finite"
        assert tables["privacy"]["loss"][2]["value"] is not None
        # of the true answer of one sample, and of a wrong one of another
        assert tables["forget_quality"]["unlearned"][0]["reason"] == "1 of 12 are not finite"
        assert tables["forget_quality"]["reference"][0]["reason"] == "1 of 12 are not finite"
        assert sum(cells[1]["value"] is None for cells in tables["groups"].values()) == 1
        page = (tmp_path / "out" / "report.html").read_text()
        assert "1 of 12 are not finite" in page and "n/a (1 of 12" in (tmp_path / "out" / "summary.md").read_text()

    def test_names_and_texts_are_refused_before_any_model_is_loaded(self, world, tmp_path, capsys, monkeypatch):
        def loads(*args):
            raise AssertionError("a model was loaded")

        monkeypatch.setattr("evaluation.commands.inputs.load_model", loads)
        ids = DifficultyScores.load(world / "scores.parquet").ids
        for name in ("probability", "before/verbatim", "uds", "leaks_rouge", "relearned/3", "group"):
            DifficultyScores(ids, {name: np.arange(12.0)}).save(tmp_path / "s.csv", overwrite=True)
            assert main(arguments(world, tmp_path / "out", scores=tmp_path / "s.csv")) == 2
            assert f"the scores have a metric '{name}', which is a column" in capsys.readouterr().err
        rows = [*tofu_like(3)]
        rows[1]["perturbed_answer"] = ["only one"]
        (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(arguments(world, tmp_path / "out", forget_dataset=tmp_path / "forget.jsonl")) == 2
        assert "forget sample '1' has 1 answers, '0', the first, has 3" in capsys.readouterr().err

    def test_groups_that_look_alike(self, world, tmp_path):
        rows = [{**row, "author": [None, "None", "A"][i % 3]} for i, row in enumerate(tofu_like(6))]
        (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"forget_dataset": tmp_path / "forget.jsonl", "group_column": "author", "generate": False}
        assert main(arguments(world, tmp_path / "out", **options)) == 0
        frame = pd.read_parquet(tmp_path / "out" / "per_sample.parquet")
        assert frame["group"].tolist() == ["None", "'None'", "A"] * 2

    def test_secrets_of_a_column(self, world, tmp_path, capsys):
        """Beside the whole answer, of the samples that have one; neither text nor pattern is written down."""
        rows = [
            {**row, "id": f"s{i}", "ssn": row["answer"].split()[1] if i else None} for i, row in enumerate(tofu_like(6))
        ]
        options = {"forget_dataset": tmp_path / "forget.jsonl", "columns": "question=question,answer=answer,secret=ssn"}
        (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(arguments(world, tmp_path / "out", **options)) == 0
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        (table,) = [table for table in results["tables"] if table["id"] == "secret"]
        assert [row["cells"][0] for row in table["rows"]] == [5, 5] and "5 of 6" in table["note"]
        frame = pd.read_parquet(tmp_path / "out" / "per_sample.parquet")
        assert frame["secret_probability"].isna().tolist() == [True] + 5 * [False]
        rows[2]["ssn"] = "hush"
        (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(arguments(world, tmp_path / "no", **options)) == 2
        said = capsys.readouterr().err
        assert "forget sample 's2': its secret does not occur in its answer" in said and "hush" not in said

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
            ({"depth": True}, "depth has no effect without original_model"),
            ({"depth": True, "original_model": "deep"}, "num_hidden_layers 2 and 3"),
            ({"gradient_norm": True}, "gradient_norm has no effect without holdout_dataset or holdout_config"),
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
            make_model(0, num_hidden_layers=3).save_pretrained(world / "deep")
            make_tokenizer().save_pretrained(world / "deep")
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
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={tmp_path}",
                "--no-first-run",
                "--disable-background-networking",
                "--enable-logging=stderr",
                "--v=0",
                "--dump-dom",
                f"file://{everything / 'report.html'}",
            ],
            capture_output=True,
            text=True,
        )
        assert "<title>Residual memorisation of unlearned</title>" in done.stdout
        assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert '<img src="x"' not in done.stdout and "Membership inference" in done.stdout
