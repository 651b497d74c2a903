"""CUDTrainer: what is served, what is optimised, resume, processes, adapters, refusals."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from datasets import Dataset
from peft import LoraConfig
from runs import checksum, config, make_trainer, torchrun

from cud_trainer import CUDConfig, CUDTrainer, DifficultyScores
from cud_trainer.data import pad_batch, prepare_samples
from cud_trainer.logprobs import answer_probability, score_answers
from cud_trainer.preserving import DEFAULT_SCHEDULE, UNLIKELIHOOD
from cud_trainer.trainer import DivergenceError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """One uninterrupted run of 9 forget samples, twice, in batches of 4: five steps, the last one short."""
    trainer = make_trainer(tmp_path_factory.mktemp("runs") / "straight")
    trainer.train()
    return trainer


class TestServed:
    def test_the_plan_is_served(self, straight):
        assert straight.served_ids == straight.schedule.order.tolist()
        assert len(straight.served_ids) == 18
        assert sorted(straight.served_ids[:9]) == sorted(straight.forget_ids)
        difficulty = dict(zip(straight.forget_ids, straight.difficulty_scores["loss"], strict=True))
        for part in (straight.served_ids[:9], straight.served_ids[9:]):
            assert [difficulty[i] for i in part] == sorted(difficulty.values())

    def test_hard_to_easy_is_the_reverse(self, straight, tmp_path):
        trainer = make_trainer(tmp_path / "out", schedule="hard_to_easy", passes=1)
        trainer.train()
        assert trainer.served_ids == straight.served_ids[:9][::-1]

    @pytest.mark.parametrize(
        "options",
        [
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2},
            {"gradient_checkpointing": False},
        ],
        ids=["accumulation", "workers", "no checkpointing"],
    )
    def test_any_split_of_the_batch_gives_the_same_run(self, straight, tmp_path, options):
        trainer = make_trainer(tmp_path / "out", **options)
        trainer.train()
        assert trainer.served_ids == straight.served_ids
        assert checksum(trainer.model) == pytest.approx(checksum(straight.model), rel=1e-10)

    def test_the_seed_decides_the_order(self, tmp_path):
        orders = [
            make_trainer(tmp_path / f"{i}", schedule="uniform", seed=seed).schedule.order.tolist()
            for i, seed in enumerate((1, 1, 2))
        ]
        assert orders[0] == orders[1] != orders[2]


class TestResume:
    @pytest.mark.parametrize("step", [2, 4])
    def test_continues_bit_for_bit(self, straight, tmp_path, step):
        first = make_trainer(tmp_path / "out")
        first.train()
        model = make_model(0).double()
        resumed = make_trainer(tmp_path / "out", model=model)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        assert resumed.served_ids == straight.served_ids
        assert checksum(resumed.model) == checksum(straight.model)

    def test_scores_are_not_computed_again(self, tmp_path, monkeypatch):
        first = make_trainer(tmp_path / "out")
        first.train()
        monkeypatch.setattr("cud_trainer.training.plan.score_difficulty", lambda *a, **k: pytest.fail("computed again"))
        resumed = make_trainer(tmp_path / "out")
        assert (resumed.difficulty_scores["loss"] == first.difficulty_scores["loss"]).all()

    def test_another_schedule_or_batch_is_refused(self, tmp_path):
        make_trainer(tmp_path / "out").train()
        for options, what in (
            ({"schedule": "hard_to_easy"}, "schedule"),
            ({"per_device_train_batch_size": 3}, "global batch"),
        ):
            trainer = make_trainer(tmp_path / "out", **options)
            with pytest.raises(ValueError, match=f"cannot resume.*its {what}"):
                trainer.train(resume_from_checkpoint=True)

    def test_incomplete_checkpoint_is_refused(self, tmp_path):
        trainer = make_trainer(tmp_path / "out")
        (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
        with pytest.raises(ValueError, match="no complete checkpoint"):
            trainer.train(resume_from_checkpoint=True)

    def test_results_are_not_overwritten(self, tmp_path):
        make_trainer(tmp_path / "out").train()
        with pytest.raises(ValueError, match="not empty"):
            make_trainer(tmp_path / "out").train()
        make_trainer(tmp_path / "out", overwrite=True).train()
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match="not empty"):
            make_trainer(tmp_path / "other")


@pytest.mark.subprocess
class TestTwoProcesses:
    def test_same_run_straight_and_resumed(self, straight, tmp_path):
        small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        checkpoint = tmp_path / "out" / "checkpoint-4"
        results = [
            torchrun(tmp_path / "out", tmp_path / "a.json", **small),
            torchrun(tmp_path / "out", tmp_path / "b.json", checkpoint, **small),
            torchrun(tmp_path / "out2", tmp_path / "c.json", per_device_train_batch_size=2),
        ]
        for result in results:
            assert result["served"] == result["planned"] == straight.served_ids
            assert result["checksum"] == pytest.approx(checksum(straight.model), rel=1e-10)


class TestLoss:
    def test_equals_the_formula_by_hand(self, tmp_path):
        """First step of weighted GradDiff with 3 * retain NLL, from the model's own logits, one sample at a time."""
        forget, retain, tokenizer = qa_dataset(4), qa_dataset(4, 100), make_tokenizer()
        model = make_model(0).double()
        trainer = make_trainer(
            tmp_path / "out",
            model=model,
            forget=forget,
            retain=retain,
            schedule="upweight_hard",
            passes=1,
            retain_weight=3.0,
            objective="graddiff",
        )
        prepared = {d["sample_id"]: d for part in (forget, retain) for d in prepare_samples(part, tokenizer)}

        def logps(sample):
            tokens, labels = torch.tensor(sample["input_ids"]), torch.tensor(sample["labels"])
            with torch.no_grad():
                logits = model(tokens[None]).logits[0]
            picked = logits.log_softmax(-1)[:-1].gather(-1, tokens[1:, None]).squeeze(-1)
            return picked[labels[1:] != -100]

        expected = 0.0
        for index in range(4):
            weight = trainer.schedule.weight[index]
            expected += weight * float(logps(prepared[trainer.schedule.order[index]]).mean())
            expected += 3.0 * -float(logps(prepared[trainer.schedule.retain_id[index]]).mean())
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected / 4, rel=1e-6)  # logged in float32

    def test_short_last_batch_is_a_mean_over_its_real_rows(self, tmp_path):
        trainer = make_trainer(tmp_path / "out", forget=qa_dataset(5), schedule="uniform", passes=1)
        rows = trainer.train_dataset
        assert len(rows) == 8 and rows["row"][5:] == [-1, -1, -1]
        assert rows["weight"][:4] == [1.0] * 4 and rows["weight"][4:] == [4.0, 0.0, 0.0, 0.0]

    @pytest.mark.parametrize("objective", ["ga", "graddiff", "npo", "simnpo"])
    @pytest.mark.parametrize("retain_loss", [None, "kl"])
    def test_every_objective_lowers_the_forget_probability(self, tmp_path, objective, retain_loss):
        trainer = make_trainer(
            tmp_path / "out",
            objective=objective,
            retain_loss=retain_loss,
            passes=4,
            schedule="uniform",
            learning_rate=3e-3,
            save_strategy="no",
            # At the usual beta a sample that was never memorised counts as forgotten.
            objective_args={"beta": 0.1} if objective == "simnpo" else {},
        )
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "forget_prob" in entry]
        assert history[-1]["forget_prob"] < 0.7 * history[0]["forget_prob"]
        assert ("retain_loss" in history[0]) == (objective != "ga" or retain_loss is not None)

    def test_weights_act_under_default_settings(self, tmp_path):
        sums = [
            checksum(run.model)
            for run in (
                make_trainer(tmp_path / name, schedule=name, passes=3, save_strategy="no", seed=3)
                for name in ("uniform", "upweight_hard", "upweight_easy")
            )
            if run.train()
        ]
        assert len({round(value, 8) for value in sums}) == 3

    def test_reference_is_scored_in_the_precision_of_the_run(self, tmp_path):
        # One sample at a time, so that the batches are the same on both sides: some CPUs round bfloat16 differently in
        # batches of another shape.
        alone = {"per_device_train_batch_size": 1, "passes": 1}
        trainers = {
            name: make_trainer(
                tmp_path / name, model=make_model(0), bf16=name != "float32", save_strategy="no", **alone
            )
            for name in ("float32", "bfloat16", "mixed")
        }
        trainers["mixed"].reference = trainers["float32"].reference
        first = {}
        for name, trainer in trainers.items():
            trainer.train()
            first[name] = trainer.state.log_history[0]
        off = {name: abs(entry["forget_loss"] - 20 * math.log(2)) for name, entry in first.items()}
        assert max(off["float32"], off["bfloat16"]) < 1e-5  # the log-ratio is 0
        assert off["mixed"] > 1e-4
        assert abs(first["bfloat16"]["retain_loss"] - first["float32"]["retain_loss"]) > 1e-6  # it was really used

    def test_kl_of_the_unchanged_model_is_zero(self, tmp_path):
        trainer = make_trainer(tmp_path / "out", retain_loss="kl", reference_top_k=5, save_strategy="no")
        trainer.train()
        assert trainer.state.log_history[0]["retain_loss"] == pytest.approx(0, abs=1e-12)
        assert trainer.state.log_history[-2]["retain_loss"] > 1e-6


