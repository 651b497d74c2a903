"""What a run of CUDTrainer promises: the same under any split, kill and resume; balance, stops, guards, evaluation."""

import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import SUPPORT, make_model, make_tokenizer, qa_dataset
from datasets import Dataset
from peft import LoraConfig
from processes import run
from runs import checksum, config, make_trainer, torchrun
from safetensors import safe_open
from transformers import TrainerCallback

from cud_trainer import CUDConfig
from cud_trainer.data import pad_batch, prepare_samples
from cud_trainer.logprobs import answer_probability, score_answers
from cud_trainer.models.trainable import layer_range, train_only
from cud_trainer.objectives import OBJECTIVES, UnlearningLoss, register_objective
from cud_trainer.trainer import DivergenceError
from cud_trainer.training.card import unlearning_section
from cud_trainer.training.checkpoints import REFERENCE_FILE

pytestmark = pytest.mark.slow

# Everything that follows the run at once.
LIVELY = {
    "schedule": "hard_to_easy+upweight_hard+per_sample_stop+dynamic+dual",
    "schedule_args": {
        "per_sample_stop": {"target": 0.0012, "start": 0.0015},
        "dynamic": {"every": 2},
        "dual": {"target": 0.001},
    },
    "objective": "graddiff",
    "retain_limit": 5.5,
    "dual_rate": 0.3,
    "passes": 4,
    "save_steps": 1,
    "learning_rate": 3e-3,
}
NEEDS = {"pdu": {"retain_limit": 6.0}, "dpo": {"alternative_column": "other"}}


def with_other(n=9):
    data = qa_dataset(n)
    return data.add_column("other", [f"Nobody {i}" for i in range(n)])


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("runs") / "straight", **LIVELY)
    trainer.train()
    return trainer


