"""What the job of a cell asks a cluster for: the option `slurm` of a study."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from cud_trainer.typed import check_options

DIRECT = ("partition", "account", "qos", "constraint", "setup")


@dataclass(frozen=True)
class JobOptions:
    """What a job asks for; what is not given is the cluster's default.

    Attributes:
        time: minutes that a cell may take; a job that takes longer is ended, and its cell fails.
        partition, account, qos, constraint: as `sbatch` has them.
        gpus: GPUs of a job.
        cpus: its cores.
        mem: its memory, GB.
        setup: shell commands before a cell, such as `module load cuda`.
        sbatch: other options of `sbatch`, by name.
        cluster: `"local"`: processes of this machine, to try it where there is no Slurm.
    """

    time: int
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus: int = 0
    cpus: int | None = None
    mem: float | None = None
    setup: list[str] = field(default_factory=list)
    sbatch: dict[str, Any] = field(default_factory=dict)
    cluster: Literal["slurm", "local"] = "slurm"

    def of_submitit(self) -> dict[str, Any]:
        """The same as parameters of `submitit.AutoExecutor`."""
        common = {
            "name": "cud-study",
            "timeout_min": self.time,
            "gpus_per_node": self.gpus or None,
            "cpus_per_task": self.cpus,
            "mem_gb": self.mem,
        }
        direct = {f"slurm_{name}": getattr(self, name) or None for name in DIRECT}
        return {**common, **direct, "slurm_additional_parameters": self.sbatch or None}


def check_jobs(options: Any) -> JobOptions:
    """The option `slurm`, checked.

    Raises:
        ValueError: naming what is unknown, missing or of another type; also where no job can be submitted from here.
    """
    if not isinstance(options, dict):
        raise ValueError(f"slurm must be a mapping of options, got {options!r}")
    names = [one.name for one in fields(JobOptions)]
    unknown = [name for name in options if name not in names]
    if unknown:
        raise ValueError(f"slurm has no option {unknown[0]!r}; it has {', '.join(names)} (others of sbatch: sbatch)")
    if "time" not in options:
        raise ValueError("slurm needs time: the minutes that a cell may take")
    jobs = JobOptions(**options)
    try:
        check_options(jobs)
    except ValueError as error:
        raise ValueError(f"slurm: {error}") from None
    if importlib.util.find_spec("submitit") is None:
        raise ValueError("executor slurm needs submitit: pip install 'cud-trainer[slurm]'")
    if jobs.cluster == "slurm" and shutil.which("srun") is None:
        raise ValueError(
            "executor slurm: there is no Slurm here (srun is not found); start the study where jobs are submitted, or "
            "try it with slurm: {cluster: local}"
        )
    return jobs
