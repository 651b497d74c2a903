"""Options of TRL and transformers act, are refused, or say that they have no effect; all before any compute."""

import dataclasses
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from builders import ROOT, make_model, qa_dataset
from runs import config, make_trainer
from transformers import AutoConfig, AutoModelForCausalLM, EarlyStoppingCallback
from trl import SFTConfig

from cud_trainer.cli import main
from cud_trainer.config_checks import check_launch
from cud_trainer.stack_options import ACTS, HARMLESS, IDLE, NEEDS, REFUSED, RENAMED, higher_is_better
from cud_trainer.training.stack import check_stack

FIELDS = {field.name: field for field in dataclasses.fields(SFTConfig)}
OTHER = {
    "num_train_epochs": 3.0, "train_sampling_strategy": "random", "truncation_mode": "keep_end", "loss_type": "dft",
    "dataset_text_field": "content", "dataset_kwargs": {"x": 1}, "label_names": ["y"], "completion_only_loss": False,
    "label_smoothing_factor": 0.1, "router_aux_loss_coef": 0.01, "parallelism_config": "cp", "data_seed": 3,
    "dataset_num_proc": 2, "length_column_name": "size", "packing_strategy": "wrapped",
}  # fmt: skip


def other_value(name):
    """A value that is not the default."""
    if name in OTHER:
        return OTHER[name]
    default = config("x").__dataclass_fields__[name].default
    assert default in (True, False, None), name
    return not default


def test_a_name_that_the_stack_gives_up_is_handed_on_under_the_new_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        args = config("x", gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
        assert not config("x", gradient_checkpointing=False).gradient_checkpointing
    for old, new in RENAMED.items():
        assert getattr(args, old) and getattr(args, new, getattr(args, old)) == getattr(args, old)


def test_memory_is_pinned_only_where_there_is_something_to_pin_it_for(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert not config("x", use_cpu=False, dataloader_pin_memory=True).dataloader_pin_memory


def test_every_option_of_the_installed_trl_is_in_the_table_once():
    tables = [set(ACTS), set(REFUSED), set(IDLE)]
    assert set(FIELDS) == set().union(*tables)
    assert sum(map(len, tables)) == len(FIELDS)
    assert set(HARMLESS) <= set(REFUSED)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"^{name} .*got "):
        config(tmp_path, **{name: other_value(name)})
    for value in HARMLESS.get(name, ()):
        config(tmp_path, **{name: value})


@pytest.mark.parametrize("name", sorted(IDLE))
def test_no_effect_is_said(name, tmp_path, caplog):
    import logging

    logging.getLogger("cud_trainer").propagate = True
    config(tmp_path, **{name: other_value(name)})
    said = [record.message for record in caplog.records if "has no effect" in record.message]
    assert said == [f"{name}={other_value(name)!r} has no effect: {IDLE[name]}"]
    caplog.clear()
    config(tmp_path)
    assert not [record for record in caplog.records if "has no effect" in record.message]


@pytest.mark.parametrize(("name", "value"), [("hub_strategy", "end"), ("hub_always_push", True)])
def test_no_effect_without_another_one_is_said(name, value, tmp_path, caplog):
    import logging

    logging.getLogger("cud_trainer").propagate = True
    config(tmp_path, **{name: value}, push_to_hub=True)
    assert not [record for record in caplog.records if "has no effect" in record.message]
    config(tmp_path, **{name: value})
    assert f"{name}={value!r} has no effect without push_to_hub" in [record.message for record in caplog.records]
    assert set(NEEDS) <= set(ACTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "sgd", "optim_args": "momentum=0.0"}, None),
        ({"optim": "sgd", "optim_args": "nesterov=false,momentum=0.5"}, None),
        ({"optim": "sgd", "optim_args": "momentum=0.5,beta=1"}, "optim_args: optim 'sgd' has no option 'beta'"),
        ({"optim": "adamw_torch", "optim_args": "beta1=0.5"}, "optim_args: optim 'adamw_torch' has no option 'beta1'"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, None),
        ({"gradient_checkpointing_kwargs": {"nope": 1}}, "gradient_checkpointing_kwargs {'nope': 1}: "),
    ],
)
def test_options_inside_options(tmp_path, options, message):
    args = config(tmp_path, **options)
    if message is None:
        check_stack(args, make_model(0), own_optimizer=False)
        return
    with pytest.raises(ValueError, match=message):
        check_stack(args, make_model(0), own_optimizer=False)


def test_the_documentation_names_them_all():
    text = Path(ROOT, "docs", "training.md").read_text()
    assert not [name for name in (*REFUSED, *IDLE) if f"`{name}`" not in text]


def make_without_scores(monkeypatch, output, **options):
    monkeypatch.setattr("cud_trainer.training.plan.score_difficulty", lambda *a, **k: pytest.fail("computed"))
    return make_trainer(output, **options)


