"""`cud study` killed at random points, started twice, out of disk: nothing is lost, nothing is wrong."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import cell_work
import pandas as pd
import pytest
from builders import make_model, make_tokenizer, qa_dataset
from studies import config, results

from cud_trainer.cli import main
from evaluation.study.grid import Cell
from evaluation.study.pool import Pool

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]

ROOT = Path(__file__).parents[2]
# Where a study is killed, twice in each round: what must be there, and how many seconds later at most.
ROUNDS = [
    [("cells/scores-*/.*.tmp", 0.2), ("cells/schedule=*/work", 2.0)],  # a score cell writes; a run is on its way
    [("cells/scores-*/log.txt", 8.0), ("cells/schedule=*/.result.json.*.tmp", 0.2)],  # or its result is written
    [(".study.json.*.tmp", 0.2), ("cells/scores-*/parts/run.json", 1.0)],
    [(".lock", 3.0), ("cells/schedule=*/log.txt", 6.0)],
    [("cells/scores-*/parts/.*.tmp", 0.2), ("cells/schedule=*/cell.json", 3.0)],
]
# CI has time for the first only; CUD_STUDY_ROUNDS=5 kills ten times.
N_ROUNDS = int(os.environ.get("CUD_STUDY_ROUNDS", "1"))
# Every file stays under its temporary name for a while, so that a kill finds it there; one that is waited for stays until
# it has been seen.
SLOW_WRITES = """
import fnmatch, os, time
replace = os.replace
def slow(source, target, *rest, **options):
    if str(source).endswith(".tmp"):
        while fnmatch.fnmatch(source, os.environ["WAITED_FOR"]) and not os.path.exists(os.environ["SEEN"]):
            time.sleep(0.01)
        time.sleep(0.25)
    return replace(source, target, *rest, **options)
os.replace = slow
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    make_model(0).save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    forget = qa_dataset(12)
    forget.add_column("author", [f"author {i % 4}" for i in range(12)]).to_json(root / "forget.jsonl")
    qa_dataset(8, 100).to_json(root / "retain.jsonl")
    (root / "slow").mkdir()
    (root / "slow" / "sitecustomize.py").write_text(SLOW_WRITES)
    return root


def small(world, output, **changes):
    """A study of a score cell and two runs."""
    shared = ["--id_key", str(world / "ids.key")]  # the same ids in every folder
    return [*config(world, output, grid={"schedule": ["uniform", "upweight_hard"]}, **changes), *shared]


