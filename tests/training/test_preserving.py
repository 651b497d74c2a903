"""`preserve` is a value for what is not given, and nothing else; where it cannot be it is off, or refused."""

import logging

import pytest
import torch
from builders import make_model
from peft import LoraConfig, get_peft_model
from runs import checksum, config, make_trainer

from cud_trainer.preserving import PLAIN, PRESERVING

RUN = {"objective": "graddiff", "schedule": None, "difficulty": "none", "passes": 2, "save_strategy": "no"}
UNLIKELY = {"schedule": "unlikelihood+per_sample_stop", "schedule_args": {"per_sample_stop": {"target": 0.05}}}


def values(args):
    return {name: getattr(args, name) for name in PRESERVING}


@pytest.mark.parametrize(
    ("objective", "preserve"), [("graddiff", None), ("npo", None), ("simnpo", True), ("kl_min", True), ("wga", True)]
)
def test_on(tmp_path, objective, preserve):
    args = config(tmp_path / "out", **{**RUN, "objective": objective, "preserve": preserve})
    assert args.preserve and values(args) == PRESERVING == {
        "retain_loss": "kl",
        "retain_weight": 256,
        "retain_weight_end": 8,
        "l2_sp": 0.03,
    }


@pytest.mark.parametrize(
    ("given", "others"),
    [
        ({"retain_loss": "nll", "preserve": True}, {}),
        ({"retain_loss": "kl"}, {}),
        ({"l2_sp": 0.0}, {}),
        ({"retain_weight_end": 2.0}, {}),
        ({"retain_weight": 16.0}, {"retain_weight_end": None}),
        ({"retain_weight": 16.0, "retain_weight_end": 4.0}, {}),
        ({"retain_limit": 1.0}, {"retain_weight": 1.0, "retain_weight_end": None}),
    ],
)
def test_what_is_given_stays(tmp_path, given, others):
    args = config(tmp_path / "out", **{**RUN, "preserve": None, **given})
    given = {name: value for name, value in given.items() if name in PRESERVING}
    assert args.preserve and values(args) == {**PRESERVING, **given, **others}
    assert set(args.preserve_filled) == set(PRESERVING) - set(given)


@pytest.mark.parametrize(
    "options",
    [{"preserve": False}, {"retain_loss": "nll"}, {"objective": "ga"}, {"objective": "simnpo"}, {"fsdp": True}],
)
def test_off(tmp_path, options, monkeypatch):
    if options.pop("fsdp", False):
        monkeypatch.setattr("cud_trainer.preserving.sharded_by", lambda args: "FSDP")
    args = config(tmp_path / "out", **{**RUN, "preserve": None, **options})
    own = "none" if args.objective == "ga" else "nll"
    assert not args.preserve and values(args) == {**PLAIN, "retain_loss": own} and args.preserve_filled == ()


def test_refused(tmp_path):
    with pytest.raises(ValueError, match="preserve goes with a retain loss 'nll' or 'kl', .* 'ga' is 'none'"):
        config(tmp_path / "out", **{**RUN, "objective": "ga", "preserve": True})
    with pytest.raises(ValueError, match="preserve goes with a retain loss 'nll' or 'kl', .* 'graddiff' is 'none'"):
        config(tmp_path / "out", **{**RUN, "retain_loss": "none", "preserve": True})


@pytest.mark.parametrize("objective", ["graddiff", "npo"])
@pytest.mark.parametrize("how", ["new", "there"])
def test_adapters(tmp_path, objective, how):
    """As with all weights; the factors that start at zero go back to it."""
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    given = {"peft_config": adapter} if how == "new" else {"model": get_peft_model(make_model(0), adapter)}
    trainer = make_trainer(tmp_path / "out", **given, **{**RUN, "objective": objective, "preserve": None})
    assert trainer.args.preserve and values(trainer.args) == PRESERVING
    pull = "unlikelihood" if objective == "graddiff" else "odds"
    assert [part.name for part, _ in trainer.args.schedule_parts] == [pull, "per_sample_stop"]


def test_graddiff_has_a_schedule_of_its_own(tmp_path):
    """With its target; what is given stays, and without `preserve` it is that of all."""

    def chosen(**options):
        args = config(tmp_path / "out", **{**RUN, "preserve": None, **options})
        return args.schedule, args.schedule_args

    assert chosen() == ("unlikelihood+per_sample_stop", {"per_sample_stop": {"target": 0.05}})
    given = {"unlikelihood": {"scale": 1.0}, "per_sample_stop": {"back": 2.0, "target": 0.1}}
    assert chosen(schedule_args=given) == ("unlikelihood+per_sample_stop", given)
    assert chosen(schedule="uniform") == ("uniform", {})
    for options in ({"objective": "npo"}, {"preserve": False}, {"objective": "simnpo", "preserve": True}):
        assert chosen(**options) == ("odds+per_sample_stop", {})


def test_half_precision_goes_without_l2_sp_unless_asked_for(tmp_path, caplog):
    model = make_model().to(torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path / "a", model=model, **RUN, preserve=None)
    assert trainer.args.l2_sp == 0 and trainer.args.retain_loss == "kl"
    (line,) = [one for one in caplog.messages if "l2_sp" in one]
    assert line.startswith("preserve goes without l2_sp: ") and "bfloat16" in line
    with pytest.raises(ValueError, match="l2_sp needs trained weights in float32"):
        make_trainer(tmp_path / "b", model=model, **RUN, l2_sp=0.03)


def test_it_is_the_run_with_these_options(tmp_path):
    given = make_trainer(tmp_path / "a", **{**RUN, **UNLIKELY, "preserve": False, **PRESERVING})
    preserving = make_trainer(tmp_path / "b", **RUN, preserve=None)
    plain = make_trainer(tmp_path / "c", **RUN)
    for trainer in (given, preserving, plain):
        trainer.train()
    assert checksum(given.model) == checksum(preserving.model) != checksum(plain.model)
