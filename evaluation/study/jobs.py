"""The cells of a study as jobs of a cluster, submitted and looked after by submitit.

A cell is a job of its own: a node that is lost takes its cell with it, and nothing else. The process that submits them
waits for them all, and it alone reports. When it is killed, jobs of Slurm go on; the same command finds them by the
`job.json` in their cells' folders and waits for them instead of submitting them again.

What a cell has come to is in its folder, as with `pool`: nothing is read from the pickles by which submitit hands a
function to its job.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from cud_trainer.cli import one_line
from cud_trainer.files import write_json

from .cell import work_on
from .grid import Cell
from .pool import Executor, Work, bar_of, begun, end_with, last_line, logged
from .slurm import check_jobs

JOB = "job.json"
# Seconds between two looks; what is asked of the cluster is asked more rarely, by submitit.
PAUSE = 0.5
# Seconds after which a shared file system shows the files of a job that has ended.
SHOWN_AFTER = 15


class Jobs(Executor):
    """Works on cells as jobs.

    Args:
        folder: of the study, which every node of the cluster can read and write; submitit's files go to `jobs` in it.
        options: see `JobOptions`.
        at_a_time: jobs that wait or run at a time; `None` for all.

    Raises:
        ValueError: see `check_jobs`.
    """

    def __init__(self, folder: Path, options: dict[str, Any], at_a_time: int | None = None) -> None:
        super().__init__()
        self.options, self.at_a_time = check_jobs(options), at_a_time
        from submitit import AutoExecutor

        self.files = folder.absolute() / "jobs"
        self.files.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.submitit = AutoExecutor(self.files, cluster=self.options.cluster)
        try:
            self.submitit.update_parameters(**self.options.of_submitit())
        except (NameError, ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"slurm: {one_line(error)}") from None
        self.jobs: dict[str, Any] = {}  # submitit's, by name of the cell
        self.cells = folder / "cells"

    def __exit__(self, kind: type | None, *error: Any) -> None:
        if self.files.is_dir() and not any(self.files.iterdir()):
            self.files.rmdir()

    def at_work(self) -> list[str]:
        """Names of the cells whose jobs have begun: the others wait in the queue."""
        return [name for name in self.jobs if (self.cells / name / "log.txt").exists()]

    def kill(self) -> None:
        for name in list(self.jobs):
            self._cancel(name)

    def run(self, study: Path, cells: Sequence[Cell], work: Work = work_on) -> dict[str, str]:
        """See `Executor.run`; of jobs that wait in the queue, Ctrl-C cancels all.

        Raises:
            ValueError: when the cluster takes no job at all.
        """
        failed: dict[str, str] = {}
        todo = deque(begun(study, cells))
        with bar_of(cells, len(todo)) as bar, self.finishing_at_ctrl_c():
            full = False  # the cluster takes no more for now
            while (todo and not self.interrupted) or self.jobs:
                while todo and not full and not self.interrupted and len(self.jobs) < (self.at_a_time or len(cells)):
                    full = not self._start(study, todo[0], work)
                    if not full:
                        todo.popleft()
                if self.interrupted:
                    for name in set(self.jobs).difference(self.at_work()):
                        self._cancel(name)
                for name in [name for name, job in self.jobs.items() if job.done()]:
                    reason = self._ended(name)
                    if reason is not None:
                        failed[name] = reason
                    full = False
                    bar.update()
                bar.set_postfix_str(f"{len(self.at_work())} of {len(self.jobs)} jobs run")
                if self.jobs:
                    time.sleep(PAUSE)
        return failed

    def _start(self, study: Path, cell: Cell, work: Work) -> bool:
        """Submit a cell, or find its job of an earlier start; whether the cluster took it."""
        folder = study / "cells" / cell.name
        job = self._of_an_earlier_start(folder, cell)
        if job is None:
            withdraw(folder)
            (folder / "log.txt").unlink(missing_ok=True)
            reporter = os.getpid() if self.options.cluster == "local" else None
            try:
                with _unheard():
                    job = self.submitit.submit(_work_off, study.absolute(), cell, work, self.options.cpus, reporter)
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                if self.jobs:
                    return False
                raise ValueError(f"the cluster takes no job: {_said_by(error)}") from None
            known = {"cluster": self.options.cluster, "id": job.job_id, "fingerprint": cell.fingerprint}
            write_json(folder / JOB, known)
        self.jobs[cell.name] = job
        return True

    def _of_an_earlier_start(self, folder: Path, cell: Cell) -> Any:
        """The job that works on this very cell, or waits for its turn; `None` where there is none."""
        known = _known(folder)
        if known is None or known["cluster"] != self.options.cluster or known["cluster"] != "slurm":
            return None  # those of this machine ended with the process that submitted them
        if known["fingerprint"] != cell.fingerprint:
            return None
        from submitit import SlurmJob

        job: Any = SlurmJob(self.files, known["id"])
        return None if job.done() else job

    def _ended(self, name: str) -> str | None:
        """Forget a job that has ended; `None`, or why its cell failed in one line."""
        job, folder = self.jobs.pop(name), self.cells / name
        paths, result = job.paths, folder / "result.json"
        if job.state in ("COMPLETED", "FINISHED"):
            waited = time.monotonic()
            while not (result.exists() or paths.result_pickle.exists()) and time.monotonic() - waited < SHOWN_AFTER:
                if self.options.cluster == "local":  # the disk of this machine shows all at once
                    break
                time.sleep(PAUSE)
        told = last_line(folder / "log.txt") or last_line(paths.stderr)
        log = folder / "log.txt" if (folder / "log.txt").exists() else paths.stderr
        whole = paths.result_pickle.exists()  # the job came to its end, whatever became of the cell
        (folder / JOB).unlink(missing_ok=True)
        lost = not whole and log == paths.stderr  # all that is known of it stands there
        for path in (paths.submitted_pickle, paths.result_pickle, paths.submission_file, paths.stdout):
            path.unlink(missing_ok=True)
        if not lost:
            paths.stderr.unlink(missing_ok=True)
        for path in self.files.glob("*.sh"):  # submitit's links to what it submitted
            if path.is_symlink() and not path.exists():
                path.unlink()
        if result.exists():
            return None
        ended = f"job {job.job_id}" if whole else f"job {job.job_id} ended without a result: {job.state}"
        return f"{told or 'no output'} ({ended}; {log})"

    def _cancel(self, name: str) -> None:
        job = self.jobs[name]
        if self.options.cluster == "local":
            if not job.done():
                _end(int(job.job_id))  # its work ends after it, see `end_with`
        else:
            job.cancel(check=False)
        (self.cells / name / JOB).unlink(missing_ok=True)
        del self.jobs[name]  # at last: a second Ctrl-C in between cancels it again


def withdraw(folder: Path) -> None:
    """Cancel the job of an earlier start that may still work on a cell in this folder, if there is one."""
    known = _known(folder)
    if known is not None and known["cluster"] == "slurm":
        try:
            from submitit import SlurmJob
        except ImportError:
            raise ValueError(
                f"job {known['id']} of a cluster may still work on {folder}, and submitit, which would cancel it, is "
                "not installed: pip install 'cud-trainer[slurm]'"
            ) from None
        try:
            SlurmJob(folder.parent.parent / "jobs", known["id"]).cancel(check=False)
        except OSError:
            raise ValueError(
                f"job {known['id']} of a cluster may still work on {folder}, and scancel is not found here; cancel it "
                f"there and remove {folder / JOB}"
            ) from None
    (folder / JOB).unlink(missing_ok=True)


def _known(folder: Path) -> dict[str, str] | None:
    """What `job.json` says, or `None`."""
    try:
        known = json.loads((folder / JOB).read_text())
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) and {"cluster", "id", "fingerprint"} <= set(known) else None


def _work_off(study: Path, cell: Cell, work: Work, cores: int | None, reporter: int | None) -> int:
    """What a job does: the work of a cell, with all that anybody prints in the cell's log; see `logged`.

    Args:
        reporter: the process after which this one ends; `None` for none.
    """
    if reporter is not None:
        end_with(os.getppid(), reporter)
    if cores is not None:
        torch.set_num_threads(cores)
    streams = [os.dup(1), os.dup(2)]
    try:
        code = logged(study, cell, work)
        if code == errno.ENOSPC:
            with suppress(OSError):  # there may be no room for that line
                print(f"the disk is full: cannot write to {study / 'cells' / cell.name}", flush=True)
        return code
    finally:  # what submitit says afterwards is not the cell's
        for number, stream in enumerate(streams, start=1):
            os.dup2(stream, number)
            os.close(stream)


@contextmanager
def _unheard() -> Iterator[None]:
    """What is started inside does not hear of Ctrl-C, which a terminal sends to all of its processes."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _said_by(error: Exception) -> str:
    """The line in which `sbatch` says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[-1] if lines else type(error).__name__)[:300]
