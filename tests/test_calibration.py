"""The calibration run shows what goes first, and leaves no trace."""

import logging

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer, qa_dataset
from peft import LoraConfig

from cud_trainer.calibration import CalibrationSettings, calibrate
from cud_trainer.data import pad_batch, prepare_dataset
from cud_trainer.logprobs import score_answers
from cud_trainer.objectives import UnlearningLoss

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.fixture(scope="module")
def memorised():
    """A model that knows eight forget and four retain samples; the first four forget samples four times as well."""
    tokenizer, model = make_tokenizer(), make_model(0)
    forget, retain = prepare_dataset(qa_dataset(8), tokenizer), prepare_dataset(qa_dataset(4, 60), tokenizer)
    samples = [*forget, *[forget[i] for i in range(4)] * 3, *retain]
    batch = pad_batch(samples, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        (-score_answers(model, batch).mean_logps.mean()).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval(), forget, retain


def run(memorised, **options):
    model, forget, retain = memorised
    settings = CalibrationSettings(**{"learning_rate": 1e-3, "batch_size": 3, "max_passes": 12, **options})
    return calibrate(model, forget, retain, settings, pad_token_id=0, progress=False)


def state(model):
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "modules": {name: (type(m), m.training) for name, m in model.named_modules()},
    }


def assert_same(model, before):
    after = state(model)
    assert after["flags"] == before["flags"] and after["modules"] == before["modules"]
    assert list(after["weights"]) == list(before["weights"])
    assert all(torch.equal(after["weights"][name], before["weights"][name]) for name in before["weights"])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
class TestTrace:
    def test_bit_for_bit_restored(self, memorised, peft_config):
        model = memorised[0]
        model.model.layers[0].mlp.train()
        model.lm_head.requires_grad_(False)
        before = state(model)
        found = run(memorised, peft_config=peft_config, learning_rate=3e-3)
        assert found.snapshots[-1] < 0.9 * found.snapshots[0]  # it did move in between
        assert_same(model, before)
        model.lm_head.requires_grad_(True)
        model.eval()

    def test_restored_after_an_error(self, memorised, peft_config, monkeypatch):
        model = memorised[0]
        before = state(model)
        calls = []

        def broken(*arguments):
            calls.append(1)
            if len(calls) > 3:
                raise RuntimeError("power cut")
            return original(*arguments)

        original = UnlearningLoss.__call__
        monkeypatch.setattr(UnlearningLoss, "__call__", broken)
        with pytest.raises(RuntimeError, match="power cut"):
            run(memorised, peft_config=peft_config)
        assert_same(model, before)


def test_residual_is_a_probability_and_repeatable(memorised):
    first, second = run(memorised), run(memorised)
    assert (first.residual == second.residual).all() and first.snapshots == second.snapshots
    assert ((first.residual >= 0) & (first.residual <= 1)).all() and np.ptp(first.residual) > 0.01
    assert first.pairs <= 12 * 8


def test_what_was_seen_more_often_goes_later(memorised):
    residual = np.mean([run(memorised, seed=seed).residual for seed in range(3)], axis=0)
    assert residual[:4].mean() > residual[4:].mean()


def test_stops_when_the_forget_set_is_gone_and_averages_the_window(memorised):
    model, forget, _ = memorised
    found = run(memorised, learning_rate=3e-3, max_passes=50)
    start = float(score_answers(model, pad_batch(list(forget), 0)).mean_logps.exp().mean())
    shares = np.array(found.snapshots) / start
    assert shares[-1] < 0.15 <= shares[-2]
    assert found.used == [i for i, share in enumerate(shares) if 0.15 <= share <= 0.75] or len(found.used) == 1


def test_works_without_a_retain_set(memorised):
    model, forget, _ = memorised
    settings = CalibrationSettings(UnlearningLoss("npo", {}, "none"), learning_rate=1e-3, batch_size=8)
    assert calibrate(model, forget, None, settings, pad_token_id=0, progress=False).residual.shape == (8,)


def test_divergence_is_an_error_and_undone(memorised):
    before = state(memorised[0])
    with pytest.raises(ValueError, match="diverged"):
        run(memorised, loss=UnlearningLoss("ga"), learning_rate=1e30)
    assert_same(memorised[0], before)


def test_says_so_when_nothing_moved(memorised, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("cud_trainer.calibration"), "propagate", True)
    run(memorised, learning_rate=1e-12, max_passes=2)
    assert "the anchors rank noise" in caplog.text
