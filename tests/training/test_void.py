"""A run that comes to nothing says so, and nothing that is no gradient moves a weight."""

import json

import pytest
from builders import make_model, make_tokenizer, qa_dataset
from runs import checksum, make_trainer

from cud_trainer.cli import main
from cud_trainer.objectives import OBJECTIVES, register_objective
from cud_trainer.training import void

# At these targets every sample counts as forgotten from the start.
FORGOTTEN = {"schedule": "upweight_hard+per_sample_stop", "schedule_args": {"per_sample_stop": {"target": 0.9}}}
# A large learning rate, and next to nothing that keeps Adam from dividing by nothing.
EAGER = {"learning_rate": 0.1, "adam_epsilon": 1e-30, "save_strategy": "no", "objective": "npo"}


@pytest.mark.parametrize("retain_loss", ["none", "kl"])
def test_nothing_left_to_forget_ends_before_the_first_step(tmp_path, retain_loss):
    trainer = make_trainer(tmp_path, retain_loss=retain_loss, **FORGOTTEN, **EAGER)
    before = checksum(trainer.model)
    trainer.train()
    assert checksum(trainer.model) == before and trainer.state.global_step == 1
    assert trainer.void_reason() == "nothing was unlearned: no forget sample that was served had a weight"


def test_where_only_the_retain_loss_trains_it_is_said(tmp_path, caplog):
    trainer = make_trainer(tmp_path, retain_loss="nll", **FORGOTTEN, **{**EAGER, "adam_epsilon": 1e-8})
    trainer.train()
    assert trainer.state.global_step > 1 and trainer.void_reason() is None
    assert (
        "from step 1 on schedule 'upweight_hard+per_sample_stop' gives every forget sample the factor 0" in caplog.text
    )


@pytest.fixture
def flat():
    """An objective whose gradient is rounding noise."""

    @register_objective("flat", retain_loss="none")
    def flat(mean_logps):
        return mean_logps * 1e-18

    yield "flat"
    OBJECTIVES.pop("flat")


def test_rounding_noise_is_no_gradient(tmp_path, flat):
    trainer = make_trainer(tmp_path, **{**EAGER, "objective": flat, "retain_loss": "none"})
    before = checksum(trainer.model)
    trainer.train()
    assert checksum(trainer.model) == before
    assert trainer.void_reason() == "nothing was unlearned: the gradient is rounding noise"


def test_a_learning_rate_of_zero_moves_nothing(tmp_path):
    trainer = make_trainer(tmp_path, **{**EAGER, "learning_rate": 0.0})
    trainer.train()
    assert "no weight has changed" in trainer.void_reason()


def test_what_is_learnt_is_not_forgotten(tmp_path, monkeypatch):
    """Gradient ascent of a rate below zero is not to be had; teaching the samples is."""

    monkeypatch.setattr(void, "MEMORISED", 1e-3)

    @register_objective("teach", retain_loss="none")
    def teach(mean_logps):
        return -mean_logps

    try:
        trainer = make_trainer(tmp_path, **{**EAGER, "learning_rate": 1e-3, "adam_epsilon": 1e-8, "objective": "teach"})
        trainer.train()
        assert trainer.void_reason() is None  # nobody has measured
        trainer.evaluate()
        assert trainer.void_reason().startswith("nothing was forgotten: the mean forget probability was 0.")
        monkeypatch.undo()
        assert trainer.void_reason() is None  # there was nothing to forget
    finally:
        OBJECTIVES.pop("teach")


def test_an_ordinary_run_is_not_void(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="no", objective="npo", learning_rate=3e-3)
    trainer.train()
    trainer.evaluate()
    assert trainer.void_reason() is None


def test_later_on_it_is_said_that_only_the_retain_loss_trains(tmp_path, caplog):
    target = {"target": 0.0012}
    trainer = make_trainer(
        tmp_path,
        save_strategy="no",
        objective="ga",
        retain_loss="kl",
        passes=6,
        schedule="per_sample_stop",
        schedule_args=target,
        learning_rate=1e-2,
        difficulty="none",
    )
    trainer.train()
    assert trainer.void_reason() is None
    assert "every forget sample the factor 0 (they are at its target): nothing is forgotten" in caplog.text


@pytest.mark.parametrize("case", ["nothing moved", "nothing to forget"])
def test_the_command_ends_with_3(tmp_path, capsys, case):
    make_model(0).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    for name, rows in (("forget", qa_dataset(6)), ("retain", qa_dataset(6, 100))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "nothing moved": ["--learning_rate", "0"],
        "nothing to forget": '--schedule per_sample_stop --schedule_args {"target":0.9} --retain_loss kl'.split(),
    }
    code = main(
        ["train", "--model_name_or_path", f"{tmp_path}/model", "--forget_dataset", f"{tmp_path}/forget.jsonl"]
        + ["--retain_dataset", f"{tmp_path}/retain.jsonl", "--output_dir", f"{tmp_path}/out", "--use_cpu", "true"]
        + ["--difficulty", "none", "--schedule", "uniform", "--passes", "1", "--report_to", "none", "--bf16", "false"]
        + options[case]
    )
    assert code == 3
    assert "cud train: nothing was unlearned: " in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "out").glob("*.safetensors"))
