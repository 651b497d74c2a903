"""How the cells of a study run: processes that work on one cell after the other, so that each need not import torch.

Every cell has a folder of its own: its settings (`cell.json`), what it prints (`log.txt`), and at its end
`result.json`, by which a finished cell is known. One that fails, or whose process is killed, does not take the others
with it.

Ctrl-C lets the cells that run finish and starts nothing new; a second one ends them, too. `jobs` does the same on a
cluster.
"""

from __future__ import annotations

import errno
import gc
import os
import queue
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
from loky import BrokenProcessPool, ProcessPoolExecutor
from tqdm.auto import tqdm

from cud_trainer.cli import one_line
from cud_trainer.data.ids import without_hashes
from cud_trainer.files import create_private, disk_full, write_json

from .cell import work_on
from .grid import Cell

Work = Callable[[Path, Cell], dict[str, Any]]
"""What a cell of a study does: its folder is there; returns what its `result.json` is to hold, as JSON values."""


class Executor:
    """What cells run in; with what every kind of it has to do at Ctrl-C.

    Attributes:
        interrupted: whether Ctrl-C was pressed: nothing new is started.
    """

    def __init__(self) -> None:
        self.interrupted = False

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, kind: type | None, *error: Any) -> None:
        return None

    def run(self, study: Path, cells: Sequence[Cell], work: Work = work_on) -> dict[str, str]:
        """Have what is not finished done; returns why cells failed, in one line each, by name.

        Raises:
            KeyboardInterrupt: after Ctrl-C, when the cells that ran have finished, or at once after a second one.
        """
        raise NotImplementedError

    def at_work(self) -> list[str]:
        """Names of the cells that run."""
        raise NotImplementedError

    def kill(self) -> None:
        """End what runs without its results."""
        raise NotImplementedError

    @contextmanager
    def finishing_at_ctrl_c(self) -> Iterator[None]:
        """Inside, the first Ctrl-C only says that nothing new is to be started; a second one ends what runs."""

        def stop(*_: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            running = self.at_work()
            said = f"finishing {len(running)} that run ({', '.join(running)})" if running else "no cell runs"
            tqdm.write(
                f"Ctrl-C: {said}; nothing new is started. Once more ends them without their results.", file=sys.stderr
            )

        handles = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, stop) if handles else None
        try:
            yield
        except BaseException:  # threads are waited for, and these wait for their processes
            self.interrupted = True
            self.kill()
            raise
        finally:
            if handles:
                signal.signal(signal.SIGINT, before)
        if self.interrupted:
            raise KeyboardInterrupt


class Pool(Executor):
    """Works on cells, several at a time, until it is closed.

    Args:
        workers: cells at a time.
        devices: GPUs to deal the workers to (CUDA_VISIBLE_DEVICES of each); none: all of them, for everyone.
    """

    def __init__(self, workers: int, devices: Sequence[str] = ()) -> None:
        super().__init__()
        devices = devices or [""]
        self.workers = [Worker(devices[number % len(devices)], workers) for number in range(workers)]
        self.running: list[str] = []  # names of cells

    def __exit__(self, kind: type | None, *error: Any) -> None:
        for worker in self.workers:
            worker.end(kill=kind is not None)

    def at_work(self) -> list[str]:
        return list(self.running)

    def kill(self) -> None:
        for worker in self.workers:
            worker.end(kill=True)

    def run(self, study: Path, cells: Sequence[Cell], work: Work = work_on) -> dict[str, str]:
        """See `Executor.run`."""
        failed: dict[str, str] = {}
        todo: queue.SimpleQueue[Cell] = queue.SimpleQueue()
        for cell in begun(study, cells):
            todo.put(cell)
        count = todo.qsize()

        def work_off(worker: Worker) -> None:
            without_ctrl_c()
            while not self.interrupted:
                try:
                    cell = todo.get_nowait()
                except queue.Empty:
                    return
                self.running.append(cell.name)
                reason = worker.run(study, cell, work)
                self.running.remove(cell.name)
                if reason is not None:
                    failed[cell.name] = reason
                bar.update()

        workers = self.workers[:count]
        with (
            ThreadPoolExecutor(max(1, len(workers))) as threads,
            bar_of(cells, count) as bar,
            self.finishing_at_ctrl_c(),
        ):
            for future in [threads.submit(work_off, worker) for worker in workers]:
                future.result()
        return failed


