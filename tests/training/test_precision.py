"""Weights in half precision: what cannot be trained is refused, what hardly moves is said."""

import logging

import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from peft import LoraConfig
from runs import make_trainer

from cud_trainer import score_difficulty
from cud_trainer.models.trainable import movable_share

pytestmark = pytest.mark.slow
PLAIN = {"difficulty": "none", "schedule": "uniform", "objective": "graddiff", "save_strategy": "no"}


def test_float16_is_named(tmp_path):
    for difficulty in ("none", "loss", "cud"):
        with pytest.raises(ValueError, match="the weights to train are float16"):
            options = {**PLAIN, "difficulty": difficulty, "learning_rate": 1e-9, "folds": 3}
            make_trainer(tmp_path / "out", model=make_model(0).half(), **options)
    with pytest.raises(ValueError, match="the weights to train are float16"):
        half, data = make_model(0).half(), qa_dataset(6)
        score_difficulty(half, data, make_tokenizer(), metrics=["calibration"], folds=3, progress=False)


def test_an_adapter_on_float16_is_trained_in_float32(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = make_trainer(tmp_path / "out", model=make_model(0).half(), peft_config=lora, **PLAIN)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def still(model, step):
    """Share of weights that AdamW, whose steps have the length of the learning rate, leaves where they are."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=step, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = -parameter.detach().sign() + (parameter == 0)
    optimizer.step()
    pairs = list(zip(model.parameters(), before, strict=True))
    return sum(int((now == then).sum()) for now, then in pairs) / sum(now.numel() for now, _ in pairs)


@pytest.mark.parametrize("step", [1e-5, 1e-4, 1e-2])
def test_share_that_can_move_against_the_optimizer(step):
    model = make_model(0, initializer_range=0.02).bfloat16()
    assert movable_share(model, step) == pytest.approx(1 - still(model, step), abs=0.03)
    assert movable_share(make_model(0), step) is None


def test_a_warning_where_few_can_move(tmp_path, caplog):
    logging.getLogger("cud_trainer").propagate = True

    def said(**options):
        caplog.clear()
        make_trainer(tmp_path / "out", **{**PLAIN, **options})
        return [record.message for record in caplog.records if "can move at" in record.message]

    small = {"initializer_range": 0.02}
    (warning,) = said(model=make_model(0, **small).bfloat16(), learning_rate=1e-5)
    assert "% of them can move at learning_rate=1e-05" in warning and "float32" in warning and "LoRA" in warning
    assert not said(model=make_model(0, **small), learning_rate=1e-5)
    assert not said(model=make_model(0, **small).bfloat16(), learning_rate=1e-2)
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    assert not said(model=make_model(0, **small).bfloat16(), learning_rate=1e-5, peft_config=lora)