class TestFollowing:
    def test_it_does_something(self, lively):
        active = [entry["forget_active"] for entry in lively.state.log_history if "forget_active" in entry]
        weights = [entry["retain_weight"] for entry in lively.state.log_history if "retain_weight" in entry]
        assert min(active) < 1 and len(set(weights)) == len(weights) == 9
        assert lively.served_ids == lively.schedule.order.tolist()
        alone = {"schedule": "hard_to_easy+upweight_hard", "schedule_args": {}}
        assert lively.schedule.dynamic and lively.run_identity()["schedule"] != alone

    def test_retain_weight_by_hand(self, lively):
        """retain_weight += dual_rate * (retain loss - limit), never below 0."""
        history = [entry for entry in lively.state.log_history if "retain_weight" in entry]
        weight = 1.0
        for entry in history:
            assert entry["retain_weight"] == pytest.approx(weight, rel=1e-6)  # logged before the step's own change
            weight = max(0.0, weight + 0.3 * (entry["retain_loss"] - 5.5))
        assert lively.progress.retain_weight == pytest.approx(weight, rel=1e-6)

    def test_retain_weight_goes_to_its_end_by_equal_ratios(self, tmp_path):
        """The plan has nine steps, whatever `max_steps` is; a run that goes on is the same."""
        options = {**LIVELY, "schedule": "uniform", "schedule_args": {}, "retain_limit": None}
        options |= {"retain_weight": 8.0, "retain_weight_end": 0.5}
        trainer = make_trainer(tmp_path / "out", **options)
        trainer.train()
        weights = [entry["retain_weight"] for entry in trainer.state.log_history if "retain_weight" in entry]
        assert weights == pytest.approx([8, 4 * 2**0.5, 4, 2 * 2**0.5, 2, 2**0.5, 1, 2**-0.5, 0.5])
        resumed = make_trainer(tmp_path / "out", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
        assert checksum(resumed.model) == checksum(trainer.model)

    @pytest.mark.parametrize(
        "options",
        [
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2},
        ],
    )
    def test_any_split_gives_the_same_run(self, lively, tmp_path, options):
        trainer = make_trainer(tmp_path / "out", **{**LIVELY, **options})
        trainer.train()
        assert trainer.served_ids == lively.served_ids
        assert checksum(trainer.model) == pytest.approx(checksum(lively.model), rel=1e-10)
        np.testing.assert_allclose(trainer.progress.weights.logps, lively.progress.weights.logps, rtol=1e-10)

    @pytest.mark.parametrize("step", [3, 7])
    def test_resume_is_bit_identical(self, lively, tmp_path, step):
        make_trainer(tmp_path / "out", **LIVELY).train()
        resumed = make_trainer(tmp_path / "out", **LIVELY)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        assert checksum(resumed.model) == checksum(lively.model)
        assert resumed.progress.state() == lively.progress.state()

    @pytest.mark.subprocess
    def test_two_processes_killed_and_resumed(self, lively, tmp_path):
        small = {**LIVELY, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        torchrun(tmp_path / "out", tmp_path / "a.json", killed=True, kill_at=6, **small)
        small["overwrite"] = False
        found = torchrun(tmp_path / "out", tmp_path / "b.json", tmp_path / "out" / "checkpoint-5", **small)
        assert found["served"] == found["planned"] == lively.served_ids
        assert found["checksum"] == pytest.approx(checksum(lively.model), rel=1e-10)
        logps = found["progress"]["weights"]["logps"]
        np.testing.assert_allclose(logps, lively.progress.weights.logps, rtol=1e-9)

    @pytest.mark.subprocess
    def test_weights_without_a_gradient_on_two_processes(self, tmp_path):
        """RMU looks at a layer in the middle: nothing behind it has a gradient."""
        options = {"objective": "rmu", "objective_args": {"layer": 0}, "passes": 1, "save_strategy": "no"}
        alone = make_trainer(tmp_path / "out", per_device_train_batch_size=2, **options)
        alone.train()
        found = torchrun(tmp_path / "two", tmp_path / "a.json", per_device_train_batch_size=1, **options)
        assert found["checksum"] == pytest.approx(checksum(alone.model), rel=1e-10)
        reached = {id(parameter) for parameter in alone.inputs.loss.unreached(alone.model)} ^ set(
            map(id, alone.model.parameters())
        )
        names = {name for name, parameter in alone.model.named_parameters() if id(parameter) in reached}
        assert names == {name for name in names if name.startswith(("model.embed_tokens.", "model.layers.0."))} != set()

    @pytest.mark.parametrize("layers", [None, "0", "1"])
    def test_what_rmu_cannot_reach(self, tmp_path, layers):
        options = {"objective": "rmu", "objective_args": {"layer": 0}, "trainable_layers": layers, "passes": 1}
        if layers == "1":  # behind the only layer that is read
            with pytest.raises(ValueError, match="gradient"):
                make_trainer(tmp_path / "out", **options).train()
            return
        trainer = make_trainer(tmp_path / "out", **options)
        behind = {id(parameter) for parameter in trainer.inputs.loss.unreached(trainer.model)}
        trained = {name: id(value) for name, value in trainer.model.named_parameters() if value.requires_grad}
        expected = [name for name in trained if not name.startswith(("model.embed_tokens.", "model.layers.0."))]
        assert {name for name, number in trained.items() if number in behind} == set(expected)
        assert bool(expected) == (layers is None)

    def test_train_again_starts_again(self, tmp_path):
        trainer = make_trainer(tmp_path / "out", **{**LIVELY, "overwrite": True, "save_strategy": "no"})
        trainer.train()
        first = trainer.state.log_history[0]
        trainer.train()
        assert trainer.state.log_history[0]["retain_weight"] == first["retain_weight"] == 1.0


def killed_run(output: Path, step: int, options: dict) -> None:
    given = json.dumps({**options, "processes": 1, "kill_at": step, "overwrite": False})
    done = run(SUPPORT / "ddp_worker.py", output, f"{output}.json", given)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("step", [1, 4, 9])
@pytest.mark.subprocess
def test_killed_anywhere_and_resumed_it_is_the_same_run(lively, tmp_path, step):
    """SIGKILL in the middle of a step; the checkpoint before it continues, bit for bit. Killed at first: a new start."""
    output = tmp_path / "out"
    killed_run(output, step, LIVELY)
    again = make_trainer(output, **LIVELY)
    again.train(resume_from_checkpoint=True if step > 1 else None)
    assert again.served_ids == lively.served_ids
    assert checksum(again.model) == checksum(lively.model)
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, dict(lively.model.named_parameters())[name]), name