class TestOptionsBySample:
    """At the first step NPO's log-ratios are 0: a sample's loss is (2 / beta_i) log 2."""

    def first(self, tmp_path, name, by, **options):
        trainer = make_trainer(
            tmp_path / name, objective_args={"beta": 0.2, "beta_by": by}, schedule="uniform", passes=1, **options
        )
        trainer.train()
        return trainer

    @pytest.mark.parametrize("by", ["length", "difficulty"])
    def test_by_hand_and_under_any_split(self, tmp_path, by):
        whole = self.first(tmp_path, "a", by)
        split = self.first(tmp_path, "b", by, per_device_train_batch_size=1, gradient_accumulation_steps=4)
        if by == "length":
            n = whole.forget.answer_lengths
            beta = 0.2 * n.mean() / n
        else:
            order = np.argsort(np.argsort(whole.difficulty_scores["loss"]))
            beta = 0.2 * 2 ** (1 - 2 * order / 8)
        rows = [whole.forget_ids.index(i) for i in whole.schedule.order[:4]]
        assert whole.state.log_history[0]["forget_loss"] == pytest.approx((2 * math.log(2) / beta[rows]).mean())
        assert checksum(split.model) == pytest.approx(checksum(whole.model), rel=1e-10)

    def test_a_checkpoint_of_other_scores_is_refused(self, tmp_path):
        ids = prepare_samples(qa_dataset(9), make_tokenizer())["sample_id"]
        for values in (np.arange(9.0), -np.arange(9.0)):
            trainer = make_trainer(
                tmp_path / "out",
                objective_args={"beta_by": "difficulty"},
                schedule="uniform",
                difficulty_scores=DifficultyScores(ids, {"loss": values}),
            )
            if values[-1] > 0:
                trainer.train()
        with pytest.raises(ValueError, match="cannot resume.*its objective is"):
            trainer.train(resume_from_checkpoint=True)
        with pytest.raises(ValueError, match="no difficulty metric 'length'"):
            make_trainer(
                tmp_path / "other",
                objective_args={"beta_by": "difficulty"},
                schedule="uniform",
                difficulty="length",
                difficulty_scores=DifficultyScores(ids, {"loss": np.arange(9.0)}),
            )
        with pytest.raises(ValueError, match="has an option by difficulty, but difficulty is 'none'"):
            config(tmp_path, objective_args={"beta_by": "difficulty"}, difficulty="none", schedule="uniform")


