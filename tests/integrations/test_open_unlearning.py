"""The open-unlearning plug-in: what its trainers serve and weigh, whose scores they take, and the launcher.

Runs on the stand-in `open_unlearning` beside this file, or on the checkout of the real one in `OPEN_UNLEARNING_ROOT`.
"""

import importlib
import importlib.util
import inspect
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from datasets import Dataset
from processes import run
from transformers import PreTrainedTokenizerBase, TrainingArguments

from cud_trainer import DifficultyScores
from cud_trainer.data import prepare_dataset
from cud_trainer.integrations.open_unlearning import __main__ as launcher
from cud_trainer.integrations.open_unlearning.compat import (
    OPTIONAL,
    plain_chat_tokens,
    stand_ins,
    without_index,
    without_lapsed_arguments,
)
from cud_trainer.integrations.open_unlearning.ids import forget_ids, tokens_of
from cud_trainer.integrations.open_unlearning.losses import FORGET_LOSSES, complete
from cud_trainer.integrations.open_unlearning.trainers import difficulty_aware
from cud_trainer.schedule import make_schedule

TESTS = Path(__file__).parent
REAL = os.environ.get("OPEN_UNLEARNING_ROOT")
ROOT = Path(REAL) if REAL else TESTS / "open_unlearning"
RECIPES = TESTS.parents[1] / "recipes" / "open_unlearning"
N = 10
# What each trainer needs besides its defaults, such that no loss of a random model vanishes.
METHODS = {
    "NPO": {"beta": 0.1},
    "DPO": {"beta": 0.1},
    "SimNPO": {"beta": 0.2, "delta": 0.1, "gamma": 0.125},
    "RMU": {"module_regex": r"model\.layers\.1", "trainable_params_regex": [".*"], "steering_coeff": 2.0},
    "UNDIAL": {"beta": 10.0, "alpha": 0.5},
    "CEU": {"ignore_first_n_answer_tokens": 2},
    "WGA": {"beta": 0.1},
    "SatImp": {"beta1": 0.1, "beta2": 0.5, "gamma": 0.3},
    "PDU": {"retain_loss_eps": 0.1},
}


