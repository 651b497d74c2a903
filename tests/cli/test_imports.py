"""`--import my.py`: run once, on every command, refused in one line, and in the processes of a study."""

import json

import pytest
from command_lines import make_world
from studies import config

from cud_trainer import registry
from cud_trainer.circuits import run_description
from cud_trainer.cli import main
from cud_trainer.commands.imports import registries

MINE = """
from helper_beside import TEXT
from cud_trainer.objectives import register_objective
from cud_trainer.schedule import register_schedule

@register_objective("my_ascent", token_mean=True)
def my_ascent(mean_logps):
    'Mine.'
    return mean_logps

@register_schedule("my_order", metric=None)
def my_order(difficulty, turn):
    'My own order.'
    return turn.generator().permutation(turn.size)

with open("times.txt", "a") as file:
    file.write(TEXT)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A file that registers something, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helper_beside.py").write_text("TEXT = 'x'\n")
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def test_it_runs_once_and_is_listed(mine, capsys):
    for _ in range(2):
        assert main(["list", "objectives", "schedules", "--import", "mine.py"]) == 0
    said = capsys.readouterr().out
    assert "my_ascent" in said and "(order) My own order." in said
    assert mine.with_name("times.txt").read_text() == "x"
    with pytest.raises(ValueError, match="calls register_architecture for no model type"):
        run_description(mine)  # run already, and nothing of that kind
    assert mine.with_name("times.txt").read_text() == "x"


@pytest.mark.parametrize("command", ["train", "score", "evaluate", "study", "demo", "import", "list"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file"),
        ("1 / 0", "broken.py: ZeroDivisionError: division by zero"),
        ("def", "broken.py: SyntaxError: invalid syntax"),
        ("import nothing_of_that_name", "broken.py: ModuleNotFoundError"),
        ("raise SystemExit(0)", "broken.py: SystemExit"),
        ("x = 1", "broken.py registers nothing: it calls none of register_objective"),
        (
            "from cud_trainer.objectives import register_objective as r\nr('m1')(lambda logps: logps)\nr('npo')(lambda logps: logps)",
            "objective 'npo' is already registered",
        ),
    ],
)
def test_refused_in_one_line(mine, command, text, message, capsys):
    if text is not None:
        mine.with_name("broken.py").write_text(text)
    before = {kind: list(entries) for kind, entries in registries().items()}
    assert main([command, "--import", "broken.py"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "import: " in said[0] and message in said[0]
    assert before == {kind: list(entries) for kind, entries in registries().items()}


def test_a_yaml_file_can_name_it(mine, capsys):
    mine.with_name("c.yaml").write_text("import: mine.py\nobjective: my_ascent\n")
    assert main(["train", "--config", "c.yaml", "--output_dir", "out", "--bf16", "false"]) == 2
    assert "model is missing" in capsys.readouterr().err  # and not: unknown objective


@pytest.mark.subprocess
@pytest.mark.slow
def test_a_study_runs_it_in_its_processes(mine, tmp_path):
    make_world(tmp_path)
    train = {"difficulty": "none", "retain_loss": "none", "passes": 1, "bf16": False, "use_cpu": True}
    grid = {"objective": ["my_ascent"], "schedule": ["my_order"]}
    command = config(tmp_path, tmp_path / "study", grid=grid, train=train, **{"import": "mine.py"})
    assert main(command) == 0
    (cell,) = (tmp_path / "study" / "cells").iterdir()
    assert (cell / "result.json").exists()
    assert json.loads((cell / "cell.json").read_text())["settings"]["imports"]
    mine.write_text(MINE + "\n# another version\n")
    registry._added.clear()
    for kind, name in (("objectives", "my_ascent"), ("schedules", "my_order")):
        del registries()[kind][name]
    assert main(command) == 2  # the cell was run with another file