class TestLogging:
    def test_buckets_and_metrics(self, straight):
        entry = straight.state.log_history[0]
        assert {"loss", "forget_loss", "retain_loss", "forget_prob", "grad_norm"} <= set(entry)
        first_batch = {f"forget_prob/bucket_{i}" for i in (1, 2)}  # the easiest four of nine samples
        assert {key for key in entry if key.startswith("forget_prob/")} == first_batch

    def test_divergence_stops_and_keeps_the_last_good_checkpoint(self, tmp_path):
        trainer = make_trainer(
            tmp_path / "out",
            objective="ga",
            learning_rate=1e3,
            passes=8,
            max_grad_norm=0.0,
            save_steps=1,
            save_total_limit=1,
            optim="sgd",
        )
        with pytest.raises(DivergenceError, match="not finite"):
            trainer.train()
        from safetensors.torch import load_file

        checkpoints = sorted((tmp_path / "out").glob("checkpoint-*"))
        weights = load_file(checkpoints[-1] / "model.safetensors")
        assert all(torch.isfinite(w).all() for w in weights.values())
        assert not any(entry.get("loss") == 0.0 for entry in trainer.state.log_history)


class TestAdapters:
    def test_lora_trains_the_adapter_only_and_scores_with_an_adapter(self, tmp_path):
        model = make_model(0)
        before = {name: p.clone() for name, p in model.named_parameters()}
        trainer = make_trainer(
            tmp_path / "out",
            model=model,
            difficulty="cud",
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.3),
            learning_rate=1e-2,
            folds=3,
        )
        assert trainer.difficulty_scores.provenance["calibration"]["adapter"] is True
        trainer.train()
        assert trainer.state.log_history[0]["forget_loss"] == pytest.approx(-20 * math.log(0.5), rel=1e-5)
        trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
        assert trained and all("lora_" in name for name in trained)
        for name, parameter in trainer.model.get_base_model().named_parameters():
            if "lora_" not in name:
                assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name

    def test_saved_model_loads(self, straight, tmp_path):
        from transformers import AutoModelForCausalLM

        straight.save_model(str(tmp_path / "final"))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float64)
        assert checksum(again) == pytest.approx(checksum(straight.model))
        card = (Path(straight.args.output_dir) / "README.md").read_text()
        assert "- unlearning" in card and "cud-trainer" in card

    def test_model_by_path(self, tmp_path):
        make_model(0).save_pretrained(tmp_path / "model")
        make_tokenizer().save_pretrained(tmp_path / "model")
        trainer = CUDTrainer(
            str(tmp_path / "model"),
            config(tmp_path / "out"),
            forget_dataset=qa_dataset(9),
            retain_dataset=qa_dataset(3, 50),
        )
        trainer.train()
        assert len(trainer.served_ids) == 18


