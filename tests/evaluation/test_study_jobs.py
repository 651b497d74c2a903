"""The cells of a study as jobs: on submitit's local executor, and on a Slurm of one machine (`support/slurm_here.py`)."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import cell_work
import pytest
import slurm_here
from builders import PYTHONPATH, make_model, make_tokenizer, qa_dataset
from studies import config

from cud_trainer.cli import main
from evaluation.study.grid import Cell
from evaluation.study.jobs import JOB, Jobs, withdraw
from evaluation.study.options import StudyArguments
from evaluation.study.slurm import check_jobs

submitit = pytest.importorskip("submitit", reason="the extra slurm is not installed")
SUPPORT = Path(cell_work.__file__).parent


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    folder = tmp_path / "slurm"
    path = slurm_here.install(folder)
    monkeypatch.setenv("PATH", f"{path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUD_SLURM_HERE", str(folder))
    submitit.SlurmJob.watcher.clear()  # what became of job 1 of another test
    return folder


@pytest.fixture(autouse=True)
def found_by_jobs(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([PYTHONPATH, str(SUPPORT)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def cells(*kinds):
    return [Cell("run", f"{number}-{what}", {}, {"what": what}) for number, what in enumerate(kinds)]


def log_of(study, name):
    return (study / "cells" / name / "log.txt").read_text()


def when(condition, then):
    """Do something as soon as a condition holds, beside the test."""

    def wait():
        while not condition():
            time.sleep(0.05)
        then()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "slurm needs time: the minutes that a cell may take"),
        ({"time": 5, "partitions": "gpu"}, "slurm has no option 'partitions'; it has time, partition, account, "),
        ({"time": "5"}, "slurm: time must be an integer, got '5'"),
        ({"time": 0}, "slurm: time must be at least 1, got 0"),
        ({"time": 5, "gpus": -1}, "slurm: gpus must be at least 0, got -1"),
        ({"time": 5, "partition": ""}, "slurm: partition is empty"),
        ({"time": 5, "cluster": "lsf"}, "slurm: cluster must be"),
        ("gpu", "slurm must be a mapping of options, got 'gpu'"),
        ({"time": 5}, "executor slurm: there is no Slurm here (srun is not found)"),
    ],
)
def test_what_is_wrong_with_the_options_is_said(options, said, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError) as error:
        check_jobs(options)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_without_submitit_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^executor slurm needs submitit: pip install 'cud-trainer\[slurm\]'$"):
        check_jobs({"time": 5, "cluster": "local"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"slurm": {"time": 5}}, "slurm has no effect with executor local"),
        (
            {"executor": "slurm", "slurm": {"time": 5, "cluster": "local"}, "devices": ["0"]},
            "devices has no effect with",
        ),
        ({"executor": "slurm"}, "slurm needs time"),
        ({"executor": "pbs"}, "executor"),
    ],
)
def test_a_study_refuses_what_cannot_be(changes, said):
    with pytest.raises(ValueError, match=said):
        StudyArguments(forget_dataset="forget.jsonl", grid={"seed": [1]}, **changes)


def test_a_job_asks_for_what_the_options_say(slurm, tmp_path):
    """In the words of sbatch."""
    options = {"time": 90, "partition": "gpu", "account": "a", "gpus": 2, "cpus": 4, "mem": 1.5}
    jobs = Jobs(tmp_path, {**options, "setup": ["module load x"], "sbatch": {"nice": 7}})
    (slurm / "hold").touch()
    (cell,) = cells("good")
    (tmp_path / "cells" / cell.name).mkdir(parents=True)
    assert jobs._start(tmp_path, cell, cell_work.work)
    text = (slurm / "1.sh").read_text().splitlines()
    for line in ("--time=90", "--partition=gpu", "--account=a", "--gpus-per-node=2", "--cpus-per-task=4", "--nice=7"):
        assert f"#SBATCH {line}" in text
    assert "#SBATCH --mem=1536MB" in text or "#SBATCH --mem=1.5GB" in text
    assert text.index("module load x") < next(number for number, line in enumerate(text) if "srun" in line)
    withdraw(tmp_path / "cells" / cell.name)
    assert (slurm / "1.state").read_text() == "CANCELLED"
    assert not (tmp_path / "cells" / cell.name / JOB).exists()


@pytest.mark.slow
@pytest.mark.subprocess
def test_a_job_that_dies_takes_its_cell_only(tmp_path):
    folders = tmp_path / "cells"
    kinds = cells("good", "killed", "full", "waits")
    killed = when(
        lambda: (folders / "3-waits" / "log.txt").exists() and log_of(tmp_path, "3-waits"),
        lambda: os.kill(int(json.loads((folders / "3-waits" / JOB).read_text())["id"]), signal.SIGKILL),
    )
    with Jobs(tmp_path, {"time": 60, "cluster": "local"}, 2) as jobs:
        failed = jobs.run(tmp_path, kinds, cell_work.work)
        killed.join()
        assert jobs.run(tmp_path, [kinds[0]], cell_work.work) == {}  # nothing is left to do
    numbers = {name: failed[name].split("job ")[1].split()[0].rstrip(";") for name in failed}
    assert failed == {
        "1-killed": f"it was here (job {numbers['1-killed']} ended without a result: FINISHED; {folders}/1-killed/log.txt)",
        "2-full": f"the disk is full: cannot write to {folders}/2-full (job {numbers['2-full']}; {folders}/2-full/log.txt)",
        "3-waits": f"it waits (job {numbers['3-waits']} ended without a result: INTERRUPTED; {folders}/3-waits/log.txt)",
    }
    assert json.loads((folders / "0-good" / "result.json").read_text())["process"] != os.getpid()
    assert sorted(log_of(tmp_path, "0-good").splitlines()) == ["a line from C", "a line from Python"]
    assert not (tmp_path / "jobs").exists()  # no pickle is left, nor anything else of submitit's
    assert {path.name for path in (folders / "0-good").iterdir()} == {"cell.json", "log.txt", "result.json"}


@pytest.mark.slow
@pytest.mark.subprocess
def test_a_lost_node_loses_a_cell_and_a_new_start_waits_for_the_jobs_of_the_old_one(slurm, tmp_path):
    lost, waits = cells("waits", "waits")
    for cell in (lost, waits):
        (tmp_path / "cells" / cell.name).mkdir(parents=True)
        Jobs(tmp_path, {"time": 60})._start(tmp_path, cell, cell_work.work)  # and the process that did so is killed
    begun = [tmp_path / "cells" / cell.name / "log.txt" for cell in (lost, waits)]

    def lose():
        slurm_here.lose(slurm, "1", "NODE_FAIL")
        (tmp_path / "go").touch()

    thread = when(lambda: all(path.exists() and path.read_text() for path in begun), lose)
    with Jobs(tmp_path, {"time": 60}) as jobs:
        failed = jobs.run(tmp_path, [lost, waits], cell_work.work)
        thread.join()
        assert list(failed) == [lost.name]
        assert failed[lost.name].startswith("it waits (job 1 ended without a result: NODE_FAIL; ")
        assert len(list(slurm.glob("*.sh"))) == 2  # nothing was submitted again
        (slurm / "hold").touch()
        assert jobs._start(tmp_path, lost, cell_work.work)  # but now what was lost is
        assert len(list(slurm.glob("*.sh"))) == 3
        jobs.kill()


@pytest.mark.slow
@pytest.mark.subprocess
def test_ctrl_c_finishes_what_runs_and_cancels_what_waits(slurm, tmp_path, capsys):
    runs, waits = cells("waits", "waits")
    log = tmp_path / "cells" / runs.name / "log.txt"

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        when(lambda: (slurm / "2.state").exists(), (tmp_path / "go").touch)

    def second_is_held():
        (slurm / "hold").touch()
        when(lambda: log.exists() and log.read_text() and (slurm / "2.sh").exists(), interrupt)

    jobs = Jobs(tmp_path, {"time": 60})
    submit = jobs._start

    def start(study, cell, work):
        if cell is waits:
            while not (slurm / "1.begun").exists():
                time.sleep(0.05)
            second_is_held()
        return submit(study, cell, work)

    jobs._start = start
    with pytest.raises(KeyboardInterrupt):
        jobs.run(tmp_path, [runs, waits], cell_work.work)
    assert "Ctrl-C: finishing 1 that run (0-waits); nothing new is started." in capsys.readouterr().err
    assert (tmp_path / "cells" / runs.name / "result.json").exists()
    assert not (tmp_path / "cells" / waits.name / "result.json").exists()
    assert (slurm / "2.state").read_text() == "CANCELLED"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_cancels_what_runs(slurm, tmp_path, capsys):
    (slurm / "hold").touch()
    jobs = Jobs(tmp_path, {"time": 60})

    def interrupt():
        (tmp_path / "cells" / "0-waits" / "log.txt").touch()  # as if it had begun
        os.kill(os.getpid(), signal.SIGINT)
        when((slurm / "2.state").exists, lambda: os.kill(os.getpid(), signal.SIGINT))

    when(lambda: len(jobs.jobs) == 2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        jobs.run(tmp_path, cells("waits", "waits"), cell_work.work)
    assert "Ctrl-C: finishing 1 that run (0-waits); nothing new is started." in capsys.readouterr().err
    assert [(slurm / f"{job}.state").read_text() for job in (1, 2)] == ["CANCELLED", "CANCELLED"]
    assert not list(tmp_path.glob(f"cells/*/{JOB}"))


def test_a_cluster_that_takes_no_job_says_why(slurm, tmp_path):
    (slurm / "refuse").touch()
    with pytest.raises(ValueError, match="^the cluster takes no job: .*invalid partition specified: none$"):
        Jobs(tmp_path, {"time": 5}).run(tmp_path, cells("good"), cell_work.work)


def test_a_job_of_other_settings_is_cancelled(slurm, tmp_path):
    (slurm / "hold").touch()
    old, new = Cell("run", "same", {}, {"what": "old"}), Cell("run", "same", {}, {"what": "new"})
    (tmp_path / "cells" / "same").mkdir(parents=True)
    jobs = Jobs(tmp_path, {"time": 5})
    jobs._start(tmp_path, old, cell_work.work)
    jobs._start(tmp_path, new, cell_work.work)
    assert (slurm / "1.state").read_text() == "CANCELLED"
    assert json.loads((tmp_path / "cells" / "same" / JOB).read_text())["id"] == "2"
    jobs.kill()


@pytest.mark.slow
@pytest.mark.subprocess
def test_a_study_runs_as_jobs(tmp_path):
    make_model(0).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    qa_dataset(6).to_json(tmp_path / "forget.jsonl")
    qa_dataset(6, 100).to_json(tmp_path / "retain.jsonl")
    train = {"objective": "graddiff", "passes": 1, "difficulty": "none", "bf16": False, "use_cpu": True}
    changes = {"executor": "slurm", "slurm": {"time": 60, "cluster": "local", "cpus": 1}, "workers": 2}
    command = config(tmp_path, tmp_path / "out", train=train, grid={"schedule": ["uniform"], "seed": [1]}, **changes)
    assert main(command) == 0
    assert (tmp_path / "out" / "report.html").exists() and not (tmp_path / "out" / "jobs").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("cells/*/result.json")}
    assert len(before) == 1 and main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
