"""The one-way data flow: a stage imports only what is left of it, and the package never imports `evaluation`."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = [
    "files", "options", "data", "logprobs", "circuits", "fingerprint", "difficulty", "schedule", "objectives", "calibration",
    "scoring", "config", "trainer", "commands", "cli",
]  # fmt: skip
# Pure losses need nothing of circuits, difficulty or schedules.
FORBIDDEN = {"objectives": {"circuits", "difficulty", "schedule"}, "schedule": {"difficulty", "circuits"}}


def imports(path: Path):
    """`(module, ...)` of all imports in a file, relative ones resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else ()
            yield ".".join([*base, *([node.module] if node.module else [])])


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


def test_every_module_is_a_stage():
    found = {p.stem for p in (ROOT / "cud_trainer").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert found - {"__init__"} == set(STAGES)


def test_no_machine_is_named():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile("|".join(["/wo" + "rk/", "/tm" + "p/", "/ro" + "ot/", "/ho" + "me/"]))
    for name in tracked.stdout.split():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".j2", ".json"} and path.exists():
            assert not pattern.search(path.read_text(encoding="utf-8")), name
