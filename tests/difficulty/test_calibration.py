"""The calibration run shows what goes first, and leaves no trace."""

import logging

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer, qa_dataset
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from cud_trainer.data import pad_batch, prepare_samples
from cud_trainer.logprobs import score_answers
from cud_trainer.objectives import UnlearningLoss
from cud_trainer.scoring.calibration import CalibrationSettings, adapter_identity, calibrate

pytestmark = pytest.mark.slow

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.fixture(scope="module")
def memorised():
    """A model that knows eight forget and four retain samples; the first four forget samples four times as well."""
    tokenizer, model = make_tokenizer(), make_model(0)
    forget, retain = prepare_samples(qa_dataset(8), tokenizer), prepare_samples(qa_dataset(4, 60), tokenizer)
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
    return calibrate(model, forget, retain, settings, progress=False)


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
        before, adapter = state(model), adapter_identity(peft_config)
        found = run(memorised, peft_config=peft_config, learning_rate=3e-3)
        assert found.snapshots[-1] < 0.9 * found.snapshots[0]  # it did move in between
        assert_same(model, before)
        assert adapter_identity(peft_config) == adapter  # PEFT would write into it
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


def lora(**options):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options})


ADAPTERS = {
    "lora with biases": lora(bias="all"),
    "lora with its biases": lora(bias="lora_only"),
    "pissa": lora(init_lora_weights="pissa"),
    "olora": lora(init_lora_weights="olora"),
    "lora from noise": lora(init_lora_weights=False),
    "lora beside a head": lora(modules_to_save=["lm_head"]),
    "lora beside tied embeddings": lora(modules_to_save=["embed_tokens"]),
    "lora beside tokens": lora(trainable_token_indices=[5, 6]),
    "dora": lora(use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


def hooks(model):
    return [
        list(table) for m in model.modules() for table in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
    ]


class TestAnyAdapter:
    """What an adapter may change beside itself: biases, the weights it takes its start from, whole modules, hooks."""

    def calibrate(self, model, peft_config, **options):
        forget = prepare_samples(qa_dataset(4), make_tokenizer())
        settings = CalibrationSettings(
            UnlearningLoss("ga"), **{"learning_rate": 1e-2, "max_passes": 1, "peft_config": peft_config, **options}
        )
        return calibrate(model, forget, None, settings, progress=False)

    @pytest.mark.parametrize("name", ADAPTERS)
    def test_bit_for_bit_restored(self, name):
        tied = "tied" in name
        model = make_model(0, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied).train()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.linspace(-0.1, 0.1, len(parameter)))
        handle = model.model.layers[0].register_forward_hook(lambda *_: None)
        tokens = torch.arange(2, 12)[None]
        before, parameters, modules = state(model), dict(model.named_parameters()), dict(model.named_modules())
        logits, attributes, known = model(tokens).logits, set(model.__dict__), hooks(model)
        found = self.calibrate(model, ADAPTERS[name])
        assert found.snapshots[-1] != found.snapshots[0]  # something was trained
        assert_same(model, before)
        # the very objects, so that an optimizer or a tied head made before still belongs to the model
        assert all(p is parameters[n] for n, p in model.named_parameters())
        assert all(m is modules[n] for n, m in model.named_modules())
        assert torch.equal(model(tokens).logits, logits)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert set(model.__dict__) == attributes and hooks(model) == known
        handle.remove()
        assert not model.model.layers[0]._forward_hooks

    def test_gradient_checkpointing_leaves_no_hook(self):
        model = make_model(0)
        model.gradient_checkpointing_enable()
        known = hooks(model)
        self.calibrate(model, lora())
        assert hooks(model) == known

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (lora(target_modules=["nothing"]), "nothing"),
            (lora(target_modules=["q_proj", "input_layernorm"]), "RMSNorm.* is not supported"),
            (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "virtual tokens shift the answer"),
        ],
    )
    def test_restored_after_an_adapter_that_does_not_fit(self, config, message):
        model = make_model(0).train()
        before = state(model)
        with pytest.raises(ValueError, match=message):
            self.calibrate(model, config)
        assert_same(model, before)

    def test_a_model_that_has_an_adapter_keeps_it(self):
        torch.manual_seed(0)
        model = get_peft_model(make_model(0), lora(init_lora_weights=False))
        before = state(model)
        assert any(before["flags"].values()) and not all(before["flags"].values())
        found = self.calibrate(model, None)
        assert found.snapshots[-1] < found.snapshots[0]
        assert_same(model, before)
        assert model.peft_config and model.get_base_model() is not model


