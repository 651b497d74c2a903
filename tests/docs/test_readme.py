"""The README is true: its example runs as printed, its files and commands exist."""

import re
from pathlib import Path

import pytest
from processes import run

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_three_screens():
    assert len(TEXT.splitlines()) <= 130
    assert len(re.findall(r"\d\.\d", TEXT)) <= 40


@pytest.mark.subprocess
def test_example_runs_as_printed(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    (tmp_path / "example.py").write_text(code)
    done = run(tmp_path / "example.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0 <= float(done.stdout.splitlines()[-1]) < 0.2  # what the comment says: little is left


def test_training_guide():
    """Its tables name what is registered, its example runs."""
    from cud_trainer.objectives import OBJECTIVES, QUANTITIES
    from cud_trainer.schedule import SCHEDULES, make_schedule

    guide = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for name in [*SCHEDULES, *OBJECTIVES, *QUANTITIES]:
        assert f"`{name}`" in guide, name
    try:
        for code in re.findall(r"```python\n(.*?)```", guide, re.S):
            exec(code, {})
        assert make_schedule("uniform+every_other", ["a", "b"]).dynamic == (("every_other", {}),)
        assert OBJECTIVES["hinge"].needs == ("mean_logps",)
    finally:
        SCHEDULES.pop("every_other", None)
        OBJECTIVES.pop("hinge", None)


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

    for path in re.findall(r"(?:recipes|docs|tests|cud_trainer|evaluation|benchmarks)/[\w./]*\w", TEXT):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXT):
        assert (ROOT / link).exists(), link
    commands = re.findall(r"`cud (\w+)", TEXT)
    assert len(commands) > 5 and set(commands) <= set(COMMANDS)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", TEXT, re.M):
        assert f"\n{target}:" in makefile


def test_every_architecture_is_named():
    from cud_trainer.circuits import ARCHITECTURES

    circuits = re.sub(r"[^a-z0-9]", "", (ROOT / "docs" / "circuits.md").read_text(encoding="utf-8").lower())
    for name in ARCHITECTURES:
        assert name.replace("_", "") in circuits, name
