"""`--help` and `cud list`: on one screen, with every own option in a group, and all that is registered."""

import dataclasses
import inspect

import pytest
from trl import ModelConfig, SFTConfig

import evaluation.demo
from cud_trainer.circuits.attribution import METHODS
from cud_trainer.cli import COMMANDS, main
from cud_trainer.commands import help, score, train
from cud_trainer.commands.imports import registries
from cud_trainer.commands.options import ScoreArguments, TrainArguments
from cud_trainer.config import CUDConfig
from evaluation.commands import help as evaluation_help
from evaluation.commands.import_open_unlearning import ImportArguments
from evaluation.commands.inputs import EvaluateArguments
from evaluation.study.options import StudyArguments

KINDS = {
    "demo": ((evaluation.demo.DemoArguments,), evaluation_help.DEMO),
    "score": ((ScoreArguments, CUDConfig, ModelConfig), score.ABOUT),
    "train": ((TrainArguments, CUDConfig, ModelConfig), train.ABOUT),
    "study": ((StudyArguments, ModelConfig), evaluation_help.STUDY),
    "evaluate": ((EvaluateArguments, ModelConfig), evaluation_help.EVALUATE),
    "import": ((ImportArguments,), evaluation_help.IMPORT),
}
STACK = (SFTConfig, ModelConfig)


def own_options(kinds):
    """Options that this project defines, or gives another default."""
    for kind in kinds:
        for one in kind.__mro__:
            if not issubclass(SFTConfig, one) and one is not ModelConfig and dataclasses.is_dataclass(one):
                yield from inspect.get_annotations(one)


def fields(kinds):
    return {f.name for kind in kinds for f in dataclasses.fields(kind) if f.init}


@pytest.mark.parametrize("command", KINDS)
def test_every_own_option_is_in_a_group(command):
    kinds, about = KINDS[command]
    shown = [f.name for group in help.options_by_group(kinds, about.groups).values() for f in group]
    assert len(shown) == len(set(shown))
    own = set(own_options(kinds)) & fields(kinds)
    assert own and not own - set(shown)


def test_groups_name_what_is_there():
    """Nothing that a group names has gone."""
    everywhere = set().union(*(fields(kinds) for kinds, _ in KINDS.values()))
    assert not set(help.OF_NAME) - everywhere
    assert sum(len(names.split()) for names in help.GROUPS.values()) == len(help.OF_NAME)
    for kinds, about in KINDS.values():
        classes = {one.__name__ for kind in kinds for one in kind.__mro__}
        assert not set(about.groups) - fields(kinds) - classes


@pytest.mark.parametrize("command", KINDS)
def test_help_is_one_screen(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert not stop.value.code
    said = capsys.readouterr().out
    kinds, about = KINDS[command]
    assert len(said.splitlines()) <= 45 and max(map(len, said.splitlines())) <= 120
    for group in help.options_by_group(kinds, about.groups):
        assert f"\n{group} " in said
    assert f"cud {command} " in said.split("Every option")[1]  # an example


def test_help_on_a_group_an_option_and_all(capsys):
    for asked, has, has_not in (
        (["--help", "schedule"], ["--passes=5", "How difficulty acts"], ["--learning_rate"]),
        (["--help", "retain_weight"], ["--retain_weight ", "Tune it first"], ["--passes"]),
        (["--help-all"], ["--passes", "--adam_beta1", "--import"], []),
    ):
        with pytest.raises(SystemExit):
            main(["train", *asked])
        said = capsys.readouterr().out
        assert all(text in said for text in has) and not any(text in said for text in has_not)
    assert main(["train", "--help", "nonsense"]) == 2
    assert "no group or option 'nonsense'; groups are data, objective" in capsys.readouterr().err


def test_usage_is_one_screen(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) <= 30 and all(f"\n  {command} " in said for command in COMMANDS)


@pytest.mark.parametrize("kind", [*registries(), "attributions"])
def test_list(kind, capsys):
    names = METHODS if kind == "attributions" else registries()[kind]
    assert main(["list", kind]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(names)
    assert all(len(line.split()) > 1 and "says nothing" not in line for line in lines)


def test_list_refuses_and_lists_all(capsys):
    assert main(["list", "losses"]) == 2
    assert "no 'losses' to list; choose from objectives" in capsys.readouterr().err
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert all(f"{kind}:" in said for kind in registries())
