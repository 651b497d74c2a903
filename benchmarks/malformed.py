"""A thousand malformed invocations: one line and exit code 2, before anything is computed, and no file left.

    python benchmarks/malformed.py --output benchmarks/results/malformed.json

Every wrong option of tests/cli/test_malformed.py on the command line, in a YAML file, in a study and in Python; then
pairs of two wrong options, drawn at random, until there are as many as asked for. Nothing that is malformed may be
accepted, end in a traceback, leave a file, or be refused without its name. Commands run in this process; cells of
studies do not run.
"""

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "cli"), str(ROOT / "tests" / "support"), str(ROOT)]

# ruff: noqa: E402
import test_malformed as cases
from command_lines import make_world

from cud_trainer import CUDConfig
from cud_trainer.cli import main as cud
from cud_trainer.files import write_json
from evaluation.study.pool import Worker

WAYS = ("line", "yaml", "study", "python")


def fault(world: Path, folder: Path, how: str, wrong: dict[str, Any]) -> str | None:
    """What is wrong with how these options are refused; `None` when nothing is."""
    if how == "python":
        try:
            CUDConfig(str(folder / "out"), **{**cases.BASE, **wrong})
        except ValueError as error:
            return (
                "files are left"
                if list(folder.iterdir())
                else None
                if cases.names(str(error), wrong)
                else str(error)[:300]
            )
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:200]
        return "accepted"
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = cud(cases.command(world, folder, how, wrong))
        except BaseException as error:
            return f"{type(error).__name__}: {error}"[:200]
    left = {path.name for path in folder.iterdir()} - {"c.yaml"}
    lines = [line for line in said.getvalue().splitlines() if "error" in line]
    if code != 2 or left or len(lines) != 1 or "Traceback" in said.getvalue() or "fault of cud" in said.getvalue():
        return f"exit code {code}, left {sorted(left)}, said {lines[-1:]}"[:300]
    return None if cases.names(lines[0], wrong) else lines[0][:300]


def single() -> list[tuple[str, dict[str, Any]]]:
    return [(how, {name: value}) for how in WAYS for name, value in cases.WRONG if cases.fits(how, name, value)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, tried = random.Random(args.seed), single()
    while len(tried) < args.count:
        how, (one, two) = draw.choice(WAYS), draw.sample(cases.WRONG, 2)
        if one[0] != two[0] and cases.fits(how, *one) and cases.fits(how, *two):
            tried.append((how, dict([one, two])))
    Worker.run = lambda worker, study, cell, work: "not run here"  # type: ignore[method-assign]
    faults = []
    with tempfile.TemporaryDirectory() as name:
        world = Path(name) / "world"
        world.mkdir()
        make_world(world)
        for number, (how, wrong) in enumerate(tried):
            folder = Path(name) / str(number)
            folder.mkdir()
            found = fault(world, folder, how, wrong)
            if found is not None:
                faults.append({"how": how, "options": repr(wrong), "fault": found})
                print(json.dumps(faults[-1]), flush=True)
    print(f"{len(tried) - len(faults)} of {len(tried)} refused in one line")
    if args.output:
        ways = Counter(how for how, _ in tried)
        found = {"invocations": len(tried), "refused": len(tried) - len(faults), "seed": args.seed, "ways": ways}
        write_json(args.output, {**found, "options": len({n for n, _ in cases.WRONG}), "faults": faults})


if __name__ == "__main__":
    main()
