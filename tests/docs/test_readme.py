"""The README is true: its example runs as printed, its files and commands exist."""

import re
from pathlib import Path

import pytest
from processes import run

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.subprocess
def test_example_runs_as_printed(tmp_path):
    code, own = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    code += (
        f"\n{own}\nfrom cud_trainer.objectives import OBJECTIVES\nassert OBJECTIVES['hinge'].needs == ('mean_logps',)"
    )
    assert len([line for line in code.splitlines() if line.strip()]) <= 24
    (tmp_path / "example.py").write_text(code)
    done = run(tmp_path / "example.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "True"


def test_training_guide():
    """Its tables name what is registered, its example runs."""
    from cud_trainer.objectives import OBJECTIVES, QUANTITIES
    from cud_trainer.schedule import SCHEDULES, make_schedule

    guide = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for name in [*SCHEDULES, *OBJECTIVES, *QUANTITIES]:
        assert f"`{name}`" in guide, name
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.S)
    try:
        exec(code, {})
        assert make_schedule("uniform+every_other", ["a", "b"]).dynamic == (("every_other", {}),)
    finally:
        SCHEDULES.pop("every_other", None)


def test_which_one_names_all_that_is_registered():
    from cud_trainer.difficulty import METRICS
    from cud_trainer.objectives import OBJECTIVES, STEPS
    from cud_trainer.schedule import SCHEDULES

    page = (ROOT / "docs" / "which.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)`", page)
    for name in [*SCHEDULES, *OBJECTIVES, *METRICS, *STEPS]:
        assert name in named, name


def test_paths_and_commands_exist():
    from cud_trainer.cli import COMMANDS

    for path in re.findall(r"(?:recipes|docs|tests|cud_trainer|evaluation)/[\w./]+", TEXT):
        assert (ROOT / path).exists(), path
    for command in re.findall(r"^cud (\w+)", TEXT, re.M):
        assert command in COMMANDS
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", TEXT, re.M):
        assert f"\n{target}:" in makefile


def test_table_names_what_is_registered():
    from cud_trainer.circuits import ARCHITECTURES
    from cud_trainer.difficulty import METRICS
    from cud_trainer.objectives import OBJECTIVES
    from cud_trainer.schedule import SCHEDULES

    for name in [*METRICS, *SCHEDULES, *OBJECTIVES]:
        assert f"`{name}`" in TEXT, name
    circuits = re.sub(r"[^a-z0-9]", "", (ROOT / "docs" / "circuits.md").read_text(encoding="utf-8").lower())
    for name in ARCHITECTURES:
        assert name.replace("_", "") in circuits, name
