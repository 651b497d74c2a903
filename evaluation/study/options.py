"""Options of `cud study`, and what a recipe adds to them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from cud_trainer import CUDConfig
from cud_trainer.commands.early import ORACLE, read_yaml
from cud_trainer.commands.options import HeldOutArguments, check_model_options
from cud_trainer.commands.parser import parse_options
from cud_trainer.typed import check_options, check_values, check_void

from ..commands.help import STUDY
from .slurm import check_jobs

SCORES = "difficulty_scores"  # a path, as in `cud train`: scores made before, instead of cells that compute them
TRAIN_FIELDS = {f.name for f in fields(CUDConfig)} | {SCORES}
SHARED_FIELDS = {f.name for kind in (HeldOutArguments, ModelConfig) for f in fields(kind)}
EQUAL_COMPUTE = "equal_compute"
ARM_FIELDS = TRAIN_FIELDS | {EQUAL_COMPUTE}
# What a study sets itself.
RESERVED = {
    "output_dir",
    "overwrite",
    "save_strategy",
    "eval_strategy",
    "report_to",
    "disable_tqdm",
    "push_to_hub",
    "max_steps",
    "resume_from_checkpoint",
    "target_forget_prob",
}
TUNED = ("learning_rate", "retain_weight")
EXTENSIONS = 4


@dataclass
class StudyArguments(HeldOutArguments):
    """What `cud study` reads besides TRL's `ModelConfig` (model, adapter)."""

    output_dir: str = field(default="cud-study", metadata={"help": "Where the cells and the report go."})
    grid: Any = field(
        default_factory=dict,
        metadata={
            "help": "Options of `cud train` with a list of values each; a cell for every combination. A list of such "
            "mappings is their union."
        },
    )
    arms: dict[str, Any] | str = field(
        default_factory=dict,
        metadata={
            "help": "What is compared, by name: options of `cud train` for each, run with every combination of `grid`. "
            "`difficulty: random` is a placebo, `difficulty: oracle` what the arm `uniform` left with the other seeds; "
            "`equal_compute: true` trains on as many pairs more as the calibration of the arm's difficulty takes."
        },
    )
    train: dict[str, Any] | str = field(
        default_factory=dict,
        metadata={
            "help": "Options of `cud train` that all cells share. `difficulty` is 'cud' if it is not given here: "
            "buckets are compared between cells, whatever these read."
        },
    )
    recipe: str | None = field(
        default=None,
        metadata={"help": "A YAML file of `cud train` whose options hold wherever the study does not say otherwise."},
    )
    executor: Literal["local", "slurm"] = field(
        default="local",
        metadata={"help": "Where cells run: processes of this machine, or jobs of a Slurm cluster (see `slurm`)."},
    )
    slurm: dict[str, Any] | str = field(
        default_factory=dict,
        metadata={
            "help": "What the job of a cell asks for: time (minutes), partition, account, qos, constraint, gpus, cpus, "
            "mem (GB), setup (shell commands), sbatch (its other options). `cluster: local` tries it without Slurm."
        },
    )
    workers: int | None = field(
        default=None, metadata={"help": "Cells at a time. Default: 1; with executor slurm, all of them."}
    )
    devices: list[str] = field(
        default_factory=list,
        metadata={"help": "GPUs to deal the cells to (CUDA_VISIBLE_DEVICES of each), for example 0 1 2."},
    )
    snapshot_every: int = field(
        default=1, metadata={"help": "Optimizer steps between two points of a trade-off curve."}
    )
    utility_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Samples whose answer probability is the utility of a curve; better none that the retain loss "
            "sees. Default: the retain set."
        },
    )
    utility_config: str | None = field(default=None, metadata={"help": "Its configuration name."})
    utility_split: str = field(default="train", metadata={"help": "Its split."})
    retain_eval_samples: int = field(
        default=200, metadata={"help": "How many of them are measured at most, evenly spaced."}
    )
    heldout_samples: int = field(
        default=200, metadata={"help": "How many held-out samples are measured at most, evenly spaced."}
    )
    never_seen: float | None = field(
        default=None,
        metadata={
            "help": "Worst quarter of the forget set under a model that never saw it, in [0, 1): where it is above "
            "0.10, a run has forgotten when it is there."
        },
    )
    reference_model: str | None = field(
        default=None,
        metadata={
            "help": "Such a model (folder or hub id, with the same tokens): `never_seen` is measured on it, and what "
            "is left at the end of a run is compared with what it says."
        },
    )
    retain_level: list[float] = field(
        default_factory=lambda: [0.95],
        metadata={
            "help": "Conditions are compared at these shares of the starting utility, each tuned for each; curves and "
            "samples are those of the first."
        },
    )
    tuning_seeds: int = field(
        default=1,
        metadata={
            "help": "Learning rate and retain weight are chosen on so many of the first seeds of the grid, and the "
            "others are reported. More than one where what is left at a level differs much from seed to seed."
        },
    )
    extensions: int | None = field(
        default=None,
        metadata={
            "help": "How often a grid of retain weights or learning rates grows at most, by a value beyond the end at "
            "which the best one lies. Default: 4 with held-out samples, else 0."
        },
    )
    relearn_samples: int = field(
        default=0,
        metadata={
            "help": "From where a run has forgotten most at the first level, fine-tune on as many forget samples again "
            "and see what comes back of the others."
        },
    )
    relearn_steps: int = field(default=10, metadata={"help": "Steps of that."})
    relearn_rate: float = field(default=1e-5, metadata={"help": "Its learning rate."})
    holdout_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Samples that no model saw: what is left at the end of a run is compared with what these get, and "
            "what relearning does to them is its control."
        },
    )
    holdout_config: str | None = field(default=None, metadata={"help": "Its configuration name."})
    holdout_split: str = field(default="train", metadata={"help": "Its split."})
    n_buckets: int = field(default=4, metadata={"help": "Difficulty buckets, equal in size."})
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Replace cells that were run with other settings, and remove those of another study in the folder."
        },
    )
    tune_on: Literal["hardest", "all", "endpoint"] | None = field(
        default=None,
        metadata={
            "help": "What decides on learning rate and retain weight: what is left of the hardest bucket, or of all, "
            "or H@0.1. Default: `endpoint` with held-out samples, else `hardest`."
        },
    )
    generate_seeds: list[int] = field(
        default_factory=list,
        metadata={"help": "Runs with these seeds also generate every answer at their end (ROUGE-L, verbatim)."},
    )
    end_below: float = field(
        default=0.0,
        metadata={"help": "A run ends when less than this share of the starting forget probability is left; 0: never."},
    )
    end_worst_quarter: float = field(
        default=0.0,
        metadata={
            "help": "A run ends when the worst quarter of its forget samples is at most this probability; 0: never. "
            "What comes after the endpoint costs time and is in no comparison by it."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self)
        if not isinstance(self.train, dict):
            raise ValueError(f"train must be a mapping of options, got {self.train!r}")
        self._check_executor()
        if self.extensions is None:
            self.extensions = 0 if self.heldout_dataset is None else EXTENSIONS
        for grid in self.grids:
            self._check_grid(grid)
        self._check_arms()
        needs = dict.fromkeys(("relearn_rate", "relearn_steps"), "relearn_samples")
        check_void(self, {**needs, "holdout_config": "holdout_dataset", "holdout_split": "holdout_dataset"})
        self._check_values()
        if not self.retain_level or not all(0 < level < 1 for level in self.retain_level):
            raise ValueError(f"retain_level must be between 0 and 1, got {self.retain_level}")
        self._check_endpoint()
        for grid in self.grids if self.tuning_seeds > 1 else []:
            seeds, settings = len(grid.get("seed", [0])), math.prod(len(grid.get(name, [0])) for name in TUNED)
            if settings > 1 and seeds <= self.tuning_seeds:
                raise ValueError(
                    f"tuning_seeds {self.tuning_seeds} leaves no seed to report on: {seeds} in a mapping of grid"
                )

    def _check_executor(self) -> None:
        """Raise `ValueError` for jobs that cannot be, or options of one executor beside the other."""
        if self.executor == "slurm":
            check_jobs(self.slurm)
            if self.devices:
                raise ValueError("devices has no effect with executor slurm; a job gets its own: slurm: {gpus: 1}")
        elif self.slurm:
            raise ValueError("slurm has no effect with executor local")

    def _check_endpoint(self) -> None:
        """Raise `ValueError` for what an endpoint on held-out samples cannot be made of; sets `tune_on`."""
        if self.heldout_dataset is None and self.never_seen is not None:
            raise ValueError("never_seen needs heldout_dataset")
        if self.tune_on is None:
            self.tune_on = "hardest" if self.heldout_dataset is None else "endpoint"
        if self.tune_on not in ("hardest", "all", "endpoint"):
            raise ValueError(f"tune_on must be 'hardest' or 'all' or 'endpoint', got {self.tune_on!r}")
        if self.tune_on == "endpoint" and self.heldout_dataset is None:
            raise ValueError("tune_on 'endpoint' needs heldout_dataset")
        if self.never_seen is not None and self.reference_model is not None:
            raise ValueError("never_seen is what reference_model says: give one of them")
        if self.never_seen is not None and not 0 <= self.never_seen < 1:
            raise ValueError(f"never_seen must be at least 0 and below 1, got {self.never_seen}")

    def _check_values(self) -> None:
        """Raise `ValueError` for a value of the grid or of `train` that has no type or range of `cud train`."""
        given = [("train", self.train), *(("grid", dict([pair])) for pair in self._grid_values())]
        for where, values in given:
            check_values(CUDConfig, values, where)  # type: ignore[arg-type]
            if not isinstance(values.get(SCORES, ""), str):  # type: ignore[union-attr]
                raise ValueError(f"{where}: {SCORES} must be a string, got {values[SCORES]!r}")  # type: ignore[index]

    def _grid_values(self) -> list[tuple[str, Any]]:
        return [(name, value) for grid in self.grids for name, values in grid.items() for value in values]

    def _check_grid(self, grid: Any) -> None:
        """Raise `ValueError` for one mapping of the grid, or `train` beside it, that is none of options to choose."""
        if not isinstance(grid, dict):
            raise ValueError(f"grid must be a mapping of options or a list of such, got {grid!r}")
        if not grid:
            raise ValueError(
                "grid is empty: give options with a list of values, for example {schedule: [uniform, ...]}"
            )
        for name, values in grid.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"grid: {name} needs a list of values, got {values!r}")
            if len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
                raise ValueError(f"grid: {name} has a value twice: {values}")
        both = sorted(set(grid) & set(self.train))
        if both:
            raise ValueError(f"{both[0]!r} is both in grid and in train")
        for name in [*grid, *self.train]:
            if name not in TRAIN_FIELDS or name in RESERVED:
                why = "is set by the study itself" if name in RESERVED else "is no option of `cud train`"
                raise ValueError(f"{name!r} {why}")

    def _check_arms(self) -> None:
        """Raise `ValueError` for an arm that is none of options, or beside which `grid` has the same."""
        if not isinstance(self.arms, dict):
            raise ValueError(f"arms must be a mapping of names to options, got {self.arms!r}")
        in_a_grid = {name for grid in self.grids for name in grid}
        for arm, options in self.arms.items():
            if not isinstance(options, dict):
                raise ValueError(f"arm {arm!r} must be a mapping of options, got {options!r}")
            for name in options:
                if name not in ARM_FIELDS or name in RESERVED | {"seed"}:
                    why = "is set by the study itself" if name in RESERVED else "is no option of an arm"
                    raise ValueError(f"arm {arm!r}: {name!r} {why}")
                if name in in_a_grid:
                    raise ValueError(f"{name!r} is both in grid and in arm {arm!r}")
            if not isinstance(options.get(EQUAL_COMPUTE, False), bool):
                raise ValueError(f"arm {arm!r}: {EQUAL_COMPUTE} must be true or false, got {options[EQUAL_COMPUTE]!r}")
            if options.get("difficulty") == ORACLE and "uniform" not in self.arms:
                raise ValueError(f"arm {arm!r}: difficulty {ORACLE!r} needs an arm called 'uniform'")

    @property
    def grids(self) -> list[dict[str, Any]]:
        """The mappings whose combinations are the cells."""
        return self.grid if isinstance(self.grid, list) and self.grid else [self.grid]

    @property
    def tunes(self) -> bool:
        """Whether the grid has several learning rates or retain weights to choose from."""
        return any(len(grid.get(name, [])) > 1 for grid in self.grids for name in TUNED)

    def load_utility(self, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
        """The samples that measure utility, before they are thinned; `None` for the retain set."""
        if self.utility_dataset is None and self.utility_config is None:
            return None
        source = self.utility_dataset or self.retain_dataset or self.forget_dataset or ""
        return self.read(source, self.utility_config, self.utility_split, None, "utility", tokenizer)

    def load_holdout(self, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
        """The samples that were never seen; `None` without."""
        if self.holdout_dataset is None:
            return None
        return self.read(self.holdout_dataset, self.holdout_config, self.holdout_split, None, "holdout", tokenizer)


def read_arguments(argv: list[str]) -> tuple[Any, Any]:
    """Options of a study; those of its recipe stand behind its own.

    Raises:
        ValueError: for a recipe that cannot be read or has an option that a study has no place for.
    """
    kinds = (StudyArguments, ModelConfig)
    args, model_args = parse_options(kinds, argv, "cud study", about=STUDY)
    if args.recipe is not None:
        recipe = _read_recipe(args.recipe)
        shared = {name: value for name, value in recipe.items() if name in SHARED_FIELDS}
        args, model_args = parse_options(kinds, argv, "cud study", shared)
        _as_defaults(args, {name: value for name, value in recipe.items() if name not in SHARED_FIELDS | RESERVED})
    check_model_options(model_args, argv)
    if args.natural_group is not None:
        _as_defaults(args, {"group_column": args.natural_group})
    return args, model_args


def _as_defaults(args: StudyArguments, options: dict[str, Any]) -> None:
    """Options of `cud train` that hold where neither the grid nor `train` has them."""
    in_a_grid = {name for grid in args.grids for name in grid}
    args.train = {name: value for name, value in options.items() if name not in in_a_grid} | args.train  # type: ignore[operator]
    for grid in args.grids:  # what another mapping of the grid has cannot stand in `train`
        grid.update({name: [options[name]] for name in in_a_grid if name in options and name not in grid})


def _read_recipe(path: str) -> dict[str, Any]:
    recipe = read_yaml(path)
    unknown = [name for name in recipe if name not in SHARED_FIELDS | TRAIN_FIELDS]
    if unknown:
        raise ValueError(f"recipe {path}: a study has no place for {unknown[0]!r}")
    return recipe