def start(
    world, command, pattern: Path | str = "", seen: Path | str = "", said: int = subprocess.DEVNULL
) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(world / "slow"), str(ROOT)])}
    environment.update(WAITED_FOR=str(pattern), SEEN=str(seen))
    return subprocess.Popen(
        [sys.executable, "-m", "cud_trainer.cli", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=said,
        start_new_session=True,
    )


def wait_for(output: Path, pattern: str, process: subprocess.Popen) -> bool:
    """Whether `pattern` was there before the process ended."""
    while process.poll() is None:
        if any(output.glob(pattern)):
            return True
        time.sleep(0.02)
    return False


def wait_for_the_end(session: int) -> None:
    """Until no process of a study is left, its workers among them."""
    while processes(session):
        time.sleep(0.05)


def processes(session: int) -> list[str]:
    """Processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended
            continue
        if int(number) == session and state != "Z":
            found.append(path.parent.name)
    return found


def contents(output: Path) -> dict:
    """What every cell left, and the report, without what differs between two starts."""
    found: dict = {"report": results(output), "samples": pd.read_parquet(output / "per_sample.parquet").to_dict()}
    for folder in sorted((output / "cells").iterdir()):
        names = {path.name for path in folder.iterdir()}
        assert names == {"cell.json", "log.txt", "result.json"} | ({"scores.parquet"} & names), folder
        found[folder.name] = json.loads((folder / "result.json").read_text())
        found[folder.name].pop("seconds")
        if "scores.parquet" in names:
            found["scores"] = pd.read_parquet(folder / "scores.parquet").to_dict()
    return found


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("straight") / "out"
    assert main(small(world, output)) == 0
    return contents(output)


@pytest.mark.parametrize("number", range(N_ROUNDS))
def test_killed_at_random_points_it_ends_the_same(world, straight, tmp_path, monkeypatch, capsys, number):
    output = tmp_path / "killed"
    command = small(world, output)
    draw, hits = random.Random(number), 0
    for turn, (pattern, longest) in enumerate(ROUNDS[number]):
        seen = tmp_path / f"seen {turn}"
        process = start(world, command, output / pattern, seen)
        if wait_for(output, pattern, process):
            if turn == number == 0:  # a second study in that folder, by a relative path from elsewhere
                monkeypatch.chdir(tmp_path)
                capsys.readouterr()
                assert main(small(world, output, output_dir=output.name)) == 2
                assert "another study is running in killed" in capsys.readouterr().err
            seen.touch()
            time.sleep(draw.random() * longest)
        hits += process.poll() is None
        if process.poll() is None and turn == 0:
            os.kill(process.pid, signal.SIGKILL)  # its cells have to end by themselves
        elif process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        wait_for_the_end(process.pid)
    assert hits == 2  # it did not just run through
    assert (output / ".lock").exists()  # left behind, and in nobody's way
    assert main(command) == 0
    assert contents(output) == straight
    assert not [path for path in output.rglob("*") if path.name.endswith(".tmp")]


def test_ctrl_c_finishes_what_runs_and_a_second_one_ends_it(world, tmp_path):
    """As a terminal sends it: to all processes. What has finished stays, and the same command would go on."""
    output, seen = tmp_path / "out", tmp_path / "seen"
    train = {"objective": "ga", "passes": 1, "difficulty": "none", "bf16": False, "use_cpu": True}
    command = config(world, output, workers=1, train=train, grid={"schedule": ["uniform"], "seed": [1, 2]})
    pattern = str(output / "cells" / "schedule=*" / ".result.json.*.tmp")
    for times, finished in ((1, 1), (2, 1)):
        with open(tmp_path / f"said{times}", "w") as file:
            process = start(world, command, pattern, seen, file.fileno())
        said = tmp_path / f"said{times}"
        assert wait_for(output, "cells/schedule=*/.result.json.*.tmp", process)  # the cell waits there for `seen`
        os.killpg(process.pid, signal.SIGINT)
        while "finishing 1 that run (schedule=uniform,seed=" not in said.read_text():
            assert process.poll() is None
            time.sleep(0.05)
        if times == 1:
            seen.touch()
        else:
            os.killpg(process.pid, signal.SIGINT)
        assert process.wait() == 130
        wait_for_the_end(process.pid)
        seen.unlink(missing_ok=True)
        assert len(list(output.glob("cells/*/result.json"))) == finished
        (last,) = [line for line in said.read_text().splitlines() if line.startswith("cud study: ")]
        assert last.startswith(f"cud study: interrupted: {finished} cells are finished, of 2 at most")
        assert last.endswith("The same command goes on from there.")


def test_a_worker_ends_with_the_study_in_the_middle_of_a_cell(world, tmp_path):
    output = tmp_path / "out"
    train = {"objective": "ga", "passes": 5000, "difficulty": "none", "bf16": False, "use_cpu": True}
    process = start(world, config(world, output, grid={"schedule": ["uniform"]}, train=train))
    assert wait_for(output, "cells/schedule=*/*/run", process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for_the_end(process.pid)
    (cell,) = output.glob("cells/schedule=*")
    assert not (cell / "result.json").exists()


def test_what_a_process_does_to_a_cell_is_of_no_harm_to_the_next(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    kinds = ["good", "killed", "wrong", "bug", "full", "good", "good"]
    cells = [Cell("run", f"{number}-{what}", {}, {"what": what}) for number, what in enumerate(kinds)]
    folders = tmp_path / "cells"
    with Pool(1, ["7"]) as pool:
        failed = pool.run(tmp_path, cells, cell_work.work)
        good = [json.loads((folders / name / "result.json").read_text()) for name in ("0-good", "5-good", "6-good")]
        finished = [cell for cell in cells if cell.name not in failed]
        assert pool.run(tmp_path, [*finished, Cell("run", "7-good", {}, {"what": "good"})], cell_work.work) == {}
    assert failed == {
        "1-killed": f"it was here (exit code -9; {folders / '1-killed' / 'log.txt'})",
        "2-wrong": f"a value is wrong (exit code 2; {folders / '2-wrong' / 'log.txt'})",
        "3-bug": f"RuntimeError: of ours (exit code 1; {folders / '3-bug' / 'log.txt'})",
        "4-full": f"the disk is full: cannot write to {folders / '4-full'}",
    }
    good.append(json.loads((folders / "7-good" / "result.json").read_text()))
    first, *others = (result["process"] for result in good)
    assert len(set(others)) == 1 and first not in others  # a new one after a failure only
    assert {result["CUDA_VISIBLE_DEVICES"] for result in good} == {"7"}
    for name in ("0-good", "5-good", "6-good", "7-good"):
        assert sorted((folders / name / "log.txt").read_text().splitlines()) == ["a line from C", "a line from Python"]


def test_devices_and_cores_are_dealt_to_the_workers(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environments = [worker.environment for worker in Pool(3, ["0", "1"]).workers]
    assert [found["CUDA_VISIBLE_DEVICES"] for found in environments] == ["0", "1", "0"]
    assert {found["OMP_NUM_THREADS"] for found in environments} == {"5"}
    assert "CUDA_VISIBLE_DEVICES" not in Pool(1).workers[0].environment
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert Pool(1).workers[0].environment["OMP_NUM_THREADS"] == "2"