def without_checkpointing():
    known = {"vocab_size": 258, "n_embd": 32, "n_head": 4, "n_layer": 2, "dff": 48}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("ctrl", **known))


def with_experts():
    sizes = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
    experts = {"num_experts": 2, "moe_intermediate_size": 8, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **sizes, **experts))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"report_to": "tensorboard"}, "report_to 'tensorboard': .*tensorboard"),
        ({"report_to": "nothing_such"}, "nothing_such"),
        ({"optim": "adamw_8bit"}, "optim 'adamw_8bit': .*bitsandbytes"),
        ({"optim": "galore_adamw"}, "optim 'galore_adamw': "),
        ({"optim_args": "lr"}, "optim 'adamw_torch"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type 'cosine_with_min_lr': "),
        ({"lr_scheduler_kwargs": {"nothing": 1}}, "lr_scheduler_type 'constant' has no options"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"nothing": 1}}, "lr_scheduler_type 'cosine': "),
        ({"push_to_hub": True, "hub_model_id": "me/x"}, "push_to_hub: cannot make the repository"),
        ({"model": without_checkpointing}, "CTRLLMHeadModel has no gradient checkpointing"),
        ({"model": with_experts, "log_update_share": True}, "log_update_share cannot be: .*experts"),
        ({"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_steps": 2},
         "metric_for_best_model 'loss' is measured by no evaluation.*'balance'"),
        ({"load_best_model_at_end": True, "metric_for_best_model": "forget_prob/bucket_9", "save_steps": 2},
         "'forget_prob/bucket_9' is measured by no evaluation"),
    ],
)  # fmt: skip
def test_what_the_stack_refuses_is_refused_before_any_compute(monkeypatch, tmp_path, options, message):
    settings = {"model": make_model, "eval_strategy": "steps", "eval_steps": 2, **options}
    settings["model"] = settings["model"]()
    with pytest.raises(ValueError, match=message):
        make_without_scores(monkeypatch, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_several_gpus_without_a_launcher(monkeypatch, tmp_path):
    monkeypatch.setattr("cud_trainer.config.CUDConfig.n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="2 GPUs are visible to one process.*torchrun"):
        make_without_scores(monkeypatch, tmp_path / "out")


@pytest.mark.parametrize("metric", ["forget_prob", "eval_forget_prob/bucket_2", "loss", "eval_kept_loss"])
def test_lower_is_better(tmp_path, metric):
    assert not higher_is_better(metric)
    args = config(tmp_path, metric_for_best_model=metric)
    assert args.greater_is_better is False
    assert config(tmp_path, metric_for_best_model=metric, greater_is_better=True).greater_is_better is True
    assert config(tmp_path, metric_for_best_model="retain_prob").greater_is_better is True


@pytest.mark.slow
def test_the_best_checkpoint_by_forget_prob_is_the_lowest(tmp_path):
    trainer = make_trainer(
        tmp_path / "out", model=make_model(0), objective="graddiff", learning_rate=3e-3, passes=3,
        eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="forget_prob",
    )  # fmt: skip
    trainer.add_callback(EarlyStoppingCallback(2))
    trainer.train()
    measured = {e["step"]: e["eval_forget_prob"] for e in trainer.state.log_history if "eval_forget_prob" in e}
    assert len(measured) > 3
    assert trainer.state.best_model_checkpoint.endswith(f"-{min(measured, key=measured.get)}")
    assert trainer.predict().metrics["test_forget_prob"] == pytest.approx(min(measured.values()))


@pytest.mark.parametrize("kind", [ImportError, RuntimeError])
def test_what_a_package_refuses_is_one_line(monkeypatch, capsys, kind):
    def refuse(argv):
        raise kind("needs\nsomething else")

    monkeypatch.delenv("CUD_TRACEBACK", raising=False)
    monkeypatch.setattr("cud_trainer.commands.train.train", refuse)
    assert main(["train"]) in (1, 2)
    said = capsys.readouterr().err
    assert "needs something else" in said and said.count("\n") == 1


def test_a_dataset_of_ones_own_gives_the_loss(tmp_path):
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    make_trainer(tmp_path / "a", eval_dataset=qa_dataset(2, 200), metric_for_best_model="loss", **options)
    make_trainer(
        tmp_path / "b", eval_dataset={"kept": qa_dataset(2, 200)}, metric_for_best_model="kept_loss", **options
    )


def test_processes_that_each_take_themselves_for_the_only_one(monkeypatch):
    """As `torchrun` starts them on a CPU without `use_cpu`: every one would do all of the work, over the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="a launcher started 2 processes, .* use_cpu"):
        check_launch(SimpleNamespace(world_size=1))
    check_launch(SimpleNamespace(world_size=2))
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_launch(SimpleNamespace(world_size=1))