def test_what_is_frozen_stays_frozen(memorised):
    """Only the weights that require gradients are trained: without them there is nothing to move."""
    model = memorised[0]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp" in name)
    before, seen = state(model), []
    original = torch.optim.AdamW.step

    def step(self, *arguments):
        original(self, *arguments)
        seen.append([n for n, v in model.state_dict().items() if not torch.equal(v, before["weights"][n])])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        run(memorised, max_passes=1)
    assert_same(model, before)
    model.requires_grad_(True)
    assert seen and all(changed and all("layers.1.mlp" in name for name in changed) for changed in seen)


def test_the_forget_set_is_forgotten_step_by_step(memorised):
    """On a memorised model, from near its start to below 15% of it, falling overall."""
    model, forget, _ = memorised
    with torch.no_grad():
        start = float(score_answers(model, pad_batch(list(forget), 0)).mean_logps.exp().mean())
    assert start > 0.5
    snapshots = np.array(run(memorised, learning_rate=3e-4, max_passes=40).snapshots)
    assert snapshots[0] <= start * 1.01 and snapshots[-1] < 0.15 * start
    assert (np.diff(snapshots) < 0).mean() > 0.8


@pytest.mark.parametrize("batch_size", [1, 2])
def test_does_not_depend_on_micro_batches(memorised, batch_size):
    """Also where they are not all of one size: half of six samples is two and one."""
    model, forget, retain = memorised
    part = model, forget.select(range(6)), retain
    small, whole = run(part, batch_size=batch_size), run(part, batch_size=6)
    assert small.pairs == whole.pairs and small.used == whole.used
    np.testing.assert_allclose(small.snapshots, whole.snapshots, rtol=1e-3)
    np.testing.assert_allclose(small.residual, whole.residual, rtol=1e-3, atol=1e-4)


def test_another_seed_is_another_order(memorised):
    assert run(memorised, seed=1).snapshots != run(memorised, seed=2).snapshots


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
    with torch.no_grad():
        start = float(score_answers(model, pad_batch(list(forget), 0)).mean_logps.exp().mean())
    shares = np.array(found.snapshots) / start
    assert shares[-1] < 0.15 <= shares[-2]
    assert found.used == [i for i, share in enumerate(shares) if 0.15 <= share <= 0.75] or len(found.used) == 1


@pytest.mark.parametrize("loss", [("npo", {}, "none"), ("npo", {"beta": 0.2}, "nll"), ("npo", {}, "kl"), ("graddiff",)])
def test_works_without_a_retain_set(memorised, loss):
    model, forget, _ = memorised
    settings = CalibrationSettings(UnlearningLoss(*loss), learning_rate=1e-3, batch_size=8, max_passes=2)
    found = calibrate(model, forget, None, settings, progress=False)
    assert found.residual.shape == (8,) and found.snapshots[-1] < found.snapshots[0]


def test_divergence_is_an_error_and_undone(memorised):
    before = state(memorised[0])
    with pytest.raises(ValueError, match="diverged"):
        run(memorised, loss=UnlearningLoss("ga"), learning_rate=1e30)
    assert_same(memorised[0], before)
    model, forget, retain = memorised
    with pytest.raises(ValueError, match="diverged"):  # in the very last step, which no loss follows
        run((model, forget.select([0]), retain), loss=UnlearningLoss("ga"), learning_rate=1e30, max_passes=1)
    assert_same(memorised[0], before)


def test_says_so_when_nothing_moved(memorised, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("cud_trainer.scoring.calibration"), "propagate", True)
    run(memorised, learning_rate=1e-12, max_passes=2)
    assert "the anchors rank noise" in caplog.text


@pytest.mark.subprocess
def test_an_adapters_identity_is_that_of_every_process():
    import os
    import subprocess
    import sys

    code = (
        "from peft import LoraConfig; from cud_trainer.scoring.calibration import adapter_identity as identity;"
        "print(identity(LoraConfig(target_modules=['q_proj', 'v_proj', 'o_proj', 'up_proj'])))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1 and "up_proj" in found.pop()
