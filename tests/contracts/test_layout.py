"""The one-way data flow: a stage imports only what is left of it, and the package never imports `evaluation`."""

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest

import cud_trainer

ROOT = Path(__file__).parents[2]
STAGES = [
    "files", "registry", "data", "models", "logprobs", "resumable", "circuits", "difficulty", "schedule", "objectives",
    "scoring", "integrations", "config", "training", "trainer", "commands", "cli",
]  # fmt: skip
# Pure losses need nothing of circuits, difficulty or schedules.
FORBIDDEN = {"objectives": {"circuits", "difficulty", "schedule"}, "schedule": {"difficulty", "circuits"}}


# What `from cud_trainer import X` loads, wherever it is written.
EXPORTS = {name: f"cud_trainer{module}" for name, module in cud_trainer._EXPORTS.items()}


def imports(path: Path, text: str | None = None):
    """Everything a file imports, also inside functions and by name; relative imports and lazy exports resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8") if text is None else text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            if module == "cud_trainer":  # a module of the package, or something that it loads on first use
                names = [alias.name for alias in node.names]
                yield from (EXPORTS.get(name, f"cud_trainer.{name}") for name in names if name in {*EXPORTS, *STAGES})
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in {
            "import_module",
            "__import__",
        }:
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


@pytest.mark.parametrize("path", sorted((ROOT / "cud_trainer").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_stages_import_to_the_left(path):
    parts = path.relative_to(ROOT / "cud_trainer").with_suffix("").parts
    stage = parts[0]
    for module in imports(path):
        assert module.split(".")[0] != "evaluation", f"{path} imports {module}"
        if module.startswith("cud_trainer.") and stage != "__init__":
            other = module.split(".")[1]
            assert other == stage or STAGES.index(other) < STAGES.index(stage), f"{stage} imports {other}"
            assert other not in FORBIDDEN.get(stage, ()), f"{stage} imports {other}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import evaluation.report as r", "evaluation.report"),
        ("def f():\n    from evaluation import report", "evaluation"),
        ("import importlib\nimportlib.import_module('evaluation.demo')", "evaluation.demo"),
        ("from .. import trainer", "cud_trainer.trainer"),
        ("from .. import CUDTrainer", "cud_trainer.trainer"),
        ("from cud_trainer import score_difficulty", "cud_trainer.scoring"),
        ("from ..scoring.calibration import calibrate", "cud_trainer.scoring.calibration"),
        ("from .losses import ga", "cud_trainer.objectives.losses"),
    ],
)
def test_no_way_to_import_is_overlooked(text, expected):
    assert expected in list(imports(ROOT / "cud_trainer" / "objectives" / "step.py", text))


def test_the_named_rules():
    """Losses are pure; difficulty knows nothing of how it is used."""
    rules = {
        "objectives": {"circuits", "difficulty", "schedule", "scoring", "trainer"},
        "difficulty": {"objectives", "schedule", "scoring", "trainer"},
        "circuits": {"difficulty", "objectives", "schedule"},
        "data": set(STAGES) - {"data"},
        "logprobs": set(STAGES) - {"data", "models", "logprobs"},
    }
    for stage, forbidden in rules.items():
        place = ROOT / "cud_trainer" / stage
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]:
            found = {module.split(".")[1] for module in imports(path) if module.startswith("cud_trainer.")}
            assert not found & forbidden, path


def test_packages_of_the_wheel():
    """What pyproject.toml finds is what is there, with the data files that it names."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    include = ast.literal_eval(re.search(r"^include = (\[.*\])$", project, re.M)[1])
    found = {
        ".".join(p.parent.relative_to(ROOT).parts)
        for pattern in include
        for top in ROOT.glob(pattern)
        if top.suffix != ".egg-info"
        for p in top.rglob("__init__.py")
    }
    assert found == {
        "cud_trainer",
        "cud_trainer.circuits",
        "cud_trainer.difficulty",
        "cud_trainer.difficulty.cud",
        "cud_trainer.commands",
        "cud_trainer.data",
        "cud_trainer.integrations",
        "cud_trainer.integrations.open_unlearning",
        "cud_trainer.models",
        "cud_trainer.objectives",
        "cud_trainer.schedule",
        "cud_trainer.scoring",
        "cud_trainer.training",
        "evaluation",
        "evaluation.commands",
        "evaluation.metrics",
        "evaluation.report",
        "evaluation.study",
        "evaluation.testbed",
    }
    data = re.search(r"package-data\]\n((?:\w+ = \[.*\]\n)+)", project)[1].splitlines()
    assert {line.split(" = ")[0] for line in data} == {"cud_trainer", "evaluation"}
    for line in data:
        package, patterns = line.split(" = ")
        for pattern in ast.literal_eval(patterns):
            assert list((ROOT / package).glob(pattern)), f"{package}: {pattern}"
    scripts = re.search(r'^cud = "(.*):(.*)"$', project, re.M)
    assert callable(getattr(importlib.import_module(scripts[1]), scripts[2]))
    assert f'version = "{cud_trainer.__version__}"' in project


def test_every_module_is_a_stage():
    found = {p.stem for p in (ROOT / "cud_trainer").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert found - {"__init__"} == set(STAGES)


def test_no_machine_is_named():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile("|".join(["/wo" + "rk/", "/tm" + "p/", "/ro" + "ot/", "/ho" + "me/"]))
    names = tracked.stdout.splitlines()
    assert "cud_trainer/trainer.py" in names
    for name in names:
        path = ROOT / name
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" not in content:  # text, whatever it is called
            assert not pattern.search(content.decode("utf-8")), name
