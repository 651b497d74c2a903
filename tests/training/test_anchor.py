"""Weights that go back by a share of their way: by hand, with an adapter, resumed, refused."""

import pytest
import torch
from builders import make_model
from peft import LoraConfig
from runs import checksum, config, make_trainer, torchrun

from cud_trainer.training.anchor import Anchor

RUN = {"objective": "graddiff", "schedule": "upweight_hard+dual", "passes": 2, "learning_rate": 3e-3}


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_after_a_step_the_way_is_shorter_by_the_share(tmp_path):
    ends = {}
    for share in (0.0, 0.25):
        trainer = make_trainer(tmp_path / str(share), **RUN, l2_sp=share, max_steps=1, save_strategy="no")
        start = weights(trainer)
        trainer.train()
        ends[share] = weights(trainer)
    assert any((ends[0.0][name] - value).abs().max() > 1e-4 for name, value in start.items())
    for name, value in start.items():
        torch.testing.assert_close(ends[0.25][name], value + 0.75 * (ends[0.0][name] - value), rtol=0, atol=1e-12)


def test_the_way_back_follows_the_learning_rate(tmp_path):
    """In the first step of this warmup nothing moves; in the second the rate is a quarter of its most."""
    ends = {}
    for share in (0.0, 0.25):
        options = {**RUN, "l2_sp": share, "max_steps": 2, "save_strategy": "no", "warmup_steps": 4}
        trainer = make_trainer(tmp_path / str(share), **options, lr_scheduler_type="constant_with_warmup")
        start = weights(trainer)
        trainer.train()
        ends[share] = weights(trainer)
    assert any((ends[0.0][name] - value).abs().max() > 1e-4 for name, value in start.items())
    for name, value in start.items():
        expected = value + (1 - 0.25 / 4) * (ends[0.0][name] - value)
        torch.testing.assert_close(ends[0.25][name], expected, rtol=0, atol=1e-12)


def test_of_a_new_adapter_the_factor_that_makes_the_change_goes_back(tmp_path):
    ends = {}
    for share in (0.0, 0.25):
        torch.manual_seed(0)
        adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        options = {**RUN, "l2_sp": share, "max_steps": 1, "save_strategy": "no", "optim": "sgd", "learning_rate": 1.0}
        trainer = make_trainer(tmp_path / str(share), peft_config=adapter, **options)
        trainer.train()
        ends[share] = weights(trainer)
    moved = [name for name, value in ends[0.0].items() if ".lora_B." in name and value.any()]
    assert moved
    for name, value in ends[0.0].items():
        expected = 0.75 * value if ".lora_B." in name else value
        torch.testing.assert_close(ends[0.25][name], expected, rtol=1e-6, atol=1e-12)


def test_resume_goes_on_from_the_same_start(tmp_path):
    whole = make_trainer(tmp_path / "a", **RUN, l2_sp=0.1)
    whole.train()
    again = make_trainer(tmp_path / "a", **RUN, l2_sp=0.1)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert checksum(again.model) == checksum(whole.model)
    with pytest.raises(ValueError, match="its l2 sp is 0.1, here it is 0.2"):
        other = make_trainer(tmp_path / "a", **RUN, l2_sp=0.2)
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


@pytest.mark.subprocess
def test_two_processes(tmp_path):
    options = {**RUN, "l2_sp": 0.1, "save_strategy": "no"}
    alone = make_trainer(tmp_path / "one", **options)
    alone.train()
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    found = torchrun(tmp_path / "two", tmp_path / "r.json", **options, **small)
    assert found["checksum"] == pytest.approx(checksum(alone.model), rel=1e-10)


@pytest.mark.parametrize("share", [1.0, -0.1, float("nan"), True])
def test_a_share_that_is_none(tmp_path, share):
    with pytest.raises(ValueError, match="l2_sp must be"):
        config(tmp_path / "out", **RUN, l2_sp=share)


def test_half_precision_is_refused_before_anything_is_computed(tmp_path):
    with pytest.raises(ValueError, match="l2_sp needs trained weights in float32, but .* is bfloat16"):
        make_trainer(tmp_path / "out", model=make_model().to(torch.bfloat16), **RUN, l2_sp=0.1)
    with pytest.raises(ValueError, match="l2_sp needs trained weights in float32"):
        Anchor(make_model().to(torch.bfloat16), 0.1)


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_sharded_weights_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr("cud_trainer.training.inputs.sharded_by", lambda args: name)
    with pytest.raises(ValueError, match=f"l2_sp is not supported with {name}"):
        make_trainer(tmp_path / "out", **RUN, l2_sp=0.1)