@pytest.fixture(scope="module", autouse=True)
def theirs():
    """Their packages `trainer` and `data`, as the launcher loads them."""
    before = PreTrainedTokenizerBase.apply_chat_template
    sys.path.insert(0, str(ROOT / "src"))
    plain_chat_tokens()
    with stand_ins(*OPTIONAL):
        trainers = importlib.import_module("trainer")
        importlib.import_module("data")
    launcher.register(trainers)
    yield trainers
    PreTrainedTokenizerBase.apply_chat_template = before
    sys.path.remove(str(ROOT / "src"))
    for name in [name for name in sys.modules if name.split(".")[0] in ("trainer", "data")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Forget and retain set and replies, as files; columns with names of their own."""
    folder = tmp_path_factory.mktemp("data")
    for name, data in (("forget", qa_dataset(N)), ("retain", qa_dataset(7, start=50))):
        data.to_json(folder / f"{name}.json")
    (folder / "idk.txt").write_text("I do not know.\nNo idea.\nNobody told me.\n")
    return folder


def dataset(files, idk=False, anchor="forget", forget="forget.json", **options):
    data = importlib.import_module("data")
    settings = {"template_args": {"apply_chat_template": True}, "tokenizer": make_tokenizer(chat=True), **options}

    def load(kind, name, **more):
        where = {"path": "json", "data_files": str(files / name), "split": "train"}
        return kind(hf_args=where, **settings, **more)

    kind, more = (data.QAwithIdkDataset, {"idk_path": str(files / "idk.txt")}) if idk else (data.QADataset, {})
    parts = load(kind, forget, **more), load(data.QADataset, "retain.json")
    return data.ForgetRetainDataset(*parts, anchor=anchor)


def collate(items):
    return importlib.import_module("data").DataCollatorForSupervisedDataset(make_tokenizer(), index="index")(items)


def scores(data=None, files=None) -> DifficultyScores:
    data = data if data is not None else tokens_of(dataset(files).forget)
    ids = list(prepare_dataset(data, make_tokenizer(chat=True))["sample_id"])
    return DifficultyScores(ids, {"loss": np.random.default_rng(0).permutation(N).astype(float)})


def make(theirs, output, data, name="GradDiff", collator=collate, method=None, **options):
    settings = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "logging_steps": 1,
        "remove_unused_columns": False,
        "eval_strategy": "epoch",
        **options,
    }
    kind = theirs.TRAINER_REGISTRY["CUD" + name]
    method = {"schedule": "easy_to_hard", "difficulty": scores(tokens_of(data.forget)), **(method or {})}
    word = {
        "processing_class"
        if "processing_class" in inspect.signature(theirs.load_trainer).parameters
        else "tokenizer": make_tokenizer(chat=True)
    }
    return kind(
        model=make_model(0).double(),
        args=TrainingArguments(str(output), **settings),
        train_dataset=data,
        data_collator=collator,
        **word,
        **METHODS.get(name, {}),
        **method,
    )


def served_by(trainer):
    """Train, and what was served: forget ids and `(forget, retain)` pairs."""
    inner, pairs = trainer.data_collator, []

    def watched(items):
        for item in items:
            forget = item["forget"].get("original", item["forget"])
            pairs.append((int(forget["index"]), int(item["retain"]["index"])))
        return inner(items)

    trainer.data_collator = watched
    return pairs


class TestLosses:
    @pytest.mark.parametrize("name", FORGET_LOSSES)
    def test_weights_of_one_change_nothing(self, theirs, files, tmp_path, name):
        data = dataset(files, idk=name == "DPO")
        trainer = make(theirs, tmp_path, data, name, method={"schedule": "uniform+upweight_hard"})
        batch = without_index(collate([data[row] for row in (0, 2, 5)]))  # answers of three lengths
        model = trainer.model.eval()
        with torch.no_grad():
            for p in model.parameters():  # away from the start model
                p.mul_(1.02)
        results = {}
        for way, weights in (("own", None), ("ones", [1.0, 1.0, 1.0]), ("weighted", [1.0, 2.0, 0.0])):
            more = {} if weights is None else {"cud_weight": torch.tensor(weights)}
            loss = trainer.compute_loss(model, {**batch, **more})
            model.zero_grad()
            loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            results[way] = loss.item(), gradient
        assert results["ones"][0] == pytest.approx(results["own"][0], rel=1e-5)
        scale = results["own"][1].norm()
        assert (results["ones"][1] - results["own"][1]).norm() < 1e-4 * scale
        assert (results["weighted"][1] - results["own"][1]).norm() > 1e-2 * scale
        with torch.no_grad():
            losses = trainer.per_sample_loss(model, batch)
            mean = (losses * torch.tensor([1.0, 2.0, 0.0])).mean()
            assert losses.shape == (3,)
            assert results["weighted"][0] == pytest.approx(complete(trainer, model, batch, mean).item(), rel=1e-6)

    @pytest.mark.parametrize("name", ["GradDiff", "NPO"])
    def test_first_weighted_step_by_hand(self, theirs, files, tmp_path, name):
        """Losses of their own code on batches of one; the retain term has no weight."""
        data = dataset(files)
        trainer = make(theirs, tmp_path, data, name, method={"schedule": "easy_to_hard+upweight_hard"}, max_grad_norm=0)
        kept, inner = [], trainer.data_collator

        def watched(items):
            kept.append(items)
            return inner(items)

        trainer.data_collator = watched
        fresh = make(theirs, tmp_path, data, name)
        trainer.train()
        plain = [{key: value for key, value in item.items() if key != "cud_weight"} for item in kept[0]]
        weights = np.array([item["cud_weight"] for item in kept[0]])
        assert weights.tolist() == trainer.schedule.weight[:4].tolist() and weights.std() > 0.1
        model = fresh.model.eval()
        retain = fresh.compute_retain_loss(model, without_index(collate(plain))["retain"]).item()
        fresh.alpha = 0.0
        with torch.no_grad():
            forget = np.array([float(fresh.compute_loss(model, collate([item]))) for item in plain])
        tokens = np.array([int((item["forget"]["labels"] != -100).sum()) for item in plain])
        share = tokens / tokens.mean() if name == "GradDiff" else 1.0
        expected = float((weights * forget * share).mean()) + retain
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)

    def test_another_formula_of_that_name_is_noticed(self, theirs, files, tmp_path):
        npo = importlib.import_module("trainer.unlearn.npo" if REAL else "trainer.unlearn.methods").NPO

        class NPO(npo):
            def compute_loss(self, *args, **options):
                return 3 * super().compute_loss(*args, **options)

        theirs._register_trainer(difficulty_aware(NPO))
        try:
            trainer = make(theirs, tmp_path, dataset(files), "NPO", method={"schedule": "upweight_hard"})
            with pytest.raises(ValueError, match="NPO of this version .* is not the one .* use weights: sampling"):
                trainer.train()
        finally:
            theirs._register_trainer(difficulty_aware(npo))

    def test_dual_weight_moves_after_the_warm_up(self, theirs, files, tmp_path):
        """One pass of two is 2.5 steps: the third is without, the fourth with an update."""
        method = {"primal_dual": True, "dual_warmup_epochs": 1, "dual_step_size": 1.0, "schedule": "upweight_hard"}
        trainer = make(theirs, tmp_path, dataset(files), "PDU", method=method)
        found, inner = [], trainer.final_loss_value
        trainer.final_loss_value = lambda losses: (inner(losses), found.append(trainer.preferences[1]))[0]
        trainer.train()
        assert len(found) == 5 and found[:3] == [1.0, 1.0, 1.0] and found[3] > 1.0


class TestOrder:
    def test_the_plan_is_served_whatever_the_split(self, theirs, files, tmp_path):
        """The same forget samples with the same retain partners and replies, also after a resume."""
        runs = []
        for part, options in enumerate(
            [
                {"save_strategy": "steps", "save_steps": 2},
                {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            ]
        ):
            data = dataset(files, idk=True)
            trainer = make(theirs, tmp_path / str(part), data, "DPO", **options)
            pairs = served_by(trainer)
            trainer.train()
            assert trainer.state.global_step == 5
            runs.append((pairs, trainer.state.log_history[-2]["loss"]))
        table = scores(tokens_of(data.forget))
        order = np.argsort(table["loss"], kind="stable").tolist()
        assert [forget for forget, _ in runs[0][0]] == [*order, *order]
        assert trainer.planned_ids == [table.ids[row] for row in [*order, *order]]
        assert runs[1][0] == runs[0][0] and len({retain for _, retain in runs[0][0]}) > 3
        again = make(theirs, tmp_path / "0", dataset(files, idk=True), "DPO", save_strategy="steps", save_steps=2)
        pairs = served_by(again)
        again.train(resume_from_checkpoint=str(tmp_path / "0" / "checkpoint-2"))
        assert pairs == runs[0][0][8:] and again.state.log_history[-2]["loss"] == runs[0][1]

    def test_sampling_and_an_unknown_method(self, theirs, files, tmp_path):
        """A trainer whose losses are not known has the order, and sampling, but no weights."""
        data, name = dataset(files), "GradDiff" if REAL else "Community"
        method = {"schedule": "easy_to_hard+upweight_hard", "weights": "sampling"}
        trainer = make(theirs, tmp_path, data, name, method=method)
        pairs = served_by(trainer)
        trainer.train()
        ids = scores(tokens_of(data.forget)).ids
        assert [ids[forget] for forget, _ in pairs] == trainer.planned_ids
        assert trainer.planned_ids != trainer.schedule.order.tolist()
        if not REAL:
            with pytest.raises(ValueError, match="Community has no per_sample_loss.*use weights='sampling'"):
                make(theirs, tmp_path, data, name, method={**method, "weights": "loss"})

    def test_order_is_that_of_the_schedule(self, theirs, files, tmp_path):
        table = scores(files=files)
        trainer = make(theirs, tmp_path, dataset(files), "NPO", method={"schedule": "hard_to_easy"})
        plan = make_schedule("hard_to_easy", table.ids, difficulty=table["loss"], passes=2, seed=3)
        assert trainer.planned_ids == plan.order.tolist()
        assert type(trainer).__name__ == "CUDNPO" and trainer.tokenizer is trainer.processing_class


class TestIds:
    def test_by_tokens(self, files):
        data = dataset(files)
        assert forget_ids(data, scores(files=files), make_tokenizer(chat=True)) == scores(files=files).ids

    def test_by_rows(self, files):
        """What `cud score` gives for the same file with the same tokenizer, whatever the columns are called."""
        table = scores(qa_dataset(N))
        assert forget_ids(dataset(files), table, make_tokenizer(chat=True)) == table.ids
        qa_dataset(N).rename_columns({"question": "q", "answer": "a"}).to_json(files / "renamed.json")
        data = dataset(files, forget="renamed.json")
        data.forget.question_key, data.forget.answer_key = "q", "a"
        assert forget_ids(data, table, make_tokenizer(chat=True)) == table.ids

    def test_by_column(self, files):
        names = [f"s{row}" for row in range(N)]
        qa_dataset(N).add_column("id", names).to_json(files / "named.json")
        table = DifficultyScores(names[::-1], {"loss": np.arange(N)})
        assert forget_ids(dataset(files, forget="named.json"), table, make_tokenizer(chat=True)) == names

    def test_of_a_copy(self, files):
        """Scores whose ids only another copy of the forget set has; its texts are compared."""
        names = [f"s{row}" for row in range(N)]
        copy = qa_dataset(N).add_column("sample_id", names)
        copy.to_parquet(files / "copy.parquet")
        table, tokenizer = DifficultyScores(names, {"loss": np.arange(N)}), make_tokenizer(chat=True)
        assert forget_ids(dataset(files), table, tokenizer, [str(files / "copy.parquet")]) == names
        copy.select([1, 0, *range(2, N)]).to_parquet(files / "swapped.parquet")
        with pytest.raises(ValueError, match="another sample than the forget set in row 0"):
            forget_ids(dataset(files), table, tokenizer, [str(files / "swapped.parquet"), None, None])
        copy.select(range(4)).to_parquet(files / "short.parquet")
        with pytest.raises(ValueError, match="ids_from has 4 samples, the forget set 10"):
            forget_ids(dataset(files), table, tokenizer, [str(files / "short.parquet")])
        with pytest.raises(ValueError, match="ids_from dataset nothing.json does not exist"):
            forget_ids(dataset(files), table, tokenizer, "nothing.json")
        Dataset.from_dict({"text": ["a"] * N}).to_parquet(files / "text.parquet")
        with pytest.raises(ValueError, match="they have no text column in common"):
            forget_ids(dataset(files), table, tokenizer, [str(files / "text.parquet")])

    def test_scores_of_other_samples(self, files):
        table = scores(qa_dataset(N, start=100))
        with pytest.raises(ValueError) as caught:
            forget_ids(dataset(files), table, make_tokenizer(chat=True))
        message = str(caught.value)
        assert "(10 samples) are not those of this forget set (10 samples)" in message and "ids_from" in message
        assert "their column of ids: none" in message and "their rows: 0 of 10 have scores" in message

    def test_retain_anchor_and_no_forget_set(self, files):
        with pytest.raises(ValueError, match="needs data.anchor=forget, got 'retain'"):
            forget_ids(dataset(files, anchor="retain"), None, None)
        with pytest.raises(ValueError, match="need their ForgetRetainDataset"):
            forget_ids(qa_dataset(3), None, None)
        assert forget_ids(dataset(files), None, None) == [str(row) for row in range(N)]

    def test_export(self, files, tmp_path):
        """What is written has, for `cud score`, the ids that training looks for."""
        data = dataset(files)
        data.retain.data = data.retain.data.select([0, 1, 1, 2])
        with pytest.raises(SystemExit):
            launcher.exporting(tmp_path)(None, None, train_dataset=data)
        forget = Dataset.from_parquet(str(tmp_path / "forget.parquet"))
        assert scores(forget).ids == scores(files=files).ids
        assert len(Dataset.from_parquet(str(tmp_path / "retain.parquet"))) == 3


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("NPO", {"difficulty": None}, "needs difficulty scores: give difficulty"),
        ("NPO", {"difficulty": "nothing.parquet"}, "nothing.parquet"),
        ("NPO", {"schedule": "per_sample_stop"}, "'per_sample_stop' follows the run: that needs CUDTrainer"),
        ("NPO", {"weights": "both"}, "weights must be 'loss' or 'sampling'"),
        ("NPO", {"metric": "cud"}, "no difficulty metric 'cud'"),
        ("PDU", {"primal_dual": True, "dual_update_upon": "epoch"}, "by steps only, since the whole run is one epoch"),
    ],
)
def test_refusals(theirs, files, tmp_path, name, method, message):
    with pytest.raises(ValueError, match=message):
        make(theirs, tmp_path, dataset(files), name, method=method)


def test_configurations_name_what_is_registered(theirs):
    names = sorted(path.stem for path in (RECIPES / "trainer").glob("CUD*.yaml"))
    assert names == sorted(f"CUD{name}" for name in FORGET_LOSSES) and set(names) <= set(theirs.TRAINER_REGISTRY)
    for name in names:
        text = (RECIPES / "trainer" / f"{name}.yaml").read_text()
        assert f"handler: {name}\n" in text and f"  - {name.removeprefix('CUD')}\n  - cud\n" in text
    guide = (RECIPES / "README.md").read_text()
    assert all(f"`{name}`" in guide for name in names)


class TestCompatibility:
    def test_stand_ins_leave_no_trace(self):
        assert importlib.util.find_spec("no_such_package") is None
        with stand_ins("no_such_package", "json"):
            found = importlib.import_module("no_such_package.inner")
            assert importlib.import_module("json") is json
        with pytest.raises(ImportError, match="no_such_package.inner.Thing is needed here"):
            found.Thing()
        with pytest.raises(ImportError):
            importlib.import_module("no_such_package")

    def test_lapsed_arguments(self, monkeypatch):
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "mine")
        load = without_lapsed_arguments(lambda arguments, data: arguments)
        assert load({"logging_dir": "logs", "seed": 1}, None) == {"seed": 1}
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == "mine"

    def test_nested_batches(self):
        assert without_index({"forget": {"original": {"index": 1, "labels": 2}}, "index": 3}) == {
            "forget": {"original": {"labels": 2}}
        }

    def test_launcher_arguments(self, tmp_path, capsys):
        options, hydra = launcher.arguments(["--root", str(ROOT), "--", "trainer=CUDNPO", "task_name=x"])
        assert options.root == ROOT and options.export is None
        assert hydra == ["trainer=CUDNPO", "task_name=x", "--config-name=unlearn.yaml", f"--config-dir={RECIPES}"]
        own = ["--config-dir=mine", "-cn", "train.yaml"]
        assert launcher.arguments(["--root", str(ROOT), "--", *own])[1] == own
        assert launcher.main(["--root", str(tmp_path)]) == 2
        assert "it has no src/train.py; give --root" in capsys.readouterr().err


@pytest.mark.skipif(bool(REAL), reason="the real one needs data and a model of its own")
@pytest.mark.subprocess
def test_launcher_end_to_end(files, tmp_path):
    """Their `train.py` and configurations, our trainer: served by difficulty, weighted, in a process of its own."""
    pytest.importorskip("hydra")
    make_model(0).save_pretrained(tmp_path / "model")
    make_tokenizer(chat=True).save_pretrained(tmp_path / "model")
    table = scores(files=files)
    table.save(tmp_path / "difficulty.parquet")
    arguments = [
        "--root",
        str(ROOT),
        "--",
        "trainer=CUDNPO",
        f"model={tmp_path / 'model'}",
        f"data.forget={files / 'forget.json'}",
        f"data.retain={files / 'retain.json'}",
        f"trainer.args.output_dir={tmp_path / 'out'}",
        f"trainer.method_args.difficulty={tmp_path / 'difficulty.parquet'}",
        "trainer.method_args.schedule=hard_to_easy+upweight_hard",
        "+trainer.method_args.schedule_args.upweight_hard.strength=0.5",
    ]
    done = run("cud_trainer.integrations.open_unlearning", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "served.json").read_text())
    order = np.argsort(-table["loss"], kind="stable").tolist()
    assert found["handler"] == "CUDNPO" and found["served"] == [*order, *order[:2]]  # whole steps of four
    assert len(found["losses"]) == 3 and all(np.isfinite(found["losses"]))
