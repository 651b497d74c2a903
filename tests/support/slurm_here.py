"""A Slurm of one machine: `sbatch`, `srun`, `sacct` and `scancel`, as far as submitit uses them.

Jobs are processes; what is known of them lies in the folder CUD_SLURM_HERE: `1.sh` what was submitted, `1.pid` its
session, `1.state` how it has ended. While a file `hold` is there, new jobs wait in the queue; while `refuse` is there,
none is taken.
"""

import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scancel")
JOB = "while [ -e hold ]; do sleep 0.05; done; touch {0}.begun; bash {0}.sh; [ -e {0}.state ] || echo COMPLETED > {0}.state"


def install(folder: Path) -> Path:
    """Write the commands; returns the folder for PATH."""
    (folder / "bin").mkdir(parents=True)
    for name in COMMANDS:
        path = folder / "bin" / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{__file__}" {name} "$@"\n')
        path.chmod(0o755)
    return folder / "bin"


def lose(folder: Path, job: str, state: str) -> None:
    """End a job in the middle of its work."""
    (folder / f"{job}.state").write_text(state)
    os.killpg(int((folder / f"{job}.pid").read_text()), signal.SIGKILL)


def sbatch(folder: Path, arguments: list[str]) -> int:
    if (folder / "refuse").exists():
        print("sbatch: error: invalid partition specified: none", file=sys.stderr)
        return 1
    job = str(len(list(folder.glob("*.sh"))) + 1)
    (folder / f"{job}.sh").write_text(Path(arguments[-1]).read_text())
    environment = {**os.environ, "SLURM_JOB_ID": job, "FOLDER": os.getcwd()}
    started = subprocess.Popen(
        ["sh", "-c", JOB.format(job)],
        cwd=folder,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    (folder / f"{job}.pid").write_text(str(started.pid))
    print(f"Submitted batch job {job}")
    return 0


def srun(folder: Path, arguments: list[str]) -> int:
    streams = {}
    while arguments[0].startswith("--"):
        option = arguments.pop(0)
        if option != "--unbuffered":
            streams[option] = arguments.pop(0).replace("%j", os.environ["SLURM_JOB_ID"]).replace("%t", "0")
    with open(streams["--output"], "a") as out, open(streams["--error"], "a") as err:
        return subprocess.run(arguments, stdout=out, stderr=err, cwd=os.environ["FOLDER"]).returncode


def sacct(folder: Path, arguments: list[str]) -> int:
    print("JobID|State|NodeList")
    for job in (value for option, value in pairwise(arguments) if option == "-j"):
        path = folder / f"{job}.state"
        state = "RUNNING" if (folder / f"{job}.begun").exists() else "PENDING"
        print(f"{job}|{path.read_text().strip() if path.exists() else state}|here")
    return 0


def scancel(folder: Path, arguments: list[str]) -> int:
    lose(folder, arguments[-1], "CANCELLED")
    return 0


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    sys.exit(
        {"sbatch": sbatch, "srun": srun, "sacct": sacct, "scancel": scancel}[name](
            Path(os.environ["CUD_SLURM_HERE"]), rest
        )
    )
