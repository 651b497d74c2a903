"""A checkpoint goes on as it was made: another setting is refused by name, or acts where it is asked for."""

import pytest
import torch
from builders import make_model, qa_dataset
from peft import LoraConfig
from runs import checksum, make_trainer

from cud_trainer.stack_options import OVERRIDABLE

pytestmark = pytest.mark.slow
RUN = {
    "difficulty": "none", "schedule": "uniform", "objective": "graddiff", "retain_limit": 5.0,
    "lr_scheduler_type": "linear", "weight_decay": 0.01, "passes": 2, "save_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of five steps with a checkpoint at the second and fourth."""
    trainer = make_trainer(tmp_path_factory.mktemp("runs") / "out", **RUN)
    trainer.train()
    return trainer


def go_on(run, step=2, **options):
    folder = run.args.output_dir
    trainer = make_trainer(folder, **{**RUN, **options})
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{step}")
    return trainer


def test_the_same_settings_are_bit_identical(run, tmp_path):
    again = go_on(run)
    assert checksum(again.model) == checksum(run.model)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"learning_rate": 2e-3}, "learning rate is 0.001, here it is 0.002.*override 'learning_rate'"),
        ({"lr_scheduler_type": "cosine"}, "lr scheduler type is linear, here it is cosine"),
        ({"warmup_steps": 2}, "warmup steps"),
        ({"weight_decay": 0.1}, "weight decay"),
        ({"adam_beta2": 0.9}, "adam beta2"),
        ({"max_grad_norm": 0.5}, "max grad norm"),
        ({"optim": "sgd"}, "optim is adamw_torch_fused, here it is sgd; .* interrupted run$"),
        ({"retain_weight": 2.0}, "retain weight is 1.0, here it is 2.0"),
        ({"retain_limit": 6.0}, "retain limit"),
        ({"dual_rate": 0.5}, "dual rate"),
        ({"retain_loss": "kl"}, "retain loss is nll, here it is kl"),
        ({"loss_normalization": "token"}, "schedule|loss normalization"),
        ({"objective": "npo"}, "objective"),
        ({"trainable_layers": "1"}, "trainable layers is None, here it is 1"),
        ({"bf16": True}, "bf16"),
        ({"max_steps": 3}, "max steps"),
        ({"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}, "adapter is None, here it is"),
        ({"model": make_model(1).double()}, "model"),
        ({"retain": qa_dataset(7, 300)}, "schedule|retain set"),
    ],
)
def test_another_setting_is_refused_by_name(run, options, what):
    with pytest.raises(ValueError, match=f"cannot resume from .*its ({what})"):
        go_on(run, **options)


def test_what_is_overridden_acts(run, tmp_path):
    options = {"learning_rate": 5e-4, "weight_decay": 0.2, "retain_weight": 3.0}
    trainer = make_trainer(run.args.output_dir, **{**RUN, **options, "override": list(options), "save_strategy": "no"})
    trainer.train(resume_from_checkpoint=f"{run.args.output_dir}/checkpoint-2")
    rates = {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}
    assert rates[3] == pytest.approx(5e-4 * 3 / 5) and rates[4] == pytest.approx(5e-4 * 2 / 5)
    assert rates[1] == pytest.approx(1e-3)  # of the run that was interrupted
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.2
    weights = {e["step"]: e["retain_weight"] for e in trainer.state.log_history if "retain_weight" in e}
    assert weights[3] == 3.0
    with pytest.raises(ValueError, match="retain limit"):
        go_on(run, override=["learning_rate"], learning_rate=5e-4, retain_limit=7.0)


def test_names_that_cannot_be_overridden(tmp_path):
    with pytest.raises(ValueError, match="override cannot change 'optim' of a run that goes on"):
        make_trainer(tmp_path / "out", override=["optim"])
    assert "optim" not in OVERRIDABLE


def test_a_checkpoint_without_optimizer_state_is_refused(tmp_path):
    options = {**RUN, "save_only_model": True}
    make_trainer(tmp_path / "out", **options).train()
    with pytest.raises(ValueError, match="without the optimizer's state \\(save_only_model\\)"):
        make_trainer(tmp_path / "out", **options).train(resume_from_checkpoint=True)


def test_another_adapter_is_refused(tmp_path):
    def trainer(rank):
        torch.manual_seed(0)
        lora = LoraConfig(r=rank, target_modules=["q_proj"])
        return make_trainer(tmp_path / "out", model=make_model(0), peft_config=lora, **RUN)

    first = trainer(2)
    first.train()
    with pytest.raises(ValueError, match="its adapter is"):
        trainer(4).train(resume_from_checkpoint=True)
    again = trainer(2)
    again.train(resume_from_checkpoint=True)
    assert checksum(again.model) == checksum(first.model)


def test_experts_go_on_too(tmp_path):
    """A mixture of experts has other names in its files: a run goes on from, or ends with, the weights it saved."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1}

    def trainer(folder, **options):
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
        return make_trainer(folder, model=model, **{**RUN, **options})

    straight = trainer(tmp_path / "out")
    straight.train()
    resumed = trainer(tmp_path / "out")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for (name, a), b in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    ended = trainer(tmp_path / "best", eval_dataset=qa_dataset(2, 200), max_steps=4, **best)
    ended.train()
    again = MixtralForCausalLM.from_pretrained(ended.state.best_model_checkpoint)
    assert checksum(ended.model) == checksum(again)