class TestObjectives:
    @pytest.mark.parametrize("name", sorted(OBJECTIVES))
    @pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
    def test_every_objective_runs_and_its_loss_falls(self, tmp_path, name, adapter):
        """With calibration, circuits off; the model has learned nothing, so only the loss can be looked at."""
        trainer = make_trainer(
            tmp_path / "out",
            model=make_model(0),
            forget=with_other(),
            objective=name,
            difficulty="calibration",
            folds=3,
            schedule="uniform",
            passes=6,
            per_device_train_batch_size=9,
            learning_rate={"undial": 0.02}.get(name, 1.0) * (2e-2 if adapter else 3e-3),
            save_strategy="no",
            # At the usual values a sample that was never memorised counts as forgotten.
            objective_args={"simnpo": {"beta": 0.1}, "satimp": {"beta1": 0.0}, "wga": {"beta": 0.0}}.get(name, {}),
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None,
            **NEEDS.get(name, {}),
        )
        trainer.train()
        losses = [entry["forget_loss"] for entry in trainer.state.log_history if "forget_loss" in entry]
        assert losses[-1] < losses[0]
        if not adapter:
            assert "retain_loss" in trainer.state.log_history[0] or OBJECTIVES[name].retain_loss == "none"

    def test_reference_is_kept_and_not_computed_again(self, tmp_path, monkeypatch):
        options = {
            "objective": "idk_dpo",
            "retain_loss": "kl",
            "passes": 1,
            "difficulty": "none",
            "schedule": "uniform",
            "keep_reference": True,
        }
        first = make_trainer(tmp_path / "out", **options)
        first.train()
        kept = (tmp_path / "out" / REFERENCE_FILE).read_bytes()
        assert b"Person" not in kept and b"Who is" not in kept
        monkeypatch.setattr(UnlearningLoss, "reference", lambda *a, **k: pytest.fail("computed again"))
        again = make_trainer(tmp_path / "out", **options)
        assert torch.equal(again.reference.alternative_logps, first.reference.alternative_logps)
        monkeypatch.undo()
        changed = make_trainer(tmp_path / "out", model=make_model(1).double(), **options)
        assert not torch.equal(changed.reference.forget_logps, first.reference.forget_logps)
        with pytest.raises(ValueError, match="cannot resume.*its objective is"):
            make_trainer(tmp_path / "out", **{**options, "objective_args": {"beta": 0.2}}).train(
                resume_from_checkpoint=True
            )

    def test_only_what_is_served_has_a_reference(self, tmp_path):
        options = {"retain_loss": "kl", "passes": 1, "difficulty": "none", "schedule": "uniform"}
        trainer = make_trainer(tmp_path, retain=qa_dataset(40, 100), objective="npo", **options)
        known = {row for row, values in enumerate(trainer.reference.retain_top.ids) if len(values)}
        assert known == set(trainer.plan.rows["retain_index"]) and len(known) == 9
        trainer.train()

    @pytest.mark.parametrize("keep", [False, True])
    def test_reference_goes_when_the_run_is_done(self, tmp_path, keep):
        """It holds the forget text as token ids: private while it is there, gone when no start needs it any more."""
        options = {"objective": "undial", "passes": 1, "difficulty": "none", "schedule": "uniform"}
        trainer = make_trainer(tmp_path, retain_loss="none", keep_reference=keep, **options)
        path = tmp_path / REFERENCE_FILE
        assert path.stat().st_mode & 0o777 == 0o600
        with safe_open(path, "pt") as file:
            ids = file.get_tensor("forget_top.ids")[:, 0].tolist()
        assert "Person" in make_tokenizer().decode(ids)
        trainer.train()
        assert path.exists() == keep

    def test_alternatives_written_by_the_model_are_the_same_after_a_restart(self, tmp_path):
        options = {"objective": "alt_po", "passes": 1, "difficulty": "none", "schedule": "uniform"}
        trainers = [make_trainer(tmp_path / name, model=make_model(0), **options) for name in ("a", "b")]
        columns = [trainer.forget["alternative_input_ids"] for trainer in trainers]
        assert list(columns[0]) == list(columns[1]) and len(columns[0]) == 9

    def test_own_objective_trains(self, tmp_path):
        try:

            @register_objective("hinge")
            def hinge(mean_logps, *, level: float = -7.0):
                return (mean_logps - level).clamp(min=0)

            trainer = make_trainer(
                tmp_path / "out", objective="hinge", passes=6, save_strategy="no", learning_rate=3e-3
            )
            trainer.train()
            losses = [entry["forget_loss"] for entry in trainer.state.log_history if "forget_loss" in entry]
            assert losses[-1] < losses[0]
        finally:
            OBJECTIVES.pop("hinge", None)

    def test_token_means_under_any_split(self, tmp_path):
        """GradDiff by tokens: the first loss is that of all tokens of the global batch, and every split is one run."""
        options = {"objective": "graddiff", "loss_normalization": "token", "schedule": "upweight_hard", "passes": 2}
        whole = make_trainer(tmp_path / "a", per_device_train_batch_size=6, **options)
        split = make_trainer(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=3, **options)
        rows = [
            (whole.forget_ids.index(i), w)
            for i, w in zip(whole.schedule.order[:6], whole.schedule.weight, strict=False)
        ]
        kept = {sample["sample_id"]: sample for sample in whole.retain}
        forget = retain = mass = tokens = 0.0
        with torch.no_grad():
            for (row, weight), partner in zip(rows, whole.schedule.retain_id, strict=False):
                scores = score_answers(whole.model, pad_batch([whole.forget[row]], 0))
                forget, mass = forget + weight * float(scores.logps), mass + weight * int(scores.lengths)
                scores = score_answers(whole.model, pad_batch([kept[partner]], 0))
                retain, tokens = retain - float(scores.logps), tokens + int(scores.lengths)
        for trainer in (whole, split):
            trainer.train()
            found = trainer.state.log_history[0]["loss"]
            assert found == pytest.approx(forget / mass + retain / tokens, rel=1e-5)  # logged and weighted in float32
        assert checksum(split.model) == pytest.approx(checksum(whole.model), rel=1e-10)


