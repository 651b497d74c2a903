"""The house stays in order: a stage imports only what is left of it, the package never imports `evaluation`, nothing
imports in a circle, files and functions are short, and what is private in other packages is used in one place."""

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest
import source
from source import imports

import cud_trainer

ROOT = Path(__file__).parents[2]
STAGES = [
    "files",
    "ownership",
    "typed",
    "markdown",
    "registry",
    "data",
    "models",
    "logprobs",
    "resumable",
    "circuits",
    "difficulty",
    "schedule",
    "objectives",
    "scoring",
    "integrations",
    "stack_options",
    "config_checks",
    "preserving",
    "config",
    "training",
    "trainer",
    "commands",
    "cli",
]
# Pure losses need nothing of circuits, difficulty or schedules.
FORBIDDEN = {"objectives": {"circuits", "difficulty", "schedule"}, "schedule": {"difficulty", "circuits"}}

# Private names of other packages that are used elsewhere than in `training/hooks.py`, and the test of each that fails
# when it goes away.
CONTRACTS = {
    "_VALID_DICT_FIELDS": "contracts/test_contracts.py::test_prepared_rows_are_taken_as_they_are",
    "_attn_implementation": "contracts/test_private_names.py::test_a_configuration_says_which_attention_runs",
    "_buffers": "contracts/test_private_names.py::test_a_module_computes_with_what_its_tables_hold",
    "_forward_hooks": "contracts/test_contracts.py::test_taking_an_adapter_off_needs_what_calibration_puts_back",
    "_hf_hook": "contracts/test_private_names.py::test_an_offloaded_module_says_where_it_runs",
    "_instances": "contracts/test_private_names.py::test_open_progress_bars_are_listed",
    "_modules": "contracts/test_contracts.py::test_taking_an_adapter_off_needs_what_calibration_puts_back",
    "_orig_mod": "contracts/test_private_names.py::test_a_compiled_model_keeps_the_model",
    "_parameters": "contracts/test_private_names.py::test_a_module_computes_with_what_its_tables_hold",
    "_register_trainer": "integrations/test_open_unlearning.py::test_configurations_name_what_is_registered",
    "_remove_unused_columns": "contracts/test_private_names.py::test_a_trainer_drops_columns_of_a_given_dataset",
    "_wandb": "contracts/test_private_names.py::test_the_wandb_callback_keeps_its_module",
}


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


def test_measures_know_nothing_of_reports():
    found = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in source.files("evaluation/metrics")
        for module in imports(path)
        if f"{module}.".startswith("evaluation.report.")
    }
    assert not found


def test_no_two_modules_import_each_other():
    assert not source.circles()


def test_files_are_short():
    """At most 500 lines."""
    assert not {path: source.lines(path) for path in source.files() if source.lines(path) > 500}


def test_the_trainer_hands_on():
    """Its file has at most 330 lines, the class 270: what has a reason of its own is a part of `training/`."""
    path = ROOT / "cud_trainer" / "trainer.py"
    classes = [node for node in source.tree_of(path).body if isinstance(node, ast.ClassDef)]
    assert source.lines(path) <= 330
    assert {c.name: c.end_lineno - c.lineno + 1 <= 270 for c in classes} == {"CUDTrainer": True}


def test_functions_are_short():
    """At most 80 lines, docstring and what is defined in it included."""
    found = {(path, name): size for path in source.files() for name, size in source.functions(path).items()}
    assert len(found) > 500
    assert not {place: size for place, size in found.items() if size > 80}


def test_private_names_of_other_packages():
    """In one module, or with a test that fails when they go away."""
    found = {path.relative_to(ROOT): source.borrowed(path) for path in source.files()}
    elsewhere = {path: names for path, names in found.items() if path != Path("cud_trainer/training/hooks.py")}
    assert not {f"{path}: {name}" for path, names in elsewhere.items() for name in names - set(CONTRACTS)}
    unused = set(CONTRACTS).difference(*elsewhere.values())
    assert not unused, f"take out of CONTRACTS: {sorted(unused)}"


@pytest.mark.parametrize("test", sorted(set(CONTRACTS.values())))
def test_every_contract_has_its_test(test):
    path, *names = test.split("::")
    assert ".".join(names) in source.functions(ROOT / "tests" / path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from torch._dynamo import reset", {"_dynamo"}),
        ("from transformers.trainer import _is_peft_model", {"_is_peft_model"}),
        ("import torch._C", {"_C"}),
        ("def f(module):\n    return module._parameters", {"_parameters"}),
        ("def f(module):\n    module._backward_hooks = {}", {"_backward_hooks"}),
        ("getattr(model, '_tied_weights_keys', None)", {"_tied_weights_keys"}),
        ("class A(Trainer):\n    def _get_train_sampler(self): ...", {"_get_train_sampler"}),
        ("def f():\n    class A(SFTTrainer):\n        _tag_names = ['x']", {"_tag_names"}),
        ("class A(Module):\n    def _parts(self): ...", set()),
        ("import os, dataclasses\nos._exit(1)\nx = torch.__version__", set()),
        ("from ._own import _x\nfrom cud_trainer.x import _y", set()),
    ],
)
def test_no_way_to_a_private_name_is_overlooked(tmp_path, text, expected):
    (tmp_path / "x.py").write_text(text)
    assert source.borrowed(tmp_path / "x.py") == expected


def test_the_named_rules():
    """Losses are pure; difficulty knows nothing of how it is used."""
    rules = {
        "objectives": {"circuits", "difficulty", "schedule", "scoring", "trainer"},
        "difficulty": {"objectives", "schedule", "scoring", "trainer"},
        "circuits": {"difficulty", "objectives", "schedule"},
        "data": set(STAGES) - {"data", "files"},  # a key is written as all files are
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


def test_contributing_shows_the_house():
    """Every room is in its table, and every path that it names is there."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = set(re.findall(r"`((?:cud_trainer|evaluation|tests)/[\w./]*)`", text))
    assert not {room for room in rooms if not (ROOT / room).exists()}
    for package in ("cud_trainer", "evaluation"):
        for path in (ROOT / package).iterdir():
            if (path / "__init__.py").exists():
                assert f"{package}/{path.name}/" in rooms
    stages = {room.split("/")[1].removesuffix(".py") for room in rooms if room.startswith("cud_trainer/")}
    assert stages == set(STAGES)


def test_no_machine_is_named():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile("(?<![*/])(" + "|".join(["/wo" + "rk/", "/tm" + "p/", "/ro" + "ot/", "/ho" + "me/"]) + ")")
    names = tracked.stdout.splitlines()
    assert "cud_trainer/trainer.py" in names
    for name in names:
        path = ROOT / name
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" not in content:  # text, whatever it is called
            assert not pattern.search(content.decode("utf-8")), name


def test_no_two_test_files_share_a_name():
    """pytest would take the second for the first, and stop."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
