"""Python processes that tests start, forked from one that has imported everything: a start costs next to nothing.

Nothing here waits for a certain time: a process that hangs is a test that hangs (`faulthandler_timeout` says where).
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from builders import PYTHONPATH

# What takes the time; nothing of it starts a thread when it is imported.
PRELOADED = ["torch", "datasets", "transformers", "peft", "trl", "scipy.stats", "cud_trainer.trainer"]


@cache
def server() -> multiprocessing.context.BaseContext:
    """A context whose processes are forked from one that has imported what most of them need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = dict(os.environ)
    os.environ.update(PYTHONPATH=PYTHONPATH, OMP_NUM_THREADS="1")
    try:
        first = context.Process(target=int)
        first.start()
        first.join()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _run(script: str, arguments: list[str], environment: dict[str, str], output: list[str], folder: str) -> None:
    for number, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [script, *arguments]
    if script.endswith(".py"):
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def run(
    script: Path | str, *arguments: object, processes: int = 1, cwd: Path | str = ".", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script, or a module by its name, to its end; with the variables that `torchrun` sets if more than once.

    The code returned is that of the first process that failed, as of a `subprocess`; a process whose neighbour is gone
    has to end by itself.
    """
    settings = [
        {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", **environment} for _ in range(processes)
    ]
    if processes > 1:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank, variables in enumerate(settings):
            variables.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(processes),
                LOCAL_WORLD_SIZE=str(processes),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(store.port),
                TORCHELASTIC_USE_AGENT_STORE="True",
            )
    with tempfile.TemporaryDirectory() as folder:
        output = [f"{folder}/stdout", f"{folder}/stderr"]
        started = [
            server().Process(target=_run, args=(str(script), list(map(str, arguments)), variables, output, str(cwd)))
            for variables in settings
        ]
        try:
            for process in started:
                process.start()
            for process in started:
                process.join()
        finally:
            for process in started:
                process.kill()
        codes = [process.exitcode for process in started]
        texts = [Path(path).read_text() if Path(path).exists() else "" for path in output]
    return subprocess.CompletedProcess([str(script)], next((c for c in codes if c), 0), *texts)
