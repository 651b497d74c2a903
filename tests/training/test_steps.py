"""What is done with the gradients: each step by its formula, the same run under any split, off at no cost."""

import numpy as np
import pytest
import torch
from builders import make_model
from peft import LoraConfig
from runs import checksum, config, make_trainer, torchrun

from cud_trainer.objectives import STEPS, register_step
from cud_trainer.stack_options import sharded_by

RUN = {"objective": "npo", "schedule": "upweight_hard+dual", "passes": 2, "learning_rate": 3e-3, "retain_weight": 2.0}
STEPPED = {"sam": {"step_args": {"rho": 0.3}}, "gru": {}}


def vectors(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]


class TestFormulas:
    def test_gru(self):
        """f - min(0, f.r) / |r|^2 r, over all parameters together."""
        f, r = vectors([1.0, 0.0], [-2.0]), vectors([1.0, 1.0], [1.0])
        found = STEPS["gru"].function(f, r)  # f.r = -1, |r|^2 = 3
        assert [g.tolist() for g in found] == [pytest.approx([4 / 3, 1 / 3]), pytest.approx([-5 / 3])]
        assert sum(float((x * y).sum()) for x, y in zip(found, r, strict=True)) == pytest.approx(0)
        along = vectors([1.0, 0.0], [2.0])
        assert all(torch.equal(x, y) for x, y in zip(STEPS["gru"].function(along, r), along, strict=True))
        nothing = vectors([0.0, 0.0], [0.0])
        assert all(torch.equal(x, y) for x, y in zip(STEPS["gru"].function(f, nothing), f, strict=True))

    def test_sam(self):
        found = STEPS["sam"].function(vectors([3.0, 0.0], [4.0]), rho=0.5)
        assert [g.tolist() for g in found] == [pytest.approx([0.3, 0.0]), pytest.approx([0.4])]
        assert STEPS["sam"].function(vectors([0.0]))[0].tolist() == [0.0]

    def test_registering(self):
        with pytest.raises(ValueError, match="step 'plain' is already registered"):
            register_step("plain")(lambda forget, retain: forget)
        with pytest.raises(ValueError, match="kind of step 'mine' must be one of"):
            register_step("mine", "order")(lambda forget: forget)