class Worker:
    """A process that works on one cell after the other.

    After a failure it ends, and the next cell gets a new one, so that none starts from what another left behind.

    Args:
        device: for CUDA_VISIBLE_DEVICES; empty for all.
        workers: how many share the cores.
    """

    def __init__(self, device: str, workers: int) -> None:
        threads = str(max(1, (os.cpu_count() or 1) // workers))
        self.environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
        if device:
            self.environment["CUDA_VISIBLE_DEVICES"] = device
        self.executor: ProcessPoolExecutor | None = None

    def run(self, study: Path, cell: Cell, work: Work) -> str | None:
        """Have a cell done; `None`, or why it failed in one line."""
        if self.executor is None:
            self.executor = ProcessPoolExecutor(1, env=self.environment, initializer=end_with, initargs=(os.getpid(),))
        folder = study / "cells" / cell.name
        log = folder / "log.txt"
        log.unlink(missing_ok=True)
        try:
            code = self.executor.submit(logged, study.absolute(), cell, work).result()
        except BrokenProcessPool as error:  # it was killed; what it says of that ends with its exit code
            code = int((re.findall(r"\((-?\d+)\)", str(error)) or [1])[-1])
        if code:
            self.end()
        if (folder / "result.json").exists():
            return None
        if code == errno.ENOSPC:
            return f"the disk is full: cannot write to {folder}"
        return f"{last_line(log) or 'no output'} (exit code {code}; {log})"

    def end(self, kill: bool = False) -> None:
        """Let the process end, or kill it in the middle of a cell."""
        if self.executor is not None:
            self.executor.shutdown(kill_workers=kill)
            self.executor = None


def begun(study: Path, cells: Sequence[Cell]) -> list[Cell]:
    """The cells that have no result yet; their folders are there, with their settings."""
    todo = [cell for cell in cells if not (study / "cells" / cell.name / "result.json").exists()]
    for cell in todo:
        content = {"kind": cell.kind, "choices": cell.choices, "settings": cell.settings}
        write_json(study / "cells" / cell.name / "cell.json", {"fingerprint": cell.fingerprint, **content})
    return todo


def bar_of(cells: Sequence[Cell], count: int) -> tqdm:
    """A progress bar over cells, of which `count` are not finished."""
    kind = cells[0].kind if cells else "run"
    return tqdm(total=len(cells), initial=len(cells) - count, desc=kind, unit="cell")


def last_line(log: Path) -> str:
    """What a cell, or its job, said last; empty where it said nothing."""
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def without_ctrl_c() -> None:
    """Neither this thread nor the processes that it starts hear of Ctrl-C, which a terminal sends to all of them."""
    if hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # its start lets the signal through again
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def complete(study: Path, cell: Cell, work: Work) -> None:
    """Do the work of a cell and write its result."""
    started = time.time()
    result = work(study, cell)
    seconds = time.time() - started
    path = study / "cells" / cell.name / "result.json"
    write_json(path, {**result, "seconds": seconds, "fingerprint": cell.fingerprint}, private=True)


def logged(study: Path, cell: Cell, work: Work) -> int:
    """`complete` in this process, with all that anybody prints in the cell's log; 0, or an exit code."""
    try:
        with create_private(study / "cells" / cell.name / "log.txt").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        complete(study, cell, work)
        sys.stdout.flush()  # or it comes to the next cell's log
        code = 0
    except Exception as error:
        code = _told(error)
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    return code


def _told(error: Exception) -> int:
    """Print why a cell failed, and say it by a number: that of a full disk, 2 for what one line explains, else 1."""
    full = disk_full(error)
    try:
        if full or isinstance(error, (ValueError, OSError)):
            print(without_hashes(one_line(error)), flush=True)
        else:
            traceback.print_exception(error)
        sys.stdout.flush()
    except OSError:  # the log may have no room for that line
        full = True
    return errno.ENOSPC if full else 2 if isinstance(error, (ValueError, OSError)) else 1


def end_with(parent: int, other: int | None = None) -> None:
    """Let this process end soon after its parent, in the middle of a cell: what is not finished is begun anew.

    So it does after `other`, a process of this machine.

    Of Ctrl-C it hears by the parent only.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent and (other is None or _is_there(other)):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