class TestScores:
    def test_given_scores_are_joined_by_id(self, tmp_path):
        ids = prepare_samples(qa_dataset(9), make_tokenizer())["sample_id"]
        values = np.arange(9.0)
        shuffled = np.random.default_rng(0).permutation(9)
        scores = DifficultyScores([ids[i] for i in shuffled], {"loss": values[shuffled]})
        trainer = make_trainer(tmp_path / "out", difficulty_scores=scores, passes=1)
        trainer.train()
        assert trainer.served_ids == list(ids)

    def test_scores_of_other_samples_or_models_are_refused(self, tmp_path):
        ids = prepare_samples(qa_dataset(9, 50), make_tokenizer())["sample_id"]
        with pytest.raises(ValueError, match="lack 9 of 9 forget samples"):
            make_trainer(tmp_path / "a", difficulty_scores=DifficultyScores(ids, {"loss": np.arange(9.0)}))
        ids = prepare_samples(qa_dataset(9), make_tokenizer())["sample_id"]
        foreign = DifficultyScores(ids, {"loss": np.arange(9.0)}, provenance={"model": "another"})
        with pytest.raises(ValueError, match="belong to something else: model"):
            make_trainer(tmp_path / "b", difficulty_scores=foreign)
        with pytest.raises(ValueError, match="no difficulty metric 'circuit_mass'"):
            make_trainer(
                tmp_path / "c",
                difficulty_scores=DifficultyScores(ids, {"loss": np.arange(9.0)}),
                schedule="inverse_mass",
            )

    def test_a_schedule_that_reads_several(self, tmp_path):
        """`risk` weights both sides of a pair: the first step by hand."""
        ids = prepare_samples(qa_dataset(4), make_tokenizer())["sample_id"]
        scores = DifficultyScores(
            ids, {"loss": np.array([-1.0, -3.0, -2.0, 0.0]), "grad_alignment": np.array([0.1, 0.4, -0.2, 0.0])}
        )
        options = {"forget": qa_dataset(4), "retain": qa_dataset(4, 100), "objective": "graddiff", "passes": 1}
        trainer = make_trainer(tmp_path / "out", schedule="risk", difficulty_scores=scores, **options)
        plan = trainer.schedule
        forget, retain = (
            {
                sample["sample_id"]: score_answers(trainer.model, pad_batch([sample], 0)).mean_logps.item()
                for sample in s
            }
            for s in (trainer.forget, trainer.retain)
        )
        expected = np.mean(
            [
                w * forget[f] - v * retain[r]
                for f, w, r, v in zip(plan.order, plan.weight, plan.retain_id, plan.retain_weight, strict=True)
            ]
        )
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-6)
        assert np.ptp(plan.retain_weight) > 0.5

    def test_stop_at_what_a_model_says_that_never_saw_the_sample(self, tmp_path):
        make_model(1).double().save_pretrained(tmp_path / "other")
        trainer = make_trainer(
            tmp_path / "out",
            difficulty="memorization",
            difficulty_args={"reference_model": str(tmp_path / "other")},
            schedule="never_seen_stop",
            passes=1,
        )
        values = trainer.schedule.values
        expected = answer_probability(make_model(1).double(), trainer.forget)
        np.testing.assert_allclose(np.exp(values["loss"] - values["memorization"]), expected, rtol=1e-6)
        at_start = answer_probability(trainer.model, trainer.forget)
        assert (trainer.progress.factor == (at_start > expected)).all() and 0 < trainer.progress.factor.mean() < 1

    def test_default_schedule(self, tmp_path):
        """It reads no difficulty, and one is computed only where something reads it. A name given stays."""
        options = {"schedule": None, "difficulty": "loss"}
        alone = config(tmp_path, **options)
        preserving = config(tmp_path, **options, objective="graddiff", preserve=None)
        assert alone.schedule == DEFAULT_SCHEDULE == "odds+per_sample_stop"
        assert preserving.schedule == UNLIKELIHOOD == "unlikelihood+per_sample_stop"
        assert alone.schedule_metrics == [] == preserving.schedule_metrics
        told = CUDConfig.__dataclass_fields__["schedule"].metadata["help"]  # a literal, which the documentation reads
        assert repr(alone.schedule) in told and repr(preserving.schedule) in told
        assert config(tmp_path, difficulty="none", schedule="uniform").schedule == "uniform"
        named = config(tmp_path, **options, schedule_args={"odds": {"power": 1.0}})
        assert named.schedule == alone.schedule
        by_hand = config(tmp_path, difficulty="none", schedule=UNLIKELIHOOD)
        assert by_hand.schedule_args == preserving.schedule_args == {"per_sample_stop": {"target": 0.05}}
        other = {"per_sample_stop": {"target": 0.2}}
        assert config(tmp_path, schedule=UNLIKELIHOOD, schedule_args=other).schedule_args == other
        with pytest.raises(ValueError, match="schedule 'odds' needs power in"):
            config(tmp_path, **options, schedule_args={"odds": {"power": -1.0}})

    def test_difficulty_auto_is_what_is_read(self, tmp_path):
        def chosen(**options):
            return config(tmp_path, **{"difficulty": "auto", "schedule": None, **options}).difficulty

        assert chosen() is None and chosen(schedule="tail+per_sample_stop") is None
        assert chosen(schedule="upweight_hard") == "cud" == chosen(schedule="inverse_mass+easy_to_hard")
        assert chosen(schedule="inverse_mass") == "circuit_mass"  # and no calibration for it
        assert chosen(objective_by_bucket={"4": {"objective": "graddiff"}}) == "cud"
        assert chosen(schedule="uniform", objective_args={"beta_by": "difficulty"}) == "cud"
        ids = make_trainer(tmp_path / "a").forget.ids
        given = DifficultyScores(ids, {"mine": np.arange(float(len(ids)))})
        options = {"difficulty": "auto", "schedule": None, "difficulty_scores": given}
        trainer = make_trainer(tmp_path / "b", **options)
        assert trainer.args.difficulty == "given" and len(set(trainer.buckets)) == trainer.args.n_buckets
        trainer.args.use_scores(())  # of the next trainer, which is given none
        assert trainer.args.difficulty is None

    def test_difficulty_none_costs_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr("cud_trainer.training.plan.score_difficulty", lambda *a, **k: pytest.fail("computed"))
        trainer = make_trainer(tmp_path / "out", difficulty="none", schedule="uniform")
        assert trainer.difficulty_scores is None
        trainer.train()

    def test_eval_dataset_in_any_format(self, tmp_path):
        trainer = make_trainer(
            tmp_path / "out", eval_dataset={"kept": qa_dataset(3, 200)}, eval_strategy="steps", eval_steps=2
        )
        trainer.train()
        logged = [entry["eval_kept_loss"] for entry in trainer.state.log_history if "eval_kept_loss" in entry]
        assert len(logged) == 3
        assert trainer.evaluate(qa_dataset(3, 200))["eval_loss"] == pytest.approx(logged[-1])


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"objective": "rmux"}, "unknown objective 'rmux'; choose one of.*npo"),
            ({"objective_args": {"betta": 1}}, "objective 'npo' has no option 'betta'; it has \\['beta', 'beta_by'\\]"),
            ({"objective_args": {"beta": -1}}, "'beta' of objective 'npo' must be positive"),
            ({"objective": "graddiff", "retain_loss": "none"}, "'graddiff' needs a retain loss"),
            ({"retain_loss": "l2"}, "unknown retain_loss 'l2'; choose one of"),
            ({"retain_weight": -1.0}, "retain_weight must (not be negative|be at least 0)"),
            ({"schedule": "random"}, "unknown schedule 'random'; choose one of.*uniform"),
            ({"schedule": "inverse_mass", "schedule_args": {"cap": 3}}, "no option 'cap'; it has \\['high', 'low'\\]"),
            ({"schedule": "inverse_mass", "schedule_args": {"low": 2}}, "needs 0 <= low <= 1"),
            ({"difficulty": "magic"}, "unknown difficulty metric 'magic'; choose one of.*cud"),
            ({"difficulty": "cud", "difficulty_args": {"variant": "old"}}, "unknown CUD variant 'old'"),
            ({"difficulty": "none"}, "schedule 'easy_to_hard' needs a difficulty metric"),
            ({"passes": 0}, "passes must be (an integer of )?at least 1"),
            ({"num_train_epochs": 3}, "num_train_epochs must be 1.*passes"),
            ({"packing": True}, "packing is not supported"),
            ({"train_sampling_strategy": "group_by_length"}, "would undo the schedule"),
            ({"max_steps": 50}, "max_steps=50 goes beyond the schedule \\(5 steps"),
            ({"n_buckets": 10}, "cannot make 10 difficulty buckets of 9"),
            ({"max_length": 12}, "forget sample .* beyond max_length=12"),
            ({"difficulty": "cud", "folds": 10}, "cannot split 9 samples into 10 folds"),
            ({"group_column": "author"}, "forget dataset has no column 'author'"),
        ],
    )
    def test_options(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path / "out", **options)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    def test_data(self, tmp_path):
        empty = Dataset.from_dict({"question": [], "answer": []})
        with pytest.raises(ValueError, match="forget dataset is empty"):
            make_trainer(tmp_path / "out", forget=empty)
        with pytest.raises(ValueError, match="has the same content as|is in both"):
            make_trainer(tmp_path / "out", retain=qa_dataset(4))
        with pytest.raises(ValueError, match="retain dataset is missing"):
            CUDTrainer(
                make_model(), config(tmp_path / "out"), forget_dataset=qa_dataset(9), processing_class=make_tokenizer()
            )
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["<new>"])
        with pytest.raises(ValueError, match="259 tokens, more than the 258 rows of the model's embeddings"):
            make_trainer(tmp_path / "out", tokenizer=tokenizer)

    def test_options_of_the_tokenizer_act_before_the_data_is_prepared(self, tmp_path):
        tokenizer = make_tokenizer()
        tokenizer.pad_token = None
        end, path = tokenizer.convert_ids_to_tokens(100), tmp_path / "t.jinja"
        path.write_text("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}")
        trainer = make_trainer(tmp_path / "out", tokenizer=tokenizer, eos_token=end)
        assert {sample["labels"][-1] for sample in trainer.forget} == {100} and tokenizer.pad_token == end
        trainer = make_trainer(tmp_path / "chat", tokenizer=tokenizer, chat_template_path=str(path))
        assert tokenizer.decode(trainer.forget[0]["input_ids"]).startswith("<user>Who is")

    def test_architecture(self, tmp_path):
        from transformers import OPTConfig, OPTForCausalLM

        tiny = OPTConfig(
            vocab_size=258, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8, word_embed_proj_dim=8
        )
        with pytest.raises(ValueError, match="'opt'.*available: .*gemma2"):
            make_trainer(tmp_path / "out", model=OPTForCausalLM(tiny), difficulty="cud_top_k")