class TestTrainablePart:
    @pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {}], ids=["dora", "rslora", "lora"])
    def test_adapters_resume_bit_identically(self, tmp_path, options):
        def run(name, checkpoint=None):
            peft_config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.2, **options)
            trainer = make_trainer(
                tmp_path / name, model=make_model(0).double(), peft_config=peft_config, learning_rate=1e-2
            )
            trainer.train(resume_from_checkpoint=checkpoint)
            return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

        first = run("a")
        assert first and any(p.abs().sum() > 0 for n, p in first.items() if "lora_B" in n)
        again = run("a", str(tmp_path / "a" / "checkpoint-2"))
        assert all(torch.equal(again[name], first[name]) for name in first)

    def test_named_layers(self, tmp_path):
        model = make_model(0)
        before = {name: p.clone() for name, p in model.named_parameters()}
        trainer = make_trainer(tmp_path / "out", model=model, trainable_layers="1", difficulty="cud", folds=3)
        trainer.train()
        moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
        assert moved and all(name.startswith("model.layers.1.") for name in moved)
        assert layer_range("0, 2,4-6") == [0, 2, 4, 5, 6] and layer_range("3") == [3]

    def test_refusals(self, tmp_path):
        for text in ("a", "2-1", "", "1-", "-1", "1;2"):
            with pytest.raises(ValueError, match="trainable_layers (must be layers such as|is empty)"):
                config(tmp_path / "out", trainable_layers=text)
        with pytest.raises(ValueError, match="names layer 2, the model has layers 0 to 1"):
            train_only(make_model(0), "1-2")
        with pytest.raises(ValueError, match="without an adapter"):
            make_trainer(tmp_path / "out", trainable_layers="1", peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
        model = make_model(0)
        model.is_quantized = True
        with pytest.raises(ValueError, match="quantised and cannot be trained: give a peft_config"):
            make_trainer(tmp_path / "out", model=model)


class TestWeights:
    @pytest.mark.parametrize("reentrant", [False, True], ids=["a graph at once", "reentrant"])
    def test_share_of_the_update_against_gradients_one_by_one(self, tmp_path, reentrant):
        """Norm of each sample's own part of the step's gradient, taken by autograd."""
        options = {
            "schedule": "upweight_hard",
            "objective": "graddiff",
            "retain_weight": 2.0,
            "passes": 1,
            "n_buckets": 2,
            "per_device_train_batch_size": 9,
            "log_update_share": True,
            "save_strategy": "no",
        }
        kind = {"use_reentrant": reentrant}
        trainer = make_trainer(
            tmp_path / "out", gradient_checkpointing=True, gradient_checkpointing_kwargs=kind, **options
        )
        matrices = [p for p in trainer.model.parameters() if p.ndim > 1]
        order, buckets = trainer.schedule.order, trainer.buckets
        kept = {sample["sample_id"]: sample for sample in trainer.retain}
        shares, retained = np.zeros(2), 0.0
        for position, sample_id in enumerate(order):
            row = trainer.forget_ids.index(sample_id)
            loss = (
                trainer.schedule.weight[position]
                * score_answers(trainer.model, pad_batch([trainer.forget[row]], 0)).mean_logps
            )
            norm = math.sqrt(sum(float(g.square().sum()) for g in torch.autograd.grad(loss.sum(), matrices)))
            shares[buckets[row]] += norm
            other = score_answers(trainer.model, pad_batch([kept[trainer.schedule.retain_id[position]]], 0)).mean_logps
            retained += math.sqrt(sum(float(g.square().sum()) for g in torch.autograd.grad(2 * other.sum(), matrices)))
        trainer.train()
        entry = trainer.state.log_history[0]
        found = [entry["update_share/bucket_1"], entry["update_share/bucket_2"]]
        np.testing.assert_allclose(found, shares / shares.sum(), rtol=1e-6)
        assert entry["update_share/retain"] == pytest.approx(retained / (retained + shares.sum()), rel=1e-6)

    @pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
    def test_share_is_logged_under_accumulation_and_changes_nothing(self, tmp_path, adapter):
        def run(name, **options):
            peft_config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if adapter else None
            trainer = make_trainer(
                tmp_path / name,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                peft_config=peft_config,
                save_strategy="no",
                **options,
            )
            trainer.train()
            return trainer

        plain, watched = run("a"), run("b", log_update_share=True)
        assert checksum(plain.model) == checksum(watched.model)
        entry = watched.state.log_history[1]
        assert sum(value for key, value in entry.items() if key.startswith("update_share/b")) == pytest.approx(1)

    def test_a_warning_where_weights_come_to_nothing(self, tmp_path, caplog):
        def warned(**options):
            caplog.clear()
            trainer = make_trainer(
                tmp_path / "out",
                forget=qa_dataset(8),
                save_strategy="no",
                overwrite=True,
                objective="graddiff",
                **options,
            )
            trainer.train()
            return "come to nothing" in caplog.text

        import transformers

        transformers.utils.logging.enable_propagation()
        try:
            sharp = {"max_grad_norm": 1e-3, "passes": 4}
            assert warned(schedule="easy_to_hard+upweight_hard", per_device_train_batch_size=1, passes=1)
            assert "With one pair per optimizer step" in caplog.text
            assert warned(schedule="easy_to_hard+upweight_hard", per_device_train_batch_size=2, **sharp)
            assert "above max_grad_norm=0.001 at every step" in caplog.text
            assert not warned(schedule="upweight_hard", per_device_train_batch_size=5, **sharp)
            assert not warned(schedule="easy_to_hard", per_device_train_batch_size=1, passes=1)
            lenient = {"max_grad_norm": 0.0, "per_device_train_batch_size": 1, "passes": 1}
            assert not warned(schedule="easy_to_hard+upweight_hard", **lenient)
        finally:
            transformers.utils.logging.disable_propagation()


class TestEnds:
    def test_target(self, tmp_path):
        options = {"objective": "graddiff", "passes": 20, "learning_rate": 3e-3, "schedule": "uniform"}
        trainer = make_trainer(tmp_path / "out", target_forget_prob=0.0005, **options)
        trainer.train()
        assert 5 < trainer.state.global_step < 45
        assert trainer.progress.forget_prob <= 0.0005
        held = make_trainer(tmp_path / "held", target_forget_prob=0.0005, retain_limit=1e-3, dual_rate=1e-9, **options)
        held.train()
        assert held.state.global_step == 45  # the retain loss never came inside its limit

    def test_retain_limit_holds_the_retain_loss(self, tmp_path):
        """Without it GradDiff lets the retain loss go; with it, it stays about the limit."""
        options = {
            "objective": "graddiff",
            "passes": 40,
            "learning_rate": 2e-3,
            "schedule": "uniform",
            "retain_weight": 0.0,
        }
        options |= {"per_device_train_batch_size": 9, "save_strategy": "no"}
        ends = {}
        for limit in (None, 5.5):
            trainer = make_trainer(tmp_path / str(limit), retain_limit=limit, dual_rate=0.5, **options)
            trainer.train()
            history = [entry["retain_loss"] for entry in trainer.state.log_history if "retain_loss" in entry]
            ends[limit] = np.mean(history[-5:])
        assert ends[None] > 6.5 and ends[5.5] < 6.0

    def test_a_retain_loss_too_high_puts_the_last_checkpoint_back(self, tmp_path):
        trainer = make_trainer(
            tmp_path / "out",
            objective="graddiff",
            retain_weight=0.0,
            max_retain_loss=6.5,
            passes=20,
            save_steps=1,
            learning_rate=3e-3,
            save_total_limit=1,
        )
        with pytest.raises(DivergenceError, match="above max_retain_loss=6.5; .* The model is back at .*checkpoint-"):
            trainer.train()
        from safetensors.torch import load_file

        (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
        saved = load_file(checkpoint / "model.safetensors")
        own = dict(trainer.model.named_parameters())
        assert all(torch.equal(own[name], weight) for name, weight in saved.items() if name in own)

    def test_diverged_before_any_checkpoint(self, tmp_path):
        trainer = make_trainer(tmp_path / "out", max_retain_loss=1e-3, save_strategy="no")
        with pytest.raises(DivergenceError, match="No checkpoint was saved"):
            trainer.train()


class TestEvaluation:
    def test_by_hand_and_best_state(self, tmp_path):
        tokenizer = make_tokenizer()
        trainer = make_trainer(
            tmp_path / "out",
            tokenizer=tokenizer,
            passes=4,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            load_best_model_at_end=True,
            eval_retain_samples=3,
            learning_rate=5e-3,
            objective="graddiff",
            retain_weight=0.3,
        )
        start = answer_probability(trainer.model, trainer.forget)
        kept = answer_probability(trainer.model, trainer.retain.select([0, 3, 6]))
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "eval_balance" in entry]
        assert [entry["step"] for entry in entries] == [2, 4, 6, 8, 9]
        best = max(entries, key=lambda entry: entry["eval_balance"])
        assert trainer.state.best_metric == best["eval_balance"]
        found = trainer.predict()
        left = answer_probability(trainer.model, trainer.forget)
        np.testing.assert_allclose(found.predictions, left)
        assert found.metrics["test_forget_prob"] == pytest.approx(best["eval_forget_prob"])
        for number in range(4):
            expected = left[trainer.buckets == number].mean()
            assert found.metrics[f"test_forget_prob/bucket_{number + 1}"] == pytest.approx(expected)
        forgotten = np.clip(1 - left.mean() / start.mean(), 0, 1)
        retain = answer_probability(trainer.model, trainer.retain.select([0, 3, 6])).mean()
        assert found.metrics["test_retain_prob"] == pytest.approx(retain)
        retained = min(1, retain / kept.mean())
        assert found.metrics["test_balance"] == pytest.approx(2 * forgotten * retained / (forgotten + retained))

    def test_held_out_samples(self, tmp_path):
        """What no loss sees is measured at every evaluation, stands in the card, and changes nothing else."""
        unseen = qa_dataset(6, 300)
        options = {"eval_strategy": "steps", "eval_steps": 2, "passes": 2, "eval_retain_samples": 3}
        options |= {"metric_for_best_model": "heldout_prob"}
        trainer = make_trainer(tmp_path / "out", heldout_dataset=unseen, save_strategy="best", **options)
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "eval_forget_prob" in entry]
        samples = prepare_samples(unseen, trainer.processing_class).select([0, 2, 5])
        expected = float(answer_probability(trainer.model, samples).mean())
        assert len({entry["eval_heldout_prob"] for entry in entries}) == len(entries) > 1
        assert entries[-1]["eval_heldout_prob"] == pytest.approx(expected)
        assert trainer.state.best_metric == max(entry["eval_heldout_prob"] for entry in entries)
        trainer.create_model_card()
        card = (tmp_path / "out" / "README.md").read_text()
        assert f"| held-out set, which no loss saw | {expected:.4f} |" in card
        del options["metric_for_best_model"]
        plain = make_trainer(tmp_path / "plain", **options)
        plain.train()
        for ours, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)

    def test_held_out_samples_that_a_loss_sees(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"held-out sample '\S+' \(row \d+\) is in the forget dataset: a loss sees it"
        ):
            make_trainer(tmp_path / "out", heldout_dataset=qa_dataset(3))
        with pytest.raises(ValueError, match=r"is in the retain dataset: a loss sees it"):
            make_trainer(tmp_path / "out", heldout_dataset=qa_dataset(3, 100))

        def named(data, name):
            return data.add_column("author", [name] * len(data))

        with pytest.raises(ValueError, match=r"held-out group 'A' \(author\) is in the forget dataset"):
            make_trainer(
                tmp_path / "out",
                forget=named(qa_dataset(9), "A"),
                heldout_dataset=named(qa_dataset(3, 300), "A"),
                group_column="author",
            )
        with pytest.raises(ValueError, match="metric_for_best_model 'heldout_prob' is measured by no evaluation"):
            make_trainer(
                tmp_path / "out", metric_for_best_model="heldout_prob", save_strategy="best", eval_strategy="epoch"
            )
        assert not (tmp_path / "out").exists()

    def test_beside_a_dataset_of_the_user(self, tmp_path):
        trainer = make_trainer(tmp_path / "out", eval_dataset=qa_dataset(3, 200), eval_strategy="epoch", passes=1)
        trainer.train()
        keys = {key for entry in trainer.state.log_history for key in entry}
        assert {"eval_loss", "eval_forget_prob", "eval_retain_prob", "eval_balance"} <= keys
        assert "eval_loss" in trainer.evaluate(qa_dataset(3, 300))
        assert trainer.predict(qa_dataset(3, 300)).metrics["test_loss"] > 0

    @pytest.mark.subprocess
    def test_two_processes_measure_what_one_does(self, tmp_path):
        trainer = make_trainer(tmp_path / "one", passes=1)
        trainer.train()
        found = torchrun(tmp_path / "two", tmp_path / "r.json", passes=1, per_device_train_batch_size=2)
        np.testing.assert_allclose(found["left"], trainer.predict().predictions, rtol=1e-9)

    def test_plot_for_trackers(self, tmp_path):
        from transformers.integrations import TensorBoardCallback

        from evaluation.callbacks import BucketPlot

        trainer = make_trainer(tmp_path / "out", passes=2, eval_strategy="steps", eval_steps=2)
        plot, drawn = BucketPlot(trainer), []

        class Writer:
            def add_figure(self, name, figure, step):
                drawn.append((name, step, len(figure.axes[0].lines)))

        tracker = TrainerCallback()
        tracker.__class__ = type(
            "Tracker",
            (TensorBoardCallback,),
            {
                "__init__": lambda self: None,
                **{name: (lambda self, *a, **k: None) for name in dir(TrainerCallback) if name.startswith("on_")},
            },
        )
        tracker.tb_writer = Writer()
        trainer.add_callback(tracker)
        trainer.add_callback(plot)
        trainer.train()
        assert drawn == [("unlearning/buckets", step, 5) for step in (2, 4, 5)]  # four buckets and the retain set
        assert [step for step, _ in plot.history] == [2, 4, 5]