class TestRuns:
    def gradients(self, trainer, side):
        """Of one side's loss over the first global batch, by autograd from the schedule's own rows."""
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        rows = [trainer.train_dataset[i] for i in range(4)]
        batch = trainer.data_collator(rows)
        terms = trainer.inputs.loss(trainer.model, batch, trainer.reference)
        loss = (batch["weight"] * terms.forget).mean() if side == "forget" else 2.0 * terms.retain.mean()
        return torch.autograd.grad(loss, parameters)

    @pytest.mark.parametrize("step", ["sam", "gru"])
    def test_first_step_by_hand(self, tmp_path, step):
        """Plain SGD: the parameters move by the learning rate times the step's gradient."""
        options = {**RUN, "objective": "graddiff", "optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1, "step": step}
        trainer = make_trainer(tmp_path / "out", **{**options, **STEPPED[step], "save_strategy": "no"})
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in parameters]
        forget, retain = self.gradients(trainer, "forget"), self.gradients(trainer, "retain")
        if step == "sam":
            norm = sum(float(f.square().sum()) for f in forget) ** 0.5
            with torch.no_grad():
                for p, f in zip(parameters, forget, strict=True):
                    p += 0.3 / norm * f
            expected = self.gradients(trainer, "forget")
            with torch.no_grad():
                for p, value in zip(parameters, before, strict=True):
                    p.copy_(value)
        else:
            dot = sum(float((f * r).sum()) for f, r in zip(forget, retain, strict=True))
            assert dot < 0  # or nothing is tested
            size = sum(float(r.square().sum()) for r in retain)
            expected = [f - dot / size * r for f, r in zip(forget, retain, strict=True)]
        trainer.train()
        for p, value, f, r in zip(parameters, before, expected, retain, strict=True):
            torch.testing.assert_close(value - p.detach(), 3e-3 * (f + r), rtol=1e-6, atol=1e-12)

    @pytest.mark.parametrize("step", ["plain", "sam", "gru"])
    def test_any_split_and_resume(self, tmp_path, step):
        options = {**RUN, "step": step, **STEPPED.get(step, {})}
        whole = make_trainer(tmp_path / "a", **options)
        whole.train()
        split = make_trainer(tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
        split.train()
        assert split.served_ids == whole.served_ids
        assert checksum(split.model) == pytest.approx(checksum(whole.model), rel=1e-10)
        again = make_trainer(tmp_path / "a", **options)
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
        assert checksum(again.model) == checksum(whole.model)
        entries = [entry for entry in whole.state.log_history if "forget_loss" in entry]
        assert all(np.isfinite(entry["retain_loss"]) for entry in entries) and len(entries) == 5

    def test_taken_apart_the_two_sides_are_the_plain_step(self, tmp_path):
        """A step that changes nothing, with alternatives, KL and an adapter: the same run as `plain`."""
        try:
            register_step("same")(lambda forget, retain: forget)
            options = {**RUN, "objective": "idk_dpo", "retain_loss": "kl", "retain_limit": 0.5, "save_strategy": "no"}
            runs = []
            for step in ("plain", "same"):
                adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
                torch.manual_seed(0)
                trainer = make_trainer(tmp_path / step, peft_config=adapter, step=step, **options)
                trainer.train()
                runs.append(trainer)
            assert checksum(runs[1].model) == pytest.approx(checksum(runs[0].model), rel=1e-10)
            for one, other in zip(*(run.state.log_history for run in runs), strict=True):
                for key in ("loss", "forget_loss", "retain_loss", "forget_prob", "grad_norm"):
                    assert (key in one) == (key in other)
                    assert key not in one or one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-12), key
        finally:
            STEPS.pop("same", None)

    def test_plain_takes_nothing_apart(self, tmp_path, monkeypatch):
        trainer = make_trainer(tmp_path / "out", **RUN, max_steps=1, save_strategy="no")
        monkeypatch.setattr(type(trainer.inputs.loss), "side", lambda *a: pytest.fail("two passes"))
        assert trainer.split is None
        trainer.train()

    def test_passes(self, tmp_path, monkeypatch):
        """Rows that go through the model in a step of 4 pairs: GRU as many as plain, SAM the forget rows once more."""
        rows = {}
        for step in ("plain", "gru", "sam"):
            trainer = make_trainer(tmp_path / step, **RUN, step=step, max_steps=1, save_strategy="no")
            seen = []
            handle = trainer.model.get_input_embeddings().register_forward_hook(lambda m, i, o: seen.append(len(i[0])))  # noqa: B023
            trainer.train()
            handle.remove()
            rows[step] = sum(seen)
        assert rows == {"plain": 8, "gru": 8, "sam": 12}

    @pytest.mark.subprocess
    @pytest.mark.parametrize("step", ["sam", "gru"])
    def test_two_processes(self, tmp_path, step):
        options = {**RUN, "step": step, **STEPPED[step], "save_strategy": "no"}
        alone = make_trainer(tmp_path / "one", **options)
        alone.train()
        small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        found = torchrun(tmp_path / "two", tmp_path / "r.json", **options, **small)
        assert found["served"] == alone.served_ids
        assert found["checksum"] == pytest.approx(checksum(alone.model), rel=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": "adam"}, r"unknown step 'adam'; choose one of \['gru', 'plain', 'sam'\]"),
        ({"step": "sam", "step_args": {"rho": 0}}, "option 'rho' of step 'sam' must be positive, got 0"),
        ({"step": "gru", "step_args": {"rho": 1}}, "step 'gru' has no option 'rho'; it has none"),
        ({"step_args": {"rho": 1}}, "step 'plain' has no option 'rho'"),
        ({"step": "gru", "objective": "ga"}, "step 'gru' needs a retain loss, but retain_loss is 'none'"),
        ({"step": "sam", "optim": "lomo"}, "step 'sam' is not supported with optim 'lomo'"),
        ({"step": "sam", "log_update_share": True}, "log_update_share is not supported with step 'sam'"),
    ],
)
def test_refusals(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path / "out", **options)


def test_refusals_of_how_it_is_run(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="step 'gru' is not supported with fp16"):
        config(tmp_path / "out", step="gru")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    for name in ("FSDP", "DeepSpeed"):
        monkeypatch.setattr("cud_trainer.training.inputs.sharded_by", lambda args, name=name: name)
        with pytest.raises(ValueError, match=f"step 'sam' is not supported with {name}"):
            make_trainer(tmp_path / "out", model=make_model(0), step="sam")
    monkeypatch.undo()
    plain = config(tmp_path / "out")
    assert sharded_by(plain) is None
    for name in ("FSDP", "DeepSpeed"):
        with monkeypatch.context() as inside:
            inside.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
            assert sharded_by(plain) == name


def test_a_checkpoint_of_another_step_is_refused(tmp_path):
    make_trainer(tmp_path / "out", **RUN, step="gru", max_steps=2).train()
    with pytest.raises(ValueError, match="cannot resume.*its objective is"):
        make_trainer(tmp_path / "out", **RUN, max_steps=2).train(resume_from_checkpoint=True)