class TestGivenScores:
    """Scores whose metric nobody has registered here: published ones, say."""

    def scores(self, tmp_path):
        ids = list(prepare_samples(qa_dataset(8), make_tokenizer())["sample_id"])
        path = tmp_path / "ranking.txt"
        path.write_text("\n".join(ids[::-1]))  # from the easiest to the hardest
        return ids, DifficultyScores.published(path, ids, name="theirs")

    def test_the_first_metric_orders(self, tmp_path):
        ids, scores = self.scores(tmp_path)
        trainer = make_trainer(
            tmp_path / "out",
            forget=qa_dataset(8),
            difficulty="given",
            difficulty_scores=scores,
            schedule="easy_to_hard",
        )
        assert trainer.schedule.order.tolist()[:8] == ids[::-1]
        assert trainer.difficulty_scores.metrics == ["given", "theirs"]
        assert trainer.buckets.tolist() == [3, 3, 2, 2, 1, 1, 0, 0]

    def test_refusals(self, tmp_path):
        with pytest.raises(ValueError, match="difficulty 'given' is the first metric of difficulty_scores: give them"):
            make_trainer(tmp_path / "out", difficulty="given")
        with pytest.raises(ValueError, match="difficulty 'given' has no options"):
            make_trainer(tmp_path / "out", difficulty="given", difficulty_args={"variant": "log"})