class TestCard:
    def test_says_how_and_what_is_left(self, tmp_path):
        trainer = make_trainer(
            tmp_path / "out",
            passes=2,
            eval_strategy="steps",
            eval_steps=2,
            objective_args={"beta": 0.2},
            schedule="upweight_hard",
            schedule_args={"strength": 0.5},
        )
        trainer.train()
        for _ in range(2):  # written again, not twice
            trainer.save_model(str(tmp_path / "out"))
            trainer.create_model_card()
        card = (tmp_path / "out" / "README.md").read_text()
        assert card.count("## Unlearning") == 1 and card.startswith("---") and "trained with npo, schedule" in card
        for line in (
            "| objective | npo (beta=0.2) |",
            "| schedule | upweight_hard (strength=0.5) |",
            "| difficulty | loss |",
            "| retain loss | nll, weight 1 |",
            "measured at step 5:",
        ):
            assert line in card, line
        last = [entry for entry in trainer.state.log_history if "eval_forget_prob" in entry][-1]
        assert f"| difficulty bucket 4, hardest | {last['eval_forget_prob/bucket_4']:.4f} |" in card
        assert f"| retain set | {last['eval_retain_prob']:.4f} |" in card and "Person" not in card

    def test_without_an_evaluation(self, tmp_path):
        trainer = make_trainer(tmp_path / "out", passes=1, difficulty="none", schedule="uniform", retain_limit=5.0)
        trainer.train()
        card = unlearning_section(trainer)
        assert "in the last training steps" in card and "held at a loss of 5" in card and "bucket" not in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "dpo"}, "'dpo' needs alternative answers: give alternative_column"),
        ({"objective": "npo", "alternative_column": "x"}, "alternative_column belongs to .* not to 'npo'"),
        ({"objective": "dpo", "alternative_column": "x", "refusals": ["No."]}, "refusals belong to"),
        ({"objective": "pdu"}, "give retain_limit"),
        ({"objective": "ga", "retain_limit": 1.0}, "retain_limit needs a retain loss"),
        ({"objective": "ga", "max_retain_loss": 1.0}, "max_retain_loss needs a retain loss"),
        ({"objective": "ga", "retain_weight_end": 1.0}, "retain_weight_end needs a retain loss"),
        ({"retain_weight_end": 0.0}, "retain_weight_end must be a number between 0 and inf, got 0.0"),
        ({"retain_weight_end": 2.0, "retain_limit": 1.0}, "both move the retain weight"),
        ({"retain_weight_end": 2.0, "retain_weight": 0.0}, "retain_weight must be above 0"),
        ({"retain_limit": -1.0}, "retain_limit must be a number between 0 and inf, got -1.0"),
        ({"dual_rate": 0.0, "retain_limit": 1.0}, "dual_rate must be (a number between 0 and inf|positive)"),
        ({"target_forget_prob": 1.5}, "target_forget_prob must be a number between 0 and 1, got 1.5"),
        ({"max_retain_loss": float("nan")}, "max_retain_loss must be a (finite )?number"),
        ({"loss_normalization": "batch"}, "must be 'sample' or 'token', got 'batch'"),
        ({"objective": "npo", "loss_normalization": "token"}, "the loss of objective 'npo' is one of whole samples"),
        ({"objective": "ga", "schedule": "risk"}, "'risk' weights the retain loss, too, but retain_loss is 'none'"),
        ({"eval_retain_samples": 0}, "eval_retain_samples must be (an integer of )?at least 1"),
        ({"schedule": "easy_to_hard+uniform"}, "more than one order"),
        ({"schedule": "inverse_gradient", "difficulty": "none"}, "needs a difficulty metric, but difficulty is 'none'"),
        ({"objective": "rmu", "objective_args": {"layer": "x"}}, "'layer' of objective 'rmu' must be a number"),
    ],
)
def test_config_refusals(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        CUDConfig(str(tmp_path / "out"), **{"bf16": False, "use_cpu": True, **options})


def test_trainer_refusals(tmp_path):
    dpo = {"objective": "dpo", "alternative_column": "other"}
    with pytest.raises(ValueError, match="has no column 'other'"):
        make_trainer(tmp_path / "out", **dpo)
    same = qa_dataset(9)
    same = same.add_column("other", [same[i]["answer"] if i == 4 else "Nobody" for i in range(9)])
    with pytest.raises(ValueError, match="its alternative answer is the answer that is to be forgotten"):
        make_trainer(tmp_path / "out", forget=same, **dpo)
    with pytest.raises(ValueError, match="its alternative answer is empty"):
        make_trainer(tmp_path / "out", forget=qa_dataset(9).add_column("other", [" "] * 9), **dpo)
    texts = Dataset.from_dict({"text": [f"Text number {i}" for i in range(9)]})
    with pytest.raises(ValueError, match="need samples with a prompt; the forget dataset has the format 'text'"):
        make_trainer(tmp_path / "out", forget=texts, objective="idk_nll")
    with pytest.raises(ValueError, match="'layer' of objective 'rmu' must be from 0 to 1"):
        make_trainer(tmp_path / "out", objective="rmu", objective_args={"layer": 2})
    assert not (tmp_path / "out").exists()  # all of it before anything was computed


class TestAlternatives:
    @pytest.mark.parametrize("chat", [False, True])
    def test_every_format_keeps_its_prompt(self, chat):
        from cud_trainer.data import Samples, prepare_samples
        from cud_trainer.objectives.alternatives import with_alternatives

        tokenizer = make_tokenizer(chat=chat)
        turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Person A"}]
        formats = [
            {"question": "Who?", "answer": "Person A"},
            {"prompt": "Who?", "completion": " Person A"},
            *([{"messages": turns}, {"prompt": turns[:1], "completion": turns[1:]}] if chat else []),
        ]
        for row in formats:
            data = Dataset.from_list([{**row, "other": "Person B"}])
            prepared = prepare_samples(data, tokenizer)
            found = with_alternatives(prepared, data, tokenizer, "given", column="other")[0]
            own, other = tokenizer.decode(found["input_ids"]), tokenizer.decode(found["alternative_input_ids"])
            assert other == own.replace("Person A", "Person B")
            start = found["labels"].index(next(label for label in found["labels"] if label != -100))
            assert found["alternative_labels"][:start] == [-100] * start
            assert found["alternative_input_ids"][:start] == found["input_ids"][:start]
            assert with_alternatives(Samples(Dataset.from_list([found]), 0), data, tokenizer, "refusal")[0] == found

    def test_refusals_follow_the_seed(self):
        from cud_trainer.data import prepare_samples
        from cud_trainer.objectives.alternatives import REFUSALS, alternatives_fingerprint, with_alternatives

        data, tokenizer = qa_dataset(20), make_tokenizer()
        prepared = prepare_samples(data, tokenizer)
        made = [with_alternatives(prepared, data, tokenizer, "refusal", seed=seed) for seed in (0, 0, 1)]
        prints = [alternatives_fingerprint(part) for part in made]
        assert prints[0] == prints[1] != prints[2] and alternatives_fingerprint(prepared) is None
        answers = {
            tokenizer.decode([t for t in row if t > 1]).split("Answer: ")[1] for row in made[0]["alternative_input_ids"]
        }
        assert len(answers) > 4 and answers <= set(REFUSALS)
        mine = with_alternatives(prepared, data, tokenizer, "refusal", refusals=["No."])
        assert all("No." in tokenizer.decode(row) for row in mine["alternative_input_ids"])
        with pytest.raises(ValueError, match="ends at token .*, beyond max_length=30"):
            with_alternatives(prepared, data, tokenizer, "refusal", max_length=30)
